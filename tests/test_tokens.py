import pytest

from kdlib.corpus.embedded.synthetic import word_list
from kdlib.errors import UserError
from kdlib.tokens import BLANK, BOS, EOS, Tokens, check_round_trip, normalise, train_tokenizer


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
