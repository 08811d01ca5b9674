"""Augmentation of the training speech."""

from typing import Literal

from pydantic import Field

from kdlib.settings import Section

Augmentation = Literal["none", "mask", "mask_and_tempo"]
# mask_and_matched_tempo: as long as the same words by the training speakers of the nearest intelligibility
StudentAugmentation = Literal[Augmentation, "mask_and_matched_tempo"]


class Masks(Section):
    """SpecAugment (Park et al. 2019): random bands and frames of the log-mel features are masked in training.

    Widths are drawn uniformly up to these shares of the bands, and of the utterance's own frames.
    """

    number: int = Field(2, ge=0, le=100)  # of bands, and of frames
    bands: float = Field(0.2, ge=0, le=1)
    frames: float = Field(0.1, ge=0, le=1)
    warmup: float = Field(0.3, ge=0, le=1)  # share of the training during which the masks grow to these widths
