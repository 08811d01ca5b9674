"""The examination of predictions: what is counted, and what is said of answers of every kind."""

import json
import math
import random

import numpy as np
import pandas as pd
import pytest

from kdlib.diagnose import examination
from kdlib.errors import UserError
from kdlib.evaluate import predictions
from kdlib.evaluate.posteriors import PosteriorWriter
from kdlib.tokens import Tokens, train_tokenizer

WORDS = "ONE TWO SEVEN NINE COME GO YALE CAN THE WATER OTHER PEOPLE ALPHA BRAVO SIERRA COMMAND DELETE ENTER"
WORDS = WORDS.split(" ")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return Tokens.for_teachers(train_tokenizer(WORDS, 60, tmp_path_factory.mktemp("pieces")))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    texts = ["STONE", "TOWN", "EVENING", "MINE", "COMET", "YALE", "CANE", "WATERS", "MOTHER", "SIERRAS", "DELETED"]
    return Tokens.for_teachers(train_tokenizer(texts, 60, tmp_path_factory.mktemp("others"), characters="".join(WORDS)))


def table(pairs, ids=None):
    rows = [(f"u{place}", "M08", told, said) for place, (told, said) in enumerate(pairs)]
    frame = pd.DataFrame(rows, columns=predictions.COLUMNS)
    return frame.assign(token_ids=ids if ids else None)


def written(tokens, words, read):
    """A file of the original study's kind: the ids of words, and the text that `read` makes of them."""
    ids = [tuple(tokens.encode(word)) for word in words]
    return ids, [read(one) for one in ids]


def test_ids_that_were_decoded_one_off_are_found_out(tokens):
    rng = random.Random(1)
    told = WORDS * 5
    heard = [word if rng.random() < 0.6 else rng.choice(WORDS) for word in told]
    ids, texts = written(tokens, heard, lambda ids: tokens.decode(one - 1 for one in ids))
    found = examination.examine(table(list(zip(told, texts, strict=True)), ids), {"own": tokens})
    right = np.mean([a == b for a, b in zip(told, heard, strict=True)])
    assert found.severity == "wrong_decoding"
    assert (found.better_decoding.offset, found.better_decoding.tokenizer) == (0, "own")
    assert found.better_decoding.wra == pytest.approx(right)
    assert found.figures["wra"] < 0.1
    assert f"WRA {100 * right:.1f} % instead of" in found.verdict
    assert next(one for one in found.redecodings if one.offset == -1).as_written == 1
    assert found.texts["read anew"].tolist() == heard


def test_ids_that_were_decoded_with_another_tokenizer_are_found_out(tokens, other):
    told = WORDS * 4
    ids, texts = written(tokens, told, other.decode)
    pairs = list(zip(told, texts, strict=True))
    assert examination.examine(table(pairs, ids), {"other": other}).better_decoding is None
    found = examination.examine(table(pairs, ids), {"other": other, "own": tokens})
    assert (found.severity, found.better_decoding.tokenizer, found.better_decoding.wra) == (
        "wrong_decoding",
        "own",
        1.0,
    )


def test_special_ids_between_the_tokens_are_tried_without(tokens):
    told = WORDS * 4
    ids = [tuple(one + 1 for token in tokens.encode(word) for one in (token, 0)) for word in told]  # BOS counts too
    found = examination.examine(table([(word, "X") for word in told], ids), {"own": tokens})
    assert (found.better_decoding.offset, found.better_decoding.wra) == (-1, 1.0)


def test_a_file_without_text_is_read_by_the_first_tokenizer(tokens):
    ids = [tuple(tokens.encode(word)) for word in WORDS]
    rows = table([(word, None) for word in WORDS], ids)
    found = examination.examine(rows, {"own": tokens})
    assert (found.severity, found.figures["wra"]) == ("healthy", 1.0)
    with pytest.raises(UserError, match="name the sentencepiece model"):
        examination.examine(rows)


def test_the_state_of_answers_of_every_kind(tokens):
    rng, told = random.Random(2), WORDS * 6
    moved = dict(zip(WORDS, [*WORDS[5:], *WORDS[:5]], strict=True))
    kinds = {
        "healthy": told,
        "weak": [word if rng.random() < 0.3 else rng.choice(WORDS) for word in told],
        "consistently_wrong": [moved[word] for word in told],
        "empty": [word if rng.random() < 0.2 else "" for word in told],
        "constant": [rng.choice(WORDS) if rng.random() < 0.3 else "THE" for _ in told],
        "input_independent": [" ".join(rng.choices(WORDS, k=23)) for _ in told],
    }
    found = {name: examination.examine(table(list(zip(told, said, strict=True)))) for name, said in kinds.items()}
    assert {name: one.severity for name, one in found.items()} == {name: name for name in kinds}
    for name, one in found.items():
        assert one.verdict.split(":")[0].lower().endswith(name)
    assert "23 words for one" in found["input_independent"].verdict
    assert found["consistently_wrong"].figures["information"] == pytest.approx(1)
    assert found["constant"].most_frequent.iloc[0]["answer"] == "THE"


def test_words_that_each_come_once_can_be_examined():
    sound = examination.examine(table([(word, word) for word in WORDS]))
    assert sound.severity == "healthy"
    assert math.isnan(sound.figures["consistency"])
    assert examination.examine(table([(word, "XYZ " * 9) for word in WORDS])).severity == "constant"
    weak = examination.examine(table([(word, word if place % 3 else "NO") for place, word in enumerate(WORDS)]))
    assert weak.severity in ("healthy", "weak")
    assert examination.examine(table([("ONE", "TWO")])).figures["n"] == 1


