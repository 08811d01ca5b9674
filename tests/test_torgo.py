"""The importer on a tree with the real layout and every kind of prompt."""

from collections import Counter

import pytest
from corpora import PROMPTS, torgo

from kdlib.corpus.importers import torgo as importer
from kdlib.errors import UserError
from kdlib.params import fold_names, load
from kdlib.pipeline import Fold
from kdlib.settings.corpus import Torgo


@pytest.fixture
def tree(tmp_path):
    return torgo(tmp_path / "TORGO")


def fold(tree, held_out="M01", **overrides):
    settings = {"data_folder": str(tree), "outputs": str(tree.parent / "out")}
    return Fold.load("params/torgo.yaml", held_out, fold={"dev": None}, overrides=settings | overrides)


def test_words_and_sentences_of_every_session(tree):
    result = importer.read(tree, Torgo())
    assert Counter(utt.speaker for utt in result.corpus) == {"F01": 6, "FC01": 6, "M01": 6}
    assert [utt.utt_id for utt in result.corpus][:3] == ["F01_Session1_0001", "F01_Session1_0002", "F01_Session1_0011"]
    assert result.notes == ["TORGO; 12 recordings by wav_headMic, 6 recordings by wav_arrayMic"]


def test_every_exclusion_is_counted_by_its_reason(tree):
    reasons = Counter(problem.reason for problem in importer.read(tree, Torgo()).problems)
    expected = Counter(reason for _, reason in PROMPTS.values() if reason)
    assert reasons == {reason: 6 * times for reason, times in expected.items()}  # 3 speakers x 2 sessions


def test_the_first_microphone_that_recorded_a_prompt_is_used(tree):
    microphones = {utt.utt_id: utt.wav.parent.name for utt in importer.read(tree, Torgo()).corpus}
    assert microphones["M01_Session1_0001"] == "wav_headMic"
    assert microphones["M01_Session1_0011"] == "wav_arrayMic"
    array = importer.read(tree, Torgo(microphones=("wav_arrayMic",))).corpus
    assert {utt.wav.parent.name for utt in array} == {"wav_arrayMic"}


def test_the_other_microphone_is_for_training_only(tree):
    corpus = importer.read(tree, Torgo(augment=True)).corpus
    copies = {utt.utt_id: utt.copy_of for utt in corpus if utt.copy_of}
    assert copies["M01_Session1_0001_wav_arrayMic"] == "M01_Session1_0001"
    assert len(copies) == 3 * 2 * 2  # 0001 and 0002


def test_the_recipe_has_controls_and_severities(tree):
    corpus = fold(tree).corpus
    assert corpus.dysarthric == ["F01", "M01"]
    assert (corpus.level("M01"), corpus.person("M01").sex) == ("VERY_LOW", "M")
    assert corpus.is_control("FC01")
    assert {utt.text: utt.word_type for utt in corpus} == {
        "YES": "word",
        "DON'T": "word",
        "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG": "sentence",
    }
    assert {utt.speaker for utt in fold(tree).splits.train} == {"F01"}


def test_severities_are_configuration(tree):
    changed = fold(tree, speakers={"M01": {"level": "LOW"}})
    assert changed.corpus.level("M01") == "LOW"


def test_torgo_has_its_own_fold_files():
    assert fold_names("torgo") == ["F01", "F03", "F04", "M01", "M02", "M03", "M04", "M05"]
    m05 = load("params/torgo.yaml", "M05")
    assert (m05.fold_set, m05.fold.exclude) == ("torgo", ())
    assert load("params/uaspeech.yaml", "M05").fold.dev == "M11"  # another M05
    assert m05.fold.dev != "M11"


@pytest.mark.parametrize(
    ("folder", "message"),
    [("none", "there is no folder"), ("empty", "expected speakers' folders such as F01/Session1")],
)
def test_folders_without_torgo_are_refused(tmp_path, folder, message):
    (tmp_path / "empty" / "Docs").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        importer.read(tmp_path / folder, Torgo())


def test_a_changed_prompt_rebuilds_the_corpus(tree):
    """Even with an editor's backup file next to it."""
    prompt = tree / "M01/Session1/prompts/0001.txt"
    (prompt.parent / "0001.txt~").write_text("old")
    assert prompt in importer.source_files(tree, Torgo())
    assert "YES" in {utt.text for utt in fold(tree).corpus}
    prompt.write_text("maybe\n")
    fold(tree).prepared_corpus()
    assert "MAYBE" in {utt.text for utt in fold(tree).corpus}


def test_prompts_in_another_encoding_keep_their_letters_and_are_reported(tree):
    (tree / "M01/Session1/prompts/0001.txt").write_bytes("don\u2019t, caf\u00e9".encode("cp1252"))
    (tree / "M01/Session1/prompts/0002.txt").write_bytes(b"\xef\xbb\xbfyes")
    result = importer.read(tree, Torgo())
    assert {"don\u2019t, caf\u00e9", "yes"} <= {utt.text for utt in result.corpus}
    assert result.notes[0].startswith("1 prompts are not UTF-8, read as Windows-1252; first ")


def test_broken_links_and_folders_with_a_files_name_are_no_errors(tree):
    session = tree / "M01/Session1"
    (session / "wav_headMic/0001.wav").unlink()
    (session / "wav_headMic/0001.wav").symlink_to("gone.wav")
    (session / "prompts/0002.txt").unlink()
    (session / "prompts/0002.txt").mkdir()
    result = importer.read(tree, Torgo())
    assert next(utt.wav.parent.name for utt in result.corpus if utt.utt_id == "M01_Session1_0001") == "wav_arrayMic"
    assert ("M01_Session1_0002", "the recording has no prompt") in {(p.utt_id, p.reason) for p in result.problems}


def test_xxx_inside_a_prompt_counts(tree):
    (tree / "M01/Session1/prompts/0001.txt").write_text("the xxx house")
    reasons = {problem.utt_id: problem.reason for problem in importer.read(tree, Torgo()).problems}
    assert reasons["M01_Session1_0001"] == "the prompt contains xxx"


def test_a_folder_without_permission_is_one_error(tree, monkeypatch):
    def refuse(folder, settings):
        raise PermissionError(13, "Permission denied", str(folder / "M01"))

    monkeypatch.setattr(importer, "source_files", refuse)
    with pytest.raises(UserError, match=r"TORGO/M01: cannot be read \(Permission denied\); check its permissions"):
        fold(tree).prepared_corpus()
