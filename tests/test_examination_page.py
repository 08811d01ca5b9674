"""The command `make examine`: output, written files, and refused input."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from kdlib.errors import UserError
from kdlib.show import examination_page
from kdlib.tokens import Tokens, train_tokenizer

WORDS = "ONE TWO SEVEN NINE COME GO YALE CAN THE WATER OTHER PEOPLE ALPHA BRAVO SIERRA COMMAND DELETE ENTER"
WORDS = WORDS.split(" ")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Files in the format of the original study: decoded with ids off by one, and of an untrained head."""
    folder, rng = tmp_path_factory.mktemp("original"), random.Random(5)
    path = train_tokenizer(WORDS, 60, folder)
    tokens = Tokens.for_teachers(path)
    for name, transcribe in (
        ("decoder", lambda word: tokens.encode(word if rng.random() < 0.3 else rng.choice(WORDS[:4]))),
        ("ctc", lambda word: [rng.randrange(3, 60) for _ in range(rng.randrange(20, 30))]),
    ):
        rows = []
        for word in WORDS:
            for microphone in range(2, 9):
                ids = transcribe(word)
                rows.append(
                    {
                        "utterance_id": f"M08_B3_{word}_M{microphone}",
                        "target": word,
                        "prediction_tokens": ids,
                        "prediction_text": tokens.decode(index - 1 for index in ids),
                    }
                )
        (folder / f"evaluation_{name}.json").write_text(json.dumps({"predictions": rows}), encoding="utf-8")
    return folder


def test_command_prints_the_verdict_first_and_writes_a_page(original, tmp_path, capsys):
    examination_page.main([str(original / "evaluation_decoder.json"), "--out", str(tmp_path)])  # finds its tokenizer
    lines = capsys.readouterr().out.splitlines()
    assert {path.name for path in tmp_path.iterdir()} == {
        "page.txt", "answers.csv", "examination.json", "examination.png", "examination.pdf"
    }  # fmt: skip
    record = json.loads((tmp_path / "examination.json").read_text(encoding="utf-8"))
    assert record["severity"] == "wrong_decoding"
    assert lines[2] == record["verdict"]
    assert "offset -1" in record["verdict"]
    assert record["causes"] == ["h"]


def test_untrained_head_is_input_independent_in_every_decoding(original, tmp_path, capsys):
    model = original / "tokenizer.model"
    examination_page.main([str(original / "evaluation_ctc.json"), "--tokenizer", str(model), "--out", str(tmp_path)])
    record = json.loads((tmp_path / "examination.json").read_text(encoding="utf-8"))
    assert record["severity"] == "input_independent"
    assert capsys.readouterr().out.splitlines()[2] == record["verdict"]
    assert "No other " in record["verdict"]
    assert record["causes"] == ["i"]


def test_invalid_input_is_refused_in_one_line(original, tmp_path):
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    (tmp_path / "bad.model").write_text("no model", encoding="utf-8")
    evaluation = str(original / "evaluation_ctc.json")
    rows = [{"utterance_id": "u", "target": "ONE", "prediction_tokens": [5]}]
    ids_only = tmp_path / "ids" / "ids.json"
    ids_only.parent.mkdir()
    ids_only.write_text(json.dumps({"predictions": rows}), encoding="utf-8")
    for arguments, message in (
        ([str(tmp_path / "none.json")], r"none\.json: .*expected"),
        ([str(tmp_path / "bad.json")], "it is a JSON object without predictions"),
        ([evaluation, "--tokenizer", str(tmp_path / "none.model")], "no such file"),
        ([evaluation, "--tokenizer", str(tmp_path / "bad.model")], "not a sentencepiece model"),
        ([str(ids_only)], "sentencepiece model"),
    ):
        with pytest.raises(UserError, match=message):
            examination_page.main(arguments)


def test_torch_is_not_needed():
    code = "import sys, kdlib.show.examination_page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pages_of_several_students_have_different_folders():
    assert (
        examination_page._page_folder(Path("outputs/demo/M08/students/hard/seed1/scores"))
        == "demo-M08-students-hard-seed1-scores"
    )
    assert examination_page._page_folder(Path("/x/results/evaluation_M08.json")) == "results-evaluation_M08"


def test_byte_order_mark_is_accepted(original, tmp_path, capsys):
    text = (original / "evaluation_decoder.json").read_text(encoding="utf-8")
    (tmp_path / "marked.json").write_text(text, encoding="utf-8-sig")
    model = str(original / "tokenizer.model")
    examination_page.main([str(tmp_path / "marked.json"), "--tokenizer", model, "--out", str(tmp_path)])
    record = json.loads((tmp_path / "examination.json").read_text(encoding="utf-8"))
    assert record["severity"] == "wrong_decoding"
    assert record["verdict"] in capsys.readouterr().out
