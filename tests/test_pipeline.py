"""The pipeline: what makes each stage anew, and that no other module makes stages."""

import ast
from pathlib import Path

import pytest

from kdlib import source_code
from kdlib.fold_stage import code_of
from kdlib.pipeline import Fold

KDLIB = Path(source_code.__file__).parent
STAGES = source_code.stage_methods("pipeline.py", "Fold") + source_code.stage_methods(
    "fold_imports.py", "ImportedTeachers"
)
# Which edited files make a stage anew. The columns are:
#   prepared_corpus pretraining tokens_folder language_model pretrained_scores zero_shot trained_base_model
#   speaker_teacher parent_scores extracted_outputs layer_outputs teacher_scores speaker_features fusion
#   word_calibration target_report combined_teacher_scores logit_student preflight_checks student
#   scores start_scores ensemble imported_teacher converted_teacher averaged_teacher imported_outputs
TABLE = """
xxxxxxxxxxxxxxxxxxxxxxxxxxx  corpus/audio.py corpus/audio_checks.py corpus/embedded/dysarthria.py
                             corpus/embedded/espeak.py corpus/embedded/grammar.py corpus/embedded/skeleton.py
                             corpus/embedded/synthetic.py corpus/feature_checks.py corpus/features.py
                             corpus/importers/phoenix.py corpus/importers/torgo.py corpus/importers/uaspeech.py
                             corpus/labels.py corpus/manifest.py corpus/prepare.py corpus/speakers.py
                             corpus/utterances.py corpus/views.py
                             data/speakers.csv data/uaspeech_words.json data/word_duration_ratios.csv
                             settings/corpus.py settings/encoder.py tokens.py
.xx.xxxxxxxxxxxxxxxxxxxxxxx  runtime.py
.xx.xxxxxxxx.xxxxxxxxxxxxxx  models/nemo_files.py settings/augment.py settings/pretrained.py
.x..xxxxxxxx.xxxxxxxxxxxxxx  corpus/inputs.py models/augment.py models/decoder.py models/encoder.py
                             models/encoder_bilstm.py models/encoder_conformer.py models/encoder_nemo.py
                             models/encoder_speechbrain.py models/encoder_wav2vec2.py models/encoders.py
                             models/fast_layers.py models/hybrid.py models/masks.py
.x..xxxxx..x.xxxxxxxxxxxxxx  decode/greedy.py
..x.xxxx...x.xxxxxxxxxxxx.x  pretrained/pieces.py
...xxxxxx.xx.xxxxxxxxxx....  decode/beam.py decode/calibration.py decode/lexicon.py decode/lm.py decode/trie.py
                             settings/evaluation.py
.........xxx.xxxxxxxxxxxxxx  logits/index.py logits/store.py
......xxx.xx.xxxxxxx.x.xxxx  settings/reference_loss.py settings/schedule.py
......xxx..x.xxxxxxx...xxxx  settings/teacher.py
.........xxx.xxxxxxx...xxxx  logits/extract.py
....xx..x..x.xxxxxxxxxx....  evaluate/hypotheses.py
.x....xxx.xx.xxxxxxx.x.....  models/encoder_cache.py objectives/reference_losses.py
......xxx.xx.xxxxxxx.x.....  objectives/objective.py objectives/reference_terms.py objectives/step.py
                             objectives/targets.py objectives/term.py objectives/word_losses.py
........x....xxxxxxx...xxxx  evaluate/rounding.py
....xx..x..x..xxxxx.xxx....  data/homophones.json decode/attention.py decode/calibration_fit.py decode/decoders.py
                             evaluate/calibrate.py evaluate/decoder_setup.py evaluate/nist.py evaluate/normalisers.py
                             evaluate/posteriors.py evaluate/report.py evaluate/score.py evaluate/transcribe.py
.x....xxx..x.xx...xxxxx....  settings/student.py
.............xxxxxxx...xxxx  logits/adopt.py logits/audit.py logits/found.py logits/importing.py
                             teachers/checkpoints.py teachers/hyperparams.py teachers/teacher_sets.py
.............xxxxxxxxxx....  targets/aggregation.py
..........xx.xxxxxxx.x.....  objectives/losses.py objectives/terms.py settings/distill.py
....xx........xxxxx.xxx....  evaluate/fold_scores.py
.x....xxx..x.x....xx.x.....  training/sampling.py
............xxxxxxxx.......  targets/similarity.py
..............x..x.xxxx..x.  models/averaging.py
.............xxxxxxx.......  settings/targets.py targets/choice.py targets/fusion.py
.x....xxx..x......xx.......  training/validation.py
.x....xxx..x.......x.......  training/callbacks.py training/checkpoints.py training/curves.py training/loop.py
                             training/schedules.py
..................xxxxx....  distill/faults.py
......xx..........xx.x.....  pretrained/start.py
...................xxxx....  settings/adaptation.py
..............x.....xxx....  distill/student_scores.py
......xxx..x...............  teachers/training.py
..................xx.x.....  distill/setup.py
...............xx.x........  logits/spikes.py targets/target_report.py
.......xx..x...............  teachers/adapt.py
.x....xx...................  pretrained/model.py
..................xx.......  corpus/speaking_rate.py targets/difficulty.py targets/live.py targets/pseudo_labels.py
..............x.......x....  distill/ensembles.py
........x.........x........  teachers/parent_scores.py
......xx...................  teachers/base_model.py
....xx.....................  evaluate/baseline.py
...................x.......  distill/adaptation.py distill/collapse_alarm.py distill/students.py
                             targets/word_posteriors.py teachers/recognisers.py
..................x........  distill/checks.py distill/preflight.py evaluate/measures.py
.................x.........  distill/logit_student.py
..............x............  targets/word_calibration.py
...........x...............  logits/teacher_scores.py
"""
NOTHING = ("show/", "diagnose/", "evaluate/compare.py", "evaluate/verdict.py", "evaluate/statistics.py", "__main__.py")


