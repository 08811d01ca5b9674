"""The corpus stage on any manifest, and its error messages."""

import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from kdlib.corpus import audio, audio_checks, manifest, prepare
from kdlib.corpus.audio_checks import UNREADABLE, FileInfo, _inspect
from kdlib.corpus.speakers import Splits
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.pipeline import Fold
from kdlib.tokens import PER_WORD, Tokens, pieces_per_word, train_tokenizer


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


def small(folder, **overrides):
    settings = {"corpus": "manifest", "manifest": str(folder / "data/corpus.csv"), "outputs": str(folder / "out")}
    settings["speakers"] = "uaspeech"
    return Fold.load("params/demo.yaml", "M08", overrides=settings | overrides)


def test_a_manifest_is_checked_and_bad_files_are_left_out(folder):
    stage_folder = small(folder).prepared_corpus()
    assert len(small(folder).corpus) == 5
    assert (stage_folder / "left_out.csv").read_text().splitlines()[1].startswith("M08_B1,M08,")
    report = (stage_folder / "report.txt").read_text()
    assert "6 recordings checked, 1 left out" in report
    assert "5 files of 8000 Hz, 2 channels are read as 16000 Hz mono" in report
    assert list(small(folder).lexicon) == ["ONE", "TWO"]


def test_the_checked_manifest_still_points_to_the_audio(folder):
    small(folder).prepared_corpus()
    assert all(utt.wav.is_file() for utt in small(folder).corpus)


def test_a_changed_manifest_is_read_again(folder):
    small(folder).prepared_corpus()
    path = folder / "data/corpus.csv"
    path.write_text(path.read_text().replace("TWO", "THREE"))
    assert list(small(folder).lexicon) == ["ONE", "THREE"]


def test_a_corpus_of_controls_alone_is_refused(folder):
    path = folder / "data/corpus.csv"
    text = path.read_text()
    for speaker, control in (("M08", "CM01"), ("M10", "CM04"), ("M09", "CM05")):
        text = text.replace(f",{speaker},", f",{control},")
    path.write_text(text)
    with pytest.raises(UserError, match="all its speakers are controls"):
        small(folder).prepared_corpus()
    assert not (folder / "out/demo/corpus").exists()


def test_a_missing_audio_folder_is_one_error(folder):
    shutil.move(folder / "data", folder / "elsewhere")
    (folder / "data").mkdir()
    shutil.copy(folder / "elsewhere/corpus.csv", folder / "data/corpus.csv")
    with pytest.raises(
        UserError, match=r"none of its 6 audio files can be used; the first, .*M08_B1\.flac: the file is m"
    ):
        small(folder).prepared_corpus()


def test_transcripts_are_normalised(folder):
    path = folder / "data/corpus.csv"
    path.write_text(path.read_text().replace("TWO", "X-ray").replace("ONE", "one"))
    assert list(small(folder).lexicon) == ["ONE", "X-RAY"]
    assert list(small(folder, hyphens="space").lexicon) == ["ONE", "X RAY"]


# --- a user's own corpus, with every fault that it may have ---


@pytest.fixture
def own(tmp_path):
    """Five speakers who are in no table, four words twice each, at 8 kHz in stereo."""
    rng = np.random.default_rng(0)
    lines = ["ID,duration,wav,spk_id,wrd"]
    for name in ("Ann", "Bob", "Cid", "Dee", "Eve"):
        for take in (1, 2):
            for number, word in enumerate(("can't", "café", "x-ray", "Water")):
                wav = tmp_path / "data" / name / f"{number}_{take}.flac"
                wav.parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(wav, rng.normal(0, 0.1, (4000, 2)), 8000)
                lines.append(f"{name}_{number}_{take},0.5,$data_folder/{name}/{wav.name},{name},{word}")
    (tmp_path / "data" / "corpus.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def own_fold(folder, **overrides):
    paths = {"manifest": str(folder / "data/corpus.csv"), "outputs": str(folder / "out"), "folds": "none"}
    return Fold.load("params/own.yaml", "Ann", fold={"dev": "Bob"}, overrides=paths | overrides)


def edit(folder, old, new, times=1):
    path = folder / "data/corpus.csv"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, times), encoding="utf-8")


def report(folder, **overrides):
    return (own_fold(folder, **overrides).prepared_corpus() / "report.txt").read_text(encoding="utf-8")


