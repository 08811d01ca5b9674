"""Teachers that run in every step on the student's own inputs, at the same tempo.

On unchanged recordings their targets are those of their stores, up to what half precision leaves out there.
"""

from collections.abc import Mapping

import torch

from kdlib.corpus.inputs import Batch
from kdlib.logits.store import LogitStore
from kdlib.models.decoder import teacher_forced
from kdlib.models.encoder import Encoded
from kdlib.models.hybrid import Hybrid
from kdlib.objectives.terms import LAYER
from kdlib.targets.aggregation import TeacherEnsemble


class LiveModel:
    """A teacher's model; a batch is encoded once for all its outputs."""

    def __init__(self, model: Hybrid, layers: tuple[int, ...] = ()) -> None:
        self.model, self.layers = model.eval().requires_grad_(False), layers
        self._last: tuple[Batch, Encoded] | None = None

    def encoded(self, batch: Batch) -> Encoded:
        """The encoder's output on a batch, on the device of its inputs."""
        if self._last is None or self._last[0] is not batch:
            self.model.to(batch.inputs.device)
            with torch.no_grad():
                self._last = batch, self.model.encoder.of_batch(batch, self.layers)
        return self._last[1]


class LiveTeacher:
    """One output of a teacher, computed where its store reads: a `Teacher` of an ensemble."""

    def __init__(self, live: LiveModel, stored: LogitStore) -> None:
        self.header, self._live, self._stored = stored.header, live, stored
        heads = {"ctc": live.model.ctc_head, "decoder": live.model.decoder and live.model.decoder.head}
        head = heads.get(self.header.output)
        self.head = head and (head.weight.detach(), head.bias.detach())  # a layer has none

    def __contains__(self, utt_id: str) -> bool:
        return utt_id in self._stored

    def activations(self, batch: Batch) -> list[torch.Tensor | None]:
        """[T, width] of each utterance; None where the store has none."""
        values, lengths, hidden = self._live.encoded(batch)
        if self.header.output.startswith(LAYER):
            values = hidden[int(self.header.output.removeprefix(LAYER))]
        if self.header.output == "decoder":
            inputs, _, steps = teacher_forced(batch.ids)
            with torch.no_grad():
                values = self._live.model.decoder.activations(values, lengths, inputs.to(values.device))
            lengths = steps
        rows = zip(batch.utt_ids, values, lengths.tolist(), strict=True)
        return [row[:length] if utt_id in self else None for utt_id, row, length in rows]


def live_ensemble(ensemble: TeacherEnsemble, models: Mapping[str, LiveModel]) -> TeacherEnsemble:
    """The ensemble with teachers that run in every step."""
    teachers = {name: LiveTeacher(models[name], store) for name, store in ensemble.stores.items()}
    return TeacherEnsemble(teachers, ensemble.weighting, ensemble.excluded)
