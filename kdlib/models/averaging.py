"""Several saved models as one system: the mean of what they say, or one model with the mean of their weights.

Outputs are averaged as log-probabilities (a geometric mean, normalised) or as probabilities, of CTC by frame and of the
decoder by step; their encodings stand side by side. Weights are averaged one by one, which asks for models of one
shape that have not grown far apart: of one run, or of one start.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from kdlib.errors import UserError
from kdlib.models import Outputs, hybrid
from kdlib.models.decoder import greedy
from kdlib.runtime import set_threads

CODE = ("models/averaging.py", *hybrid.CODE)
Average = Literal["outputs", "probabilities", "weights"]
Member = tuple[Path, str]  # the folder of a saved model, and which of its files of weights


class OutputEnsemble(nn.Module):
    """Models of one set of tokens and one stride, answering as one; it has what a `Hybrid` has for decoding."""

    def __init__(self, members: Sequence[hybrid.Hybrid], average: Average = "outputs") -> None:
        super().__init__()
        self.members, self.average = nn.ModuleList(members), average
        self.widths = [member.encoder.width for member in members]

    def forward(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> Outputs:
        """Samples [B, N] and their numbers [B] -> `Outputs`, whose encodings are all members' [B, T, D1 + D2 + ...]."""
        heard = [member(wavs, wav_lens) for member in self.members]
        if any(not torch.equal(one.lengths, heard[0].lengths) for one in heard):
            raise UserError("an ensemble's models must have the same frames; these have not: average others")
        encoded = torch.cat([one.encoded for one in heard], -1)
        return Outputs(self._mean([one.ctc_logits for one in heard]), heard[0].lengths, encoded)

    def ctc_head(self, encoded: torch.Tensor) -> torch.Tensor:
        """The mean of what the members' CTC heads say, [B, T, V]."""
        return self._mean([one.ctc_head(part) for one, part in self._parts(encoded)])

    def forward_decoder(self, encoded: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The mean of what the members' decoders say, [B, L, V]."""
        return self._mean([one.forward_decoder(part, targets, lengths) for one, part in self._parts(encoded)])

    def decode_greedy(self, encoded: torch.Tensor, max_len: int, lengths: torch.Tensor) -> list[list[int]]:
        """What the members' decoders say together, the best token after the other."""
        return greedy(lambda heard, frames, said: self.forward_decoder(heard, said, frames), encoded, lengths, max_len)

    def _parts(self, encoded: torch.Tensor) -> list[tuple[hybrid.Hybrid, torch.Tensor]]:
        return list(zip(self.members, encoded.split(self.widths, -1), strict=True))

    def _mean(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        logprobs = torch.stack([one.log_softmax(-1) for one in logits])
        if self.average == "probabilities":
            return logprobs.logsumexp(0) - torch.tensor(len(logits)).log()
        return logprobs.mean(0).log_softmax(-1)


class EnsembleSystem:
    """Saved models that can be evaluated as one: samples in, `Outputs` out, with the tokens that they mean."""

    def __init__(self, members: Sequence[Member], average: Average = "outputs") -> None:
        set_threads()
        loaded = [hybrid.load(folder, file) for folder, file in members]
        (first, self.tokens, record), self.path = loaded[0], members[0][0]
        for (folder, _), (model, tokens, other) in zip(members, loaded, strict=True):
            if tokens.fingerprint != self.tokens.fingerprint:
                raise UserError(f"ensemble: {folder} writes in other tokens than {self.path}; average others")
            if other["heads_trained"] != record["heads_trained"]:
                raise UserError(f"ensemble: {folder} has other trained heads than {self.path}; average others")
            if average == "weights" and hybrid.describe(model) != hybrid.describe(first):
                raise UserError(f"ensemble: {folder} has another shape than {self.path}; write average: outputs")
        models = [model for model, _, _ in loaded]
        self.stride_ms = models[0].encoder.stride_ms
        self.model = average_weights(models) if average == "weights" else OutputEnsemble(models, average)
        self.model.eval()
        heard = sorted({name for _, _, one in loaded for name in one["train_speakers"]})
        without = {name for _, _, one in loaded for name in one.get("labels", {}).get("unlabelled_speakers", ())}
        told = record.get("labels", {"fraction": 1.0}) | ({"unlabelled_speakers": sorted(without)} if without else {})
        self.record = {"train_speakers": heard, "heads_trained": record["heads_trained"], "labels": told}

    def __call__(self, samples: torch.Tensor, lengths: torch.Tensor) -> Outputs:
        """Samples [B, N] and their numbers [B] -> CTC logits and encodings."""
        with torch.inference_mode():
            return self.model(samples, lengths)


def average_weights(models: Sequence[hybrid.Hybrid]) -> hybrid.Hybrid:
    """The first model with the mean of all weights and statistics; what is counted stays the first's."""
    states = [model.state_dict() for model in models]
    mean = {
        name: torch.stack([state[name] for state in states]).mean(0) if weight.is_floating_point() else weight
        for name, weight in states[0].items()
    }
    models[0].load_state_dict(mean)
    return models[0]
