"""Targets: how teachers' outputs are stored and combined."""

from typing import Literal, get_args

from pydantic import Field

from kdlib.settings import Section


class Aggregation(Section):
    """Aggregation of the teachers' outputs into one target."""

    method: Literal[
        "logprob_mean",
        "prob_mean",
        "weighted_accuracy",  # by accuracy on the dev speaker
        "weighted_loss",  # by the loss of each utterance's reference
        "weighted_similarity",  # by the similarity of the teacher's speaker to the utterance's
        "best",
        "own",
        "same_level",
        "attention",  # trained on the dev speaker: weights per frame
        "transformer",  # trained on the dev speaker: weights per frame, and a correction
        "auto",  # of these what gains on the dev speaker and on training speech: `target_report.best_method`
    ] = "logprob_mean"
    missing: Literal["strict", "partial", "all"] = "strict"  # utterances without the outputs of some teachers
    min_teachers: int = Field(10, ge=1)  # for "partial"
    encoding: Literal["fp16", "int8"] = "fp16"  # of the stores
    fusion_steps: int = Field(100, ge=1)  # training steps of attention and transformer


class LogitStudentSettings(Section):
    """Seed 003's student without audio input: teachers' logits in, its own out."""

    heads: Literal["ctc", "decoder"] = "ctc"  # the teachers' outputs that it reads, by frame or by token
    model: Literal["transformer", "mlp"] = "transformer"
    temperature: float = Field(3.0, gt=0)
    alpha: float = Field(0.5, ge=0, le=1)  # weight of the teachers; the rest is the references'
    steps: int = Field(200, ge=1)
    dim: int = Field(96, ge=8, multiple_of=4)
    layers: int = Field(1, ge=1)


METHODS = tuple(name for name in get_args(Aggregation.model_fields["method"].annotation) if name != "auto")
FUSIONS = ("attention", "transformer")  # learned
DEV_FITTED = ("weighted_accuracy", "best", *FUSIONS)  # methods estimated on dev speech


def methods_for(*, of_speakers: bool) -> list[str]:
    """The methods that a recipe's teachers allow: only teachers of speakers belong to a speaker."""
    if of_speakers:
        return list(METHODS)
    return [name for name in METHODS if name not in ("own", "same_level", "weighted_similarity")]
