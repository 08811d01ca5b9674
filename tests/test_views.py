"""Teachers that get other recordings of the same utterances: clean ones, or another microphone's."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from corpora import utterances

from kdlib.corpus.manifest import Corpus
from kdlib.corpus.views import view_of
from kdlib.errors import UserError
from kdlib.pipeline import Fold

SMALL = {
    "speakers": ["M08", "M10", "M04"],
    "controls": 2,
    "words": {"digits": 4, "uncommon_per_block": 1},
    "repetitions": 1,
    "control_words": 4,
}


@pytest.fixture(scope="module")
def fold(tmp_path_factory):
    """The smoke recipe with few words, whose teachers get clean recordings."""
    overrides = {"outputs": str(tmp_path_factory.mktemp("views")), "synthetic": SMALL | {"clean": True}}
    overrides["teacher"] = {"input": "clean"}
    return Fold.load("params/smoke.yaml", "M08", "ctc_kd", overrides=overrides)


def test_clean_recordings_have_the_timing_of_the_others_and_change_none(fold, tmp_path):
    without = Fold.load("params/smoke.yaml", "M08", overrides={"outputs": str(tmp_path), "synthetic": SMALL})
    plain = {utt.utt_id: utt for utt in without.corpus.utterances}
    view = view_of(fold.corpus, "clean")
    noise = []
    for utt in fold.corpus.utterances:
        assert (
            utt.sha256 == plain[utt.utt_id].sha256
        )  # the students' recordings are the same with clean ones beside them
        (clean,) = view([utt])
        given, other = (soundfile.read(path)[0] for path in (utt.wav, clean.wav))
        assert len(given) == len(other)
        quiet = slice(0, 1600)  # before the word
        noise.append((np.abs(given[quiet]).mean(), np.abs(other[quiet]).mean()))
    assert (np.array(noise)[:, 1] < 0.2 * np.array(noise)[:, 0]).all()


def test_teachers_get_the_clean_ones_and_the_student_is_taught_frame_by_frame(fold):
    assert fold.layout.family == "sb-clean"
    found = {check.name: check for check in fold.preflight(1)}
    assert found["recording"].verdict == found["stored and live"].verdict == "pass"
    assert (fold.scores(1) / "scores.json").is_file()
    same = fold.but(teacher={"input": "same"})
    assert same.layout.outputs("M04", "training") != fold.layout.outputs("M04", "training")
    with pytest.raises(UserError, match=r"live_teachers: faults, and teacher\.input"):
        fold.but(distill={"live_teachers": True}).student_setup(1)


def test_a_recording_that_is_missing_is_named(fold, tmp_path):
    (utt,) = utterances("a", texts=["X"])
    utt = utt.replace(wav=tmp_path / "audio" / "A" / "a.wav")
    with pytest.raises(UserError, match=r"there is no clean recording of a; .*synthetic: \{clean: true\}"):
        view_of(Corpus((utt,), "mine"), "clean")([utt])
    with pytest.raises(UserError, match=r"a has no recording by the microphone 'M6'"):
        view_of(Corpus((utt,), "mine"), "M6")([utt])


def test_another_microphone_s_recording_has_the_utterances_own_id():
    first, second = utterances("M08_B1_D1_M5", "M08_B1_D1_M6", texts=["ONE", "ONE"])
    other = second.replace(copy_of=first.utt_id, wav=Path("m6.wav"))
    (seen,) = view_of(Corpus((first, other), "mine"), "M6")([first])
    assert (seen.utt_id, seen.wav) == ("M08_B1_D1_M5", Path("m6.wav"))
    assert view_of(Corpus((first, other), "mine"), "same")([first]) == [first]
