"""Calibration of a system on training speech, its strength on dev speech: on outputs that are made from the words."""

import random
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kdlib.corpus.embedded.synthetic import word_list
from kdlib.corpus.utterances import Utterance
from kdlib.decode.beam import BeamSearch, BeamSettings
from kdlib.decode.calibration import CalibratedLexicon
from kdlib.decode.decoders import DecoderSet
from kdlib.decode.lexicon import Lexicon
from kdlib.evaluate.calibrate import LEAST, Speech, calibrate
from kdlib.models import Emissions, Outputs
from kdlib.settings.evaluation import Calibration
from kdlib.tokens import Tokens, train_tokenizer

FRAMES = 24


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t")
    return Tokens.for_nemo(train_tokenizer(word_list().values(), 64, folder, lower=True).read_bytes())


@pytest.fixture(scope="module")
def lexicon(tokens):
    words = ["I", "A", "TO", "GO", "THE", *sorted(set(word_list().values()))[::12]]
    return Lexicon(words, tokens)


@pytest.fixture(scope="module")
def decoders(tokens, lexicon):
    return DecoderSet(tokens, lexicon)


def utterances(words, count, speaker, seed):
    rng = random.Random(seed)
    return [
        Utterance(f"{speaker}_{place}", speaker, Path(f"{place}.wav"), 0.5 + rng.random(), rng.choice(words))
        for place in range(count)
    ]


def unsure(tokens, noise=3.0):
    """Outputs in which a word's tokens stand above noise, and the blank above everything: short words win."""

    def forward(batch):
        rows = []
        for utt in batch:
            rng = np.random.default_rng(zlib.crc32(f"{utt.utt_id} {utt.text}".encode()))
            logits = noise * rng.standard_normal((FRAMES, tokens.size))
            for place, token in enumerate(tokens.encode(utt.text)):
                logits[2 + 2 * place, token] += 5.0
            logits[:, tokens.blank] += 7.0
            rows.append(torch.tensor(logits, dtype=torch.float32))
        return Outputs(Emissions(torch.stack(rows), torch.full((len(batch),), FRAMES)))

    return forward


def right(decoders, forward, speech, column):
    return float(np.mean([a == utt.text for a, utt in zip(decoders(forward(speech))[column], speech, strict=True)]))


@pytest.fixture(scope="module")
def speech(lexicon):
    return Speech(utterances(lexicon.words, 300, "A", 1), utterances(lexicon.words, 100, "B", 2))


@pytest.fixture(scope="module")
def fitted(decoders, tokens, speech):
    return calibrate(decoders, unsure(tokens), speech, Calibration())


def test_new_speech_is_recognised_better_and_words_as_often_as_they_are_said(fitted, decoders, tokens, lexicon):
    new, forward = utterances(lexicon.words, 300, "C", 3), unsure(tokens)
    calibrated = decoders.calibrated(fitted)
    plain, better = (right(calibrated, forward, new, column) for column in ("lexicon_plain", "lexicon"))
    assert better > plain + 0.03
    columns = calibrated(forward(new))
    short = [
        np.mean([len(tokens.encode(word)) == 1 for word in texts])
        for texts in (columns["lexicon_plain"], columns["lexicon"], [utt.text for utt in new])
    ]
    assert abs(short[1] - short[2]) < abs(short[0] - short[2])


def test_only_training_speech_is_fitted_on_and_only_dev_speech_chooses(decoders, tokens, speech):
    seen = []

    def forward(batch):
        seen.extend(utt.speaker for utt in batch)
        return unsure(tokens)(batch)

    found = calibrate(decoders, forward, speech, Calibration(utterances=80))["lexicon"]
    assert found.speakers == ("A",)
    assert found.utterances == 80
    assert seen.count("A") == 80
    assert seen.count("B") == 100
    alone = calibrate(decoders, forward, replace(speech, dev=()), Calibration(utterances=80))["lexicon"]
    assert alone.strength == 1.0  # nothing chooses
    assert alone.own == found.own


def test_a_like_model_takes_what_was_chosen_for_the_other_and_is_fitted_on_its_own_outputs(
    fitted, decoders, tokens, speech
):
    seen, other = [], unsure(tokens, noise=2.0)
    chosen = {"lexicon": fitted["lexicon"].at(0.75, 1.7)}
    found = calibrate(
        decoders,
        lambda batch: seen.extend(utt.speaker for utt in batch) or other(batch),
        speech,
        Calibration(),
        chosen=chosen,
    )["lexicon"]
    assert (found.strength, found.temperature) == (0.75, 1.7)
    assert set(seen) == {"A"}  # no dev speech
    assert found.own != fitted["lexicon"].own
    alone = calibrate(decoders, other, replace(speech, dev=()), Calibration())["lexicon"]
    assert found.own == alone.own


