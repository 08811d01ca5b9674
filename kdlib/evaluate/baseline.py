"""Score the pretrained model without any training: always run this baseline first.

`score_baseline` scores the held-out and the dev speaker of a fold. `score_others` scores all speakers that the
pretrained model was not trained on: once for all folds, except where each fold has a model of its own (`pretrained:
from_corpus`). These scores show how hard each speaker is; their closed lexicon is plain: a calibration is a fold's.
"""

from dataclasses import replace
from pathlib import Path

from kdlib.corpus.speakers import Splits, is_test
from kdlib.evaluate.decoder_setup import DecoderSetup
from kdlib.evaluate.fold_scores import FoldScoring, score_fold
from kdlib.evaluate.report import score_system
from kdlib.evaluate.score import About
from kdlib.evaluate.transcribe import Evaluation, recordings
from kdlib.models.nemo_files import NeMoCTC
from kdlib.settings.evaluation import Scoring


def score_baseline(folder: Path, system: NeMoCTC, words: frozenset[str], how: FoldScoring) -> None:
    """Score the pretrained model on the held-out speaker's test blocks and, in `dev/`, on the dev speaker's.

    `words` are those of its training speech.
    """
    how = replace(how, setup=replace(how.setup, tokens=system.tokens))
    about = About("pretrained", checkpoint=system.path.name)
    decoders, ms = how.setup.decoders(), system.stride_ms
    score_fold(folder, recordings(system), decoders, how, about, seen=lambda utt: utt.text in words, posteriors_ms=ms)


def score_others(
    folder: Path, system: NeMoCTC, splits: Splits, record: dict | None, setup: DecoderSetup, scoring: Scoring
) -> None:
    """Score the pretrained model on the test blocks of all speakers unseen in its training, controls separately."""
    corpus, record = splits.corpus, record or {"speakers": [], "words": None}
    setup, words = replace(setup, tokens=system.tokens), set(record["words"] or ())
    seen = None if record["words"] is None else lambda utt: utt.text in words
    new = corpus.where(lambda utt: utt.speaker not in record["speakers"] and not utt.copy_of)
    test = [utt for utt in new if not corpus.is_control(utt.speaker) and is_test(utt, splits.settings.blocks.test)]
    controls = [utt for utt in new if corpus.is_control(utt.speaker)]
    parts = [(folder, test, setup), (folder / "controls", controls, replace(setup, lexicon=corpus.lexicon))]
    for part, utterances, its_setup in parts:
        if utterances or part == folder:
            decoders = its_setup.decoders()
            evaluation = Evaluation(decoders, "zero-shot", scoring, corpus.level, seen)
            about = About("pretrained", "", system.path.name, settings=its_setup.record(decoders))
            score_system(recordings(system), utterances, part, evaluation, about)
