import math

import pytest

from kdlib.corpus.embedded.synthetic import word_list
from kdlib.errors import UserError
from kdlib.tokens import (
    BLANK,
    BOS,
    EOS,
    PER_WORD,
    Tokens,
    check_round_trip,
    normalise,
    pieces_per_word,
    train_tokenizer,
)

DIGITS = ["ZERO", "ONE", "TWO", "THREE", "FOUR", "FIVE", "SIX", "SEVEN", "EIGHT", "NINE"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_tokenizer(word_list().values(), 64, tmp_path_factory.mktemp("tokens"), lower=True)


def test_teachers_special_ids_are_those_of_the_seed_study(model):
    tokens = Tokens.for_teachers(model)
    assert (BOS, EOS, BLANK) == (0, 1, 2) == (tokens.bos, tokens.eos, tokens.blank)
    ids = tokens.encode("YALE")
    assert min(ids) > 2  # no offset: sentencepiece's own ids, which begin after its three special ones
    assert tokens.pieces[ids[0]].startswith("\u2581")


def test_nemo_keeps_its_blank_last(model):
    tokens = Tokens.for_nemo(model.read_bytes())
    assert tokens.blank == len(tokens.pieces) == tokens.size - 1


@pytest.mark.parametrize("make", [Tokens.for_teachers, lambda path: Tokens.for_nemo(path.read_bytes())])
def test_every_word_of_the_list_is_decoded_correctly(model, make):
    check_round_trip(make(model), word_list().values())


def test_ids_with_an_offset_of_one_are_decoded_wrongly(model):
    tokens = Tokens.for_teachers(model)
    words = sorted(set(word_list().values()))
    right = [tokens.decode(tokens.encode(word)) == word for word in words]
    shifted = [tokens.decode([index + 1 for index in tokens.encode(word)]) == word for word in words]
    assert all(right)
    assert not any(shifted)


def test_characters_outside_the_tokenizer_are_named(model):
    with pytest.raises(UserError, match=r"cannot encode 'É' \(U\+00C9\) of the text 'CAFÉ'"):
        Tokens.for_teachers(model).encode("CAFÉ")


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(model):
    small = Tokens(model.read_bytes(), blank=20, size=21)
    with pytest.raises(UserError, match="beyond the 21 outputs"):
        check_round_trip(small, ["ZERO", "QUEBEC"])


def test_fingerprints_differ_where_ids_have_different_meanings(model):
    teachers, nemo = Tokens.for_teachers(model), Tokens.for_nemo(model.read_bytes())
    assert teachers.fingerprint == Tokens.for_teachers(model).fingerprint
    assert len({teachers.fingerprint, nemo.fingerprint, Tokens.for_teachers(model, size=5000).fingerprint}) == 3


def test_training_twice_gives_the_same_bytes(model, tmp_path):
    assert (
        train_tokenizer(reversed(list(word_list().values())), 64, tmp_path, lower=True).read_bytes()
        == model.read_bytes()
    )


def test_few_texts_yield_fewer_pieces_than_requested(tmp_path):
    tokens = Tokens.for_nemo(train_tokenizer(["ONE", "TWO"], 900, tmp_path).read_bytes())
    assert len(tokens.pieces) < 30
    assert tokens.decode(tokens.encode("TWO ONE")) == "TWO ONE"


def test_too_few_pieces_for_the_script_are_refused_with_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="no tokenizer of 8 pieces can encode the 5 different characters of these 2 t"):
        train_tokenizer(["ONE", "TWO"], 8, tmp_path)


def test_characters_beyond_the_texts_can_be_encoded(tmp_path):
    tokens = Tokens.for_nemo(train_tokenizer(["ONE", "TWO"], 64, tmp_path, lower=True, characters="É'-").read_bytes())
    assert tokens.decode(tokens.encode("É'-TWO")) == "É'-TWO"


def test_punctuation_is_dropped_if_set_and_scripts_keep_their_signs():
    assert normalise("Don't stop, \u00abthere\u00bb: x-ray?", punctuation="drop") == "DON'T STOP THERE X-RAY"
    assert normalise("\u0915\u093f\u0924\u093e\u092c", punctuation="drop") == "\u0915\u093f\u0924\u093e\u092c"


