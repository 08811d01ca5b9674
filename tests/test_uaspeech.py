"""The importer on folders with the real layouts and the real number of files of some speakers."""

import shutil
from collections import Counter

import pytest
from corpora import uaspeech, write_mlf, write_xls

from kdlib.corpus.importers import uaspeech as importer
from kdlib.corpus.speakers import published_speakers, speaker_info
from kdlib.errors import UserError
from kdlib.pipeline import Fold
from kdlib.settings.corpus import UASpeech


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The new release: a dysarthric speaker and a control, 7 x 765 files each."""
    return uaspeech(tmp_path_factory.mktemp("new") / "UASpeech")


@pytest.fixture
def small(tmp_path):
    """The old release with microphone M5 only, to be damaged by tests."""
    return uaspeech(tmp_path / "UASpeech", ("M16", "CM01"), old=True, labels="xls", microphones=["M5"])


def read(folder, **settings):
    return importer.read(folder, UASpeech(**settings))


def test_the_word_list_has_455_codes_and_449_words():
    assert len(importer.word_list()) == 455
    assert len(set(importer.word_list().values())) == 449


def test_seven_microphones_are_one_utterance(tree):
    """5,355 files per speaker, 765 utterances: 3 blocks x (10 digits, 26 letters, 19 commands, 100 + 100 words)."""
    files = list((tree / "audio/original/F02").iterdir())
    assert len(files) == 5355
    result = read(tree)
    assert Counter(utt.speaker for utt in result.corpus) == {"F02": 765, "CF02": 765}
    assert {utt.wav.stem[-2:] for utt in result.corpus} == {"M5"}
    kinds = Counter((utt.block, utt.word_type) for utt in result.corpus if utt.speaker == "F02")
    for block in ("B1", "B2", "B3"):
        each = {kind: kinds[block, kind] for kind in ("digit", "letter", "computer", "common", "uncommon")}
        assert list(each.values()) == [10, 26, 19, 100, 100]
    assert len({utt.text for utt in result.corpus}) == 449
    assert result.problems == []
    assert any(note.startswith("9,180 recordings by the microphones M2, M3, M4, M6, M7, M8") for note in result.notes)


def test_every_recording_may_be_an_utterance_as_in_the_original_study(tree):
    result = read(tree, microphone="all")
    assert Counter(utt.speaker for utt in result.corpus) == {"F02": 5355, "CF02": 5355}
    assert not any(utt.copy_of for utt in result.corpus)
    assert not [note for note in result.notes if "of 765 utterances" in note]  # complete: each is there


def test_uncommon_words_differ_by_block_and_others_do_not(tree):
    texts = {utt.utt_id: utt.text for utt in read(tree).corpus}
    assert len({texts[f"F02_{block}_UW7_M5"] for block in importer.BLOCKS}) == 3
    assert {texts[f"F02_{block}_CW7_M5"] for block in importer.BLOCKS} == {importer.word_list()["CW7"]}


@pytest.mark.parametrize("labels", ["mlf", "xls", "list"])
def test_all_label_sources_agree(tree, tmp_path, labels):
    if labels == "xls":
        write_xls(tmp_path / "speaker_wordlist.xls")
        (tmp_path / "audio").symlink_to(tree / "audio")
        tree = tmp_path
    result = read(tree, labels=labels)
    words = importer.word_list()
    for utt in result.corpus:
        code = utt.utt_id.split("_")[2]
        assert utt.text == words[f"{utt.block}_{code}" if code.startswith("UW") else code]
    assert not any("other words" in note for note in result.notes)


def test_further_microphones_are_for_training_only(tree):
    result = read(tree, augment=("M3",))
    copies = [utt for utt in result.corpus if utt.copy_of]
    assert len(result.corpus) == 2 * 2 * 765
    assert {utt.wav.stem[-2:] for utt in copies} == {"M3"}
    assert {utt.copy_of for utt in copies} == {utt.utt_id for utt in result.corpus if not utt.copy_of}
    assert len(read(tree, augment="all").corpus) == 2 * 5355


def test_all_speakers_of_the_table_have_metadata(tree):
    assert (len(published_speakers()), sum(speaker.control for speaker in published_speakers().values())) == (28, 13)
    fold = Fold.load("params/uaspeech.yaml", "M08", overrides={"data_folder": str(tree)})
    info = speaker_info(fold.corpus_settings, ["F02", "CF02"])
    assert (info["F02"].level, info["F02"].seed_level) == ("LOW", "HIGH")
    assert info["CF02"].control


def test_the_old_release_with_its_controls(small):
    result = read(small)
    assert Counter(utt.speaker for utt in result.corpus) == {"CM01": 765, "M16": 765}
    assert result.notes[0] == "UA-Speech, old release (one version of the audio); labels from speaker_wordlist.xls"


def test_every_exclusion_is_counted(small):
    """15 empty files, one recording without M5, two unknown names, one duplicate, a ._ file, one folder too deep."""
    speaker = small / "audio" / "M16"
    for number in range(1, 16):
        (speaker / f"M16_B1_CW{number}_M5.wav").write_bytes(b"" if number % 2 else b"RIFF" + bytes(40))
    (speaker / "M16_B2_CW1_M5.wav").rename(speaker / "M16_B2_CW1_M4.wav")
    (speaker / "._M16_B2_CW2_M5.wav").write_bytes(b"\0")
    (speaker / "M16_B2_XY1_M5.wav").write_bytes(b"\0")
    (speaker / "M16_B2_CW300_M9.wav").write_bytes(b"\0")
    (speaker / "copy").mkdir()
    shutil.copy(speaker / "M16_B2_CW7_M5.wav", speaker / "copy")
    (speaker / "data").mkdir()
    shutil.move(speaker / "M16_B3_UW100_M5.wav", speaker / "data")
    result = read(small)
    reasons = Counter(problem.reason for problem in result.problems)
    assert reasons == {"empty file": 15, "the test microphone did not record it": 1}
    assert len([utt for utt in result.corpus if utt.speaker == "M16"]) == 765 - 16
    notes = "\n".join(result.notes)
    assert "1 '._*' files are no recordings, for example ._M16_B2_CW2_M5.wav" in notes
    assert "2 files have another name than SPK_Bn_CODE_Mn.wav, for example M16_B2_CW300_M9.wav" in notes
    assert "1 recordings are in two places, of which the first counts" in notes
    assert "15 empty files (over all microphones; the old release is known to have 15)" in notes
    assert "M16 has 749 of 765 utterances (B1 240, B2 254, B3 255 of 255)" in notes


def test_labels_that_differ_from_the_list_are_reported(tmp_path):
    tree = uaspeech(tmp_path / "UASpeech", ("F02",), microphones=["M5"])
    path = tree / "mlf/F02/F02_word.mlf"
    path.write_text(path.read_text().replace("\nUPWARD\n", "\n0 3700000 UPWORD -51.2\n"))
    result = read(tree)
    assert "UPWORD" in {utt.text for utt in result.corpus}
    assert any(
        "3 codes denote other words in mlf/" in note and "'UPWORD', not 'UPWARD'" in note for note in result.notes
    )
    assert "UPWORD" not in {utt.text for utt in read(tree, labels="list").corpus}


def test_a_file_without_a_label_is_left_out(tmp_path):
    tree = uaspeech(tmp_path / "UASpeech", ("F02",), microphones=["M5"])
    path = tree / "mlf/F02/F02_word.mlf"
    path.write_text(path.read_text().replace("F02_B1_D3_M5.lab", "F02_B1_D3_M9.lab"))
    assert [(p.utt_id, p.reason) for p in read(tree).problems] == [("F02_B1_D3_M5", "no label for its code")]


BAD = {
    "nothing there": (lambda tree: shutil.rmtree(tree / "audio"), {}, "no UA-Speech in .*found mlf"),
    "another version": (
        lambda tree: None,
        {"version": "normalized"},
        "no version 'normalized' of the audio, but original",
    ),
    "no xls": (lambda tree: None, {"labels": "xls"}, "there is no speaker_wordlist.xls"),
    "an invalid xls": (
        lambda tree: (tree / "speaker_wordlist.xls").write_bytes(b"PK"),
        {"labels": "xls"},
        "cannot be read as .xls",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_trees_are_refused_in_one_line(tmp_path, case):
    damage, settings, message = BAD[case]
    folder = tmp_path / "UASpeech" / "audio" / "original" / "F02"
    folder.mkdir(parents=True)
    (folder / "F02_B1_D1_M5.wav").write_bytes(bytes(100))
    write_mlf(tmp_path / "UASpeech" / "mlf" / "F02" / "F02_word.mlf", "F02", ["M5"])
    damage(tmp_path / "UASpeech")
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "UASpeech", **settings)
    assert "\n" not in str(caught.value)


def test_copies_are_never_test_utterances(tmp_path):
    tree = uaspeech(tmp_path / "UASpeech", ("M08", "M10", "F05", "CM01"), microphones=["M3", "M5"])
    settings = {"data_folder": str(tree), "outputs": str(tmp_path / "out"), "uaspeech": {"augment": "all"}}
    fold = Fold.load("params/uaspeech.yaml", "M08", overrides=settings)
    corpus = fold.corpus
    assert len(corpus) == 4 * 2 * 765
    splits = fold.splits
    assert (len(splits.train), len(splits.dev), len(splits.test)) == (2 * 2 * 255, 255, 255)
    assert not any(utt.copy_of for utt in (*splits.dev, *splits.test))
    words = fold.lexicon
    assert len(words) == 449
    assert "X RAY" in words  # hyphens: space


M08_B3 = {  # as the original study's own result files have them
    **{"CW95": "COME", "D7": "SEVEN", "UW99": "AWAY", "CW11": "HE", "CW92": "DAY", "CW17": "WITH", "D6": "SIX"},
    **{"C19": "RIGHT", "D9": "NINE", "CW91": "DOWN", "CW100": "YES", "CW32": "WHAT", "LM": "MIKE", "CW53": "ABOUT"},
    **{"CW26": "OR", "CW98": "PART", "UW87": "DRUM", "D1": "ONE", "UW86": "BRUSH", "C5": "TAB", "UW31": "SHOUT"},
    **{"CW5": "TO", "UW92": "CRYING", "CW27": "HAD", "CW25": "FROM", "UW2": "EXPLOIT", "UW88": "FROG", "LD": "DELTA"},
}


def test_the_word_list_agrees_with_the_original_study(small):
    texts = {utt.utt_id: utt.text for utt in read(small, labels="list").corpus}
    assert {code: texts[f"M16_B3_{code}_M5"] for code in M08_B3} == M08_B3


def test_an_empty_test_recording_is_one_problem_and_all_recordings_are_counted(tree):
    path = tree / "audio/original/F02/F02_B1_D1_M5.wav"
    before = path.read_bytes()
    path.write_bytes(b"")
    try:
        result, augmented = read(tree), read(tree, augment="all")
    finally:
        path.write_bytes(before)
    assert [problem.reason for problem in result.problems] == ["empty file"]
    assert any(note.startswith("6 recordings are of 1 utterances that have no label, or that") for note in result.notes)
    assert len(augmented.corpus) == 2 * 5355 - 7


def test_speakers_folders_may_be_in_lower_case(small):
    (small / "audio" / "M16").rename(small / "audio" / "m16")
    assert {utt.speaker for utt in read(small).corpus} == {"M16", "CM01"}


def test_labels_of_other_files_are_the_reported_reason(tmp_path):
    tree = uaspeech(tmp_path / "UASpeech", ("F02",), microphones=["M5"])
    path = tree / "mlf/F02/F02_word.mlf"
    path.write_text(path.read_text().replace("F02_", "F05_"))
    with pytest.raises(UserError, match="none of its recordings can be used: 765 x no label for its code"):
        read(tree)


def test_silences_and_hidden_files_are_no_labels(tmp_path):
    tree = uaspeech(tmp_path / "UASpeech", ("F02",), microphones=["M5"])
    path = tree / "mlf/F02/F02_word.mlf"
    path.write_text(path.read_text().replace("\nUPWARD\n", "\n0 9 sil\n9 20 UPWARD\n20 30 sp\n"))
    (path.parent / "._F02_word.mlf").write_text('"*/F02_B1_D1_M5.lab"\nWRONG\n.\n')
    texts = {utt.text for utt in read(tree).corpus}
    assert "UPWARD" in texts
    assert not texts & {"sil UPWARD sp", "WRONG"}


def test_label_files_are_source_files(small):
    assert small / "speaker_wordlist.xls" in importer.source_files(small, UASpeech())
    write_mlf(small / "mlf/M16/M16_word.mlf", "M16", ["M5"])
    assert small / "mlf/M16/M16_word.mlf" in importer.source_files(small, UASpeech())


@pytest.mark.parametrize("cut", [10, 600, 5000])
def test_a_damaged_xls_is_one_error(small, cut):
    path = small / "speaker_wordlist.xls"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"cannot be read as \.xls"):
        read(small, labels="xls")


def test_microphones_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match=r"uaspeech\.augment"):
        Fold.load("params/uaspeech.yaml", "M08", overrides={"uaspeech": {"augment": ["M9"]}})
