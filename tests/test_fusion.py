"""Learned fusion: begins as the mean, learns whom to trust, and is judged on speech that it has not learnt from."""

from pathlib import Path

import pytest
import torch

from kdlib.corpus import prepare
from kdlib.corpus.manifest import Utterance
from kdlib.corpus.speakers import split
from kdlib.errors import UserError
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.params import load
from kdlib.targets import choice, fusion, similarity
from kdlib.targets.aggregation import FUSIONS, TeacherEnsemble, Weighting
from kdlib.targets.choice import METHODS, CrossFitted, half_of, load_target, weighting
from kdlib.targets.similarity import FILE, similarity_weights, speaker_features, speaker_similarity
from kdlib.targets.target_report import NOT_COMPARABLE, best_method

V, D, LENGTH = 9, 6, 8


class Letters:
    """Texts that are ids."""

    def encode(self, text):
        return [int(one) for one in text]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A teacher that writes what was said, and one that writes at random, as loud."""
    folder, found = tmp_path_factory.mktemp("stores"), {}
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(V, D, generator=generator), torch.zeros(V)
    inverse = torch.linalg.pinv(head[0])
    utterances = [f"u{number}" for number in range(40)]
    texts = {name: f"{3 + number % 6}{3 + (number // 6) % 6}" for number, name in enumerate(utterances)}
    for name in ("knows", "guesses"):
        header = Header(
            **{"teacher": name, "train_speakers": (name,), "output": "ctc", "encoding": "fp16", "size": V, "width": D},
            **{"tokens": "t", "blank": 2, "bos": 0, "eos": 1, "stride_ms": 40.0},
        )
        with Writer(folder / name, header, head) as writer:
            for utt_id in utterances:
                ids = texts[utt_id] if name == "knows" else texts[utterances[int(utt_id[1:]) * 7 % 40]]
                frames = torch.tensor([2, int(ids[0]), 2, 2, int(ids[1]), 2, 2, 2])
                writer.add(utt_id, 12 * torch.nn.functional.one_hot(frames, V).float() @ inverse.T)
        found[name] = LogitStore(folder / name)
    return found, [Utterance(name, "S", Path("x.wav"), 0.3, texts[name]) for name in utterances]


def losses(ensemble, utterances):
    logits, frames = ensemble.logits([utt.utt_id for utt in utterances], ["S"] * len(utterances))
    outputs = fusion.Outputs(logits, frames, logits)
    return fusion.supervised.ctc(outputs, [Letters().encode(utt.text) for utt in utterances]).item()


@pytest.mark.parametrize("kind", FUSIONS)
def test_a_fusion_begins_as_the_mean_of_log_probabilities(stores, kind):
    found, utterances = stores
    mean = TeacherEnsemble(found, Weighting())
    fused = TeacherEnsemble(found, Weighting(fusion=fusion.new_fusion(kind, mean).eval()))
    asked = [utt.utt_id for utt in utterances[:3]], ["S"] * 3
    assert torch.allclose(mean.log_probs(*asked)[0], fused.log_probs(*asked)[0], atol=1e-5)


@pytest.mark.parametrize("kind", FUSIONS)
def test_a_fusion_learns_whom_to_trust(stores, kind):
    found, utterances = stores
    mean = TeacherEnsemble(found, Weighting())
    made = fusion.fit_fusion(kind, mean, utterances[:24], Letters(), seed=1, steps=60).requires_grad_(False)
    assert losses(TeacherEnsemble(found, Weighting(fusion=made)), utterances[24:]) < 0.7 * losses(mean, utterances[24:])
    ensemble = TeacherEnsemble(found, Weighting(fusion=made))
    padded, *_ = ensemble._padded(["u30"], ["S"], None)
    scores, _ = made(list(padded.values()), torch.tensor([LENGTH]))
    if kind == "attention":
        assert scores.softmax(-1)[..., 0].mean() > 0.6
    (logits, weights), *more = ensemble.each(["u30"], ["S"])  # together they are one
    assert not more
    assert torch.allclose(logits, ensemble.logits(["u30"], ["S"])[0])
    assert weights.tolist() == [1.0]


def test_a_teacher_that_has_not_heard_an_utterance_is_not_listened_to(stores):
    found, _ = stores
    mean = TeacherEnsemble(found, Weighting(missing="all"))
    made = fusion.new_fusion("attention", mean).eval()
    del found["guesses"]._rows["u39"]
    fused = TeacherEnsemble(found, Weighting(missing="all", fusion=made))
    alone = found["knows"].logits("u39").log_softmax(-1)
    assert torch.allclose(fused.log_probs(["u39"], ["S"])[0][0], alone, atol=1e-4)


def test_nothing_to_learn_on_is_said(stores):
    with pytest.raises(UserError, match="there is no dev speech to learn on"):
        fusion.fit_fusion("attention", TeacherEnsemble(stores[0], Weighting()), [], Letters(), 1, 5)


@pytest.fixture(scope="module")
def two(taught):
    return load("params/smoke.yaml", "M08", {"dev": "M10", "teachers": ["M04"]}, {"outputs": taught.outputs})


def test_halves_of_dev_speech_judge_each_other(two, monkeypatch):
    asked = []
    plain = weighting
    monkeypatch.setattr(choice, "weighting", lambda *given: asked.append(given[-1]) or plain(*given))
    crossed = CrossFitted(two, "weighted_accuracy")
    assert asked == [1, 0]
    dev = split(prepare.load(two), two).dev
    names = [utt.utt_id for utt in dev]
    assert {half_of(name) for name in names} == {0, 1}
    logprobs, frames = crossed.log_probs(names, ["M10"] * len(names))
    plain_one = load_target(two, purpose="analysis").log_probs(names, ["M10"] * len(names))
    assert frames.tolist() == plain_one[1].tolist()
    for mine, theirs, length in zip(logprobs, plain_one[0], frames.tolist(), strict=True):
        assert torch.allclose(mine[:length], theirs[:length], atol=1e-4)  # of one teacher every weight is the same


def test_auto_says_what_it_took_and_why(two):
    method, why = best_method(two)
    assert method in METHODS
    assert method not in NOT_COMPARABLE
    assert why.startswith(f"auto: {method}, with ")
    assert "on the dev speaker M10; next " in why
    both = two.model_copy(update={"distill": two.distill.model_copy(update={"heads": "both"})})
    assert best_method(both)[0] not in FUSIONS  # which say nothing of a decoder
    with pytest.raises(UserError, match="the fold has no dev speaker to choose by"):
        best_method(two.model_copy(update={"fold": two.fold.model_copy(update={"dev": None})}))


def test_a_fusion_says_nothing_of_a_decoder(two):
    with pytest.raises(UserError, match="'attention' is learnt of CTC outputs, and says nothing of a decoder's"):
        load_target(two, "attention", output="decoder")


def test_the_most_alike_voice_is_ones_own(taught, tmp_path, monkeypatch):
    table = speaker_features(taught)
    assert set(table.index) == {"M04", "M08", "M10"}
    alike = speaker_similarity(table, ["M04", "M10"])
    assert alike.loc["M04"].idxmax() == "M04"
    assert alike.loc["M04", "M04"] == pytest.approx(1.0)
    weights = similarity_weights(taught, ["M04", "M10"])
    assert weights["M10"]["M10"] > weights["M10"]["M04"] > 0
    numbers = table.rename(index={"M04": "04", "M10": "10"})  # names that look like numbers stay names
    numbers.rename_axis("speaker").to_csv(tmp_path / FILE)
    monkeypatch.setattr(similarity, "features_folder", lambda params: tmp_path)
    assert speaker_features(taught).index.tolist() == numbers.index.tolist()
    other = table.copy()
    other.loc["M08"] += 1.0  # the held-out speaker's voice changes nothing for others
    assert speaker_similarity(other, ["M04", "M10"]).loc["M04"].equals(alike.loc["M04"])
