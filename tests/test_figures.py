import itertools
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import soundfile

from kdlib.corpus.utterances import Utterance
from kdlib.logits import spikes
from kdlib.show import figures, live_curves

SCORES = pd.DataFrame(
    [
        {"speaker": speaker, "level": level, "decoder": decoder, "wra": wra, "low": wra - 0.05, "high": wra + 0.05}
        for speaker, level, wra in (("M04", "VERY_LOW", 0.1), ("M08", "HIGH", 0.7))
        for decoder in ("greedy", "lexicon")
    ]
)

LEAST_FIRST = "by intelligibility, least first"


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_figures_are_saved_as_pdf_and_png(tmp_path):
    path = figures.save(figures.wra_by_speaker(SCORES, "M08", LEAST_FIRST), tmp_path / "new", "wra")
    assert path == tmp_path / "new/wra.png"
    assert path.stat().st_size > 5_000
    assert (tmp_path / "new/wra.pdf").read_bytes().startswith(b"%PDF")


def assert_no_text_is_cut_off(figure):
    """All text lies within the figure."""
    figure.canvas.draw()
    box = figure.get_tightbbox()
    assert box.x0 >= -0.05
    assert box.y0 >= -0.05
    assert box.x1 <= figure.get_figwidth() + 0.05
    assert box.y1 <= figure.get_figheight() + 0.05


def assert_labels_are_apart(labels):
    """The boxes of neighbouring labels, as the renderer draws them, do not overlap."""
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    assert all(not one.overlaps(other) for one, other in itertools.pairwise(boxes))


def speakers(count, level="?", name="Speak{:02}"):
    """A figure's table of speakers with names of seven letters."""
    names = [name.format(index) for index in range(count)]
    wra = np.linspace(0.1, 0.9, count)
    return pd.DataFrame({"speaker": names, "level": level, "wra": wra, "low": wra - 0.1, "high": wra + 0.1})


def drawn(figure_of, table, order="by name"):
    """One of the figures that name every speaker."""
    if figure_of == "durations":
        return figures.durations(table.assign(median_s=table.wra, duration_ratio=np.nan, published_ratio=np.nan), order)
    if figure_of == "wra_by_speaker":
        both = [table.assign(decoder=decoder) for decoder in ("greedy", "lexicon")]
        return figures.wra_by_speaker(pd.concat(both), table.speaker[0], order)
    matrix = pd.DataFrame(1.0, index=table.speaker, columns=table.speaker)
    return figures.teacher_matrix({"greedy": matrix, "running free": matrix}, order)


SHOW_SPEAKERS = ("durations", "wra_by_speaker", "teacher_matrix")


def test_no_text_is_cut_off():
    assert_no_text_is_cut_off(figures.wra_by_speaker(SCORES, "M08", LEAST_FIRST))


@pytest.mark.parametrize(
    ("count", "name"),
    [(12, "Speak{:02}"), (12, "WWWWW{:02}"), (12, "a speaker of the second session, number {:02}"), (40, "Speak{:02}")],
)
@pytest.mark.parametrize("figure_of", SHOW_SPEAKERS)
def test_names_of_speakers_do_not_overlap(figure_of, count, name):
    figure = drawn(figure_of, speakers(count, name=name))
    assert_no_text_is_cut_off(figure)
    labels = figure.axes[-1].get_xticklabels()
    assert [label.get_text()[-2:] for label in labels] == [f"{index:02}" for index in range(count)]
    assert_labels_are_apart(labels)
    for axes in figure.axes:
        assert_labels_are_apart(axes.get_yticklabels())
        assert_labels_are_apart(axes.texts[:count])  # in the cells of a matrix


def test_few_short_names_are_not_turned():
    (turned,) = {
        tick.get_rotation() for tick in drawn("durations", speakers(15, name="M{:02}")).axes[0].get_xticklabels()
    }
    assert turned == 0


@pytest.mark.parametrize("figure_of", SHOW_SPEAKERS)
@pytest.mark.parametrize("order", ["by name", LEAST_FIRST])
def test_the_axis_says_what_the_speakers_are_ordered_by(figure_of, order):
    label = drawn(figure_of, speakers(4), order).axes[-1].get_xlabel()
    assert label.startswith(f"speaker, {order}")
    assert ("intelligib" in label) == (order != "by name")


def test_a_remark_on_the_times_is_part_of_the_spike_figure_and_is_not_cut_off():
    remark = spikes.Timing(40.0, 4.0, 5.0, 0.97, 1.0, 0.0).remark
    rows = {name: np.linspace(0, 1, 25) for name in ("alexandrina", "bartholomew", "weighted_similarity")}
    figure = figures.spikes(rows, 40.0, "SEVEN by bartholomew", remark)
    title = figure.get_suptitle()
    assert title.startswith("SEVEN by bartholomew\nthese times say nothing about the speech")
    assert "the clips are all of one length (1.00 s)" in title.replace("\n", " ")
    figure.canvas.draw()
    assert figure.get_tightbbox().x1 <= figure.get_figwidth() + 0.05
    assert figures.spikes(rows, 40.0, "SEVEN").get_suptitle() == "SEVEN"


def test_the_held_out_speaker_is_marked():
    figure = figures.wra_by_speaker(SCORES, "M08", LEAST_FIRST)
    weights = {tick.get_text(): tick.get_fontweight() for tick in figure.axes[0].get_xticklabels()}
    assert weights == {"M04": "normal", "M08": "bold"}


def test_bars_are_in_per_cent():
    heights = [bar.get_height() for bar in figures.wra_by_speaker(SCORES, "M08", LEAST_FIRST).axes[0].patches]
    assert sorted(heights) == pytest.approx([10, 10, 70, 70])


def test_speakers_of_unknown_level_are_drawn():
    assert figures.wra_by_speaker(SCORES.assign(level="?"), "M08", "by name").axes[0].patches


def test_digital_silence_is_drawn_without_a_warning(tmp_path):
    wave = np.zeros(16_000)
    wave[4000:8000] = 0.3 * np.sin(np.arange(4000) / 3)
    soundfile.write(tmp_path / "a.wav", wave, 16_000)
    utt = Utterance("a", "S", tmp_path / "a.wav", 1.0, "ONE")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = figures.spectrograms([utt] * 4, ["S: ONE", "S: " + 20 * "LONG ", "S: ONE", "S: ONE"])
        assert_no_text_is_cut_off(figure)
    assert len(figure.axes) == 4
    assert {axes.get_xlim() for axes in figure.axes} == {(0, 1)}
    assert all(np.isfinite(axes.get_images()[0].get_array()).all() for axes in figure.axes)


def test_training_curves_mark_the_best_validation():
    curves = pd.DataFrame(
        [(10, "loss", 2.0), (20, "loss", 1.0), (10, "ctc", 1.5), (10, "dev_wra", 0.25), (20, "dev_wra", 0.75)],
        columns=["step", "name", "value"],
    )
    figure = live_curves.training(curves)
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["loss", "ctc"]
    assert [text.get_text() for text in right.texts] == ["75.0"]
    live_curves.training(curves[curves.name == "dev_wra"])  # before the first loss is logged
