"""The base model that all teachers of a family start from.

A shared start keeps the teachers' CTC spikes in the same frames, without which their average is mostly blank. It is
trained on controls and so is shared by all folds; `from_corpus` it belongs to a fold; the demo's is shipped with kdlib.
"""

import random
import shutil
from pathlib import Path

from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import Splits
from kdlib.errors import UserError
from kdlib.models import nearest_divisor, read_record
from kdlib.models.encoders import ENCODERS
from kdlib.models.nemo_files import SHIPPED_MODEL
from kdlib.pretrained.model import split_controls
from kdlib.pretrained.start import Start, initial_model
from kdlib.settings.encoder import EncoderSizes
from kdlib.settings.pretrained import Pretraining
from kdlib.settings.teacher import Teacher
from kdlib.teachers.training import InitialModel, TeacherTraining, train_teacher
from kdlib.tokens import Tokens
from kdlib.training.sampling import TrainingData, set_aside

SHIPPED = SHIPPED_MODEL.with_name("parent")
MAX_DEV = 400  # utterances of a base model's dev set


def shipped_base_model(settings: Teacher, ours: Tokens) -> Path:
    """The package's own base model, if it fits the recipe."""
    record = read_record(SHIPPED)
    sizes = {name: value for name, value in record["encoder_config"].items() if name in EncoderSizes.model_fields}
    heads = {"size": ours.size, "layers": settings.decoder_layers, "ffn": settings.ffn, "dropout": settings.dropout}
    heads |= {"heads": nearest_divisor(settings.d_model, settings.heads)}
    expected = {"encoder": settings.encoder, "heads": heads, "tokens": ours.fingerprint}
    fits = all(record[name] == value for name, value in expected.items())
    if not fits or sizes != {name: getattr(settings, name) for name in sizes}:
        raise UserError(
            "teacher.parent is 'shipped', but the shipped base model has other tokens or another shape than this "
            "recipe; write in the recipe: teacher: {parent: controls}, or from_corpus where the corpus has no controls"
        )
    return SHIPPED


def fold_data(splits: Splits, settings: Teacher) -> TrainingData:
    """The speech of a base model `from_corpus`: the fold's own training speech."""
    return set_aside(splits.train, settings.dev_share, splits.settings.seed)


def control_data(corpus: Corpus, settings: Pretraining, seed: int) -> TrainingData:
    """The speech of a base model of control speakers, whose transcripts are never withheld."""
    if not any(map(corpus.is_control, corpus.speakers)):
        raise UserError(
            f"{corpus.source}: no control speakers to train the base model of the teachers on; write in the "
            "recipe: teacher: {parent: from_corpus}, or none to train each teacher from scratch; or name controls "
            "under `speakers:`"
        )
    controls = split_controls(corpus, settings, seed)
    dev = corpus.where(lambda utt: utt.speaker in controls.test_speakers and not utt.copy_of)
    train_words = {utt.text for utt in controls.train}
    dev = [utt for utt in dev if utt.text in train_words]
    random.Random(seed).shuffle(dev)
    return TrainingData(controls.train, dev[:MAX_DEV])


def train_base_model(partial: Path, start: InitialModel, data: TrainingData, how: TeacherTraining) -> None:
    """Train the base model; of a pretrained encoder only the decoder, and a new CTC head."""
    if ENCODERS[how.settings.encoder].checkpoint:
        start.model.freeze()
        start.model.ctc_head.requires_grad_(not start.head_is_trained)
    train_teacher(partial, start, data, how)


def new_teacher(settings: Teacher, tokens: Tokens, start: Start, seed: int) -> InitialModel:
    """The model that the base model, or a teacher without one, starts from."""
    model, head_is_trained = initial_model(settings, tokens, start, seed)
    return InitialModel(model, tokens, start.train_speakers, head_is_trained)


def saved_model(folder: Path) -> InitialModel:
    """A saved base model."""
    from kdlib.models import hybrid

    model, tokens, record = hybrid.load(folder)
    return InitialModel(model, tokens, record["train_speakers"])


def ship(folder: Path) -> None:
    """Copy a base model into the package, its weights in half precision."""
    from safetensors.torch import load_file, save_file

    SHIPPED.mkdir(exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    half = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
    save_file(half, SHIPPED / "model.safetensors")
    for name in ("model.json", "tokenizer.model", "run.json"):
        shutil.copyfile(folder / name, SHIPPED / name)
    print(f"{SHIPPED.name}: {sum(file.stat().st_size for file in SHIPPED.iterdir()) / 1e6:.2f} MB")
