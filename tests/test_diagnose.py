"""Causes by fingerprints: named where they fit and are clearly nearer than what is sound, and not otherwise."""

import json
import random
import subprocess
import sys

import pandas as pd
import pytest

from kdlib.errors import UserError
from kdlib.evaluate import answers, collapse, diagnose
from kdlib.evaluate.diagnose import CAUSES, SIGNS, SOUND, Fingerprint
from kdlib.tokens import Tokens, train

WORDS = "ONE TWO SEVEN NINE COME GO YALE CAN THE WATER OTHER PEOPLE ALPHA BRAVO SIERRA COMMAND DELETE ENTER"
WORDS = WORDS.split(" ")
MIDDLES = {
    SOUND: {"wra": 0.7, "empty": 0.0, "misread": 0.0, "hears": 0.8, "distinct": 0.9},
    "h": {"wra": 0.0, "empty": 0.0, "misread": 1.0, "hears": 0.8, "distinct": 0.9},
    "f": {"wra": 0.0, "empty": 0.9, "misread": 0.0, "hears": 0.1, "distinct": 0.1},
    "i": {"wra": 0.0, "empty": 0.0, "misread": 0.0, "hears": 0.0, "distinct": 1.0},
    "b": {"wra": 0.68, "empty": 0.0, "misread": 0.0, "hears": 0.79, "distinct": 0.9},  # as good as sound
}


def near(cause, seed, rng, spread=0.03):
    made = {name: value + rng.uniform(-spread, spread) for name, value in MIDDLES[cause].items()}
    return Fingerprint(cause, f"case_{cause}", seed, made)


@pytest.fixture
def known():
    rng = random.Random(1)
    return [near(cause, seed, rng) for cause in MIDDLES for seed in (1, 2, 3)]


def test_a_cause_that_fits_is_named_with_its_evidence_and_its_check(known):
    rng = random.Random(2)
    for cause, check in (("h", "decoding"), ("f", "target"), ("i", "heads")):
        found = diagnose.diagnose(near(cause, 9, rng).signs, known)
        assert found.named == (cause,)
        assert found.fits[0].distance < 2
        assert check in found.text
    assert "decoding the ids in another way" in diagnose.diagnose(near("h", 9, rng).signs, known).text


def test_what_is_sound_or_unlike_anything_known_is_given_no_cause(known):
    rng = random.Random(3)
    assert diagnose.diagnose(near(SOUND, 9, rng).signs, known).named == ()
    weak = MIDDLES[SOUND] | {"wra": 0.6, "hears": 0.7}
    assert diagnose.diagnose(weak, known).named == ()
    strange = {"wra": 0.5, "empty": 0.5, "misread": 0.0, "hears": 0.9, "distinct": 0.1}
    found = diagnose.diagnose(strange, known)
    assert found.named == ()
    assert "Cannot tell" in found.text
    assert diagnose.diagnose({}, known).named == ()  # nothing is known of it


def test_a_cause_that_does_no_harm_is_not_told_from_what_is_sound(known):
    assert diagnose.diagnose(near("b", 9, random.Random(4)).signs, known).named == ()


def test_the_confusion_counts_every_case_once_told_by_other_seeds(known):
    mixed = [Fingerprint("fh", "both", 1, MIDDLES["f"] | {"misread": 1.0})]
    table = diagnose.confusion(known, mixed)
    assert table.sum(axis=1).to_dict() == pytest.approx({SOUND: 3, "h": 3, "f": 3, "i": 3, "b": 3, "fh": 1})
    assert table.loc["h", "h"] == 3
    assert table.loc[SOUND, "-"] == 3


def test_every_cause_and_sign_is_said_in_words():
    assert {one.cause for one in diagnose.shipped()} <= set(CAUSES)
    assert all(set(one.signs) <= set(SIGNS) for one in diagnose.shipped())


def test_training_says_what_answers_alone_do_not():
    rows = pd.DataFrame([("u", "M08", word, word) for word in WORDS], columns=answers.COLUMNS).assign(token_ids=None)
    curves = pd.DataFrame(
        [
            (step, name, value)
            for step, wra, score in ((1, 0.2, -3), (2, 0.8, -2), (3, 0.5, -1))
            for name, value in (("dev_wra", wra), ("dev_score", score))
        ],
        columns=["step", "name", "value"],
    )
    found = diagnose.signs(collapse.examine(rows), curves, dev_wra=0.1)
    assert found["lost"] == pytest.approx(0.4)  # kept is the look with the best score, 0.5
    assert found["passed_over"] == pytest.approx(0.3)
    assert "lost" not in diagnose.signs(collapse.examine(rows))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Files of the original study's kind: read one off, and an untrained head's."""
    folder, rng = tmp_path_factory.mktemp("original"), random.Random(5)
    path = train(WORDS, 60, folder)
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
    diagnose.main([str(original / "evaluation_decoder.json"), "--out", str(tmp_path)])  # the model lies beside it
    said = capsys.readouterr().out.splitlines()
    assert "READ WRONGLY" in said[2]
    assert {one.name for one in tmp_path.iterdir()} == {
        "page.txt", "answers.csv", "examination.json", "examination.png", "examination.pdf"
    }  # fmt: skip
    found = json.loads((tmp_path / "examination.json").read_text(encoding="utf-8"))
    assert found["severity"] == "misread"
    assert "offset -1" in found["verdict"]


def test_an_untrained_head_is_deaf_whatever_way_it_is_read(original, tmp_path, capsys):
    model = original / "tokenizer.model"
    diagnose.main([str(original / "evaluation_ctc.json"), "--tokenizer", str(model), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "DEAF" in said.splitlines()[2]
    assert "No other reading" in said


def test_what_cannot_be_examined_is_refused_in_a_line(original, tmp_path):
    (tmp_path / "bad.json").write_text("{}", encoding="utf-8")
    (tmp_path / "bad.model").write_text("no model", encoding="utf-8")
    evaluation = str(original / "evaluation_ctc.json")
    for arguments, told in (
        ([str(tmp_path / "none.json")], "no answers there"),
        ([str(tmp_path / "bad.json")], "no pred_text"),
        ([evaluation, "--tokenizer", str(tmp_path / "none.model")], "no such file"),
        ([evaluation, "--tokenizer", str(tmp_path / "bad.model")], "no sentencepiece model"),
    ):
        with pytest.raises(UserError, match=told):
            diagnose.main(arguments)


def test_torch_is_not_needed():
    code = "import sys, kdlib.evaluate.diagnose; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
