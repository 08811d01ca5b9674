"""Which of the known causes fits a failure, how well, on what evidence, and what would have caught it before training.

The known causes were each made on purpose (`params/ablations/collapse.yaml`) and examined; the signs of those
examinations are the fingerprints (`data/fingerprints.json`). An unknown result is compared with each fingerprint in
the signs that it has; a cause is named only where it fits, and clearly better than what is sound. Else the answer is
that one cannot tell.

`python -m kdlib.evaluate.diagnose FILE` examines any predictions, prints the verdict first, and writes a page.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.errors import UserError
from kdlib.evaluate import answers, collapse
from kdlib.evaluate.collapse import Examination
from kdlib.params import root
from kdlib.stage import write_json
from kdlib.tokens import Tokens

SOUND = "none"
CAUSES = {  # key -> what it is, and the preflight's check that catches it
    "a": ("teachers spoke of other recordings (their own speakers'), averaged frame by frame", "recording"),
    "b": ("no ground truth in the loss", "gradients"),
    "c": ("the best look was chosen by KL and not by words", "choice"),
    "d": ("the teachers' token ids are shifted against the student's", "shift of ctc targets"),
    "e": ("no frame on which the teachers say blank is taught", "blanks"),
    "f": ("the mean of teachers whose spikes lie apart in time", "target"),
    "g": ("the decoder knows the words that it was trained on, and no others", "unseen words"),
    "h": ("evaluation makes another text of the token ids than they mean", "decoding"),
    "i": ("answers are decoded through a head that was not trained", "heads"),
    "j": ("targets belong to other utterances", "pairs"),
    SOUND: ("nothing is wrong but what is hard", ""),
}
NOISE = 0.08  # a sign is never surer than this
FITS = 2.0  # root mean square of the signs' distances, in their spreads, up to which a fingerprint fits
CLEARER = 0.8  # times the distance of the next, or of what is sound
SIGNS = {  # sign -> how it is said
    "misread": "decoding the ids in another way recognises words",
    "wra": "words recognised",
    "empty": "empty answers",
    "commonest": "the commonest answer",
    "distinct": "different answers, beside the references'",
    "hears": "shared with what was said",
    "consistent": "the same answer for the same word",
    "alike": "letters in common with the reference",
    "loops": "answers that repeat themselves",
    "long": "longer than the references",
    "cut_short": "wrong answers that are the beginning of their reference",
    "run_on": "wrong answers that go on behind their reference",
    "words": "words of the answers that are in the vocabulary",
    "unseen": "words of training recognised better than other words",
    "right_tokens": "tokens right in their place",
    "off_by_one": "tokens whose id is one off",
    "displaced": "tokens one place off",
    "strange": "tokens that no reference has",
    "histogram": "tokens used otherwise than in the references",
    "blank": "blank frames",
    "unsure": "bits of doubt a frame",
    "lost": "words right in training that the scored answers lack",
    "passed_over": "words right at a better look than the one that was kept",
}


@dataclass(frozen=True)
class Fingerprint:
    """The signs of one produced case."""

    cause: str  # one of CAUSES; of several, joined: "ad"
    case: str  # the variant that made it
    seed: int
    signs: dict[str, float | None]


@dataclass(frozen=True)
class Fit:
    """How well a cause fits."""

    cause: str
    case: str  # the fingerprint nearest to the result
    distance: float  # in spreads of the signs; about 1 between two seeds of one case
    evidence: str

    @property
    def fits(self) -> bool:
        """Whether it is near enough to be the cause."""
        return self.distance <= FITS


@dataclass(frozen=True)
class Diagnosis:
    """The causes that were named, and how all of them fit."""

    named: tuple[str, ...]  # none: nothing is shown to be wrong, or one cannot tell
    text: str
    fits: list[Fit]


def signs(found: Examination, curves: pd.DataFrame | None = None, dev_wra: float = math.nan) -> dict[str, float]:
    """What a fingerprint is made of: figures of an examination between 0 and 1 (or -1 and 1), however large the task.

    `curves` are those of the training (step, name, value), `dev_wra` what the kept weights' texts score on dev speech.
    """
    one, cure = found.figures, found.cure
    gain = cure.wra - one["wra"] if cure else 0.0
    made = {
        "misread": min(1.0, gain / 0.1),
        "wra": one["wra"],
        "empty": one["empty"],
        "commonest": one["commonest"],
        "distinct": min(1.0, one["spread"] / one["spread_of_references"]),
        "hears": one["hears"],
        "consistent": _above(one["consistency"], one["consistency_by_chance"]),
        "alike": _above(one["likeness"], one["likeness_by_chance"]),
        "loops": max(one["loops"], one.get("token_loops", 0.0)),
        "long": float(np.clip(math.log2(max(0.125, one["words_per_reference"])) / 3, -1, 1)),
        "cut_short": one["cut_short"],
        "run_on": one["run_on"],
        "words": one["vocabulary_words"],
        "unseen": one["wra_seen"] - one["wra_unseen"],
    }
    if "tokens_right" in one:
        made |= {
            "long": float(np.clip(math.log2(max(0.125, one["tokens_per_reference"])) / 3, -1, 1)),
            "right_tokens": one["tokens_right"],
            "off_by_one": one["tokens_off_by_one"],
            "displaced": one["tokens_displaced"],
            "strange": one["strange_tokens"],
            "histogram": one["histogram"],
        }
    if "blank_frames" in one:
        made |= {"blank": one["blank_frames"], "unsure": min(1.0, one["entropy_bits"] / 4)}
    if curves is not None and len(looks := curves[curves.name == "dev_wra"]):
        scores = curves[curves.name == "dev_score"].set_index("step").value
        kept = looks.set_index("step").value.get(scores.idxmax(), math.nan) if len(scores) else math.nan
        made |= {"lost": max(0.0, kept - dev_wra), "passed_over": max(0.0, looks.value.max() - kept)}
    return {name: value for name, value in made.items() if not math.isnan(value)}


def diagnose(result: Mapping[str, float], known: Sequence[Fingerprint] | None = None) -> Diagnosis:
    """Which causes fit the signs of a result."""
    known = shipped() if known is None else list(known)
    if not known:
        return Diagnosis((), "There are no fingerprints to compare with; make them: make collapse", [])
    table = frame(known)
    middles = table.groupby(level=[0, 1]).mean()
    rest = table - middles.loc[table.index]
    spread = np.sqrt((rest**2).sum() / max(1, len(table) - len(middles))).clip(lower=NOISE)
    value = pd.Series(result, dtype=float).reindex(table.columns)
    apart = (middles - value) / spread
    distance = np.sqrt((apart**2).mean(axis=1)).fillna(np.inf)  # of what has none of the signs
    sound = [place for place in middles.index if place[0] == SOUND]
    ordinary = middles.loc[sound].mean() if sound else middles.mean()
    fits = []
    for cause in dict.fromkeys(one.cause for one in known):
        place = distance[[place for place in middles.index if place[0] == cause]].idxmin()
        told = _evidence(value, middles.loc[place], ordinary, spread) if cause != SOUND else ""
        fits.append(Fit(cause, place[1], float(distance[place]), told))
    fits.sort(key=lambda one: one.distance)
    return _named(fits, result)


def frame(known: Sequence[Fingerprint]) -> pd.DataFrame:
    """Signs as columns, one row a fingerprint, by cause and case."""
    places = pd.MultiIndex.from_tuples([(one.cause, one.case) for one in known], names=["cause", "case"])
    return pd.DataFrame([one.signs for one in known], index=places, dtype=float)


def table(found: Diagnosis, least: int = 4) -> pd.DataFrame:
    """How the causes fit, the best first."""
    return pd.DataFrame(
        [
            {
                "cause": one.cause,
                "what it is": CAUSES[one.cause][0],
                "distance": round(one.distance, 2),
                "fits": "yes" if one.fits else "no",
                "like": one.case,
                "evidence": one.evidence,
                "preflight's check": CAUSES[one.cause][1],
            }
            for one in found.fits[:least]
        ]
    ).set_index("cause")


def confusion(known: Sequence[Fingerprint], others: Sequence[Fingerprint] = ()) -> pd.DataFrame:
    """True cause by named cause: every case told from those of other seeds; `others` (mixtures) from all of `known`."""
    rows = []
    for one in [*known, *others]:
        rest = [other for other in known if other.seed != one.seed] if one in known else list(known)
        named = diagnose(one.signs, rest).named
        for name in named or ["-"]:
            rows.append({"true": one.cause, "named": name, "count": 1 / max(1, len(named))})
    order = [*CAUSES, "-"]
    wide = pd.DataFrame(rows).pivot_table(index="true", columns="named", values="count", aggfunc="sum", fill_value=0.0)
    return wide.reindex(
        index=sorted(
            wide.index,
            key=lambda name: (len(name) > 1 and name != SOUND, order.index(name[0]) if name != SOUND else 98),
        ),
        columns=[name for name in order if name in wide.columns],
    )


@functools.cache
def shipped() -> list[Fingerprint]:
    """The fingerprints that kdlib comes with."""
    path = files("kdlib").joinpath("data/fingerprints.json")
    if not path.is_file():
        return []
    return [Fingerprint(**one) for one in json.loads(path.read_text(encoding="utf-8"))["fingerprints"]]


def save(known: Sequence[Fingerprint], path: Path, **about: object) -> None:
    """Write fingerprints, and how they were made."""
    rows = [asdict(one) | {"signs": {name: round(value, 4) for name, value in one.signs.items()}} for one in known]
    write_json(path, about | {"fingerprints": rows})


def at_hand(named: Sequence[Path], near: Path) -> dict[str, Tokens]:
    """Tokenizers to decode with: those named first, those beside the file, and those of this repository's recipes."""
    found: dict[str, Tokens] = {}
    folder = near if near.is_dir() else near.parent
    others = [*sorted(folder.glob("*.model")), *sorted((root() / "outputs").glob("*/tokens/tokenizer.model"))]
    for path in [*named, *others]:
        if not path.is_file():
            raise UserError(f"{path}: there is no such file; TOKENIZER names sentencepiece models, separated by commas")
        try:
            one = Tokens.for_teachers(path)
        except (RuntimeError, OSError):
            if path in named:
                raise UserError(f"{path}: this is no sentencepiece model") from None
            continue
        if one.model not in [other.model for other in found.values()]:
            found[_called(path, found)] = one
    return found