def test_plain_scores_stay_beside_the_calibrated_ones(fitted, decoders, tokens, speech):
    outputs = unsure(tokens)(speech.dev[:20])
    plain, off = decoders(outputs), decoders.calibrated({"lexicon": fitted["lexicon"].at(0.0)})
    assert "lexicon_plain" not in decoders.columns
    assert off.columns == ("greedy", "lexicon", "lexicon_plain")
    assert off(outputs)["lexicon"] == off(outputs)["lexicon_plain"] == plain["lexicon"]
    on = decoders.calibrated(fitted)(outputs)
    assert on["lexicon_plain"] == plain["lexicon"]
    assert on["lexicon"] != plain["lexicon"]


@pytest.mark.parametrize("form", ["per_word", "features", "label_prior"])
def test_what_a_batch_is_decoded_to_is_what_the_calibrated_lexicon_says(form, decoders, tokens, lexicon, speech):
    found = calibrate(decoders, unsure(tokens), speech, Calibration(form=form))
    outputs = unsure(tokens)(speech.dev[:20])
    expected = CalibratedLexicon(lexicon, found["lexicon"]).best(outputs.ctc)
    assert decoders.calibrated(found)(outputs)["lexicon"] == expected


def test_without_words_of_the_lexicon_nothing_is_calibrated(decoders, tokens, capsys):
    sentences = [utt.replace(text=f"{utt.text} {utt.text}") for utt in utterances(["GO", "TO"], 50, "A", 1)]
    few = sentences + utterances(["GO"], LEAST - 1, "B", 1)
    assert calibrate(decoders, unsure(tokens), Speech(few), Calibration()) == {}
    assert f"not calibrated: {LEAST - 1} of 59 training utterances are words of it" in capsys.readouterr().out
    assert calibrate(decoders, unsure(tokens), Speech(few), Calibration(form="none")) == {}


class Attention:
    """An attention decoder that scores the words of an utterance by chance."""

    columns = ("attention", "attention_lexicon")

    def __init__(self, words):
        self.words, self.scored = words, 0

    def word_scores(self, outputs):
        self.scored += len(outputs.lengths)
        return {"attention_lexicon": torch.randn(len(outputs.lengths), self.words)}


def test_an_attention_decoder_scores_a_part_of_the_sample(tokens, lexicon, speech):
    attention = Attention(len(lexicon.words))
    found = calibrate(DecoderSet(tokens, lexicon, attention=attention), unsure(tokens), speech, Calibration())
    assert found["lexicon"].utterances == 300
    assert found["attention_lexicon"].utterances == 200
    assert attention.scored == 200 + len(speech.dev)
    of_ctc = calibrate(
        DecoderSet(tokens, lexicon, attention=attention), unsure(tokens), speech, Calibration(form="label_prior")
    )
    assert set(of_ctc) == {"lexicon"}  # the prior of the tokens is one of CTC outputs


def test_beam_search_ranks_its_hypotheses_with_the_biases(fitted, tokens, lexicon, speech):
    search = BeamSearch(tokens, lexicon.words, None, BeamSettings(0.0, 0.0, 50))
    assert search.calibrated(fitted["lexicon"].at(0.0), lexicon) is search
    calibrated, forward = search.calibrated(fitted["lexicon"], lexicon), unsure(tokens)
    plain, better = (
        np.mean([text == utt.text for text, utt in zip(beam(forward(speech.dev).ctc), speech.dev, strict=True)])
        for beam in (search, calibrated)
    )
    assert better > plain + 0.03
    assert "" not in calibrated(forward(speech.dev).ctc)
    ranked = calibrated.at(BeamSettings(0.0, 0.0, 40)).nbest(forward(speech.dev[:5]).ctc, 3)
    texts = calibrated.at(BeamSettings(0.0, 0.0, 40))(forward(speech.dev[:5]).ctc)
    assert [tokens.decode(rows[0][0]) for rows in ranked] == texts
    pieces = BeamSearch(tokens, None, None)
    assert pieces.calibrated(fitted["lexicon"], lexicon) is pieces
