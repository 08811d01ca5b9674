"""Pseudo-labels: posteriors over words, and texts, without the use of references."""

import pytest
import torch
from corpora import utterances
from test_beam import model, spiking, tokens  # noqa: F401 (fixtures)

from kdlib.corpus.inputs import Batch
from kdlib.decode.beam import BeamSearch, BeamSettings
from kdlib.decode.calibration import Calibrator, Weight
from kdlib.decode.lexicon import Lexicon
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.models import Emissions
from kdlib.targets.aggregation import TeacherEnsemble, Weighting
from kdlib.targets.pseudo_labels import TeacherHypotheses
from kdlib.tokens import Tokens

WORDS = ["ONE", "TWO", "SEVEN", "LINE"]
U1, U2 = utterances("u1", "u2")


@pytest.fixture(scope="module")
def teachers(tokens, tmp_path_factory):  # noqa: F811
    """Two teachers' dense outputs on two utterances; B outputs ONE two frames later than A, and is missing for u2."""
    vocab = Tokens(tokens.model, 2, tokens.size + 1, 0, 1)  # the blank at 2, as stores have it
    folder, stores = tmp_path_factory.mktemp("stores"), {}
    generator = torch.Generator().manual_seed(2)
    for name, delay in (("A", 0), ("B", 2)):
        header = Header(
            **{"teacher": name, "train_speakers": (name,), "output": "ctc", "encoding": "dense32", "size": vocab.size},
            **{"width": vocab.size, "tokens": vocab.fingerprint, "blank": 2, "bos": 0, "eos": 1, "stride_ms": 40.0},
        )
        with Writer(folder / name, header, None) as writer:
            for utt_id, word in (("u1", "ONE"), ("u2", "SEVEN")):
                ids = [token for piece in vocab.encode(word) for token in (piece, 2)]
                frames = torch.tensor([*([2] * delay), *ids, *([2] * (2 - delay))])
                logits = 5 * torch.nn.functional.one_hot(frames, vocab.size).float()
                noise = torch.randn(logits.shape, generator=generator)
                if (name, utt_id) != ("B", "u2"):
                    writer.add(utt_id, logits + noise)
        stores[name] = LogitStore(folder / name)
    return stores, vocab


