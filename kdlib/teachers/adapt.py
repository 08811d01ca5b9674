"""Teachers: one shared parent, then a teacher a speaker, adapted from it on that speaker's training blocks.

A shared parent keeps the teachers' CTC spikes in the same frames, without which their average says little. It is
trained on controls and so is shared by all folds, as are its teachers, each of which has heard one speaker more; one
made `from_corpus` belongs to a fold. With `backbone: nemo` the parent is the student's own pretrained encoder, and only
the attention decoder (and the CTC head, where the tokens are others) is trained on the controls before adapting.
A part of the training blocks, `teacher.dev_share`, is not trained on: training stops when it gets no better. (A model
that was pretrained `from_corpus` has heard that part too, and teachers that start from it stop later than they should.)
"""

import argparse
import random
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus import labels, prepare
from kdlib.corpus.manifest import Corpus, Utterance
from kdlib.corpus.speakers import in_blocks, split, teachers
from kdlib.errors import UserError, nearest
from kdlib.models import nemo, vocabulary
from kdlib.models.pretrain import heard, pretrained, split_controls
from kdlib.params import Params, load
from kdlib.stage import produce
from kdlib.teachers import lessons
from kdlib.tokens import Tokens

if TYPE_CHECKING:
    from kdlib.models.hybrid import Hybrid

CODE = (
    "teachers/adapt.py",
    "teachers/lessons.py",
    "models/hybrid.py",
    "models/vocabulary.py",
    "models/conformer.py",
    "models/augment.py",
    "models/decoder.py",
    "models/nemo.py",
    "models/supervised.py",
    "models/pretrain.py",
    *labels.CODE,
    "decode/greedy.py",
    "train.py",
    "tokens.py",
    "corpus/audio.py",
)
SHIPPED = nemo.SHIPPED.with_name("parent")
DEV_AT_MOST = 400  # utterances of a parent's dev block
_fitting: set[tuple[str, str]] = set()  # recipes' teachers and tokens that the shipped parent was found to fit


@dataclass(frozen=True)
class Material:
    """What one model is trained on, and what it is stopped on."""

    train: list[Utterance]
    dev: list[Utterance]


def place(params: Params) -> Path:
    """Where teachers and their stores lie: shared by all folds, unless they depend on a fold's speakers or labels."""
    return params.label_folder if _belongs(params) or params.labels else params.folder


def chosen(params: Params, asked: Sequence[str] | str = ()) -> list[str]:
    """Whose teachers a notebook is asked for: by default the fold's; names; "all"; or a part: "1/2", "2/3 of all"."""
    if params.teacher.backbone == "students":
        return born_again(params)
    corpus = prepare.load(params)
    if isinstance(asked, str):
        part, _, everybody = asked.partition(" of ") if "/" in asked else ("1/1", "", asked)
        index, parts = map(int, part.split("/")) if re.fullmatch(r"[1-9]\d*/[1-9]\d*", part) else (1, 0)
        if index > parts or everybody not in ("", "all"):
            raise UserError(f'speakers: expected names, "all", "1/2" or "1/2 of all", found {asked!r}')
        speak = {utt.speaker for utt in corpus if in_blocks(utt, params.blocks.train)}
        everyone = [name for name in corpus.dysarthric if name in speak]
        return (everyone if everybody else teachers(params, corpus))[index - 1 :: parts]
    for name in asked:
        if name not in corpus.dysarthric:
            hint = nearest(name, corpus.dysarthric)
            raise UserError(f"speakers: there can be no teacher of {name!r}, who has no utterances{hint}")
    return list(asked) or teachers(params, corpus)


def parent(params: Params) -> Path | None:
    """The folder of the shared start of all teachers; nothing where each starts from scratch or from the checkpoint."""
    settings = params.teacher
    if settings.parent == "none":
        return None
    if settings.parent == "shipped" and settings.backbone == "sb":
        return _shipped(params)
    inputs = [pretrained(params)] if settings.backbone == "nemo" else []
    return produce(
        (params.label_folder if _belongs(params) else params.folder) / "parents" / settings.family,
        lambda partial: _build_parent(partial, params),
        what=f"parent of the teachers ({settings.family})",
        parameters=settings.model_dump(
            mode="json", exclude={"adapt", "dev_share", "at_most", "students", "student_seeds"}
        )
        | _hears(params),
        inputs=[prepare.made(params), vocabulary.made(params), *inputs],
        seed=params.seed,
        code=CODE,
    )


