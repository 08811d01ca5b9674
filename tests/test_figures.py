import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from kdlib.logits import spikes
from kdlib.show import figures

SCORES = pd.DataFrame(
    [
        {"speaker": speaker, "level": level, "decoder": decoder, "wra": wra, "low": wra - 0.05, "high": wra + 0.05}
        for speaker, level, wra in (("M04", "VERY_LOW", 0.1), ("M08", "HIGH", 0.7))
        for decoder in ("greedy", "lexicon")
    ]
)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_figures_are_saved_as_pdf_and_png(tmp_path):
    path = figures.save(figures.wra_by_speaker(SCORES, "M08"), tmp_path / "new", "wra")
    assert path == tmp_path / "new/wra.png"
    assert path.stat().st_size > 5_000
    assert (tmp_path / "new/wra.pdf").read_bytes().startswith(b"%PDF")


def test_no_text_is_cut_off():
    """All text lies within the figure."""
    figure = figures.wra_by_speaker(SCORES, "M08")
    figure.canvas.draw()
    box = figure.get_tightbbox()
    assert box.x0 >= -0.05
    assert box.y0 >= -0.05
    assert box.x1 <= figure.get_figwidth() + 0.05
    assert box.y1 <= figure.get_figheight() + 0.05


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
    figure = figures.wra_by_speaker(SCORES, "M08")
    weights = {tick.get_text(): tick.get_fontweight() for tick in figure.axes[0].get_xticklabels()}
    assert weights == {"M04": "normal", "M08": "bold"}


def test_bars_are_in_per_cent():
    heights = [bar.get_height() for bar in figures.wra_by_speaker(SCORES, "M08").axes[0].patches]
    assert sorted(heights) == pytest.approx([10, 10, 70, 70])


def test_speakers_of_unknown_level_are_drawn():
    assert figures.wra_by_speaker(SCORES.assign(level="?"), "M08").axes[0].patches


def test_training_curves_mark_the_best_validation():
    curves = pd.DataFrame(
        [(10, "loss", 2.0), (20, "loss", 1.0), (10, "ctc", 1.5), (10, "dev_wra", 0.25), (20, "dev_wra", 0.75)],
        columns=["step", "name", "value"],
    )
    figure = figures.training(curves)
    left, right = figure.axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["loss", "ctc"]
    assert [text.get_text() for text in right.texts] == ["75.0"]
    figures.training(curves[curves.name == "dev_wra"])  # before the first loss is logged
