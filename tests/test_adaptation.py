"""A trained student goes on with speech without transcripts: its targets, its batches, its record, and its alarm."""

import signal
from types import SimpleNamespace

import forks
import numpy as np
import pytest
import torch
import yaml
from corpora import utterances
from safetensors.torch import load_file

from kdlib.corpus.inputs import Batch
from kdlib.decode.calibration import towards_prior
from kdlib.distill import adaptation
from kdlib.errors import UserError
from kdlib.evaluate.hypotheses import read_hypotheses
from kdlib.io import read_json, repository_root
from kdlib.models import Emissions
from kdlib.pipeline import Fold
from kdlib.settings.adaptation import Adaptation
from kdlib.show import comparison, fold_comparison
from kdlib.targets.word_posteriors import WordTargets, agreement
from kdlib.training.curves import read_curves

LOSS = {"use_teachers": False, "alpha": 0, "beta": 0.5, "hard_words": {"weight": 0.5}, "control": "adapted_control"}


PROGRAM = """
import itertools, os, pathlib, sys
from kdlib.distill import adaptation
from kdlib.pipeline import Fold

recipe, folder, kill = sys.argv[1:]
calls, alarm = itertools.count(1), adaptation.SpeechAlarm.__call__

def killing(self, *args):
    if next(calls) == int(kill):
        os.kill(os.getpid(), 9)
    return alarm(self, *args)

adaptation.SpeechAlarm.__call__ = killing
adaptation.adapt_student(pathlib.Path(folder), Fold.load(recipe, "M08", "adapted_one_best").adaptation_setup(1))
"""


@pytest.fixture(scope="module")
def recipe(with_teachers, outputs, tmp_path_factory):
    """Variants of the smoke recipe that adapt the student `hard`."""
    how = {"start": "hard", "share": 0.5}
    kinds = {
        "adapted_words": {"teachers": ["hard"], "teacher_seeds": [1, 2], "prior": 0.5},
        "adapted_average": {"targets": "average", "decay": 0.9},
        "adapted_one_best": {"targets": "one_best", "rounds": 2, "agreement": 0.2},
        "adapted_references": {"targets": "references"},
        "adapted_control": {"targets": "none"},
        "adapted_entropy": {"targets": "entropy", "speech": "test", "share": 1.0, "trains": "norms"},
    }
    variants = {name: {"adapt": how | kind, "distill": LOSS} for name, kind in kinds.items()}
    variants["tested"] = {"adapt": how | {"speech": "test", "targets": "references"}, "distill": LOSS}
    variants["alone"] = {"adapt": how | {"share": 1.0, "targets": "none"}, "distill": LOSS}
    variants["unused"] = {"adapt": how | {"targets": "entropy", "prior": 0.5}, "distill": LOSS}
    variants["wrong"] = {"adapt": how, "distill": {"use_teachers": True, "alpha": 0.5}}
    variants["epochs"] = {"adapt": how, "distill": LOSS, "student": {"phases": [{"epochs": 1}]}}
    variants["views"] = {"adapt": how, "distill": LOSS | {"consistency": {"weight": 0.2}}}
    variants["mixed"] = {"adapt": how, "distill": LOSS, "student": {"mixup": 0.2}}
    recipe = tmp_path_factory.mktemp("adaptation") / "smoke.yaml"
    settings = {"extends": str(repository_root() / "params/smoke.yaml"), "outputs": str(outputs), "variants": variants}
    recipe.write_text(yaml.safe_dump(settings))
    return recipe


@pytest.fixture(scope="module")
def variant(recipe):
    """A variant of that recipe, of the fold M08."""
    return lambda name: Fold.load(recipe, "M08", name)


@pytest.mark.parametrize("name", ["words", "average", "one_best", "references", "control"])
def test_two_models_are_adapted_alike_one_to_each_speaker(variant, name):
    fold = variant(f"adapted_{name}")
    scores = fold.scores(1)
    folder = fold.layout.student(1)
    record, of_dev = (read_json(path / "model.json") for path in (folder, folder / "dev"))
    assert (record["adapted_to"], of_dev["adapted_to"]) == ("M08", "M10")
    assert record["best_step"] == of_dev["best_step"]  # chosen on the dev speaker, for both
    assert record["steps"] == (12 if name == "one_best" else 6)
    start = load_file(fold.of("hard").student(1) / "model.safetensors")
    assert all(torch.equal(weight, load_file(folder / "model.safetensors")[key]) for key, weight in start.items()) == (
        record["best_step"] == 0
    )
    known = {"words": {"M04"}, "references": {"M04", "M08"}}.get(name, {"M04"})
    assert {speaker for speaker in record["train_speakers"] if not speaker.startswith("C")} == known
    assert fold.start(1) == fold.of("hard").scores(1)
    remark = read_json(scores / "scores.json").get("remark") or ""
    expected = {"references": "transcribed speech: an upper bound", "control": ""}.get(name, "untranscribed speech")
    assert expected in remark
    assert bool(remark) == (name != "control")
    curves = read_curves(folder / "tensorboard")
    assert {"dev_wra", "speech_distinct"} <= set(curves.name)
    hypotheses = (scores / "dev/hypotheses.csv").read_text()
    assert "M10_" in hypotheses


