"""Transcribe any utterances with any system: forward pass, then every decoder that applies.

Before anything is decoded, every reference makes the round trip through the system's own tokenizer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch

from kdlib.console import progress
from kdlib.corpus import audio
from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.decode.calibration import CalibratedLexicon, towards_prior, word_prior
from kdlib.decode.decoders import TRANSDUCTIVE, DecoderSet
from kdlib.evaluate.hypotheses import Hypothesis
from kdlib.evaluate.posteriors import PosteriorWriter
from kdlib.evaluate.score import DEFAULT
from kdlib.models import Outputs
from kdlib.runtime import set_threads
from kdlib.settings.evaluation import Scoring
from kdlib.tokens import Tokens, check_round_trip, normalise

Forward = Callable[[list[Utterance]], Outputs]


class System(Protocol):
    """A model that can be evaluated: inputs in, `Outputs` out, on the device of its choice, and their tokens."""

    path: Path
    tokens: Tokens
    stride_ms: float  # of its frames

    def __call__(self, samples, lengths) -> Outputs:
        """Samples [B, N] and their numbers [B] -> `Outputs`."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """How a system's outputs become rows of hypotheses."""

    decoders: DecoderSet
    what: str = "evaluation"  # in the progress bar
    scoring: Scoring = DEFAULT
    level: Callable[[str], str] = lambda speaker: ""
    seen: Callable[[Utterance], bool] | None = None
    extra_columns: Callable[[list[Utterance]], Mapping[str, Sequence]] | None = None  # one value per utterance
    change: Callable[[Hypothesis], Hypothesis] | None = None  # applied to each row


def recordings(system: System) -> Forward:
    """Run a system on the recordings of utterances."""

    def forward(utterances: list[Utterance]) -> Outputs:
        batch = Batch(utterances)
        return system(batch.inputs, batch.lengths)

    return forward


def transductive(lexicon: CalibratedLexicon, posteriors: torch.Tensor) -> list[str]:
    """The best words of utterances whose mean posterior [N, W] is moved to the prior of the words."""
    known = lexicon.calibrator
    moved = towards_prior(posteriors.double().numpy(), word_prior(lexicon.words, known.counts, known.new_words), 1.0)
    return [lexicon.words[place] if row[place] > 0 else "" for row, place in zip(moved, moved.argmax(1), strict=True)]


def transcribe(
    forward: Forward, utterances: Sequence[Utterance], evaluation: Evaluation, writer: PosteriorWriter | None = None
) -> list[Hypothesis]:
    """Decode the outputs of `forward` with all decoders; return rows in the order of the utterances.

    The CTC posteriors of every frame are added to `writer`, if given.
    """
    set_threads()
    decoders, seen = evaluation.decoders, evaluation.seen
    check_round_trip(decoders.tokens, [utt.text for utt in utterances])
    rows: dict[str, Hypothesis] = {}
    posteriors: dict[str, torch.Tensor] = {}
    with progress(len(utterances), evaluation.what, "utt") as bar:
        for batch in audio.batches(utterances, evaluation.scoring.batch_size):
            outputs = forward(batch)
            columns = dict(decoders(outputs))
            if evaluation.extra_columns:
                columns |= evaluation.extra_columns(batch)
            for row, utt in enumerate(batch):
                rows[utt.utt_id] = Hypothesis(
                    utt.utt_id,
                    utt.speaker,
                    evaluation.level(utt.speaker),
                    utt.word_type,
                    "" if seen is None else "yes" if seen(utt) else "no",
                    normalise(utt.text),
                    **{column: values[row] for column, values in columns.items()},
                )
            if TRANSDUCTIVE in decoders.columns:
                posteriors |= zip((utt.utt_id for utt in batch), decoders.lexicon.posterior(outputs.ctc), strict=True)
            if writer:
                logprobs = outputs.ctc.logits.log_softmax(-1).cpu().numpy()
                for utt, row, length in zip(batch, logprobs, outputs.lengths.tolist(), strict=True):
                    writer.add(utt.utt_id, row[:length])
            bar.update(len(batch))
    ordered = [rows[utt.utt_id] for utt in utterances]
    if posteriors:
        table = torch.stack([posteriors[utt.utt_id] for utt in utterances])
        words = transductive(decoders.lexicon, table)
        ordered = [replace(row, **{TRANSDUCTIVE: word}) for row, word in zip(ordered, words, strict=True)]
    return [evaluation.change(row) for row in ordered] if evaluation.change else ordered
