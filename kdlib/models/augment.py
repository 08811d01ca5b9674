"""Changes to speech that a model should not mind, while it is trained: SpecAugment (Park et al. 2019) and tempo.

Random numbers are torch's, which the training loop sets before every batch.
"""

import torch

CODE = ("models/augment.py",)
MASKS = 2  # of each kind
WIDEST_BAND, LONGEST, AT_MOST = 0.2, 20, 0.25  # of the bands; in frames of 10 ms, and of the utterance
TEMPO = 0.12  # tempo and pitch change by up to this share


def spec_augment(features: torch.Tensor) -> torch.Tensor:
    """[B, bands, T] with some bands and some frames of each utterance set to 0, which is their mean."""
    from torchaudio.transforms import FrequencyMasking, TimeMasking

    bands = FrequencyMasking(max(1, int(WIDEST_BAND * features.shape[1])), iid_masks=True)
    frames = TimeMasking(LONGEST, iid_masks=True, p=AT_MOST)
    changed = features[:, None]
    for _ in range(MASKS):
        changed = frames(bands(changed))
    return changed[:, 0]


def change_tempo(samples: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch [B, N] played slower or faster, with its new lengths."""
    factor = 1 + TEMPO * (2 * float(torch.rand(())) - 1)
    changed = torch.nn.functional.interpolate(samples[:, None], scale_factor=factor, mode="linear")[:, 0]
    return changed, (lengths * factor).long().clamp(1, changed.shape[1])