def teacher(params: Params, speaker: str) -> Path:
    """The folder of a speaker's teacher, trained now or found."""
    settings = params.teacher
    if settings.backbone == "students":
        return _student(params, speaker)
    start = parent(params)
    inputs = [start / "model.json", start / "model.safetensors"] if start else []
    if settings.backbone == "nemo":
        inputs.append(pretrained(params))
    return produce(
        place(params) / "teachers" / settings.family / speaker,
        lambda partial: _build_teacher(partial, params, speaker),
        what=f"teacher {speaker}",
        parameters=settings.model_dump(mode="json", exclude={"start", "at_most", "students", "student_seeds"})
        | {"blocks": params.blocks.train, "of": speaker}
        | ({"labels": _labels(params)} if params.labels else {}),
        inputs=[prepare.made(params), vocabulary.made(params), *inputs],
        seed=params.seed,
        code=CODE,
    )


def _student(params: Params, name: str) -> Path:
    """The folder of a fold's student, which teaches the next (born again: Furlanello et al. 2018)."""
    folder = params.fold_folder / "students" / name
    if not (folder / "model.json").is_file():
        variant, seed = name.split("/seed")
        raise UserError(
            f"teacher.students: there is no student {variant!r} of seed {seed} in {folder}; train it first: make "
            f"compare HELD_OUT={params.held_out} VARIANTS={variant} SEEDS={seed}"
        )
    return folder


def born_again(params: Params) -> list[str]:
    """The names of the students that teach: their places below the fold's students."""
    settings = params.teacher
    return [f"{variant}/seed{seed}" for variant in settings.students for seed in settings.student_seeds]


def material(utterances: Sequence[Utterance], share: float, seed: int) -> Material:
    """Set a share of the utterances aside, with all their recordings by other microphones.

    An utterance's own draw decides, so that a parent made of the corpus sets the same ones aside as its teachers.
    """

    def apart(utt: Utterance) -> bool:
        return random.Random(f"{seed} {utt.copy_of or utt.utt_id}").random() < share

    return Material(
        [utt for utt in utterances if not apart(utt)], [utt for utt in utterances if apart(utt) and not utt.copy_of]
    )


def own_speech(params: Params, corpus: Corpus, speaker: str) -> Material:
    """What a speaker's teacher is adapted to."""
    own = corpus.where(lambda utt: utt.text and utt.speaker == speaker and in_blocks(utt, params.blocks.train))
    if not own:
        raise UserError(
            f"{corpus.source}: {speaker} says nothing in the training blocks {', '.join(params.blocks.train)}: there "
            "can be no teacher; leave the speaker out of fold.teachers, or change blocks.train"
            + (f" or label_fraction ({params.label_fraction:g}: no transcript is left)" if params.labels else "")
        )
    return material(own, params.teacher.dev_share, params.seed)


def learnt(params: Params, corpus: Corpus, name: str) -> list[Utterance]:
    """What a teacher was trained on: its speaker's speech; a student, the fold's training speech."""
    if params.teacher.backbone == "students":
        return split(corpus, params).train
    return own_speech(params, corpus, name).train


def _hears(params: Params) -> dict:
    """What decides whom a parent hears."""
    if params.teacher.parent == "from_corpus":
        own = {"blocks": params.blocks.train, "dev_share": params.teacher.dev_share}
        return _fold(params) | own | ({"labels": _labels(params)} if params.labels else {})
    return (_fold(params) if _belongs(params) else {}) | params.pretraining.model_dump(
        include={"test_controls", "unseen_words"}
    )


def _belongs(params: Params) -> bool:
    if params.teacher.backbone == "students":
        return True
    from_checkpoint = params.teacher.backbone == "nemo" and params.pretrained == "from_corpus"
    return params.teacher.parent == "from_corpus" or from_checkpoint or vocabulary.of_the_fold(params)


def of_the_fold(params: Params) -> dict:
    """What of the fold and its labels a stage depends on: nothing, where it is shared by all folds."""
    if place(params) == params.folder:
        return {}
    return _fold(params) | ({"labels": _labels(params)} if params.labels else {})


