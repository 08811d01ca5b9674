"""Aggregation against the naive formulas in float64, and the teachers that it refuses."""

import gc
import weakref

import pytest
import torch
from corpora import utterances

from kdlib.corpus.inputs import Batch
from kdlib.errors import UserError
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.targets.aggregation import TeacherEnsemble, Weighting, align_frames

V, WIDTHS = 60, {"M04": 8, "M09": 8, "F05": 12}  # teachers may be of different widths
LENGTHS = {"M04_1": 9, "M09_1": 5, "F05_1": 7}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Three teachers' stores of float32 outputs on three utterances; F05 is missing for M09_1."""
    folder = tmp_path_factory.mktemp("stores")
    torch.manual_seed(0)
    stores, logits = {}, {}
    for name, width in WIDTHS.items():
        head = torch.randn(V, width), torch.randn(V)
        header = Header(
            **{"teacher": name, "train_speakers": (name,), "output": "ctc", "encoding": "fp16", "size": V},
            **{"width": width, "tokens": "t", "blank": 2, "bos": 0, "eos": 1, "stride_ms": 40.0},
        )
        with Writer(folder / name, header, head) as writer:
            for utt_id, length in LENGTHS.items():
                if (name, utt_id) != ("F05", "M09_1"):
                    writer.add(utt_id, torch.randn(length, width).half().float())
        stores[name] = LogitStore(folder / name)
        logits[name] = {utt_id: stores[name].logits(utt_id).double() for utt_id in stores[name]}
    return stores, logits


def batch(*utt_ids, speakers=None):
    return Batch(utterances(*utt_ids, speakers=speakers))


def target(stores, weighting, utt_id, temperature=1.0, speaker="S"):
    ensemble = TeacherEnsemble(stores, weighting)
    log_probs, lengths = ensemble.log_probs(batch(utt_id, speakers=[speaker]), temperature=temperature)
    assert lengths.tolist() == [LENGTHS[utt_id]]
    return log_probs[0].double()


@pytest.mark.parametrize("temperature", [1, 2, 3, 4])
def test_the_stacked_product_equals_the_naive_mean_of_log_softmaxes(teachers, temperature):
    """The original study's: the mean of the teachers' log-probabilities, normalised again."""
    stores, logits = teachers
    naive = (
        torch.stack([(logits[name]["M04_1"] / temperature).log_softmax(-1) for name in stores]).mean(0).log_softmax(-1)
    )
    assert (target(stores, Weighting(), "M04_1", temperature) - naive).abs().max() < 1e-5


@pytest.mark.parametrize("temperature", [1, 3])
@pytest.mark.parametrize("weights", [{}, {"M04": 0.7, "M09": 0.1, "F05": 0.4}])
def test_probabilities_are_averaged_with_their_weights(teachers, temperature, weights):
    stores, logits = teachers
    shares = torch.tensor([weights.get(name, 1.0) for name in stores], dtype=torch.float64)
    shares = shares / shares.sum()
    naive = sum(
        share * (logits[name]["M04_1"] / temperature).softmax(-1) for share, name in zip(shares, stores, strict=True)
    )
    assert (target(stores, Weighting("prob_mean", weights), "M04_1", temperature).exp() - naive).abs().max() < 1e-6


def test_log_probabilities_are_averaged_with_their_weights(teachers):
    stores, logits = teachers
    weights = {"M04": 3.0, "M09": 1.0, "F05": 0.0}
    naive = (0.75 * logits["M04"]["F05_1"] + 0.25 * logits["M09"]["F05_1"]).log_softmax(-1)
    assert (target(stores, Weighting(weights=weights), "F05_1") - naive).abs().max() < 1e-5


def test_a_weight_of_zero_excludes_the_teacher(teachers):
    stores, _ = teachers
    weights = {name: float(name == "M09") for name in stores}
    alone = target({"M09": stores["M09"]}, Weighting(), "F05_1")
    assert torch.equal(target(stores, Weighting(weights=weights), "F05_1"), alone)


def test_own_uses_only_the_speakers_own_teacher_if_there_is_one(teachers):
    stores, logits = teachers
    own = Weighting(own=True)
    alone = logits["M09"]["M09_1"].log_softmax(-1)
    assert (target(stores, own, "M09_1", speaker="M09") - alone).abs().max() < 1e-5
    mean = target(stores, Weighting(), "M04_1")
    assert torch.equal(target(stores, own, "M04_1", speaker="M08"), mean)


def test_a_batch_equals_its_utterances_one_by_one(teachers):
    """Neither padding nor a teacher missing for one utterance changes the others."""
    stores, _ = teachers
    both, lengths = TeacherEnsemble(stores, Weighting(missing="all")).log_probs(batch("M09_1", "M04_1"))
    assert lengths.tolist() == [5, 9]
    for row, utt_id in zip(both, ("M09_1", "M04_1"), strict=True):
        alone = target(stores, Weighting(missing="all"), utt_id)
        assert (row[: LENGTHS[utt_id]].double() - alone).abs().max() < 1e-5


