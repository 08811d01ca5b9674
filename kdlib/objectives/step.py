"""One step of a training: a batch, the model's outputs on it, and the targets that its terms share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from kdlib.corpus.inputs import Batch
from kdlib.decode.lexicon import Lexicon
from kdlib.models import Emissions, Outputs
from kdlib.objectives.targets import HypothesisSource, TargetSource
from kdlib.settings.reference_loss import ReferenceLoss
from kdlib.settings.schedule import Progress

if TYPE_CHECKING:
    from kdlib.decode.beam import BeamSearch
    from kdlib.objectives.objective import Learner


T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """What an objective reads besides its batches."""

    targets: Mapping[str, TargetSource]  # by output: "ctc", "decoder"
    hypotheses: HypothesisSource | None = None
    lexicon: Lexicon | None = None
    search: "BeamSearch | None" = None  # over pieces, without a language model


class Step:
    """A batch, the outputs on it, and what terms need of both; everything is computed once."""

    def __init__(
        self,
        learner: "Learner",
        settings: ReferenceLoss,
        sources: Sources,
        batch: Batch,
        now: Progress,
        outputs: Outputs,
        of_average: Callable[[], Emissions] | None = None,
    ) -> None:
        self.learner, self.settings, self.batch = learner, settings, batch
        self.targets, self.hypotheses, self.lexicon = sources.targets, sources.hypotheses, sources.lexicon
        self.search = sources.search
        self.now, self.outputs, self.of_average = now, outputs, of_average
        self._taught: dict[str, list[int]] = {}
        self._made: dict[str, Any] = {}

    @cached_property
    def labelled(self) -> list[int]:
        """The rows that have a transcript."""
        return [row for row, ids in enumerate(self.batch.ids) if ids]

    def taught(self, output: str) -> list[int]:
        """The rows that have an output of the teachers."""
        if output not in self._taught:
            self._taught[output] = self.targets[output].rows(self.batch)
        return self._taught[output]

    def of(self, values: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Some rows of values by utterance; without a copy if these are all."""
        return values if len(rows) == len(self.batch) else values[rows]

    def emissions(self, rows: Sequence[int]) -> Emissions:
        """CTC outputs of some rows, as long as the longest."""
        lengths = self.of(self.outputs.lengths, rows)
        return Emissions(self.of(self.outputs.ctc.logits, rows)[:, : int(lengths.max())], lengths)

    def head_lengths(self, head: str) -> torch.Tensor:
        """[B]: frames, or decoder steps, of each utterance without padding."""
        return head_lengths(head, self.outputs, self.batch)

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What several terms share: made by the first that asks for it."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    @cached_property
    def pseudo_labels(self) -> tuple[list[int], list[list[int]], torch.Tensor]:
        """The teachers' texts: the row of each, its ids, and its weight."""
        settings, rows = self.settings.sequence, self.taught("ctc")
        which, ids, weights = [], [], []
        nbest = self.hypotheses.texts(self.batch.select(rows), settings.nbest, settings.hypotheses_from)
        for row, texts in zip(rows, nbest, strict=True):
            if not texts or texts[0][1] < settings.confidence:
                continue
            total = 1.0 if settings.weight_by_confidence else sum(share for _, share in texts)
            which += [row] * len(texts)
            ids += [text for text, _ in texts]
            weights += [share / total for _, share in texts]
        return which, ids, torch.tensor(weights)

    @cached_property
    def inner_logits(self) -> torch.Tensor:
        """The CTC head on an inner layer, [B, T, V]."""
        head = self.learner.intermediate_head or self.learner.student.ctc_head
        return head(self.outputs.hidden[self.settings.intermediate.layer])

    @cached_property
    def word_places(self) -> dict[str, int]:
        """The words of the lexicon and their indices in it."""
        return {word: place for place, word in enumerate(self.lexicon.words)}


def head_lengths(head: str, outputs: Outputs, batch: Batch) -> torch.Tensor:
    """[B]: frames, or decoder steps, of each utterance without padding."""
    if head == "ctc":
        return outputs.lengths
    return torch.tensor([len(ids) + 1 for ids in batch.ids]).to(outputs.encoded.device)
