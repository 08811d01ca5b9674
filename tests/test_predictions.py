import json

import jiwer
import pytest

from kdlib.errors import UserError
from kdlib.evaluate import predictions, score
from kdlib.evaluate.hypotheses import Hypothesis
from kdlib.evaluate.score import About
from kdlib.tokens import normalise


def evaluation(path, pairs, **more):
    """Write an evaluation file in the original study's format."""
    predictions = [
        {
            "utterance_id": f"M08_B3_CW{index}_M{2 + index % 7}",
            "target": reference,
            "prediction_tokens": [1],
            "prediction_text": hypothesis,
        }
        for index, (reference, hypothesis) in enumerate(pairs)
    ]
    path.write_text(json.dumps({"num_samples": len(pairs), "predictions": predictions} | more), encoding="utf-8")
    return path


def test_kdlibs_own_hypotheses_are_read(tmp_path):
    rows = [
        Hypothesis("a_1", "A", "", "", "", "ONE", greedy="one", beam=""),
        Hypothesis("b_1", "B", "", "", "", "TWO", greedy="TO", beam="TWO"),
    ]
    score.write(rows, ("greedy", "beam"), tmp_path, About("x"))
    for path in (tmp_path, tmp_path / "hypotheses.csv"):
        table = predictions.read(path)
        assert table.values.tolist() == [["a_1", "A", "ONE", "ONE"], ["b_1", "B", "TWO", "TO"]]
    assert predictions.read(tmp_path, "beam").hypothesis.tolist() == ["", "TWO"]
    for name, hint in (("attention", "expected one of beam, greedy"), ("gredy", "did you mean 'greedy'")):
        with pytest.raises(UserError, match=f"the decoder '{name}' was not used for this system; {hint}"):
            predictions.read(tmp_path, name)


def test_the_original_studys_evaluation_file_is_read(tmp_path):
    path = evaluation(tmp_path / "evaluation.json", [("COME", "AL"), ("YALE", "YALE")])
    table = predictions.read(path)
    assert table.speaker.tolist() == ["M08", "M08"]  # from the ids
    assert table.hypothesis.tolist() == ["AL", "YALE"]


def test_a_collapsed_file_of_1785_predictions_scores_as_with_jiwer(tmp_path):
    """WRA 0, WER 2,300 %: 23 wrong words for each word, as the original study's CTC file has."""
    words = " ".join(f"W{index}" for index in range(23))
    pairs = [(f"WORD{index % 255}", f"{words} {'X' if index % 200 == 0 else ''}") for index in range(1785)]
    refs, hyps = ([normalise(text) for text in texts] for texts in zip(*pairs, strict=True))
    counts = jiwer.process_words(refs, hyps)
    table = predictions.read(evaluation(tmp_path / "evaluation.json", pairs))
    result = score.score(table.reference.tolist(), table.hypothesis.tolist())
    assert (result.n, result.wra, result.reference_words) == (1785, 0.0, 1785)
    assert (result.substitutions, result.deletions) == (1785, 0)
    assert result.insertions == counts.insertions == 22 * 1785 + 9
    assert result.wer == pytest.approx((23 * 1785 + 9) / 1785)


def test_nemos_json_lines_and_plain_text_are_read(tmp_path):
    lines = [
        {"audio_filepath": "wav/M05_B2_C1_M5.wav", "text": "up", "pred_text": "Up", "duration": 1.0},
        {"audio_filepath": "wav/M05_B2_C2_M5.wav", "text": "down", "pred_text": "", "duration": 1.0},
    ]
    manifest = tmp_path / "predictions.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)) + "\n")
    table = predictions.read(manifest)
    assert table.values.tolist() == [["M05_B2_C1_M5", "M05", "UP", "UP"], ["M05_B2_C2_M5", "M05", "DOWN", ""]]
    (tmp_path / "ref.txt").write_text("up\ndown\n")
    (tmp_path / "hyp.txt").write_text("up\n\n")
    assert predictions.read(tmp_path / "hyp.txt", references=tmp_path / "ref.txt").hypothesis.tolist() == ["UP", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n', "it is a JSON object without predictions"),
        ("x.jsonl", '{"text": "a"}\n' * 2, "row 1: no hypothesis in it .found text.; name the columns: COLUMNS="),
        ("x.jsonl", '{"text": "a", "pred_text": "a"}\nb\n', "line 2: no JSON object"),
        ("x.json", '{"predictions": []}', "it has no predictions"),
        (
            "x.json",
            '{"predictions": [{"utterance_id": "a", "target": "ONE", "prediction_tokens": [5]}]}',
            "1 of 1 rows lack a hypothesis",
        ),
        ("x.json", '{"predictions": [{"target": "ONE", "prediction_text": "A"}]}', "rows lack an id"),
        (
            "x.json",
            '{"predictions": ['
            + ", ".join(['{"utterance_id": "a", "target": "A", "prediction_text": "A"}'] * 2)
            + "]}",
            "'a' appears twice",
        ),
        (
            "x.json",
            '{"predictions": [{"utterance_id": "a", "target": " ", "prediction_text": "A"}]}',
            "reference of a is empty",
        ),
        ("x.txt", "one\n", "needs its references"),
        ("x.csv", "utt_id\n", "it has no predictions"),
        ("x.csv", "id,text\na,b\n", "it has no predictions; expected a result file"),
        ("x.json", "5", "it has no predictions"),
        ("x.json", '{"predictions": null}', "it has no predictions"),
        ("x.json", '{"predictions": ["a"]}', "it has no predictions"),
    ],
)
def test_unreadable_files_are_refused_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        predictions.read(tmp_path / name)


def test_the_output_of_an_untrained_head_is_not_read(tmp_path):
    """A student trained with the decoder alone still has a CTC head, and hypotheses.csv has its column."""
    rows = [Hypothesis("a_1", "A", "", "", "", "ONE", greedy="XYZ", attention="ONE")]
    score.write(rows, ("attention",), tmp_path, About("x"))
    assert predictions.read(tmp_path, "attention").hypothesis.tolist() == ["ONE"]
    with pytest.raises(UserError, match="'greedy' was not used"):
        predictions.read(tmp_path, "greedy")


def test_file_names_that_repeat_between_speakers_keep_their_folder(tmp_path):
    """TORGO's speakers all have a 0001.wav."""
    lines = [{"audio_filepath": f"{name}/0001.wav", "text": "up", "pred_text": "up"} for name in ("F01", "M01")]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert predictions.read(tmp_path / "x.jsonl").utt_id.tolist() == ["F01/0001.wav", "M01/0001.wav"]


def test_missing_undecodable_and_unpaired_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no predictions found"):
        predictions.read(tmp_path / "none")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        predictions.read(tmp_path / "bad.json")
    (tmp_path / "ref.txt").write_text("one\ntwo\n")
    (tmp_path / "hyp.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"has 1 lines, .* has 2; they must have equally many"):
        predictions.read(tmp_path / "hyp.txt", references=tmp_path / "ref.txt")
