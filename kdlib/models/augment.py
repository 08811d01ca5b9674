"""Augmentation of the training speech: SpecAugment (Park et al. 2019) and tempo.

Random numbers are torch's, which the training loop seeds before every batch.
"""

import torch

MASKS = 2  # of each type
BAND_SHARE, MAX_FRAMES, MAX_SHARE = 0.2, 20, 0.25  # of the bands; frames of 10 ms, and of the utterance
TEMPO = 0.12  # tempo and pitch change by up to this share


def spec_augment(features: torch.Tensor) -> torch.Tensor:
    """Set some bands and some frames of each utterance of [B, bands, T] to 0, which is their mean."""
    from torchaudio.transforms import FrequencyMasking, TimeMasking

    bands = FrequencyMasking(max(1, int(BAND_SHARE * features.shape[1])), iid_masks=True)
    frames = TimeMasking(MAX_FRAMES, iid_masks=True, p=MAX_SHARE)
    changed = features[:, None]
    for _ in range(MASKS):
        changed = frames(bands(changed))
    return changed[:, 0]


def change_tempo(samples: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Play a batch [B, N] slower or faster; return it with its new lengths."""
    factor = 1 + TEMPO * (2 * float(torch.rand(())) - 1)
    changed = torch.nn.functional.interpolate(samples[:, None], scale_factor=factor, mode="linear")[:, 0]
    return changed, (lengths * factor).long().clamp(1, changed.shape[1])
