"""Students of the smoke recipe: trained, killed and resumed, in phases and in runs, in several processes, exported."""

import random
import shutil
import signal
from types import SimpleNamespace

import forks
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from kdlib.corpus import inputs
from kdlib.corpus.inputs import Batch
from kdlib.decode import calibration
from kdlib.decode.greedy import greedy
from kdlib.decode.lexicon import Lexicon
from kdlib.distill import students
from kdlib.distill.setup import LATEST
from kdlib.errors import UserError
from kdlib.evaluate import compare
from kdlib.evaluate.checkpoint import export_calibration
from kdlib.evaluate.hypotheses import Hypothesis, write_hypotheses
from kdlib.io import read_json
from kdlib.models import export, hybrid
from kdlib.models.nemo_files import NeMoCTC, quiet_nemo, restore_model
from kdlib.pipeline import Fold
from kdlib.show import comparison, format
from kdlib.tokens import BLANK
from kdlib.training.curves import read_curves


@pytest.fixture(scope="module")
def variant(with_teachers, outputs):
    def named(which, **overrides):
        return Fold.load("params/smoke.yaml", "M08", which, overrides={"outputs": str(outputs)} | overrides)

    return named


def same(folder, expected_folder, file="model.safetensors"):
    weights, expected = load_file(folder / file), load_file(expected_folder / file)
    return all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_student_is_chosen_on_the_dev_speaker_and_scored_on_the_held_out_one(variant):
    fold = variant("ctc_kd")
    folder = fold.student()
    record = read_json(folder / "model.json")
    assert not {"M08", "M10"} & set(record["train_speakers"])
    assert (record["variant"], record["seed"], record["heads_trained"], record["steps"]) == ("ctc_kd", 1, ["ctc"], 6)
    files = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "latest.safetensors", "tensorboard", "run.json"} <= files
    assert not list(folder.glob("**/*.ckpt")) + list(folder.glob("**/*.pt"))  # no file that has to be unpickled
    curves = read_curves(folder / "tensorboard")
    assert {"loss", "ctc", "kd_ctc", "dev_wra"} <= set(curves.name)
    assert curves[curves.name == "dev_wra"].step.min() == 0  # the start
    assert record["start_dev_wra"] == curves[curves.name == "dev_wra"].value.iloc[0]
    scored = fold.scores()
    assert read_json(scored / "scores.json")["held_out"] == "M08"
    hypotheses = pd.read_csv(scored / "hypotheses.csv")
    assert set(hypotheses.utt_id) == {utt.utt_id for utt in fold.splits.test}
    assert set(pd.read_csv(scored / "dev/hypotheses.csv").speaker) == {"M10"}


def test_a_student_that_training_ruins_keeps_its_start(variant):
    fold = variant("hard", student={"phases": [{"steps": 6, "lr": 1.0, "warmup_steps": 0}]})
    folder, start = fold.student(seed=3), fold.initial_student(3)
    assert read_json(folder / "model.json")["best_step"] == 0
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], weight) for name, weight in start.state_dict().items())
    assert not all(torch.equal(load_file(folder / LATEST)[name], weights[name]) for name in weights)
    assert "better than the start" in comparison.start_line(fold, 3)
    assert fold.start(3) == fold.layout.baseline
    baseline, own = (pd.read_csv(path / "hypotheses.csv") for path in (fold.baseline(), fold.scores(3)))
    assert baseline.greedy.equals(own.greedy)


def test_a_student_that_starts_elsewhere_has_scores_of_its_start(variant):
    """SpeechBrain's encoder starts from the base model of the teachers, a resumed student from the other's weights."""
    fold = variant("hard", student={"encoder": "sb", "phases": [{"steps": 2, "lr": 1e-3}]})
    folder, base = fold.student(seed=4), hybrid.TrainedModel(fold.base_model())
    start = fold.start(4)
    batch = Batch(fold.splits.test)
    expected = [fold.tokens.decode(ids) for ids in greedy(base(batch.inputs, batch.lengths).ctc, BLANK)]
    found = pd.read_csv(start / "hypotheses.csv", keep_default_na=False).set_index("utt_id").greedy
    assert found.loc[[utt.utt_id for utt in fold.splits.test]].tolist() == expected
    assert comparison.student_table(fold, 4).columns[0] == ("held out", "start")
    assert ("start of hard", 4) in comparison.score_folders(fold, ["hard"], [4])
    resumed = variant("ctc_kd", student={"encoder": "sb", "resume": str(folder), "phases": [{"steps": 2}]})
    model = resumed.initial_student(5)
    assert all(torch.equal(load_file(folder / LATEST)[name], weight) for name, weight in model.state_dict().items())
    assert set(pd.read_csv(resumed.start(5) / "dev/hypotheses.csv").speaker) == {"M10"}


