import torch

from kdlib.models import augment


def test_masks_cover_some_bands_and_frames_and_nothing_else():
    torch.manual_seed(0)
    features = torch.rand(8, 40, 150) + 1
    changed = augment.spec_augment(features)
    kept = changed != 0
    assert torch.equal(changed[kept], features[kept])
    assert 0 < float((~kept).float().mean()) < 0.7
    assert not torch.equal(kept[0], kept[1])  # each utterance has masks of its own


def test_the_tempo_changes_lengths_and_samples_alike():
    torch.manual_seed(0)
    samples, lengths = torch.rand(2, 16_000), torch.tensor([16_000, 8_000])
    seen = set()
    for _ in range(20):
        changed, frames = augment.change_tempo(samples, lengths)
        assert frames.max() <= changed.shape[1]
        assert abs(frames[0] / 16_000 - changed.shape[1] / 16_000) < 1e-3
        assert abs(frames[0] - 2 * frames[1]) <= 2
        assert 1 - augment.TEMPO - 0.01 <= frames[0] / 16_000 <= 1 + augment.TEMPO + 0.01
        seen.add(int(frames[0]))
    assert len(seen) > 10
