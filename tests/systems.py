"""Simulated systems for tests: their hypotheses for a corpus and their posteriors, without a model."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdlib.corpus.utterances import Utterance
from kdlib.evaluate import score
from kdlib.evaluate.hypotheses import Hypothesis
from kdlib.evaluate.posteriors import PosteriorWriter
from kdlib.evaluate.score import About
from kdlib.settings.evaluation import Scoring
from kdlib.tokens import Tokens

STRIDE_MS = 40.0


def save(
    folder: Path,
    utterances: Sequence[Utterance],
    tokens: Tokens,
    wrong: float,
    seed: int,
    *,
    posteriors: bool = True,
    level=lambda speaker: "",
) -> Path:
    """Save the scores of a system with a share of `wrong` hypotheses, and posteriors that decode to its hypotheses."""
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    words = sorted({utt.text for utt in utterances})
    folder.mkdir(parents=True)
    writer, rows = PosteriorWriter(tokens, STRIDE_MS), []
    for utt in utterances:
        hypothesis = rng.choice(words) if rng.random() < wrong else utt.text
        ids = tokens.encode(hypothesis)
        rows.append(
            Hypothesis(
                utt.utt_id,
                utt.speaker,
                level(utt.speaker),
                utt.word_type,
                "yes" if len(utt.text) % 2 else "no",
                utt.text,
                greedy=hypothesis,
                lexicon=hypothesis if rng.random() < 0.8 else utt.text,
                n_tokens=len(ids),
                blank_share=0.7,
                token_ids=" ".join(map(str, ids)),
            )
        )
        if posteriors:
            writer.add(utt.utt_id, frames(ids, tokens, utt.duration_s, noise))
    score.write(
        rows,
        ("greedy", "lexicon"),
        folder,
        About(folder.name, "M08", "none"),
        tokens.fingerprint,
        Scoring(bootstrap=100),
    )
    if posteriors:
        writer.write(folder / "posteriors")
    return folder


def frames(ids: Sequence[int], tokens: Tokens, duration_s: float, noise: np.random.Generator) -> np.ndarray:
    """Log-probabilities of frames that decode to these ids, spread evenly over a recording, with noise."""
    count = max(2 * len(ids) + 1, int(1000 * duration_s / STRIDE_MS) + 1)
    logits = noise.normal(0, 1, (count, tokens.size))
    logits[:, tokens.blank] += 6
    for place, index in enumerate(ids):
        frame = int((place + 0.5) * count / len(ids))
        logits[frame, index] += 9
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def text_logprob(model, text: str) -> float:
    """log10 P of a text by an n-gram model, including the end of the text."""
    words = ["<s>", *(word for word in text.split(" ") if word), "</s>"]
    return sum(model.logprob(word, words[:index]) for index, word in enumerate(words) if index)
