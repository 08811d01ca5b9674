import pytest

from kdlib.corpus.embedded.synthetic import word_list
from kdlib.errors import UserError
from kdlib.tokens import BLANK, BOS, EOS, Tokens, check_round_trip, normalise, train_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_tokenizer(word_list().values(), 64, tmp_path_factory.mktemp("tokens"), lower=True)


def test_teachers_contract_is_the_seeds(model):
    tokens = Tokens.for_teachers(model)
    assert (BOS, EOS, BLANK) == (0, 1, 2) == (tokens.bos, tokens.eos, tokens.blank)
    ids = tokens.encode("YALE")
    assert min(ids) > 2  # no offset: sentencepiece's own ids, which begin after its three special ones
    assert tokens.pieces[ids[0]].startswith("\u2581")


def test_nemo_keeps_its_blank_last(model):
    tokens = Tokens.for_nemo(model.read_bytes())
    assert tokens.blank == len(tokens.pieces) == tokens.size - 1


@pytest.mark.parametrize("make", [Tokens.for_teachers, lambda path: Tokens.for_nemo(path.read_bytes())])
def test_every_word_of_the_list_comes_back(model, make):
    check_round_trip(make(model), word_list().values())


def test_an_offset_of_one_does_not_come_back(model):
    tokens = Tokens.for_teachers(model)
    words = sorted(set(word_list().values()))
    right = [tokens.decode(tokens.encode(word)) == word for word in words]
    shifted = [tokens.decode([index + 1 for index in tokens.encode(word)]) == word for word in words]
    assert all(right)
    assert not any(shifted)


def test_characters_outside_the_tokenizer_are_named(model):
    with pytest.raises(UserError, match=r"cannot write 'É' \(U\+00C9\) of the text 'CAFÉ'"):
        Tokens.for_teachers(model).encode("CAFÉ")


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(model):
    small = Tokens(model.read_bytes(), blank=20, size=21)
    with pytest.raises(UserError, match="beyond the 21 outputs"):
        check_round_trip(small, ["ZERO", "QUEBEC"])


def test_fingerprints_differ_where_ids_mean_different_things(model):
    teachers, nemo = Tokens.for_teachers(model), Tokens.for_nemo(model.read_bytes())
    assert teachers.fingerprint == Tokens.for_teachers(model).fingerprint
    assert len({teachers.fingerprint, nemo.fingerprint, Tokens.for_teachers(model, size=5000).fingerprint}) == 3


def test_training_twice_gives_the_same_bytes(model, tmp_path):
    assert (
        train_tokenizer(reversed(list(word_list().values())), 64, tmp_path, lower=True).read_bytes()
        == model.read_bytes()
    )


def test_few_texts_yield_fewer_pieces_than_asked_for(tmp_path):
    tokens = Tokens.for_nemo(train_tokenizer(["ONE", "TWO"], 900, tmp_path).read_bytes())
    assert len(tokens.pieces) < 30
    assert tokens.decode(tokens.encode("TWO ONE")) == "TWO ONE"


def test_too_few_pieces_for_the_script_are_refused_in_words(tmp_path):
    with pytest.raises(
        UserError, match="no tokenizer of 8 pieces can write the 5 different characters of these 2 texts"
    ):
        train_tokenizer(["ONE", "TWO"], 8, tmp_path)


def test_characters_beyond_the_texts_can_be_written(tmp_path):
    tokens = Tokens.for_nemo(train_tokenizer(["ONE", "TWO"], 64, tmp_path, lower=True, characters="É'-").read_bytes())
    assert tokens.decode(tokens.encode("É'-TWO")) == "É'-TWO"


def test_punctuation_is_dropped_where_asked_for_and_scripts_keep_their_signs():
    assert normalise("Don't stop, \u00abthere\u00bb: x-ray?", punctuation="drop") == "DON'T STOP THERE X-RAY"
    assert normalise("\u0915\u093f\u0924\u093e\u092c", punctuation="drop") == "\u0915\u093f\u0924\u093e\u092c"


def test_normalise_is_idempotent_and_composes_accents():
    assert normalise("cafe\u0301  au\tlait") == "CAFÉ AU LAIT" == normalise(normalise("cafe\u0301 au lait"))


def test_a_tokenizer_without_hyphen_names_the_way_out(tmp_path):
    model = train_tokenizer(["ONE", "RAY", "X"], 12, tmp_path)
    with pytest.raises(UserError, match=r"cannot write '-' .*; write hyphens: space in the recipe"):
        Tokens.for_teachers(model).encode("X-RAY")
    assert normalise("X-RAY", hyphens="space") == "X RAY"


@pytest.mark.parametrize("text", ["น้ำ", "wait\u2026", "½", "№ 7", "می\u200cخواهم", "ＦＵＬＬ"])
def test_scripts_and_signs_come_back_as_they_went_in(tmp_path, text):
    """sentencepiece's own normalisation would rewrite them; ours is the only one."""
    tokens = Tokens.for_nemo(train_tokenizer([text, "dog"], 64, tmp_path, lower=True).read_bytes())
    assert tokens.decode(tokens.encode(text)) == normalise(text)
    assert tokens.decode(tokens.encode("dog")) == "DOG"


def test_the_order_of_characters_makes_no_other_tokenizer(tmp_path):
    """Sets come in another order in every process; the fingerprint must not."""
    made = [
        train_tokenizer(["ONE", "TWO"], 64, tmp_path / order, characters=order).read_bytes()
        for order in ("XYZ'", "Z'XYYX")
    ]
    assert made[0] == made[1]