def test_a_student_below_its_start_is_named_with_what_to_try(tmp_path):
    def scored(name, right):
        texts = ["GO" if number < right else "NO" for number in range(40)]
        rows = [Hypothesis(f"u{i}", "M08", "", "", "yes", "GO", text, text) for i, text in enumerate(texts)]
        (tmp_path / name).mkdir()
        write_hypotheses(rows, tmp_path / name / "hypotheses.csv")
        (tmp_path / name / "scores.json").write_text('{"decoders": {"greedy": {}, "lexicon": {}}}')
        return tmp_path / name

    def remark(start, student):
        fold = SimpleNamespace(
            params=SimpleNamespace(variant="hard", scoring=SimpleNamespace(measure="wra", unit="utterance")),
            start=lambda seed: start,
            scores=lambda seed: student,
        )
        return comparison.below_start(fold, 1)

    good, bad, same_as_good = scored("good", 34), scored("bad", 20), scored("same", 34)
    why = remark(good, bad)
    assert "hard, seed 1, ends below where it began" in why
    assert "lexicon WRA 50.0 against 85.0 %" in why
    assert "Try student: {augment: none}" in why
    assert remark(good, same_as_good) == remark(bad, good) == remark(None, good) == ""


def test_the_control_is_trained_on_the_same_batches_without_teachers(variant, monkeypatch):
    hard, distilled = variant("hard"), variant("ctc_kd")
    parts = {}
    for fold in (hard, distilled):
        data = fold.student_data()
        plan = students.batch_plan(fold.params.student, data)
        parts[fold.params.variant] = [
            [utt.utt_id for batch in plan.part(data.train, number, 1) for utt in batch] for number in range(4)
        ]
    assert parts["hard"] == parts["ctc_kd"]
    monkeypatch.setattr(Fold, "targets", lambda *_, **__: pytest.fail("a teacher's target was loaded"))
    assert hard.student()


def test_the_parts_of_an_epoch_are_the_whole_epoch(variant):
    fold = variant("hard", student={"validations_per_epoch": 2, "batch_size": 4})
    data = fold.student_data()
    plan = students.batch_plan(fold.params.student, data)
    assert plan.parts == 2
    utt_ids = [utt.utt_id for part in (0, 1) for batch in plan.part(data.train, part, 1) for utt in batch]
    assert sorted(utt_ids) == sorted(utt.utt_id for utt in data.train)
    phases = {"student": {"validations_per_epoch": 2, "accumulate": 2, "phases": [{"epochs": 3}]}}
    plan = students.batch_plan(variant("hard", **phases).params.student, data)
    assert plan.steps == [3 * 2]  # 3 batches per epoch, in parts of 2 and 1


PHASES = [
    {"epochs": 1, "lr": 1e-3, "warmup_steps": 1, "freeze_encoder": True},
    {"epochs": 2, "lr": 5e-4, "warmup_steps": 1},
]


def test_two_phases_in_one_run_equal_two_runs_with_resume(variant, tmp_path):
    """Seed 000's recipe both ways: the encoder frozen, then not, from the latest weights and with a new optimiser."""

    def train(name, **student):
        shutil.copytree(variant("two_stage", student=student).student(seed=2), tmp_path / name)
        return tmp_path / name

    whole, first = train("whole", phases=PHASES), train("first", phases=PHASES[:1])
    start, frozen = restore_model(variant("hard").pretrained_model()), load_file(first / LATEST)
    for name, weight in start.encoder.state_dict().items():
        assert torch.equal(weight, frozen[f"encoder.encoder.{name}"]), name
    second = train("second", phases=PHASES[1:], resume=str(first))
    assert [phase["steps"] for phase in read_json(whole / "model.json")["phases"]] == [3, 6]
    assert same(whole, second, LATEST)
    assert not same(first, second, LATEST)


def test_resuming_from_a_missing_student_is_refused_with_its_folder(variant):
    with pytest.raises(UserError, match=r"student.resume: there is no student in .*none.*; train it first"):
        variant("ctc_kd", student={"resume": "none"}).student()


