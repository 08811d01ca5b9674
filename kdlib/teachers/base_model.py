"""The base model that all teachers of a family start from.

A shared start keeps the teachers' CTC spikes in the same frames, without which their average is mostly blank. It is
trained on controls and so is shared by all folds; `from_corpus` it belongs to a fold; the demo's is shipped with kdlib.
"""

import argparse
import random
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus import prepare
from kdlib.corpus.speakers import split
from kdlib.errors import UserError
from kdlib.models.nemo_files import SHIPPED_MODEL, restore_model
from kdlib.params import Params, load
from kdlib.pretrained.model import pretrained_model, split_controls, training_record
from kdlib.pretrained.pieces import copy_head, load_tokens, tokens_folder
from kdlib.runtime import seed_everything
from kdlib.stage import produce
from kdlib.teachers.teacher_sets import depends_on_fold, fold_identity, label_settings
from kdlib.teachers.training import TEACHER_CODE, train_teacher
from kdlib.tokens import Tokens
from kdlib.training.sampling import TrainingData, set_aside

if TYPE_CHECKING:
    from kdlib.models.hybrid import Heads, Hybrid

SHIPPED = SHIPPED_MODEL.with_name("parent")
MAX_DEV = 400  # utterances of a base model's dev set
_compatible: set[tuple[str, str]] = set()  # teacher settings and tokens for which the shipped base model was checked


def base_model(params: Params) -> Path | None:
    """The folder of the base model; None where each teacher starts from scratch or from the checkpoint."""
    settings = params.teacher
    if settings.parent == "none":
        return None
    if settings.parent == "shipped" and settings.backbone == "sb":
        return _shipped(params)
    inputs = [pretrained_model(params)] if settings.backbone == "nemo" else []
    return produce(
        (params.label_folder if depends_on_fold(params) else params.folder) / "parents" / settings.family,
        lambda partial: _build(partial, params),
        what=f"base model of the teachers ({settings.family})",
        parameters=settings.model_dump(
            mode="json", exclude={"adapt", "dev_share", "max_teachers", "students", "student_seeds"}
        )
        | _data_settings(params),
        inputs=[prepare.corpus_folder(params), tokens_folder(params), *inputs],
        seed=params.seed,
        code=TEACHER_CODE,
    )


def _data_settings(params: Params) -> dict:
    """The settings that decide which speech a base model is trained on."""
    if params.teacher.parent == "from_corpus":
        own = {"blocks": params.blocks.train, "dev_share": params.teacher.dev_share}
        return fold_identity(params) | own | ({"labels": label_settings(params)} if params.labels else {})
    return (fold_identity(params) if depends_on_fold(params) else {}) | params.pretraining.model_dump(
        include={"test_controls", "unseen_words"}
    )


def _shipped(params: Params) -> Path:
    """The package's own base model, if it fits the recipe; checked once per process."""
    from kdlib.models import hybrid

    ours = load_tokens(params)
    recipe = params.teacher.model_dump_json(), ours.fingerprint
    if recipe in _compatible:
        return SHIPPED
    _, tokens, record = hybrid.load(SHIPPED)
    expected = hybrid.describe(_random_model(params, ours))
    if tokens.fingerprint != ours.fingerprint or any(record[name] != value for name, value in expected.items()):
        raise UserError(
            "teacher.parent is 'shipped', but the shipped base model has other tokens or another shape than this "
            "recipe; write in the recipe: teacher: {parent: controls}, or from_corpus where the corpus has no controls"
        )
    _compatible.add(recipe)
    return SHIPPED


def _build(partial: Path, params: Params) -> None:
    settings, corpus = params.teacher, prepare.load(params)
    if settings.parent == "from_corpus":
        data = set_aside(split(corpus, params).train, settings.dev_share, params.seed)
    else:
        if not any(map(corpus.is_control, corpus.speakers)):
            raise UserError(
                f"{corpus.source}: no control speakers to train the base model of the teachers on; write in the "
                "recipe: teacher: {parent: from_corpus}, or none to train each teacher from scratch; or name controls "
                "under `speakers:`"
            )
        corpus = prepare.load(params.with_all_labels)  # the controls' transcripts are never withheld
        controls = split_controls(corpus, params)
        dev = corpus.where(lambda utt: utt.speaker in controls.test_speakers and not utt.copy_of)
        train_words = {utt.text for utt in controls.train}
        dev = [utt for utt in dev if utt.text in train_words]
        random.Random(params.seed).shuffle(dev)
        data = TrainingData(controls.train, dev[:MAX_DEV])
    model, tokens, head_is_trained = initial_model(params)
    if settings.backbone == "nemo":
        model.freeze()
        model.ctc_head.requires_grad_(not head_is_trained)
    what, earlier_speakers = "base model of the teachers", pretraining_speakers(params)
    train_teacher(partial, params, settings.base_training, model, tokens, data, what, earlier_speakers)


def pretraining_speakers(params: Params) -> list[str]:
    """Speakers that the teachers' checkpoint was trained on. NVIDIA's were trained on no speaker of these corpora."""
    record = training_record(params) if params.teacher.backbone == "nemo" else None
    return record["speakers"] if record else []


def _random_model(params: Params, tokens: Tokens) -> "Hybrid":
    """SpeechBrain's encoder and both heads, with random weights."""
    from kdlib.models import hybrid
    from kdlib.models.encoder_conformer import Conformer, ConformerShape

    names = ("d_model", "layers", "heads", "ffn", "kernel", "mels", "dropout")
    encoder = Conformer(ConformerShape(**{name: getattr(params.teacher, name) for name in names}))
    return hybrid.Hybrid(encoder, _heads(params, tokens, encoder.width))


def _heads(params: Params, tokens: Tokens, width: int) -> "Heads":
    from kdlib.models.hybrid import Heads, nearest_divisor

    settings = params.teacher
    return Heads(
        tokens.size, settings.decoder_layers, nearest_divisor(width, settings.heads), settings.ffn, settings.dropout
    )


def initial_model(params: Params) -> "tuple[Hybrid, Tokens, bool]":
    """An initial model, its tokens, and True if its CTC head is already trained."""
    from kdlib.models import hybrid

    tokens = load_tokens(params)
    seed_everything(params.seed)
    if params.teacher.backbone == "sb":
        return _random_model(params, tokens), tokens, False
    source = restore_model(pretrained_model(params))
    model = hybrid.NeMoHybridStudent.of(source, _heads(params, tokens, source.cfg.encoder.d_model))
    return model, tokens, copy_head(model, source, tokens)


def ship_base_model(params: Params) -> None:
    """Copy a recipe's base model into the package, its weights in half precision."""
    from safetensors.torch import load_file, save_file

    folder = base_model(params)
    SHIPPED.mkdir(exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    half = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
    save_file(half, SHIPPED / "model.safetensors")
    for name in ("model.json", "tokenizer.model", "run.json"):
        shutil.copyfile(folder / name, SHIPPED / name)
    print(f"{SHIPPED.name}: {sum(file.stat().st_size for file in SHIPPED.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the base model of a recipe's teachers on control speakers.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--ship", action="store_true", help="put it into the package")
    arguments = parser.parse_args()
    try:
        recipe = load(arguments.recipe, "nobody", {"exclude": []}, {"teacher": {"parent": "controls"}})
        ship_base_model(recipe) if arguments.ship else base_model(recipe)
    except UserError as error:
        sys.exit(f"\n{error}\n")
