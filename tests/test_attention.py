"""The attention decoder's words: exact scores of a closed lexicon, and what it says by itself."""

import pytest
import torch

from kdlib.decode.attention import AttentionDecoding
from kdlib.decode.lexicon import Lexicon
from kdlib.models import Outputs
from kdlib.models.encoder_conformer import Conformer, ConformerShape
from kdlib.models.hybrid import Heads, Hybrid
from kdlib.models.nemo_files import SHIPPED_MODEL, read_tokenizer
from kdlib.tokens import BOS, EOS, Tokens

WORDS = ["go", "come", "yes", "command"]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.model"
    path.write_bytes(read_tokenizer(SHIPPED_MODEL))
    tokens = Tokens.for_teachers(path)
    torch.manual_seed(0)
    encoder = Conformer(ConformerShape(d_model=16, layers=1, heads=2, ffn=16, kernel=7, mels=20))
    model = Hybrid(encoder, Heads(tokens.size, layers=1, heads=2, ffn=16)).eval()
    return AttentionDecoding(model, tokens, Lexicon(WORDS, tokens), longest=4)


@pytest.fixture(scope="module")
def outputs(spoken):
    torch.manual_seed(1)
    with torch.inference_mode():
        return spoken.model(torch.randn(2, 16_000) / 10, torch.tensor([16_000, 7_000]))


def test_a_words_score_is_the_product_of_its_tokens_and_its_end(spoken, outputs):
    scores = spoken.scores(outputs)
    for row, length in enumerate(outputs.lengths.tolist()):
        for column, ids in enumerate(spoken.lexicon.sequences):
            heard, frames = outputs.encoded[row : row + 1, :length], torch.tensor([length])
            total = 0.0
            for step, token in enumerate([*ids, EOS]):  # one step at a time, as the decoder would say it
                said = torch.tensor([[BOS, *ids[:step]]])
                with torch.inference_mode():
                    logits = spoken.model.forward_decoder(heard, said, frames)
                total += logits[0, -1].log_softmax(-1)[token].item()
            assert scores[row, column].item() == pytest.approx(total, abs=1e-3)


def test_scores_do_not_depend_on_how_many_words_are_asked_at_once(spoken, outputs, monkeypatch):
    together = spoken.scores(outputs)
    monkeypatch.setattr("kdlib.decode.attention.AT_ONCE", 3)
    assert torch.allclose(spoken.scores(outputs), together, atol=1e-5)


def score_of(spoken, outputs, row, ids, weight, end=True):
    """The joint log-probability of a text: every step of the decoder, and CTC's of the whole."""
    from kdlib.decode.trie import Trie

    length = outputs.lengths[row : row + 1]
    heard = outputs.encoded[row : row + 1, : int(length)]
    with torch.inference_mode():
        logprobs = spoken.model.forward_decoder(heard, torch.tensor([[BOS, *ids]]), length)[0].log_softmax(-1)
        frames = spoken.model.ctc_head(heard).log_softmax(-1)
    told = sum(float(logprobs[step, token]) for step, token in enumerate([*ids, EOS]))
    if not weight:
        return told
    if not ids:
        return (1 - weight) * told + weight * float(frames[0, :, spoken.tokens.blank].sum())
    trie = Trie([ids], spoken.tokens.blank)
    ctc = trie.scores(frames[..., trie.columns].numpy(), length.numpy())[0, 0]
    return (1 - weight) * told + weight * float(ctc)


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_a_wide_beam_finds_the_likeliest_of_all_texts(spoken, outputs, weight):
    """Against every text of up to two tokens, scored one by one; padding of a batch changes nothing."""
    few = Outputs(outputs.ctc_logits[:, :3], torch.tensor([3, 2]), outputs.encoded[:, :3])
    wide = AttentionDecoding(spoken.model, spoken.tokens, spoken.lexicon, longest=3, size=500)
    found = wide.search(few, weight)
    usable = [index for index in range(spoken.tokens.size) if index not in (BOS, EOS, spoken.tokens.blank)]
    some = usable[::6] + [token for row in found for token in row]
    texts = [[], *([one] for one in usable), *([one, two] for one in some for two in some if one != two)]
    for row, ids in enumerate(found):
        best = max(score_of(spoken, few, row, text, weight) for text in texts)
        assert score_of(spoken, few, row, ids, weight) >= best - 1e-3


def test_the_joint_word_has_the_best_weighted_sum(spoken, outputs):
    ctc, told = spoken.lexicon.scores(outputs), spoken.scores(outputs)
    both = 0.3 * ctc + 0.7 * told
    assert spoken(outputs)["joint_lexicon"] == [spoken.lexicon.words[index] for index in both.argmax(-1).tolist()]


def test_the_columns_of_a_batch(spoken, outputs):
    found = spoken(outputs)
    assert (
        set(found) - {"attention_ids"}
        == set(spoken.columns)
        == {"attention", "attention_beam", "attention_lexicon", "joint", "joint_lexicon"}
    )
    assert all(word in spoken.lexicon.words for word in found["attention_lexicon"])
    assert len(found["attention"]) == 2
    alone = AttentionDecoding(spoken.model, spoken.tokens, spoken.lexicon, joint=False)  # CTC is not trained
    assert set(alone(outputs)) - {"attention_ids"} == set(alone.columns)
    assert set(alone.columns) == {"attention", "attention_beam", "attention_lexicon"}
    ids = [[int(one) for one in row.split()] for row in found["attention_ids"]]
    assert [spoken.tokens.decode(row) for row in ids] == found["attention"]
    assert alone.longest == max(map(len, spoken.lexicon.sequences)) + 4


def test_a_word_of_two_spellings_has_both_of_their_probabilities(spoken, outputs):
    one, other, both = (
        AttentionDecoding(spoken.model, spoken.tokens, Lexicon(words, spoken.tokens)).scores(outputs)[:, 0]
        for words in ({"GO": ["GO"]}, {"GO": ["GOAT"]}, {"GO": ["GO", "GOAT"]})
    )
    assert torch.allclose(both, torch.logaddexp(one, other), atol=1e-5)
