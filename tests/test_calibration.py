"""Calibration of closed-lexicon scores on simulated speech, whose posteriors are known.

A simulated score is the log-likelihood ratio of two Gaussians, so that the plain scores have the right posteriors; a
penalty per token and a factor are then what calibration has to find and to undo.
"""

import dataclasses
import itertools
import json
import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdlib.corpus.embedded.synthetic import word_list
from kdlib.decode import calibration, calibration_fit
from kdlib.decode.calibration import CalibratedLexicon, choose_strength, places_of, posterior
from kdlib.decode.calibration_fit import Collector, Sample, fit
from kdlib.decode.lexicon import Lexicon
from kdlib.errors import UserError
from kdlib.evaluate.reliability import expected_calibration_error
from kdlib.models import Emissions
from kdlib.settings.evaluation import Calibration
from kdlib.tokens import Tokens, train_tokenizer

FORMS = ("per_word", "features", "label_prior")
RECIPE = {"prior": "sample", "new_words": None, "word_sd": 1e3, "feature_sd": 1e3}  # of the issue: nothing is shrunk
PENALTY = 1.5  # nats per token


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t")
    return Tokens.for_nemo(train_tokenizer(word_list().values(), 64, folder, lower=True).read_bytes())


@pytest.fixture(scope="module")
def lexicon(tokens):
    return Lexicon(sorted(set(word_list().values()))[::8], tokens)


def lengths(lexicon):
    return np.array([len(ids) for ids in lexicon.sequences])


def simulate(lexicon, count, *, penalty=PENALTY, factor=1.0, words=None, seed=0, evidence=8.0):
    """Scored utterances of words drawn evenly from `words`, as a sample."""
    rng = np.random.default_rng(seed)
    names = words or lexicon.words
    references = [names[place] for place in rng.integers(0, len(names), count)]
    scores = math.sqrt(evidence) * rng.standard_normal((count, len(lexicon.words)))
    scores[np.arange(count), places_of(references, lexicon)] += evidence
    scores -= penalty * lengths(lexicon)
    speakers = [f"S{index % 3}" for index in range(count)]
    return Sample(factor * scores, references, speakers, np.full(65, 1 / 65))


def accuracy(scores, sample, lexicon):
    return float((scores.argmax(1) == places_of(sample.references, lexicon)).mean())


def random_outputs(tokens, utterances=5, frames=25, seed=0):
    logits = 2 * torch.randn(utterances, frames, tokens.size, generator=torch.Generator().manual_seed(seed))
    return Emissions(logits, torch.tensor([frames, *[frames - 4] * (utterances - 1)]))


@pytest.mark.parametrize("form", FORMS)
def test_strength_0_leaves_every_bit(form, lexicon, tokens):
    sample, outputs = simulate(lexicon, 200), random_outputs(tokens)
    posteriors = np.random.default_rng(1).dirichlet(np.ones(tokens.size))
    sample = dataclasses.replace(sample, token_posterior=posteriors)
    found = fit(sample, lexicon, tokens, Calibration(form=form))
    off = found.at(0.0)
    assert np.array_equal(off.scores(sample.scores, lexicon), sample.scores)
    plain = lexicon.scores(outputs)
    assert torch.equal(CalibratedLexicon(lexicon, off).scores(outputs), plain)
    assert not torch.allclose(CalibratedLexicon(lexicon, found).scores(outputs), plain, atol=0.01)


@pytest.mark.parametrize("scale", [None, 1.0])
def test_the_mean_posterior_equals_the_prior(scale, lexicon, tokens):
    sample = simulate(lexicon, 300, words=lexicon.words[:40], factor=3.0)
    found = fit(sample, lexicon, tokens, Calibration(**RECIPE), scale=scale)
    mean = posterior(found.scores(sample.scores, lexicon), found.temperature).mean(0)
    counts = np.array([sample.references.count(word) for word in lexicon.words])
    prior = (counts + 0.5) / (counts + 0.5).sum()
    assert np.abs(mean - prior).max() < 1e-3
    assert np.abs(posterior(sample.scores, found.temperature).mean(0) - prior).max() > 0.05


