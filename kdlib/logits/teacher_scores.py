"""Accuracy of each teacher on each speaker: scores of its outputs on the test blocks, and the matrix of all teachers.

A teacher's training utterances are left out of its scores: where a corpus has no blocks, the column of its own speaker
is of its dev utterances. These scores decide nothing but the weights of `targets`, on the fold's dev speaker.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from kdlib.corpus.manifest import Corpus
from kdlib.corpus.utterances import Utterance
from kdlib.evaluate.report import score_system
from kdlib.evaluate.score import About
from kdlib.evaluate.transcribe import Evaluation
from kdlib.io import read_json
from kdlib.logits.extract import OUTPUTS, read_outputs
from kdlib.logits.store import LogitStore
from kdlib.models import Emissions, Outputs


def score_teacher(
    folder: Path, outputs: Path, utterances: Sequence[Utterance], evaluation: Evaluation, about: About
) -> None:
    """Score a teacher's stored outputs; those of its decoder are read, not computed again."""
    store, rows, tokens = LogitStore(outputs / "ctc"), read_outputs(outputs / OUTPUTS), evaluation.decoders.tokens
    evaluation = replace(
        evaluation,
        extra_columns=lambda batch: {"attention": [tokens.decode(rows[utt.utt_id].free_running) for utt in batch]},
    )
    score_system(lambda batch: stored_outputs(store, batch), utterances, folder, evaluation, about)


def stored_outputs(store: LogitStore, batch: Sequence[Utterance]) -> Outputs:
    """A teacher's stored outputs on a batch."""
    hidden, lengths = store.batch([utt.utt_id for utt in batch])
    if store.head is None:  # logits as they are
        return Outputs(Emissions(hidden, lengths))
    weight, bias = store.head
    return Outputs(Emissions(hidden @ weight.T + bias, lengths))


def accuracy_matrix(corpus: Corpus, scores: Mapping[str, Path], decoder: str, measure: str = "wra") -> pd.DataFrame:
    """WRA, or WER, of each teacher (row) on each speaker (column), from the least to the most intelligible.

    `scores` are the teachers' folders of scores; empty if none has this decoder's.
    """
    rows = {}
    for name, folder in scores.items():
        if result := read_json(folder / "scores.json")["decoders"].get(decoder):
            rows[name] = {speaker: part[measure] for speaker, part in result["by"]["speaker"].items()}
    order = [name for name in corpus.by_intelligibility if name in corpus.dysarthric]
    table = pd.DataFrame.from_dict(rows, orient="index")
    names = [name for name in order if name in rows] + [name for name in rows if name not in order]  # of no speaker
    return table.reindex(index=names, columns=[name for name in order if name in table])


def own_and_others(table: pd.DataFrame) -> pd.DataFrame:
    """WRA of the own teacher and mean WRA of the other teachers, for each speaker of a matrix who has a teacher."""
    own = [name for name in table.columns if name in table.index]
    return pd.DataFrame(
        {
            "own teacher": {name: table.loc[name, name] for name in own},
            "other teachers": {name: table[name].drop(name).mean() for name in own},
        }
    )
