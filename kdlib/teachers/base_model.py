"""The base model that all teachers of a family start from.

A shared start keeps the teachers' CTC spikes in the same frames, without which their average says little. It is trained
on controls and so is shared by all folds; made `from_corpus` it belongs to a fold; the demo's is shipped with kdlib.
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
from kdlib.stage import produce
from kdlib.teachers.teacher_sets import depends_on_fold, fold_identity, label_settings
from kdlib.teachers.training import TEACHER_CODE, train_teacher
from kdlib.tokens import Tokens
from kdlib.training.sampling import TrainingData, set_aside

if TYPE_CHECKING:
    from kdlib.models.hybrid import Hybrid

SHIPPED = SHIPPED_MODEL.with_name("parent")
MAX_DEV = 400  # utterances of a parent's dev block
_fitting: set[tuple[str, str]] = set()  # recipes' teachers and tokens that the shipped parent was found to fit


def base_model(params: Params) -> Path | None:
    """The folder of the shared start of all teachers; nothing where each starts from scratch or from the checkpoint."""
    settings = params.teacher
    if settings.parent == "none":
        return None
    if settings.parent == "shipped" and settings.backbone == "sb":
        return _shipped(params)
    inputs = [pretrained_model(params)] if settings.backbone == "nemo" else []
    return produce(
        (params.label_folder if depends_on_fold(params) else params.folder) / "parents" / settings.family,
        lambda partial: _build(partial, params),
        what=f"parent of the teachers ({settings.family})",
        parameters=settings.model_dump(
            mode="json", exclude={"adapt", "dev_share", "max_teachers", "students", "student_seeds"}
        )
        | _training_settings(params),
        inputs=[prepare.corpus_folder(params), tokens_folder(params), *inputs],
        seed=params.seed,
        code=TEACHER_CODE,
    )


def _training_settings(params: Params) -> dict:
    """What decides whom a parent hears."""
    if params.teacher.parent == "from_corpus":
        own = {"blocks": params.blocks.train, "dev_share": params.teacher.dev_share}
        return fold_identity(params) | own | ({"labels": label_settings(params)} if params.labels else {})
    return (fold_identity(params) if depends_on_fold(params) else {}) | params.pretraining.model_dump(
        include={"test_controls", "unseen_words"}
    )


def _shipped(params: Params) -> Path:
    """The package's own parent, where it fits the recipe; a process asks that once."""
    from kdlib.models import hybrid

    ours = load_tokens(params)
    asked = params.teacher.model_dump_json(), ours.fingerprint
    if asked in _fitting:
        return SHIPPED
    _, tokens, record = hybrid.load(SHIPPED)
    wanted = _random_model(params, ours)[0]
    alike = all(record[name] == value for name, value in hybrid.describe(wanted).items())
    if tokens.fingerprint != ours.fingerprint or not alike:
        raise UserError(
            "teacher.parent is 'shipped', but the shipped parent has other tokens or another shape than this recipe; "
            "write in the recipe: teacher: {parent: controls}, or from_corpus where the corpus has no controls"
        )
    _fitting.add(asked)
    return SHIPPED


def _build(partial: Path, params: Params) -> None:
    settings, corpus = params.teacher, prepare.load(params)
    if settings.parent == "from_corpus":
        chosen = set_aside(split(corpus, params).train, settings.dev_share, params.seed)
    else:
        if not any(map(corpus.is_control, corpus.speakers)):
            raise UserError(
                f"{corpus.source}: no control speakers to train the teachers' parent on; write in the recipe: "
                "teacher: {parent: from_corpus}, or none to train each teacher from scratch; or name controls under "
                "`speakers:`"
            )
        corpus = prepare.load(params.with_all_labels)  # the controls' words are nobody's labels
        controls = split_controls(corpus, params)
        dev = corpus.where(lambda utt: utt.speaker in controls.test_speakers and not utt.copy_of)
        known = {utt.text for utt in controls.train}
        dev = [utt for utt in dev if utt.text in known]
        random.Random(params.seed).shuffle(dev)
        chosen = TrainingData(controls.train, dev[:MAX_DEV])
    model, tokens, ready = initial_model(params)
    if settings.backbone == "nemo":
        model.freeze()
        model.ctc_head.requires_grad_(not ready)
    train_teacher(
        partial,
        params,
        settings.base_training,
        model,
        tokens,
        chosen,
        "parent of the teachers",
        pretraining_speakers(params),
    )


def pretraining_speakers(params: Params) -> list[str]:
    """Whom a checkpoint had heard that teachers start from. NVIDIA's have heard nobody of these corpora."""
    known = training_record(params) if params.teacher.backbone == "nemo" else None
    return known["speakers"] if known else []


def _random_model(params: Params, tokens: Tokens) -> "tuple[Hybrid, Tokens]":
    """SpeechBrain's encoder and both heads, with random weights."""
    from kdlib.models import hybrid
    from kdlib.models.encoder_conformer import Conformer, ConformerShape

    settings = params.teacher
    named = ("d_model", "layers", "heads", "ffn", "kernel", "mels", "dropout")
    encoder = Conformer(ConformerShape(**{name: getattr(settings, name) for name in named}))
    return hybrid.Hybrid(encoder, _heads(params, tokens, encoder.width)), tokens


def _heads(params: Params, tokens: Tokens, width: int):
    from kdlib.models.hybrid import Heads, nearest_divisor

    settings = params.teacher
    return Heads(
        tokens.size, settings.decoder_layers, nearest_divisor(width, settings.heads), settings.ffn, settings.dropout
    )


def initial_model(params: Params) -> "tuple[Hybrid, Tokens, bool]":
    """A model to begin with, and whether its CTC head is trained already."""
    from kdlib.models import hybrid
    from kdlib.runtime import seed_everything

    tokens = load_tokens(params)
    seed_everything(params.seed)
    if params.teacher.backbone == "sb":
        return *_random_model(params, tokens), False
    source = restore_model(pretrained_model(params))
    model = hybrid.NeMoHybridStudent.of(source, _heads(params, tokens, source.cfg.encoder.d_model))
    return model, tokens, copy_head(model, source, tokens)


def ship_base_model(params: Params) -> None:
    """Copy a recipe's parent into the package, its weights in half precision."""
    from safetensors.torch import load_file, save_file

    made = base_model(params)
    SHIPPED.mkdir(exist_ok=True)
    weights = load_file(made / "model.safetensors")
    half = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
    save_file(half, SHIPPED / "model.safetensors")
    for name in ("model.json", "tokenizer.model", "run.json"):
        shutil.copyfile(made / name, SHIPPED / name)
    print(f"{SHIPPED.name}: {sum(file.stat().st_size for file in SHIPPED.iterdir()) / 1e6:.2f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the parent of a recipe's teachers on the corpus's controls.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--ship", action="store_true", help="put it into the package")
    choice = parser.parse_args()
    try:
        made_of = load(choice.recipe, "nobody", {"exclude": []}, {"teacher": {"parent": "controls"}})
        ship_base_model(made_of) if choice.ship else base_model(made_of)
    except UserError as error:
        sys.exit(f"\n{error}\n")
