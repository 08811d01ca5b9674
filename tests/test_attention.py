"""The attention decoder's words: exact scores of a closed lexicon, and what it says by itself."""

import pytest
import torch

from kdlib.decode.attention import Spoken
from kdlib.models import nemo
from kdlib.models.conformer import Conformer, Shape
from kdlib.models.hybrid import Heads, Hybrid
from kdlib.tokens import BOS, EOS, Tokens

WORDS = ["go", "come", "yes", "command"]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "tokenizer.model"
    path.write_bytes(nemo.tokenizer(nemo.SHIPPED))
    tokens = Tokens.for_teachers(path)
    torch.manual_seed(0)
    encoder = Conformer(Shape(d_model=16, layers=1, heads=2, ffn=16, kernel=7, mels=20))
    return Spoken(Hybrid(encoder, Heads(tokens.size, layers=1, heads=2, ffn=16)).eval(), tokens, WORDS)


@pytest.fixture(scope="module")
def outputs(spoken):
    torch.manual_seed(1)
    with torch.inference_mode():
        return spoken.model(torch.randn(2, 16_000) / 10, torch.tensor([16_000, 7_000]))


def test_a_words_score_is_the_product_of_its_tokens_and_its_end(spoken, outputs):
    scores = spoken.scores(outputs)
    for row, length in enumerate(outputs.lengths.tolist()):
        for column, ids in enumerate(spoken.ids):
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


def test_the_columns_of_a_batch(spoken, outputs):
    found = spoken(outputs)
    assert set(found) == {"attention", "attention_lexicon"}
    assert all(word in spoken.words for word in found["attention_lexicon"])
    assert spoken.longest == max(map(len, spoken.ids)) + 4
    assert len(found["attention"]) == 2