KILLED = """
import os, sys
from kdlib.training import callbacks
from kdlib.pipeline import Fold

def die(self, trainer, *rest, end=callbacks._Progress.on_train_batch_end):
    end(self, trainer, *rest)
    if trainer.global_step == int(sys.argv[2]):
        os.kill(os.getpid(), 9)

callbacks._Progress.on_train_batch_end = die
student = {"phases": [{"steps": 14, "warmup_steps": 2}], "validations_per_epoch": 2, "encoder": "sb"}  # no NeMo
Fold.load("params/smoke.yaml", "M08", "ctc_kd", overrides={"outputs": sys.argv[1], "student": student}).student()
"""


def test_a_student_killed_at_a_random_step_and_resumed_has_the_same_weights(variant, with_teachers, tmp_path):
    student = {"phases": [{"steps": 14, "warmup_steps": 2}], "validations_per_epoch": 2, "encoder": "sb"}
    whole = tmp_path / "whole"
    shutil.copytree(variant("ctc_kd", student=student).student(seed=1), whole)
    for name in ("corpus", "pretrained", "tokens", "parents", "teachers", "logits"):
        shutil.copytree(with_teachers.layout.recipe / name, tmp_path / "smoke" / name)
    step, folder = random.randrange(3, 14), tmp_path / "smoke/M08/students/ctc_kd/seed1"

    assert forks.run(KILLED, tmp_path, step).returncode == -signal.SIGKILL, step
    assert not folder.exists()
    resumed = forks.run(KILLED, tmp_path, 0)
    assert resumed.returncode == 0, resumed.stderr
    assert "resumes from step" in resumed.stdout + resumed.stderr
    assert same(folder, whole), step
    assert same(folder, whole, LATEST), step


@pytest.mark.parametrize(
    "settings",
    [
        {"student": {"encoder": "sb"}},
        {"student": {"encoder": "sb", "start": "scratch", "sizes": {"d_model": 16, "layers": 1, "heads": 2}}},
        {"student": {"freeze_preprocessor": False, "augment": "none", "precision": "bf16", "accumulate": 2}},
        {"student": {"schedule": "noam", "decoder_layers": 1}, "distill": {"heads": "both", "allow_decoder_kd": True}},
        {
            "distill": {
                "gamma": 0.1,
                "blanks": "symmetric",
                "max_shift": 2,
                "temperature": {"from": 2.0, "to": 1.0},
                "alpha": {"from": 0.5, "to": 0.1},
            }
        },
        {"aggregation": {"method": "prob_mean"}, "distill": {"pseudo_labels": {"weight": 0.2, "confidence": 0.1}}},
        {
            "student": {
                "encoder": "sb",
                "start": "scratch",
                "sizes": {"d_model": 16, "layers": 2, "heads": 2, "ffn": 16, "kernel": 7, "mels": 20},
            },
            "distill": {"intermediate": {"weight": 0.3, "layer": 1}, "ctc_smoothing": 0.1},
        },
        {
            "student": {"augment": "mask"},
            "distill": {
                "alpha": 0,
                "consistency": {"weight": 0.2},
                "average": {"weight": 0.2, "decay": 0.9},
                "word_errors": {"weight": 0.1},
            },
        },
        {
            "student": {"decoder_layers": 1, "precision": "bf16"},
            "aggregation": {"method": "weighted_similarity"},
            "distill": {
                "alpha": 0,
                "heads": "both",
                "allow_decoder_kd": True,
                "words": {"weight": 0.5, "temperature": 2.0, "shortlist": 2, "random_words": 1},
                "sequence": {"weight": 0.5, "nbest": 2, "hypotheses_from": "beam"},
                "occupancy": {"weight": 0.5},
            },
        },
    ],
    ids=[
        *("sb", "sb from scratch", "bf16", "decoder and noam", "features and shifts", "pseudo-labels"),
        *("intermediate", "views and average", "words, texts and occupancies"),
    ],
)
def test_every_kind_of_student_trains_and_is_scored(variant, settings):
    fold = variant("ctc_kd", **settings)
    decoders = read_json(fold.scores(3) / "scores.json")["decoders"]
    assert {"greedy", "lexicon"} <= set(decoders)
    assert ("attention_lexicon" in decoders) == bool(fold.params.student.decoder_layers)
    record = read_json(fold.layout.student(3) / "model.json")
    assert record["encoder"] == fold.params.student.encoder
    assert record["steps"] > 0
    shown = fold.loss_view(3).terms["after training"]
    assert shown.notna().any()
    assert shown.isna().get("consistency", True)  # two views are of training alone