def page(found: Examination, told: Diagnosis, source: str) -> str:
    """The examination as text, the verdict first."""
    one = found.figures
    per_cent = {name: f"{100 * one[name]:.1f} %" for name in one}
    lines = [
        f"{source}: {int(one['n'])} answers",
        "",
        found.verdict,
        told.text,
        "",
        f"WRA {per_cent['wra']}, WER {per_cent['wer']} (S {int(one['substitutions'])}, D {int(one['deletions'])}, "
        f"I {int(one['insertions'])}), CER {per_cent['cer']}; {one['words_per_reference']:.1f} words a reference word",
        f"{int(one['distinct_texts'])} different texts"
        + (f", {int(one['distinct_tokens'])} different token sequences" if "distinct_tokens" in one else "")
        + f" for {int(one['references'])} different references; as spread as {one['spread']:.0f} equally common ones",
        f"empty {per_cent['empty']}, repeating themselves {100 * max(one['loops'], one.get('token_loops', 0)):.1f} %; "
        f"of the words {per_cent['vocabulary_words']} are in the vocabulary",
        f"one word, one answer: {per_cent['consistency']} of the pairs (any two answers: "
        f"{per_cent['consistency_by_chance']}); answers hold {one['bits']:.2f} of {one['bits_of']:.2f} bits "
        f"({one['bits_by_chance']:.2f} by chance)",
    ]
    if "tokens_right" in one:
        lines.append(
            f"tokens: right in their place {per_cent['tokens_right']}, id one off {per_cent['tokens_off_by_one']}, "
            f"one place off {per_cent['tokens_displaced']}, in no reference {per_cent['strange_tokens']}"
        )
    if "blank_frames" in one:
        lines.append(f"frames: blank {per_cent['blank_frames']}, {one['entropy_bits']:.2f} bits of doubt each")
    lines += ["", "The commonest answers:", found.commonest.head(8).to_string(index=False)]
    if found.readings:
        rows = [
            {
                "read with": str(way),
                "WRA %": round(100 * way.wra, 1),
                "as in the file %": round(100 * way.as_written, 1),
            }
            for way in found.readings
        ]
        rows = rows[:5] + [row for row in rows[5:] if row["as in the file %"] > 50]
        lines += ["", "The same token ids, decoded in other ways:", pd.DataFrame(rows).to_string(index=False)]
    if told.fits:
        shown = table(told)[["what it is", "distance", "fits", "preflight's check"]]
        lines += ["", "Causes by how near their fingerprints are (up to 2 fits):", shown.to_string()]
    return "\n".join(lines)


