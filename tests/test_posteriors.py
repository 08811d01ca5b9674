"""What is kept of every frame: small, exact where it matters, and read by utterance."""

import numpy as np
import pytest

from kdlib.errors import UserError
from kdlib.evaluate.posteriors import TOP, Posteriors, PosteriorWriter, entropy_bits, frame_kl
from kdlib.tokens import Tokens, train_tokenizer

SIZE = 200


def said(rng, frames, sharpness=4.0):
    logits = sharpness * rng.standard_normal((frames, SIZE))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = train_tokenizer(["ONE TWO", "THREE"], 30, tmp_path_factory.mktemp("pieces"))
    return Tokens(path.read_bytes(), blank=2, size=SIZE)


def test_the_likeliest_tokens_are_exact_and_the_rest_is_spread(tokens, tmp_path):
    rng = np.random.default_rng(1)
    rows = {f"u{place}": said(rng, frames) for place, frames in enumerate((7, 1, 30))}
    keeper = PosteriorWriter(tokens, 40.0)
    for name, logprobs in rows.items():
        keeper.add(name, logprobs)
    kept = Posteriors(keeper.write(tmp_path))
    assert list(kept) == list(rows)
    assert (len(kept), kept.stride_ms, kept.blank, len(kept.pieces)) == (3, 40.0, 2, SIZE)
    for name, logprobs in rows.items():
        found = kept[name]
        assert found.shape == logprobs.shape
        assert (found.argmax(-1) == logprobs.argmax(-1)).all()
        best = np.sort(logprobs, -1)[:, -TOP:]
        assert np.sort(found, -1)[:, -TOP:] == pytest.approx(best, abs=0.01)
        assert np.exp(found).sum(-1) == pytest.approx(1, abs=0.01)
        others = np.sort(np.exp(found), -1)[:, :-TOP].sum(-1)
        assert others == pytest.approx(np.sort(np.exp(logprobs), -1)[:, :-TOP].sum(-1), abs=1e-3)


def test_few_tokens_are_kept_whole(tokens, tmp_path):
    few = Tokens(tokens.model, blank=2, size=8)
    logprobs = np.log(np.full((3, 8), 1 / 8))
    logprobs[0] = -60.0
    logprobs[0, 2] = 0.0
    keeper = PosteriorWriter(few, 40.0)
    keeper.add("u", logprobs)
    found = Posteriors(keeper.write(tmp_path))["u"]
    assert found == pytest.approx(logprobs, abs=0.01)
    assert entropy_bits(found) == pytest.approx([0, 3, 3], abs=0.01)


def test_the_divergence_of_what_was_kept_is_that_of_all_or_less(tokens, tmp_path):
    rng = np.random.default_rng(2)
    teacher, other = said(rng, 50), said(rng, 51)
    student = np.vstack([teacher, other[-1:]]) + 0.7 * rng.standard_normal((51, SIZE))
    student -= np.log(np.exp(student).sum(-1, keepdims=True))
    keeper = PosteriorWriter(tokens, 40.0)
    keeper.add("teacher", teacher)
    keeper.add("student", student)
    keeper.add("other", other)
    kept = Posteriors(keeper.write(tmp_path))
    exact = frame_kl(teacher, student)
    assert len(exact) == 50
    assert exact == pytest.approx((np.exp(teacher) * (teacher - student[:50])).sum(-1))
    assert frame_kl(kept["teacher"], kept["student"]).mean() == pytest.approx(exact.mean(), rel=0.15)
    unlike = frame_kl(kept["teacher"], kept["other"]).mean()  # far apart, what is spread hides some of it
    assert 0.5 * frame_kl(teacher, other).mean() < unlike < frame_kl(teacher, other).mean()
    assert frame_kl(kept["teacher"], kept["teacher"]) == pytest.approx(0)


def test_another_file_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "ctc.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="make the stage again"):
        Posteriors(path)