def test_the_biases_are_those_of_the_recipe_by_a_loop(tokens):
    """b += .5 (log f - log q), q the mean posterior, one utterance and one word at a time."""
    lexicon = Lexicon(["I", "A", "THE", "TIME", "SENTENCE", "WINDOW", "GO", "NOVEMBER"], tokens)
    sample = simulate(lexicon, 60, evidence=4.0)
    count = len(lexicon.words)
    prior = [sample.references.count(word) + 0.5 for word in lexicon.words]
    prior = [part / sum(prior) for part in prior]
    bias = [0.0] * count
    for _ in range(200):
        mean = [0.0] * count
        for row in sample.scores.tolist():
            powers = [math.exp(score + more) for score, more in zip(row, bias, strict=True)]
            for place in range(count):
                mean[place] += powers[place] / sum(powers) / len(sample.scores)
        bias = [b + 0.5 * (math.log(f) - math.log(max(q, 1e-6))) for b, f, q in zip(bias, prior, mean, strict=True)]
    expected = np.array(bias) - np.dot(prior, bias)
    found = fit(sample, lexicon, tokens, Calibration(**RECIPE), scale=1.0).bias(lexicon)
    assert found == pytest.approx(expected, abs=5e-3)


def test_a_constant_added_to_an_utterances_scores_changes_nothing(lexicon, tokens):
    sample = simulate(lexicon, 200)
    shifted = dataclasses.replace(sample, scores=sample.scores + 50 * np.random.default_rng(3).random((200, 1)))
    one, other = (fit(each, lexicon, tokens, Calibration()) for each in (sample, shifted))
    assert one.bias(lexicon) == pytest.approx(other.bias(lexicon), abs=1e-4)
    assert one.scale == pytest.approx(other.scale, rel=1e-4)


@pytest.mark.parametrize("form", ["per_word", "features"])
def test_a_penalty_on_long_words_is_undone(form, lexicon, tokens):
    """For words that the sample has not, too: by what the others say of their features."""
    trained = lexicon.words[::2]
    found = fit(simulate(lexicon, 1200, words=trained), lexicon, tokens, Calibration(form=form))
    right = fit(simulate(lexicon, 1200, words=trained, penalty=0.0), lexicon, tokens, Calibration(form=form))
    for words in (trained, lexicon.words[1::2]):
        test, fair = (simulate(lexicon, 600, words=words, penalty=penalty, seed=9) for penalty in (PENALTY, 0.0))
        before, after = test.scores, found.scores(test.scores, lexicon)
        possible = accuracy(right.scores(fair.scores, lexicon), fair, lexicon)
        assert accuracy(after, test, lexicon) > accuracy(before, test, lexicon) + 0.1
        assert accuracy(after, test, lexicon) > possible - 0.03


def test_words_of_another_lexicon_are_calibrated_by_their_features(lexicon, tokens):
    others = Lexicon(sorted(set(word_list().values()))[3::8], tokens)
    assert not set(others.words) & set(lexicon.words)
    found = fit(simulate(lexicon, 1200), lexicon, tokens, Calibration())
    assert np.corrcoef(found.bias(others), lengths(others))[0, 1] > 0.95
    test = simulate(others, 600, seed=9)
    gained = accuracy(found.scores(test.scores, others), test, others) - accuracy(test.scores, test, others)
    assert gained > 0.1
    subset = Lexicon(lexicon.words[5:25], tokens)  # words that it knows keep their biases, up to the constant
    assert np.ptp(found.bias(subset) - found.bias(lexicon)[5:25]) < 1e-9


def test_a_word_of_few_utterances_has_the_bias_of_its_features(lexicon, tokens):
    """The rarer the word, and the narrower the prior of its own bias, the less it deviates from its features."""
    odd = lexicon.words[10]
    rest = [word for word in lexicon.words if word != odd]

    def own(count, word_sd):
        parts = simulate(lexicon, 1000, words=rest), simulate(lexicon, count, words=[odd], seed=5)
        scores = np.concatenate([part.scores for part in parts])
        scores[:, 10] -= 3.0  # a word that this system dislikes
        sample = dataclasses.replace(
            parts[0],
            scores=scores,
            references=[*parts[0].references, *parts[1].references],
            speakers=["S"] * len(scores),
        )
        return fit(sample, lexicon, tokens, Calibration(word_sd=word_sd)).own[odd]

    few, many = own(2, 1.0), own(60, 1.0)
    assert 0 < few < many
    assert own(2, 0.1) < 0.1 * many
    assert many == pytest.approx(3.0, abs=1.0)


