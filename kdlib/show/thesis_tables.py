"""The tidy tables of a study: of a recipe's folders, or of other people's result files. No model is loaded."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.decode.decoders import CLOSED
from kdlib.diagnose import causes
from kdlib.errors import UserError
from kdlib.evaluate import compare
from kdlib.evaluate.hypotheses import read_hypotheses
from kdlib.evaluate.reliability import expected_calibration_error, reliability
from kdlib.evaluate.score import score, tidy
from kdlib.evaluate.tables import by_speaker
from kdlib.evaluate.verdict import verdict_frame
from kdlib.io import read_json, repository_root, short_path
from kdlib.logits import teacher_scores
from kdlib.params import fold_names, load_recipe
from kdlib.pipeline import Fold
from kdlib.settings.evaluation import Scoring
from kdlib.show import comparison
from kdlib.targets import target_report
from kdlib.training.curves import TENSORBOARD, read_curves

PRETRAINED = "pretrained"
TEACHER_DECODERS = ("greedy", "lexicon")
BEAM = ("lm_weight", "word_bonus", "size")
SCORES = ("held_out", "system", "seed", "decoder", "measure", "value", "low", "high", "n")
# What each step gives: the system and its decoder, and those it is compared with, where both were scored in every fold.
GAINS = {
    "calibration": ("hard", "lexicon", "hard", "lexicon_plain"),
    "objective": ("hard_words", "lexicon", "hard", "lexicon"),
    "objective, annealed": ("hard_words_annealed", "lexicon", "hard", "lexicon"),
    "inner head": ("shared_head", "lexicon", "hard", "lexicon"),
    "masks": ("masks", "lexicon", "hard", "lexicon"),
    "masks and tempo": ("matched_tempo", "lexicon", "masks", "lexicon"),
    "masks, two views": ("consistency", "lexicon", "masks", "lexicon"),
    "masks, mean teacher": ("mean_teacher", "lexicon", "masks", "lexicon"),
    "averaged outputs": ("hard_outputs", "lexicon", "hard", "lexicon"),
    "averaged weights": ("hard_weights", "lexicon", "hard", "lexicon"),
    "teacher, frames": ("ctc_kd", "lexicon", "hard", "lexicon"),
    "teacher, better view": ("better_view", "lexicon", "hard", "lexicon"),
    "teacher, words": ("words_added", "lexicon", "hard_words", "lexicon"),
    "untranscribed speech, words": ("adapted_words", "lexicon", "adapted_control", "lexicon"),
    "untranscribed speech, 1-best": ("adapted_one_best", "lexicon", "adapted_control", "lexicon"),
    "scored speech, prior": ("hard_words", "lexicon_transductive", "hard_words", "lexicon"),
    "scored speech, entropy": ("test_time", "lexicon", "hard_words", "lexicon"),
}


@dataclass(frozen=True)
class Results:
    """A study's results as tidy tables, shares unrounded; a table without rows has no results."""

    name: str
    order: str  # of its speakers
    scores: pd.DataFrame  # SCORES
    verdicts: pd.DataFrame  # of systems against their controls: `verdict_frame`, and decoder
    speakers: pd.DataFrame = field(default_factory=pd.DataFrame)  # of the pretrained model: `by_speaker`
    teachers: pd.DataFrame = field(default_factory=pd.DataFrame)  # teacher, speaker, decoder, value
    targets: pd.DataFrame = field(default_factory=pd.DataFrame)  # of the first fold: `target_report.report_frame`
    curves: pd.DataFrame = field(default_factory=pd.DataFrame)  # held_out, system, seed, step, value: dev WRA
    confidence: pd.DataFrame = field(default_factory=pd.DataFrame)  # of `reliability`, with system and ece
    cells: pd.DataFrame = field(default_factory=pd.DataFrame)  # of ablations
    effects: pd.DataFrame = field(default_factory=pd.DataFrame)
    more: Mapping[str, pd.DataFrame] = field(default_factory=dict)  # tables that notebooks left: `_of_notebooks`
    gains: pd.DataFrame = field(default_factory=pd.DataFrame)  # of GAINS: `verdict_frame`, and decoder
    hours: Mapping[str, float] = field(default_factory=dict)  # of training, by system, the mean of a run
    runs: Sequence[dict] = ()  # folder, system, seed, held_out, revision, key

    left_out: Sequence[str] = ()  # systems that were not scored in every fold
    measure: str = "wra"  # of the figures and tables; WER for sentences

    @property
    def measured(self) -> str:
        """The measure in words."""
        return {"wra": "word recognition accuracy", "wer": "word error rate"}[self.measure]

    @property
    def systems(self) -> list[str]:
        """The names of the systems, in the order of the tables."""
        return list(dict.fromkeys(self.scores.system))


