import torch

from kdlib.models import augment


def test_masks_change_only_some_bands_and_frames():
    torch.manual_seed(0)
    features = torch.rand(8, 40, 150) + 1
    changed = augment.spec_augment(features)
    unmasked = changed != 0
    assert torch.equal(changed[unmasked], features[unmasked])
    assert 0 < float((~unmasked).float().mean()) < 0.7
    assert not torch.equal(unmasked[0], unmasked[1])  # each utterance has its own masks


def test_the_tempo_changes_lengths_and_samples_equally():
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
