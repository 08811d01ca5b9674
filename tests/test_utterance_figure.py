"""Pictures of utterances: what is drawn of which, and what is said where something is missing."""

import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
import systems

from kdlib.pretrained.pieces import load_tokens
from kdlib.show import explorer_data, utterance_figure


@pytest.fixture(scope="module")
def found(smoke, corpus, tmp_path_factory):
    folder, tokens = tmp_path_factory.mktemp("closeup"), load_tokens(smoke)
    tests = [utt for utt in corpus if utt.speaker == "M08"]
    there = {
        name: systems.written(folder / name, tests, tokens, wrong, place)
        for place, (name, wrong) in enumerate({"hard": 0.3, "kd": 0.5, "third": 0.9}.items())
    }
    return explorer_data.fold_data(smoke, there, teachers=systems.written(folder / "teachers", tests, tokens, 0.1, 9))


def texts(figure):
    return [one.get_text() for one in figure.findobj(plt.Text) if one.get_text()]


def test_a_picture_has_every_system_its_answer_and_its_tokens(found):
    utt_id = found.telling(1).index[0]
    row = found.row(utt_id)
    figure = utterance_figure.utterance_figure(found, utt_id)
    said = " ".join(texts(figure))
    assert f"{utt_id}: {row['reference']}" in said
    for name in ("hard", "kd", "third", "teachers"):
        assert f"{name}: {row[name]}" in said
    assert "✗" in said
    assert [one.get_text() for axes in figure.axes for one in axes.get_yticklabels()].count("blank") == 4
    assert "KL from the teachers" in said
    assert any(label in said for label in ("same speaker", "teacher's speaker", "control"))


def test_only_the_systems_that_are_asked_for(found):
    utt_id = found.known.index[0]
    said = " ".join(texts(utterance_figure.utterance_figure(found, utt_id, ["kd"])))
    assert "kd: " in said
    assert "teachers: " in said
    assert "hard: " not in said


def test_a_missing_recording_is_said_in_the_picture(found, monkeypatch):
    utt_id = found.known.index[0]
    monkeypatch.setattr(found, "_utterances", {})
    assert "the corpus has no recording of this id" in texts(utterance_figure.utterance_figure(found, utt_id))


def test_a_system_without_frames_is_drawn_too(found, tmp_path, corpus, smoke):
    tests = [utt for utt in corpus if utt.speaker == "M08"]
    bare = systems.written(tmp_path / "bare", tests, load_tokens(smoke), 0.5, 1, keep=False)
    alone = explorer_data.fold_data(smoke, {"bare": bare})
    assert alone.frames(tests[0].utt_id) == {}
    said = " ".join(texts(utterance_figure.utterance_figure(alone, tests[0].utt_id)))
    assert f"bare: {alone.row(tests[0].utt_id)['bare']}" in said
    utterance_figure.telling_failures(alone)


def test_of_many_systems_those_that_are_compared_are_drawn(found, tmp_path, corpus, smoke):
    tests, tokens = [utt for utt in corpus if utt.speaker == "M08"], load_tokens(smoke)
    there = {f"s{place}": systems.written(tmp_path / f"s{place}", tests, tokens, 0.5, place) for place in range(6)}
    many = explorer_data.fold_data(smoke, there, before="s4", after="s5")
    said = " ".join(texts(utterance_figure.utterance_figure(many, tests[0].utt_id)))
    assert [f"s{place}: " in said for place in range(6)] == [True, True, False, False, True, True]


def test_tokens_that_have_no_row_are_counted(found):
    utt_id = max(found.known.index, key=lambda name: len(found.known.reference[name]))
    kept, logprobs = found.frames(utt_id)["hard"]
    likely = int((np.exp(np.delete(logprobs, kept.blank, 1)).max(0) > utterance_figure.LEAST).sum())
    tracks, names = utterance_figure._tracks(kept, logprobs, most=2)
    assert len(tracks) == len(names) == 3
    assert names[-1] == f"blank (+{likely - 2})"


def test_dollars_are_no_mathematics(found, monkeypatch):
    utt_id = found.known.index[0]
    row = found.row(utt_id) | {"reference": r"A $\X$ B", "kd": "$"}
    monkeypatch.setattr(found, "row", lambda *_: row)
    figure = utterance_figure.utterance_figure(found, utt_id)
    figure.savefig(io.BytesIO(), format="png")


def test_ten_failures_on_a_page_or_a_line_that_there_are_none(found):
    figure = utterance_figure.telling_failures(found)
    rows = found.telling(10)
    titles = [text for text in texts(figure) if "→" in text]
    assert len(titles) == len(rows) == 10
    assert all("teachers: " in text for text in titles)
    perfect = utterance_figure.telling_failures(found, found.view("all wrong").iloc[:0])
    assert "third is never wrong here" in texts(perfect)
    assert "kd confuses nothing here" in texts(
        utterance_figure.confusion_figure(found.confusions(found.table().iloc[:0], "kd"), "kd")
    )


def test_the_likeliest_tokens_of_a_frame(found):
    utt_id = found.known.index[0]
    kept, logprobs = found.frames(utt_id)["hard"]
    best = utterance_figure.top_tokens(kept, logprobs, 0.05)
    assert len(best) == 5
    assert [share for _, share in best] == sorted((share for _, share in best), reverse=True)
    assert best[0][1] == pytest.approx(np.exp(logprobs[1].max()), abs=1e-3)
    assert utterance_figure.top_tokens(kept, logprobs[:0], 0.0) == []


def test_a_spectrogram_shows_a_tone_at_its_frequency_and_time():
    samples = np.sin(2 * np.pi * 2000 * np.arange(16000) / 16000).astype(np.float32)
    figure, axes = plt.subplots()
    assert utterance_figure.spectrogram(axes, samples, 0.5) == pytest.approx(1.5)
    (image,) = axes.get_images()
    rows = image.get_array().mean(1)
    low, high = image.get_extent()[2:]
    assert low + (high - low) * (rows.argmax() + 0.5) / len(rows) == pytest.approx(2.0, abs=0.05)
    plt.close(figure)
