"""Each check detects the input with its fault, and passes every healthy input."""

import dataclasses

import pandas as pd
import pytest
import torch

from kdlib.distill import checks, preflight
from kdlib.distill.checks import PASS, REFUSE, WARN
from kdlib.errors import UserError
from kdlib.logits.store import Header
from kdlib.models.nemo_files import SHIPPED_MODEL, read_tokenizer
from kdlib.pipeline import Fold
from kdlib.settings.distill import Distill
from kdlib.teachers.parent_scores import Gain
from kdlib.tokens import Tokens, pieces_per_word

WORDS = ["COME", "GO", "YES", "NO", "ONE", "TWO"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.model"
    path.write_bytes(read_tokenizer(SHIPPED_MODEL))
    return Tokens.for_teachers(path)


class OneOff(Tokens):
    """The original study's fault: evaluation decodes every token with an offset of one piece."""

    def encode(self, text):
        return Tokens(self.model, self.blank, self.size, self.bos, self.eos).encode(text)

    def decode(self, ids):
        return super().decode([index + 1 for index in ids])


def headers(student, **changes):
    fields = {"train_speakers": ("M04",), "output": "ctc", "encoding": "fp16", "size": student.size, "width": 8}
    fields |= {"tokens": student.fingerprint, "blank": 2, "bos": 0, "eos": 1, "stride_ms": 40.0}
    return {"M04": Header(teacher="M04", **fields | changes)}


def gains(**by_teacher):
    """The gains of teachers over a parent with half of 20 utterances right."""
    rows = [
        Gain(name, "greedy", "wra", 20, 0.5, 0.5 + gain, gain, gain - 0.2, gain + 0.2, "")
        for name, gain in by_teacher.items()
    ]
    return pd.DataFrame(map(dataclasses.asdict, rows))


def moved(references, offset=0, steps=0):
    """A teacher's output: the references with an offset of every id, beginning so many steps late."""
    return [[0] * steps + [token + offset for token in ids] for ids in references]


@pytest.fixture(scope="module")
def references(tokens):
    return [tokens.encode(word) for word in WORDS]


HEALTHY = {
    "tokens": lambda t, r: checks.check_tokens(t, headers(t)),
    "shift of ctc targets": lambda t, r: checks.check_shift(moved(r), r, "ctc"),
    "shift of decoder targets": lambda t, r: checks.check_shift(moved(r), r, "decoder"),
    "a weak teacher's shift": lambda t, r: checks.check_shift([r[0]] * len(r), r, "ctc"),
    "decoding": lambda t, r: checks.check_decoding(t, WORDS),
    "short words": lambda t, r: checks.check_short_words([2, 3, 1, 3] * 9, [3, 2, 2, 3] * 9, "the teachers' words"),
    "pieces": lambda t, r: checks.check_pieces(pieces_per_word(t, WORDS)),
    "single letters": lambda t, r: checks.check_pieces(pieces_per_word(t, ["A", "B"])),
    "parent": lambda t, r: checks.check_gains(gains(A=0.1, B=0.0)),
    "logits": lambda t, r: checks.check_logits({"M04": torch.randn(9, t.size)}),
    "temperature": lambda t, r: checks.check_temperature(headers(t), Distill(temperature=4.0)),
    "temperature 1": lambda t, r: checks.check_temperature(
        headers(t), Distill(temperature=1.0, temperature_on="teacher")
    ),
    "lengths": lambda t, r: checks.check_lengths(0, 100),
    "recording": lambda t, r: checks.check_recording({"M04": {"a": 10, "b": 21}}, {"a": 10, "b": 20}, 40.0, 40.0),
    "target": lambda t, r: checks.check_target(WORDS, WORDS),
    "target accuracy": lambda t, r: checks.check_accuracy(0.7, 0.3),
    "pseudo-labels": lambda t, r: checks.check_pseudo_labels([(0.9, True), (0.8, True), (0.3, False)], 0.5, "lexicon"),
    "a new head": lambda t, r: checks.check_accuracy(0.7, None),
    "best teacher": lambda t, r: checks.check_best_teacher(0.55, {"M04": 0.6, "F03": 0.2}),
    "spikes": lambda t, r: checks.check_spikes([0, 0, 1, 0], [0.7, 0.8, 0.5, 0.9]),
    "blanks": lambda t, r: checks.check_blanks(0.8),
    "gradients": lambda t, r: checks.check_gradients(2.0, 1.0),
    "stored and live": lambda t, r: checks.check_live(1e-6, "M04"),
    "held out": lambda t, r: checks.check_training_speakers(headers(t), ["M08", "M10"]),
    "unseen words": lambda t, r: checks.check_words(WORDS, WORDS, decoder=True),
    "unseen words by CTC": lambda t, r: checks.check_words(WORDS, WORDS[1:], decoder=False),
}

FAULTY = {
    "another tokenizer": (
        lambda t, r: checks.check_tokens(t, headers(t, tokens="other")),
        REFUSE,
        "tokenizer is other",
    ),
    "blank elsewhere": (lambda t, r: checks.check_tokens(t, headers(t, blank=63)), REFUSE, "blank is 63"),
    "ids one too large": (lambda t, r: checks.check_shift(moved(r, 1), r, "ctc"), REFUSE, "every id is off by +1"),
    "ids two too small": (
        lambda t, r: checks.check_shift(moved(r, -2), r, "decoder"),
        REFUSE,
        "every id is off by -2",
    ),
    "BOS in the targets": (
        lambda t, r: checks.check_shift(moved(r, 0, 1), r, "decoder"),
        REFUSE,
        "displaced by +1",
    ),
    "decoding with an offset of one": (
        lambda t, r: checks.check_decoding(OneOff(t.model, t.blank, t.size, t.bos, t.eos), WORDS),
        REFUSE,
        "the decoding is wrong",
    ),
    "short words": (
        lambda t, r: checks.check_short_words([1] * 20 + [3] * 20, [3] * 40, "the teachers' words"),
        WARN,
        "2.0 tokens per answer, 3.0 per reference, in 40 utterances: an unsure CTC model prefers short words",
    ),
    "a piece per word": (
        lambda t, r: checks.check_pieces(1.4),
        WARN,
        "words have 1.4 pieces on average, fewer than 2",
    ),
    "a teacher worse than its parent": (
        lambda t, r: checks.check_gains(gains(A=0.1, B=-0.05, C=-0.15)),
        WARN,
        "1 of 3 teachers gained over their parent (+10.0 points on average), 2 lost (-10.0 points on average: B, C)",
    ),
    "probabilities": (
        lambda t, r: checks.check_logits({"M04": torch.randn(9, t.size).softmax(-1)}),
        REFUSE,
        "are probabilities",
    ),
    "stored at 2": (
        lambda t, r: checks.check_temperature(headers(t, temperature=2.0), Distill()),
        REFUSE,
        "stored at temperature 2",
    ),
    "one side divided": (
        lambda t, r: checks.check_temperature(headers(t), Distill(temperature_on="student")),
        WARN,
        "only the student's logits",
    ),
    "some too short": (lambda t, r: checks.check_lengths(3, 100), WARN, "3 of 100 references (3.0 %)"),
    "most too short": (lambda t, r: checks.check_lengths(60, 100), REFUSE, "60 of 100"),
    "another recording": (
        lambda t, r: checks.check_recording({"M04": {"a": 10, "b": 31}}, {"a": 10, "b": 20}, 40.0, 40.0),
        REFUSE,
        "1 of 2 outputs belong to another recording: teacher M04 has 31 frames for b, the student 20",
    ),
    "another stride": (
        lambda t, r: checks.check_recording({}, {}, 20.0, 40.0),
        REFUSE,
        "one frame per 20 ms",
    ),
    "an empty target": (lambda t, r: checks.check_target([""] * 6, WORDS), REFUSE, "is empty in 100 %"),
    "one word for all": (lambda t, r: checks.check_target(["GO"] * 6, WORDS), REFUSE, "1 distinct texts for 6"),
    "often empty": (lambda t, r: checks.check_target(["", "", "", *WORDS[3:]], WORDS), WARN, "empty in 50 %"),
    "mostly wrong": (
        lambda t, r: checks.check_accuracy(0.33, 0.2),
        WARN,
        "33 % of the sample, the student",
    ),
    "worse than the student": (lambda t, r: checks.check_accuracy(0.6, 0.7), WARN, "worse than the student"),
    "pseudo-labels that are mostly wrong": (
        lambda t, r: checks.check_pseudo_labels([(0.9, True), (0.8, False), (0.7, False)], 0.5, "lexicon"),
        WARN,
        "100 % pass the confidence 0.5, and 33 % of these are correct",
    ),
    "pseudo-labels below the confidence": (
        lambda t, r: checks.check_pseudo_labels([(0.3, True)], 0.9, "beam"),
        REFUSE,
        "there would be no pseudo-label; lower distill.sequence.confidence",
    ),
    "the held-out speaker in the training speech": (
        lambda t, r: checks.check_speaker_independence("M08", 192),
        WARN,
        "no leave-one-speaker-out result",
    ),
    "worse than its best": (
        lambda t, r: checks.check_best_teacher(0.3, {"M04": 0.8, "F03": 0.2}),
        WARN,
        "recognises 30 % of the sample, M04 alone 80 %",
    ),
    "spikes elsewhere": (lambda t, r: checks.check_spikes([2, 2, 3], [0.8] * 3), WARN, "shifted +2 frames"),
    "spikes nowhere": (lambda t, r: checks.check_spikes([0, 0, 0], [0.1] * 3), WARN, "by 0.10"),
    "all blank": (lambda t, r: checks.check_blanks(0.99), WARN, "99 % of the target's mass is blank"),
    "teachers dominate": (lambda t, r: checks.check_gradients(50.0, 1.0), WARN, "is 50 times as large"),
    "references dominate": (lambda t, r: checks.check_gradients(0.01, 1.0), WARN, "is 0.01 times as large"),
    "no ground truth": (lambda t, r: checks.check_gradients(1.0, 0.0), WARN, "no ground truth"),
    "stale stores": (lambda t, r: checks.check_live(0.5, "M04"), REFUSE, "differs by 5.0e-01 nats"),
    "int8 at its limit": (lambda t, r: checks.check_live(5e-3, "M04"), WARN, "differs by 5.0e-03"),
    "a leak": (
        lambda t, r: checks.check_training_speakers(headers(t, train_speakers=("M04", "M08")), ["M08"]),
        REFUSE,
        "was trained on M08",
    ),
    "a decoder and new words": (
        lambda t, r: checks.check_words(WORDS, WORDS[1:], decoder=True),
        WARN,
        "1 of 6 test words",
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_input_passes_every_check(name, tokens, references):
    assert HEALTHY[name](tokens, references).verdict == PASS


@pytest.mark.parametrize("name", FAULTY)
def test_each_check_detects_its_fault(name, tokens, references):
    check, verdict, reason = FAULTY[name]
    result = check(tokens, references)
    assert (result.verdict, reason in result.reason) == (verdict, True), result


@pytest.fixture(scope="module")
def variant(with_teachers, outputs):
    def named(which, **overrides):
        return Fold.load("params/smoke.yaml", "M08", which, overrides={"outputs": str(outputs)} | overrides)

    return named


def by_name(results):
    return {check.name: check for check in results}


def checks_of_teachers(fold):
    return preflight._check_teachers(fold._preflight_plan(), fold._preflight_teachers(1))


def test_the_preflight_of_the_smoke_recipe_refuses_its_untrained_teachers_only_for_an_empty_target(variant):
    """Its teachers were trained for four steps, and their output is empty."""
    results = by_name(variant("ctc_kd").preflight())
    assert results["target"].verdict == REFUSE
    assert {name for name, check in results.items() if check.verdict == REFUSE} == {"target"}
    assert {"tokens", "held out", "recording", "stored and live", "gradients", "shift of ctc targets"} <= set(results)
    assert results["parent"].reason.startswith("greedy: 0 of 1 teachers gained over their parent")
    assert "differs by" in results["stored and live"].reason
    table = preflight.table(list(results.values()))
    assert table.verdict.iloc[0] == REFUSE


def test_hard_labels_need_no_check_of_teachers(variant):
    results = by_name(variant("hard").preflight())
    assert set(results) == {
        "decoding",
        "pieces",
        "lengths",
        "unseen words",
        "choice",
        "heads",
        "dev speech",
        "test speech",
    }


def test_a_refused_student_is_not_trained(variant):
    fold = variant("ctc_kd", distill={"allow": [], "temperature": 3.0})
    with pytest.raises(UserError, match=r"refuses to train:\n  target: the target is empty in 100 %"):
        fold.student(seed=7)
    assert not (fold.layout.student(7) / "model.json").exists()


def test_decoder_distillation_across_encoders_is_switched_to_ctc_with_the_reason(variant):
    requested = variant("decoder_kd", distill={"allow_decoder_kd": False})
    used = requested.resolved
    assert (requested.params.distill.heads, used.params.distill.heads) == ("decoder", "ctc")
    switched = checks.check_decoder_kd(requested.params.distill, used.params.distill)
    assert switched.verdict == WARN
    assert "switched to CTC: the original study ended at 0 %" in switched.reason
    forced = variant("decoder_kd")
    carried_out = forced.resolved.params.distill
    assert carried_out.heads == "decoder"
    assert "on purpose" in checks.check_decoder_kd(forced.params.distill, carried_out).reason


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        ({"train_speakers": ["M04", "M08"]}, "held out", "was trained on M08"),
        ({"blank": 5}, "tokens", "blank is 5"),
        ({"temperature": 3.0}, "temperature", "stored at temperature 3"),
    ],
)
def test_an_unusable_store_is_refused_before_its_outputs_are_combined(monkeypatch, variant, change, name, reason):
    open_store = Fold.store

    def changed(*arguments):
        store = open_store(*arguments)
        store.header = dataclasses.replace(store.header, **change)
        return store

    monkeypatch.setattr(Fold, "store", changed)
    results = by_name(checks_of_teachers(variant("ctc_kd")))
    assert results[name].verdict == REFUSE
    assert reason in results[name].reason


def test_outputs_of_another_recording_are_detected(monkeypatch, variant):
    """A teacher's rows of two utterances of different length, swapped."""
    fold = variant("ctc_kd")
    durations = {utt.utt_id: utt.duration_s for utt in fold.corpus}
    open_store = Fold.store

    def swapped(*arguments):
        store = open_store(*arguments)
        own = sorted((utt_id for utt_id in store if utt_id.startswith("M04")), key=durations.get)
        longest, shortest = own[-1], own[0]
        find, other = store._index.find, {longest: shortest, shortest: longest}
        store._index.find = lambda utt_id: find(other.get(utt_id, utt_id))
        return store

    monkeypatch.setattr(Fold, "store", swapped)
    results = by_name(checks_of_teachers(fold))
    assert results["recording"].verdict == REFUSE
    assert "2 of" in results["recording"].reason
    assert "gradients" not in results  # outputs that cannot be aligned are not compared
