"""Names that fit, and spectrograms."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from kdlib.show import drawing


def test_spectrogram_shows_a_tone_at_its_frequency_and_time():
    samples = np.sin(2 * np.pi * 2000 * np.arange(16000) / 16000).astype(np.float32)
    figure, axes = plt.subplots()
    assert drawing.spectrogram(axes, samples, 0.5) == pytest.approx(1.5)
    (image,) = axes.get_images()
    rows = image.get_array().mean(1)
    low, high = image.get_extent()[2:]
    assert low + (high - low) * (rows.argmax() + 0.5) / len(rows) == pytest.approx(2.0, abs=0.05)
    plt.close(figure)


@pytest.mark.parametrize("text", ["i", "Speaker", "WWWWWWW"])
def test_the_width_of_a_text_is_that_of_the_renderer(text):
    """But for the space beside the first and the last letter."""
    figure, axes = plt.subplots(dpi=720)
    shown = axes.text(0, 0, text, fontsize=8)
    assert drawing.text_width(text, 8) == pytest.approx(shown.get_window_extent().width / 10, abs=1.5)
    plt.close(figure)


def test_long_names_lose_their_middle():
    assert drawing.short("Anna") == "Anna"
    assert drawing.short("speaker_0001_of_the_second_session") == "speaker_000…ession"
    assert len(drawing.short("x" * 100)) == 18
    names = {drawing.short(f"the same beginning of all names, {number:03}") for number in range(200)}
    assert len(names) == 200