def of_recipe(recipe: str | Path, held_out: Sequence[str] = ()) -> Results:
    """All that a recipe's folders hold of these folds, by default of every fold that has scores."""
    params = load_recipe(recipe)
    names = held_out or fold_names(params.fold_set)
    folds = [fold for fold in (Fold.load(recipe, name) for name in names) if _folders(fold)]
    if not folds:
        where = short_path(Fold.load(recipe, names[0]).layout.recipe)
        raise UserError(f"{recipe}: there are no scores in {where}; run it first: make folds RECIPE={recipe}")
    folders, left_out = _complete({fold.params.held_out: _folders(fold) for fold in folds})
    scores = pd.concat([_scores(name, found) for name, found in folders.items()], ignore_index=True)
    first = folds[0]
    zero_shot = first.layout.zero_shot
    out = first.layout.recipe / "ablations"
    return Results(
        params.name,
        first.corpus.speaker_order,
        scores,
        _verdicts(first, list(folders.values())),
        by_speaker(zero_shot, first.corpus) if (zero_shot / "scores.json").is_file() else pd.DataFrame(),
        _teachers(first),
        target_report.report_frame(first.layout.target_report),
        _curves(folders, params.scoring.measure),
        _confidence(list(folders.values())),
        *(_read(out / name) for name in ("cells.csv", "effects.csv")),
        _of_notebooks(folds),
        _gains(list(folders.values()), params.scoring),
        _hours(folders),
        _runs(folders),
        left_out,
        params.scoring.measure,
    )


def of_files(systems: Mapping[str, Sequence[Path]], decoder: str = "greedy") -> Results:
    """Other people's result files: each system's, of one or more speakers or seeds; the first is the control."""
    if len(systems) < 2:
        raise UserError(f'figures: expected at least two systems (SYSTEMS="a=... b=..."), found {len(systems)}')
    tables = {name: compare.collect(paths, decoder) for name, paths in systems.items()}
    rows = []
    for name, table in tables.items():
        for (speaker, seed), part in table.groupby(["speaker", "seed"]):
            found = score(part.reference.tolist(), part.hypothesis.tolist())
            about = {"system": name, "held_out": str(speaker), "decoders": {decoder: asdict(found)}}
            rows += tidy(about, name, int(seed) + 1)
    control = next(iter(systems))
    verdicts = compare.compare(tables, against={name: control for name in systems if name != control})
    frame = verdict_frame(verdicts).assign(decoder=decoder)
    runs = [{"folder": str(path), "system": name} for name, paths in systems.items() for path in paths]
    return Results("files", "by name", pd.DataFrame(rows)[list(SCORES)], frame, runs=runs)


def _folders(fold: Fold) -> dict[tuple[str, int | str], Path]:
    """(system, seed) -> folder of scores, of all that were scored in a fold."""
    layout, found = fold.layout, {}
    if (layout.baseline / "scores.json").is_file():
        found[PRETRAINED, ""] = layout.baseline
    for path in sorted((layout.fold / "students").glob("*/seed*/scores/scores.json")):
        seed = path.parents[1].name.removeprefix("seed")
        if seed.isdigit():
            found[path.parents[2].name, int(seed)] = path.parent
    for path in sorted((layout.fold / "ensembles").glob("*/scores.json")):
        found[path.parent.name, "ensemble"] = path.parent
    return found


def _complete(folders: dict[str, dict]) -> tuple[dict[str, dict], list[str]]:
    """The systems that every fold has, and the names of the others: their means would be of other speakers."""
    names = [{system for system, _ in found} for found in folders.values()]
    kept, known = set.intersection(*names), set.union(*names)
    return {
        held_out: {key: path for key, path in found.items() if key[0] in kept} for held_out, found in folders.items()
    }, sorted(known - kept)


