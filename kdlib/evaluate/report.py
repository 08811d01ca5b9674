"""Score a system on utterances and write its report: the same for models, stored outputs and combined teachers.

A report is a folder: hypotheses.csv, scores.json, tidy scores.csv, one evaluation_<decoder>.json per decoder, and frame
posteriors on request.
"""

from collections.abc import Sequence
from pathlib import Path

from kdlib.corpus.manifest import Utterance
from kdlib.evaluate import score
from kdlib.evaluate.posteriors import PosteriorWriter
from kdlib.evaluate.score import About
from kdlib.evaluate.transcribe import Evaluation, Forward, transcribe


def score_system(
    forward: Forward,
    utterances: Sequence[Utterance],
    folder: Path,
    evaluation: Evaluation,
    about: About,
    posteriors_ms: float = 0.0,
) -> dict:
    """Transcribe utterances, score the hypotheses and write the report; return the scores.

    With `posteriors_ms`, the length of a frame, frame posteriors are stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens = evaluation.decoders.tokens
    writer = PosteriorWriter(tokens, posteriors_ms) if posteriors_ms else None
    rows = transcribe(forward, utterances, evaluation, writer)
    if writer and rows:
        writer.write(folder / "posteriors")
    return score.write(rows, evaluation.decoders.columns, folder, about, tokens.fingerprint, evaluation.scoring)
