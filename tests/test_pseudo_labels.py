"""What teachers take an utterance for: posteriors over words, and texts, without a look at any reference."""

import pytest
import torch
from test_beam import model, said, tokens  # noqa: F401 (fixtures)

from kdlib.decode.beam import BeamSearch, BeamSettings
from kdlib.decode.lexicon import Lexicon
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.models import Outputs
from kdlib.targets.aggregation import TeacherEnsemble, Weighting
from kdlib.targets.pseudo_labels import TeacherHypotheses
from kdlib.tokens import Tokens

WORDS = ["ONE", "TWO", "SEVEN", "LINE"]


@pytest.fixture(scope="module")
def teachers(tokens, tmp_path_factory):  # noqa: F811
    """Two teachers' dense outputs of two utterances; B writes ONE two frames later than A, and has not heard u2."""
    ours = Tokens(tokens.model, 2, tokens.size + 1, 0, 1)  # the blank at 2, as stores have it
    folder, found = tmp_path_factory.mktemp("stores"), {}
    generator = torch.Generator().manual_seed(2)
    for name, silence in (("A", 0), ("B", 2)):
        header = Header(
            **{"teacher": name, "train_speakers": (name,), "output": "ctc", "encoding": "dense32", "size": ours.size},
            **{"width": ours.size, "tokens": ours.fingerprint, "blank": 2, "bos": 0, "eos": 1, "stride_ms": 40.0},
        )
        with Writer(folder / name, header, None) as writer:
            for utt_id, word in (("u1", "ONE"), ("u2", "SEVEN")):
                ids = [token for one in ours.encode(word) for token in (one, 2)]
                frames = torch.tensor([*([2] * silence), *ids, *([2] * (2 - silence))])
                logits = 5 * torch.nn.functional.one_hot(frames, ours.size).float()
                noise = torch.randn(logits.shape, generator=generator)
                if (name, utt_id) != ("B", "u2"):
                    writer.add(utt_id, logits + noise)
        found[name] = LogitStore(folder / name)
    return found, ours


def test_the_posterior_is_the_mean_of_each_teachers_own(teachers):
    stores, ours = teachers
    heard = TeacherHypotheses(TeacherEnsemble(stores, Weighting(missing="all")), Lexicon(WORDS, ours), ours)
    for temperature in (1.0, 4.0):
        found = heard.posterior(["u1", "u2"], ["S", "S"], temperature)
        parts = []
        for store in stores.values():
            logits = store.logits("u1")[None]
            scores = heard.lexicon.scores(Outputs(logits, torch.tensor([logits.shape[1]]), logits))
            parts.append((scores / temperature).softmax(-1))
        assert torch.allclose(found[0], (sum(parts) / 2)[0].float(), atol=1e-5)
        assert found.sum(1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_words_survive_where_teachers_disagree_on_the_time(teachers):
    """By frame the mean of the two blurs; by words they say the same."""
    stores, ours = teachers
    heard = TeacherHypotheses(TeacherEnsemble(stores, Weighting(missing="all")), Lexicon(WORDS, ours), ours)
    ((word, share),) = heard.texts(["u1"], ["S"])[0]
    assert (ours.decode(word), share > 0.99) == ("ONE", True)
    assert ours.decode(heard.texts(["u1"], ["S"], over="greedy")[0][0][0]) != "ONE"


def test_the_best_texts_come_first_with_their_shares(teachers):
    stores, ours = teachers
    heard = TeacherHypotheses(TeacherEnsemble(stores, Weighting(missing="all")), Lexicon(WORDS, ours), ours)
    found = heard.texts(["u2"], ["S"], 3)[0]
    assert ours.decode(found[0][0]) == "SEVEN"
    assert [share for _, share in found] == sorted((share for _, share in found), reverse=True)
    assert heard.texts(["u2"], ["S"], 3)[0] == found  # remembered


def test_what_teachers_say_greedily_has_the_probability_of_a_token(teachers):
    stores, ours = teachers
    heard = TeacherHypotheses(TeacherEnsemble({"A": stores["A"]}, Weighting()), Lexicon(WORDS, ours), ours)
    ((ids, share),) = heard.texts(["u2"], ["S"], over="greedy")[0]
    assert ours.decode(ids) == "SEVEN"
    logits = stores["A"].logits("u2")
    loss = torch.nn.functional.ctc_loss(
        logits.log_softmax(-1)[:, None], torch.tensor([ids]), torch.tensor([len(logits)]), torch.tensor([len(ids)]), 2
    )
    assert share == pytest.approx(float(torch.exp(-loss)), rel=1e-4)


def test_beam_search_gives_texts_beyond_the_lexicon(tokens, model):  # noqa: F811
    beam = BeamSearch(tokens, ["DELETE", "THE", "LINE", "UP", "GO"], model, BeamSettings(0.5, 0.0, 20))
    found = beam.nbest(said(tokens, ["GO UP", "DELETE THE LINE"], noise=1.0), 3)
    assert [tokens.decode(texts[0][0]) for texts in found] == ["GO UP", "DELETE THE LINE"]
    for texts in found:
        assert 1 <= len(texts) <= 3
        assert sum(share for _, share in texts) <= 1 + 1e-6
        assert texts == sorted(texts, key=lambda one: -one[1])
    assert [tokens.decode(texts[0][0]) for texts in found] == beam(
        said(tokens, ["GO UP", "DELETE THE LINE"], noise=1.0)
    )
