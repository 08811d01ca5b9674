"""Any manifest goes through the same stage as the embedded corpus."""

import shutil

import numpy as np
import pytest
import soundfile

from kdlib.corpus import manifest, prepare
from kdlib.corpus.manifest import Utterance
from kdlib.errors import UserError
from kdlib.params import load


@pytest.fixture
def folder(tmp_path):
    """Two speakers of the table and one bad file, at 8 kHz in stereo, as a SpeechBrain CSV."""
    rng = np.random.default_rng(0)
    utterances = []
    for name in ("M08", "M10", "M09"):
        for block in ("B1", "B2"):
            wav = tmp_path / "data" / f"{name}_{block}.flac"
            wav.parent.mkdir(exist_ok=True)
            soundfile.write(wav, rng.normal(0, 0.1, (4000, 2)), 8000)
            utterances.append(Utterance(wav.stem, name, wav, 0.5, "ONE" if block == "B1" else "TWO", block))
    utterances[0].wav.write_bytes(b"not audio")
    manifest.write_speechbrain(utterances, tmp_path / "data" / "corpus.csv", tmp_path / "data")
    return tmp_path


def params(folder, **overrides):
    settings = {"corpus": "manifest", "manifest": str(folder / "data/corpus.csv"), "outputs": str(folder / "out")}
    settings["speakers"] = "uaspeech"
    return load("params/demo.yaml", "M08", overrides=settings | overrides)


def test_a_manifest_is_checked_and_bad_files_are_left_out(folder):
    made = prepare.make(params(folder))
    assert len(prepare.load(params(folder))) == 5
    assert (made / "left_out.csv").read_text().splitlines()[1].startswith("M08_B1,M08,")
    report = (made / "report.txt").read_text()
    assert "6 recordings looked at, 1 left out" in report
    assert "5 files of 8000 Hz, 2 channels are read as 16000 Hz mono" in report
    assert prepare.lexicon(params(folder)) == ["ONE", "TWO"]


def test_the_checked_manifest_still_points_to_the_audio(folder):
    prepare.make(params(folder))
    assert all(utt.wav.is_file() for utt in prepare.load(params(folder)))


def test_a_changed_manifest_is_read_again(folder):
    prepare.make(params(folder))
    path = folder / "data/corpus.csv"
    path.write_text(path.read_text().replace("TWO", "THREE"))
    assert prepare.lexicon(params(folder)) == ["ONE", "THREE"]


def test_a_corpus_of_controls_alone_is_refused(folder):
    path = folder / "data/corpus.csv"
    text = path.read_text()
    for speaker, control in (("M08", "CM01"), ("M10", "CM04"), ("M09", "CM05")):
        text = text.replace(f",{speaker},", f",{control},")
    path.write_text(text)
    with pytest.raises(UserError, match="all of its speakers are controls"):
        prepare.make(params(folder))
    assert not (folder / "out/demo/corpus").exists()


def test_a_missing_folder_of_audio_is_one_message(folder):
    shutil.move(folder / "data", folder / "elsewhere")
    (folder / "data").mkdir()
    shutil.copy(folder / "elsewhere/corpus.csv", folder / "data/corpus.csv")
    with pytest.raises(
        UserError, match=r"none of its 6 audio files can be used; the first, .*M08_B1\.flac: the file is m"
    ):
        prepare.make(params(folder))


def test_transcripts_are_spelt_one_way(folder):
    path = folder / "data/corpus.csv"
    path.write_text(path.read_text().replace("TWO", "X-ray").replace("ONE", "one"))
    assert prepare.lexicon(params(folder)) == ["ONE", "X-RAY"]
    assert prepare.lexicon(params(folder, hyphens="space")) == ["ONE", "X RAY"]
