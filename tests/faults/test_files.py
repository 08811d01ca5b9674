"""Files that users bring, damaged or strange: one sentence that names the file, and never a traceback or a silence."""

import csv
import hashlib
import json
import os

import numpy as np
import pytest
import soundfile

from kdlib.corpus.audio_checks import check_recordings
from kdlib.corpus.manifest import check_names, read
from kdlib.decode import lm
from kdlib.errors import UserError
from kdlib.evaluate import predictions
from kdlib.tokens import Tokens


def recording(path, seconds=0.5):
    rng = np.random.default_rng(0)
    soundfile.write(path, rng.normal(size=int(16000 * seconds)) / 20, 16000)
    return path


def row(**changed):
    return {"ID": "u1", "duration": "0.5", "wav": "a.wav", "spk_id": "S1", "wrd": "ONE"} | changed


def write_csv(path, rows, header=None):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header or list(rows[0]))
        writer.writerows([list(one.values()) for one in rows])
    return path


MANIFESTS = {
    "no rows": ([], ["ID", "duration", "wav", "spk_id", "wrd"], "no utterances"),
    "a column twice": ([row()], ["ID", "duration", "wav", "spk_id", "spk_id"], "the column 'spk_id' occurs twice"),
    "a column is missing": ([row()], ["ID", "duration", "wav", "speaker_name", "wrd"], "column 'spk_id' is missing"),
    "no duration": ([row(duration="")], None, "duration is empty"),
    "a duration in words": ([row(duration="long")], None, "'long' is not a number of seconds"),
    "no seconds": ([row(duration="0")], None, "a duration of 0 s is impossible"),
    "negative seconds": ([row(duration="-1")], None, "a duration of -1 s is impossible"),
    "nan seconds": ([row(duration="nan")], None, "a duration of nan s is impossible"),
    "infinite seconds": ([row(duration="inf")], None, "a duration of inf s is impossible"),
    "a day": ([row(duration="86400")], None, "is impossible; expected more than 0, below 3600"),
    "no speaker": ([row(spk_id="")], None, r"spk_id \(speaker\) is empty"),
    "no wav": ([row(wav="")], None, r"wav \(audio_filepath\) is empty"),
    "a path out of the folder": ([row(wav="../../etc/passwd")], None, "leaves the data folder"),
    "an id twice": ([row(), row()], None, "utterance id 'u1' occurs twice"),
    "a line break in a text": ([row(wrd="ONE\nTWO")], None, "has a line break or a control character"),
    "a zero byte": ([row(wrd="ON\x00E")], None, "control character"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_wrong_csv_is_refused_with_its_line(tmp_path, case):
    rows, header, message = MANIFESTS[case]
    path = write_csv(tmp_path / "m.csv", rows, header)
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert "m.csv" in str(error.value)
    assert "\n" not in str(error.value)


LINES = {
    "not JSON": ("{", "not JSON"),
    "a list": ("[1]", "found list; expected a JSON object"),
    "a number": ("7", "found int; expected a JSON object"),
    "a transcript that is an object": (json.dumps(row(text={"a": 1})), "text is a dict, expected text"),
    "a path that is a list": (json.dumps({"audio_filepath": ["a.wav"], "duration": 1, "text": "A"}), "is a list"),
    "a duration that is true": (
        json.dumps({"audio_filepath": "a.wav", "duration": True, "text": "A", "speaker": "S"}),
        "duration is a bool",
    ),
    "nothing in it": ("{}", "is empty"),
    "NaN": ('{"audio_filepath": "a.wav", "duration": NaN, "text": "A", "speaker": "S"}', "duration of nan s"),
}


@pytest.mark.parametrize("case", LINES)
def test_a_wrong_json_line_is_refused_with_its_number(tmp_path, case):
    line, message = LINES[case]
    path = tmp_path / "m.jsonl"
    path.write_text(f"{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert "line 1" in str(error.value)


def corpus_of(tmp_path, *speakers):
    rows = [row(ID=f"u{number}", spk_id=name) for number, name in enumerate(speakers)]
    return read(write_csv(tmp_path / "m.csv", rows))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("M08", "m08"), "differ in case only"),
        (("M08", "\u041c08"), "differ in letters that look alike"),  # a Cyrillic M
        (("M08", "\uff2d08"), "differ in letters that look alike"),  # a wide M
        (("A1", "\u03911"), "differ in letters that look alike"),  # a Greek A
        (("M08", "corpus"), "cannot name a folder"),
        (("M08", "../x"), "cannot name a folder"),
        (("M08", "x" * 200), "has 200 bytes, too many for a folder's name"),
        (("M08", "\u00fc" * 60), "has 120 bytes"),
    ],
)
def test_speakers_that_could_be_taken_for_each_other_or_name_no_folder(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        check_names(corpus_of(tmp_path, *names))


def test_a_pipe_in_place_of_a_recording_is_left_out(tmp_path):
    """Opening it would wait for ever."""
    recording(tmp_path / "a.wav")
    os.mkfifo(tmp_path / "b.wav")
    (tmp_path / "c.wav").mkdir()
    rows = [row(), row(ID="u2", wav="b.wav"), row(ID="u3", wav="c.wav")]
    corpus, report = check_recordings(read(write_csv(tmp_path / "m.csv", rows)))
    assert [utt.utt_id for utt in corpus] == ["u1"]
    assert "a pipe or a device" in str(report)


@pytest.mark.parametrize("damage", ["half", "noise", "none"])
def test_a_recording_that_is_not_the_manifests(tmp_path, damage):
    """A column sha256 (or its beginning) says which bytes a file had."""
    path = recording(tmp_path / "a.wav")
    recording(tmp_path / "b.wav", 0.7)
    content = path.read_bytes()
    rows = [row(sha256=hashlib.sha256(content).hexdigest()[:16]), row(ID="u2", wav="b.wav", sha256="")]
    if damage == "half":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "noise":
        path.write_bytes(content[:2000] + np.random.default_rng(1).bytes(6000) + content[8000:])
    corpus, report = check_recordings(read(write_csv(tmp_path / "m.csv", rows)))
    assert [utt.utt_id for utt in corpus] == (["u1", "u2"] if damage == "none" else ["u2"])
    assert damage == "none" or "its checksum is not the manifest's" in str(report)


@pytest.mark.parametrize("number", ["nan", "inf", "much", ""])
def test_an_arpa_file_without_numbers_is_refused(tmp_path, number):
    path = tmp_path / "lm.arpa"
    path.write_text(f"\\data\\\nngram 1=1\n\n\\1-grams:\n{number}\tONE\n\n\\end\\\n")
    with pytest.raises(UserError, match=r"lm\.arpa: not an ARPA file"):
        lm.read(path)


PREDICTIONS = {
    "nothing": b"",
    "not JSON": b"{",
    "bytes": bytes(range(256)) * 4,
    "a number": b"7",
    "an empty list": b"[]",
    "an empty object": b"{}",
    "no hypotheses": b'{"predictions": []}',
    "numbers as texts": b'{"predictions": [1, 2, 3]}',
    "other keys": b'{"results": [{"a": 1}]}',
    "half a file": b'{"predictions": [{"utt_id": "a", "reference": "ONE", "prediction_text": "O',
    "no references": b'{"predictions": [{"utt_id": "a", "prediction_text": "ONE"}]}',
    "nested": b'{"predictions": {"a": {"b": {"c": 1}}}}',
}


@pytest.mark.parametrize("case", PREDICTIONS)
def test_results_that_cannot_be_read_are_one_sentence(tmp_path, case):
    path = tmp_path / "evaluation.json"
    path.write_bytes(PREDICTIONS[case])
    with pytest.raises(UserError) as error:
        predictions.read(path)
    assert "evaluation.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no model", bytes(64)], ids=["empty", "text", "zeros"])
def test_a_tokenizer_that_is_none(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.model is not a sentencepiece model"):
        Tokens.for_teachers(path)