def test_normalise_is_idempotent_and_composes_accents():
    assert normalise("cafe\u0301  au\tlait") == "CAFÉ AU LAIT" == normalise(normalise("cafe\u0301 au lait"))


def test_the_error_of_a_tokenizer_without_hyphen_has_advice(tmp_path):
    model = train_tokenizer(["ONE", "RAY", "X"], 12, tmp_path)
    with pytest.raises(UserError, match=r"cannot encode '-' .*; write hyphens: space in the recipe"):
        Tokens.for_teachers(model).encode("X-RAY")
    assert normalise("X-RAY", hyphens="space") == "X RAY"


@pytest.mark.parametrize("text", ["น้ำ", "wait\u2026", "½", "№ 7", "می\u200cخواهم", "ＦＵＬＬ"])
def test_scripts_and_signs_are_decoded_unchanged(tmp_path, text):
    """sentencepiece's own normalisation would change them; only `normalise` is used."""
    tokens = Tokens.for_nemo(train_tokenizer([text, "dog"], 64, tmp_path, lower=True).read_bytes())
    assert tokens.decode(tokens.encode(text)) == normalise(text)
    assert tokens.decode(tokens.encode("dog")) == "DOG"


def test_the_tokenizer_does_not_depend_on_the_order_of_characters(tmp_path):
    """Sets have another order in every process; the fingerprint must not change."""
    models = [
        train_tokenizer(["ONE", "TWO"], 64, tmp_path / order, characters=order).read_bytes()
        for order in ("XYZ'", "Z'XYYX")
    ]
    assert models[0] == models[1]


def trained(folder, texts, pieces, **how):
    return Tokens.for_nemo(train_tokenizer(texts, pieces, folder, **how).read_bytes())


def test_pieces_of_a_word_are_counted_without_its_mark_and_single_letters_not_at_all(tmp_path):
    letters = trained(tmp_path, ["AB", "CDE", "F"], 10)  # 6 letters, the mark and three special ids: no merge
    assert len(letters.encode("AB")) == 3  # with the mark
    assert pieces_per_word(letters, ["AB", "CDE", "F", "AB CDE"]) == (2 + 3) / 2
    assert math.isnan(pieces_per_word(letters, ["F"]))


def test_ten_words_with_64_pieces_are_one_piece_each(tmp_path):
    """What happened on a corpus of digits: greedy decoding, lexicon and beam search could not differ."""
    assert pieces_per_word(trained(tmp_path, DIGITS, 64), DIGITS) == 1


def test_the_number_of_pieces_is_lowered_to_the_largest_that_leaves_two_per_word(tmp_path):
    tokens = trained(tmp_path / "fit", DIGITS, 64, per_word=PER_WORD)
    count = len(tokens.pieces)
    assert 19 < count < 64  # 15 letters, the mark and three special ids at least
    assert pieces_per_word(tokens, DIGITS) >= PER_WORD > pieces_per_word(trained(tmp_path, DIGITS, count + 1), DIGITS)
    assert tokens.model == trained(tmp_path, DIGITS, count).model
    check_round_trip(tokens, DIGITS)


def test_enough_pieces_per_word_leave_the_number_as_it_is(model, tmp_path):
    words = word_list().values()
    assert train_tokenizer(words, 64, tmp_path, lower=True, per_word=PER_WORD).read_bytes() == model.read_bytes()


@pytest.mark.parametrize("words", [["YES", "NO"], ["GO"], ["\u0e44\u0e1b", "\u0e21\u0e32"]])
def test_the_number_is_never_below_that_of_the_characters(tmp_path, words):
    tokens = trained(tmp_path, words, 40, per_word=9.0, characters="XY")  # no word has nine letters
    letters = set("".join([*words, "XY"]))
    assert set(tokens.pieces) == letters | {"\u2581", "<unk>", "<s>", "</s>"}
    check_round_trip(tokens, [*words, "XY"])


def test_words_of_sentences_are_counted_once_each(tmp_path):
    tokens = trained(tmp_path, ["GO HOME", "GO UP", "COME"], 40, per_word=PER_WORD)
    words = ["GO", "HOME", "UP", "COME"]
    assert pieces_per_word(tokens, ["GO HOME", "GO UP", "COME"]) == pieces_per_word(tokens, words) >= PER_WORD
