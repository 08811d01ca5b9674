import json

import pytest
from corpora import utterances

from kdlib.io import write_json
from kdlib.pipeline import Fold
from kdlib.settings.targets import METHODS
from kdlib.show import format
from kdlib.targets.target_report import SAMPLE, best_method, disagreement, method_gains, report_frame


def test_every_method_is_decoded_on_training_and_dev_speech(with_teachers):
    folder = with_teachers.target_report()
    table = report_frame(folder)
    assert set(zip(table.method, table.speech, strict=True)) == {
        (method, speech) for method in METHODS for speech in ("training", "dev")
    }
    train = with_teachers.splits.train
    assert table[table.speech == "training"].n.unique().tolist() == [min(SAMPLE, len(train))]
    coverage = json.loads((folder / "logprob_mean" / "coverage.json").read_text())
    assert coverage == {"teachers": 1, "usable": len(train), "incomplete": 0, "left_out": 0}


def test_a_single_teacher_scores_the_same_under_every_mean(with_teachers):
    table = report_frame(with_teachers.target_report()).set_index(["method", "speech"])
    for speech in ("training", "dev"):
        means = [method for method in METHODS if method != "transformer"]  # which corrects even a single teacher
        scores = {tuple(table.loc[(method, speech)].drop(["teachers", "remark"])) for method in means}
        assert len(scores) == 1


def test_a_fold_without_a_dev_speaker_has_no_dev_speech(with_teachers):
    speakers = {"dev": None, "exclude": ["M01"], "teachers": ["M04", "M10"]}
    fold = Fold.load("params/smoke.yaml", "M08", fold=speakers, overrides={"outputs": with_teachers.params.outputs})
    folder = fold.target_report()
    assert set(report_frame(folder).speech) == {"training"}
    pairs, simultaneous, timing = disagreement(folder)
    assert len(pairs) == 1
    assert timing.stride_ms == 40
    assert len(simultaneous) == 2


DEV = utterances("a", "b", speakers=["M10", "M10"], texts=["ONE", "TWO"])
# What happened on real speech: closed-lexicon and greedy WRA on dev speech, then on training speech. The transformer
# was far ahead on the dev speaker, whose words and voice it had been fitted on, and the worst on training speech.
REAL = {
    "logprob_mean": (0.626, 0.45, 0.80, 0.520),
    "prob_mean": (0.650, 0.47, 0.81, 0.530),
    "weighted_loss": (0.990, 0.99, 0.99, 0.990),  # has used the references
    "own": (0.626, 0.45, 0.99, 0.990),
    "attention": (0.640, 0.46, 0.79, 0.500),
    "transformer": (0.862, 0.70, 0.771, 0.411),
}


def reported(folder, scores):
    """A target report with these scores."""
    for method, (dev_lexicon, dev_greedy, lexicon, greedy) in scores.items():
        for speech, pair in (("dev", (dev_greedy, dev_lexicon)), ("training", (greedy, lexicon))):
            (folder / method / speech).mkdir(parents=True)
            decoders = {
                name: {"wra": wra, "wer": 1 - wra / 2} for name, wra in zip(("greedy", "lexicon"), pair, strict=True)
            }
            write_json(folder / method / speech / "scores.json", {"decoders": decoders})
    return folder


def chosen(folder, scores, heads="ctc", measure="wra", dev=DEV):
    return best_method(reported(folder, scores), METHODS, dev, heads, measure)


def test_auto_does_not_choose_what_is_best_on_the_dev_speaker_alone(tmp_path):
    method, why = chosen(tmp_path, REAL)
    assert method == "prob_mean"
    assert why == (
        "auto: prob_mean, with 56.0 and 67.0 % on the dev speaker M10 and on training speech (WRA, the mean of greedy "
        "and closed lexicon); the plain mean has 53.8 and 66.0 %; transformer, the best on the dev speaker, has 78.1 "
        "and 59.1 %: it gains less on training speech; 4 methods were compared; halves of the dev speech share no word"
    )


def test_auto_chooses_a_fusion_that_wins_on_both(tmp_path):
    method, why = chosen(tmp_path, REAL | {"transformer": (0.70, 0.55, 0.85, 0.60)})
    assert method == "transformer"
    assert "the best on the dev speaker, has" not in why


def test_a_method_counts_by_the_smaller_of_its_gains(tmp_path):
    gains = method_gains(reported(tmp_path, REAL), "wra")
    assert list(gains.index) == ["logprob_mean", "prob_mean", "attention", "transformer"]
    assert gains.gain["logprob_mean"] == 0
    assert gains.gain["prob_mean"] == pytest.approx(min((0.650 + 0.47) - (0.626 + 0.45), (0.81 + 0.53) - 1.32) / 2)
    assert gains.gain["transformer"] == pytest.approx(((0.771 + 0.411) - (0.80 + 0.52)) / 2)
    shown = format.method_gains(gains)
    assert shown.loc["transformer"].to_dict() == {
        "dev": 78.1,
        "training": 59.1,
        "gain on dev": 24.3,
        "gain on training": -6.9,
        "counts for auto": -6.9,
    }


def test_without_a_gain_on_both_it_is_the_plain_mean(tmp_path):
    worse_on_one = {"prob_mean": (0.66, 0.50, 0.70, 0.45), "attention": (0.60, 0.40, 0.90, 0.60)}
    method, why = chosen(tmp_path, {"logprob_mean": REAL["logprob_mean"]} | worse_on_one)
    assert method == "logprob_mean"
    assert "the plain mean has" not in why


def test_of_equal_methods_the_simplest_is_chosen(tmp_path):
    better = (0.70, 0.50, 0.85, 0.60)
    scores = REAL | dict.fromkeys(("transformer", "best", "weighted_accuracy", "attention"), better)
    assert chosen(tmp_path, scores)[0] == "weighted_accuracy"


def test_a_fusion_is_not_chosen_for_a_decoder(tmp_path):
    scores = REAL | {"transformer": (0.70, 0.55, 0.85, 0.60)}
    assert chosen(tmp_path, scores, heads="both")[0] == "prob_mean"


def test_sentences_are_compared_by_words_correct_and_share_words(tmp_path):
    dev = utterances("a", speakers=["M10"], texts=["GO HOME"])
    method, why = chosen(tmp_path, REAL, measure="wer", dev=dev)
    assert method == "prob_mean"
    assert "23.5 and 26.5 % on the dev speaker M10 and on training speech (words correct, greedy)" in why
    assert why.endswith("halves of the dev speech share no text, but sentences repeat words")