def test_a_reading_that_is_better_by_chance_is_no_cure(tokens):
    rng = random.Random(3)
    ids = [tuple(rng.randrange(3, 60) for _ in range(rng.randrange(1, 5))) for _ in range(400)]
    told = [rng.choice(WORDS) for _ in ids]
    found = examination.examine(
        table([(word, tokens.decode(one)) for word, one in zip(told, ids, strict=True)], ids), {"own": tokens}
    )
    assert found.better_decoding is None
    assert found.severity == "input_independent"
    assert "No other reading" in found.verdict


def test_what_teachers_wrote_wrong_and_the_student_too(tokens):
    pairs = [("ONE", "TWO"), ("TWO", "TWO"), ("COME", "GO"), ("GO", "COME")]
    rows = table(pairs, [tuple(tokens.encode(said)) for _, said in pairs])
    said = {name: tokens.encode(word) for name, word in (("u0", "TWO"), ("u1", "TWO"), ("u2", "ONE"))}
    figures = examination.examine(rows, {"own": tokens}, teachers=said).figures
    assert 0 < figures["histogram_of_teachers"] < 1
    assert figures["as_teachers"] == pytest.approx(2 / 3)
    assert figures["as_teachers_wrong"] == pytest.approx(1 / 2)
    assert figures["teachers_wra"] == pytest.approx(1 / 3)


def test_frames_are_looked_at_where_posteriors_were_kept(tmp_path, tokens):
    keeper = PosteriorWriter(Tokens(tokens.model, blank=2, size=8), stride_ms=40.0)
    sure = np.full((4, 8), -30.0)
    sure[:, 2] = 0
    keeper.add("a", sure)
    keeper.add("b", np.full((2, 8), math.log(1 / 8)))
    rows = table([("ONE", "ONE"), ("TWO", "TWO")])
    figures = examination.examine(rows, posteriors=keeper.write(tmp_path)).figures
    assert figures["blank_frames"] == pytest.approx(0.5)
    assert figures["entropy_bits"] == pytest.approx(1.5, abs=0.01)
    assert figures["sure_frames"] == pytest.approx(0.5)


def test_ids_are_read_from_every_file_that_has_them(tmp_path, tokens):
    rows = [
        {"utterance_id": f"M08_B2_W{place}_M5", "target": word, "prediction_tokens": tokens.encode(word)}
        for place, word in enumerate(WORDS)
    ]
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({"predictions": rows}), encoding="utf-8")
    found = predictions.read(path, ids=True)
    assert found.hypothesis.isna().all()
    assert list(found.token_ids[0]) == tokens.encode(WORDS[0])
    with pytest.raises(UserError, match="18 of 18 rows have not a text"):
        predictions.read(path)
    for row in rows:
        row["prediction_text"] = row["target"].lower()
        row["prediction_tokens"] = []
    path.write_text(json.dumps({"predictions": rows}), encoding="utf-8")
    found = predictions.read(path, ids=True)
    assert found.token_ids.isna().all()
    assert found.hypothesis.tolist() == WORDS


def test_odd_ids_are_read_or_refused_by_name(tmp_path, tokens):
    def file(*listed, text="ONE"):
        rows = [
            {"utterance_id": f"u{place}", "target": "ONE", "prediction_tokens": one, "prediction_text": text}
            for place, one in enumerate(listed)
        ]
        path = tmp_path / "evaluation.json"
        path.write_text(json.dumps({"predictions": rows}), encoding="utf-8")
        return path

    assert predictions.read(file([5.0, 6], "7 8"), ids=True).token_ids.tolist() == [(5, 6), (7, 8)]
    for odd in ([5.7], [[5]], ["x"], [float("inf")], None):
        with pytest.raises(UserError, match=r"1 of 2 rows have no usable token ids .*, first u1"):
            predictions.read(file([5], odd), ids=True)
    silent = predictions.read(file([], [], text=None), ids=True)
    assert examination.examine(silent, {"own": tokens}).severity == "empty"
    rows = predictions.read(file(tokens.encode("ONE"), tokens.encode("TWO")), ids=True)
    rows.loc[1, "hypothesis"] = None
    assert examination.examine(rows, {"own": tokens}).texts.hypothesis.tolist() == ["ONE", "TWO"]


def test_one_answer_over_and_over_is_no_misreading(tokens):
    told = WORDS[:5] * 40
    ids = [tuple(one - 1 for one in tokens.encode("NINE"))] * len(told)
    found = examination.examine(table([(word, "XX") for word in told], ids), {"own": tokens})
    assert found.severity == "constant"
    right = [*WORDS[:1] * 99, "GO"]
    ids = [tuple(tokens.encode(word)) for word in WORDS[:1] * 100]
    found = examination.examine(table(list(zip(WORDS[:1] * 100, right, strict=True)), ids), {"own": tokens})
    assert found.better_decoding is None


def test_ids_without_a_tokenizer_are_examined_as_far_as_texts_go(tokens):
    ids = [tuple(tokens.encode(word)) for word in WORDS]
    found = examination.examine(table([(word, word) for word in WORDS], ids))
    assert found.severity == "healthy"
    assert not found.redecodings


def test_sentences_are_judged_by_their_words():
    rng = random.Random(6)
    told = [" ".join(rng.sample(WORDS, 8)) for _ in range(100)]
    said = [" ".join(["NOT", *text.split()[1:]]) for text in told]
    found = examination.examine(table(list(zip(told, said, strict=True))))
    assert found.severity == "healthy"
    assert "WER 12.5 %" in found.verdict
    assert "letters" in found.verdict