def test_the_posterior_is_the_mean_of_the_teachers_posteriors(teachers):
    stores, vocab = teachers
    hypotheses = TeacherHypotheses(TeacherEnsemble(stores, Weighting(missing="all")), Lexicon(WORDS, vocab), vocab)
    for temperature in (1.0, 4.0):
        posteriors = hypotheses.posterior(Batch([U1, U2]), temperature)
        parts = []
        for store in stores.values():
            logits = store.logits("u1")[None]
            scores = hypotheses.lexicon.scores(Emissions(logits, torch.tensor([logits.shape[1]])))
            parts.append((scores / temperature).softmax(-1))
        assert torch.allclose(posteriors[0], (sum(parts) / 2)[0].float(), atol=1e-5)
        assert posteriors.sum(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_calibrated_posteriors_are_those_of_every_teachers_own_calibration(teachers):
    stores, vocab = teachers
    ensemble, lexicon = TeacherEnsemble(stores, Weighting(missing="all")), Lexicon(WORDS, vocab)
    about = {"form": "per_word", "tokens": vocab.fingerprint, "speakers": ("A",), "utterances": 9, "words": ()}
    one = Calibrator(
        **about,
        log_prior=(0.0,) * vocab.size,
        own={"TWO": 30.0},
        weights={"tokens": Weight(0.0, 0.0, 1.0)},
        temperature=3.0,
    )
    hypotheses = TeacherHypotheses(ensemble, lexicon, vocab, calibrators={"A": one})
    parts = []
    for name, store in stores.items():
        logits = store.logits("u1")[None]
        scores = lexicon.scores(Emissions(logits, torch.tensor([logits.shape[1]]))).double()
        if name == "A":
            scores = (scores + torch.tensor(one.bias(lexicon))) / 3.0
        parts.append(scores.softmax(-1))
    found = hypotheses.posterior(Batch([U1]))[0]
    assert torch.allclose(found.double(), sum(parts) / 2, atol=1e-5)
    plain = TeacherHypotheses(ensemble, lexicon, vocab).posterior(Batch([U1]))[0]
    assert not torch.allclose(found, plain, atol=0.01)


def test_every_method_shares_one_calibration_of_all_teachers(with_teachers):
    """A method that weights some teachers with 0, or takes some alone, must not leave the others plain elsewhere."""
    found = []
    for method in ("logprob_mean", "best", "own", "weighted_loss"):
        fold = with_teachers.but(aggregation={"method": method})
        stage = type(fold).word_calibration.__wrapped__(fold)
        found.append((stage.folder, stage.settings["teachers"]))
    assert all(one == found[0] for one in found)
    assert found[0][1] == with_teachers.target_teachers()


def test_word_posteriors_survive_teachers_that_disagree_on_timing(teachers):
    """The mean by frame blurs; the posteriors over words agree."""
    stores, vocab = teachers
    hypotheses = TeacherHypotheses(TeacherEnsemble(stores, Weighting(missing="all")), Lexicon(WORDS, vocab), vocab)
    ((word, probability),) = hypotheses.texts(Batch([U1]))[0]
    assert (vocab.decode(word), probability > 0.99) == ("ONE", True)
    assert vocab.decode(hypotheses.texts(Batch([U1]), over="greedy")[0][0][0]) != "ONE"


def test_texts_are_sorted_by_probability(teachers):
    stores, vocab = teachers
    hypotheses = TeacherHypotheses(TeacherEnsemble(stores, Weighting(missing="all")), Lexicon(WORDS, vocab), vocab)
    found = hypotheses.texts(Batch([U2]), 3)[0]
    assert vocab.decode(found[0][0]) == "SEVEN"
    assert [probability for _, probability in found] == sorted((probability for _, probability in found), reverse=True)
    assert hypotheses.texts(Batch([U2]), 3)[0] == found  # cached


def test_the_greedy_text_has_its_probability_per_token(teachers):
    stores, vocab = teachers
    hypotheses = TeacherHypotheses(TeacherEnsemble({"A": stores["A"]}, Weighting()), Lexicon(WORDS, vocab), vocab)
    ((ids, probability),) = hypotheses.texts(Batch([U2]), over="greedy")[0]
    assert vocab.decode(ids) == "SEVEN"
    logits = stores["A"].logits("u2")
    loss = torch.nn.functional.ctc_loss(
        logits.log_softmax(-1)[:, None], torch.tensor([ids]), torch.tensor([len(logits)]), torch.tensor([len(ids)]), 2
    )
    assert probability == pytest.approx(float(torch.exp(-loss)), rel=1e-4)


def test_beam_search_gives_texts_beyond_the_lexicon(tokens, model):  # noqa: F811
    beam = BeamSearch(tokens, ["DELETE", "THE", "LINE", "UP", "GO"], model, BeamSettings(0.5, 0.0, 20))
    found = beam.nbest(spiking(tokens, ["GO UP", "DELETE THE LINE"], noise=1.0), 3)
    assert [tokens.decode(texts[0][0]) for texts in found] == ["GO UP", "DELETE THE LINE"]
    for texts in found:
        assert 1 <= len(texts) <= 3
        assert sum(probability for _, probability in texts) <= 1 + 1e-6
        assert texts == sorted(texts, key=lambda text: -text[1])
    assert [tokens.decode(texts[0][0]) for texts in found] == beam(
        spiking(tokens, ["GO UP", "DELETE THE LINE"], noise=1.0)
    )


def test_pooled_posteriors_are_the_mean_over_the_recordings_of_a_word(teachers):
    stores, vocab = teachers
    ensemble, lexicon = TeacherEnsemble(stores, Weighting(missing="all")), Lexicon(WORDS, vocab)
    alone = TeacherHypotheses(ensemble, lexicon, vocab).posterior(Batch([U1, U2]), 2.0)
    one, other = U1.replace(text="ONE"), U2.replace(text="ONE")
    pooled = TeacherHypotheses(ensemble, lexicon, vocab, pooled=[one, other])
    found = pooled.posterior(Batch([one, U2.replace(text="TWO"), U2.replace(text="")]), 2.0)
    assert torch.allclose(found[0], alone.mean(0), atol=1e-6)
    assert torch.allclose(found[1:], alone[1:].expand(2, -1), atol=1e-6)  # of words that are not pooled: its own