def test_the_scale_is_found_and_decides_nothing_by_itself(lexicon, tokens):
    test = simulate(lexicon, 500, seed=9)
    plain, louder = (fit(simulate(lexicon, 1200, factor=factor), lexicon, tokens, Calibration()) for factor in (1, 5))
    assert plain.scale == pytest.approx(1, abs=0.1)
    assert louder.scale == pytest.approx(5 * plain.scale, rel=0.03)
    one, other = plain.scores(test.scores, lexicon), louder.scores(5 * test.scores, lexicon)
    assert (one.argmax(1) == other.argmax(1)).mean() > 0.99


def test_calibrated_posteriors_are_reliable(lexicon, tokens):
    found = fit(simulate(lexicon, 1200, factor=4.0), lexicon, tokens, Calibration(prior="uniform"))
    test = simulate(lexicon, 3000, factor=4.0, seed=9)
    right = places_of(test.references, lexicon)

    def error(scores, temperature):
        posteriors = posterior(scores, temperature)
        return expected_calibration_error(posteriors.max(1), posteriors.argmax(1) == right)

    assert error(found.scores(test.scores, lexicon), found.temperature) < 0.03
    assert error(test.scores, 1.0) > 0.2


def test_biases_are_centred_by_the_prior(lexicon, tokens):
    sample = simulate(lexicon, 400, words=lexicon.words[:30])
    for settings in (Calibration(), Calibration(prior="uniform"), Calibration(form="features", new_words=None)):
        found = fit(sample, lexicon, tokens, settings)
        prior = calibration.word_prior(lexicon.words, found.counts, found.new_words)
        assert prior.sum() == pytest.approx(1)
        assert float(prior @ found.bias(lexicon)) == pytest.approx(0, abs=1e-9)


def test_the_prior_replaces_that_of_the_sample(lexicon, tokens):
    """Twice as frequent in the texts: log 2 more, times the scale."""
    sample = simulate(lexicon, 300)
    texts = [*lexicon.words, *lexicon.words[:1]]
    uniform, given = (
        fit(sample, lexicon, tokens, Calibration(prior=prior), texts=texts) for prior in ("uniform", "texts")
    )
    difference = given.bias(lexicon) - uniform.bias(lexicon)
    expected = given.scale * math.log(2.5 / 1.5)  # half a count each
    assert difference[0] - difference[1:] == pytest.approx(expected)


def test_new_words_share_the_part_that_is_expected_of_them():
    words, counts = ["A", "B", "C", "D"], {"A": 50, "B": 30}
    assert calibration.word_prior(words, counts, 0.1)[2:].tolist() == pytest.approx([0.05, 0.05])
    assert calibration.word_prior(words, counts, None)[2:].tolist() == pytest.approx([0.5 / 82] * 2)
    assert calibration.word_prior(words, counts, 0.9)[2:].tolist() == pytest.approx([0.25, 0.25])  # uniform at most
    once = {"A": 7, "B": 1, "X": 1, "Y": 1}  # 3 of 10 running words were seen once
    assert calibration.word_prior(words, once, 0.1)[2:].tolist() == pytest.approx([0.15, 0.15])
    assert calibration.word_prior(words, {}, 0.1).tolist() == [0.25] * 4
    assert calibration.word_prior(["A", "B"], counts, 0.1).sum() == pytest.approx(1)


