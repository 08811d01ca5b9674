"""One batch under the loss: every term's weight and value before and after training, and the posteriors it compares."""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.distill.setup import StudentSetup
from kdlib.models import hybrid
from kdlib.objectives.objective import Objective
from kdlib.objectives.term import Term
from kdlib.settings.schedule import Progress

START, END = Progress(), Progress(1.0, math.inf)


@dataclass(frozen=True)
class LossView:
    """Some utterances of the training speech as the loss sees them."""

    terms: pd.DataFrame  # by term: side, weight and value before and after training; unrounded
    utterances: list[Utterance]
    pieces: list[str]  # what each token id stands for
    before: list[np.ndarray]  # [T, V] of each utterance: the student's CTC posteriors before training,
    after: list[np.ndarray]  # with the weights of the best checkpoint,
    teachers: list[np.ndarray]  # and those of the target at temperature 1; empty without one
    stride_ms: float


def view(setup: StudentSetup, folder: Path, count: int = 4) -> LossView:
    """The loss of some utterances of different speakers, before training and with a trained student's weights."""
    batch = Batch.of(_sample(setup, count), setup.tokens).to(setup.device)
    objective = setup.objective()
    objective.learner.to(setup.device).eval()
    first, before = _losses(objective, batch, START)
    trained, _, _ = hybrid.load(folder)
    setup.model.load_state_dict(trained.state_dict())
    last, after = _losses(objective, batch, END)
    rows = {
        name: {
            "side": term.side,
            "weight": objective.weight(name, START),
            "before training": math.nan if "views" in term.needs else first.get(name, math.nan),
            "weight at the end": objective.weight(name, END),
            "after training": math.nan if _needs_more(term) else last.get(name, math.nan),
        }
        for name, term in objective.terms.items()
    }
    teachers = []
    if target := setup.targets.get("ctc"):
        known = target.rows(batch)
        lengths = torch.tensor([len(one) for one in before], device=setup.device)
        if len(known) == len(batch):
            logits = target.logits(batch, lengths).logits.softmax(-1).cpu().numpy()
            teachers = [row[: len(one)] for row, one in zip(logits, before, strict=True)]
    known_pieces = [piece.replace("▁", "_") for piece in setup.tokens.pieces]
    pieces = known_pieces + [""] * (setup.tokens.size - len(known_pieces))
    stride = setup.model.encoder.stride_ms
    terms = pd.DataFrame.from_dict(rows, orient="index")
    return LossView(terms, list(batch.utterances), pieces, before, after, teachers, stride)


def _needs_more(term: Term) -> bool:
    """True if the term uses what only training has: a layer that is not saved, or several views by masks."""
    return bool({"layer", "views"} & term.needs) or term.setting == "gamma"


def _sample(setup: StudentSetup, count: int) -> list[Utterance]:
    """Labelled utterances, of as many speakers as there are."""
    drawn = [utt for utt in setup.data.train if utt.text]
    random.Random(setup.seed).shuffle(drawn)
    by_speaker: dict[str, list[Utterance]] = {}
    for utt in drawn:
        by_speaker.setdefault(utt.speaker, []).append(utt)
    rounds = (utt for place in range(count) for rows in by_speaker.values() for utt in rows[place : place + 1])
    return [utt for utt, _ in zip(rounds, range(count), strict=False)]


def _losses(objective: Objective, batch: Batch, now: Progress) -> tuple[dict[str, float], list[np.ndarray]]:
    """The value of every term, and the CTC posteriors of each utterance."""
    with torch.no_grad():
        step = objective.step(batch, now)
        values = {name: float(value) for name, value in objective.total(step).items()}
    posteriors, lengths = step.outputs.ctc.logits.softmax(-1).cpu().numpy(), step.outputs.lengths.tolist()
    return values, [row[:length] for row, length in zip(posteriors, lengths, strict=True)]
