"""Check once which files of features can be used; they are reported and left out as recordings are."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from kdlib.console import progress
from kdlib.corpus.audio_checks import AudioReport
from kdlib.corpus.features import KINDS, is_file, read
from kdlib.corpus.manifest import Corpus, Excluded
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.settings.corpus import FeatureSequences

PICKLES = (".pkl", ".pickle", ".gz", ".gzip", ".train", ".dev", ".test")  # of sign-language toolkits
CONSTANT = 0.5  # share of frames equal to the one before them, above which the report names a file
CONVERT = (
    'a pickle can run any code: only if you trust its source, convert it once with python -c "import gzip, pickle, '
    "numpy; rows = pickle.load(gzip.open('FILE')); numpy.savez('FILE.npz', **{str(row['name']): "
    "numpy.asarray(row['sign']) for row in rows})\""
)
ADVICE = {
    "an object array": "save it as numbers: numpy.save(path, numpy.asarray(features, dtype='float32'))",
    "no array of this id in the file": "correct the column ID, or the names in the file",
    "several arrays in the file, none of this id": "name them by the utterances' ids",
    "no frames": "extract the features again",
    "NaN or infinite values": "extract the features again, or replace missing values",
    "it is no array [frames, features]": "save one array of two dimensions per utterance",
    "all its frames are the same": "extract the features again: the recording, or the tracking, failed",
    "fewer frames than words": "compare both: one belongs to another utterance, or the file was cut off",
    "the file cannot be read": "copy it again: it is damaged, or not of the kind that its name says",
    "the file is missing": "add the file, or correct data_folder or the manifest",
}


def check_features(corpus: Corpus, settings: FeatureSequences) -> tuple[Corpus, AudioReport]:
    """Check every file; return the corpus without the unusable ones, and the report. Durations are those of frames."""
    for utt in corpus:
        if utt.wav.suffix.lower() in PICKLES:
            raise UserError(f"{utt.utt_id}: {utt.wav} is a pickle; {CONVERT}")
        if not is_file(utt.wav):
            raise UserError(f"{utt.utt_id}: {utt.wav} is no file of features; expected one of {', '.join(KINDS)}")
    kept, problems, still = [], [], Counter()
    with progress(len(corpus), "checking features", "file") as bar, ThreadPoolExecutor(8) as pool:
        for utt, (reason, frames, constant) in zip(
            corpus, pool.map(lambda utt: _inspect(utt, settings), corpus), strict=True
        ):
            bar.update(1)
            if reason:
                problems.append(Excluded(utt.utt_id, utt.speaker, str(utt.wav), reason))
                continue
            still[utt.speaker] += constant > CONSTANT
            kept.append(utt.replace(duration_s=round(frames * settings.stride_ms / 1000, 4), offset_s=None))
    if not kept:
        raise UserError(
            f"{corpus.source}: none of its {len(corpus)} feature files can be used; the first, {problems[0].wav}: "
            f"{problems[0].reason}"
        )
    notes = [
        f"files in which more than {100 * CONSTANT:.0f} % of the frames repeat the one before: "
        f"{', '.join(f'{name} {times}' for name, times in still.most_common() if times)}"
        for _ in range(bool(+still))
    ]
    return replace(corpus, utterances=kept), AudioReport(len(corpus), problems, {}, notes, ADVICE)


def _inspect(utt: Utterance, settings: FeatureSequences) -> tuple[str, int, float]:
    """Why a file cannot be used, its frames, and the share of frames that repeat the one before."""
    if not utt.wav.is_file():
        return "the file is missing", 0, 0.0
    try:
        values = read(utt)
    except KeyError as error:
        return str(error.args[0]), 0, 0.0
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        return "an object array" if "Object arrays" in str(error) else "the file cannot be read", 0, 0.0
    if values.dtype == object or values.dtype.kind not in "fiu":
        return "an object array", 0, 0.0
    if values.ndim != 2:
        return "it is no array [frames, features]", 0, 0.0
    frames, width = values.shape
    if width != settings.width:
        return f"{width} features per frame, not {settings.width} (features.width)", frames, 0.0
    if not frames:
        return "no frames", 0, 0.0
    if not np.isfinite(values).all():
        return "NaN or infinite values", frames, 0.0
    repeated = float((values[1:] == values[:-1]).all(1).mean()) if frames > 1 else 0.0
    if frames > 1 and repeated == 1:
        return "all its frames are the same", frames, 1.0
    if frames < 2 * len(utt.text.split()) + 1:
        return "fewer frames than words", frames, repeated
    return "", frames, repeated
