"""How fast is the exact CTC score of every word of a closed lexicon? One thread, 455 words, and 5,000.

Peers of the same run: a loop of `F.ctc_loss`, one word at a time, and one batched call per utterance. The utterances
are those of a fold of the original study in number (1,785) and length, with random but confident logits, so that scores
are spread as a model's are. All scores are compared, in nats.
"""

import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from kdlib.corpus.importers.uaspeech import word_list
from kdlib.decode.lexicon import Lexicon
from kdlib.io import repository_root, write_json
from kdlib.models import Emissions, Outputs
from kdlib.runtime import set_threads
from kdlib.tokens import Tokens, train_tokenizer

UTTERANCES, BATCH, ROUNDS = 1785, 32, 7


def random_outputs(count: int, size: int, seed: int = 0) -> Outputs:
    """Batches of random logits of 15 to 60 frames: 0.6 to 2.4 s of 40 ms."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(15, 61, (count,), generator=generator).sort().values
    logits = 3 * torch.randn(count, int(lengths.max()), size, generator=generator)
    return Emissions(logits, lengths)


def loop(lexicon: Lexicon, outputs: Outputs, blank: int) -> torch.Tensor:
    """A call of `F.ctc_loss` for each word."""
    logprobs = outputs.logits.log_softmax(-1)
    rows = []
    for frames, length in zip(logprobs, outputs.lengths, strict=True):
        losses = [
            torch.nn.functional.ctc_loss(
                frames[:length], torch.tensor(ids), length, torch.tensor(len(ids)), blank=blank, reduction="none"
            )
            for ids in lexicon.sequences
        ]
        rows.append(-torch.stack(losses))
    return torch.stack(rows)


def batched(lexicon: Lexicon, outputs: Outputs, blank: int) -> torch.Tensor:
    """One call of `F.ctc_loss` for all words of an utterance."""
    ids = [torch.tensor(one) for one in lexicon.sequences]
    sizes, flat = torch.tensor([len(one) for one in ids]), torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    logprobs = outputs.logits.log_softmax(-1)
    rows = []
    for frames, length in zip(logprobs, outputs.lengths.tolist(), strict=True):
        many = frames[:length, None].expand(-1, len(ids), -1)
        lengths = torch.full((len(ids),), length)
        rows.append(-torch.nn.functional.ctc_loss(many, flat, lengths, sizes, blank=blank, reduction="none"))
    return torch.stack(rows)


def main() -> None:
    """Measure, print, and write outputs/benchmarks/lexicon.json."""
    set_threads()
    words = sorted(set(word_list().values()))
    with tempfile.TemporaryDirectory() as folder:
        tokens = Tokens.for_nemo(train_tokenizer(words, 256, Path(folder), lower=True).read_bytes())
    codes = words + [f"{word} {word}" for word in words[: 455 - len(words)]]  # 455 codes, 449 words
    lexicon, some = Lexicon(codes, tokens), random_outputs(8, tokens.size)
    forms = {
        "loop of F.ctc_loss": lambda: loop(lexicon, some, tokens.blank),
        "one batched F.ctc_loss": lambda: batched(lexicon, some, tokens.blank),
        "this repository": lambda: lexicon.scores(some),
    }
    scores = {name: form() for name, form in forms.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(ROUNDS):
        for name, form in forms.items():
            started = time.perf_counter()
            form()
            times[name].append(time.perf_counter() - started)
    pace = {name: 8 / statistics.median(one) for name, one in times.items()}
    exact = scores["loop of F.ctc_loss"].double()
    same = exact.isfinite()
    everything = [random_outputs(BATCH, tokens.size, seed) for seed in range(UTTERANCES // BATCH + 1)]
    started = time.perf_counter()
    count = sum(len(lexicon.scores(one)) for one in everything)
    fold_s = (time.perf_counter() - started) * UTTERANCES / count
    many = Lexicon([f"{a} {b}" for a, b in itertools.islice(itertools.product(words, words), 5000)], tokens)
    started = time.perf_counter()
    many.scores(everything[0])
    result = {
        "words": len(lexicon.words),
        "utterances_per_s": {name: round(one, 1) for name, one in pace.items()},
        "times_the_loop": {name: round(one / pace["loop of F.ctc_loss"], 1) for name, one in pace.items()},
        "largest_difference_nats": float((scores["this repository"] - exact)[same].abs().max()),
        "a_fold_of_1785_utterances_s": round(fold_s, 2),
        "with_5000_words_utterances_per_s": round(BATCH / (time.perf_counter() - started), 1),
    }
    print(json.dumps(result, indent=1))
    folder = repository_root() / "outputs" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "lexicon.json", result)


if __name__ == "__main__":
    main()
