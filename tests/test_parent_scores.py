"""Teachers beside the model that they were adapted from: on which speech, by how much, what the parent knows of it."""

import json

import numpy as np
import pytest
import torch
from corpora import utterances

from kdlib.evaluate.hypotheses import read_hypotheses
from kdlib.models import Emissions, Outputs
from kdlib.models.nemo_files import SHIPPED_MODEL, read_tokenizer
from kdlib.pipeline import Fold
from kdlib.settings.evaluation import BeamSearchSettings, Scoring
from kdlib.show import format
from kdlib.teachers import parent_scores
from kdlib.teachers.adapt import speaker_data
from kdlib.teachers.parent_scores import SetAside, describe_gains, read_gains, worse_than_parent
from kdlib.tokens import Tokens
from kdlib.training.sampling import set_aside

WORDS = ["COME", "GO", "YES", "NO"]


class Answers:
    """A system that answers one given text for each utterance."""

    stride_ms = 40.0

    def __init__(self, tokens, texts):
        self.tokens, self.texts = tokens, iter(texts)

    def __call__(self, samples, lengths):
        rows = [self.tokens.encode(next(self.texts)) for _ in range(len(samples))]
        logits = torch.full((len(rows), 16, self.tokens.size), -9.0)
        logits[..., self.tokens.blank] = 0.0
        for row, ids in zip(logits, rows, strict=True):
            row[torch.arange(len(ids)) * 2, ids] = 9.0
        return Outputs(Emissions(logits, torch.full((len(rows),), 16)))


@pytest.fixture(scope="module")
def tokens():
    return Tokens.for_nemo(read_tokenizer(SHIPPED_MODEL))


@pytest.fixture
def compared(tokens, monkeypatch, tmp_path):
    """Compare a teacher with its parent by the texts that each answers to these references."""
    monkeypatch.setattr("kdlib.evaluate.transcribe.Batch", lambda batch: type("B", (), {"inputs": batch, "lengths": 1}))
    monkeypatch.setattr("kdlib.corpus.audio.batches", lambda utterances, size: [list(utterances)])

    def compare(references, parent, teacher, name="ANN", trained_on="", **scoring):
        speech = utterances(*(f"{name}{place}" for place in range(len(references))), texts=references)
        systems = {"parent": Answers(tokens, parent), "teacher": Answers(tokens, teacher)}
        words = {word: [word] for word in [*WORDS, "GO HOME", "GO UP"]}
        folder = tmp_path / name
        folder.mkdir()
        aside = SetAside(name, speech, trained_on, words, BeamSearchSettings(), Scoring(bootstrap=100, **scoring))
        parent_scores.score_pair(folder, systems, aside)
        return folder

    return compare


def test_gains_are_paired_by_utterance_and_stored_unrounded(compared):
    """The teacher is right where the parent is, and in one of three where it is not."""
    folder = compared(["COME", "GO", "YES"], ["COME", "NO", "GO"], ["COME", "GO", "GO"])
    gains = read_gains({"ANN": folder})
    assert list(gains.decoder) == ["greedy", "lexicon"]
    greedy = gains.iloc[0]
    assert (greedy.teacher, greedy.measure, greedy.n) == ("ANN", "wra", 3)
    assert (greedy.parent_right, greedy.teacher_right) == pytest.approx((1 / 3, 2 / 3), abs=1e-12)
    assert greedy.gain == pytest.approx(1 / 3, abs=1e-12)
    assert (greedy.low, greedy.high) == (0, 1)  # no resample has an utterance that only the parent recognises
    rows = {name: read_hypotheses(folder / name / "hypotheses.csv") for name in parent_scores.SYSTEMS}
    assert [row.utt_id for row in rows["parent"]] == [row.utt_id for row in rows["teacher"]]


def test_no_difference_in_few_utterances_rules_little_out(compared):
    gain = read_gains({"ANN": compared(["COME", "GO"], ["COME", "NO"], ["COME", "NO"])}).iloc[0]
    assert gain.gain == 0
    assert (1 - gain.high) ** 2 == pytest.approx(0.025)  # so large a share can be missed twice with this probability
    assert gain.low == -gain.high


def test_gains_of_sentences_are_in_words(compared):
    folder = compared(["GO HOME", "GO UP", "COME"], ["GO", "GO UP", "NO"], ["GO HOME", "GO", "COME"], measure="wer")
    greedy = read_gains({"ANN": folder}).iloc[0]
    assert greedy.measure == "wer"
    assert (greedy.parent_right, greedy.teacher_right) == pytest.approx((1 - 2 / 5, 1 - 1 / 5), abs=1e-12)


