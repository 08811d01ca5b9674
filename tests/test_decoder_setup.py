"""The decoders of a fold's systems: their lexicon, language model and settings, without the held-out speaker."""

import pandas as pd
import pytest

from kdlib.decode import lm
from kdlib.decode.lm import ARPA
from kdlib.evaluate.decoder_setup import TUNING
from kdlib.io import read_json
from kdlib.models.nemo_files import NeMoCTC
from kdlib.pipeline import Fold


@pytest.fixture(scope="module")
def model(smoke):
    return NeMoCTC(smoke.pretrained_model())


def words(folder):
    return {word for word in lm.read(folder / ARPA).words if word not in (lm.END, lm.UNKNOWN)}


def test_the_language_model_has_the_training_words_only(smoke):
    splits = smoke.splits
    assert words(smoke.language_model()) == {utt.text for utt in splits.train}
    unseen = {utt.text for utt in splits.test} - splits.train_words
    assert unseen  # words of the test block that are never trained on
    assert not unseen & words(smoke.language_model(all_speakers=True))


def test_beam_settings_are_chosen_on_the_dev_speaker(smoke):
    folder = smoke.baseline()
    scores = read_json(folder / "scores.json")
    setting, grid = scores["settings"]["beam"], pd.read_csv(folder / TUNING)
    assert setting["chosen_on"] == smoke.params.fold.dev
    search = smoke.params.search
    assert len(grid) == len(search.lm_weights) * len(search.word_bonuses) * len(search.beam_sizes)
    used = grid[(grid.lm_weight == setting["lm_weight"]) & (grid.word_bonus == setting["word_bonus"])]
    assert used[used["size"] == setting["size"]].wer.item() == grid.wer.min()
    assert set(scores["decoders"]) == {"greedy", "lexicon", "lexicon_plain", "beam"}


def test_without_a_dev_speaker_the_settings_of_the_recipe_are_used(smoke):
    folder = smoke.zero_shot()
    setting = read_json(folder / "scores.json")["settings"]["beam"]
    assert (setting["chosen_on"], setting["lm_weight"]) == ("", smoke.params.search.lm_weight)
    assert not (folder / TUNING).exists()


def test_beam_search_over_pieces_needs_no_lexicon(smoke, model, outputs):
    fold = Fold.load("params/smoke.yaml", "M08", overrides={"outputs": str(outputs), "search": {"units": "pieces"}})
    setup = fold.decoder_setup(model.tokens)
    assert setup.decoders().beam.words is None
    assert setup.language_model != smoke.decoder_setup(model.tokens).language_model
    assert words(setup.language_model.parent) <= set(model.tokens.pieces)


def test_a_model_without_a_trained_ctc_head_is_not_scored_with_ctc_decoders(smoke, model):
    class Model:
        pass

    setup = smoke.decoder_setup(model.tokens)
    decoders = setup.decoders(Model(), heads=("decoder",))
    assert decoders.columns == ("attention", "attention_beam", "attention_lexicon")
    assert decoders.beam is None
    both = setup.decoders(Model(), heads=("ctc", "decoder"))
    assert both.columns == (
        "greedy", "lexicon", "beam", "attention", "attention_beam", "attention_lexicon", "joint", "joint_lexicon",
    )  # fmt: skip
    assert smoke.lexicon
