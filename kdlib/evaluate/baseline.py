"""Score the pretrained model without any training: always run this baseline first.

`score_fold` scores the held-out and the dev speaker of a fold. `score_others` scores all speakers that the pretrained
model was not trained on: once for all folds, except where each fold has a model of its own (`pretrained: from_corpus`).
These scores show how hard each speaker is.
"""

from dataclasses import replace
from pathlib import Path

from kdlib.corpus.manifest import Utterance
from kdlib.corpus.speakers import Splits, is_test
from kdlib.evaluate.decoder_setup import DecoderSetup
from kdlib.evaluate.report import score_system
from kdlib.evaluate.score import About
from kdlib.evaluate.transcribe import Evaluation, recordings
from kdlib.models.nemo_files import NeMoCTC
from kdlib.settings.evaluation import Scoring


def score_fold(
    folder: Path, system: NeMoCTC, splits: Splits, words: frozenset[str], setup: DecoderSetup, scoring: Scoring
) -> None:
    """Score the pretrained model on the held-out speaker's test blocks and, in `dev/`, on the dev speaker's.

    `words` are those of its training speech.
    """
    setup, dev = replace(setup, tokens=system.tokens), splits.settings.fold.dev or ""

    def seen(utt: Utterance) -> bool:
        return utt.text in words

    decoders = setup.tuned(setup.decoders(), recordings(system), splits.dev, folder, scoring.batch_size)
    settings = setup.record(decoders, dev if splits.dev else "")
    for part, utterances in (("", splits.test), ("dev", splits.dev)):
        if utterances:
            score_system(
                recordings(system),
                utterances,
                folder / part,
                Evaluation(decoders, f"baseline, {part or 'held-out'} speech", scoring, splits.corpus.level, seen),
                About("pretrained", "" if part else splits.settings.held_out, system.path.name, settings=settings),
                0.0 if part else system.stride_ms,
            )


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
