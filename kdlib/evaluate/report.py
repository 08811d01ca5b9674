"""Score a system on utterances and write its report: the same for models, stored outputs and combined teachers.

A report is a folder: hypotheses.csv, scores.json, tidy scores.csv, one evaluation_<decoder>.json per decoder, of
sentences references.stm and hypotheses_<decoder>.ctm, and frame posteriors on request.
"""

from collections.abc import Sequence
from pathlib import Path

from kdlib.corpus.utterances import Utterance
from kdlib.evaluate import nist, score
from kdlib.evaluate.hypotheses import Hypothesis
from kdlib.evaluate.normalisers import NORMALISERS
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
    scores = score.write(rows, evaluation.decoders.columns, folder, about, tokens.fingerprint, evaluation.scoring)
    if evaluation.scoring.measure == "wer":
        _write_nist(rows, utterances, evaluation, folder)
    return scores


def _write_nist(
    rows: Sequence[Hypothesis], utterances: Sequence[Utterance], evaluation: Evaluation, folder: Path
) -> None:
    """References and hypotheses of sentences as STM and CTM, as they are scored: for sclite."""
    same, seconds = NORMALISERS[evaluation.scoring.normaliser], {utt.utt_id: utt.duration_s for utt in utterances}
    nist.write_stm(
        folder / "references.stm", [(row.utt_id, row.speaker, seconds[row.utt_id], same(row.reference)) for row in rows]
    )
    for name in evaluation.decoders.columns:
        texts = [(row.utt_id, seconds[row.utt_id], same(getattr(row, name))) for row in rows]
        nist.write_ctm(folder / f"hypotheses_{name}.ctm", texts)
