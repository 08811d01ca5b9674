"""Names that fit, and spectrograms."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from kdlib.show import drawing
from kdlib.show.figures import style


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


def test_long_names_of_rows_leave_room_for_the_plot():
    names = ["hard - pretrained", "ctc_kd+encoder.two_stage+teachers.same_checkpoint - hard+encoder.two_stage"]
    for width in (3.3, 4.8, 6.5):
        with plt.rc_context(style()):
            figure, axes = plt.subplots(figsize=(4.8, 2), layout="constrained")
            drawing.row_names(axes, names)
            drawing.outside_legend(figure, [plt.Line2D([], [])] * 2, ["better", "worse"])
            figure.set_figwidth(width)
            drawing.fit_texts(figure)
            before = figure.get_figheight()
            drawing.fit_texts(figure)  # a second time changes nothing
            assert figure.get_figheight() == pytest.approx(before)
            figure.draw_without_rendering()
        place = axes.get_position()
        assert place.width > 0.4
        labels = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert min(box.x0 for box in labels) >= 0
        assert labels[0].y1 < labels[1].y0  # no name lies on another
        assert "".join(axes.get_yticklabels()[1].get_text().split()) == "".join(names[1].split())
        plt.close(figure)