def test_a_missing_teacher_does_not_count(teachers):
    stores, logits = teachers
    naive = (logits["M04"]["M09_1"] + logits["M09"]["M09_1"]).div(2).log_softmax(-1)
    assert (target(stores, Weighting(missing="all"), "M09_1") - naive).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("missing", "min_teachers", "usable", "incomplete"),
    [("strict", 10, 2, 0), ("partial", 2, 3, 1), ("partial", 10, 2, 0), ("all", 10, 3, 1)],
)
def test_coverage_counts_usable_and_incomplete_utterances(teachers, missing, min_teachers, usable, incomplete):
    stores, _ = teachers
    weighting = Weighting(missing=missing, min_teachers=min_teachers)
    coverage = TeacherEnsemble(stores, weighting).coverage([*LENGTHS, "M99_1"])
    assert (len(coverage.usable), coverage.incomplete) == (usable, incomplete)
    assert coverage.left_out["M99_1"] == 0
    assert str(coverage).startswith(f"{usable} utterances have a target, {incomplete} of them not from every teacher")


def test_an_utterance_that_no_teacher_has_is_refused(teachers):
    with pytest.raises(UserError, match="no teacher has an output for M99_1"):
        TeacherEnsemble(teachers[0], Weighting()).log_probs(batch("M99_1"))


def test_frames_are_aligned_by_one_at_the_end_and_never_cut_silently(teachers):
    stores, _ = teachers
    longer, lengths = TeacherEnsemble(stores, Weighting()).log_probs(batch("M04_1"), torch.tensor([10]))
    assert lengths.tolist() == [10]
    assert torch.equal(longer[0, 9], longer[0, 8])
    shorter, _ = TeacherEnsemble(stores, Weighting()).log_probs(batch("M04_1"), torch.tensor([8]))
    assert (shorter[0] - longer[0, :8]).abs().max() < 1e-5
    with pytest.raises(UserError, match="teacher M04 has 9 frames where 12 are expected: another stride"):
        TeacherEnsemble(stores, Weighting()).log_probs(batch("M04_1"), torch.tensor([12]))
    assert align_frames(torch.zeros(0, 4), 1, "x").shape == (1, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"tokens": "other"}, "tokens is t and other"), ({"stride_ms": 20.0}, "stride_ms is 40.0 and 20.0")],
)
def test_incompatible_teachers_are_not_averaged(teachers, tmp_path, changes, message):
    stores, _ = teachers
    fields = {"teacher": "X", "train_speakers": (), "output": "ctc", "encoding": "dense32", "size": V, "width": V}
    fields |= {"tokens": "t", "blank": 2, "bos": 0, "eos": 1, "stride_ms": 40.0}
    with Writer(tmp_path, Header(**fields | changes), None) as writer:
        writer.add("M04_1", torch.randn(9, V))
    with pytest.raises(UserError, match=f"the teachers M04 and X cannot be averaged: {message}"):
        TeacherEnsemble(stores | {"X": LogitStore(tmp_path)}, Weighting())


def test_dense_logits_and_heads_are_averaged(teachers, tmp_path):
    stores, logits = teachers
    fields = {"teacher": "X", "train_speakers": (), "output": "ctc", "encoding": "dense32", "size": V, "width": V}
    fields |= {"tokens": "t", "blank": 2, "bos": 0, "eos": 1, "stride_ms": 40.0}
    imported = torch.randn(9, V)
    with Writer(tmp_path, Header(**fields), None) as writer:
        writer.add("M04_1", imported)
    naive = (logits["M04"]["M04_1"] + imported.double()).div(2).log_softmax(-1)
    both = {"M04": stores["M04"], "X": LogitStore(tmp_path)}
    assert (target(both, Weighting(), "M04_1") - naive).abs().max() < 1e-5


@pytest.mark.parametrize("weights", [{"M80": 1.0}, {"M04": 0.0, "M09": 0.0, "F05": 0.0}])
def test_impossible_weights_are_refused(teachers, weights):
    with pytest.raises(UserError, match=r"weights name teachers without a store|every weight is 0"):
        TeacherEnsemble(teachers[0], Weighting(weights=weights))


def test_memory_holds_one_batch_of_every_teacher_at_most(teachers, monkeypatch):
    """Activations in memory, counted as they are read: a batch times the teachers, and none afterwards."""
    stores, _ = teachers
    alive, counts = weakref.WeakSet(), []
    read = LogitStore.hidden

    def hidden(self, utt_id):
        activations = read(self, utt_id)
        alive.add(activations)
        counts.append(len(alive))
        return activations

    monkeypatch.setattr(LogitStore, "hidden", hidden)
    ensemble = TeacherEnsemble(stores, Weighting())
    for _ in range(3):
        ensemble.log_probs(batch("M04_1", "F05_1", speakers=["M04", "F05"]))
    gc.collect()
    assert max(counts) == 2 * len(stores)
    assert len(alive) == 0


def test_a_larger_loss_on_the_reference_lowers_a_teachers_weight(teachers):
    stores, logits = teachers
    losses = {"M04": {"M04_1": 0.5}, "M09": {"M04_1": 3.0}, "F05": {"M04_1": float("inf")}}
    weights = torch.tensor([-0.5, -3.0, -torch.inf], dtype=torch.float64).softmax(0)
    naive = sum(
        weight * logits[name]["M04_1"].log_softmax(-1) for weight, name in zip(weights, stores, strict=True)
    ).log_softmax(-1)
    assert (target(stores, Weighting(losses=losses), "M04_1") - naive).abs().max() < 1e-5


def test_excluded_speech_has_no_target(teachers):
    stores, _ = teachers
    ensemble = TeacherEnsemble(stores, Weighting(), excluded={"M09": "is held out"})
    with pytest.raises(UserError, match="M09_1: M09 is held out: no training target on this speech"):
        ensemble.log_probs(batch("M04_1", "M09_1", speakers=["M04", "M09"]))
