"""The command: any predictions, the verdict first; what it needs, what it finds, what it refuses."""

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
    """Files of the original study's kind: read one off, and an untrained head's."""
    folder, rng = tmp_path_factory.mktemp("original"), random.Random(5)
    path = train_tokenizer(WORDS, 60, folder)
    tokens = Tokens.for_teachers(path)
    for name, hear in (
        ("decoder", lambda word: tokens.encode(word if rng.random() < 0.3 else rng.choice(WORDS[:4]))),
        ("ctc", lambda word: [rng.randrange(3, 60) for _ in range(rng.randrange(20, 30))]),
    ):
        rows = []
        for word in WORDS:
            for microphone in range(2, 9):
                ids = hear(word)
                rows.append(
                    {
                        "utterance_id": f"M08_B3_{word}_M{microphone}",
                        "target": word,
                        "prediction_tokens": ids,
                        "prediction_text": tokens.decode(one - 1 for one in ids),
                    }
                )
        (folder / f"evaluation_{name}.json").write_text(json.dumps({"predictions": rows}), encoding="utf-8")
    return folder


def test_the_command_prints_the_verdict_first_and_writes_a_page(original, tmp_path, capsys):
    examination_page.main(
        [str(original / "evaluation_decoder.json"), "--out", str(tmp_path)]
    )  # the model lies beside it
    said = capsys.readouterr().out.splitlines()
    assert "READ WRONGLY" in said[2]
    assert {one.name for one in tmp_path.iterdir()} == {
        "page.txt", "answers.csv", "examination.json", "examination.png", "examination.pdf"
    }  # fmt: skip
    found = json.loads((tmp_path / "examination.json").read_text(encoding="utf-8"))
    assert found["severity"] == "wrong_decoding"
    assert "offset -1" in found["verdict"]
    assert found["causes"] == ["h"]


def test_an_untrained_head_is_deaf_whatever_way_it_is_read(original, tmp_path, capsys):
    model = original / "tokenizer.model"
    examination_page.main([str(original / "evaluation_ctc.json"), "--tokenizer", str(model), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "DEAF" in said.splitlines()[2]
    assert "No other reading" in said
    assert json.loads((tmp_path / "examination.json").read_text(encoding="utf-8"))["causes"] == ["i"]


def test_what_cannot_be_examined_is_refused_in_a_line(original, tmp_path):
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    (tmp_path / "bad.model").write_text("no model", encoding="utf-8")
    evaluation = str(original / "evaluation_ctc.json")
    rows = [{"utterance_id": "u", "target": "ONE", "prediction_tokens": [5]}]
    ids_only = tmp_path / "apart" / "ids.json"
    ids_only.parent.mkdir()
    ids_only.write_text(json.dumps({"predictions": rows}), encoding="utf-8")
    for arguments, told in (
        ([str(tmp_path / "none.json")], "no answers there"),
        ([str(tmp_path / "bad.json")], "no pred_text"),
        ([evaluation, "--tokenizer", str(tmp_path / "none.model")], "no such file"),
        ([evaluation, "--tokenizer", str(tmp_path / "bad.model")], "no sentencepiece model"),
        ([str(ids_only)], "name the sentencepiece model"),
    ):
        with pytest.raises(UserError, match=told):
            examination_page.main(arguments)


def test_torch_is_not_needed():
    code = "import sys, kdlib.show.examination_page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_pages_of_several_students_lie_side_by_side():
    assert (
        examination_page._place(Path("outputs/demo/M08/students/hard/seed1/scores"))
        == "demo-M08-students-hard-seed1-scores"
    )
    assert examination_page._place(Path("/x/results/evaluation_M08.json")) == "results-evaluation_M08"


def test_a_file_with_a_byte_order_mark_is_read(original, tmp_path, capsys):
    text = (original / "evaluation_decoder.json").read_text(encoding="utf-8")
    (tmp_path / "marked.json").write_text(text, encoding="utf-8-sig")
    model = str(original / "tokenizer.model")
    examination_page.main([str(tmp_path / "marked.json"), "--tokenizer", model, "--out", str(tmp_path)])
    assert "READ WRONGLY" in capsys.readouterr().out
