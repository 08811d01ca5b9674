"""Calibrate the words of a fold's teachers, so that their posteriors over the closed lexicon are honest targets."""

from dataclasses import replace
from pathlib import Path

from kdlib.corpus.inputs import Batch
from kdlib.corpus.speakers import Splits
from kdlib.decode import calibration
from kdlib.decode.decoders import CLOSED, DecoderSet
from kdlib.evaluate.calibrate import Speech, calibrate
from kdlib.evaluate.transcribe import Forward
from kdlib.models import Outputs
from kdlib.settings.evaluation import Calibration
from kdlib.targets.aggregation import FUSED, TeacherEnsemble, Weighting

SAMPLE = 400  # training utterances that each teacher's words are calibrated on


def calibrate_words(
    partial: Path,
    training: TeacherEnsemble,
    analysis: TeacherEnsemble,
    splits: Splits,
    decoders: DecoderSet,
    settings: Calibration,
) -> None:
    """Calibrate the closed lexicon of every teacher, or of a fusion, on the fold's training and dev speech."""
    settings = settings.model_copy(update={"utterances": min(settings.utterances, SAMPLE)})
    if training.weighting.fusion is not None:
        outputs = {FUSED: (training, analysis)}
    else:
        alone = Weighting(missing="all")
        outputs = {
            name: tuple(TeacherEnsemble({name: each.stores[name]}, alone) for each in (training, analysis))
            for name in training.stores
        }
    found = {}
    for name, (on_train, on_dev) in outputs.items():
        usable = set(on_train.coverage([utt.utt_id for utt in splits.train]).usable)
        speech, forwards = Speech.of(splits, usable), [_forward(each) for each in (on_train, on_dev)]
        speech = replace(speech, dev=on_dev.covered(splits.dev))  # teachers of other code may not have all
        fitted = calibrate(decoders, forwards[0], speech, settings, forwards[1], what=f" of {name}")
        found |= {name: fitted[CLOSED]} if CLOSED in fitted else {}
    calibration.save(partial / calibration.FILE, found)


def _forward(ensemble: TeacherEnsemble) -> Forward:
    return lambda batch: Outputs(ensemble.log_probs(Batch(batch)))