def _scores(held_out: str, folders: Mapping[tuple, Path]) -> pd.DataFrame:
    rows = []
    for (system, seed), folder in folders.items():
        for row in tidy(read_json(folder / "scores.json")):
            rows.append(row | {"system": system, "seed": seed, "held_out": held_out})
    return pd.DataFrame(rows)[list(SCORES)]


def _verdicts(first: Fold, folders: Sequence[Mapping[tuple, Path]]) -> pd.DataFrame:
    """Every student against its control, on the seeds that both have in every fold; Holm's correction by decoder."""
    names, params = {system for system, _ in folders[0]} - {PRETRAINED}, first.params
    pairs, folded = {}, {"normaliser": params.scoring.normaliser}
    for name in sorted(names):
        if all(part in params.variants for part in name.split("+")):
            control = first.of(name).params.distill.control
            pairs[name] = control if control != name else PRETRAINED
    frames = []
    for decoder in comparison.DECODERS:
        tables, against = {}, {}
        for a, b in pairs.items():
            for_a = f"{b}, for {a}"
            both = [_shared(found, a, b, decoder) for found in folders]
            if all(both):
                tables[a] = compare.collect([path for found in both for path, _ in found], decoder, **folded)
                controls = dict.fromkeys(path for found in both for _, path in found)  # pretrained: one for all seeds
                tables[for_a], against[a] = compare.collect(list(controls), decoder, **folded), for_a
        if against:
            found = compare.compare(tables, against=against, measure=params.scoring.measure, unit=params.scoring.unit)
            frames.append(verdict_frame([replace(one, b=pairs[one.a]) for one in found]).assign(decoder=decoder))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _shared(found: Mapping[tuple, Path], a: str, b: str, decoder: str) -> list[tuple[Path, Path]]:
    """The scores of two systems in a fold, by the seeds that both have."""
    pairs = []
    for (system, seed), path in found.items():
        other = found.get((b, "" if b == PRETRAINED else seed))
        if system == a and other and all((one / f"evaluation_{decoder}.json").is_file() for one in (path, other)):
            pairs.append((path, other))
    return pairs


def _read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path) if path.is_file() else pd.DataFrame()


def _of_notebooks(folds: Sequence[Fold]) -> dict[str, pd.DataFrame]:
    """Tables that notebooks left; of a fold, those of the first that has them."""
    layout = folds[0].layout
    found = {
        "durations": _read(layout.shared_figures / "speakers.csv"),
        "by_speaker": _read(layout.recipe / "ablations" / "by_speaker.csv"),
    }
    for fold in folds:
        tuning, collapse = fold.layout.baseline / "beam_tuning.csv", fold.layout.collapse
        if tuning.is_file() and "sweep" not in found:
            chosen = read_json(fold.layout.baseline / "scores.json")["settings"]["beam"]
            table = pd.read_csv(tuning).assign(dev=fold.params.fold.dev, held_out=fold.params.held_out)
            is_chosen = [
                all(row[name] == chosen[name] for name in BEAM) for row in table[list(BEAM)].to_dict("records")
            ]
            found["sweep"] = table.assign(chosen=is_chosen)
        if (collapse / "factorial.csv").is_file() and "factorial" not in found:
            found["factorial"] = pd.read_csv(collapse / "factorial.csv")
        if (collapse / "fingerprints.json").is_file() and "fingerprints" not in found:
            known = causes.read(collapse / "fingerprints.json")
            found["fingerprints"] = causes.frame(known).reset_index()
            found["confusion"] = causes.confusion(known).rename_axis("cause").reset_index()
    return {name: table for name, table in found.items() if len(table)}


