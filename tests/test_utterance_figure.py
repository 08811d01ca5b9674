"""Figures of utterances: what is drawn, and the messages where something is missing."""

import io
import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
import systems
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import AxesImage

from kdlib.show import explorer_data, utterance_figure
from kdlib.show.drawing import Signal


@pytest.fixture(scope="module")
def data(smoke, corpus, tmp_path_factory):
    folder, tokens = tmp_path_factory.mktemp("closeup"), smoke.tokens
    tests = [utt for utt in corpus if utt.speaker == "M08"]
    folders = {
        name: systems.save(folder / name, tests, tokens, wrong, place)
        for place, (name, wrong) in enumerate({"hard": 0.3, "kd": 0.5, "third": 0.9}.items())
    }
    return explorer_data.fold_data(smoke, folders, teachers=systems.save(folder / "teachers", tests, tokens, 0.1, 9))


def texts(figure):
    return [label.get_text() for label in figure.findobj(plt.Text) if label.get_text()]


def test_figure_has_every_system_with_hypothesis_and_tokens(data):
    utt_id = data.top_failures(1).index[0]
    row = data.row(utt_id)
    figure = utterance_figure.utterance_figure(data, utt_id)
    text = " ".join(texts(figure))
    assert f"{utt_id}: {row['reference']}" in text
    for name in ("hard", "kd", "third", "teachers"):
        assert f"{name}: {row[name]}" in text
    assert "✗" in text
    assert [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()].count("blank") == 4
    assert "KL from the teachers" in text
    assert any(label in text for label in ("same speaker", "teacher's speaker", "control"))


@pytest.mark.parametrize("kind", ["utterance", "failures"])
def test_token_strips_have_a_key_of_their_colours(data, kind):
    """A bar from 0 to 1 in the colours of the strips, clear of the title to its left."""
    utt_id = data.metadata.index[0]
    figure = utterance_figure.utterance_figure(data, utt_id) if kind == "utterance" else None
    figure = figure or utterance_figure.failures_figure(data)
    FigureCanvasAgg(figure).draw()
    (key,) = [axes for axes in figure.axes if any("probability  0" in text.get_text() for text in axes.texts)]
    (bar,) = key.get_images()
    assert (bar.get_array().min(), bar.get_array().max()) == (0, 1)
    strips = [image for image in figure.findobj(AxesImage) if image.get_clim() == (0, 1)]
    assert {strip.get_cmap().name for strip in strips} == {bar.get_cmap().name}
    assert len(strips) == (5 if kind == "utterance" else 11)  # with the key
    first = f"{utt_id}: " if kind == "utterance" else "third: the 10"
    (title,) = [text for text in figure.findobj(plt.Text) if text.get_text().startswith(first)]
    boxes = [text.get_window_extent() for text in key.texts]
    assert title.get_window_extent().x1 < min(box.x0 for box in boxes)
    assert max(box.x1 for box in boxes) <= figure.bbox.x1


def test_names_above_repetitions_do_not_overlap(corpus, monkeypatch):
    """A long recording leaves two short ones little of the axis; their names still have room."""
    names = ["control Anna001", "teacher's speaker Anna003", "same speaker, repetition"]
    recordings = dict(zip(names, corpus, strict=False))
    seconds = dict(zip([utt.utt_id for utt in recordings.values()], [2.0, 0.3, 0.3], strict=True))
    monkeypatch.setattr(
        utterance_figure,
        "_signal",
        lambda utt: (Signal(np.ones(int(16000 * seconds[utt.utt_id]), np.float32), seconds[utt.utt_id]), ""),
    )
    figure, panels = utterance_figure._stacked({"repetitions": (0.6, 0.5)}, 6.3)
    axes = panels["repetitions"]
    utterance_figure._repetitions(axes, recordings)
    FigureCanvasAgg(figure).draw()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == names
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))
    assert boxes[-1].x1 <= figure.bbox.x1
    widths = [image.get_extent()[1] - image.get_extent()[0] for image in axes.get_images()]
    assert widths == pytest.approx([2.0, 0.3, 0.3])  # on one time scale


