"""Set up a student: its initial weights, speech, targets and loss.

Every variant of a recipe, hard labels only included, is set up by this code, with the same utterances in the same order
for the same seed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from kdlib.corpus import labels
from kdlib.corpus.inputs import Batch
from kdlib.corpus.speakers import Splits
from kdlib.corpus.utterances import Utterance
from kdlib.decode.beam import BeamSearch, BeamSettings
from kdlib.decode.lexicon import Lexicon, Words
from kdlib.distill.faults import limit_words
from kdlib.errors import UserError
from kdlib.models import Outputs, hybrid
from kdlib.models.augment import SpecAugment
from kdlib.objectives import terms
from kdlib.objectives.objective import Learner, Objective
from kdlib.objectives.step import Sources
from kdlib.objectives.targets import HypothesisSource, TargetSource
from kdlib.pretrained.start import Start, initial_model
from kdlib.runtime import seed_everything
from kdlib.settings.corpus import SplitSettings
from kdlib.settings.distill import Distill
from kdlib.settings.student import Faults, Student
from kdlib.tokens import Tokens
from kdlib.training.sampling import TrainingData, fits_frames, set_aside

LATEST = "latest.safetensors"
PLAIN = BeamSettings(lm_weight=0.0, word_bonus=0.0, size=10)  # of the student's own texts in training


def write_weights(model: hybrid.Hybrid, path: Path) -> None:
    """Write a model's weights."""
    save_file({name: weight.detach().contiguous() for name, weight in model.state_dict().items()}, path)


@dataclass(frozen=True)
class StudentData(TrainingData):
    """A student's training speech, and the dev speech that chooses its checkpoint."""

    too_short: int  # training utterances left out: fewer frames than tokens
    unused: int = 0  # unlabelled utterances left out, where there are no teachers


@dataclass(frozen=True)
class StudentSetup:
    """All that a student is trained with."""

    name: str  # of its variant
    seed: int
    settings: Student
    distill: Distill
    fold: SplitSettings
    tokens: Tokens
    data: StudentData
    start: Start
    model: hybrid.Hybrid
    targets: Mapping[str, TargetSource]  # by output; none where the loss uses no teachers
    hypotheses: HypothesisSource | None = None  # of the teachers, where the loss uses them
    lexicon: Lexicon | None = None  # where the loss uses it
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    difficulty: Mapping[str, float] = field(default_factory=dict)  # of utterances, for a curriculum
    tempo: Mapping[str, Sequence[float]] = field(default_factory=dict)  # factors by speaker, for mask_and_matched_tempo
    measure: str = "wra"  # that checkpoints are chosen by
    judge: TargetSource | None = None  # on dev speech, where the best checkpoint is the one closest to it

    @property
    def title(self) -> str:
        """Variant and seed, for messages."""
        return f"{self.name or 'student'}, seed {self.seed}"

    @property
    def views(self) -> int:
        """How often a batch has every utterance: with other masks, for their consistency."""
        return 2 if terms.needs(self.distill, "views") else 1

    def objective(self) -> Objective:
        """Build the training objective; layers that only training needs get random weights."""
        active = terms.active(self.distill)
        if "consistency" in active and self.settings.mixup:
            raise UserError("distill.consistency compares two views of each utterance, which mixup mixes; set one to 0")
        if self.settings.mixup and self.tempo:
            raise UserError("student: mixup mixes utterances of one tempo; write augment: mask, or mixup: 0")
        pairs = terms.matched(self.distill).items() if "features" in active else ()
        widths = {layer: self.targets[output].width for layer, output in pairs}
        tap = self.distill.intermediate.layer if terms.needs(self.distill, "layer") else 0
        search = BeamSearch(self.tokens, None, None, PLAIN) if terms.needs(self.distill, "search") else None
        sources = Sources(self.targets, self.hypotheses, self.lexicon, search)
        more = {"shares_head": self.distill.intermediate.shared, "averages": terms.needs(self.distill, "average")}
        return Objective(Learner(self.model, widths, tap, **more), self.distill, terms.TERMS, sources)

    def outputs(self, utterances: Sequence[Utterance]) -> Outputs:
        """The model's CTC outputs on some speech, as it is now."""
        batch = Batch(utterances).to(self.device)
        return self.model(batch.inputs, batch.lengths)

    @property
    def train_speakers(self) -> list[str]:
        """All speakers whose transcripts the trained student knows."""
        return sorted({*self.start.train_speakers, *(utt.speaker for utt in self.data.train if utt.text)})


