import json

import jiwer
import pytest

from kdlib.errors import UserError
from kdlib.evaluate import predictions, score
from kdlib.evaluate.score import Hypothesis
from kdlib.tokens import normalise


def evaluation(path, pairs, **more):
    """A file in the original study's shape."""
    predictions = [
        {
            "utterance_id": f"M08_B3_CW{index}_M{2 + index % 7}",
            "target": told,
            "prediction_tokens": [1],
            "prediction_text": said,
        }
        for index, (told, said) in enumerate(pairs)
    ]
    path.write_text(json.dumps({"num_samples": len(pairs), "predictions": predictions} | more), encoding="utf-8")
    return path


def test_hypotheses_of_ours(tmp_path):
    rows = [
        Hypothesis("a_1", "A", "", "", "", "ONE", greedy="one", beam=""),
        Hypothesis("b_1", "B", "", "", "", "TWO", greedy="TO", beam="TWO"),
    ]
    score.write(rows, ("greedy", "beam"), tmp_path, system="x", held_out="", tokenizer="", checkpoint="")
    for path in (tmp_path, tmp_path / "hypotheses.csv"):
        table = predictions.read(path)
        assert table.values.tolist() == [["a_1", "A", "ONE", "ONE"], ["b_1", "B", "TWO", "TO"]]
    assert predictions.read(tmp_path, "beam").hypothesis.tolist() == ["", "TWO"]
    for name, hint in (("attention", "expected one of beam, greedy"), ("gredy", "did you mean 'greedy'")):
        with pytest.raises(UserError, match=f"the decoder '{name}' was not used for this system; {hint}"):
            predictions.read(tmp_path, name)


def test_the_original_studys_file(tmp_path):
    path = evaluation(tmp_path / "evaluation.json", [("COME", "AL"), ("YALE", "YALE")])
    table = predictions.read(path)
    assert table.speaker.tolist() == ["M08", "M08"]  # said by the ids
    assert table.hypothesis.tolist() == ["AL", "YALE"]


def test_a_collapsed_file_of_1785_predictions_is_read_and_scored_as_it_says_of_itself(tmp_path):
    """WRA 0, WER 2,300 %: 23 wrong words for each word, as the original study's CTC file has."""
    words = " ".join(f"W{index}" for index in range(23))
    pairs = [(f"WORD{index % 255}", f"{words} {'X' if index % 200 == 0 else ''}") for index in range(1785)]
    told, said = zip(*pairs, strict=True)
    counted = jiwer.process_words([normalise(one) for one in told], [normalise(one) for one in said])
    table = predictions.read(evaluation(tmp_path / "evaluation.json", pairs))
    result = score.score(table.reference.tolist(), table.hypothesis.tolist())
    assert (result.n, result.wra, result.reference_words) == (1785, 0.0, 1785)
    assert (result.substitutions, result.deletions) == (1785, 0)
    assert result.insertions == counted.insertions == 22 * 1785 + 9
    assert result.wer == pytest.approx((23 * 1785 + 9) / 1785)


def test_nemos_lines_and_plain_text(tmp_path):
    lines = [
        {"audio_filepath": "wav/M05_B2_C1_M5.wav", "text": "up", "pred_text": "Up", "duration": 1.0},
        {"audio_filepath": "wav/M05_B2_C2_M5.wav", "text": "down", "pred_text": "", "duration": 1.0},
    ]
    manifest = tmp_path / "answers.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)) + "\n")
    table = predictions.read(manifest)
    assert table.values.tolist() == [["M05_B2_C1_M5", "M05", "UP", "UP"], ["M05_B2_C2_M5", "M05", "DOWN", ""]]
    (tmp_path / "ref.txt").write_text("up\ndown\n")
    (tmp_path / "hyp.txt").write_text("up\n\n")
    assert predictions.read(tmp_path / "hyp.txt", references=tmp_path / "ref.txt").hypothesis.tolist() == ["UP", ""]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a"}\n', "line 1: no pred_text"),
        ("x.json", '{"predictions": []}', "no prediction in it"),
        (
            "x.json",
            '{"predictions": [{"utterance_id": "a", "target": "ONE", "prediction_tokens": [5]}]}',
            "not a text of what",
        ),
        ("x.json", '{"predictions": [{"target": "ONE", "prediction_text": "A"}]}', "have not an id"),
        (
            "x.json",
            '{"predictions": ['
            + ", ".join(['{"utterance_id": "a", "target": "A", "prediction_text": "A"}'] * 2)
            + "]}",
            "'a' stands twice",
        ),
        (
            "x.json",
            '{"predictions": [{"utterance_id": "a", "target": " ", "prediction_text": "A"}]}',
            "reference of a is empty",
        ),
        ("x.txt", "one\n", "needs its references"),
        ("x.csv", "utt_id\n", "no prediction in it"),
        ("x.csv", "id,text\na,b\n", "not a hypotheses.csv of kdlib"),
        ("x.json", "5", "no pred_text"),
        ("x.json", '{"predictions": null}', "no prediction in it"),
        ("x.json", '{"predictions": ["a"]}', "no prediction in it"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        predictions.read(tmp_path / name)


def test_what_an_untrained_head_wrote_is_no_answer(tmp_path):
    """A student with a decoder alone has a CTC head all the same, and hypotheses.csv has its column."""
    rows = [Hypothesis("a_1", "A", "", "", "", "ONE", greedy="XYZ", attention="ONE")]
    score.write(rows, ("attention",), tmp_path, system="x", held_out="", tokenizer="", checkpoint="")
    assert predictions.read(tmp_path, "attention").hypothesis.tolist() == ["ONE"]
    with pytest.raises(UserError, match="'greedy' was not used"):
        predictions.read(tmp_path, "greedy")


def test_names_that_others_have_too_keep_their_folder(tmp_path):
    """TORGO's speakers all have a 0001.wav."""
    lines = [{"audio_filepath": f"{who}/0001.wav", "text": "up", "pred_text": "up"} for who in ("F01", "M01")]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert predictions.read(tmp_path / "x.jsonl").utt_id.tolist() == ["F01/0001.wav", "M01/0001.wav"]


def test_other_refusals(tmp_path):
    with pytest.raises(UserError, match="no answers there"):
        predictions.read(tmp_path / "none")
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        predictions.read(tmp_path / "bad.json")
    (tmp_path / "ref.txt").write_text("one\ntwo\n")
    (tmp_path / "hyp.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"has 1 lines, .* has 2"):
        predictions.read(tmp_path / "hyp.txt", references=tmp_path / "ref.txt")