def test_transcripts_of_the_adaptation_speech_are_not_there(variant):
    setup = variant("adapted_words").adaptation_setup(1)
    for speech, speaker in ((setup.speech, "M08"), (setup.dev_speech, "M10")):
        assert {utt.speaker for utt in speech.utterances} == {speaker}
        assert {utt.text for utt in speech.utterances} == {""}
        assert {utt.block for utt in speech.utterances} == {"B1", "B3"}
    assert not {"M08", "M10"} & {utt.speaker for utt in setup.labelled}
    assert all(utt.text for utt in variant("adapted_references").adaptation_setup(1).speech.utterances)


def test_what_cannot_be_adapted_is_refused(variant):
    with pytest.raises(UserError, match=r"of CTC and without teachers"):
        variant("wrong").adaptation_setup(1)
    with pytest.raises(UserError, match=r"one phase of steps in student\.phases"):
        variant("epochs").adaptation_setup(1)
    with pytest.raises(UserError, match=r"is CTC and hard_words; remove consistency"):
        variant("views").adaptation_setup(1)
    with pytest.raises(UserError, match=r"remove mixup, curriculum"):
        variant("mixed").adaptation_setup(1)
    with pytest.raises(UserError, match=r"speech is test, whose transcripts nothing may be trained on"):
        variant("tested").adaptation_setup(1)
    with pytest.raises(UserError, match=r"a share of 1 leaves no labelled speech"):
        variant("alone").adaptation_setup(1)
    with pytest.raises(UserError, match=r"'entropy' have no use for prior"):
        variant("unused").adaptation_setup(1)


def test_test_time_adaptation_changes_scales_and_shifts_alone(variant):
    fold = variant("adapted_entropy")
    scores = read_json(fold.scores(1) / "scores.json")
    assert scores["remark"] == "adapted on the scored speech itself, without transcripts: transductive"
    before, after = (load_file(fold.of(name).student(1) / "model.safetensors") for name in ("hard", "adapted_entropy"))
    model = fold.adaptation_setup(1).recognisers()[0][0]
    kinds = (torch.nn.LayerNorm, torch.nn.BatchNorm1d)
    norms = {name for name, layer in model.named_modules() if isinstance(layer, kinds)}
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    record = read_json(fold.student(1) / "model.json")
    assert {name.rpartition(".")[0] for name in changed} <= norms
    assert bool(changed) == (record["best_step"] > 0)
    comparison.check_control(variant("test_time"))  # of base.yaml: its control is what it starts from
    with pytest.raises(UserError, match=r"no control of 'test_time\+wrong'"):
        comparison.check_control(variant("test_time+wrong"))
    setup = fold.adaptation_setup(1)
    assert {(utt.block, utt.text) for utt in setup.speech.utterances} == {("B2", "")}
    counted = read_json(fold.student(1) / "run.json")["passes"]
    assert counted["forward"] == counted["backward"] > 0


def test_words_that_the_adaptation_speech_does_not_hold_are_scored_apart(variant):
    fold = variant("adapted_words")
    spoken = {utt.text for utt in fold.corpus.where(lambda utt: utt.speaker == "M08" and utt.block in ("B1", "B3"))}
    rows = read_hypotheses(fold.scores(1) / "hypotheses.csv")
    assert {row.utt_id: row.seen for row in rows} == {
        row.utt_id: "yes" if row.reference in spoken else "no" for row in rows
    }
    folders = {("hard", 1): fold.of("hard").scores(1), ("adapted_words", 1): fold.scores(1)}
    table = fold_comparison.by_adaptation_words(folders, "M08")
    for system in ("hard", "adapted_words"):
        part = table[(table.system == system) & (table.decoder == "greedy")]
        assert part.n.sum() == len(rows)
    assert fold_comparison.by_adaptation_words({("hard", 1): fold.of("hard").scores(1)}, "M08").empty
    pairs = {"hard": "baseline", "adapted_words": "adapted_control", "two": "hard"}
    assert fold_comparison.families(pairs, {"adapted_words"}) == [
        {"hard": "baseline", "two": "hard"},
        {"adapted_words": "adapted_control"},
    ]
    passes = fold_comparison.passes_table(fold, ["hard", "adapted_words"], 1)
    own, taught_by = (read_json(fold.layout.student(seed, "hard") / "run.json")["passes"] for seed in (1, 2))
    assert passes["of other students"]["adapted_words"] == (sum(own.values()) + sum(taught_by.values())) / 1000
    first = {("test_time", 1): variant("adapted_entropy").scores(1)} | folders  # adapted to the scored speech itself
    assert len(fold_comparison.by_adaptation_words(first, "M08")) > len(table)