def select_data(
    splits: Splits, tokens: Tokens, faults: Faults, *, unlabelled: bool, dev_share: float, frame_s: float
) -> StudentData:
    """The fold's training speech and the dev speaker's speech; without one, a share of the training speech.

    Utterances with fewer frames, of `frame_s` seconds, than tokens are left out.
    """
    train, dev, seed = splits.train, splits.dev, splits.settings.seed
    if not dev:
        parts = set_aside(splits.train, dev_share, seed)
        train, dev = parts.train, parts.dev
    train = limit_words(faults, train, seed)
    labelled = train.where(lambda utt: fits_frames(tokens.encode(utt.text), utt.duration_s, frame_s))
    too_short = len(train) - len(labelled)
    others = splits.unlabelled.where(lambda utt: fits_frames([0], utt.duration_s, frame_s))
    train = labelled + others if unlabelled else labelled  # otherwise the loss has nothing for unlabelled speech
    if not train or not dev:
        raise UserError(
            f"student: {len(train)} training utterances and {len(dev)} dev utterances; check fold.dev, fold.train and "
            "blocks"
        )
    return StudentData(train, dev, too_short, 0 if unlabelled else len(others))


def initial_student(settings: Student, tokens: Tokens, start: Start, seed: int, faults: Faults) -> hybrid.Hybrid:
    """Build the student before training."""
    if start.resumed:
        seed_everything(seed)
        model, _, _ = hybrid.load(start.resumed, start.file)
    else:
        model, _ = initial_model(settings, tokens, start, seed, new_head=faults.untrained_head)
    model.encoder.preprocessor_frozen = settings.freeze_preprocessor
    model.encoder.spec_augment = SpecAugment.of(settings)
    return model


def check_lexicon(distill: Distill, lexicon: Words, few_labels: bool, *, chooses: bool = False) -> None:
    """Refuse to choose among the entries of a lexicon that are whole sentences."""
    active = terms.active(distill)
    by_word = any("lexicon" in term.needs for term in active.values())
    by_text = any("texts" in term.needs for term in active.values())
    listed = (
        by_word or chooses or (by_text and distill.sequence.weight and distill.sequence.hypotheses_from == "lexicon")
    )
    if sum(" " in word for word in lexicon) > len(lexicon) / 2 and (
        listed or ("occupancy_ctc" in active and few_labels)
    ):
        raise UserError(
            "distill: words, hard_words, sequence over the lexicon, occupancy of unlabelled speech, and "
            "student.choose_by: words choose among "
            f"the entries of the lexicon, but most of these {len(lexicon):,} are whole sentences, including those of "
            "unlabelled and test speech; write distill: {sequence: {weight: 0.5, hypotheses_from: beam}} (or "
            "hypotheses_from: greedy), or name a lexicon of words"
        )


def check_resumed(folder: Path, record: dict, settings: Student, tokens: Tokens, fold: SplitSettings) -> None:
    """Refuse to resume from a student that does not fit the recipe, or was trained on the held-out or dev speaker."""
    if record["tokens"] != tokens.fingerprint:
        raise UserError(f"student.resume: {folder} was trained with a different tokenizer than this recipe's")
    if why := labels.leaks(record.get("labels"), fold):
        raise UserError(f"student.resume: {folder} {why}")
    if leaked := sorted(set(record["train_speakers"]) & set(fold.excluded_speakers)):
        names = ", ".join(leaked)
        raise UserError(f"student.resume: {folder} was trained on {names}, which this fold excludes from training")
    layers = record["heads"]["layers"]
    if record["encoder"] != settings.encoder or layers != settings.decoder_layers:
        raise UserError(
            f"student.resume: {folder} has the encoder {record['encoder']} and {layers} decoder layers, "
            f"the recipe has {settings.encoder} and {settings.decoder_layers}"
        )