def test_impossible_words_stay_impossible_and_disturb_nothing(lexicon, tokens):
    sample = simulate(lexicon, 400)
    places, rows = places_of(sample.references, lexicon), np.arange(400)
    scores = sample.scores.copy()
    scores[np.random.default_rng(2).random(scores.shape) < 0.1] = -np.inf
    scores[rows, places] = sample.scores[rows, places]
    scores[:, 7] = -np.inf  # fits into no utterance, its own included
    scores[3] = -np.inf  # an utterance that no word fits into
    found = fit(dataclasses.replace(sample, scores=scores), lexicon, tokens, Calibration())
    assert found.utterances == 400 - 1 - int((np.delete(places, 3) == 7).sum())
    assert np.isfinite(found.bias(lexicon)).all()
    calibrated = found.scores(scores, lexicon)
    assert np.array_equal(calibrated == -np.inf, scores == -np.inf)
    posteriors = posterior(calibrated, found.temperature)
    assert posteriors.sum(1) == pytest.approx(np.where(rows == 3, 0.0, 1.0))
    assert abs(found.own[lexicon.words[7]]) < 3  # no evidence: near its features
    assert choose_strength({1.0: calibrated}, places).temperature == pytest.approx(found.temperature, rel=0.5)
    low = np.where(scores == -np.inf, calibration_fit.LEAST, scores)
    kept = np.flatnonzero((rows != 3) & (places != 7))
    again = dataclasses.replace(
        sample, scores=low[kept], references=[sample.references[row] for row in kept], speakers=["S"] * len(kept)
    )
    assert fit(again, lexicon, tokens, Calibration()).bias(lexicon) == pytest.approx(found.bias(lexicon), abs=1e-3)


def test_the_slope_is_that_of_the_loss(lexicon):
    """Against finite differences, for every parameter, over several blocks."""
    sample = simulate(lexicon, 90)
    rng = np.random.default_rng(0)
    features, frequencies = rng.standard_normal((len(lexicon.words), 3)), rng.dirichlet(np.ones(len(lexicon.words)))
    rows, places = np.arange(0, 90, 2), places_of(sample.references, lexicon)[::2]
    problem = calibration_fit._Problem(sample.scores, rows, places, features, frequencies, Calibration(), None)
    point = rng.standard_normal(len(problem.unit))
    _, slope = problem._loss(point)
    for place in range(len(point)):
        step = np.eye(len(point))[place] * 1e-5
        difference = (problem._loss(point + step)[0] - problem._loss(point - step)[0]) / 2e-5
        assert slope[place] == pytest.approx(difference, rel=1e-5, abs=1e-5)


def test_blocks_change_no_result(lexicon, tokens, monkeypatch):
    sample = simulate(lexicon, 150)
    expected = fit(sample, lexicon, tokens, Calibration()).bias(lexicon)
    monkeypatch.setattr(calibration_fit, "BLOCK", 7 * len(lexicon.words))
    assert fit(sample, lexicon, tokens, Calibration()).bias(lexicon) == pytest.approx(expected, abs=1e-6)


def test_five_thousand_words_need_little_memory(tokens):
    """Beyond the 48 MB of scores: a copy of them would double that."""
    words = sorted(set(word_list().values()))
    large = Lexicon([f"{a} {b}" for a, b in itertools.islice(itertools.product(words, words), 5000)], tokens)
    sample = simulate(large, 1200, words=large.words[::5])
    before = accuracy(sample.scores, sample, large)
    tracemalloc.start()
    try:
        found = fit(sample, large, tokens, Calibration())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40e6
    test = simulate(large, 300, words=large.words[1::5], seed=9)
    bias = found.bias(large)
    assert accuracy(sample.scores + bias, sample, large) > before + 0.1
    assert accuracy(test.scores + bias, test, large) > accuracy(test.scores, test, large)


def test_the_label_prior_is_subtracted_from_the_frames(lexicon, tokens):
    posteriors = np.random.default_rng(1).dirichlet(np.ones(tokens.size))
    posteriors[5] = 0.0  # a token that the system never says: no infinite bonus
    sample = dataclasses.replace(simulate(lexicon, 50), token_posterior=posteriors)
    found = fit(sample, lexicon, tokens, Calibration(form="label_prior")).at(0.7)
    outputs = random_outputs(tokens)
    log_prior = torch.from_numpy(np.log(np.maximum(posteriors, 1e-6)))
    frames = outputs.logits.double().log_softmax(-1) - 0.7 * log_prior
    expected = lexicon.scores(Emissions(frames, outputs.lengths))
    assert torch.allclose(CalibratedLexicon(lexicon, found).scores(outputs), expected, atol=1e-3)
    assert found.bias(lexicon).tolist() == [0.0] * len(lexicon.words)


