"""Any system, any utterances: hear, decode with every decoder that applies, and score.

Before a single score, every reference makes the round trip through the system's own tokenizer.
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

ExtraColumns = Callable[[list[Utterance]], Mapping[str, Sequence]]  # -> column -> values, one an utterance
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
    """What can be evaluated: samples in, `Outputs` out, with the tokens that they mean."""

    path: Path
    tokens: Tokens
    stride_ms: float  # of its frames

    def __call__(self, samples, lengths) -> Outputs:
        """Samples [B, N] and their numbers [B] -> `Outputs`."""
        ...


def transcribe(
    system: System,
    utterances: Sequence[Utterance],
    panel: DecoderSet,
    *,
    what: str = "evaluation",
    keep: Path | None = None,
    **options,
) -> list[Hypothesis]:
    """Let a system hear utterances, and decode what it answers; for the options see `decode`.

    With `keep` that folder gets what the CTC head said of every frame (`posteriors`).
    """
    keeper = PosteriorWriter(system.tokens, system.stride_ms) if keep else None
    rows = decode_outputs(
        lambda batch: system(*audio.collate(batch)), utterances, panel, what=what, keeper=keeper, **options
    )
    if keeper and rows:
        keeper.write(keep)
    return rows


def decode_outputs(
    answer: Callable[[list[Utterance]], Outputs],
    utterances: Sequence[Utterance],
    panel: DecoderSet,
    *,
    batch_size: int = 32,
    level: Callable[[str], str] = lambda speaker: "",
    seen: Callable[[Utterance], bool] | None = None,
    what: str = "decoding",
    keeper: PosteriorWriter | None = None,
    say: ExtraColumns | None = None,
) -> list[Hypothesis]:
    """Decode what `answer` gives for a batch with every decoder of the panel; rows come back in the order given.

    `say` gives columns from elsewhere; `keeper` is shown what is said of every frame.
    """
    set_threads()
    check_round_trip(panel.tokens, [utt.text for utt in utterances])
    rows: dict[str, Hypothesis] = {}
    with progress(len(utterances), what, "utt") as bar:
        for batch in audio.batches(utterances, batch_size):
            outputs = answer(batch)
            columns = {**panel(outputs), **(say(batch) if say else {})}
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
            if keeper:
                logprobs = outputs.ctc_logits.log_softmax(-1).numpy()
                for utt, row, length in zip(batch, logprobs, outputs.lengths.tolist(), strict=True):
                    keeper.add(utt.utt_id, row[:length])
            bar.update(len(batch))
    return [rows[utt.utt_id] for utt in utterances]
