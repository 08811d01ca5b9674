"""The attention decoder: exact scores of a closed lexicon, and free decoding."""

import pytest
import torch

from kdlib.decode.attention import AttentionDecoding
from kdlib.decode.lexicon import Lexicon
from kdlib.decode.trie import Trie
from kdlib.models import Emissions, Outputs
from kdlib.models.encoder_conformer import Conformer, ConformerShape
from kdlib.models.hybrid import Heads, Hybrid
from kdlib.models.nemo_files import SHIPPED_MODEL, read_tokenizer
from kdlib.tokens import BOS, EOS, Tokens

WORDS = ["go", "come", "yes", "command"]


@pytest.fixture(scope="module")
def decoding(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.model"
    path.write_bytes(read_tokenizer(SHIPPED_MODEL))
    tokens = Tokens.for_teachers(path)
    torch.manual_seed(0)
    encoder = Conformer(ConformerShape(d_model=16, layers=1, heads=2, ffn=16, kernel=7, mels=20))
    model = Hybrid(encoder, Heads(tokens.size, layers=1, heads=2, ffn=16)).eval()
    return AttentionDecoding(model, tokens, Lexicon(WORDS, tokens), longest=4)


@pytest.fixture(scope="module")
def outputs(decoding):
    torch.manual_seed(1)
    with torch.inference_mode():
        return decoding.model(torch.randn(2, 16_000) / 10, torch.tensor([16_000, 7_000]))


def test_a_words_score_is_the_product_of_its_tokens_and_its_end(decoding, outputs):
    scores = decoding.scores(outputs)
    for row, length in enumerate(outputs.lengths.tolist()):
        for column, ids in enumerate(decoding.lexicon.sequences):
            encoded, frames = outputs.encoded[row : row + 1, :length], torch.tensor([length])
            total = 0.0
            for step, token in enumerate([*ids, EOS]):  # one step at a time, as in free running
                prefix = torch.tensor([[BOS, *ids[:step]]])
                with torch.inference_mode():
                    logits = decoding.model.forward_decoder(encoded, prefix, frames)
                total += logits[0, -1].log_softmax(-1)[token].item()
            assert scores[row, column].item() == pytest.approx(total, abs=1e-3)


def test_scores_do_not_depend_on_the_number_of_spellings_per_pass(decoding, outputs, monkeypatch):
    expected = decoding.scores(outputs)
    monkeypatch.setattr("kdlib.decode.attention.CHUNK", 3)
    assert torch.allclose(decoding.scores(outputs), expected, atol=1e-5)


def score_of(decoding, outputs, row, ids, weight):
    """The joint log-probability of a text: every step of the decoder, and CTC's of the whole."""
    length = outputs.lengths[row : row + 1]
    encoded = outputs.encoded[row : row + 1, : int(length)]
    with torch.inference_mode():
        logprobs = decoding.model.forward_decoder(encoded, torch.tensor([[BOS, *ids]]), length)[0].log_softmax(-1)
        frames = decoding.model.ctc_head(encoded).log_softmax(-1)
    attention = sum(float(logprobs[step, token]) for step, token in enumerate([*ids, EOS]))
    if not weight:
        return attention
    if not ids:
        return (1 - weight) * attention + weight * float(frames[0, :, decoding.tokens.blank].sum())
    trie = Trie([ids], decoding.tokens.blank)
    ctc = trie.scores(frames[..., trie.columns].numpy(), length.numpy())[0, 0]
    return (1 - weight) * attention + weight * float(ctc)


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_a_wide_beam_finds_the_most_probable_of_all_texts(decoding, outputs, weight):
    """Compared with every text of up to two tokens, scored separately; padding of a batch changes nothing."""
    few = Outputs(Emissions(outputs.ctc.logits[:, :3], torch.tensor([3, 2])), outputs.encoded[:, :3])
    wide = AttentionDecoding(decoding.model, decoding.tokens, decoding.lexicon, longest=3, size=500)
    found = wide.search(few, weight)
    usable = [index for index in range(decoding.tokens.size) if index not in (BOS, EOS, decoding.tokens.blank)]
    subset = usable[::6] + [token for row in found for token in row]
    texts = [[], *([token] for token in usable), *([a, b] for a in subset for b in subset if a != b)]
    for row, ids in enumerate(found):
        best = max(score_of(decoding, few, row, text, weight) for text in texts)
        assert score_of(decoding, few, row, ids, weight) >= best - 1e-3


def test_the_joint_word_has_the_best_weighted_sum(decoding, outputs):
    ctc, attention = decoding.lexicon.scores(outputs.ctc), decoding.scores(outputs)
    joint = 0.3 * ctc + 0.7 * attention
    assert decoding(outputs)["joint_lexicon"] == [decoding.lexicon.words[index] for index in joint.argmax(-1).tolist()]


def test_the_columns_of_a_batch(decoding, outputs):
    found = decoding(outputs)
    assert (
        set(found) - {"attention_ids"}
        == set(decoding.columns)
        == {"attention", "attention_beam", "attention_lexicon", "joint", "joint_lexicon"}
    )
    assert all(word in decoding.lexicon.words for word in found["attention_lexicon"])
    assert len(found["attention"]) == 2
    alone = AttentionDecoding(decoding.model, decoding.tokens, decoding.lexicon, ctc_weight=0.0)  # CTC is not trained
    assert set(alone(outputs)) - {"attention_ids"} == set(alone.columns)
    assert set(alone.columns) == {"attention", "attention_beam", "attention_lexicon"}
    ids = [[int(token) for token in row.split()] for row in found["attention_ids"]]
    assert [decoding.tokens.decode(row) for row in ids] == found["attention"]
    assert alone.longest == max(map(len, decoding.lexicon.sequences)) + 4


def test_the_probabilities_of_a_words_two_spellings_add_up(decoding, outputs):
    first, second, both = (
        AttentionDecoding(decoding.model, decoding.tokens, Lexicon(words, decoding.tokens)).scores(outputs)[:, 0]
        for words in ({"GO": ["GO"]}, {"GO": ["GOAT"]}, {"GO": ["GO", "GOAT"]})
    )
    assert torch.allclose(both, torch.logaddexp(first, second), atol=1e-5)