def _named(fits: list[Fit], result: Mapping[str, float]) -> Diagnosis:
    """Name what fits, and clearly better than what is sound; or say that one cannot tell."""
    sound = min((one.distance for one in fits if one.cause == SOUND), default=math.inf)
    best = fits[0]
    if sound <= 1 or (best.cause == SOUND and best.fits):  # as near as another seed of what is sound
        return Diagnosis((), "No cause is shown: this looks like a sound system, however well it recognises.", fits)
    near = [
        one for one in fits if one.cause != SOUND and one.distance <= max(best.distance / CLEARER, best.distance + 0.1)
    ]
    near = [one for one in near if one.fits and one.distance < CLEARER * sound]
    if not near:
        return Diagnosis(
            (),
            f"Cannot tell the cause: nearest is {best.cause} ({CAUSES[best.cause][0]}), at a distance of "
            f"{best.distance:.1f} where up to {FITS:g} would fit"
            + (" and it is no nearer than what is sound." if best.fits else "."),
            fits,
        )
    first = near[0]
    text = (
        f"Cause ({first.cause}): {CAUSES[first.cause][0]}; distance {first.distance:.1f}. Evidence: {first.evidence}."
    )
    if len(near) > 1:
        text += " Nearly as near: " + "; ".join(f"({one.cause}) {CAUSES[one.cause][0]}" for one in near[1:]) + "."
    return Diagnosis(
        tuple(one.cause for one in near), f"{text} The preflight's check for it: {CAUSES[first.cause][1]!r}.", fits
    )


