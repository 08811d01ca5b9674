"""The small pretrained model: a NeMo Conformer-CTC trained on control speakers, or on a fold's own training speakers.

It replaces NVIDIA's pretrained models without a network, or for a language that they do not cover. A model of controls
is trained on no speaker of any fold and is shared; a model `from_corpus` is in the fold's folder.
`python -m kdlib.pretrained.model RECIPE --ship` writes the shipped file.
"""

import argparse
import itertools
import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdlib.corpus import audio, labels, prepare
from kdlib.corpus.manifest import Corpus, Utterance
from kdlib.corpus.speakers import in_blocks, split
from kdlib.errors import UserError, nearest
from kdlib.io import atomic_write, sha256, write_json
from kdlib.models.nemo_files import SHIPPED_MODEL, build_model, find_model
from kdlib.params import Params, load
from kdlib.stage import produce
from kdlib.tokens import Tokens, train_tokenizer

FRAME_S = 0.04  # of the encoder's output
PRETRAINED_CODE = (
    "pretrained/model.py",
    *labels.CODE,
    "models/encoder_nemo.py",
    "models/nemo_files.py",
    "training/loop.py",
    "training/callbacks.py",
    "training/checkpoints.py",
    "training/schedules.py",
    "training/sampling.py",
    "runtime.py",
    "tokens.py",
    "corpus/audio.py",
)


@dataclass(frozen=True)
class PretrainingData:
    """The training utterances, and the speakers and words that are held out for testing."""

    train: list[Utterance]
    test_speakers: list[str]  # controls that are not trained on
    unseen_words: frozenset[str]


def split_controls(corpus: Corpus, params: Params) -> PretrainingData:
    """Hold out whole control speakers, and a share of the words of which only controls have recordings."""
    settings = params.pretraining
    controls = [name for name in corpus.speakers if corpus.is_control(name)]
    if len(controls) <= settings.test_controls:
        raise UserError(
            f"{corpus.source}: {len(controls)} control speakers, but pretraining sets {settings.test_controls} aside "
            "for testing and needs another to train on; lower pretraining.test_controls, name more controls under "
            "`speakers:`, or write pretrained: shipped or pretrained: from_corpus"
        )
    by_sex = {sex: [name for name in controls if corpus.person(name).sex == sex] for sex in ("M", "F", "")}
    queues = [names for names in by_sex.values() if names]  # the test speakers alternate between the sexes
    test = []
    for turn in range(settings.test_controls):
        test.append((queues[turn % len(queues)] or max(queues, key=len)).pop())
    folds = {utt.text for utt in corpus if not corpus.is_control(utt.speaker)}
    rest = sorted({utt.text for utt in corpus} - folds)
    unseen = frozenset(random.Random(params.seed).sample(rest, round(settings.unseen_words * len(rest))))
    train = corpus.where(lambda utt: utt.speaker in controls and utt.speaker not in test and utt.text not in unseen)
    return PretrainingData(train, sorted(test), unseen)


def split_fold(corpus: Corpus, params: Params) -> PretrainingData:
    """The training data of a fold's own model: its training speakers, or those named in the recipe."""
    named = params.pretraining.speakers
    train = split(corpus, params).train
    if named:
        for name in named:
            if name not in corpus.speakers:
                raise UserError(
                    f"{corpus.source}: pretraining.speakers names {name!r}, who has no utterances"
                    f"{nearest(name, corpus.speakers)}"
                )
        train = corpus.where(
            lambda utt: (
                utt.text
                and utt.speaker in named
                and utt.speaker not in params.fold.exclude
                and (corpus.is_control(utt.speaker) or in_blocks(utt, params.blocks.train))
            )
        )
    if not train:
        raise UserError(
            f"{corpus.source}: pretraining.speakers names only speakers that fold.exclude keeps out of training"
        )
    return PretrainingData(train, [], frozenset())


def pretrained_model(params: Params) -> Path:
    """The recipe's `.nemo` file: shipped, NVIDIA's, local, or trained on controls or on the fold's speakers."""
    if params.pretrained not in ("controls", "from_corpus"):
        return find_model(params)
    own = params.pretrained == "from_corpus"
    fold = {"fold": params.fold.model_dump(mode="json"), "blocks": params.blocks.model_dump(mode="json")}
    fold["labels"] = params.labels
    folder = produce(
        (params.label_folder if own else params.folder) / "pretrained",
        lambda partial: _build(partial, params),
        what=f"pretraining for {params.held_out}" if own else "pretraining",
        parameters=params.pretraining.model_dump(mode="json") | (fold if own else {}),
        inputs=[prepare.corpus_folder(params)],
        seed=params.seed,
        code=PRETRAINED_CODE,
    )
    return folder / "pretrained.nemo"