def test_speakers_without_metadata(own):
    corpus = own_fold(own).corpus
    assert corpus.speakers == corpus.dysarthric == ["Ann", "Bob", "Cid", "Dee", "Eve"]
    assert {corpus.level(name) for name in corpus.speakers} == {""}
    assert list(own_fold(own).lexicon) == ["CAFÉ", "CAN'T", "WATER", "X-RAY"]
    assert {utt.duration_s for utt in corpus} == {0.5}
    assert report(own).splitlines() == [
        "40 recordings checked, 0 left out",
        "  40 files of 8000 Hz, 2 channels are read as 16000 Hz mono",
    ]


FAULTS = {
    "the file is missing": lambda path: path.unlink(),
    "no samples in it": lambda path: soundfile.write(path, np.zeros((0, 1)), 8000, format="WAV"),
    "NaN or infinite samples": lambda path: soundfile.write(
        path, np.full((4000, 1), np.nan), 8000, format="WAV", subtype="FLOAT"
    ),
    "the file cannot be read as audio": lambda path: path.write_bytes(b""),
    "nothing but silence": lambda path: soundfile.write(path, np.outer(np.sin(np.arange(4000)), [0.3, -0.3]), 8000),
    "too short to hold speech": lambda path: soundfile.write(path, np.ones((400, 2)) / 3, 8000),
    "far too short for its transcript": lambda path: soundfile.write(path, np.ones((1000, 2)) / 3, 8000),
}


@pytest.mark.parametrize("reason", FAULTS)
def test_unusable_recordings_are_left_out_with_advice(own, reason):
    path = own / "data/Ann/0_1.flac"
    FAULTS[reason](path)
    text = report(own)
    assert "40 recordings checked, 1 left out (2.5 %; each is named in left_out.csv)" in text
    assert f"left out, 1 x {reason}\n    speakers: Ann 1\n    first: {path}\n    what to do: " in text
    left_out = (own / "out/own/corpus/left_out.csv").read_text().splitlines()
    assert left_out == ["utt_id,speaker,wav,reason", f"Ann_0_1,Ann,{path},{reason}"]
    assert len(own_fold(own).corpus) == 39


