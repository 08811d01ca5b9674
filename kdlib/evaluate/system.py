"""Any system, any utterances: hear, decode with every decoder that applies, and score.

Before a single score, every reference makes the round trip through the system's own tokenizer.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from kdlib.corpus import audio
from kdlib.corpus.manifest import Utterance
from kdlib.decode.greedy import blank_share, greedy
from kdlib.decode.lexicon import Lexicon
from kdlib.evaluate.score import Hypothesis
from kdlib.models import Outputs
from kdlib.stage import progress, set_threads
from kdlib.tokens import Tokens, check_round_trip, normalise

DECODERS = ("greedy", "lexicon")  # what `hear` fills by itself
Say = Callable[[list[Utterance], Outputs], Mapping[str, Sequence[str]]]  # -> column -> texts, one an utterance
CODE = (
    "data/homophones.json",
    "models/__init__.py",
    "evaluate/system.py",
    "evaluate/score.py",
    "decode/greedy.py",
    "decode/lexicon.py",
    "tokens.py",
    "corpus/audio.py",
)


class System(Protocol):
    """What can be evaluated: samples in, `Outputs` out, with the tokens that they mean."""

    path: Path
    tokens: Tokens

    def __call__(self, samples, lengths) -> Outputs:
        """Samples [B, N] and their numbers [B] -> `Outputs`."""
        ...


def hear(
    system: System, utterances: Sequence[Utterance], lexicon: Sequence[str], *, what: str = "evaluation", **options
) -> list[Hypothesis]:
    """Let a system hear utterances, and decode what it answers; for the options see `decode`."""
    return decode(lambda batch: system(*audio.collate(batch)), system.tokens, utterances, lexicon, what=what, **options)


def decode(
    answer: Callable[[list[Utterance]], Outputs],
    tokens: Tokens,
    utterances: Sequence[Utterance],
    lexicon: Sequence[str],
    *,
    batch_size: int = 32,
    level: Callable[[str], str] = lambda speaker: "",
    seen: Callable[[Utterance], bool] | None = None,
    what: str = "decoding",
    posteriors: Path | None = None,
    say: Say | None = None,
) -> list[Hypothesis]:
    """Decode what `answer` gives for a batch, greedily and over a closed lexicon; rows come back in the order given.

    `say` gives the texts of other decoders, by column. With `posteriors`, that folder gets `ctc.npz`: log-probabilities
    [T, V] in fp16 by utterance id.
    """
    set_threads()
    check_round_trip(tokens, [utt.text for utt in utterances])
    closed = Lexicon(lexicon, tokens)
    rows: dict[str, Hypothesis] = {}
    kept: dict[str, np.ndarray] = {}
    with progress(len(utterances), what, "utt") as bar:
        for batch in audio.batches(utterances, batch_size):
            outputs = answer(batch)
            parts = (
                batch,
                greedy(outputs, tokens.blank),
                closed.best(outputs),
                blank_share(outputs, tokens.blank).tolist(),
            )
            others = say(batch, outputs) if say else {}
            for row, (utt, ids, word, blanks) in enumerate(zip(*parts, strict=True)):
                rows[utt.utt_id] = Hypothesis(
                    utt.utt_id,
                    utt.speaker,
                    level(utt.speaker),
                    utt.word_type,
                    "" if seen is None else "yes" if seen(utt) else "no",
                    normalise(utt.text),
                    tokens.decode(ids),
                    word,
                    **{column: texts[row] for column, texts in others.items()},
                    n_tokens=len(ids),
                    blank_share=round(blanks, 4),
                    token_ids=" ".join(map(str, ids)),
                )
            if posteriors:
                logprobs = outputs.ctc_logits.log_softmax(-1).half().numpy()
                for utt, row, length in zip(batch, logprobs, outputs.lengths.tolist(), strict=True):
                    kept[utt.utt_id] = row[:length]
            bar.update(len(batch))
    if posteriors:
        posteriors.mkdir(exist_ok=True)
        np.savez_compressed(posteriors / "ctc.npz", **kept)
    return [rows[utt.utt_id] for utt in utterances]
