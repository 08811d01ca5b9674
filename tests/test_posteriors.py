"""Stored posteriors: compact, exact for the most probable tokens, and read by utterance."""

import numpy as np
import pytest

from kdlib.errors import UserError
from kdlib.evaluate.posteriors import TOP, Posteriors, PosteriorWriter, entropy_bits, frame_kl
from kdlib.tokens import Tokens, train_tokenizer

SIZE = 200


def random_logprobs(rng, frames, sharpness=4.0):
    logits = sharpness * rng.standard_normal((frames, SIZE))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = train_tokenizer(["ONE TWO", "THREE"], 30, tmp_path_factory.mktemp("pieces"))
    return Tokens(path.read_bytes(), blank=2, size=SIZE)


def test_the_most_probable_tokens_are_exact_and_the_rest_is_spread_evenly(tokens, tmp_path):
    rng = np.random.default_rng(1)
    rows = {f"u{index}": random_logprobs(rng, frames) for index, frames in enumerate((7, 1, 30))}
    writer = PosteriorWriter(tokens, 40.0)
    for name, logprobs in rows.items():
        writer.add(name, logprobs)
    stored = Posteriors(writer.write(tmp_path))
    assert list(stored) == list(rows)
    assert (len(stored), stored.stride_ms, stored.blank, len(stored.pieces)) == (3, 40.0, 2, SIZE)
    for name, logprobs in rows.items():
        restored = stored[name]
        assert restored.shape == logprobs.shape
        assert (restored.argmax(-1) == logprobs.argmax(-1)).all()
        best = np.sort(logprobs, -1)[:, -TOP:]
        assert np.sort(restored, -1)[:, -TOP:] == pytest.approx(best, abs=0.01)
        assert np.exp(restored).sum(-1) == pytest.approx(1, abs=0.01)
        rest = np.sort(np.exp(restored), -1)[:, :-TOP].sum(-1)
        assert rest == pytest.approx(np.sort(np.exp(logprobs), -1)[:, :-TOP].sum(-1), abs=1e-3)


def test_small_vocabularies_are_stored_completely(tokens, tmp_path):
    few = Tokens(tokens.model, blank=2, size=8)
    logprobs = np.log(np.full((3, 8), 1 / 8))
    logprobs[0] = -60.0
    logprobs[0, 2] = 0.0
    writer = PosteriorWriter(few, 40.0)
    writer.add("u", logprobs)
    restored = Posteriors(writer.write(tmp_path))["u"]
    assert restored == pytest.approx(logprobs, abs=0.01)
    assert entropy_bits(restored) == pytest.approx([0, 3, 3], abs=0.01)


def test_the_divergence_of_stored_posteriors_is_close_to_the_exact_one_or_lower(tokens, tmp_path):
    rng = np.random.default_rng(2)
    teacher, other = random_logprobs(rng, 50), random_logprobs(rng, 51)
    student = np.vstack([teacher, other[-1:]]) + 0.7 * rng.standard_normal((51, SIZE))
    student -= np.log(np.exp(student).sum(-1, keepdims=True))
    writer = PosteriorWriter(tokens, 40.0)
    writer.add("teacher", teacher)
    writer.add("student", student)
    writer.add("other", other)
    stored = Posteriors(writer.write(tmp_path))
    exact = frame_kl(teacher, student)
    assert len(exact) == 50
    assert exact == pytest.approx((np.exp(teacher) * (teacher - student[:50])).sum(-1))
    assert frame_kl(stored["teacher"], stored["student"]).mean() == pytest.approx(exact.mean(), rel=0.15)
    distant = frame_kl(stored["teacher"], stored["other"]).mean()  # far apart: spreading the rest lowers it
    assert 0.5 * frame_kl(teacher, other).mean() < distant < frame_kl(teacher, other).mean()
    assert frame_kl(stored["teacher"], stored["teacher"]) == pytest.approx(0)


def test_other_files_are_refused_with_what_to_do(tmp_path):
    path = tmp_path / "ctc.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="run the stage again"):
        Posteriors(path)
