"""Augmentation of the training speech: SpecAugment (Park et al. 2019) and tempo.

Random numbers are torch's, which the training loop seeds before every batch.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from kdlib.settings.augment import Masks, StudentAugmentation

TEMPO = 0.12  # changes by up to this share


class Augmented(Protocol):
    """The settings of a training's augmentation."""

    augment: StudentAugmentation
    masks: Masks


class SpecAugment:
    """Masks of bands and frames for a training; `done`, the share of its steps that have passed, scales their width."""

    def __init__(self, masks: Masks) -> None:
        self.masks, self.done = masks, 0.0

    @classmethod
    def of(cls, settings: Augmented) -> "SpecAugment | None":
        """The masks of a section of a recipe; None where it has none."""
        return cls(settings.masks) if settings.augment != "none" else None

    @property
    def scale(self) -> float:
        """Share of the full width that masks have now."""
        return min(1.0, self.done / self.masks.warmup) if self.masks.warmup else 1.0

    def __call__(self, features: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Set some bands and frames of features [B, F, T] to 0, which is their mean; `lengths` counts frames."""
        number, scale, bands = self.masks.number, self.scale, features.shape[1]
        if not number or not scale:
            return features
        sizes = torch.full_like(lengths, bands)
        masked_bands = _spans(sizes, scale * self.masks.bands, number, bands)
        masked_frames = _spans(lengths, scale * self.masks.frames, number, features.shape[2])
        return features.masked_fill(masked_bands[:, :, None] | masked_frames[:, None, :], 0.0)


def _spans(sizes: torch.Tensor, share: float, number: int, longest: int) -> torch.Tensor:
    """[B, longest]: true within `number` random spans of each row, each up to a share of the row's size."""
    sizes = sizes[:, None].float()
    widths = torch.rand(len(sizes), number, device=sizes.device) * share * sizes
    starts = (torch.rand(len(sizes), number, device=sizes.device) * (sizes - widths)).long()
    places = torch.arange(longest, device=sizes.device)
    inside = (places >= starts[..., None]) & (places < (starts + widths.long())[..., None])
    return inside.any(1)


def draw_tempo() -> float:
    """A random factor by which a batch becomes longer or shorter."""
    return 1 + TEMPO * (2 * float(torch.rand(())) - 1)


def draw_matched(speakers: Sequence[str], factors: Mapping[str, Sequence[float]]) -> tuple[float, ...]:
    """For every utterance one of its speaker's factors at random, and a small change of it."""
    drawn = [factors[name][int(torch.randint(len(factors[name]), ()))] for name in speakers]
    return tuple(factor * draw_tempo() for factor in drawn)


def draw_mix(count: int, strength: float) -> tuple[list[int], float]:
    """For every row of a batch another one, and the share of the other: at most a half (mixup, Zhang et al. 2018)."""
    share = float(torch.distributions.Beta(strength, strength).sample())
    return torch.randperm(count).tolist(), min(share, 1 - share)


def mixed(
    features: torch.Tensor, lengths: torch.Tensor, mix: tuple[Sequence[int], float] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, T, F] mixed with those of other rows; a row is as long as the longer of both."""
    if mix is None:
        return features, lengths
    rows, share = list(mix[0]), mix[1]
    return (1 - share) * features + share * features[rows], torch.maximum(lengths, lengths[rows])


def stretch(
    features: torch.Tensor, lengths: torch.Tensor, factor: float | Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stretch features [B, T, F] in time by a factor, or by each row's, the pitch stays; with their new lengths."""
    if factor == 1:
        return features, lengths
    if not isinstance(factor, float):
        rows = [
            stretch(row[None, :length], lengths[place : place + 1], float(one))
            for place, (row, length, one) in enumerate(zip(features, lengths.tolist(), factor, strict=True))
        ]
        changed = torch.nn.utils.rnn.pad_sequence([row[0] for row, _ in rows], batch_first=True)
        return changed, torch.cat([length for _, length in rows])
    changed = torch.nn.functional.interpolate(features.transpose(1, 2), scale_factor=factor, mode="linear")
    return changed.transpose(1, 2), (lengths * factor).long().clamp(1, changed.shape[2])
