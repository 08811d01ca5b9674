"""The sentencepiece pieces of teachers and students: their source, and unsuitable tokenizers."""

import string

import pytest
import sentencepiece
import torch

from kdlib.distill import checks
from kdlib.errors import UserError
from kdlib.models.encoder_nemo import remap_head
from kdlib.models.nemo_files import SHIPPED_MODEL, NeMoCTC
from kdlib.pipeline import Fold
from kdlib.tokens import BLANK, PER_WORD, pieces_per_word, train_tokenizer


def fold(outputs, **overrides):
    return Fold.load(
        "params/smoke.yaml", "M08", overrides={"outputs": str(outputs), "pretrained": "shipped"} | overrides
    )


def test_the_pretrained_models_pieces_are_used(tmp_path):
    chosen = fold(tmp_path)
    tokens = chosen.tokens
    assert tokens.model == NeMoCTC(SHIPPED_MODEL).tokens.model
    assert (tokens.bos, tokens.eos, tokens.blank, tokens.size) == (0, 1, 2, 64)
    for word in chosen.lexicon:
        assert not {0, 1, 2} & set(tokens.encode(word))


def test_pieces_of_the_corpus_with_more_outputs_than_pieces(tmp_path):
    tokens = fold(tmp_path, tokens={"source": "corpus", "pieces": 40, "size": 5000}).tokens
    assert tokens.size == 5000
    assert len(tokens.pieces) <= 40


def test_a_tokenizer_that_uses_the_special_ids_is_refused(tmp_path):
    """NVIDIA's have neither <s> nor </s>: their ids 1 and 2 are pieces, which would be taken for EOS and blank."""
    with (tmp_path / "own.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sorted([*fold(tmp_path).lexicon] * 3)),
            model_writer=file,
            vocab_size=40,
            model_type="bpe",
            bos_id=-1,
            eos_id=-1,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    with pytest.raises(UserError, match="need the ids 0, 1 and 2 for BOS, EOS and blank"):
        _ = fold(tmp_path, tokens={"source": str(tmp_path / "own.model")}).tokens


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"source": "params/base.yaml"}, "params/base.yaml is not a sentencepiece model; name the .model file"),
        ({"source": "corpus", "pieces": 16}, r"in the recipe \(tokens: {source: corpus, pieces: "),
        ({"source": "none.model"}, "there is no file .*none.model; correct the path"),
        ({"size": 20}, "tokens.size is 20, but the tokenizer has 64 pieces; write 64 or more"),
    ],
)
def test_an_impossible_setting_is_an_error(tmp_path, tokens, message):
    with pytest.raises(UserError, match=message):
        _ = fold(tmp_path, tokens=tokens).tokens


def test_a_folds_own_model_has_its_own_pieces(tmp_path):
    assert fold(tmp_path, pretrained="from_corpus").params.tokens_per_fold
    assert not fold(tmp_path, pretrained="from_corpus", tokens={"source": "corpus"}).params.tokens_per_fold


def test_the_blank_moves_and_unused_tokens_are_suppressed(tmp_path):
    tokens = fold(tmp_path, tokens={"size": 70}).tokens
    weight, bias = torch.arange(65.0)[:, None], torch.zeros(65)
    moved, low = remap_head(weight, bias, tokens).values()
    assert moved[BLANK] == 64  # NeMo's last
    assert moved[3:64, 0].tolist() == list(range(3, 64))
    assert low[64:].tolist() == [-10.0] * 6


def test_a_corpus_of_few_words_has_two_pieces_per_word(tmp_path):
    chosen = fold(tmp_path, tokens={"source": "corpus", "pieces": 256})
    assert pieces_per_word(chosen.tokens, chosen.lexicon) >= PER_WORD
    assert len(chosen.tokens.pieces) < 100  # six words


def test_a_tokenizer_with_one_piece_per_word_is_used_with_a_warning(tmp_path):
    every_letter = string.ascii_uppercase + "'-"  # of the controls' words
    path = train_tokenizer(fold(tmp_path).lexicon, 1000, tmp_path / "coarse", characters=every_letter)
    with pytest.warns(UserWarning, match=r"tokens: words have 1\.0 pieces on average, fewer than 2: .*source: corpus"):
        tokens = fold(tmp_path, tokens={"source": str(path)}).tokens
    assert tokens.model == path.read_bytes()
    assert checks.check_pieces(pieces_per_word(tokens, fold(tmp_path).lexicon)).verdict == checks.WARN
