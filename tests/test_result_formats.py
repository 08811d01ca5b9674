"""Other toolkits' result files: written by their own tools, or in their published form; the same errors are counted."""

import json

import pytest

from kdlib.errors import UserError
from kdlib.evaluate import compare, predictions
from kdlib.evaluate.nist import write_ctm, write_stm
from kdlib.evaluate.score import score

SHORT = [
    ("M05_B2_C1_M5", "OF", "OF"),
    ("M05_B2_C2_M5", "A", "A"),
    ("M05_B2_C3_M5", "TO", "DO"),
    ("M05_B2_C4_M5", "IN", ""),
]
ROWS = [  # utterance, reference, hypothesis
    ("M05_B2_C1_M5", "THE CAT SAT", "THE CAT SAT"),
    ("M05_B2_C2_M5", "ONE", "TWO"),
    ("M05_B2_C3_M5", "UP AND DOWN", "UP DOWN"),
    ("M05_B2_C4_M5", "A", ""),
    ("F03_B2_C1_M5", "GO HOME", "GO TO HOME NOW"),
]


def counts(table):
    """Substitutions, deletions, insertions."""
    found = score(table.reference.tolist(), table.hypothesis.tolist())
    return found.substitutions, found.deletions, found.insertions


def read_rows(path, **options):
    """The rows of a file, checked against those that were written."""
    table = predictions.read(path, **options)
    assert table.values.tolist() == [[name, name[:3], ref, hyp] for name, ref, hyp in ROWS]
    assert counts(table) == (1, 2, 2)
    return table


def by_speechbrain(path, split=False, rows=ROWS):
    """SpeechBrain's own report of words or characters, and its counts."""
    from speechbrain.utils.metric_stats import ErrorRateStats

    stats = ErrorRateStats(split_tokens=split)
    stats.append([name for name, *_ in rows], [hyp.split() for *_, hyp in rows], [ref.split() for _, ref, _ in rows])
    with path.open("w") as file:
        stats.write_stats(file)
    return stats.summarize()


def test_speechbrains_reports(tmp_path, capsys):
    found = by_speechbrain(tmp_path / "wer_test.txt")
    table = read_rows(tmp_path / "wer_test.txt")
    assert counts(table) == (found["substitutions"], found["deletions"], found["insertions"])
    by_speechbrain(tmp_path / "cer_test.txt", split=True)
    read_rows(tmp_path / "cer_test.txt")
    assert predictions.result_files(tmp_path) == [tmp_path / "wer_test.txt"]  # the same hypotheses
    assert "says" not in capsys.readouterr().out
    text = (tmp_path / "wer_test.txt").read_text().replace("%WER 50.00", "%WER 20.00")
    assert "%WER 20.00" in text
    (tmp_path / "wer_changed.txt").write_text(text)
    read_rows(tmp_path / "wer_changed.txt")
    assert "the file says WER 20, its rows (SpeechBrain's report) give 50.00 %" in capsys.readouterr().out


def test_speechbrains_reports_of_short_words(tmp_path, capsys):
    """The line of edits of a right word of one or two letters is `=` alone."""
    by_speechbrain(tmp_path / "wer.txt", rows=SHORT)
    table = predictions.read(tmp_path / "wer.txt")
    assert list(zip(table.utt_id, table.reference, table.hypothesis, strict=True)) == SHORT
    assert "says" not in capsys.readouterr().out


def test_a_folder_of_kdlibs_own_has_one_decoder_and_no_dev_speech(tmp_path):
    from kdlib.evaluate import score as scoring
    from kdlib.evaluate.hypotheses import Hypothesis

    student = tmp_path / "seed1"
    for part, speaker in (("scores", "M05"), ("scores/dev", "M10")):
        rows = [
            Hypothesis(f"{speaker}_B2_C{n}_M5", speaker, "", "", "", "ONE", greedy="ONE", beam="TWO") for n in range(3)
        ]
        (student / part).mkdir(parents=True)
        scoring.write(rows, ("greedy", "beam"), student / part, scoring.About("x"))
    (student / "history.json").write_text(json.dumps([{"epoch": 1, "loss": 2.0}]))
    for decoder, said in (("greedy", "ONE"), ("beam", "TWO")):
        table = compare.collect([student], decoder)
        assert (len(table), set(table.speaker), set(table.hypothesis)) == (3, {"M05"}, {said})