def test_only_the_requested_systems_are_drawn(data):
    utt_id = data.metadata.index[0]
    text = " ".join(texts(utterance_figure.utterance_figure(data, utt_id, ["kd"])))
    assert "kd: " in text
    assert "teachers: " in text
    assert "hard: " not in text


def test_missing_recording_is_reported_in_the_figure(data, monkeypatch):
    utt_id = data.metadata.index[0]
    monkeypatch.setattr(data, "_utterances", {})
    assert "the corpus has no recording of this id" in texts(utterance_figure.utterance_figure(data, utt_id))


def test_system_without_posteriors_is_drawn(data, tmp_path, corpus, smoke):
    tests = [utt for utt in corpus if utt.speaker == "M08"]
    bare = systems.save(tmp_path / "bare", tests, smoke.tokens, 0.5, 1, posteriors=False)
    alone = explorer_data.fold_data(smoke, {"bare": bare})
    assert alone.frames(tests[0].utt_id) == {}
    text = " ".join(texts(utterance_figure.utterance_figure(alone, tests[0].utt_id)))
    assert f"bare: {alone.row(tests[0].utt_id)['bare']}" in text
    utterance_figure.failures_figure(alone)


def test_of_many_systems_the_compared_ones_are_drawn(data, tmp_path, corpus, smoke):
    tests, tokens = [utt for utt in corpus if utt.speaker == "M08"], smoke.tokens
    folders = {f"s{place}": systems.save(tmp_path / f"s{place}", tests, tokens, 0.5, place) for place in range(6)}
    many = explorer_data.fold_data(smoke, folders, before="s4", after="s5")
    text = " ".join(texts(utterance_figure.utterance_figure(many, tests[0].utt_id)))
    assert [f"s{place}: " in text for place in range(6)] == [True, True, False, False, True, True]


def test_probable_tokens_that_are_not_shown_are_counted(data):
    utt_id = max(data.metadata.index, key=lambda name: len(data.metadata.reference[name]))
    kept, logprobs = data.frames(utt_id)["hard"]
    likely = int((np.exp(np.delete(logprobs, kept.blank, 1)).max(0) > utterance_figure.MIN_PROBABILITY).sum())
    tracks, names = utterance_figure._tracks(kept, logprobs, max_tokens=2)
    assert len(tracks) == len(names) == 3
    assert names[-1] == f"blank (+{likely - 2})"


def test_dollar_signs_are_not_parsed_as_math(data, monkeypatch):
    utt_id = data.metadata.index[0]
    row = data.row(utt_id) | {"reference": r"A $\X$ B", "kd": "$"}
    monkeypatch.setattr(data, "row", lambda *_: row)
    figure = utterance_figure.utterance_figure(data, utt_id)
    figure.savefig(io.BytesIO(), format="png")


def test_ten_failures_on_one_page_or_a_line_without_failures(data):
    figure = utterance_figure.failures_figure(data)
    rows = data.top_failures(10)
    titles = [text for text in texts(figure) if "→" in text]
    assert len(titles) == len(rows) == 10
    assert all("teachers: " in text for text in titles)
    perfect = utterance_figure.failures_figure(data, data.view("all wrong").iloc[:0])
    assert "third: no errors in this selection" in texts(perfect)
    assert "kd: no confusions in this selection" in texts(
        utterance_figure.confusion_figure(data.confusions(data.table().iloc[:0], "kd"), "kd")
    )


def test_most_probable_tokens_of_a_frame(data):
    utt_id = data.metadata.index[0]
    kept, logprobs = data.frames(utt_id)["hard"]
    best = utterance_figure.top_tokens(kept, logprobs, 0.05)
    assert len(best) == 5
    assert [share for _, share in best] == sorted((share for _, share in best), reverse=True)
    assert best[0][1] == pytest.approx(np.exp(logprobs[1].max()), abs=1e-3)
    assert utterance_figure.top_tokens(kept, logprobs[:0], 0.0) == []
