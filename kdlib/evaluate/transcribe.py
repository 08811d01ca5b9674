"""Transcribe any utterances with any system: forward pass, then every decoder that applies.

Before anything is decoded, every reference makes the round trip through the system's own tokenizer.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from kdlib.console import progress
from kdlib.corpus import audio
from kdlib.corpus.manifest import Utterance
from kdlib.decode.decoders import DECODERS_CODE, DecoderSet
from kdlib.evaluate import posteriors
from kdlib.evaluate.posteriors import PosteriorWriter
from kdlib.evaluate.score import Hypothesis
from kdlib.models import Outputs
from kdlib.runtime import set_threads
from kdlib.tokens import Tokens, check_round_trip, normalise

ExtraColumns = Callable[[list[Utterance]], Mapping[str, Sequence]]  # -> column -> values, one per utterance
TRANSCRIBE_CODE = (
    "data/homophones.json",
    "models/__init__.py",
    "evaluate/transcribe.py",
    "evaluate/score.py",
    *posteriors.CODE,
    "tokens.py",
    "corpus/audio.py",
    *DECODERS_CODE,
)


class System(Protocol):
    """A model that can be evaluated: samples in, `Outputs` out, and the tokens of the outputs."""

    path: Path
    tokens: Tokens
    stride_ms: float  # of its frames

    def __call__(self, samples, lengths) -> Outputs:
        """Samples [B, N] and their numbers [B] -> `Outputs`."""
        ...


def transcribe(
    system: System,
    utterances: Sequence[Utterance],
    decoders: DecoderSet,
    *,
    what: str = "evaluation",
    posteriors_folder: Path | None = None,
    **options,
) -> list[Hypothesis]:
    """Transcribe utterances with a system; for the options see `decode_outputs`.

    The CTC posteriors of every frame are written to `posteriors_folder`, if given (`posteriors`).
    """
    writer = PosteriorWriter(system.tokens, system.stride_ms) if posteriors_folder else None
    rows = decode_outputs(
        lambda batch: system(*audio.collate(batch)), utterances, decoders, what=what, writer=writer, **options
    )
    if writer and rows:
        writer.write(posteriors_folder)
    return rows


def decode_outputs(
    forward: Callable[[list[Utterance]], Outputs],
    utterances: Sequence[Utterance],
    decoders: DecoderSet,
    *,
    batch_size: int = 32,
    level: Callable[[str], str] = lambda speaker: "",
    seen: Callable[[Utterance], bool] | None = None,
    what: str = "decoding",
    writer: PosteriorWriter | None = None,
    extra_columns: ExtraColumns | None = None,
) -> list[Hypothesis]:
    """Decode the outputs of `forward` for each batch with all decoders; return rows in the order of the utterances.

    `extra_columns` gives columns from elsewhere; `writer` collects the posteriors of every frame.
    """
    set_threads()
    check_round_trip(decoders.tokens, [utt.text for utt in utterances])
    rows: dict[str, Hypothesis] = {}
    with progress(len(utterances), what, "utt") as bar:
        for batch in audio.batches(utterances, batch_size):
            outputs = forward(batch)
            columns = {**decoders(outputs), **(extra_columns(batch) if extra_columns else {})}
            for row, utt in enumerate(batch):
                rows[utt.utt_id] = Hypothesis(
                    utt.utt_id,
                    utt.speaker,
                    level(utt.speaker),
                    utt.word_type,
                    "" if seen is None else "yes" if seen(utt) else "no",
                    normalise(utt.text),
                    **{column: values[row] for column, values in columns.items()},
                )
            if writer:
                logprobs = outputs.ctc_logits.log_softmax(-1).numpy()
                for utt, row, length in zip(batch, logprobs, outputs.lengths.tolist(), strict=True):
                    writer.add(utt.utt_id, row[:length])
            bar.update(len(batch))
    return [rows[utt.utt_id] for utt in utterances]
