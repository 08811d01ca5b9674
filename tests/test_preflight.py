"""Each check fires on an input that is broken in just that way, and on no sound one."""

import dataclasses

import pytest
import torch

from kdlib.corpus import prepare
from kdlib.distill import checks, preflight, students
from kdlib.distill.checks import PASS, REFUSE, WARN
from kdlib.distill.setup import resolved, student_folder
from kdlib.errors import UserError
from kdlib.logits import extract
from kdlib.logits.store import Header
from kdlib.models.nemo_files import SHIPPED_MODEL, read_tokenizer
from kdlib.params import load
from kdlib.pretrained.pieces import load_tokens
from kdlib.settings import Distill
from kdlib.tokens import Tokens

WORDS = ["COME", "GO", "YES", "NO", "ONE", "TWO"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.model"
    path.write_bytes(read_tokenizer(SHIPPED_MODEL))
    return Tokens.for_teachers(path)


class OneOff(Tokens):
    """The original study's fault: evaluation decodes every token one piece on."""

    def encode(self, text):
        return Tokens(self.model, self.blank, self.size, self.bos, self.eos).encode(text)

    def decode(self, ids):
        return super().decode([index + 1 for index in ids])


def headers(ours, **other):
    known = {"train_speakers": ("M04",), "output": "ctc", "encoding": "fp16", "size": ours.size, "width": 8}
    known |= {"tokens": ours.fingerprint, "blank": 2, "bos": 0, "eos": 1, "stride_ms": 40.0}
    return {"M04": Header(teacher="M04", **known | other)}


def off(references, by=0, steps=0):
    """What a teacher says: the references, every id so far off, and begun so many steps too late."""
    return [[0] * steps + [one + by for one in ids] for ids in references]


@pytest.fixture(scope="module")
def references(tokens):
    return [tokens.encode(word) for word in WORDS]


SOUND = {
    "tokens": lambda t, r: checks.check_tokens(t, headers(t)),
    "shift of ctc targets": lambda t, r: checks.check_shift(off(r), r, "ctc"),
    "shift of decoder targets": lambda t, r: checks.check_shift(off(r), r, "decoder"),
    "a weak teacher's shift": lambda t, r: checks.check_shift([r[0]] * len(r), r, "ctc"),
    "decoding": lambda t, r: checks.check_decoding(t, WORDS),
    "logits": lambda t, r: checks.check_logits({"M04": torch.randn(9, t.size)}),
    "temperature": lambda t, r: checks.check_temperature(headers(t), Distill(temperature=4.0)),
    "temperature 1": lambda t, r: checks.check_temperature(
        headers(t), Distill(temperature=1.0, temperature_on="teacher")
    ),
    "lengths": lambda t, r: checks.check_lengths(0, 100),
    "recording": lambda t, r: checks.check_recording({"M04": {"a": 10, "b": 21}}, {"a": 10, "b": 20}, 40.0, 40.0),
    "target": lambda t, r: checks.check_target(WORDS, WORDS),
    "target accuracy": lambda t, r: checks.check_accuracy(0.7, 0.3),
    "texts": lambda t, r: checks.check_pseudo_labels([(0.9, True), (0.8, True), (0.3, False)], 0.5, "lexicon"),
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

BROKEN = {
    "another tokenizer": (
        lambda t, r: checks.check_tokens(t, headers(t, tokens="other")),
        REFUSE,
        "tokenizer is other",
    ),
    "blank elsewhere": (lambda t, r: checks.check_tokens(t, headers(t, blank=63)), REFUSE, "blank is 63"),
    "ids one too large": (lambda t, r: checks.check_shift(off(r, 1), r, "ctc"), REFUSE, "every id is +1 off"),
    "ids two too small": (lambda t, r: checks.check_shift(off(r, -2), r, "decoder"), REFUSE, "every id is -2 off"),
    "BOS in the targets": (lambda t, r: checks.check_shift(off(r, 0, 1), r, "decoder"), REFUSE, "stand +1 step"),
    "decoding one off": (
        lambda t, r: checks.check_decoding(OneOff(t.model, t.blank, t.size, t.bos, t.eos), WORDS),
        REFUSE,
        "the decoding is wrong",
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
        "only the student's side",
    ),
    "some too short": (lambda t, r: checks.check_lengths(3, 100), WARN, "3 of 100 references (3.0 %)"),
    "most too short": (lambda t, r: checks.check_lengths(60, 100), REFUSE, "60 of 100"),
    "another recording": (
        lambda t, r: checks.check_recording({"M04": {"a": 10, "b": 31}}, {"a": 10, "b": 20}, 40.0, 40.0),
        REFUSE,
        "1 of 2 outputs are of another recording: teacher M04 has 31 frames of b, the student 20",
    ),
    "another stride": (
        lambda t, r: checks.check_recording({}, {}, 20.0, 40.0),
        REFUSE,
        "a frame each 20 ms",
    ),
    "a mute target": (lambda t, r: checks.check_target([""] * 6, WORDS), REFUSE, "writes nothing in 100 %"),
    "one word for all": (lambda t, r: checks.check_target(["GO"] * 6, WORDS), REFUSE, "1 distinct texts for 6"),
    "often mute": (lambda t, r: checks.check_target(["", "", "", *WORDS[3:]], WORDS), WARN, "nothing in 50 %"),
    "mostly wrong": (
        lambda t, r: checks.check_accuracy(0.33, 0.2),
        WARN,
        "33 % of the sample as the references do, the student",
    ),
    "knows less than its pupil": (lambda t, r: checks.check_accuracy(0.6, 0.7), WARN, "less than its pupil"),
    "texts that are mostly wrong": (
        lambda t, r: checks.check_pseudo_labels([(0.9, True), (0.8, False), (0.7, False)], 0.5, "lexicon"),
        WARN,
        "100 % of the texts pass the confidence 0.5, and 33 % of these are right",
    ),
    "texts that nobody is sure of": (
        lambda t, r: checks.check_pseudo_labels([(0.3, True)], 0.9, "beam"),
        REFUSE,
        "nothing would be taught; lower distill.sequence.confidence",
    ),
    "the held-out speaker heard": (
        lambda t, r: checks.check_speaker_independence("M08", 192),
        WARN,
        "no leave-one-speaker-out result",
    ),
    "worse than its best": (
        lambda t, r: checks.check_best_teacher(0.3, {"M04": 0.8, "F03": 0.2}),
        WARN,
        "recognises 30 % of the sample, M04 alone 80 %",
    ),
    "spikes elsewhere": (lambda t, r: checks.check_spikes([2, 2, 3], [0.8] * 3), WARN, "moved by +2 frames"),
    "spikes nowhere": (lambda t, r: checks.check_spikes([0, 0, 0], [0.1] * 3), WARN, "by 0.10"),
    "all blank": (lambda t, r: checks.check_blanks(0.99), WARN, "99 % of the target's mass is blank"),
    "teachers drown": (lambda t, r: checks.check_gradients(50.0, 1.0), WARN, "pull 50 times"),
    "references drown": (lambda t, r: checks.check_gradients(0.01, 1.0), WARN, "pull 0.01 times"),
    "no ground truth": (lambda t, r: checks.check_gradients(1.0, 0.0), WARN, "no ground truth"),
    "stale stores": (lambda t, r: checks.check_live(0.5, "M04"), REFUSE, "differs by 5.0e-01 nats"),
    "int8 at its limit": (lambda t, r: checks.check_live(5e-3, "M04"), WARN, "differs by 5.0e-03"),
    "a leak": (
        lambda t, r: checks.check_training_speakers(headers(t, train_speakers=("M04", "M08")), ["M08"]),
        REFUSE,
        "has heard M08",
    ),
    "a decoder and new words": (
        lambda t, r: checks.check_words(WORDS, WORDS[1:], decoder=True),
        WARN,
        "1 of 6 test words",
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_no_check_fires_on_a_sound_input(name, tokens, references):
    assert SOUND[name](tokens, references).verdict == PASS


@pytest.mark.parametrize("name", BROKEN)
def test_each_check_fires_on_its_fault(name, tokens, references):
    check, verdict, reason = BROKEN[name]
    found = check(tokens, references)
    assert (found.verdict, reason in found.reason) == (verdict, True), found


@pytest.fixture(scope="module")
def variant(taught, outputs):
    def named(which, **overrides):
        return load("params/smoke.yaml", "M08", overrides={"outputs": str(outputs)} | overrides, variant=which)

    return named


def by_name(found):
    return {one.name: one for one in found}


def test_the_preflight_of_the_smoke_recipe_sees_its_mute_teachers_and_nothing_else(variant):
    """Its teachers were trained for four steps and write nothing: just what has to be refused."""
    found = by_name(preflight.preflight(variant("ctc_kd")))
    assert found["target"].verdict == REFUSE
    assert {name for name, one in found.items() if one.verdict == REFUSE} == {"target"}
    assert {"tokens", "held out", "recording", "stored and live", "gradients", "shift of ctc targets"} <= set(found)
    assert "differs by" in found["stored and live"].reason
    table = preflight.table(list(found.values()))
    assert table.verdict.iloc[0] == REFUSE


def test_hard_labels_need_no_teacher_and_ask_nothing_of_them(variant):
    found = by_name(preflight.preflight(variant("hard")))
    assert set(found) == {"decoding", "lengths", "unseen words", "choice", "heads"}


def test_what_is_refused_is_not_trained(variant):
    params = variant("ctc_kd", distill={"allow": [], "temperature": 3.0})
    with pytest.raises(UserError, match=r"refuses to train:\n  target: the target writes nothing in 100 %"):
        students.student(params, seed=7)
    assert not (student_folder(params, 7) / "model.json").exists()


def test_decoder_distillation_across_encoders_is_switched_to_ctc_with_the_reason(variant):
    asked = variant("decoder_kd", distill={"allow_decoder_kd": False})
    used = resolved(asked)
    assert (asked.distill.heads, used.distill.heads) == ("decoder", "ctc")
    switched = checks.check_decoder_kd(asked.distill, used.distill)
    assert switched.verdict == WARN
    assert "switched to CTC: the original study ended at 0 %" in switched.reason
    forced = variant("decoder_kd")
    assert resolved(forced).distill.heads == "decoder"
    assert "on purpose" in checks.check_decoder_kd(forced.distill, resolved(forced).distill).reason


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        ({"train_speakers": ["M04", "M08"]}, "held out", "has heard M08"),
        ({"blank": 5}, "tokens", "blank is 5"),
        ({"temperature": 3.0}, "temperature", "stored at temperature 3"),
    ],
)
def test_a_store_that_is_not_sound_is_named_before_it_is_used(monkeypatch, variant, change, name, reason):
    params = variant("ctc_kd")
    opened = extract.open_store

    def changed(*asked):
        store = opened(*asked)
        store.header = dataclasses.replace(store.header, **change)
        return store

    monkeypatch.setattr(extract, "open_store", changed)
    found = by_name(preflight._taught(params, load_tokens(params), 1))
    assert found[name].verdict == REFUSE
    assert reason in found[name].reason


def test_outputs_of_another_recording_are_seen(monkeypatch, variant):
    """A teacher's rows of two utterances of different length, swapped."""
    params = variant("ctc_kd")
    tokens = load_tokens(params)
    corpus = prepare.load(params)
    durations = {utt.utt_id: utt.duration_s for utt in corpus}
    opened = extract.open_store

    def swapped(*asked):
        store = opened(*asked)
        mine = sorted((one for one in store if one.startswith("M04")), key=lambda one: durations[one])
        longest, shortest = mine[-1], mine[0]
        store._rows = store._rows | {longest: store._rows[shortest], shortest: store._rows[longest]}
        return store

    from kdlib.targets import choice

    monkeypatch.setattr(extract, "open_store", swapped)
    monkeypatch.setattr(choice, "open_store", swapped)
    found = by_name(preflight._taught(params, tokens, 1))
    assert found["recording"].verdict == REFUSE
    assert "2 of" in found["recording"].reason
    assert "gradients" not in found  # what cannot be aligned is not compared
