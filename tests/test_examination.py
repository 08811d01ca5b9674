"""The examination of predictions: its figures, and the verdict on hypotheses of every kind."""

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
def other_tokens(tmp_path_factory):
    texts = ["STONE", "TOWN", "EVENING", "MINE", "COMET", "YALE", "CANE", "WATERS", "MOTHER", "SIERRAS", "DELETED"]
    return Tokens.for_teachers(train_tokenizer(texts, 60, tmp_path_factory.mktemp("others"), characters="".join(WORDS)))


def table(pairs, ids=None):
    rows = [(f"u{place}", "M08", reference, hypothesis) for place, (reference, hypothesis) in enumerate(pairs)]
    frame = pd.DataFrame(rows, columns=predictions.COLUMNS)
    return frame.assign(token_ids=ids if ids else None)


def encoded(tokens, words, decode):
    """A file like the original study's: the ids of words, and their texts by `decode`."""
    ids = [tuple(tokens.encode(word)) for word in words]
    return ids, [decode(row) for row in ids]


def test_ids_decoded_with_an_offset_are_detected(tokens):
    rng = random.Random(1)
    references = WORDS * 5
    hypotheses = [word if rng.random() < 0.6 else rng.choice(WORDS) for word in references]
    ids, texts = encoded(tokens, hypotheses, lambda ids: tokens.decode(token - 1 for token in ids))
    found = examination.examine(table(list(zip(references, texts, strict=True)), ids), {"own": tokens})
    right = np.mean([ref == hyp for ref, hyp in zip(references, hypotheses, strict=True)])
    assert found.severity == "wrong_decoding"
    assert (found.better_decoding.offset, found.better_decoding.tokenizer) == (0, "own")
    assert found.better_decoding.wra == pytest.approx(right)
    assert found.figures["wra"] < 0.1
    assert f"WRA {100 * right:.1f} % instead of" in found.verdict
    assert next(way for way in found.redecodings if way.offset == -1).as_written == 1
    assert found.texts["read anew"].tolist() == hypotheses


def test_ids_decoded_with_another_tokenizer_are_detected(tokens, other_tokens):
    references = WORDS * 4
    ids, texts = encoded(tokens, references, other_tokens.decode)
    pairs = list(zip(references, texts, strict=True))
    assert examination.examine(table(pairs, ids), {"other": other_tokens}).better_decoding is None
    found = examination.examine(table(pairs, ids), {"other": other_tokens, "own": tokens})
    better = found.better_decoding
    assert (found.severity, better.tokenizer, better.wra) == ("wrong_decoding", "own", 1.0)


def test_ids_are_also_decoded_without_special_ids(tokens):
    references = WORDS * 4
    ids = [tuple(index + 1 for token in tokens.encode(word) for index in (token, 0)) for word in references]  # with BOS
    found = examination.examine(table([(word, "X") for word in references], ids), {"own": tokens})
    assert (found.better_decoding.offset, found.better_decoding.wra) == (-1, 1.0)


def test_a_file_without_text_is_decoded_by_the_first_tokenizer(tokens):
    ids = [tuple(tokens.encode(word)) for word in WORDS]
    rows = table([(word, None) for word in WORDS], ids)
    found = examination.examine(rows, {"own": tokens})
    assert (found.severity, found.figures["wra"]) == ("healthy", 1.0)
    with pytest.raises(UserError, match="name the sentencepiece model"):
        examination.examine(rows)


def test_the_severity_of_hypotheses_of_every_kind():
    rng, references = random.Random(2), WORDS * 6
    moved = dict(zip(WORDS, [*WORDS[5:], *WORDS[:5]], strict=True))
    kinds = {
        "healthy": references,
        "weak": [word if rng.random() < 0.3 else rng.choice(WORDS) for word in references],
        "consistently_wrong": [moved[word] for word in references],
        "empty": [word if rng.random() < 0.2 else "" for word in references],
        "constant": [rng.choice(WORDS) if rng.random() < 0.3 else "THE" for _ in references],
        "input_independent": [" ".join(rng.choices(WORDS, k=23)) for _ in references],
    }
    found = {
        name: examination.examine(table(list(zip(references, hypotheses, strict=True))))
        for name, hypotheses in kinds.items()
    }
    assert {name: result.severity for name, result in found.items()} == {name: name for name in kinds}
    for name, result in found.items():
        assert result.verdict.lower().replace(" ", "_").replace("-", "_").startswith(name)
    assert "23 words per reference word" in found["input_independent"].verdict
    assert found["consistently_wrong"].figures["information"] == pytest.approx(1)
    assert found["constant"].most_frequent.iloc[0]["hypothesis"] == "THE"


def test_a_system_that_prefers_short_words_is_told_to_calibrate(tokens):
    references = WORDS * 6
    short = min(WORDS, key=lambda word: (len(tokens.encode(word)), word))
    rng = random.Random(3)
    hypotheses = [short if rng.random() < 0.4 else word for word in references]
    one_token = len(tokens.encode(short)) == 1
    found = examination.examine(table(list(zip(references, hypotheses, strict=True))), {"own": tokens})
    assert one_token
    assert found.figures["short_answers"] > found.figures["short_references"] + 0.3
    assert "Short words are preferred" in found.verdict
    assert "calibrate the closed lexicon" in found.verdict
    healthy = examination.examine(table([(word, word) for word in references]), {"own": tokens})
    assert "Short words" not in healthy.verdict
    other = examination.examine(table([(word, short + "X" if word != short else short) for word in references]))
    assert "Short words" not in other.verdict  # its words are not those of a closed lexicon


