import numpy as np
import pytest

from kdlib.corpus.manifest import Utterance
from kdlib.decode.decoders import DecoderSet
from kdlib.decode.greedy import collapse_repeats
from kdlib.decode.lexicon import Lexicon
from kdlib.errors import UserError
from kdlib.evaluate.posteriors import FILE, Posteriors
from kdlib.evaluate.transcribe import transcribe
from kdlib.models.nemo_files import SHIPPED_MODEL, NeMoCTC


@pytest.fixture(scope="module")
def model():
    return NeMoCTC(SHIPPED_MODEL)


@pytest.fixture(scope="module")
def panel(model, corpus):
    return DecoderSet(model.tokens, Lexicon(corpus.lexicon, model.tokens))


def test_rows_come_back_in_order_whatever_the_batches(model, corpus, panel):
    chosen = list(corpus)[::5]
    one, many = (transcribe(model, chosen, panel, batch_size=size) for size in (1, 16))
    assert [row.utt_id for row in many] == [utt.utt_id for utt in chosen]
    assert [row.lexicon for row in one] == [row.lexicon for row in many]
    assert all(row.lexicon in corpus.lexicon for row in many)


def test_controls_are_recognised(model, corpus, panel):
    """The shipped model has heard most control voices: a decoding that is one off would score nothing here."""
    controls = corpus.where(lambda utt: utt.speaker.startswith("C"))
    rows = transcribe(model, controls, panel)
    assert sum(row.greedy == row.reference for row in rows) / len(rows) > 0.8


def test_ids_and_text_belong_together(model, corpus, panel):
    for row in transcribe(model, list(corpus)[:8], panel):
        assert model.tokens.decode(map(int, row.token_ids.split())) == row.greedy
        assert row.n_tokens == len(row.token_ids.split())
        assert 0 <= row.blank_share <= 1


def test_a_transcript_that_the_tokens_cannot_write_is_refused_before_anything_is_heard(model, panel, tmp_path):
    bad = Utterance("a", "S", tmp_path / "there is no such file.wav", 1.0, "CAFÉ")
    with pytest.raises(UserError, match=r"cannot write 'É'"):
        transcribe(model, [bad], panel)


def test_seen_words_are_marked_where_it_applies(model, corpus, panel):
    chosen = list(corpus)[:2]
    assert [row.seen for row in transcribe(model, chosen, panel)] == ["", ""]
    assert [row.seen for row in transcribe(model, chosen, panel, seen=lambda utt: True)] == ["yes", "yes"]


def test_kept_posteriors_decode_to_the_same_tokens(model, corpus, panel, tmp_path):
    chosen = list(corpus)[:6]
    rows = transcribe(model, chosen, panel, keep=tmp_path)
    kept = Posteriors(tmp_path / FILE)
    assert sorted(kept) == sorted(utt.utt_id for utt in chosen)
    durations = {utt.utt_id: utt.duration_s for utt in chosen}
    for row in rows:
        logprobs = kept[row.utt_id]
        assert np.allclose(np.exp(logprobs).sum(-1), 1, atol=0.01)
        assert len(logprobs) == pytest.approx(1000 * durations[row.utt_id] / kept.stride_ms, abs=2)
        ids = collapse_repeats(logprobs.argmax(-1).tolist(), model.tokens.blank)
        assert " ".join(map(str, ids)) == row.token_ids
