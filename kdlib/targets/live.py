"""Teachers that run in every step on the student's own inputs, at the same tempo.

On unchanged recordings their targets are those of their stores, up to what half precision leaves out there.
"""

from collections.abc import Mapping

import torch

from kdlib.corpus.inputs import Batch
from kdlib.logits.store import LogitStore
from kdlib.models.decoder import teacher_forced
from kdlib.models.hybrid import Hybrid
from kdlib.targets.aggregation import TeacherEnsemble


class LiveModel:
    """A teacher's model; a batch is encoded once for all its outputs."""

    def __init__(self, model: Hybrid) -> None:
        self.model = model.eval().requires_grad_(False)
        self._last: tuple[Batch, tuple] | None = None

    def encoded(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodings [B, T, D] and frames [B] of a batch, on the device of its inputs."""
        if self._last is None or self._last[0] is not batch:
            self.model.to(batch.inputs.device)
            with torch.no_grad():
                self._last = batch, self.model.encoder.of_batch(batch)[:2]
        return self._last[1]


class LiveTeacher:
    """One output of a teacher, computed where its store reads: a `Teacher` of an ensemble."""

    def __init__(self, live: LiveModel, stored: LogitStore) -> None:
        self.header, self._live, self._stored = stored.header, live, stored
        head = live.model.ctc_head if self.header.output == "ctc" else live.model.decoder.head
        self.head = head.weight.detach(), head.bias.detach()

    def __contains__(self, utt_id: str) -> bool:
        return utt_id in self._stored

    def activations(self, batch: Batch) -> list[torch.Tensor | None]:
        """[T, width] of each utterance; None where the store has none."""
        values, lengths = self._live.encoded(batch)
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