def test_a_teacher_that_lost_is_warned_about_and_named_in_the_first_sentence(compared):
    won = compared(["COME", "GO"], ["NO", "GO"], ["COME", "GO"])
    with pytest.warns(UserWarning, match=r"teacher NO is worse than its parent .*\(greedy: 0\.0 %, the parent 50\.0 %"):
        lost = compared(["COME", "GO"], ["COME", "YES"], ["YES", "YES"], name="NO")  # YAML's and pandas' trap
    gains = read_gains({"ANN": won, "NO": lost})
    assert describe_gains(gains).startswith(
        "greedy: 1 of 2 teachers gained over their parent (+50.0 points on average), 1 lost (-50.0 points on average: "
        "NO); closed lexicon: 1 of 2 "
    )
    assert worse_than_parent(gains).startswith(
        "1 of 2 teachers end below their parent, from which they began: NO. Try "
    )
    assert worse_than_parent(read_gains({"ANN": won})) == worse_than_parent(read_gains({})) == ""
    table = format.parent_gains(gains)
    assert table.index.tolist() == ["ANN", "NO", "mean"]
    assert table.loc["NO", ["greedy parent", "greedy teacher", "greedy gain"]].tolist() == [50.0, 0.0, "-50.0"]
    assert table.loc["mean", ["utterances", "greedy gain", "greedy 95 %"]].tolist() == [2, "+0.0", "-"]


def test_a_parent_that_knows_the_speech_or_the_speakers_is_said_to(compared):
    same = ["COME", "GO"]
    of_speech = describe_gains(read_gains({"ANN": compared(same, same, same, trained_on="speech")}))
    assert "The parent was pretrained on this speech too (pretrained: from_corpus), which flatters it" in of_speech
    of_speakers = describe_gains(read_gains({"BEN": compared(same, same, same, name="BEN", trained_on="speaker")}))
    assert "trained on other recordings of these speakers (teacher.parent: from_corpus)" in of_speakers
    nothing = describe_gains(read_gains({"CAT": compared(same, same, same, name="CAT")}))
    assert "The parent was" not in nothing


def test_without_speech_set_aside_there_is_nothing_to_compare(compared):
    folder = compared([], [], [])
    gains = read_gains({"ANN": folder})
    assert gains.empty
    assert describe_gains(gains) == parent_scores.NOTHING
    assert not (folder / "parent").exists()


def test_both_are_scored_on_the_utterances_that_the_teacher_set_aside(with_teachers):
    folder = with_teachers.with_parents(["M04"])["M04"]
    assert folder == with_teachers.layout.teacher("M04") / "parent"
    splits, settings = with_teachers.splits, with_teachers.params.teacher
    dev = {utt.utt_id for utt in speaker_data(splits, settings, "M04").dev}
    record = json.loads((with_teachers.teacher("M04") / "model.json").read_text())
    assert len(dev) == record["dev_utterances"] > 0
    for name in parent_scores.SYSTEMS:
        assert {row.utt_id for row in read_hypotheses(folder / name / "hypotheses.csv")} == dev
    gains = read_gains({"M04": folder})
    assert set(gains.parent_trained_on) == {""}  # a base model of controls
    assert np.isclose(gains.gain, gains.teacher_right - gains.parent_right).all()


def parent_training(outputs, speaker, **settings):
    fold = Fold.load("params/smoke.yaml", "M08", overrides={"outputs": str(outputs)} | settings)
    return fold, fold._set_aside(speaker).parent_trained_on


def test_a_base_model_from_the_corpus_knows_the_speaker_but_not_this_speech(outputs):
    fold, what = parent_training(outputs, "M04", teacher={"parent": "from_corpus"})
    assert what == "speaker"
    dev = {utt.utt_id for utt in fold._set_aside("M04").utterances}
    base = set_aside(fold.splits.train, fold.params.teacher.dev_share, fold.params.seed)
    assert dev
    assert not dev & {utt.utt_id for utt in base.train}


def test_a_model_pretrained_on_the_folds_speakers_was_trained_on_this_speech(outputs):
    settings = {"name": "flattered", "pretrained": "from_corpus", "teacher": {"encoder": "nemo", "parent": "none"}}
    fold, what = parent_training(outputs, "M04", **settings)
    assert what == "speech"
    assert fold.parent() == fold.pretrained_model()
    gains = read_gains(fold.with_parents(["M04"]))  # the pretrained model itself is the parent
    assert set(gains.parent_trained_on) == {"speech"}
    assert (fold.layout.parent_scores("M04") / "parent/scores.json").is_file()


def test_teachers_from_scratch_and_students_that_teach_have_no_parent(outputs):
    for teacher in ({"parent": "none"}, {"source": "students"}):
        fold = Fold.load("params/smoke.yaml", "M08", overrides={"outputs": str(outputs), "teacher": teacher})
        assert fold.parent() is None
        assert fold.with_parents(["M04"]) == {}
    assert describe_gains(read_gains({})) == parent_scores.NOTHING
