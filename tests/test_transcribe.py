import numpy as np
import pytest
import torch

from kdlib.corpus.utterances import Utterance
from kdlib.decode.calibration import Calibrator, Weight, towards_prior
from kdlib.decode.decoders import TRANSDUCTIVE, DecoderSet
from kdlib.decode.greedy import collapse_repeats
from kdlib.decode.lexicon import Lexicon
from kdlib.errors import UserError
from kdlib.evaluate.posteriors import FILE, Posteriors, PosteriorWriter
from kdlib.evaluate.transcribe import Evaluation, recordings, transcribe
from kdlib.models.nemo_files import SHIPPED_MODEL, NeMoCTC
from kdlib.settings.evaluation import Scoring


@pytest.fixture(scope="module")
def model():
    return NeMoCTC(SHIPPED_MODEL)


@pytest.fixture(scope="module")
def decoders(model, corpus):
    return DecoderSet(model.tokens, Lexicon(corpus.lexicon, model.tokens))


def test_rows_keep_the_order_of_the_utterances_for_any_batch_size(model, corpus, decoders):
    utterances = list(corpus)[::5]
    single, batched = (
        transcribe(recordings(model), utterances, Evaluation(decoders, scoring=Scoring(batch_size=size)))
        for size in (1, 16)
    )
    assert [row.utt_id for row in batched] == [utt.utt_id for utt in utterances]
    assert [row.lexicon for row in single] == [row.lexicon for row in batched]
    assert all(row.lexicon in corpus.lexicon for row in batched)


def test_controls_are_recognised(model, corpus, decoders):
    """The shipped model was trained on most control speakers: an offset of one token would give a WRA of 0 here."""
    controls = corpus.where(lambda utt: utt.speaker.startswith("C"))
    rows = transcribe(recordings(model), controls, Evaluation(decoders))
    assert sum(row.greedy == row.reference for row in rows) / len(rows) > 0.8


def test_token_ids_decode_to_the_text(model, corpus, decoders):
    for row in transcribe(recordings(model), list(corpus)[:8], Evaluation(decoders)):
        assert model.tokens.decode(map(int, row.token_ids.split())) == row.greedy
        assert row.n_tokens == len(row.token_ids.split())
        assert 0 <= row.blank_share <= 1


def test_a_transcript_outside_the_tokenizer_is_refused_before_any_audio_is_read(model, decoders, tmp_path):
    utt = Utterance("a", "S", tmp_path / "there is no such file.wav", 1.0, "CAFÉ")
    with pytest.raises(UserError, match="'É'"):
        transcribe(recordings(model), [utt], Evaluation(decoders))


def test_seen_words_are_marked_where_it_applies(model, corpus, decoders):
    utterances = list(corpus)[:2]
    for seen, expected in ((None, ""), (lambda utt: True, "yes"), (lambda utt: False, "no")):
        rows = transcribe(recordings(model), utterances, Evaluation(decoders, seen=seen))
        assert [row.seen for row in rows] == [expected, expected]


def test_stored_posteriors_decode_to_the_same_tokens(model, corpus, decoders, tmp_path):
    utterances = list(corpus)[:6]
    writer = PosteriorWriter(model.tokens, model.stride_ms)
    rows = transcribe(recordings(model), utterances, Evaluation(decoders), writer)
    writer.write(tmp_path)
    stored = Posteriors(tmp_path / FILE)
    assert sorted(stored) == sorted(utt.utt_id for utt in utterances)
    durations = {utt.utt_id: utt.duration_s for utt in utterances}
    for row in rows:
        logprobs = stored[row.utt_id]
        assert np.allclose(np.exp(logprobs).sum(-1), 1, atol=0.01)
        assert len(logprobs) == pytest.approx(1000 * durations[row.utt_id] / stored.stride_ms, abs=2)
        ids = collapse_repeats(logprobs.argmax(-1).tolist(), model.tokens.blank)
        assert " ".join(map(str, ids)) == row.token_ids


def test_the_mean_posterior_of_all_speech_is_moved_to_the_prior_of_the_words(model, corpus, decoders):
    speech = corpus.where(lambda utt: utt.speaker == "M08")
    words = decoders.plain
    places = range(len(words.words))
    log_prior = (0.0,) * model.tokens.size
    favours = {word: 200.0 * (word == words.words[0]) for word in words.words}  # a calibration that is wrong here
    weights = {"tokens": Weight(0.0, 0.0, 1.0)}
    about = {"form": "per_word", "tokens": model.tokens.fingerprint, "speakers": (), "utterances": 0}
    known = Calibrator(**about, log_prior=log_prior, words=tuple(words.words), own=favours, weights=weights)
    calibrated = decoders.calibrated({"lexicon": known}).with_more(TRANSDUCTIVE)
    rows = transcribe(recordings(model), speech, Evaluation(calibrated))
    table = torch.stack([calibrated.lexicon.posterior(recordings(model)([utt]).ctc)[0] for utt in speech])
    moved = towards_prior(table.double().numpy(), np.full(len(places), 1 / len(places)), 1.0)
    assert [row.lexicon_transductive for row in rows] == [words.words[place] for place in moved.argmax(1)]
    counts = [sum(getattr(row, name) == words.words[0] for row in rows) for name in ("lexicon", TRANSDUCTIVE)]
    assert counts[0] > counts[1]
