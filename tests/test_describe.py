import numpy as np
import pandas as pd
import pytest
import soundfile

from kdlib.corpus import describe
from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import published_speakers
from kdlib.corpus.utterances import Utterance


def utterance(path, speaker, seconds, text="ONE"):
    """A burst of noise of known length within a second of faint noise."""
    rng = np.random.default_rng(0)
    wave = rng.normal(0, 1e-4, 24_000)
    wave[4000 : 4000 + int(16_000 * seconds)] += rng.normal(0, 0.2, int(16_000 * seconds))
    soundfile.write(path, wave, 16_000)
    return Utterance(path.stem, speaker, path, 1.5, text)


def test_spoken_seconds_exclude_silence(tmp_path):
    assert describe.spoken_s(utterance(tmp_path / "a.wav", "M08", 0.6)) == pytest.approx(0.6, abs=0.04)


def test_durations_are_relative_to_controls_of_the_same_word(tmp_path):
    corpus = Corpus(
        (
            utterance(tmp_path / "a.wav", "M08", 0.9),
            utterance(tmp_path / "b.wav", "CM01", 0.5),
            utterance(tmp_path / "c.wav", "CM04", 0.4),
            utterance(tmp_path / "d.wav", "CM05", 0.6),
        ),
        people=published_speakers(),
    )
    ratios = describe.duration_ratios(corpus)
    assert ratios["M08"] == pytest.approx(0.9 / 0.5, rel=0.08)
    assert ratios["CM01"] == pytest.approx(1)


def test_one_row_per_speaker_from_least_to_most_intelligible(corpus):
    table = describe.speaker_table(corpus)
    assert table.speaker.tolist()[:3] == ["M04", "M08", "M10"]
    assert table.utterances.sum() == len(corpus)
    assert table.published_ratio[0] == 1.41  # M04, as published


def test_roles_add_up(corpus, smoke):
    roles = describe.split_table(smoke.splits).set_index("role")
    assert roles.utterances.to_dict() == {
        "training": 12,
        "dev": 6,
        "test": 6,
        "controls": len(corpus.where(lambda utt: corpus.is_control(utt.speaker))),
    }
    assert roles.loc["test", "words not trained on"] == 2  # the block's two uncommon words


def test_example_speakers_are_one_per_level():
    people = pd.DataFrame(
        {"speaker": ["V", "L", "M", "H", "K", "C"], "level": ["VERY_LOW", "LOW", "MID", "HIGH", "HIGH", "CONTROL"]}
    )
    assert describe.example_speakers(people) == ["K", "M", "L", "V"]
    assert describe.example_speakers(people.assign(level="?"))[:2] == ["V", "L"]


def test_the_same_word_by_all_named_speakers(corpus):
    chosen = describe.same_word(corpus, ["M08", "M04"])
    assert [utt.speaker for utt in chosen] == ["M08", "M04"]
    assert len({utt.text for utt in chosen}) == 1
