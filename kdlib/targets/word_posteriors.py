"""Posteriors over the words of the closed lexicon as targets, of a set of utterances: for adaptation."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from kdlib.corpus import audio
from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.decode.lexicon import Lexicon
from kdlib.models import hybrid
from kdlib.objectives.objective import Objective
from kdlib.objectives.targets import Text
from kdlib.runtime import seed_everything
from kdlib.tokens import Tokens

PASSES = 5  # with dropout, for `agreement`


class Recogniser(Protocol):
    """What gives a posterior over the words of the lexicon."""

    def posterior(self, batch: Batch) -> torch.Tensor:
        """[B, W]: of every utterance of a batch."""
        ...


class StudentRecogniser(NamedTuple):
    """A trained student with its calibrated lexicon."""

    model: hybrid.Hybrid
    lexicon: Lexicon

    def posterior(self, batch: Batch) -> torch.Tensor:
        """[B, W]: of every utterance of a batch."""
        moved = batch.to(next(self.model.parameters()).device)
        return self.lexicon.posterior(self.model(moved.inputs, moved.lengths).ctc).float()


def word_posteriors(recognisers: Sequence[Recogniser], speech: Sequence[Utterance]) -> dict[str, torch.Tensor]:
    """The mean posterior [W] of some recognisers over their lexicon, by utterance."""
    found: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for part in audio.batches(speech, 32):
            batch = Batch(part)
            rows = [one.posterior(batch) for one in recognisers]
            found |= dict(zip(batch.utt_ids, torch.stack(rows).mean(0).clone(), strict=True))
    return found


def agreement(recogniser: StudentRecogniser, speech: Sequence[Utterance], best: dict[str, int]) -> dict[str, float]:
    """The share of passes with dropout that recognise the same word as `best`, by utterance."""
    model = recogniser.model
    same: Counter[str] = Counter()
    masks, model.encoder.spec_augment = model.encoder.spec_augment, None
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    for number in range(PASSES):
        seed_everything(number)
        for name, row in word_posteriors([recogniser], speech).items():
            same[name] += int(row.argmax()) == best[name]
    model.eval()
    model.encoder.spec_augment = masks
    return {utt.utt_id: same[utt.utt_id] / PASSES for utt in speech}


class WordTargets:
    """Posteriors over the words as targets: a `TargetSource` of rows, and a `HypothesisSource`."""

    width = 0

    def __init__(self, lexicon: Lexicon, tokens: Tokens, posteriors: dict[str, torch.Tensor]) -> None:
        self.lexicon, self.posteriors = lexicon, posteriors
        self._ids = [tokens.encode(word) for word in lexicon.words]

    def rows(self, batch: Batch) -> list[int]:
        """The rows of a batch that are adaptation speech with a target."""
        return [row for row, name in enumerate(batch.utt_ids) if name in self.posteriors]

    def posterior(self, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """[B, W]: the posterior over the words."""
        rows = [self.posteriors[name] for name in batch.utt_ids]
        return _at(torch.stack(rows) if rows else torch.zeros(0, len(self.lexicon.words)), temperature)

    def texts(self, batch: Batch, count: int = 1, over: str = "lexicon") -> list[list[Text]]:
        """The most probable words of every utterance, best first."""
        best = self.posterior(batch).topk(min(count, len(self._ids)), 1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [[(self._ids[place], share) for place, share in zip(*row, strict=True)] for row in pairs]


class AverageTargets(WordTargets):
    """Posteriors by the moving average of the weights as it is now; `posteriors` only names the utterances."""

    objective: Objective | None = None
    calibrated: Lexicon

    def posterior(self, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
        """[B, W]: the posterior over the words, on speech without masks."""
        return _at(self.calibrated.posterior(self.objective.of_average(batch)).float(), temperature)


def _at(posteriors: torch.Tensor, temperature: float) -> torch.Tensor:
    """Posteriors [B, W] at a temperature."""
    powers = posteriors ** (1 / temperature)
    return powers / powers.sum(1, keepdim=True).clamp_min(1e-12)
