"""Ensembles of saved models: the mean of their outputs, or one model with the mean of their weights.

Outputs are averaged as log-probabilities (a geometric mean, normalised) or as probabilities, those of CTC per frame and
those of the decoder per step; encodings are concatenated. Averaging weights requires models of one shape that are close
to each other: of one run, or of one initialisation.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from kdlib.errors import UserError
from kdlib.models import Emissions, Outputs, hybrid
from kdlib.models.decoder import greedy
from kdlib.runtime import set_threads, torch_device

Average = Literal["outputs", "probabilities", "weights"]
Member = tuple[Path, str]  # the folder of a saved model, and one of its weight files


def checkpoint_file(rank: int) -> str:
    """The file of a student's weights at one of its best checkpoints, 1 being the best."""
    return f"best{rank}.safetensors"


class OutputEnsemble(nn.Module):
    """Models of one tokenizer and one stride as one model, with the decoding interface of a `Hybrid`."""

    def __init__(self, members: Sequence[hybrid.Hybrid], average: Average = "outputs") -> None:
        super().__init__()
        self.members, self.average = nn.ModuleList(members), average
        self.widths = [member.encoder.width for member in members]

    def forward(self, wavs: torch.Tensor, wav_lens: torch.Tensor) -> Outputs:
        """Samples [B, N] and their lengths [B] -> `Outputs`, with all members' encodings [B, T, D1 + D2 + ...]."""
        outputs = [member(wavs, wav_lens) for member in self.members]
        lengths = outputs[0].lengths
        if any(not torch.equal(output.lengths, lengths) for output in outputs):
            raise UserError("ensemble: the models' numbers of frames differ; choose models of one stride")
        encoded = torch.cat([output.encoded for output in outputs], -1)
        return Outputs(Emissions(self._mean([output.ctc.logits for output in outputs]), lengths), encoded)

    def ctc_head(self, encoded: torch.Tensor) -> torch.Tensor:
        """The mean of the members' CTC outputs, [B, T, V]."""
        return self._mean([member.ctc_head(part) for member, part in self._split(encoded)])

    def forward_decoder(self, encoded: torch.Tensor, targets: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The mean of the members' decoder outputs, [B, L, V]."""
        return self._mean([member.forward_decoder(part, targets, lengths) for member, part in self._split(encoded)])

    def decode_greedy(self, encoded: torch.Tensor, max_len: int, lengths: torch.Tensor) -> list[list[int]]:
        """Decode greedily with the mean of the members' decoders."""
        return greedy(lambda part, frames, ids: self.forward_decoder(part, ids, frames), encoded, lengths, max_len)

    def _split(self, encoded: torch.Tensor) -> list[tuple[hybrid.Hybrid, torch.Tensor]]:
        return list(zip(self.members, encoded.split(self.widths, -1), strict=True))

    def _mean(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        logprobs = torch.stack([part.log_softmax(-1) for part in logits])
        if self.average == "probabilities":
            return logprobs.logsumexp(0) - math.log(len(logits))
        return logprobs.mean(0).log_softmax(-1)


class EnsembleSystem:
    """Saved models for evaluation as one system: samples in, `Outputs` out, with their tokens."""

    def __init__(self, members: Sequence[Member], average: Average = "outputs", device: str = "auto") -> None:
        set_threads()
        self.device = torch_device(device)
        loaded = [hybrid.load(folder, file) for folder, file in members]
        (first, self.tokens, record), self.path = loaded[0], members[0][0]
        for (folder, _), (model, tokens, fields) in zip(members, loaded, strict=True):
            if tokens.fingerprint != self.tokens.fingerprint:
                raise UserError(f"ensemble: {folder} has other tokens than {self.path}; choose models of one tokenizer")
            if fields["heads_trained"] != record["heads_trained"]:
                raise UserError(f"ensemble: {folder} has other trained heads than {self.path}; choose others")
            if average == "weights" and hybrid.describe(model) != hybrid.describe(first):
                raise UserError(f"ensemble: {folder} has another shape than {self.path}; set average: outputs")
        models = [model for model, _, _ in loaded]
        self.stride_ms = models[0].encoder.stride_ms
        self.model = average_weights(models) if average == "weights" else OutputEnsemble(models, average)
        self.model.eval().to(self.device)
        records = [fields for _, _, fields in loaded]
        speakers = sorted({name for fields in records for name in fields["train_speakers"]})
        without = {name for fields in records for name in fields.get("labels", {}).get("unlabelled_speakers", ())}
        labels = record.get("labels", {"fraction": 1.0}) | ({"unlabelled_speakers": sorted(without)} if without else {})
        self.record = {"train_speakers": speakers, "heads_trained": record["heads_trained"], "labels": labels}

    def __call__(self, samples: torch.Tensor, lengths: torch.Tensor) -> Outputs:
        """Samples [B, N] and their lengths [B] -> CTC logits and encodings."""
        with torch.inference_mode():
            return self.model(samples.to(self.device), lengths.to(self.device))


def save_average(partial: Path, folders: Sequence[Path]) -> None:
    """Write the model with the mean of the weights of saved ones, trained on the speakers of all."""
    loaded = [hybrid.load(folder) for folder in folders]
    tokens, described = loaded[0][1], hybrid.describe(loaded[0][0])
    for folder, (model, its_tokens, _) in zip(folders, loaded, strict=True):
        if hybrid.describe(model) != described or its_tokens.fingerprint != tokens.fingerprint:
            raise UserError(
                f"teacher.average_weights: {folder} has another shape, or other tokens, than {folders[0]}; weights can "
                "be averaged of models of one shape alone: leave this teacher out"
            )
    records = [fields for _, _, fields in loaded]
    if any(fields.get("labels") != records[0].get("labels") for fields in records):
        raise UserError("teacher.average_weights: the teachers were trained with different labels; name others")
    speakers = sorted({name for fields in records for name in fields["train_speakers"]})
    about = {"train_speakers": speakers, "averaged": ["/".join(folder.parts[-2:]) for folder in folders]}
    about |= {"labels": records[0]["labels"]} if records[0].get("labels") else {}
    hybrid.save(average_weights([model for model, _, _ in loaded]), tokens, partial, **about)


def average_weights(models: Sequence[hybrid.Hybrid]) -> hybrid.Hybrid:
    """Return the first model with the mean of all weights and statistics; it keeps its integer counts."""
    states = [model.state_dict() for model in models]
    mean = {
        name: torch.stack([state[name] for state in states]).mean(0) if weight.is_floating_point() else weight
        for name, weight in states[0].items()
    }
    models[0].load_state_dict(mean)
    return models[0]
