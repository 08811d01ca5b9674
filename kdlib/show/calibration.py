"""What calibration of the closed lexicon changed: scores, words, and what a confidence means. Tables and a figure."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib.decode.decoders import CLOSED, PLAIN
from kdlib.evaluate.hypotheses import read_hypotheses
from kdlib.evaluate.reliability import error_by_chance, expected_calibration_error, reliability, right_near
from kdlib.evaluate.rounding import percent
from kdlib.io import read_json
from kdlib.show.figures import WIDTH_IN, style

SPEECH = {"held out": "", "dev": "dev"}  # folder of each kind of speech in a system's scores
WHY = (
    "A baseline must be calibrated before anything is trained: an unsure CTC model prefers short words, training "
    "removes that as well, and a gain over uncalibrated scores mixes the two."
)


def has_lexicon(folder: Path) -> bool:
    """True if a system was scored in a closed lexicon: of sentences there is none."""
    return CLOSED in read_json(folder / "scores.json")["decoders"]


def side_by_side(systems: Mapping[str, Path]) -> pd.DataFrame:
    """WRA in per cent of the closed lexicon, plain and calibrated, by system and kind of speech."""
    rows = {}
    for name, speech, folder in _parts(systems):
        decoders = read_json(folder / "scores.json")["decoders"]
        if CLOSED in decoders:
            plain, calibrated = (decoders.get(column, decoders[CLOSED])["wra"] for column in (PLAIN, CLOSED))
            rows[name, speech] = {
                "utterances": decoders[CLOSED]["n"],
                "plain": percent(plain),
                "calibrated": percent(calibrated),
                "difference": f"{percent(calibrated - plain):+.1f}",
            }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(["system", "speech"])


def how_calibrated(folder: Path) -> str:
    """How a system was calibrated, in a sentence."""
    if not has_lexicon(folder):
        return "There is no closed lexicon, and nothing to calibrate: the texts are sentences."
    about = read_json(folder / "scores.json")["settings"].get(CLOSED)
    if not about:
        return (
            "The closed lexicon is not calibrated (calibration: {form: none}, or too little training speech of words)."
        )
    chosen = f"chosen on {about['chosen_on']}" if about["chosen_on"] else "not chosen: the fold has no dev speaker"
    return (
        f"Calibrated ({about['form']}) on {about['utterances']:,} utterances of {about['speakers']} training speakers; "
        f"strength {about['strength']:g} and temperature {about['temperature']:.2g}, {chosen}."
    )


def answers(folder: Path, count: int = 8) -> pd.DataFrame:
    """The words whose plain answers are farthest from the references: how often each was said and recognised."""
    table = pd.DataFrame(read_hypotheses(folder / "hypotheses.csv"))
    counts = {"said": table.reference, "recognised, plain": table[PLAIN], "recognised, calibrated": table[CLOSED]}
    words = pd.DataFrame({name: column.value_counts() for name, column in counts.items()}).fillna(0).astype(int)
    words = words.drop(index="", errors="ignore").rename_axis("word")
    far = (words["recognised, plain"] - words.said).abs()
    return words.assign(far=far).sort_values(["far", "word"], ascending=[False, True]).drop(columns="far").head(count)


def confidence_table(systems: Mapping[str, Path]) -> pd.DataFrame:
    """Expected calibration error by system, kind of speech and level, beside that of a perfectly calibrated system."""
    rows = []
    for name, speech, folder in _parts(systems):
        table = _answered(folder)
        for level, part in [("all", table), *table[table.level != ""].groupby("level")]:
            confidence, correct = part.lexicon_posterior, part[CLOSED] == part.reference
            if len(part):
                rows.append((name, speech, level, len(part), confidence.mean(), correct.mean(), *_errors(part)))
    columns = ["system", "speech", "level", "utterances", "mean confidence", "right", "ECE", "ECE by chance"]
    table = pd.DataFrame(rows, columns=columns).set_index(columns[:3])
    return table.assign(**{name: percent(table[name]) for name in columns[4:]})


def meaning_of(confidence: float, folder: Path) -> str:
    """What a confidence of a system means on its dev speech, in words; empty without dev speech."""
    if not (folder / "dev" / "hypotheses.csv").is_file():
        return ""
    table = _answered(folder / "dev")
    right, count = right_near(confidence, table.lexicon_posterior, table[CLOSED] == table.reference)
    return f"of the {count} dev words nearest to a confidence of {confidence:.2g}, {right} are right"


def reliability_figure(systems: Mapping[str, Path]) -> Figure:
    """Share of right words by confidence, in bins of equally many utterances; one panel per kind of speech."""
    parts = list(_parts(systems))
    kinds = list(dict.fromkeys(speech for _, speech, _ in parts))
    with plt.rc_context(style()):
        figure, grid = plt.subplots(1, len(kinds), figsize=(WIDTH_IN, 2.9), sharey=True, squeeze=False)
        for axes, kind in zip(grid[0], kinds, strict=True):
            axes.plot([0, 100], [0, 100], color="grey", linewidth=0.8, linestyle=":")
            for index, (name, folder) in enumerate((name, path) for name, speech, path in parts if speech == kind):
                table = _answered(folder)
                bins = reliability(table.lexicon_posterior, table[CLOSED] == table.reference)
                error = percent(expected_calibration_error(table.lexicon_posterior, table[CLOSED] == table.reference))
                spread = 100 * np.abs(np.stack([bins.accuracy - bins.low, bins.high - bins.accuracy]))
                place, height = 100 * bins.confidence, 100 * bins.accuracy
                label = f"{name} (ECE {error:.1f} %)"
                axes.errorbar(
                    place, height, spread, marker="o", markersize=3, linewidth=1, color=f"C{index}", label=label
                )
            axes.set_title(f"{kind} speech")
            axes.set_xlabel("confidence (%)")
            axes.set_xlim(-3, 103)
            axes.set_ylim(-3, 103)
            axes.legend(frameon=False, loc="lower right")
        grid[0, 0].set_ylabel("right words (%)")
    return figure


def _parts(systems: Mapping[str, Path]):
    """Every system's scores on each kind of speech."""
    for name, folder in systems.items():
        for speech, part in SPEECH.items():
            if (folder / part / "scores.json").is_file():
                yield name, speech, folder / part


def _answered(folder: Path) -> pd.DataFrame:
    return pd.DataFrame(read_hypotheses(folder / "hypotheses.csv"))


def _errors(part: pd.DataFrame) -> tuple[float, float]:
    confidence = part.lexicon_posterior
    return expected_calibration_error(confidence, part[CLOSED] == part.reference), error_by_chance(confidence)