def _teachers(fold: Fold) -> pd.DataFrame:
    """Accuracy of the fold's kind of teachers on all speakers, by decoder."""
    measure = fold.params.scoring.measure
    folders = sorted((fold.layout.teachers / "teachers" / fold.layout.family).glob("*/scores/scores.json"))
    found = {path.parents[1].name: path.parent for path in folders}
    frames = []
    for decoder in TEACHER_DECODERS if found else ():
        table = teacher_scores.accuracy_matrix(fold.corpus, found, decoder, measure).rename_axis("teacher")
        long = table.reset_index().melt("teacher", var_name="speaker", value_name="value")
        frames.append(long.assign(decoder=decoder))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _curves(folders: Mapping[str, Mapping[tuple, Path]], measure: str) -> pd.DataFrame:
    """The dev curves of all students, as WRA or 1 - WER."""
    frames = []
    for held_out, found in folders.items():
        for (system, seed), folder in found.items():
            if isinstance(seed, int) and (folder.parent / TENSORBOARD).is_dir():
                curves = read_curves(folder.parent / TENSORBOARD)
                dev = curves[curves.name == f"dev_{measure}"]
                frames.append(
                    dev[["step"]].assign(
                        value=1 - dev.value if measure == "wer" else dev.value,
                        held_out=held_out,
                        system=system,
                        seed=seed,
                    )
                )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _confidence(folders: Sequence[Mapping[tuple, Path]]) -> pd.DataFrame:
    """Reliability of the closed lexicon's posteriors, pooled over folds and seeds."""
    pooled: dict[str, list[pd.DataFrame]] = {}
    for (system, _), folder in itertools.chain.from_iterable(found.items() for found in folders):
        table = pd.DataFrame(read_hypotheses(folder / "hypotheses.csv"))
        if CLOSED in read_json(folder / "scores.json")["decoders"]:
            pooled.setdefault(system, []).append(table)
    frames = []
    for system, tables in pooled.items():
        table = pd.concat(tables)
        right = table[CLOSED] == table.reference
        error = expected_calibration_error(table.lexicon_posterior, right)
        frames.append(reliability(table.lexicon_posterior, right).assign(system=system, ece=error))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def _gains(folders: Sequence[Mapping[tuple, Path]], scoring: Scoring) -> pd.DataFrame:
    """The verdict on every step of GAINS that was scored in all folds."""
    tables, against = {}, {}
    for step, (system, decoder, other, its_decoder) in GAINS.items():
        sides = [_scored(folders, name, column) for name, column in ((system, decoder), (other, its_decoder))]
        if all(sides):
            shown = decoder != its_decoder
            a = f"{step}: {system}" + f" ({decoder})" * shown
            b = other + f" ({its_decoder})" * shown + f", for {step}"
            tables[a] = compare.collect(sides[0], decoder, normaliser=scoring.normaliser)
            tables[b] = compare.collect(sides[1], its_decoder, normaliser=scoring.normaliser)
            against[a] = b
    if not against:
        return pd.DataFrame()
    found = compare.compare(tables, against=against, measure=scoring.measure, unit=scoring.unit)
    return verdict_frame([replace(one, b=one.b.rpartition(", for ")[0]) for one in found]).assign(decoder="lexicon")


def _scored(folders: Sequence[Mapping[tuple, Path]], system: str, decoder: str) -> list[Path]:
    """The folders of a system's scores, if every fold has one with this decoder."""
    found = []
    for fold in folders:
        paths = [path for (name, _), path in fold.items() if name == system]
        paths = [path for path in paths if decoder in read_json(path / "scores.json")["decoders"]]
        if not paths:
            return []
        found += paths
    return found


def _hours(folders: Mapping[str, Mapping[tuple, Path]]) -> dict[str, float]:
    """The mean hours of a training, by system."""
    times: dict[str, list[float]] = {}
    for found in folders.values():
        for (system, seed), folder in found.items():
            record = folder.parent / "run.json"
            if isinstance(seed, int) and record.is_file():
                times.setdefault(system, []).append(read_json(record).get("wall_s", np.nan) / 3600)
    return {system: float(np.mean(values)) for system, values in times.items()}


def _runs(folders: Mapping[str, Mapping[tuple, Path]]) -> list[dict]:
    """What the results are of: the record of every scored system."""
    rows = []
    for held_out, found in folders.items():
        for (system, seed), folder in found.items():
            record = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
            about = {"folder": short_path(folder), "system": system, "seed": seed, "held_out": held_out}
            rows.append(about | {name: record.get(name, "") for name in ("revision", "key")})
    return rows


def folder(recipe: str | Path, of_files: bool) -> Path:
    """Where the export of a recipe is written, or that of files."""
    params = load_recipe(recipe)
    root = repository_root() / params.outputs
    return root / "figures" if of_files else root / params.name / "figures" / "thesis"