def _fold(params: Params) -> dict:
    return {"fold": params.fold.model_dump(mode="json"), "held_out": params.held_out}


def _labels(params: Params) -> dict:
    """What decides which transcripts are known."""
    return labels.record(params) | {"hear_held_out": params.hear_held_out}


def _shipped(params: Params) -> Path:
    """The package's own parent, where it fits the recipe; a process asks that once."""
    from kdlib.models import hybrid

    ours = vocabulary.vocabulary(params)
    asked = params.teacher.model_dump_json(), ours.fingerprint
    if asked in _fitting:
        return SHIPPED
    _, tokens, record = hybrid.load(SHIPPED)
    wanted = _blank_model(params, ours)[0]
    alike = all(record[name] == value for name, value in hybrid.described(wanted).items())
    if tokens.fingerprint != ours.fingerprint or not alike:
        raise UserError(
            "teacher.parent is 'shipped', but the shipped parent has other tokens or another shape than this recipe; "
            "write in the recipe: teacher: {parent: controls}, or from_corpus where the corpus has no controls"
        )
    _fitting.add(asked)
    return SHIPPED


def _build_parent(partial: Path, params: Params) -> None:
    settings, corpus = params.teacher, prepare.load(params)
    if settings.parent == "from_corpus":
        chosen = material(split(corpus, params).train, settings.dev_share, params.seed)
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
        chosen = Material(controls.train, dev[:DEV_AT_MOST])
    model, tokens, ready = _first(params)
    if settings.backbone == "nemo":
        model.freeze()
        model.ctc_head.requires_grad_(not ready)
    lessons.train(
        partial, params, settings.start, model, tokens, chosen, "parent of the teachers", _heard_before(params)
    )


def _build_teacher(partial: Path, params: Params, speaker: str) -> None:
    from kdlib.models import hybrid

    corpus, settings, start = prepare.load(params), params.teacher, parent(params)
    chosen = own_speech(params, corpus, speaker)
    if start:
        model, tokens, record = hybrid.load(start)
        before = record["heard"]
    else:
        model, tokens, _ = _first(params)
        before = _heard_before(params)
    lessons.train(partial, params, settings.adapt, model, tokens, chosen, f"teacher {speaker}", before)


def _heard_before(params: Params) -> list[str]:
    """Whom a checkpoint had heard that teachers start from. NVIDIA's have heard nobody of these corpora."""
    known = heard(params) if params.teacher.backbone == "nemo" else None
    return known["speakers"] if known else []


def _blank_model(params: Params, tokens: Tokens) -> "tuple[Hybrid, Tokens]":
    """SpeechBrain's encoder and both heads, with random weights."""
    from kdlib.models import hybrid
    from kdlib.models.conformer import Conformer, Shape

    settings = params.teacher
    named = ("d_model", "layers", "heads", "ffn", "kernel", "mels", "dropout")
    encoder = Conformer(Shape(**{name: getattr(settings, name) for name in named}))
    return hybrid.Hybrid(encoder, _heads(params, tokens, encoder.width)), tokens


def _heads(params: Params, tokens: Tokens, width: int):
    from kdlib.models.hybrid import Heads, fitting

    settings = params.teacher
    return Heads(tokens.size, settings.decoder_layers, fitting(width, settings.heads), settings.ffn, settings.dropout)


def _first(params: Params) -> "tuple[Hybrid, Tokens, bool]":
    """A model to begin with, and whether its CTC head is trained already."""
    from kdlib import train
    from kdlib.models import hybrid

    tokens = vocabulary.vocabulary(params)
    train.seed_everything(params.seed)
    if params.teacher.backbone == "sb":
        return *_blank_model(params, tokens), False
    source = nemo.restore(pretrained(params))
    model = hybrid.NeMoHybridStudent.of(source, _heads(params, tokens, source.cfg.encoder.d_model))
    return model, tokens, vocabulary.take_head(model, source, tokens)


def ship(params: Params) -> None:
    """Copy a recipe's parent into the package, its weights in half precision."""
    from safetensors.torch import load_file, save_file

    made = parent(params)
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
        ship(made_of) if choice.ship else parent(made_of)
    except UserError as error:
        sys.exit(f"\n{error}\n")
