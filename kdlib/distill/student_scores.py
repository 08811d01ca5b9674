"""Score trained students on the held-out speaker, and on the dev speaker that chose the checkpoint."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from kdlib.corpus.utterances import Utterance
from kdlib.evaluate import hypotheses
from kdlib.evaluate.fold_scores import FoldScoring, score_fold
from kdlib.evaluate.score import About
from kdlib.evaluate.transcribe import recordings
from kdlib.models.averaging import EnsembleSystem
from kdlib.models.hybrid import TrainedModel
from kdlib.settings.student import Faults


@dataclass(frozen=True)
class StudentScoring(FoldScoring):
    """What the students of a fold are scored with."""

    faults: Faults
    text_of: Callable[[Iterable[int]], str] | None = None  # decodes token ids to text, where that is a fault
    seen: Callable[[Utterance], bool] | None = (
        None  # whether adaptation speech holds the word; by default the training's
    )
    dev_system: TrainedModel | None = None  # for dev speech, where another model was adapted to its speaker


def score_student(
    partial: Path, system: TrainedModel | EnsembleSystem, name: str, checkpoint: str, how: StudentScoring
) -> None:
    """Transcribe the held-out and the dev speaker with a trained system, by all decoders that apply, and score them."""
    faults, record = how.faults, system.record
    heads = record["heads_trained"]  # the outputs of an untrained head are no result of this training
    heads = ["ctc", *heads] if faults.untrained_head and "ctc" not in heads else heads
    unlabelled = ", ".join(record.get("labels", {}).get("unlabelled_speakers", []))
    remarks = [f"trained on {unlabelled} without transcripts: no leave-one-speaker-out result"] if unlabelled else []
    remarks = [record["remark"]] if record.get("remark") else remarks
    if faults.named:
        remarks.append(f"with faults on purpose: {faults.named}")
    about = About(name, "", checkpoint, record.get("variant", ""), record.get("seed"), remark="; ".join(remarks))
    about = replace(about, seen_in="the adaptation speech") if how.seen else about
    change = (lambda row: hypotheses.decode_again(row, how.text_of)) if how.text_of else None
    decoders, ms = how.setup.decoders(system.model, heads), system.stride_ms
    dev = recordings(how.dev_system) if how.dev_system else None
    more = {"posteriors_ms": ms, "change": change, "dev_forward": dev, "seen": how.seen}
    score_fold(partial, recordings(system), decoders, how, about, **more)