REFUSED = {
    "a column is missing": (("spk_id", "who"), "column 'spk_id' is missing; expected one of ID, duration, wav, who"),
    "a duplicate id": (("Bob_2_1,", "Bob_1_1,"), "utterance id 'Bob_1_1' occurs twice; ids must be unique"),
    "a path leaves the data folder": (
        ("$data_folder/Bob/1_1.flac", "$data_folder/../../secret.wav"),
        "line 11: the path '$data_folder/../../secret.wav' leaves the data folder",
    ),
    "a relative path leaves it": (("$data_folder/Bob/1_1.flac", "../1_1.flac"), "the path '../1_1.flac' leaves"),
    "a speaker's name is a path": ((",Bob,", ",Bob/B,"), "the speaker name 'Bob/B' cannot name a folder of results"),
    "a speaker's name is a folder of ours": ((",Bob,", ",corpus,"), "'corpus' cannot name a folder of results"),
    "one speaker in two cases": ((",Bob,", ",ann,"), "speakers 'Ann' and 'ann' differ in case only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_manifests_are_refused_in_one_line(own, case):
    (old, new), message = REFUSED[case]
    edit(own, old, new)
    with pytest.raises(UserError) as caught:
        own_fold(own).prepared_corpus()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (own / "out/own/corpus").exists()


def test_several_bad_lines_are_one_error(own):
    edit(own, ",0.5,$data_folder/Cid", ",half,$data_folder/Cid", times=8)
    with pytest.raises(UserError, match=r"line 18: duration 'half' .*; line 19: .*; line 20: .* \(and 5 more lines\)"):
        own_fold(own).prepared_corpus()


def test_two_spellings_of_a_word_are_merged_and_reported(own):
    edit(own, "Water", "WATER", times=3)
    note = "transcripts with more than one spelling, merged into one: 1, first WATER ('Water' 7, 'WATER' 3)"
    assert note in report(own)
    assert list(own_fold(own).lexicon).count("WATER") == 1


def test_a_speaker_of_the_fold_file_who_is_not_in_the_corpus_is_named(own):
    corpus = own_fold(own).corpus
    unknown = Fold.load("params/own.yaml", "Ann", fold={"dev": "Bobby"}, overrides={"folds": "none"})
    with pytest.raises(UserError, match=r"the dev speaker 'Bobby' has no utterances; did you mean 'Bob'\?"):
        Splits(corpus, unknown.split_settings)


def test_a_speaker_without_a_usable_file_is_named(own):
    for path in (own / "data/Eve").iterdir():
        path.write_bytes(b"none")
    assert "note: Eve has no usable recording, and was removed from the corpus" in report(own)
    assert "Eve" not in own_fold(own).corpus.speakers


def test_one_per_cent_of_unreadable_files_do_not_stop_a_run(tmp_path):
    """20 of 2,000 files, of four speakers: all are named, by speaker, with the first one's path."""
    (tmp_path / "data").mkdir()
    samples = np.random.default_rng(0).normal(0, 0.1, 4000)
    lines = ["ID,duration,wav,spk_id,wrd"]
    for number in range(2000):
        path = tmp_path / "data" / f"{number}.wav"
        path.write_bytes(b"none") if number % 100 == 7 else soundfile.write(path, samples, 16_000)
        lines.append(f"{number},0.25,{number}.wav,S{number % 3},one")
    (tmp_path / "data/corpus.csv").write_text("\n".join(lines))
    text = report(tmp_path)
    assert "2,000 recordings checked, 20 left out (1.0 %; each is named in left_out.csv)" in text
    assert f"speakers: S0 6, S1 7, S2 7\n    first: {tmp_path}/data/7.wav\n    what to do: copy it again" in text
    assert len((tmp_path / "out/own/corpus/left_out.csv").read_text().splitlines()) == 21


def test_only_changed_files_are_checked_again(own, monkeypatch):
    checked = []
    monkeypatch.setattr(audio_checks, "_inspect", lambda utt: checked.append(utt.utt_id) or _inspect(utt))
    own_fold(own).prepared_corpus()
    assert len(checked) == 40
    own_fold(own).prepared_corpus()
    assert len(checked) == 40
    soundfile.write(own / "data/Ann/0_1.flac", np.ones((8000, 1)) / 3, 8000)
    note = "durations in the manifest that differ from those of the files, which are used: 1, first Ann_0_1 (0.5 s"
    assert note in report(own)
    assert checked[40:] == ["Ann_0_1"]
    own_fold(own, speakers={"Eve": {"level": "CONTROL"}}).prepared_corpus()
    assert checked[40:] == ["Ann_0_1"]


def test_a_killed_check_is_resumed(own, monkeypatch):
    checked = []

    def stop_half_way(utt):
        if len(checked) == 20:
            raise KeyboardInterrupt
        checked.append(utt.utt_id)
        return _inspect(utt)

    monkeypatch.setattr(audio_checks, "_PART", 8)
    monkeypatch.setattr(audio_checks, "_inspect", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        own_fold(own).prepared_corpus()
    monkeypatch.setattr(audio_checks, "_inspect", lambda utt: checked.append(utt.utt_id) or _inspect(utt))
    own_fold(own).prepared_corpus()
    assert len(checked) <= 20 + 24  # two parts of eight were kept
    assert len(own_fold(own).corpus) == 40


def test_blocks_by_repetition(own):
    fold = own_fold(own, blocks={"source": "repetition", "train": ["R1"], "test": ["R2"]})
    splits = fold.splits
    assert {utt.utt_id[-1] for utt in splits.train} == {"1"}
    assert {utt.utt_id[-1] for utt in (*splits.test, *splits.dev)} == {"2"}
    without_blocks = own_fold(own, blocks={"source": "repetition"})
    with pytest.raises(UserError, match="there is no block 'B1' in this corpus; it has R1, R2"):
        _ = without_blocks.splits


def test_utterances_without_a_block_among_others_are_refused(own):
    edit(own, ",wrd\n", ",wrd,block\n")
    edit(own, ",can't\n", ",can't,B1\n", times=9)
    with pytest.raises(UserError, match="31 of 40 utterances have no block, for example Ann_1_1"):
        own_fold(own).prepared_corpus()


def test_a_lexicon_from_a_file(own):
    (own / "words.txt").write_text("Can't\ncafé\nx-ray\n\nmore\n", encoding="utf-8")
    fold = own_fold(own, lexicon=str(own / "words.txt"))
    assert (
        f"not in the lexicon {own}/words.txt, and cannot be recognised with it: 10, first 'WATER'"
        in (fold.prepared_corpus() / "report.txt").read_text()
    )
    assert list(fold.lexicon) == ["CAFÉ", "CAN'T", "MORE", "X-RAY"]
    with pytest.raises(UserError, match="lexicon: there is no file"):
        own_fold(own, lexicon="none.txt").prepared_corpus()
    (own / "words.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UserError, match=r"words\.txt: not UTF-8"):
        fold.prepared_corpus()


def test_few_words_limit_the_number_of_pieces(own):
    (own / "words.txt").write_text("yes\nno\nwater\n", encoding="utf-8")
    text = report(own, lexicon=str(own / "words.txt"))
    note = re.search(r"note: a tokenizer of the lexicon's words has at most (\d+) pieces, 2\.\d per word", text)
    words = ["YES", "NO", "WATER"]
    means = [
        pieces_per_word(Tokens.for_nemo(train_tokenizer(words, int(note[1]) + more, own).read_bytes()), words)
        for more in (0, 1)
    ]
    assert means[0] >= PER_WORD > means[1]
    assert "pieces" not in report(own)  # CAN'T and X-RAY are cut at their marks, whatever the number


def test_a_changed_lexicon_is_read_again_whatever_its_name(own):
    """Even one with the name of the manifest."""
    (own / "lists").mkdir()
    (own / "lists/corpus.csv").write_text("water\n")
    lexicon = str(own / "lists/corpus.csv")
    assert list(own_fold(own, lexicon=lexicon).lexicon) == ["WATER"]
    (own / "lists/corpus.csv").write_text("water\nfire\n")
    edit(own, "x-ray", "beam")
    fold = own_fold(own, lexicon=lexicon)
    assert list(fold.lexicon) == ["FIRE", "WATER"]
    assert "BEAM" in fold.corpus.lexicon


def test_a_missing_data_folder_is_named(own):
    with pytest.raises(
        UserError, match=r"data_folder: there is no folder .*/nowhere; correct data_folder in the recipe"
    ):
        own_fold(own, data_folder=str(own / "nowhere")).prepared_corpus()


def test_controls_of_the_recipe_are_never_held_out_and_not_in_the_lexicon(own):
    edit(own, "Eve,Water", "Eve,fire", times=2)
    fold = own_fold(own, speakers={"Eve": {"level": "CONTROL"}, "Finn": {"level": "LOW"}})
    text = (fold.prepared_corpus() / "report.txt").read_text()
    assert "note: the recipe names speakers who are not in the corpus: Finn" in text
    assert fold.corpus.dysarthric == ["Ann", "Bob", "Cid", "Dee"]
    assert "FIRE" not in fold.lexicon
    assert {utt.speaker for utt in fold.splits.train} == {"Cid", "Dee"}


def test_punctuation_is_reported_and_optionally_dropped(own):
    edit(own, "Ann,Water", '"Ann","Well, water!"')
    assert "the transcripts contain the marks ! ,, which count" in report(own)
    assert "WELL WATER" in own_fold(own, punctuation="drop").lexicon
    edit(own, '"Well, water!"', "?!")
    assert "left out, 1 x the transcript has no letters" in report(own, punctuation="drop")


def test_transcripts_are_corrected_from_the_recipe(own):
    fold = own_fold(own, replace={"'": "", "Wat": "wit"})
    assert list(fold.lexicon) == ["CAFÉ", "CANT", "WITER", "X-RAY"]


def test_a_recording_of_two_speakers_is_refused(own):
    """If one of them is held out, the recording would still be in the training set."""
    edit(own, "$data_folder/Cid/1_1.flac", "$data_folder/Ann/1_1.flac")
    with pytest.raises(UserError, match=r"Ann/1_1\.flac is listed for Ann and for Cid"):
        own_fold(own).prepared_corpus()


def test_a_file_under_two_ids_of_one_speaker_is_reported(own):
    edit(own, "$data_folder/Ann/1_1.flac", "$data_folder/Ann/1_2.flac")
    assert "files that are listed under more than one id, and count each time: 1, first" in report(own)


def test_copies_of_excluded_utterances_are_left_out_and_named(own):
    """Ann_1_1 is damaged; Ann_2_1 is another recording of it, Ann_3_1 one of an utterance that does not exist."""
    edit(own, ",wrd\n", ",wrd,copy_of\n")
    edit(own, ",Ann,x-ray\n", ",Ann,café,Ann_1_1\n")
    edit(own, ",Ann,Water\n", ",Ann,Water,Ann_9_9\n")
    (own / "data/Ann/1_1.flac").write_bytes(b"none")
    assert "40 recordings checked, 3 left out" in report(own)
    left_out = (own / "out/own/corpus/left_out.csv").read_text()
    for utt_id in ("Ann_2_1", "Ann_3_1"):
        assert f"{utt_id},Ann," in left_out
    assert left_out.count("another recording of an utterance that was left out") == 2
    repeated = own_fold(own, blocks={"source": "repetition"})
    assert len(repeated.corpus) == 37


def test_copies_do_not_count_as_repetitions_and_share_their_block(own):
    edit(own, ",wrd\n", ",wrd,copy_of\n")
    edit(own, ",Ann,can't\n", ",Ann,can't\n", times=1)
    edit(own, ",Ann,x-ray\n", ",Ann,can't,Ann_0_1\n")
    corpus = own_fold(own, blocks={"source": "repetition"}).corpus
    blocks = {utt.utt_id: utt.block for utt in corpus}
    assert (blocks["Ann_0_1"], blocks["Ann_2_1"], blocks["Ann_0_2"]) == ("R1", "R1", "R2")


def test_a_repetition_column_is_used_where_present(own):
    edit(own, ",wrd\n", ",wrd,repetition\n")
    edit(own, ",Ann,can't\n", ",Ann,can't,7\n")
    corpus = own_fold(own, blocks={"source": "repetition"}).corpus
    assert next(utt.block for utt in corpus if utt.utt_id == "Ann_0_1") == "R7"


def test_blocks_are_rebuilt_when_their_source_changes(own):
    assert {utt.block for utt in own_fold(own).corpus} == {""}
    assert {utt.block for utt in own_fold(own, blocks={"source": "repetition"}).corpus} == {"R1", "R2"}


def test_temporary_faults_are_not_saved(own, monkeypatch):
    """Missing permissions, a disk error: not a fault of the file."""
    fault = FileInfo(UNREADABLE, "", 0.0, (0.0, 0.0))
    monkeypatch.setattr(audio_checks, "_inspect", lambda utt: fault if utt.utt_id == "Ann_0_1" else _inspect(utt))
    assert "left out, 1 x no permission to read the file" in report(own)
    monkeypatch.setattr(audio_checks, "_inspect", _inspect)
    assert "0 left out" in report(own, hyphens="space")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_later_permissions_are_noticed(own):
    path = own / "data/Ann/0_1.flac"
    path.chmod(0)
    assert "left out, 1 x no permission to read the file" in report(own)
    path.chmod(0o644)
    assert "0 left out" in report(own)


def test_a_file_damaged_after_the_check_is_named_when_it_is_read(own):
    corpus = own_fold(own).corpus
    (own / "data/Ann/0_1.flac").write_bytes(b"none")
    with pytest.raises(UserError, match=r"Ann_0_1: .* was readable before, but is not any more .* run 00_corpus again"):
        audio.load(corpus.utterances[0])


def test_paths_that_are_not_utf_8_are_left_out(own):
    odd = own / "data" / os.fsdecode(b"caf\xe9.wav")
    soundfile.write(own / "data/odd.wav", np.ones(4000) / 3, 8000)
    (own / "data/odd.wav").rename(odd)
    corpus = own_fold(own).corpus
    odd_corpus = replace(corpus, utterances=(*corpus.utterances, corpus.utterances[0].replace(utt_id="odd", wav=odd)))
    kept, problems = prepare._check_paths(odd_corpus, own_fold(own).corpus_settings)
    assert (len(kept), [problem.reason for problem in problems]) == (40, ["its path is not UTF-8"])


def test_invisible_characters_in_transcripts_are_removed(own):
    """A byte order mark and a soft hyphen."""
    edit(own, "Ann,Water", "Ann,\ufeffWa\u00adter")
    assert list(own_fold(own).lexicon) == ["CAFÉ", "CAN'T", "WATER", "X-RAY"]


def test_a_lexicon_may_have_several_spellings_of_a_word(tmp_path, own):
    (tmp_path / "words.txt").write_text("water\nX-RAY\nx-ray\tx ray\nX-RAY\txray\n")
    fold = own_fold(own, lexicon=str(tmp_path / "words.txt"))
    assert fold.lexicon == {"WATER": ["WATER"], "X-RAY": ["X-RAY", "X RAY", "XRAY"]}
    assert list(fold.lexicon) == ["WATER", "X-RAY"]