def test_two_processes_train_one_student(variant):
    """DDP on the CPU: each process gets half of the batches, and both end with one student."""
    phases = [{"steps": 3, "freeze_encoder": True}, {"steps": 3}]
    fold = variant("hard", student={"devices": 2, "encoder": "sb", "phases": phases}, device="cpu")
    folder = fold.student(5)
    assert read_json(folder / "model.json")["steps"] == 6
    assert not (folder / "params.json").exists()
    assert hybrid.TrainedModel(folder).record["variant"] == "hard"


def test_plain_nemo_transcribes_with_an_exported_ctc_student(variant, tmp_path):
    folder = variant("hard").student()
    path = export.export(folder, tmp_path / "student.nemo")
    nemo = restore_model(path)
    assert type(nemo).__name__ == "EncDecCTCModelBPE"
    nemo.eval()
    student = hybrid.TrainedModel(folder)
    utterances = variant("hard").splits.test
    hypotheses = []
    for utt in utterances:
        hypotheses += [student.tokens.decode(ids) for ids in greedy(student(*inputs.collate([utt])).ctc, BLANK)]
    with quiet_nemo():
        transcripts = nemo.transcribe([str(utt.wav) for utt in utterances], batch_size=1, verbose=False)
    assert [transcript.text.upper() for transcript in transcripts] == hypotheses


def test_plain_nemo_has_the_same_posteriors_as_the_student(variant, tmp_path):
    """The smoke student's output is nearly empty: compare probabilities, blank with blank, piece with piece."""
    folder = variant("hard").student()
    nemo = NeMoCTC(export.export(folder, tmp_path / "student.nemo"))
    student = hybrid.TrainedModel(folder)
    batch = inputs.collate(variant("hard").splits.test[:3])
    ours, theirs = student(*batch), nemo(*batch)
    pieces = len(student.tokens.pieces)
    plain = [index for index in range(pieces) if index > 2]
    our_probs = ours.ctc.logits[..., [*plain, BLANK]].softmax(-1)
    their_probs = theirs.ctc.logits[..., [*plain, pieces]].softmax(-1)
    for row, length in enumerate(ours.lengths.tolist()):
        assert torch.allclose(our_probs[row, :length], their_probs[row, :length], atol=1e-4)


def test_an_exported_student_has_its_calibration(variant, tmp_path):
    fold = variant("hard")
    scores, path = fold.scores(), tmp_path / "student.nemo"
    export.export(fold.student(), path)
    written = export_calibration(fold.student(), path)
    assert written == tmp_path / "student.calibration.json"
    ours = calibration.load(scores / calibration.FILE)["lexicon"]
    theirs = calibration.load(written)["lexicon"]
    assert set(ours.speakers).isdisjoint(fold.split_settings.excluded_speakers)
    words = sorted({utt.text for utt in fold.splits.test})
    of_nemo = Lexicon(words, NeMoCTC(path).tokens)
    theirs.check(NeMoCTC(path).tokens, {})
    assert theirs.bias(of_nemo) == pytest.approx(ours.bias(Lexicon(words, fold.tokens)), abs=1e-6)


def test_a_speechbrain_student_cannot_be_exported_to_nemo(with_teachers, tmp_path):
    with pytest.raises(UserError, match="has a Conformer as encoder, for which NeMo has no class"):
        export.export(with_teachers.layout.recipe / "teachers/sb/M04", tmp_path / "x.nemo")


def test_the_comparison_has_student_baseline_and_control(variant):
    table = comparison.student_table(variant("ctc_kd"), 1)
    assert list(table.index) == ["greedy", "lexicon", "lexicon_plain", "beam"]
    names = ("baseline", "hard", "ctc_kd")  # the baseline is what they start from
    assert list(table.columns) == [(speech, name) for speech in ("held out", "dev") for name in names]
    assert table.loc["greedy", ("held out", "baseline")] == 0  # trained for 15 steps
    folders = comparison.score_folders(variant("ctc_kd"), ["hard", "ctc_kd"], [1])
    folds = format.fold_table(comparison.fold_scores(folders, "M08"), "wra")
    assert [name for _, name, _ in folds.index] == ["baseline", "hard", "ctc_kd", "hard", "ctc_kd"]
    assert ("M08", "hard", "mean") in folds.index
    with pytest.raises(UserError, match=r"no scores here; train this student with: make compare VARIANTS=two_stage"):
        comparison.score_folders(variant("ctc_kd"), ["two_stage"], [9])


