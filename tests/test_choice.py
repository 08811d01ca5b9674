"""A fold's targets: the teachers, the speech that has a target, and the weights."""

import pytest
import torch
from corpora import utterances

from kdlib.corpus.inputs import Batch
from kdlib.errors import UserError
from kdlib.evaluate.hypotheses import read_hypotheses
from kdlib.logits import teacher_scores
from kdlib.logits.extract import OUTPUTS, read_outputs
from kdlib.pipeline import Fold
from kdlib.settings.targets import METHODS
from kdlib.targets.choice import _usable_weights, halves


def of_teachers(with_teachers, names, **fold):
    settings = {"dev": None, "exclude": ["M01"], "teachers": names} | fold
    return Fold.load("params/smoke.yaml", "M08", fold=settings, overrides={"outputs": with_teachers.params.outputs})


def test_the_target_is_one_distribution_per_frame(with_teachers):
    utt = with_teachers.splits.train[0]
    log_probs, frames = with_teachers.targets().log_probs(Batch([utt]))
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(1, int(frames[0])), atol=1e-4)


@pytest.mark.parametrize(("speaker", "why"), [("M08", "is held out"), ("M10", "is the dev speaker")])
def test_there_is_no_target_on_held_out_and_dev_speech(with_teachers, speaker, why):
    utt = next(utt for utt in with_teachers.splits.speech_of_all() if utt.speaker == speaker)
    with pytest.raises(UserError, match=f"{utt.utt_id}: {speaker} {why}: no training target"):
        with_teachers.targets().log_probs(Batch([utt]))


def test_a_teacher_trained_on_the_held_out_speaker_is_refused(with_teachers):
    store = with_teachers.store("M08", "training")
    with pytest.raises(UserError, match="its teacher M08 was trained on M08"):
        store.check(tokens=with_teachers.tokens, held_out=["M08"])


def test_analysis_stores_are_no_training_targets(with_teachers):
    store = with_teachers.store("M04", "analysis")
    with pytest.raises(UserError, match="made for analysis of a held-out speaker; it is no training target"):
        store.check(tokens=with_teachers.tokens, held_out=["M08"])
    assert with_teachers.targets(purpose="analysis").stores.keys() == {"M04"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_probabilities(with_teachers, method):
    fold = of_teachers(with_teachers, ["M04", "M10"])
    utt = next(utt for utt in fold.splits.speech_of_all() if utt.speaker == "M04")
    log_probs, _ = fold.targets(method).log_probs(Batch([utt]))
    assert float(log_probs.exp().sum(-1).sub(1).abs().max()) < 1e-4


def test_own_uses_the_speakers_own_teacher(with_teachers):
    fold = of_teachers(with_teachers, ["M04", "M10"])
    utt = next(utt for utt in fold.splits.speech_of_all() if utt.speaker == "M10")
    log_probs, _ = fold.targets("own").log_probs(Batch([utt]))
    alone = fold.store("M10", "training").logits(utt.utt_id).log_softmax(-1)
    assert torch.allclose(log_probs[0], alone, atol=1e-4)


def test_weights_by_loss_match_the_formula(with_teachers):
    fold = of_teachers(with_teachers, ["M04", "M10"])
    utt = next(utt for utt in fold.splits.speech_of_all() if utt.speaker == "M10")
    ensemble = fold.targets("weighted_loss")
    rows = [read_outputs(fold.outputs(name, "training") / OUTPUTS) for name in ("M04", "M10")]
    losses = torch.tensor([of_teacher[utt.utt_id].ctc_loss for of_teacher in rows])
    expected = (-losses).softmax(0)
    assert torch.allclose(torch.tensor(ensemble._weights(utt.utt_id, utt.speaker)), expected, atol=1e-4)


def test_accuracies_are_those_on_the_dev_speaker(with_teachers, corpus):
    fold = of_teachers(with_teachers, ["M04"], dev="M10")
    expected = teacher_scores.accuracy_matrix(corpus, {"M04": fold.teacher_scores("M04")}, "greedy").loc["M04", "M10"]
    assert fold._accuracies(["M04"]) == {"M04": expected}


def test_no_word_is_in_both_halves_of_dev_speech_and_few_words_are_divided_evenly():
    words = ["ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE", "ZERO"]
    speech = utterances(*(f"u{place}" for place in range(40)), texts=[words[place % 10] for place in range(40)])
    half_of = halves(speech)
    of_words = {utt.text: {half_of[other.utt_id] for other in speech if other.text == utt.text} for utt in speech}
    assert sorted(map(min, of_words.values())) == sorted(map(max, of_words.values())) == [0] * 5 + [1] * 5
    assert halves(speech[::-1]) == half_of


def test_sentences_are_divided_as_wholes_and_one_word_by_utterance():
    speech = utterances("a", "b", "c", "d", texts=["GO HOME", "GO HOME", "GO UP", "COME UP"])
    half_of = halves(speech)
    assert half_of["a"] == half_of["b"]
    assert set(half_of.values()) == {0, 1}
    assert sorted(halves(utterances("a", "b", "c", "d", texts=["GO"] * 4)).values()) == [0, 0, 1, 1]


def test_accuracies_of_a_half_are_of_its_words(with_teachers):
    fold = of_teachers(with_teachers, ["M04"], dev="M10")
    half_of, rows = halves(fold.splits.dev), read_hypotheses(fold.teacher_scores("M04") / "hypotheses.csv")
    correct = {row.utt_id: row.greedy == row.reference for row in rows}
    for half in (0, 1):
        part = [correct[utt_id] for utt_id, its_half in half_of.items() if its_half == half]
        assert part
        assert fold._accuracies(["M04"], half) == {"M04": sum(part) / len(part)}


def test_all_teachers_weigh_the_same_if_none_recognises_a_word():
    with pytest.warns(UserWarning, match="no teacher recognises a word of the speech"):
        assert _usable_weights({"A": 0.0, "B": 0.0}) == {"A": 1.0, "B": 1.0}


def test_an_unknown_method_is_refused(with_teachers):
    with pytest.raises(UserError, match="unknown method 'median'; expected one of logprob_mean"):
        with_teachers.targets("median")