def test_words_that_occur_once_each_can_be_examined():
    healthy = examination.examine(table([(word, word) for word in WORDS]))
    assert healthy.severity == "healthy"
    assert math.isnan(healthy.figures["consistency"])
    assert examination.examine(table([(word, "XYZ " * 9) for word in WORDS])).severity == "constant"
    weak = examination.examine(table([(word, word if place % 3 else "NO") for place, word in enumerate(WORDS)]))
    assert weak.severity in ("healthy", "weak")
    assert examination.examine(table([("ONE", "TWO")])).figures["n"] == 1


def test_a_decoding_that_is_better_by_chance_is_no_better_decoding(tokens):
    rng = random.Random(3)
    ids = [tuple(rng.randrange(3, 60) for _ in range(rng.randrange(1, 5))) for _ in range(400)]
    pairs = [(rng.choice(WORDS), tokens.decode(row)) for row in ids]
    found = examination.examine(table(pairs, ids), {"own": tokens})
    assert found.better_decoding is None
    assert found.severity == "input_independent"
    assert "No other decoding" in found.verdict


def test_agreement_with_correct_and_wrong_hypotheses_of_the_teachers(tokens):
    pairs = [("ONE", "TWO"), ("TWO", "TWO"), ("COME", "GO"), ("GO", "COME")]
    rows = table(pairs, [tuple(tokens.encode(hypothesis)) for _, hypothesis in pairs])
    teachers = {name: tokens.encode(word) for name, word in (("u0", "TWO"), ("u1", "TWO"), ("u2", "ONE"))}
    figures = examination.examine(rows, {"own": tokens}, teachers=teachers).figures
    assert 0 < figures["histogram_of_teachers"] < 1
    assert figures["agrees_with_teachers"] == pytest.approx(2 / 3)
    assert figures["agrees_with_teachers_wrong"] == pytest.approx(1 / 2)
    assert figures["teachers_wra"] == pytest.approx(1 / 3)


def test_frames_are_examined_where_there_are_posteriors(tmp_path, tokens):
    writer = PosteriorWriter(Tokens(tokens.model, blank=2, size=8), stride_ms=40.0)
    sure = np.full((4, 8), -30.0)
    sure[:, 2] = 0
    writer.add("a", sure)
    writer.add("b", np.full((2, 8), math.log(1 / 8)))
    rows = table([("ONE", "ONE"), ("TWO", "TWO")])
    figures = examination.examine(rows, posteriors=writer.write(tmp_path)).figures
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
    with pytest.raises(UserError, match="18 of 18 rows lack a hypothesis"):
        predictions.read(path)
    for row in rows:
        row["prediction_text"] = row["target"].lower()
        row["prediction_tokens"] = []
    path.write_text(json.dumps({"predictions": rows}), encoding="utf-8")
    found = predictions.read(path, ids=True)
    assert found.token_ids.isna().all()
    assert found.hypothesis.tolist() == WORDS


def test_ids_in_unusual_formats_are_read_or_refused_with_their_utterance(tmp_path, tokens):
    def file(*listed, text="ONE"):
        rows = [
            {"utterance_id": f"u{place}", "target": "ONE", "prediction_tokens": ids, "prediction_text": text}
            for place, ids in enumerate(listed)
        ]
        path = tmp_path / "evaluation.json"
        path.write_text(json.dumps({"predictions": rows}), encoding="utf-8")
        return path

    assert predictions.read(file([5.0, 6], "7 8"), ids=True).token_ids.tolist() == [(5, 6), (7, 8)]
    for odd in ([5.7], [[5]], ["x"], [float("inf")], None):
        with pytest.raises(UserError, match=r"1 of 2 rows have no usable token ids .*, first u1"):
            predictions.read(file([5], odd), ids=True)
    empty = predictions.read(file([], [], text=None), ids=True)
    assert examination.examine(empty, {"own": tokens}).severity == "empty"
    rows = predictions.read(file(tokens.encode("ONE"), tokens.encode("TWO")), ids=True)
    rows.loc[1, "hypothesis"] = None
    assert examination.examine(rows, {"own": tokens}).texts.hypothesis.tolist() == ["ONE", "TWO"]


def test_a_constant_output_is_no_wrong_decoding(tokens):
    references = WORDS[:5] * 40
    ids = [tuple(token - 1 for token in tokens.encode("NINE"))] * len(references)
    found = examination.examine(table([(word, "XX") for word in references], ids), {"own": tokens})
    assert found.severity == "constant"
    right = [*WORDS[:1] * 99, "GO"]
    ids = [tuple(tokens.encode(word)) for word in WORDS[:1] * 100]
    found = examination.examine(table(list(zip(WORDS[:1] * 100, right, strict=True)), ids), {"own": tokens})
    assert found.better_decoding is None


def test_without_a_tokenizer_only_texts_are_examined(tokens):
    ids = [tuple(tokens.encode(word)) for word in WORDS]
    found = examination.examine(table([(word, word) for word in WORDS], ids))
    assert found.severity == "healthy"
    assert not found.redecodings


def test_sentences_are_judged_by_their_words():
    rng = random.Random(6)
    references = [" ".join(rng.sample(WORDS, 8)) for _ in range(100)]
    hypotheses = [" ".join(["NOT", *text.split()[1:]]) for text in references]
    found = examination.examine(table(list(zip(references, hypotheses, strict=True))))
    assert found.severity == "healthy"
    assert "WER 12.5 %" in found.verdict
    assert "letters" in found.verdict
