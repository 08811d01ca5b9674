"""How fast is the exact CTC score of every word of a closed lexicon?

The lexicon has 455 entries, as UA-Speech's, and 8 utterances are scored. The peers are a loop of `F.ctc_loss`, one word
at a time, and one batched call for each utterance. The logits are random but confident, so that scores are spread as a
model's are. Calibration adds a bias to every word's score; it is fitted on scored utterances, each of which has as its
reference one of its ten best words.
"""

import itertools
import statistics
import tempfile
from pathlib import Path

import numpy as np
import report
import torch

from kdlib.corpus.importers.uaspeech import word_list
from kdlib.decode.calibration import CalibratedLexicon
from kdlib.decode.calibration_fit import Sample, fit
from kdlib.decode.lexicon import Lexicon
from kdlib.models import Emissions
from kdlib.runtime import set_threads
from kdlib.settings.evaluation import Calibration
from kdlib.tokens import Tokens, train_tokenizer

FULL, SMOKE = (
    (455, 8, 1785, 5000, 1200, 7),
    (20, 2, 32, 50, 32, 1),
)  # words, utterances, of a fold, words of a large lexicon, utterances to fit on, rounds
BATCH = 32
PEER = "loop of `F.ctc_loss`"


def random_emissions(count: int, size: int, seed: int = 0) -> Emissions:
    """Random logits of 15 to 60 frames: 0.6 to 2.4 s of 40 ms."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(15, 61, (count,), generator=generator).sort().values
    logits = 3 * torch.randn(count, int(lengths.max()), size, generator=generator)
    return Emissions(logits, lengths)


def loop(lexicon: Lexicon, emissions: Emissions, blank: int) -> torch.Tensor:
    """A call of `F.ctc_loss` for each word."""
    logprobs = emissions.logits.log_softmax(-1)
    rows = []
    for frames, length in zip(logprobs, emissions.lengths, strict=True):
        losses = [
            torch.nn.functional.ctc_loss(
                frames[:length], torch.tensor(ids), length, torch.tensor(len(ids)), blank=blank, reduction="none"
            )
            for ids in lexicon.sequences
        ]
        rows.append(-torch.stack(losses))
    return torch.stack(rows)


def batched(lexicon: Lexicon, emissions: Emissions, blank: int) -> torch.Tensor:
    """One call of `F.ctc_loss` for all words of an utterance."""
    ids = [torch.tensor(one) for one in lexicon.sequences]
    sizes, flat = torch.tensor([len(one) for one in ids]), torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    logprobs = emissions.logits.log_softmax(-1)
    rows = []
    for frames, length in zip(logprobs, emissions.lengths.tolist(), strict=True):
        many = frames[:length, None].expand(-1, len(ids), -1)
        lengths = torch.full((len(ids),), length)
        rows.append(-torch.nn.functional.ctc_loss(many, flat, lengths, sizes, blank=blank, reduction="none"))
    return torch.stack(rows)


def sample(lexicon: Lexicon, tokens: Tokens, count: int) -> Sample:
    """Scored utterances, each with one of its ten best words as the reference."""
    scores = torch.cat(
        [
            lexicon.scores(random_emissions(min(BATCH, count - first), tokens.size, first))
            for first in range(0, count, BATCH)
        ]
    ).numpy()
    rng = np.random.default_rng(0)
    places = np.argsort(-scores, 1)[np.arange(count), rng.integers(0, 10, count)]
    return Sample(
        scores, [lexicon.words[place] for place in places], ["S"] * count, np.full(tokens.size, 1 / tokens.size)
    )


def main() -> None:
    run = report.start(__file__, __doc__)
    set_threads()
    count, few, fold, large, to_fit, rounds = SMOKE if run.smoke else FULL
    words = sorted(set(word_list().values()))
    with tempfile.TemporaryDirectory() as folder:
        tokens = Tokens.for_nemo(train_tokenizer(words, 256, Path(folder), lower=True).read_bytes())
    pairs = [f"{a} {b}" for a, b in itertools.islice(itertools.product(words, words), large)]
    lexicon, many = Lexicon([*words, *pairs][:count], tokens), Lexicon(pairs, tokens)
    emissions, batch = random_emissions(few, tokens.size), random_emissions(BATCH, tokens.size)
    everything = [random_emissions(min(BATCH, fold - first), tokens.size, first) for first in range(0, fold, BATCH)]
    small_sample, large_sample = (sample(words_of, tokens, to_fit) for words_of in (lexicon, many))
    calibrated = CalibratedLexicon(lexicon, fit(small_sample, lexicon, tokens, Calibration()))
    forms = {
        PEER: lambda: loop(lexicon, emissions, tokens.blank),
        "one batched `F.ctc_loss`": lambda: batched(lexicon, emissions, tokens.blank),
        "kdlib": lambda: lexicon.scores(emissions),
        "kdlib, calibrated": lambda: calibrated.scores(emissions),
    }
    exact, ours = forms[PEER]().double(), forms["kdlib"]()
    difference = float((ours - exact)[exact.isfinite()].abs().max())
    found = report.against(report.interleaved(forms, rounds), PEER)
    rows = [
        {"scores by": name, "utterances per second": few / seconds, "times as fast as the loop": 1 / ratio}
        for name, (seconds, ratio) in found.items()
    ]
    alone = {
        "fold": lambda: [lexicon.scores(one) for one in everything],
        "large": lambda: many.scores(batch),
        "fit": lambda: fit(small_sample, lexicon, tokens, Calibration()),
        "large fit": lambda: fit(large_sample, many, tokens, Calibration()),
    }
    seconds = {name: statistics.median(some) for name, some in report.interleaved(alone, rounds).items()}
    run.save(
        rows,
        [
            f"The largest difference between the scores of kdlib and of the loop is {difference:.1g} nats.",
            f"kdlib scores a fold of {fold:,} utterances in {seconds['fold']:.2g} s, and with a lexicon of {large:,} "
            f"entries {BATCH / seconds['large']:,.0f} utterances per second.",
            f"A calibration is fitted on {to_fit:,} scored utterances in {seconds['fit']:.2g} s, and with {large:,} "
            f"entries in {seconds['large fit']:.2g} s.",
        ],
    )


if __name__ == "__main__":
    main()