def _evidence(value: pd.Series, like: pd.Series, ordinary: pd.Series, spread: pd.Series) -> str:
    """The signs that speak most for a fingerprint and against a sound system."""
    gain = (((value - ordinary) / spread) ** 2 - ((value - like) / spread) ** 2).dropna()
    best = [name for name in gain.sort_values(ascending=False).index if gain[name] > 1][:3]
    return "; ".join(
        f"{SIGNS[name]} {value[name]:.2f} (there {like[name]:.2f}, sound {ordinary[name]:.2f})" for name in best
    )


def _above(value: float, chance: float) -> float:
    return (value - chance) / max(1e-9, 1 - chance)


def _called(path: Path, taken: Mapping[str, Tokens]) -> str:
    name = path.name if path.name not in taken else f"{path.parent.parent.name}/{path.name}"
    return name if name not in taken else str(path)


def main(arguments: Sequence[str]) -> None:
    """The command: examine a file of predictions."""
    parser = argparse.ArgumentParser(prog="python -m kdlib.evaluate.diagnose", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help=answers.KINDS)
    parser.add_argument(
        "--tokenizer", default="", help="sentencepiece models, separated by commas; the system's own first"
    )
    parser.add_argument("--decoder", default="greedy", help="of a folder of kdlib's: which decoder's answers")
    parser.add_argument("--references", type=Path, help="of a text file of hypotheses: the references")
    parser.add_argument("--out", type=Path, help="folder of the page; by default outputs/examined/<file>")
    given = parser.parse_args(arguments)
    found_at = given.file.expanduser()
    rows = answers.read(found_at, given.decoder, given.references, ids=True)
    named = [Path(one).expanduser() for one in given.tokenizer.split(",") if one]
    has_ids = rows.token_ids.notna().all()
    folder = found_at if found_at.is_dir() else found_at.parent
    found = collapse.examine(
        rows, at_hand(named, found_at) if has_ids else {}, posteriors=folder / "posteriors" / "ctc.npz"
    )
    told = diagnose(signs(found))
    text = page(found, told, given.file.name)
    print(text)
    if not has_ids:
        print("\nThere are no token ids in it, so that no other decoding could be tried.")
    from kdlib.show import anatomy, figures

    name = found_at.name if found_at.is_dir() else found_at.stem
    out = given.out or root() / "outputs" / "examined" / name
    out.mkdir(parents=True, exist_ok=True)
    (out / "page.txt").write_text(text + "\n", encoding="utf-8")
    found.texts.to_csv(out / "answers.csv", index=False)
    write_json(
        out / "examination.json",
        {
            "severity": found.severity,
            "verdict": found.verdict,
            "figures": found.figures,
            "causes": list(told.named),
            "diagnosis": told.text,
        },
    )
    figures.save(anatomy.examination(found, told), out, "examination")
    print(f"\nWritten: {out}/page.txt, answers.csv, examination.json, examination.png and .pdf")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"\n{error}\n")