def training_record(params: Params) -> dict | None:
    """The training speakers and words of the recipe's pretrained model; None for NVIDIA's, which have no record.

    The shipped model's speakers are the synthetic ones of the embedded corpus: none of any other corpus.
    """
    if params.pretrained == "nemo":
        return None
    path = (
        SHIPPED_MODEL.with_suffix(".train_data.json")
        if params.pretrained == "shipped"
        else pretrained_model(params).with_name("train_data.json")
    )
    record = json.loads(path.read_text(encoding="utf-8"))
    if params.pretrained == "shipped" and params.corpus != "synthetic":
        record |= {"speakers": [], "test_speakers": []}
    return record


def fits_frames(ids: Sequence[int], duration_s: float) -> bool:
    """Return whether the tokens fit into the frames for CTC: one frame each, and a blank between equal ones.

    >>> fits_frames([5, 6, 6], 0.16), fits_frames([5, 6, 6], 0.12)
    (True, False)
    """
    return len(ids) + sum(a == b for a, b in itertools.pairwise(ids)) <= int(duration_s / FRAME_S + 1e-6)


def _build(partial: Path, params: Params) -> None:
    import torch

    from kdlib.runtime import seed_everything
    from kdlib.training.checkpoints import remove_checkpoints
    from kdlib.training.loop import EpochData, Task, fit
    from kdlib.training.schedules import cosine

    settings = params.pretraining
    own = params.pretrained == "from_corpus"
    corpus = prepare.load(params if own else params.with_all_labels)  # transcripts of controls are not labels of a fold
    data = split_fold(corpus, params) if own else split_controls(corpus, params)
    texts = {utt.text for utt in (data.train if own else corpus) if utt.text} - data.unseen_words
    spellings = itertools.chain(*prepare.spellings(params).values())
    characters = "".join([*spellings, *corpus.lexicon])  # every word must be encodable
    tokenizer = train_tokenizer(texts, settings.pieces, partial / "tokens", lower=True, characters=characters)
    seed_everything(params.seed)
    model = build_model(tokenizer, settings)
    tokens = Tokens.for_nemo(tokenizer.read_bytes())

    train = [utt for utt in data.train if fits_frames(tokens.encode(utt.text), utt.duration_s)]
    if not train:
        raise UserError(f"{corpus.source}: every utterance has fewer frames of {FRAME_S * 1000:.0f} ms than tokens")
    if len(train) < len(data.train):
        print(
            f"pretraining: {len(data.train) - len(train)} of {len(data.train)} utterances are not trained on: "
            f"they have fewer frames of {FRAME_S * 1000:.0f} ms than tokens, too few for CTC"
        )

    def step(batch: tuple) -> dict[str, torch.Tensor]:
        samples, lengths, targets, sizes = batch
        logprobs, frames, _ = model.forward(input_signal=samples, input_signal_length=lengths)
        logprobs, options = logprobs.transpose(0, 1), {"blank": tokens.blank, "zero_infinity": True}
        return {"loss": torch.nn.functional.ctc_loss(logprobs, targets, frames, sizes, **options)}

    def collate(utterances: Sequence[Utterance]) -> tuple:
        samples, lengths = audio.collate(utterances)
        ids = [torch.tensor(tokens.encode(utt.text)) for utt in utterances]
        sizes = torch.tensor([len(text) for text in ids])
        return samples, lengths, torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), sizes

    seed = params.seed * 1009
    epochs = EpochData(lambda epoch: audio.batches(train, settings.batch_size, seed=seed + epoch), collate)
    task = Task(model, step, lr=settings.lr, scale=cosine(settings.warmup_steps, settings.steps))
    fit(task, epochs, folder=partial, what="pretraining", steps=settings.steps, seed=params.seed)
    model.save_to(str(partial / "pretrained.nemo"))
    write_json(
        partial / "train_data.json",
        {
            "speakers": sorted({utt.speaker for utt in train}),
            "utterances": len(train),
            "words": sorted({utt.text for utt in train}),
            "unseen_words": sorted(data.unseen_words),
            "test_speakers": data.test_speakers,
            "tokens": tokens.fingerprint,
        },
    )
    remove_checkpoints(partial)


def ship_model(params: Params) -> None:
    """Copy a recipe's pretrained model and its provenance into the package."""
    source, shipped = pretrained_model(params), SHIPPED_MODEL
    for name, suffix in (("run.json", ".run.json"), ("train_data.json", ".train_data.json"), (source.name, ".nemo")):
        with atomic_write(shipped.with_suffix(suffix)) as hidden:
            shutil.copyfile(source.with_name(name), hidden)
    print(f"{shipped}: {shipped.stat().st_size / 1e6:.2f} MB, sha256 {sha256(shipped)[:16]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the small pretrained model on the controls of a corpus.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--ship", action="store_true", help="copy it into the package")
    arguments = parser.parse_args()
    try:
        settings = load(arguments.recipe, "nobody", {"exclude": []}, {"pretrained": "controls"})
        ship_model(settings) if arguments.ship else pretrained_model(settings)
    except UserError as error:
        sys.exit(f"\n{error}\n")