def expected() -> dict[str, set[str]]:
    """The stages that an edit of each file makes anew, by the table."""
    found, marks = {}, ""
    for line in TABLE.strip("\n").splitlines():
        marks = line.split()[0] if not line.startswith(" ") else marks
        files = line.split()[0 if line.startswith(" ") else 1 :]
        assert len(marks) == len(STAGES)
        found |= {name: {stage for stage, mark in zip(STAGES, marks, strict=True) if mark == "x"} for name in files}
    return found


@pytest.fixture
def fingerprints(monkeypatch):
    """The fingerprints of the stages' code, after an edit in memory."""

    def after(edited: str = "") -> dict[str, str]:
        if edited in source_code.CARRIERS:  # the pipeline itself: what it passes to builders is found again
            code_of.cache_clear()
        change = "\nEDITED = True\n" if edited.endswith(".py") else " "
        with monkeypatch.context() as patch:
            if edited:
                patch.setitem(source_code.SOURCES, edited, source_code.SOURCES[edited] + change)
            return {stage: source_code.fingerprint(code_of(stage)) for stage in STAGES}

    yield after
    code_of.cache_clear()


def test_an_edit_of_a_module_makes_anew_what_depends_on_it_and_nothing_else(fingerprints):
    """Every module and every data file is edited in turn."""
    before, table, wrong = fingerprints(), expected(), {}
    for name in source_code.SOURCES:
        after = fingerprints(name)
        anew = {stage for stage in STAGES if after[stage] != before[stage]}
        if name not in source_code.CARRIERS and not name.endswith("__init__.py") and anew != table.get(name, set()):
            wrong[name] = sorted(anew)
    assert wrong == {}


@pytest.mark.parametrize("name", [name for name in source_code.SOURCES if name.startswith(NOTHING)])
def test_showing_examining_and_comparing_make_nothing_anew(name):
    assert not any(name in code_of(stage) for stage in STAGES)


def test_a_loss_retrains_students_and_no_teacher():
    for name in ("objectives/losses.py", "objectives/terms.py", "settings/distill.py"):
        stages = {stage for stage in STAGES if name in code_of(stage)}
        assert "student" in stages
        assert not stages & {"pretraining", "trained_base_model", "speaker_teacher", "extracted_outputs"}


def test_what_chooses_checkpoints_retrains_what_it_chooses():
    """Greedy decoding validates teachers and students; the closed lexicon, which chooses nothing, only scores them."""
    greedy, lexicon = ({s for s in STAGES if f"decode/{name}.py" in code_of(s)} for name in ("greedy", "decoders"))
    assert {"speaker_teacher", "student"} <= greedy
    assert not lexicon & {"speaker_teacher", "student"}
    assert {"teacher_scores", "scores"} <= lexicon


def test_rewording_a_comment_or_a_docstring_makes_nothing_anew(monkeypatch):
    name = "models/hybrid.py"
    before = source_code.fingerprint(code_of("student"))
    text = source_code.SOURCES[name].replace('"""', '"""Reworded. ', 1) + "\n# a comment\n"
    monkeypatch.setitem(source_code.SOURCES, name, text)
    assert source_code.fingerprint(code_of("student")) == before


def test_only_the_pipeline_makes_stages():
    """Builders are given what they need; none asks for a stage, and none is given all parameters."""
    for name, source in source_code.SOURCES.items():
        if name.endswith(".py") and name != "stage.py":
            used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
            assert ("produce" in used) == (name == "fold_stage.py"), name


def test_few_functions_are_given_all_parameters():
    given = []
    for name, source in source_code.SOURCES.items():
        if name.endswith(".py") and name not in ("pipeline.py", "params.py", "recipe_checks.py"):
            for node in ast.walk(ast.parse(source)):
                arguments = [argument.arg for argument in node.args.args] if isinstance(node, ast.FunctionDef) else []
                given += [f"{name}: {node.name}"] if "params" in arguments else []
    assert len(given) <= 20, given


def test_faults_of_a_student_make_anew_nothing_that_it_shares_with_others(smoke):
    """The baseline and the teachers' scores are those of every variant; a student's own scores are not."""
    faulty = smoke.but(faults={"decode_offset": 1})
    for stage, arguments in (("pretrained_scores", ()), ("zero_shot", ()), ("teacher_scores", ("M04",))):
        plain, other = (getattr(Fold, stage).__wrapped__(fold, *arguments).settings for fold in (smoke, faulty))
        assert plain == other, stage
    assert smoke.params.student_scoring_identity != faulty.params.student_scoring_identity
