"""A teacher against its parent, on speech that neither was trained on.

That is the part of the speaker's training blocks that is set aside for early stopping (`teacher.dev_share`); the parent
is the base model, or the pretrained model where there is none. A base model `from_corpus` sets the same utterances
aside, but knows the speakers. A model that was pretrained `from_corpus` was trained on this speech, which flatters it.
The teacher's checkpoint was chosen on it, which flatters the teacher.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from kdlib.console import warn
from kdlib.corpus.utterances import Utterance
from kdlib.decode.lexicon import Words
from kdlib.evaluate.decoder_setup import DecoderSetup
from kdlib.evaluate.hypotheses import Hypothesis, read_hypotheses
from kdlib.evaluate.normalisers import NORMALISERS
from kdlib.evaluate.report import score_system
from kdlib.evaluate.rounding import percent
from kdlib.evaluate.score import About, interval
from kdlib.evaluate.transcribe import Evaluation, System, recordings
from kdlib.settings.evaluation import BeamSearchSettings, Scoring

FILE = "gains.csv"  # next to the scores of both
SYSTEMS = ("parent", "teacher")
DECODERS = {"greedy": "greedy", "lexicon": "closed lexicon"}
NOTHING = "no teacher is compared with its parent: there is no parent, or no speech was set aside (teacher.dev_share)"
FLATTERED = {
    "speech": "The parent was pretrained on this speech too (pretrained: from_corpus), which flatters it: the gains "
    "look smaller than they are",
    "speaker": "The parent was trained on other recordings of these speakers (teacher.parent: from_corpus): the gains "
    "are over a model that knows them",
}


@dataclass(frozen=True)
class SetAside:
    """The speech that a teacher and its parent are compared on, and how it is decoded."""

    teacher: str
    utterances: Sequence[Utterance]
    parent_trained_on: Literal["", "speaker", "speech"]  # what the parent was trained on of it
    lexicon: Words
    search: BeamSearchSettings
    scoring: Scoring


@dataclass(frozen=True)
class Gain:
    """What a teacher gains over its parent; shares of utterances, or of words with `measure: wer`, that are right."""

    teacher: str
    decoder: str
    measure: str
    n: int
    parent_right: float
    teacher_right: float
    gain: float
    low: float  # 95 %, by resampling utterances
    high: float
    parent_trained_on: str


def score_pair(partial: Path, systems: Mapping[str, System], speech: SetAside) -> None:
    """Score a teacher and its parent by greedy decoding and in the closed lexicon; warn where the teacher lost."""
    gains = []
    if speech.utterances:
        for name in SYSTEMS:
            decoders = DecoderSetup(systems[name].tokens, speech.lexicon, None, speech.search).decoders()
            how = Evaluation(decoders, f"{name} on speech set aside from {speech.teacher}", speech.scoring)
            about = About(f"{name} of {speech.teacher}" if name == "parent" else f"teacher {speech.teacher}")
            score_system(recordings(systems[name]), speech.utterances, partial / name, how, about)
        rows = [read_hypotheses(partial / name / "hypotheses.csv") for name in SYSTEMS]
        gains = [_gain(*rows, decoder, speech) for decoder in DECODERS if decoder in decoders.columns]
    frame = pd.DataFrame(map(asdict, gains), columns=list(Gain.__dataclass_fields__))
    frame.to_csv(partial / FILE, index=False)
    for gain in gains:
        if gain.gain < 0:
            scores = f"{percent(gain.teacher_right):.1f} %, the parent {percent(gain.parent_right):.1f} %"
            warn(
                f"teacher {gain.teacher} is worse than its parent on the speech that was set aside from its training "
                f"({DECODERS[gain.decoder]}: {scores} of {gain.n} utterances)"
            )


def read_gains(folders: Mapping[str, Path]) -> pd.DataFrame:
    """The gains of several teachers, one row per teacher and decoder, from the folders that they were scored in."""
    texts = dict.fromkeys(("teacher", "decoder", "measure", "parent_trained_on"), str)
    tables = [pd.read_csv(folder / FILE, dtype=texts, keep_default_na=False) for folder in folders.values()]
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(Gain.__dataclass_fields__))


def describe_gains(gains: pd.DataFrame) -> str:
    """How many teachers gained and how many lost, by how much, and whether the comparison flatters the parent."""
    if gains.empty:
        return NOTHING
    parts = []
    for decoder, part in gains.groupby("decoder", sort=False):
        better, worse = part[part.gain > 0], part[part.gain < 0]
        gained = f"{len(better)} of {len(part)} teachers gained over their parent" + _on_average(better)
        lost = f"{len(worse)} lost" + _on_average(worse, list(worse.teacher))
        parts.append(f"{DECODERS[decoder]}: {gained}, {lost}")
    remarks = [text for what, text in FLATTERED.items() if what in set(gains.parent_trained_on)]
    return ". ".join(["; ".join(parts), *remarks])


def worse_than_parent(gains: pd.DataFrame) -> str:
    """A warning that names the teachers that lost by some decoder, with what to try; empty if none did."""
    lost = list(dict.fromkeys(gains.teacher[gains.gain < 0]))
    if not lost:
        return ""
    count = f"{len(lost)} of {gains.teacher.nunique()} teachers"
    return (
        f"{count} end below their parent, from which they began: {', '.join(lost)}. Try teacher: {{augment: none}}, a "
        "smaller adapt.lr, or leave them out of fold.teachers"
    )


def _on_average(part: pd.DataFrame, names: Sequence[str] = ()) -> str:
    """The mean gain or loss of some teachers, in brackets, with their names if these matter."""
    if part.empty:
        return ""
    named = f": {', '.join(names)}" if names else ""
    return f" ({percent(part.gain.mean()):+.1f} points on average{named})"


def _gain(parent: Sequence[Hypothesis], teacher: Sequence[Hypothesis], decoder: str, speech: SetAside) -> Gain:
    """The gain by one decoder; the rows of both are of the same utterances, in the same order."""
    before, after = (1 - _errors(rows, decoder, speech.scoring) for rows in (parent, teacher))
    low, high = interval(after - before, speech.scoring.bootstrap)
    if not (after - before).any():  # the shares that so many equal pairs cannot rule out, as in `compare`
        high = 1 - 0.025 ** (1 / len(before))
        low = -high
    means = float(before.mean()), float(after.mean())
    about = (speech.teacher, decoder, speech.scoring.measure, len(before))
    return Gain(*about, *means, means[1] - means[0], low, high, speech.parent_trained_on)


def _errors(rows: Sequence[Hypothesis], decoder: str, scoring: Scoring) -> np.ndarray:
    """The errors of each utterance, such that their mean is 1 - WRA, or WER."""
    from rapidfuzz.distance import Levenshtein

    texts = [(row.reference, getattr(row, decoder)) for row in rows]
    if scoring.normaliser != "none":
        same = NORMALISERS[scoring.normaliser]
        texts = [(same(reference), same(hypothesis)) for reference, hypothesis in texts]
    if scoring.measure == "wra":
        return np.array([float(reference != hypothesis) for reference, hypothesis in texts])
    edits = [Levenshtein.distance(reference.split(), hypothesis.split()) for reference, hypothesis in texts]
    return np.array(edits) * len(texts) / sum(len(reference.split()) for reference, _ in texts)
