import json

import numpy as np
import pytest

from kdlib.errors import UserError
from kdlib.evaluate import score as scoring
from kdlib.evaluate.hypotheses import Hypothesis, read_hypotheses, write_hypotheses
from kdlib.evaluate.score import About, score, scores_by, summary
from kdlib.settings.evaluation import Scoring

ROWS = [
    Hypothesis("a1", "A", "HIGH", "digit", "yes", "ONE", greedy="ONE", lexicon="ONE", token_ids="5 6", n_tokens=2),
    Hypothesis("a2", "A", "HIGH", "digit", "no", "TWO", greedy="TO", lexicon="TWO", token_ids="7", n_tokens=1),
    Hypothesis("b1", "B", "LOW", "common", "yes", "WRITE", greedy="", lexicon="RIGHT"),
    Hypothesis("b2", "B", "LOW", "common", "no", "SEE", greedy="SEE THE SEA", lexicon="SEE"),
]


def test_wra_compares_whole_hypotheses():
    result = score(["ONE", "TWO", "SEE"], ["ONE", "TWO OF", "SEA"])
    assert result.wra == pytest.approx(1 / 3)
    assert result.wra_first_word == pytest.approx(2 / 3)


def test_wer_and_its_parts():
    result = score(["ONE", "TWO", "SEE"], ["ONE OF", "", "SEA"])  # one insertion, one deletion, one substitution
    assert (result.substitutions, result.deletions, result.insertions, result.reference_words) == (1, 1, 1, 3)
    assert result.wer == pytest.approx(3 / 3)
    assert result.cer == pytest.approx((3 + 3 + 1) / (3 + 3 + 3))  # " OF", "TWO", E -> A


def test_wer_may_exceed_one():
    assert score(["ONE"], ["GRAY DECAY WINTER"]).wer == pytest.approx(3 / 1)


def test_case_and_spaces_do_not_count():
    assert score(["it's  ONE"], ["IT\u2019S one"]).wra == 1


@pytest.mark.parametrize(("normaliser", "expected"), [("none", 1 / 4), ("homophones", 3 / 4)])
def test_homophones_are_the_same_only_on_request(normaliser, expected):
    references, hypotheses = ["TWO", "WRITE", "THERE", "ONE"], ["TO", "RIGHT", "WHERE", "ONE"]
    assert score(references, hypotheses, normaliser=normaliser).wra == pytest.approx(expected)


def test_the_interval_contains_the_value_and_narrows_with_more_utterances():
    few, many = (scoring.interval(np.array([1, 0] * n)) for n in (10, 1000))
    assert few[0] < 0.5 < few[1]
    assert many[1] - many[0] < few[1] - few[0]
    assert many[1] - many[0] == pytest.approx(2 * 1.96 * 0.5 / 2000**0.5, rel=0.15)  # the normal approximation


@pytest.mark.parametrize(
    ("references", "hypotheses", "message"),
    [
        (["ONE"], [], "1 references, but 0 hypotheses"),
        ([], [], "nothing to score"),
        (["ONE", " "], ["A", "B"], "reference 2 of 2 is empty"),
    ],
)
def test_bad_pairs_are_refused(references, hypotheses, message):
    with pytest.raises(UserError, match=message):
        score(references, hypotheses)


def test_scores_by_any_column():
    by_speaker = scores_by(ROWS, "greedy", "speaker")
    assert {name: result.wra for name, result in by_speaker.items()} == {"A": 0.5, "B": 0.0}
    assert {name: result.wra for name, result in scores_by(ROWS, "lexicon", "seen").items()} == {"no": 1.0, "yes": 0.5}


def test_the_summary_scores_the_listed_decoders():
    result = summary(ROWS, ["greedy", "lexicon"], About("test", "A"), Scoring())
    assert list(result["decoders"]) == ["greedy", "lexicon"]
    assert result["decoders"]["lexicon"]["wra"] == pytest.approx(3 / 4)
    assert result["n"] == 4


def test_a_decoder_with_empty_output_scores_zero_and_is_not_left_out():
    rows = [Hypothesis("a", "A", "HIGH", "digit", "yes", "ONE", lexicon="ONE")]
    result = summary(rows, ["greedy", "lexicon"], About("empty", "A"), Scoring())["decoders"]
    assert (result["greedy"]["wra"], result["greedy"]["deletions"], result["lexicon"]["wra"]) == (0, 1, 1)


def test_hypotheses_come_back_as_written(tmp_path):
    write_hypotheses(ROWS, tmp_path / "h.csv")
    assert read_hypotheses(tmp_path / "h.csv") == ROWS


def test_result_files_have_the_documented_fields(tmp_path):
    scoring.write(ROWS, ["greedy", "lexicon"], tmp_path, About("test", "A", "x.nemo"), tokenizer="abc")
    evaluation = json.loads((tmp_path / "evaluation_greedy.json").read_text())
    assert {"checkpoint", "epoch", "num_samples", "tokenizer", "wer", "wra", "predictions"} <= set(evaluation)
    assert evaluation["wra"] == {"value": 0.25, "correct": 1, "total": 4}
    assert evaluation["wer"] == {"value": 1.0, "S": 1, "D": 1, "I": 2, "N": 4}
    assert evaluation["predictions"][0] == {
        "utterance_id": "a1",
        "target": "ONE",
        "prediction_tokens": [5, 6],
        "prediction_text": "ONE",
    }
    assert set(json.loads((tmp_path / "scores.json").read_text())["decoders"]) == {"greedy", "lexicon"}
