import numpy as np
import pytest

from kdlib.corpus.embedded import dysarthria
from kdlib.corpus.embedded.espeak import RATE_HZ, Phone

WORD = ["k", "@", "m", "'aa", "n", "d"]


def traits(intelligibility, seed=0, duration=None):
    return dysarthria.draw_traits(intelligibility, 1.0, np.random.default_rng(seed), duration)


def edits(intelligibility, times=300):
    speaker = traits(intelligibility)
    words = (dysarthria.misarticulate(WORD, speaker, np.random.default_rng(seed)) for seed in range(times))
    return np.mean([word != WORD for word in words])


def test_healthy_speech_is_not_edited():
    assert edits(100) == 0


def test_edits_grow_with_severity():
    shares = [edits(intelligibility) for intelligibility in (95, 60, 30, 2)]
    assert shares == sorted(shares)
    assert shares[0] < 0.5  # at 95 %: six phones, each edited with a probability of 4-9 %
    assert shares[-1] > 0.8


def test_the_output_is_never_empty():
    speaker = traits(0)
    for seed in range(200):
        phones = dysarthria.misarticulate(["p"], speaker, np.random.default_rng(seed))
        assert any(phone != dysarthria.PAUSE for phone in phones)


def test_mild_speakers_do_not_stop_or_glide():
    assert set(traits(93).habits.values()) <= set().union(*(kind.values() for kind in dysarthria.MILD))


def tone_with_phones():
    samples = np.sin(2 * np.pi * 200 * np.arange(RATE_HZ // 2) / RATE_HZ)
    third = len(samples) // 3
    return samples, [Phone("s", 0, third), Phone("'aa", third, 2 * third), Phone("t", 2 * third, len(samples))]


@pytest.mark.parametrize("ratio", [0.8, 1.0, 2.0])
def test_stretching_gives_the_requested_length_and_keeps_the_pitch(ratio):
    samples, phones = tone_with_phones()
    slow = dysarthria._stretch(samples, *dysarthria._time_map(phones, ratio))
    assert len(slow) == pytest.approx(ratio * len(samples), rel=0.06)
    spectrum = np.abs(np.fft.rfft(slow))
    assert spectrum.argmax() * RATE_HZ / len(slow) == pytest.approx(200, abs=6)


def test_vowels_stretch_more_than_fricatives():
    _, phones = tone_with_phones()
    _, out = dysarthria._time_map(phones, 2.0)
    fricative, vowel, stop = np.diff(out)
    assert vowel > stop > fricative
    assert out[-1] == pytest.approx(2.0 * phones[-1].end)


def test_published_durations_are_used_where_they_are_known():
    assert (traits(2, duration=(1.41, 0.4)).ratio, traits(2, duration=(1.41, 0.4)).ratio_sd) == (1.41, 0.4)


def test_noise_is_the_same_for_all():
    voice = np.sin(np.arange(RATE_HZ) / 10)
    loud, quiet = (dysarthria.record(gain * voice, np.random.default_rng(3)) for gain in (1.0, 0.01))
    assert np.allclose(loud, quiet, atol=1e-4)
    assert np.abs(loud).max() < 1
