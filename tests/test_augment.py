import pytest
import torch
from corpora import utterances
from torchaudio.transforms import FrequencyMasking, TimeMasking

from kdlib.corpus.inputs import Batch
from kdlib.models import augment
from kdlib.settings.augment import Masks

DRAWS = 4000


def masked(masks: Masks, lengths: torch.Tensor, done: float = 1.0, bands: int = 40) -> torch.Tensor:
    """Which values of features of ones are masked, [B, bands, T]."""
    augmentation = augment.SpecAugment(masks)
    augmentation.done = done
    return augmentation(torch.ones(len(lengths), bands, int(lengths.max())), lengths) == 0


def test_masks_change_only_some_bands_and_frames():
    torch.manual_seed(0)
    features, lengths = torch.rand(8, 40, 150) + 1, torch.full((8,), 150)
    augmentation = augment.SpecAugment(Masks(warmup=0))
    changed = augmentation(features, lengths)
    unmasked = changed != 0
    assert torch.equal(changed[unmasked], features[unmasked])
    assert 0 < float((~unmasked).float().mean()) < 0.7
    assert not torch.equal(unmasked[0], unmasked[1])  # each utterance has its own masks


def test_masks_have_the_statistics_of_torchaudios():
    torch.manual_seed(0)
    masks, bands, frames = Masks(number=1, bands=0.2, frames=0.1), 40, 150
    ours = masked(masks, torch.full((DRAWS,), frames))
    ones = torch.ones(DRAWS, 1, bands, frames)
    limits = int(0.2 * bands), int(0.1 * frames)
    theirs = (FrequencyMasking(limits[0], iid_masks=True)(ones)[:, 0] == 0).all(2)
    theirs_frames = (TimeMasking(limits[1], iid_masks=True)(ones)[:, 0] == 0).all(1)
    for found, expected in ((ours.all(2), theirs), (ours.all(1), theirs_frames)):
        widths, known = found.sum(1).float(), expected.sum(1).float()
        assert abs(widths.mean() - known.mean()) < 4 * known.std() * (2 / DRAWS) ** 0.5
        assert abs(widths.std() - known.std()) < 0.1 * known.std()
        assert widths.max() <= known.max()
        share, known = found.float().mean(0), expected.float().mean(0)  # where they stand
        assert (share - known).abs().max() < 6 * (known.max() * 2 / DRAWS) ** 0.5


def test_masks_of_frames_scale_with_each_utterance():
    torch.manual_seed(0)
    lengths = torch.tensor([40, 400]).repeat(DRAWS)
    found = masked(Masks(number=1, bands=0.0, frames=0.2), lengths)[:, 0]
    inside = torch.arange(400) < lengths[:, None]
    assert not (found & ~inside).any()
    widths = found.sum(1).float()
    short, long = widths[0::2], widths[1::2]
    assert short.max() <= 8
    assert long.max() <= 80
    assert long.mean() / short.mean() == pytest.approx(10, rel=0.15)  # whole frames


def test_masks_grow_during_the_warmup():
    torch.manual_seed(0)
    masks, lengths = Masks(warmup=0.5), torch.full((400,), 100)
    shares = [float(masked(masks, lengths, done).float().mean()) for done in (0.0, 0.1, 0.25, 0.5, 1.0)]
    assert shares[0] == 0
    assert shares[0] < shares[1] < shares[2] < shares[3]
    assert shares[4] == pytest.approx(shares[3], rel=0.1)
    assert not masked(Masks(number=0), lengths).any()


def test_the_tempo_changes_lengths_and_features_equally():
    torch.manual_seed(0)
    rising = torch.linspace(0, 1, 100)[None, :, None].repeat(2, 1, 3)
    lengths, seen = torch.tensor([100, 50]), set()
    for _ in range(20):
        factor = augment.draw_tempo()
        changed, frames = augment.stretch(rising, lengths, factor)
        assert 1 - augment.TEMPO <= factor <= 1 + augment.TEMPO
        assert changed.shape == (2, int(100 * factor), 3)
        assert frames.tolist() == [int(100 * factor), int(50 * factor)]
        assert torch.allclose(changed[0, :, 0].diff()[2:-2], torch.tensor(1 / 99 / factor), rtol=0.02)
        seen.add(int(frames[0]))
    assert len(seen) > 10
    assert augment.stretch(rising, lengths, 1.0)[0] is rising


def test_each_row_may_have_its_own_tempo():
    rising = torch.linspace(0, 1, 100)[None, :, None].repeat(2, 1, 3)
    lengths = torch.tensor([100, 50])
    changed, frames = augment.stretch(rising, lengths, (1.5, 0.8))
    assert (changed.shape, frames.tolist()) == ((2, 150, 3), [150, 40])
    assert not changed[1, 40:].any()
    for row, factor in ((0, 1.5), (1, 0.8)):
        alone, length = augment.stretch(rising[row : row + 1, : lengths[row]], lengths[row : row + 1], factor)
        assert torch.equal(changed[row, : int(length)], alone[0])


def test_factors_are_drawn_from_those_of_the_speaker():
    torch.manual_seed(0)
    drawn = [augment.draw_matched(["A", "B"], {"A": [2.0], "B": [0.5, 1.0]}) for _ in range(50)]
    assert all(2 * (1 - augment.TEMPO) <= a <= 2 * (1 + augment.TEMPO) for a, _ in drawn)
    assert {round(b / 0.5) for _, b in drawn} == {1, 2}


def test_a_batch_keeps_the_tempo_of_its_rows():
    batch = Batch(utterances("a", "b", "c")).stretched((1.1, 1.2, 1.3))
    assert batch.select([2, 0]).tempo == (1.3, 1.1)
    assert batch.stretched(1.4).select([1]).tempo == 1.4
