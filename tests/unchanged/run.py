"""Everything once: `run` makes each kind of artefact of `params/unchanged.yaml`."""

import shutil
from pathlib import Path

import corpora
import numpy as np
import pandas as pd

from kdlib.diagnose import causes, collapse_study, examination
from kdlib.evaluate import checkpoint, predictions
from kdlib.io import write_json
from kdlib.logits import importing
from kdlib.logits.store import Header
from kdlib.models import export
from kdlib.pipeline import Fold
from kdlib.show import examination_page, fold_comparison, format
from kdlib.tokens import Tokens

# The columns of a table that was written as it was shown.
SUMMARY = {"wra": "WRA %", "information": "information %", "distinct_texts": "different answers", "severity": "state"}
SUMMARY |= {"cause_made": "made", "causes_named": "named", "diagnosis": "what it says"}
RECIPE, HELD_OUT = "params/unchanged.yaml", "M08"
ORIGINAL = Path(__file__).parents[3] / "shared/data/original"  # the original study's files, where they are at hand


def run(out: Path) -> Path:
    """Make everything below a folder; return the recipe's own folder."""

    def of(variant: str = "", **overrides):
        return Fold.load(RECIPE, HELD_OUT, variant, overrides={"outputs": str(out)} | overrides)

    fold = of()
    fold.baseline()
    fold.zero_shot()
    for name in ("M04", "M05", "F03"):
        fold.teacher_scores(name)
    fold.target_report()
    fold.combined_teachers()
    fold.logit_student()
    for seed in (1, 2):
        for variant in ("hard", "half"):
            of(variant).scores(seed)
    cases = [of(name).examination(1) for name in fold.params.compare]
    summary, known = collapse_study.summary(cases), collapse_study.fingerprints(cases)
    collapse_study.write(fold.layout.collapse, summary, known, fold.params.name, HELD_OUT)
    shown = summary.assign(wra=(100 * summary.wra).round(1), information=(100 * summary.information).round())
    shown.rename(columns=SUMMARY).to_csv(fold.layout.collapse / "summary.csv", index=False)
    for name in fold.params.ensembles:
        fold.ensemble(name)
    of("ctc_kd_only").preflight()
    recipe = out / "unchanged.yaml"
    recipe.write_text(f"extends: {Path('params/unchanged.yaml').resolve()}\noutputs: {out}\n")
    groups = list(fold.params.ensembles)
    fold_comparison.compare_folds(str(recipe), [HELD_OUT], ["hard", "ctc_kd", "half"], [1], groups)
    scores = pd.read_csv(fold.layout.compare / "scores.csv", keep_default_na=False)
    scores["column"] = scores.speech.map({"held out": "", "dev": "dev "}) + scores.decoder
    scores["value"], scores["seed"] = scores.value.astype(float), scores.seed.map(lambda s: int(s) if s == "1" else s)
    format.fold_table(scores.replace({"remark": {"": None}}), "wra").to_csv(fold.layout.compare / "table.csv")
    shared = fold.layout.recipe
    for name in ("pieces", "int8"):  # the same corpus, tokens and model in folders of their own
        for stage in ("corpus", "pretrained", "tokens"):
            shutil.copytree(shared / stage, out / name / stage, dirs_exist_ok=True)
    of("hard", name="pieces", search={"units": "pieces"}, scoring={"measure": "wer"}).scores()
    of("ctc_kd", name="int8", aggregation={"encoding": "int8"}, teacher={"parent": "none"}).scores()
    other(out, shared / "corpus/manifest.csv", fold.layout.student(1, "hard"))
    return shared


def other(out: Path, manifest: Path, hard: Path) -> None:
    """What begins with other people's files: importers, logits, a manifest, a corpus of one's own, predictions."""
    for name in ("uaspeech_files", "torgo_files"):  # of a run that was killed
        shutil.rmtree(out / name, ignore_errors=True)
    corpora.own(out / "own", spoken=False)
    corpora.uaspeech(out / "uaspeech_files", ("M08", "M10", "CF02"), microphones=["M5", "M6"])
    corpora.torgo(out / "torgo_files")
    tiny = {"steps": 2, "d_model": 16, "layers": 1, "heads": 2, "conv_channels": 8, "batch_size": 8, "warmup_steps": 1}
    pace = {"steps": 2, "batch_size": 4, "warmup_steps": 1}
    own = {
        "corpus": "manifest",
        "manifest": str(out / "own/corpus.csv"),
        "pretrained": "from_corpus",
        "pretraining": tiny,
    }
    own |= {
        "name": "mine",
        "outputs": str(out),
        "teacher": {
            "encoder": "nemo",
            "parent": "from_corpus",
            "heads": 2,
            "ffn": 16,
            "base_training": pace,
            "adapt": pace,
        },
    }
    own |= {"student": {"batch_size": 8, "phases": [{"epochs": 1}]}, "distill": {"allow": ["target"]}}
    fold = {"dev": "Boris", "exclude": []}
    Fold.load("params/smoke.yaml", "Alma", "ctc_kd", fold=fold, overrides=own).scores()
    for name, held_out in (("uaspeech", "M08"), ("torgo", "F01")):
        settings = {"data_folder": str(out / f"{name}_files"), "outputs": str(out)}
        fold = {"dev": None, "exclude": []}
        Fold.load(f"params/{name}.yaml", held_out, fold=fold, overrides=settings).prepared_corpus()
    rng = np.random.default_rng(0)
    head, bias = rng.normal(size=(12, 40)), rng.normal(size=40)
    logits = {f"M08_B1_D{index}_M5": rng.normal(size=(20 + index, 12)) @ head + bias for index in range(30)}
    np.savez(out / "logits.npz", **logits)
    known = {
        "teacher": "M10",
        "train_speakers": ("M10",),
        "output": "ctc",
        "encoding": "dense32",
        "size": 0,
        "width": 0,
    }
    header = Header(**known, tokens="t", blank=2, bos=0, eos=1, stride_ms=40.0)
    importing.import_logits(out / "logits.npz", out / "adopted/low", header)
    importing.import_logits(out / "logits.npz", out / "adopted/dense", header, dense=True)
    checkpoint.evaluate(hard, manifest, out / "evaluated")
    export.export(hard, out / "exported/student.nemo")
    made = hard / "scores/evaluation_greedy.json"
    examination_page.main(
        [str(made), "--tokenizer", str(hard / "tokenizer.model"), "--out", str(out / "examined/hard")]
    )
    for path in sorted(ORIGINAL.glob("*.json")):
        listed = ["--tokenizer", str(ORIGINAL / "tokenizer.model"), "--out", str(out / "examined" / path.stem)]
        examination_page.main([str(path), *listed])
        rows = predictions.read(path, ids=True)
        tokens = {"tokenizer.model": Tokens.of_file(ORIGINAL / "tokenizer.model")}
        found = examination.examine(rows, tokens)
        diagnosis = causes.diagnose(causes.signs(found))
        fits = {f"{fit.cause} {fit.case}": fit.distance for fit in diagnosis.fits}
        write_json(out / "examined" / path.stem / "distances.json", fits)