def test_a_calibrated_lexicon_decodes_with_its_biases_and_temperature(lexicon, tokens):
    found = fit(simulate(lexicon, 300, factor=2.0), lexicon, tokens, Calibration()).at(0.5, 3.0)
    outputs, calibrated = random_outputs(tokens), CalibratedLexicon(lexicon, found)
    expected = lexicon.scores(outputs).numpy() + 0.5 * found.bias(lexicon)
    assert np.array_equal(calibrated.scores(outputs).numpy(), expected)
    assert np.array_equal(found.scores(lexicon.scores(outputs).numpy(), lexicon), expected)
    posteriors = calibrated.posterior(outputs).numpy()
    assert posteriors == pytest.approx(posterior(expected, 3.0))
    for row, ranked in zip(posteriors, calibrated.nbest(outputs, 3), strict=True):
        assert [word.posterior for word in ranked] == pytest.approx(sorted(row.tolist(), reverse=True)[:3])
    assert calibrated.best(outputs) == [lexicon.words[place] for place in expected.argmax(1)]
    part = calibrated.among([2, 5, 11])
    assert np.array_equal(part.scores(outputs).numpy(), expected[:, [2, 5, 11]])


def test_a_word_of_several_spellings_has_the_mean_of_their_features(tokens):
    prior = np.log(np.random.default_rng(0).dirichlet(np.ones(tokens.size)))
    both, long, short = (
        calibration.word_features(Lexicon(words, tokens), prior)
        for words in ({"FOUR": ["FOUR", "SEVENTEEN"]}, {"FOUR": ["SEVENTEEN"]}, {"FOUR": ["FOUR"]})
    )
    for name in calibration.FEATURES:
        assert both[name][0] == pytest.approx((long[name][0] + short[name][0]) / 2)
    assert short["letters"][0] == 4
    assert short["log_prior"][0] == pytest.approx(sum(prior[token] for token in tokens.encode("FOUR")))


def test_a_calibrator_is_the_same_after_it_was_saved(lexicon, tokens, tmp_path):
    sample = simulate(lexicon, 200)
    for form in FORMS:
        found = fit(sample, lexicon, tokens, Calibration(form=form), texts=sample.references).at(0.75, 2.5)
        calibration.save(tmp_path / "calibration.json", {"lexicon": found})
        again = calibration.load(tmp_path / "calibration.json")["lexicon"]
        assert again == found
        assert np.array_equal(again.scores(sample.scores, lexicon), found.scores(sample.scores, lexicon))


@pytest.mark.parametrize("damage", [{"schema": 99}, {"weights": None}, {"speakers": 3}, {"unknown": 1}, None])
def test_a_file_that_is_no_calibration_is_refused(damage, lexicon, tokens, tmp_path):
    path = tmp_path / "calibration.json"
    calibration.save(path, {"lexicon": fit(simulate(lexicon, 50), lexicon, tokens, Calibration())})
    content = json.loads(path.read_text())
    if damage and "schema" not in damage:
        damage = {"calibrators": {"lexicon": content["calibrators"]["lexicon"] | damage}}
    path.write_text("{" if damage is None else json.dumps(content | damage))
    with pytest.raises(UserError, match=r"calibration\.json is no calibration of this version .* fit it again"):
        calibration.load(path)


def test_a_fold_whose_speakers_were_heard_is_refused(lexicon, tokens):
    found = fit(simulate(lexicon, 100), lexicon, tokens, Calibration())
    assert found.speakers == ("S0", "S1", "S2")
    found.check(tokens, {"M08": "is held out", "M10": "is the dev speaker"})
    for speaker, why in (("S1", "is held out"), ("S2", "is the dev speaker")):
        with pytest.raises(UserError, match=f"fitted on speech of {speaker}, who {why} in this fold"):
            found.check(tokens, {"M08": "is held out", speaker: why})