def test_a_killed_adaptation_ends_with_the_same_weights(variant, recipe, tmp_path):
    fold, whole, killed = variant("adapted_one_best"), tmp_path / "whole", tmp_path / "killed"
    fold.student(1)  # with all that it needs
    for folder in (whole, killed):
        folder.mkdir()
    assert forks.run(PROGRAM, recipe, whole, 0).returncode == 0
    for validation in (4, 2):  # counted anew in each run: on the dev speaker's speech, then on the held-out speaker's
        found = forks.run(PROGRAM, recipe, killed, validation)
        assert found.returncode == -signal.SIGKILL, found.stdout
    resumed = forks.run(PROGRAM, recipe, killed, 0)
    assert resumed.returncode == 0, resumed.stdout
    for name in ("model.safetensors", "dev/model.safetensors"):
        one, other = load_file(whole / name), load_file(killed / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert read_json(whole / "model.json")["passes"] == read_json(killed / "model.json")["passes"]


def test_batches_have_their_share_of_adaptation_speech():
    mine = utterances(*(f"a{number}" for number in range(10)), texts=[""] * 10)
    others = utterances(*(f"b{number}" for number in range(30)), texts=["X"] * 30)
    setup = SimpleNamespace(settings=SimpleNamespace(batch_size=8), how=Adaptation(start="hard", share=0.25))
    plan = adaptation._plan(setup, adaptation.Speech("A", mine))
    first, again, second = (plan.part(others, number, 1) for number in (0, 0, 1))
    assert first == again != second
    assert sorted(utt.utt_id for batch in first for utt in batch if not utt.text) == [f"a{n}" for n in range(10)]
    assert all(sum(not utt.text for utt in batch) == 2 and len(batch) == 8 for batch in first)
    none = SimpleNamespace(settings=setup.settings, how=Adaptation(start="hard", share=0.25, targets="none"))
    plan = adaptation._plan(none, adaptation.Speech("A", mine))
    assert [len(batch) for batch in plan.part(others, 0, 1)] == [8, 8, 8, 6, 8]
    assert all(utt.text for batch in plan.part(others, 0, 1) for utt in batch)


def test_posteriors_are_moved_towards_a_prior():
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(5), 200) * np.array([4, 1, 1, 1, 1])
    rows /= rows.sum(1, keepdims=True)
    prior = np.full(5, 0.2)
    assert rows.mean(0)[0] > 0.4
    assert np.allclose(towards_prior(rows, prior, 1.0).mean(0), prior, atol=1e-3)
    assert np.allclose(towards_prior(rows, prior, 0.0), rows, atol=1e-6)
    half = towards_prior(rows, prior, 0.5).mean(0)[0]
    assert 0.2 < half < rows.mean(0)[0]


def test_targets_are_posteriors_and_their_best_words():
    class Words:
        words = ("GO", "NO")

    tokens = SimpleNamespace(encode=lambda word: [ord(word[0])])
    batch = Batch(utterances("a", "b", "c", texts=["", "", "X"]))
    targets = WordTargets(Words(), tokens, {"a": torch.tensor([0.9, 0.1]), "b": torch.tensor([0.2, 0.8])})
    assert targets.rows(batch) == [0, 1]
    kept = batch.select([0, 1])
    assert torch.allclose(targets.posterior(kept), torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    assert torch.allclose(targets.posterior(kept, 2.0)[0], torch.tensor([0.75, 0.25]))
    assert [(ids, round(share, 5)) for ((ids, share),) in targets.texts(kept)] == [([ord("G")], 0.9), ([ord("N")], 0.8)]


def test_the_alarm_needs_no_transcripts(capsys, tmp_path):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.ids = torch.nn.Parameter(torch.zeros(1)), []

        def forward(self, inputs, lengths):
            logits = torch.nn.functional.one_hot(torch.tensor([[2, token, 2] for token in self.ids]), 20) * 9.0
            return SimpleNamespace(ctc=Emissions(logits, torch.full((len(self.ids),), 3)))

    speech = [Batch(utterances(*"abcdefgh"), loaded=[torch.zeros(8, 4), torch.full((8,), 4)])]
    file, model = tmp_path / "alarm.json", Model()
    for ids, raised in ((range(5, 13), False), ([5, 5, 6, 7, 8, 9, 10, 11], True), ([5] * 8, True)):
        model.ids = list(ids)
        alarm = adaptation.SpeechAlarm("x", file)  # as after a kill: it knows what it saw
        found = alarm(model, speech)
        assert bool(alarm.raised) == raised
    assert found == {"speech_distinct": 1.0, "speech_most_frequent": 1.0}
    assert (
        capsys.readouterr().out.count("ALARM: x collapses: 7 different hypotheses, 8 at first; 25 % are the same") == 1
    )


def test_agreement_is_that_of_passes_with_dropout(variant):
    fold = variant("adapted_one_best")
    setup = fold.adaptation_setup(1)
    one = setup.recognisers()[0]
    speech = setup.speech.utterances[:3]
    for module in one.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    best = {utt.utt_id: 0 for utt in speech}
    same = agreement(one, speech, best)
    assert set(same.values()) <= {0.0, 1.0}  # without dropout all passes are the same
    assert not one.model.training
