"""The small pretrained model: a NeMo Conformer-CTC trained on the embedded corpus's control voices.

It stands in for NVIDIA's pretrained models where there is no network: it has heard healthy voices only, most of the
word list, and none of the fold's speakers. `python -m kdlib.models.pretrain RECIPE --ship` makes the shipped file.
"""

import argparse
import json
import random
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdlib.corpus import audio, prepare
from kdlib.corpus.manifest import Corpus, Utterance
from kdlib.corpus.speakers import is_control
from kdlib.errors import UserError
from kdlib.models import nemo
from kdlib.params import Params, fold_names, load
from kdlib.stage import produce, sha256, write_json, writing
from kdlib.tokens import Tokens, train

CODE = ("models/pretrain.py", "corpus/speakers.py", "models/nemo.py", "train.py", "tokens.py", "corpus/audio.py")


@dataclass(frozen=True)
class ControlSplit:
    """Control utterances that are trained on, and those that test new voices and new words."""

    train: list[Utterance]
    test: list[Utterance]  # voices that were not trained on
    unseen_words: frozenset[str]


def split_controls(corpus: Corpus, params: Params) -> ControlSplit:
    """Set whole voices aside, and a share of the words that no other speaker says."""
    settings = params.pretraining
    voices = [name for name in corpus.speakers if is_control(name)]
    if len(voices) <= settings.test_controls:
        raise UserError(
            f"{corpus.source}: {len(voices)} control speakers, but pretraining sets {settings.test_controls} aside for "
            "testing and needs another to train on; lower pretraining.test_controls, or write pretrained: shipped"
        )
    sexes = [sorted(name for name in voices if name[1] == sex) for sex in "MF"]
    apart = [
        names.pop() for turn in range(settings.test_controls) for names in [sexes[turn % 2] or sexes[1 - turn % 2]]
    ]
    own = {utt.text for utt in corpus if not is_control(utt.speaker)}
    others = sorted({utt.text for utt in corpus} - own)
    unseen = frozenset(random.Random(params.seed).sample(others, round(settings.unseen_words * len(others))))
    heard = corpus.where(lambda utt: utt.speaker in voices and utt.speaker not in apart and utt.text not in unseen)
    return ControlSplit(heard, corpus.where(lambda utt: utt.speaker in apart), unseen)


def pretrained(params: Params) -> Path:
    """The recipe's `.nemo` file: shipped, NVIDIA's, local, or trained now on the control voices."""
    if params.pretrained != "controls":
        return nemo.find(params)
    folder = produce(
        params.folder / "pretrained",
        lambda partial: _build(partial, params),
        what="pretraining",
        parameters=params.pretraining,
        inputs=[prepare.make(params)],
        seed=params.seed,
        code=CODE,
    )
    return folder / "pretrained.nemo"


def heard(params: Params) -> dict | None:
    """Whom and what the recipe's pretrained model has heard, where that is known."""
    if params.pretrained == "nemo":
        return None
    path = (
        nemo.SHIPPED.with_suffix(".heard.json")
        if params.pretrained == "shipped"
        else pretrained(params).with_name("heard.json")
    )
    return json.loads(path.read_text(encoding="utf-8"))


def _build(partial: Path, params: Params) -> None:
    import torch

    from kdlib import train as training

    settings = params.pretraining
    corpus = prepare.load(params)
    controls = split_controls(corpus, params)
    tokenizer = train(
        (utt.text for utt in corpus if utt.text not in controls.unseen_words),
        settings.pieces,
        partial / "tokens",
        lower=True,
    )
    training.seed_everything(params.seed)
    model = nemo.build(tokenizer, settings)
    tokens = Tokens.for_nemo(tokenizer.read_bytes())

    def step(batch: tuple) -> dict[str, torch.Tensor]:
        samples, lengths, targets, sizes = batch
        logits, frames, _ = model.forward(input_signal=samples, input_signal_length=lengths)
        loss = torch.nn.functional.ctc_loss(
            logits.transpose(0, 1), targets, frames, sizes, blank=tokens.blank, zero_infinity=True
        )
        return {"loss": loss}

    def read(utterances: Sequence[Utterance]) -> tuple:
        samples, lengths = audio.collate(utterances)
        ids = [torch.tensor(tokens.encode(utt.text)) for utt in utterances]
        sizes = torch.tensor([len(one) for one in ids])
        return samples, lengths, torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), sizes

    epochs = training.Epochs(
        lambda epoch: audio.batches(controls.train, settings.batch_size, seed=params.seed * 1009 + epoch), read
    )
    task = training.Task(model, step, lr=settings.lr, warmup_steps=settings.warmup_steps, total_steps=settings.steps)
    training.fit(task, epochs, folder=partial, what="pretraining", steps=settings.steps, seed=params.seed)
    model.save_to(str(partial / "pretrained.nemo"))
    write_json(
        partial / "heard.json",
        {
            "speakers": sorted({utt.speaker for utt in controls.train}),
            "utterances": len(controls.train),
            "words": sorted({utt.text for utt in controls.train}),
            "unseen_words": sorted(controls.unseen_words),
            "test_speakers": sorted({utt.speaker for utt in controls.test}),
            "tokens": tokens.fingerprint,
        },
    )
    (partial / training.CHECKPOINT).unlink()


def ship(params: Params) -> None:
    """Copy a recipe's pretrained model and its provenance into the package."""
    made = pretrained(params)
    shipped = nemo.SHIPPED
    for name, suffix in (("run.json", ".run.json"), ("heard.json", ".heard.json"), (made.name, ".nemo")):
        with writing(shipped.with_suffix(suffix)) as hidden:
            shutil.copyfile(made.with_name(name), hidden)
    print(f"{shipped}: {shipped.stat().st_size / 1e6:.2f} MB, sha256 {sha256(shipped)[:16]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the small pretrained model on the embedded control voices.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--ship", action="store_true", help="put it into the package")
    choice = parser.parse_args()
    try:
        settings = load(choice.recipe, fold_names()[0], overrides={"pretrained": "controls"})
        ship(settings) if choice.ship else pretrained(settings)
    except UserError as error:
        sys.exit(f"\n{error}\n")
