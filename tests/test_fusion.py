"""Learned fusion: starts as the mean, is trained to weight teachers, and is scored on speech it is not trained on."""

import re
from pathlib import Path

import pytest
import torch

from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.pipeline import Fold
from kdlib.settings.targets import FUSIONS, METHODS
from kdlib.targets import fusion, target_report
from kdlib.targets.aggregation import Coverage, TeacherEnsemble, Weighting
from kdlib.targets.choice import CrossFitted, halves
from kdlib.targets.fusion import Training
from kdlib.targets.similarity import FILE, read_features, similarity_weights, speaker_similarity
from kdlib.targets.target_report import SIMPLEST_FIRST

V, D, LENGTH = 9, 6, 8


class Letters:
    """A tokenizer of texts that are ids."""

    def encode(self, text):
        return [int(digit) for digit in text]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A teacher that outputs the reference, and one that outputs random texts with equal confidence."""
    folder, stores = tmp_path_factory.mktemp("stores"), {}
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(V, D, generator=generator), torch.zeros(V)
    inverse = torch.linalg.pinv(head[0])
    utterances = [f"u{number}" for number in range(40)]
    texts = {name: f"{3 + number % 6}{3 + (number // 6) % 6}" for number, name in enumerate(utterances)}
    for name in ("right", "random"):
        header = Header(
            **{"teacher": name, "train_speakers": (name,), "output": "ctc", "encoding": "fp16", "size": V, "width": D},
            **{"tokens": "t", "blank": 2, "bos": 0, "eos": 1, "stride_ms": 40.0},
        )
        with Writer(folder / name, header, head) as writer:
            for utt_id in utterances:
                ids = texts[utt_id] if name == "right" else texts[utterances[int(utt_id[1:]) * 7 % 40]]
                frames = torch.tensor([2, int(ids[0]), 2, 2, int(ids[1]), 2, 2, 2])
                writer.add(utt_id, 12 * torch.nn.functional.one_hot(frames, V).float() @ inverse.T)
        stores[name] = LogitStore(folder / name)
    return stores, [Utterance(name, "S", Path("x.wav"), 0.3, texts[name]) for name in utterances]


def losses(ensemble, utterances):
    outputs = ensemble.logits(Batch(utterances))
    return fusion.ctc_loss(outputs, [Letters().encode(utt.text) for utt in utterances]).item()


@pytest.mark.parametrize("kind", FUSIONS)
def test_a_fusion_starts_as_the_mean_of_log_probabilities(stores, kind):
    teachers, utterances = stores
    mean = TeacherEnsemble(teachers, Weighting())
    fused = TeacherEnsemble(teachers, Weighting(fusion=fusion.new_fusion(kind, mean).eval()))
    batch = Batch(utterances[:3])
    assert torch.allclose(mean.log_probs(batch).logits, fused.log_probs(batch).logits, atol=1e-5)


@pytest.mark.parametrize("kind", FUSIONS)
def test_training_weights_the_better_teacher_up(stores, kind):
    teachers, utterances = stores
    mean = TeacherEnsemble(teachers, Weighting())
    how = Training(seed=1, steps=60)
    trained = fusion.fit_fusion(kind, mean, utterances[:24], Letters(), how).requires_grad_(False)
    ensemble = TeacherEnsemble(teachers, Weighting(fusion=trained))
    assert losses(ensemble, utterances[24:]) < 0.7 * losses(mean, utterances[24:])
    batch = Batch([utterances[30]])
    padded, *_ = ensemble._padded(batch, None)
    scores, _ = trained(list(padded.values()), torch.tensor([LENGTH]))
    if kind == "attention":
        assert scores.softmax(-1)[..., 0].mean() > 0.6
    (_, logits, weights), *rest = ensemble.each(batch)  # a fusion counts as one teacher
    assert not rest
    assert torch.allclose(logits, ensemble.logits(batch).logits)
    assert weights.tolist() == [1.0]


def test_a_missing_teacher_gets_no_weight_in_a_fusion(stores):
    teachers, utterances = stores
    mean = TeacherEnsemble(teachers, Weighting(missing="all"))
    untrained = fusion.new_fusion("attention", mean).eval()
    find = teachers["random"]._index.find
    teachers["random"]._index.find = lambda utt_id: None if utt_id == "u39" else find(utt_id)
    fused = TeacherEnsemble(teachers, Weighting(missing="all", fusion=untrained))
    alone = teachers["right"].logits("u39").log_softmax(-1)
    assert torch.allclose(fused.log_probs(Batch([utterances[39]])).logits[0], alone, atol=1e-4)


def test_no_dev_speech_for_a_fusion_is_refused(stores):
    with pytest.raises(UserError, match="there is no dev speech to train on"):
        fusion.fit_fusion("attention", TeacherEnsemble(stores[0], Weighting()), [], Letters(), Training(1, 5))


@pytest.fixture(scope="module")
def two(with_teachers):
    return Fold.load(
        "params/smoke.yaml",
        "M08",
        fold={"dev": "M10", "teachers": ["M04"]},
        overrides={"outputs": with_teachers.params.outputs},
    )


def test_each_half_of_dev_speech_is_scored_with_weights_of_the_other(two, monkeypatch, tmp_path):
    asked, found = [], {}
    original = Fold._accuracies
    monkeypatch.setattr(Fold, "_accuracies", lambda *args: asked.append(args[-1]) or original(*args))
    monkeypatch.setattr(target_report, "build_report", lambda *args: found.update(target=args[2]))
    Fold.target_report.__wrapped__(two).build(tmp_path)
    crossed = found["target"]("weighted_accuracy", "dev")
    assert isinstance(crossed, CrossFitted)
    assert asked == [1, 0]
    dev = Batch(two.splits.dev)
    half_of = halves(two.splits.dev)
    assert {half_of[name] for name in dev.utt_ids} == {0, 1}
    log_probs, frames = crossed.log_probs(dev)
    expected, expected_frames = two.targets(purpose="analysis").log_probs(dev)
    assert frames.tolist() == expected_frames.tolist()
    for row, expected_row, length in zip(log_probs, expected, frames.tolist(), strict=True):
        assert torch.allclose(row[:length], expected_row[:length], atol=1e-4)  # a single teacher has all the weight


def test_auto_reports_the_selected_method_and_why(two):
    method, why = two.best_method()
    assert method in SIMPLEST_FIRST
    assert set(METHODS) - set(SIMPLEST_FIRST) == {"weighted_loss", "own"}  # whose dev scores are not comparable
    assert re.match(rf"auto: {method}, with \d+\.\d and \d+\.\d % on the dev speaker M10 and on training speech", why)
    assert why.endswith("8 methods were compared; halves of the dev speech share no word")
    both = two.but(distill={"heads": "both"})
    assert both.best_method()[0] not in FUSIONS  # which cannot combine a decoder's outputs
    with pytest.raises(UserError, match="the fold has no dev speaker to choose by"):
        two.but(fold={"dev": None}).best_method()


def test_a_fusion_for_one_half_of_dev_speech_is_trained_on_words_of_that_half_alone(stores, monkeypatch, tmp_path):
    teachers, utterances = stores
    trained_on = []

    def fit(kind, ensemble, part, tokens, training):
        trained_on.append(part)
        return fusion.new_fusion(kind, ensemble)

    monkeypatch.setattr(fusion, "fit_fusion", fit)
    repeated = [*utterances, *(utt.replace(utt_id=f"{utt.utt_id}_again") for utt in utterances)]
    mean = TeacherEnsemble(teachers, Weighting(missing="all"))
    monkeypatch.setattr(mean, "coverage", lambda names: Coverage(list(names), 0, {}))
    fusion.train_fusions(tmp_path, "attention", mean, repeated, Letters(), Training(1, 5))
    whole, *parts = [[utt.text for utt in part] for part in trained_on]
    assert sorted(whole) == sorted(utt.text for utt in repeated)
    assert not set(parts[0]) & set(parts[1])
    assert sorted(parts[0] + parts[1]) == sorted(whole)


def test_a_fusion_of_decoder_outputs_is_refused(two):
    with pytest.raises(UserError, match="'attention' is trained on CTC outputs and cannot combine a decoder's"):
        two.targets("attention", output="decoder")


def test_the_most_similar_speaker_is_the_speaker(with_teachers, tmp_path):
    table = read_features(with_teachers.speaker_features())
    assert set(table.index) == {"M04", "M08", "M10"}
    similarities = speaker_similarity(table, ["M04", "M10"])
    assert similarities.loc["M04"].idxmax() == "M04"
    assert similarities.loc["M04", "M04"] == pytest.approx(1.0)
    weights = similarity_weights(table, ["M04", "M10"])
    assert weights["M10"]["M10"] > weights["M10"]["M04"] > 0
    numbers = table.rename(index={"M04": "04", "M10": "10"})  # names that look like numbers stay names
    numbers.rename_axis("speaker").to_csv(tmp_path / FILE)
    assert read_features(tmp_path).index.tolist() == numbers.index.tolist()
    changed = table.copy()
    changed.loc["M08"] += 1.0  # the held-out speaker changes nothing for others
    assert speaker_similarity(changed, ["M04", "M10"]).loc["M04"].equals(similarities.loc["M04"])
