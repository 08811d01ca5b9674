import json
from pathlib import Path

import corpora
import pytest

from kdlib.corpus import manifest
from kdlib.corpus.manifest import Corpus, Speaker
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError

HEAD = "ID,duration,wav,spk_id,wrd\n"


def csv_file(tmp_path, text):
    path = tmp_path / "corpus.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_speechbrain_csv_is_read_by_column_name_and_data_folder(tmp_path):
    path = csv_file(tmp_path, "wrd,spk_id,extra,wav,ID,duration\nCAFÉ,ANNA,7,$data_folder/a/1.wav,a1,0.5\n")
    only = next(iter(manifest.read(path, tmp_path / "data")))
    assert only == Utterance("a1", "ANNA", tmp_path / "data/a/1.wav", 0.5, "CAFÉ")


def test_nemo_lines_are_read_with_their_speaker(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text(
        json.dumps({"audio_filepath": "a/1.wav", "duration": 0.5, "text": "one", "speaker": "ANNA"}) + "\n\n"
    )
    only = next(iter(manifest.read(path)))
    assert (only.utt_id, only.speaker, only.wav, only.text) == ("1", "ANNA", tmp_path / "a/1.wav", "one")


def test_both_formats_are_read_as_written(tmp_path):
    corpus = Corpus(
        (
            Utterance("a1", "ANNA", tmp_path / "a/1.wav", 0.5, 'IT\'S, "ONE"', "B1", "2", "digit", "abc"),
            Utterance("b1", "BEN", tmp_path / "b/1.wav", 1.25, "ZWEI", "B2"),
        )
    )
    manifest.write_speechbrain(corpus, tmp_path / "c.csv", tmp_path)
    corpora.write_nemo(corpus, tmp_path / "c.jsonl")
    assert manifest.read(tmp_path / "c.csv").utterances == corpus.utterances
    assert manifest.read(tmp_path / "c.jsonl").utterances == corpus.utterances


def test_audio_elsewhere_keeps_its_path(tmp_path):
    corpus = Corpus((Utterance("a1", "ANNA", Path("/elsewhere/1.wav"), 0.5, "ONE"),))
    manifest.write_speechbrain(corpus, tmp_path / "c.csv", tmp_path)
    assert manifest.read(tmp_path / "c.csv").utterances == corpus.utterances


BAD = {
    "missing column": ("ID,duration,wav,wrd\na,1,a.wav,X\n", "column 'spk_id' is missing"),
    "misspelt column": ("ID,duratoin,wav,spk_id,wrd\na,1,a.wav,S,X\n", "did you mean 'duratoin'"),
    "duplicate id": (HEAD + "a,1,a.wav,S,X\na,1,b.wav,S,Y\n", "'a' occurs twice"),
    "empty transcript": (HEAD + "a,1,a.wav,S,\n", "line 2: wrd (text) is empty"),
    "duration in words": (HEAD + "a,long,a.wav,S,X\n", "line 2: duration 'long' is not a number"),
    "no duration": (HEAD + "a,0,a.wav,S,X\n", "a duration of 0 s is impossible"),
    "short row": (HEAD + "a,1,a.wav\n", "line 2: spk_id (speaker) is empty"),
    "nothing in it": (HEAD, "no utterances in it"),
    "no header": ("", "the file is empty; a SpeechBrain CSV has ID,duration"),
    "semicolons": (HEAD.replace(",", ";"), "column 'ID' is missing; its columns are separated by ';', expected ','"),
    "a comma in a text": (HEAD + "a,1,a.wav,S,Well, yes\n", "line 2: 6 fields, but 5 in the header; put a text that"),
    "a quotation mark too few": (
        HEAD + 'a,1,a.wav,S,"X\nb,1,b.wav,S,Y\n',
        "line 3: wrd (text) has a line break or a control character; is a quotation mark never closed?",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_csv_is_refused_in_one_line(tmp_path, case):
    text, message = BAD[case]
    with pytest.raises(UserError) as caught:
        manifest.read(csv_file(tmp_path, text))
    assert message in str(caught.value)
    assert "corpus.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_invalid_json_is_named_with_its_line(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"audio_filepath": "a.wav", "duration": 1, "text": "x", "speaker": "S"}\n{"audio\n')
    with pytest.raises(UserError, match=r"c\.json, line 2: not JSON"):
        manifest.read(path)


def test_the_error_for_a_missing_manifest_has_advice():
    with pytest.raises(UserError, match="make the corpus first"):
        manifest.read(Path("nowhere.csv"))


@pytest.mark.parametrize("line", ["[1, 2]", "7", '{"audio_filepath": 7, "duration": 1, "text": "x"}'])
def test_json_of_another_shape_is_one_error(tmp_path, line):
    (tmp_path / "c.json").write_text(line + "\n")
    with pytest.raises(UserError, match=r"c\.json, line 1: "):
        manifest.read(tmp_path / "c.json")


def test_another_encoding_is_one_error(tmp_path):
    (tmp_path / "corpus.csv").write_bytes((HEAD + "a,1,a.wav,S,CAF\u00c9\n").encode("latin-1"))
    with pytest.raises(UserError, match=r"corpus\.csv: not UTF-8"):
        manifest.read(tmp_path / "corpus.csv")


def nemo(tmp_path, *rows):
    path = tmp_path / "corpus.jsonl"
    defaults = {"duration": 0.5, "text": "one", "speaker": "ANNA"}
    path.write_text("".join(json.dumps(defaults | row) + "\n" for row in rows))
    return path


def test_nemo_names_that_are_not_unique_get_their_folders(tmp_path):
    path = nemo(tmp_path, {"audio_filepath": "a/1.wav"}, {"audio_filepath": "b/1.wav"}, {"audio_filepath": "b/2.wav"})
    assert [utt.utt_id for utt in manifest.read(path)] == ["a_1", "b_1", "2"]


def test_nemo_parts_of_one_file_are_separate_utterances(tmp_path):
    rows = [{"audio_filepath": "a/long.wav", "offset": offset} for offset in (0.0, 1.25)]
    corpus = manifest.read(nemo(tmp_path, *rows))
    assert [(utt.utt_id, utt.offset_s) for utt in corpus] == [("a_long_0.000", 0.0), ("a_long_1.250", 1.25)]


def test_parts_and_copies_survive_both_formats(tmp_path):
    utterances = (
        Utterance("a1", "ANNA", tmp_path / "a/1.wav", 0.5, "ONE", offset_s=0.25),
        Utterance("a1_M3", "ANNA", tmp_path / "a/1_M3.wav", 0.5, "ONE", copy_of="a1"),
    )
    manifest.write_speechbrain(utterances, tmp_path / "c.csv", tmp_path)
    corpora.write_nemo(utterances, tmp_path / "c.jsonl")
    assert manifest.read(tmp_path / "c.csv").utterances == utterances == manifest.read(tmp_path / "c.jsonl").utterances


def test_absolute_paths_are_free_but_relative_ones_stay_in_the_data_folder(tmp_path):
    only = next(iter(manifest.read(csv_file(tmp_path, HEAD + "a,1,/elsewhere/a.wav,S,X\n"))))
    assert only.wav == Path("/elsewhere/a.wav")
    inside = next(iter(manifest.read(csv_file(tmp_path, HEAD + "a,1,b/../a.wav,S,X\n"))))
    assert inside.wav == tmp_path / "a.wav"
    for path in ("../a.wav", "$data_folder/../a.wav", "b/../../a.wav", "$data_folder/b/../../../etc/a.wav"):
        with pytest.raises(UserError, match=r"line 2: the path .* leaves the data folder"):
            manifest.read(csv_file(tmp_path, HEAD + f"a,1,{path},S,X\n"))


def test_least_intelligible_speakers_come_first_and_controls_last():
    info = {
        "A": Speaker("A", level="HIGH"),
        "B": Speaker("B", intelligibility_pct=15),
        "C": Speaker("C"),
        "D": Speaker("D", level="CONTROL"),
    }
    corpus = Corpus(tuple(Utterance(name, name, Path("x"), 1.0, "ONE") for name in "ABCD"), people=info)
    assert corpus.by_intelligibility == ["B", "A", "C", "D"]
    assert corpus.dysarthric == ["A", "B", "C"]


def test_the_order_of_speakers_is_named_by_what_is_known_of_them():
    def order(**people):
        people = {name: Speaker(name, **about) for name, about in people.items()}
        return Corpus(tuple(Utterance(n, n, Path("x"), 1.0, "ONE") for n in people), people=people).speaker_order

    control, unknown = {"level": "CONTROL"}, {}
    assert order(A=unknown, B=unknown) == "by name"
    assert order(A=unknown, B=control) == "by name"  # a control says nothing about the others
    assert order(A={"level": "LOW"}, B={"intelligibility_pct": 4.0}, C=control) == "by intelligibility, least first"
    assert order(A={"level": "LOW"}, B=unknown) == "by intelligibility, least first; unknown: last, by name"


def test_csv_is_read_as_speechbrain_reads_it(tmp_path):
    """Spaces after commas, and quotation marks after the spaces."""
    path = csv_file(tmp_path, HEAD.replace(",", ", ") + 'a, 1, a.wav, S, "WELL, YES"\n')
    only = next(iter(manifest.read(path)))
    assert (only.text, only.duration_s) == ("WELL, YES", 1.0)


def test_numbers_and_zero_are_valid_speaker_names_in_nemo(tmp_path):
    only = next(iter(manifest.read(nemo(tmp_path, {"audio_filepath": "a.wav", "speaker": 0, "text": 0}))))
    assert (only.speaker, only.text) == ("0", "0")


def test_nemo_with_a_byte_order_mark_and_line_separators_in_texts(tmp_path):
    path = nemo(tmp_path, {"audio_filepath": "a.wav"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b'"one"', '"one\u2028two"'.encode()))
    assert next(iter(manifest.read(path))).text == "one\u2028two"


def test_an_unclosed_quotation_is_one_error(tmp_path):
    path = csv_file(tmp_path, HEAD + 'a,1,a.wav,S,"X\n' + "b,1,b.wav,S,Y\n" * 20_000)
    with pytest.raises(UserError, match="is a quotation mark never closed"):
        manifest.read(path)


@pytest.mark.parametrize("offset", ["-1", "soon"])
def test_impossible_offsets_are_named(tmp_path, offset):
    with pytest.raises(UserError, match=f"offset (of )?'?{offset}"):
        manifest.read(nemo(tmp_path, {"audio_filepath": "a.wav", "offset": offset}))