def test_other_tokens_are_refused(lexicon, tokens):
    found = fit(simulate(lexicon, 100), lexicon, tokens, Calibration())
    other = dataclasses.replace(tokens, size=tokens.size + 1)
    with pytest.raises(UserError, match=f"tokens {tokens.fingerprint}, but this system has {other.fingerprint}"):
        found.check(other, {})


def test_a_lexicon_without_the_samples_words_is_refused(lexicon, tokens):
    sample = simulate(lexicon, 20)
    foreign = Lexicon([f"{word} {word}" for word in lexicon.words], tokens)
    with pytest.raises(UserError, match="none of the 20 training utterances has a word of the lexicon"):
        fit(sample, foreign, tokens, Calibration())
    with pytest.raises(UserError, match="expected training utterances, found none"):
        Collector(tokens).sample()


def test_a_sample_is_collected_over_batches_without_padding(lexicon, tokens):
    outputs, texts = random_outputs(tokens, utterances=4), ["one", "Two", "six", "TIME"]
    collector = Collector(tokens)
    for rows, speakers in ((slice(0, 1), ["A"]), (slice(1, None), ["B", "B", "C"])):
        emissions = Emissions(outputs.logits[rows], outputs.lengths[rows])
        collector.add(lexicon.scores(emissions), texts[rows], speakers, emissions)
    sample = collector.sample()
    frames = [row[:length] for row, length in zip(outputs.logits, outputs.lengths, strict=True)]
    expected = torch.cat(frames).double().softmax(-1).mean(0).numpy()
    assert sample.token_posterior == pytest.approx(expected)
    assert sample.scores == pytest.approx(lexicon.scores(outputs).numpy(), abs=1e-4)
    assert sample.references == ["ONE", "TWO", "SIX", "TIME"]
    assert sample.speakers == ["A", "B", "B", "C"]


def test_the_strength_of_most_right_words_is_chosen_and_reported():
    right = np.array([0, 1, 2, 0])
    good = np.eye(3)[right] * 5.0
    bad = good.copy()
    bad[0] = [0.0, 5.0, 0.0]
    chosen = choose_strength({0.0: bad, 1.0: good}, right)
    assert chosen.strength == 1.0
    assert "of 4 dev words 100.0 % are right, 75.0 % uncalibrated; strengths tried: 0, 1" in chosen.why
    assert choose_strength({0.0: good, 1.0: bad}, right).strength == 0.0


def test_ties_are_broken_by_likelihood_and_then_by_nearness_to_1():
    rng = np.random.default_rng(0)
    right = rng.integers(0, 5, 300)
    sure = rng.standard_normal((300, 5)) + 3 * np.eye(5)[right]
    order = np.argsort(sure, 1).argsort(1).astype(float)  # the same words right, less information
    assert choose_strength({0.5: order, 1.5: sure, 1.0: order}, right).strength == 1.5
    assert choose_strength({0.0: sure, 0.75: sure, 1.5: sure}, right).strength == 0.75


@pytest.mark.parametrize("factor", [0.3, 1.0, 6.0])
def test_the_temperature_is_the_factor_of_the_scores(factor, lexicon):
    sample = simulate(lexicon, 4000, penalty=0.0, factor=factor)
    chosen = choose_strength({1.0: sample.scores}, places_of(sample.references, lexicon))
    assert chosen.temperature == pytest.approx(factor, rel=0.06)


def test_a_dev_speaker_without_a_possible_word_has_temperature_1():
    scores = np.array([[-np.inf, 1.0], [-np.inf, 2.0]])
    assert choose_strength({0.0: scores}, [0, 0]).temperature == 1.0


def test_tokens_on_frames_in_half_precision_keep_their_type(lexicon, tokens):
    posteriors = np.random.default_rng(1).dirichlet(np.ones(tokens.size))
    sample = dataclasses.replace(simulate(lexicon, 50), token_posterior=posteriors)
    found = fit(sample, lexicon, tokens, Calibration(form="label_prior"))
    outputs = SimpleNamespace(logits=random_outputs(tokens).logits.half(), lengths=torch.tensor([25]))
    assert found.emissions(outputs).logits.dtype == torch.float16