def test_json_of_studies(tmp_path):
    plain = [{"utterance_id": name, "target": ref, "prediction": hyp} for name, ref, hyp in ROWS]
    details = [{"audio_path": f"x/{name}.wav", "reference": ref, "prediction": hyp} for name, ref, hyp in ROWS]
    for number, content in enumerate(({"predictions": plain}, {"details": details}, plain)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(content))
        read_rows(path)
    tokens = [row | {"prediction_text": row["prediction"], "prediction_tokens": [3, 4]} for row in plain]
    (tmp_path / "tokens.json").write_text(json.dumps({"predictions": tokens}))
    assert predictions.read(tmp_path / "tokens.json", ids=True).token_ids.tolist() == [(3, 4)] * 5


def test_the_speaker_is_that_of_the_header_or_of_the_path(tmp_path):
    rows = [{"id": f"u{number}", "reference": "A", "prediction": "A"} for number in range(3)]
    (tmp_path / "a.json").write_text(json.dumps({"held_out": "M16", "details": rows}))
    (tmp_path / "teacher_M04").mkdir()
    for name in ("wer_M08.json", "F04/wer.json", "teacher_M04/wer.json", "M04_on_M08.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"details": rows}))
    names = ("a.json", "wer_M08.json", "F04/wer.json", "teacher_M04/wer.json")
    assert [predictions.read(tmp_path / name).speaker[0] for name in names] == ["M16", "M08", "F04", "M04"]


def test_lines_and_tables(tmp_path):
    nemo = [{"audio_filepath": f"wav/{name}.wav", "text": ref, "pred_text": hyp} for name, ref, hyp in ROWS]
    face = [{"id": name, "sentence": ref, "prediction": hyp} for name, ref, hyp in ROWS]
    for number, rows in enumerate((nemo, face)):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        read_rows(path)
    for separator, suffix in ((",", "csv"), ("\t", "tsv")):
        lines = [separator.join(("utt_id", "label", "pred_str")), *(separator.join(row) for row in ROWS)]
        (tmp_path / f"x.{suffix}").write_text("\n".join(lines))
        read_rows(tmp_path / f"x.{suffix}")
    (tmp_path / "own.csv").write_text("\n".join(["utt,gold_text,asr", *(",".join(row) for row in ROWS)]))
    columns = predictions.named_columns("id=utt,reference=gold_text,hypothesis=asr")
    read_rows(tmp_path / "own.csv", columns=columns)
    with pytest.raises(UserError, match=r"no column 'gold'; its columns: .*gold_text"):
        predictions.read(tmp_path / "own.csv", columns={"reference": "gold", "hypothesis": "asr"})
    with pytest.raises(UserError, match="unknown part 'hypotesis'; did you mean 'hypothesis'"):
        predictions.named_columns("hypotesis=asr")


def test_nists_pairs(tmp_path):
    for side, place in (("ref", 1), ("hyp", 2)):
        lines = [f"{row[place]} ({row[0]})" for row in ROWS]
        (tmp_path / f"{side}.trn").write_text("\n".join(lines))
    read_rows(tmp_path / "hyp.trn")  # its references lie beside it, as ESPnet writes them
    write_stm(tmp_path / "x.stm", [(name, name[:3], 1.0, ref) for name, ref, _ in ROWS])
    write_ctm(tmp_path / "x.ctm", [(name, 1.0, hyp) for name, _, hyp in ROWS])
    read_rows(tmp_path / "x.ctm")
    (tmp_path / "alone.trn").write_text("ONE (M05_B2_C1_M5)\n")
    with pytest.raises(UserError, match=r"alone.trn: hypotheses \(trn\) without references; .*REFERENCES="):
        predictions.read(tmp_path / "alone.trn")
    (tmp_path / "other.trn").write_text("ONE (M09_B2_C1_M5)\n")
    with pytest.raises(UserError, match=r"1 utterances have no reference in .*ref\.trn, first M09_B2_C1_M5"):
        predictions.read(tmp_path / "other.trn", references=tmp_path / "ref.trn")


def test_kaldis_pairs(tmp_path, capsys):
    for side, place in (("ref", 1), ("hyp", 2)):
        (tmp_path / f"{side}_text").write_text("\n".join(f"{row[0]} {row[place]}".strip() for row in ROWS))
    read_rows(tmp_path / "hyp_text", references=tmp_path / "ref_text")
    for side in ("ref", "hyp"):  # with a tab behind the id
        text = (tmp_path / f"{side}_text").read_text()
        (tmp_path / f"{side}_tabs").write_text("\n".join("\t".join(line.split(" ", 1)) for line in text.splitlines()))
    read_rows(tmp_path / "hyp_tabs", references=tmp_path / "ref_tabs")
    lines = (tmp_path / "hyp_text").read_text().splitlines()
    (tmp_path / "short_text").write_text("\n".join(line for line in lines if line != "M05_B2_C4_M5"))
    read_rows(tmp_path / "short_text", references=tmp_path / "ref_text")
    assert "1 utterances of" in capsys.readouterr().out


def test_icefalls_files(tmp_path):
    lines = [line for name, ref, hyp in ROWS for line in (f"{name}:\tref={ref.split()}", f"{name}:\thyp={hyp.split()}")]
    (tmp_path / "recogs-test.txt").write_text("\n".join(lines))
    read_rows(tmp_path / "recogs-test.txt")
    details = ["THE CAT SAT", "(ONE->TWO)", "UP (AND->*) DOWN", "(A->*)", "GO (*->TO) HOME (*->NOW)"]
    text = "%WER = 50.00\nErrors: 2 insertions, 2 deletions, 1 substitutions, over 10 reference words (7 correct)\n\n"
    text += "PER-UTT DETAILS: corr or (ref->hyp)  \n"
    text += "\n".join(f"{name}:\t{words}" for (name, *_), words in zip(ROWS, details, strict=True))
    (tmp_path / "errs-test.txt").write_text(text + "\n\nSUBSTITUTIONS: count ref -> hyp\n1   ONE -> TWO\n")
    read_rows(tmp_path / "errs-test.txt")
    combined = text.replace("(*->TO) HOME (*->NOW)", "(HOME->TO HOME NOW)")
    (tmp_path / "errs-combined.txt").write_text(combined + "\n")
    read_rows(tmp_path / "errs-combined.txt")


def test_jiwers_counts(tmp_path):
    import jiwer

    found = jiwer.process_words([ref for _, ref, _ in ROWS], [hyp for *_, hyp in ROWS])
    (tmp_path / "x.json").write_text(json.dumps([dict(zip(("id", "ref", "hyp"), row, strict=True)) for row in ROWS]))
    expected = found.substitutions, found.deletions, found.insertions
    assert counts(predictions.read(tmp_path / "x.json")) == expected


def test_a_folder_is_many_speakers_and_what_is_no_result_is_said(tmp_path, capsys):
    for speaker in ("M05", "F03"):
        rows = [row for row in ROWS if row[0].startswith(speaker)]
        content = [{"utterance_id": name, "target": ref, "prediction": hyp} for name, ref, hyp in rows]
        (tmp_path / f"{speaker}.json").write_text(json.dumps({"predictions": content}))
    (tmp_path / "M05_metadata.json").write_text(json.dumps({"utterance_ids": ["a", "b"], "vocabulary": 5000}))
    (tmp_path / "summary.json").write_text(json.dumps({"wer": {"M05": 0.5}, "n": 5}))
    table = compare.collect([tmp_path])
    assert sorted(table.speaker.unique()) == ["F03", "M05"]
    assert len(table) == 5
    out = capsys.readouterr().out
    assert "M05_metadata.json is left out: the metadata of 2 extracted utterances, without hypotheses" in out
    assert "summary.json is left out: a summary of 2 numbers" in out
    with pytest.raises(UserError, match="it is a summary of 2 numbers, without the utterances' hypotheses"):
        predictions.read(tmp_path / "summary.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty: no result files in it"):
        predictions.result_files(empty)


def test_a_folder_of_folders_is_many_systems(tmp_path):
    import argparse

    for system in ("hard", "kd"):
        (tmp_path / "study" / system).mkdir(parents=True)
        by_speechbrain(tmp_path / "study" / system / "wer_all.txt")
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    found = compare.compare_files(parser.parse_args([str(tmp_path / "study"), "--against", "hard"]))
    assert [(one.a, one.b, one.difference) for one in found] == [("kd", "hard", 0.0)]
