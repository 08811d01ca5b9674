"""The small pretrained model: a NeMo Conformer-CTC trained on control speakers, or on a fold's own training speakers.

It replaces NVIDIA's pretrained models without a network, or for a language that they do not cover. A model of controls
is trained on no speaker of any fold and is shared; a model `from_corpus` is in the fold's folder.
"""

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdlib.console import report
from kdlib.corpus import audio
from kdlib.corpus.inputs import Batch
from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import Splits, in_blocks
from kdlib.corpus.utterances import Utterance, Utterances
from kdlib.errors import UserError, nearest
from kdlib.io import atomic_write, sha256, write_json
from kdlib.models import Emissions
from kdlib.models.nemo_files import RECORD, SHIPPED_MODEL, TRAINED, build_model
from kdlib.settings.pretrained import Pretraining
from kdlib.tokens import PER_WORD, Tokens, train_tokenizer
from kdlib.training.sampling import FRAME_S, fits_frames


@dataclass(frozen=True)
class PretrainingData:
    """The training utterances, the texts of the tokenizer, and the speakers and words that are held out for testing."""

    source: str  # of the corpus
    train: list[Utterance]
    texts: set[str]
    test_speakers: list[str]  # controls that are not trained on
    unseen_words: frozenset[str]
    dev: Sequence[Utterance] = ()  # for early stopping


def split_controls(corpus: Corpus, settings: Pretraining, seed: int) -> PretrainingData:
    """Hold out whole control speakers, and a share of the words of which only controls have recordings."""
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
    unseen = frozenset(random.Random(seed).sample(rest, round(settings.unseen_words * len(rest))))
    train = corpus.where(lambda utt: utt.speaker in controls and utt.speaker not in test and utt.text not in unseen)
    texts = {utt.text for utt in corpus if utt.text} - unseen
    return PretrainingData(corpus.source, train, texts, sorted(test), unseen)


def split_fold(splits: Splits, settings: Pretraining) -> PretrainingData:
    """The data of a fold's own model: its training speakers, or those named in the recipe, and its dev speaker."""
    corpus, named, train = splits.corpus, settings.speakers, splits.train
    if named:
        for name in named:
            if name not in corpus.speakers:
                raise UserError(
                    f"{corpus.source}: pretraining.speakers names {name!r}, who has no utterances"
                    f"{nearest(name, corpus.speakers)}"
                )
        excluded, blocks = splits.settings.fold.exclude, splits.settings.blocks.train
        train = corpus.where(
            lambda utt: (
                utt.text
                and utt.speaker in named
                and utt.speaker not in excluded
                and (corpus.is_control(utt.speaker) or in_blocks(utt, blocks))
            )
        )
    if not train:
        raise UserError(
            f"{corpus.source}: pretraining.speakers names only speakers that fold.exclude keeps out of training"
        )
    return PretrainingData(corpus.source, train, {utt.text for utt in train}, [], frozenset(), splits.dev)


def train(
    partial: Path, data: PretrainingData, characters: str, settings: Pretraining, seed: int, device: str = "auto"
) -> None:
    """Train the tokenizer, which can encode all `characters`, and the model."""
    import torch

    from kdlib.models.augment import SpecAugment
    from kdlib.models.encoder_cache import MAX_BYTES, UtteranceCache
    from kdlib.models.encoder_nemo import NeMoEncoder
    from kdlib.models.fast_layers import use_fast_layers
    from kdlib.objectives.reference_losses import ctc_loss
    from kdlib.runtime import seed_everything
    from kdlib.training.checkpoints import remove_checkpoints
    from kdlib.training.loop import EpochData, Run, Task, Validations, fit
    from kdlib.training.schedules import cosine
    from kdlib.training.validation import validate_greedy

    how = {"lower": True, "characters": characters, "per_word": PER_WORD}
    tokenizer = train_tokenizer(data.texts, settings.pieces, partial / "tokens", **how)
    seed_everything(seed)
    model = build_model(tokenizer, settings)
    tokens = Tokens.for_nemo(tokenizer.read_bytes())

    speech = Utterances.of(data.train)
    train = speech.where(lambda utt: fits_frames(tokens.encode(utt.text), utt.duration_s))
    if not train:
        raise UserError(f"{data.source}: every utterance has fewer frames of {FRAME_S * 1000:.0f} ms than tokens")
    if len(train) < len(data.train):
        report(
            f"pretraining: {len(data.train) - len(train)} of {len(data.train)} utterances are not trained on: "
            f"they have fewer frames of {FRAME_S * 1000:.0f} ms than tokens, too few for CTC"
        )

    use_fast_layers(model)
    encoder = NeMoEncoder.of(model)
    learner = torch.nn.ModuleDict({"encoder": encoder, "decoder": model.decoder})
    cache = UtteranceCache(encoder.extract_features, MAX_BYTES)
    encoder.spec_augment = SpecAugment.of(settings)

    def emissions(batch: Batch) -> Emissions:
        frames, lengths, _ = encoder.encode(*cache(batch))
        return Emissions(model.decoder(encoder_output=frames.transpose(1, 2)), lengths)

    def step(batch: Batch) -> dict[str, torch.Tensor]:
        if encoder.spec_augment:
            encoder.spec_augment.done = task.global_step / settings.steps
        return {"loss": ctc_loss(emissions(batch), batch.ids, tokens.blank)}

    epochs = EpochData(
        lambda epoch: audio.batches(train, settings.batch_size, seed=seed * 1009 + epoch),
        lambda utterances: Batch.of(utterances, tokens),
    )
    dev = [Batch.of(batch, tokens) for batch in audio.batches(data.dev, 32)]

    def dev_outputs(batch: Batch) -> tuple[Emissions, float]:
        outputs = emissions(batch.to(next(learner.parameters()).device))
        return outputs, float(ctc_loss(outputs, batch.ids, tokens.blank))

    task = Task(learner, step, lr=settings.lr, scale=cosine(settings.warmup_steps, settings.steps))
    run = Run(
        partial,
        "pretraining",
        settings.steps,
        seed,
        checkpoint_every=settings.validate_every if dev else 1,
        device=device,
        batch_size=settings.batch_size,
    )
    validations = Validations(
        lambda: validate_greedy(dev, tokens, dev_outputs), settings.validate_every, settings.patience
    )
    fit(task, epochs, run, validations if dev else None)
    model.save_to(str(partial / TRAINED))
    write_json(
        partial / RECORD,
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


def ship(source: Path) -> None:
    """Copy a pretrained model and its provenance into the package."""
    shipped = SHIPPED_MODEL
    for name, suffix in (("run.json", ".run.json"), (RECORD, f".{RECORD}"), (source.name, ".nemo")):
        with atomic_write(shipped.with_suffix(suffix)) as hidden:
            shutil.copyfile(source.with_name(name), hidden)
    print(f"{shipped}: {shipped.stat().st_size / 1e6:.2f} MB, sha256 {sha256(shipped)[:16]}")
