"""Score trained students on the held-out speaker, and on the dev speaker that chose the checkpoint."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kdlib.corpus.speakers import Splits
from kdlib.evaluate import hypotheses
from kdlib.evaluate.decoder_setup import DecoderSetup
from kdlib.evaluate.report import score_system
from kdlib.evaluate.score import About
from kdlib.evaluate.transcribe import Evaluation, recordings
from kdlib.models.averaging import EnsembleSystem
from kdlib.models.hybrid import TrainedModel
from kdlib.settings.evaluation import Scoring
from kdlib.settings.student import Faults


@dataclass(frozen=True)
class StudentScoring:
    """What the students of a fold are scored with."""

    splits: Splits
    setup: DecoderSetup
    scoring: Scoring
    faults: Faults
    text_of: Callable[[Iterable[int]], str] | None = None  # decodes token ids to text, where that is a fault


def score_student(
    partial: Path, system: TrainedModel | EnsembleSystem, name: str, checkpoint: str, how: StudentScoring
) -> None:
    """Transcribe the held-out and the dev speaker with a trained system, by all decoders that apply, and score them."""
    splits, scoring, faults = how.splits, how.scoring, how.faults
    heads = system.record["heads_trained"]  # the outputs of an untrained head are no result of this training
    heads = ["ctc", *heads] if faults.untrained_head and "ctc" not in heads else heads
    decoders = how.setup.decoders(system.model, heads)
    decoders = how.setup.tuned(decoders, recordings(system), splits.dev, partial, scoring.batch_size)
    unlabelled = ", ".join(system.record.get("labels", {}).get("unlabelled_speakers", []))
    remarks = [f"trained on {unlabelled} without transcripts: no leave-one-speaker-out result"] if unlabelled else []
    if faults.named:
        remarks.append(f"with faults on purpose: {faults.named}")
    settings = how.setup.record(decoders, splits.settings.fold.dev or "")
    change = (lambda row: hypotheses.decode_again(row, how.text_of)) if how.text_of else None
    for part, utterances in (("", splits.test), ("dev", splits.dev)):
        if utterances:
            score_system(
                recordings(system),
                utterances,
                partial / part,
                Evaluation(
                    decoders,
                    f"{name}, {part or 'held-out'} speech",
                    scoring,
                    splits.corpus.level,
                    splits.seen,
                    change=change,
                ),
                About(
                    name,
                    "" if part else splits.settings.held_out,
                    checkpoint,
                    system.record.get("variant", ""),
                    system.record.get("seed"),
                    settings,
                    "; ".join(remarks),
                ),
                0.0 if part else system.stride_ms,
            )
