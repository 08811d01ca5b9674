"""Recognisers from packages: pronunciations, the exact scores of words, and the table by level."""

from types import SimpleNamespace

import numpy as np
import pytest

from kdlib.corpus.inputs import Batch
from kdlib.pipeline import Fold
from kdlib.teachers import recognisers

pytest.importorskip("hama")
pytest.importorskip("pocketsphinx")


@pytest.fixture(scope="module")
def fold(outputs, with_teachers):
    return Fold.load("params/smoke.yaml", "M08", "hard", overrides={"outputs": str(outputs)})


def test_pronunciations_are_those_of_the_dictionary():
    found = recognisers.pronunciations(["TWO", "A", "GO UP", "ABLE-BODIED", "MULTIFLORA"])
    assert found["TWO"] == [["T", "UW"]]
    assert sorted(found["A"]) == [["AH"], ["EY"]]
    assert found["GO UP"] == [["G", "OW", "AH", "P"]]
    assert found["ABLE-BODIED"][0][-4:] == ["AA", "D", "IY", "D"]
    assert "MULTIFLORA" not in found


def test_every_symbol_is_one_of_the_model():
    import hama

    known = set(hama.ASRModel().decoder_tokens)
    assert {symbol for symbols in recognisers.SYMBOLS.values() for symbol in symbols.split()} <= known


def test_controls_are_recognised_and_scores_are_logs_of_probabilities(fold):
    corpus = fold.all_labels.corpus
    spoken = recognisers.pronunciations(list(fold.lexicon))
    systems = recognisers.Grammar(spoken), recognisers.Phonemes(spoken)
    speech = [utt for utt in corpus if corpus.is_control(utt.speaker) and utt.text in spoken][:12]
    assert len(speech) == 12
    for system in systems:
        right = np.mean([system.best(utt) == utt.text for utt in speech])
        assert right > 3 / len(spoken), system.name  # several times chance
    scores = systems[1].scores(speech[0])
    assert scores.shape == (len(spoken),)
    assert np.logaddexp.reduce(scores) < 1e-6


def test_the_table_has_every_level_or_says_why_not(fold, capsys, monkeypatch):
    corpus, words = fold.all_labels.corpus, list(fold.lexicon)
    monkeypatch.setattr(recognisers, "LEAST", 3)
    found = recognisers.by_level(corpus, recognisers.pronunciations(words), count=3)
    assert list(found.index) == ["CONTROL", "HIGH", "VERY_LOW"]  # of the least intelligible last
    assert list(found.columns) == ["utterances", "pocketsphinx", "hama"]
    assert found.utterances.max() == 3
    assert recognisers.table(corpus, words, "features") is None
    assert "0 entries of the lexicon" in capsys.readouterr().out
    unknown = SimpleNamespace(speakers=["A"], is_control=lambda _: False, level=lambda _: "")
    assert recognisers.table(unknown, words) is None
    assert "no speaker's level of intelligibility is known" in capsys.readouterr().out
    monkeypatch.setattr(recognisers, "PACKAGES", ("hama", "nothing_of_this_name"))
    assert recognisers.table(corpus, words) is None
    assert "nothing_of_this_name is not installed" in capsys.readouterr().out


def test_hama_gives_posteriors_over_the_words_of_the_lexicon(fold):
    words = sorted([*fold.lexicon, "MULTIFLORA"])  # not in the dictionary
    labelled = [utt for utt in fold.student_data().train if utt.text]
    teacher = recognisers.PhonemeTeacher(words, labelled)
    corpus = fold.all_labels.corpus
    speech = [utt for utt in corpus if corpus.is_control(utt.speaker) and utt.text in words][:12]
    rows = teacher.posterior(Batch(speech))
    assert rows.shape == (12, len(words))
    assert rows.sum(1).tolist() == pytest.approx([1.0] * 12, abs=1e-5)
    assert not rows[:, words.index("MULTIFLORA")].any()
    of_reference = rows[range(12), [words.index(utt.text) for utt in speech]]
    assert of_reference.mean() > 2 / len(words)
    assert 0.05 < teacher.temperature < 200