def test_checkpoints_may_be_chosen_by_the_closed_lexicon(variant):
    fold = variant("hard", student={"choose_by": "words"})
    record, curves = read_json(fold.student(8) / "model.json"), read_curves(fold.layout.student(8) / "tensorboard")
    found = {name: part.set_index("step").value for name, part in curves.groupby("name")}
    scores = found["dev_words"] - 1e-3 * found["dev_loss"].clip(upper=100)
    assert record["best_dev_score"] == pytest.approx(scores.max(), abs=1e-5)
    assert record["best_step"] == scores.idxmax()
    assert "balanced closed lexicon" in comparison.start_line(fold, 8) or record["best_step"] == 0
    sentences = variant("hard", student={"choose_by": "words"}, synthetic={"sentences": 20, "words": {"digits": 0}})
    with pytest.raises(UserError, match=r"student\.choose_by: words choose among the entries of the lexicon"):
        sentences.student_setup(8)


def test_a_balanced_lexicon_does_not_prefer_a_word():
    lexicon = SimpleNamespace(words=["GO", "NO"])
    posteriors = torch.tensor([[0.9, 0.1], [0.6, 0.4]])  # GO is preferred throughout
    assert students.balanced_wra(posteriors, lexicon, ["GO", "NO"]) == 1.0
    assert students.balanced_wra(posteriors, lexicon, ["NO", "GO"]) == 0.0


def test_a_control_of_other_steps_is_refused(variant):
    with pytest.raises(UserError, match="'hard' is no control of 'ctc_kd': it must have the same student, steps"):
        comparison.check_control(variant("ctc_kd"), variant("hard", student={"batch_size": 8}))
    with pytest.raises(UserError, match="is no control"):
        comparison.check_control(variant("ctc_kd"), variant("ctc_kd"))
    mixed = {"mixup": 0.2, "curriculum": {"by": "length"}}
    comparison.check_control(
        variant("label_smoothing", student=mixed), variant("hard")
    )  # another student, the same steps
    with pytest.raises(UserError, match="is no control"):
        comparison.check_control(variant("label_smoothing", student=mixed), variant("hard", student={"batch_size": 8}))
    with pytest.raises(UserError, match="is no control"):
        comparison.check_control(variant("ctc_kd", student=mixed), variant("hard"))


def test_resuming_from_a_student_trained_on_the_held_out_speaker_is_refused(variant):
    speakers, overrides = {"dev": "M10", "exclude": []}, {"outputs": variant("hard").params.outputs}
    folder = Fold.load("params/smoke.yaml", "M04", "hard", fold=speakers, overrides=overrides).student()  # on M08
    fold = variant("hard", student={"resume": str(folder)})
    with pytest.raises(UserError, match=r"student.resume: .* was trained on M08"):
        fold.student(8)


def test_a_speechbrain_student_without_a_base_model_is_refused(variant):
    fold = variant("hard", student={"encoder": "sb"}, teacher={"parent": "none"})
    with pytest.raises(UserError, match=r"starts from the teachers' base model, but teacher.parent is 'none'"):
        fold.student(8)


def test_fixed_and_broken_utterances_are_counted(tmp_path):
    """Twelve utterances: eight fixed, one broken, three unchanged; by chance that uneven once in 26 times."""
    for name, right in (("before", range(8, 11)), ("after", range(10))):
        (tmp_path / name).mkdir()
        rows = [
            Hypothesis(f"u{i}", "M08", "HIGH", "C", "yes", f"W{i}", greedy=f"W{i}" if i in right else "")
            for i in range(12)
        ]
        write_hypotheses(rows, tmp_path / name / "hypotheses.csv")
    table = comparison.changed_utterances(tmp_path / "before", tmp_path / "after")
    assert table.change.value_counts().to_dict() == {"fixed": 8, "broke": 1}
    systems = {name: compare.collect([tmp_path / name]) for name in ("after", "before")}
    verdict = compare.compare(systems, against="before")[0]
    assert (verdict.fixed, verdict.broken, verdict.verdict) == (8, 1, "better")
    assert verdict.mcnemar_p == pytest.approx(2 * (1 + 9) / 2**9)
