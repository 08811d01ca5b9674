"""Adapt a trained student to a speaker whose speech has no transcripts, beside labelled speech of others.

A word's posterior among the closed lexicon, by calibrated students, is the target. Two models are trained alike: one on
the dev speaker's training blocks, whose validations on dev test speech choose the number of steps, and one on the
held-out speaker's, for that many steps. Nothing of the held-out speaker's test speech is used, and no transcript. An
alarm that needs no transcripts watches how many different words are recognised in the adaptation speech.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kdlib.console import report
from kdlib.corpus import audio, labels
from kdlib.corpus.inputs import Batch
from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import adaptation_speech
from kdlib.corpus.utterances import Utterance
from kdlib.decode import calibration
from kdlib.decode.calibration import CalibratedLexicon, towards_prior, word_prior
from kdlib.decode.greedy import greedy
from kdlib.decode.lexicon import Lexicon
from kdlib.distill.setup import check_lexicon
from kdlib.distill.students import Watch, scale_of, validate
from kdlib.errors import UserError
from kdlib.io import read_json, write_json
from kdlib.models import hybrid
from kdlib.models.augment import SpecAugment
from kdlib.models.encoder_cache import FeatureCache
from kdlib.objectives import terms
from kdlib.objectives.objective import Learner, Objective
from kdlib.objectives.step import Sources
from kdlib.settings.adaptation import DEV_MODEL, UNLABELLED, Adaptation
from kdlib.settings.corpus import SplitSettings
from kdlib.settings.distill import Distill, EntropyTerm, SequenceTerm, WordTerm
from kdlib.settings.schedule import Progress, constant
from kdlib.settings.student import Student
from kdlib.targets.word_posteriors import (
    AverageTargets,
    Recogniser,
    StudentRecogniser,
    WordTargets,
    agreement,
    word_posteriors,
)
from kdlib.tokens import BLANK, Tokens, normalise
from kdlib.training.checkpoints import last_weights
from kdlib.training.curves import TENSORBOARD, read_curves
from kdlib.training.loop import EpochData, Run, Task, Validations, fit
from kdlib.training.sampling import BatchPlan

HELD_OUT, ALARM = "tensorboard_held_out", "alarm.json"  # curves without transcripts; in the folder of a round
FEW, MANY = 0.5, 0.25  # of the words at first; of all hypotheses: the alarm


@dataclass(frozen=True)
class Speech:
    """A speaker's adaptation speech."""

    speaker: str
    utterances: Sequence[Utterance]  # without transcripts, unless these are the targets


@dataclass(frozen=True)
class AdaptationSetup:
    """All that a student is adapted with."""

    name: str
    seed: int
    how: Adaptation
    settings: Student
    distill: Distill
    fold: SplitSettings
    tokens: Tokens
    lexicon: Lexicon
    start: Path  # the folder of the trained student
    recognisers: Callable[[], list[Recogniser]]  # whose mean posterior is the target
    labelled: Sequence[Utterance]
    dev: Sequence[Utterance]  # test speech of the dev speaker
    speech: Speech
    dev_speech: Speech | None
    train_speakers: Sequence[str]
    measure: str = "wra"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def check(how: Adaptation, distill: Distill, settings: Student) -> None:
    """Refuse recipes that cannot be adapted."""
    if how.speech == "test" and how.targets not in UNLABELLED:
        raise UserError(
            f"adapt: speech is test, whose transcripts nothing may be trained on, and targets is {how.targets!r}; "
            f"write one of {', '.join(UNLABELLED)}"
        )
    if how.share == 1 and how.targets == "none":
        raise UserError("adapt: a share of 1 leaves no labelled speech to go on with; write a smaller one")
    if how.agreement and not how.members(1):
        raise UserError("adapt: agreement is that of a student under dropout; name one in teachers, or remove it")
    ignored = ("prior", "confidence", "agreement")
    if how.targets in ("entropy", "references", "none") and (
        unused := [name for name in ignored if getattr(how, name)]
    ):
        raise UserError(f"adapt: targets {how.targets!r} have no use for {', '.join(unused)}; remove it")
    if terms.uses_teachers(distill) or distill.heads != "ctc":
        raise UserError(
            "adapt: `distill` is the loss of the labelled speech, of CTC and without teachers (adapt.teachers names "
            "the students that give targets); write distill: {use_teachers: false, alpha: 0, beta: 0.5}"
        )
    if len(settings.phases) != 1 or settings.phases[0].steps is None or settings.phases[0].freeze_encoder:
        raise UserError(
            "adapt: write one phase of steps in student.phases, and a free encoder (every speaker has other epochs)"
        )
    if others := sorted(set(terms.active(distill)) - {"ctc", "hard_words"}):
        raise UserError(f"adapt: the loss of the labelled speech is CTC and hard_words; remove {', '.join(others)}")
    if settings.mixup or settings.curriculum:
        raise UserError(
            "adapt: batches have adaptation speech and labelled speech as they are; remove mixup, curriculum"
        )


def speech_of(corpus: Corpus, speaker: str, how: Adaptation, settings: SplitSettings) -> Speech:
    """A speaker's adaptation speech; transcripts are there only if they are targets."""
    own = adaptation_speech(corpus, speaker, settings, test=how.speech == "test")
    known = how.targets == "references"
    return Speech(speaker, [utt if known else utt.replace(text="") for utt in own])


def recogniser(scores: Path, lexicon: Lexicon) -> StudentRecogniser:
    """A scored student with its calibrated lexicon."""
    found = calibration.of_scores(scores).get("lexicon")
    words = CalibratedLexicon(lexicon, found) if found else lexicon
    return StudentRecogniser(hybrid.load(scores.parent)[0].eval(), words)


def adapt_student(partial: Path, setup: AdaptationSetup, watch: Watch | None = None) -> dict:
    """Adapt to the dev speaker, which chooses the number of steps, and then to the held-out speaker.

    Returned are the encoder's passes, of both.
    """
    passes: Counter[str] = Counter()
    steps = [setup.settings.phases[0].steps] * setup.how.rounds
    if setup.dev_speech:
        model, record = _adapt(partial / "phase_dev", setup, setup.dev_speech, steps, watch, on_dev=True)
        steps = record["best_steps"]
        passes.update(record["passes"])
        (partial / DEV_MODEL).mkdir(exist_ok=True)
        _save(partial / DEV_MODEL, setup, model, setup.dev_speech, record)
    model, own = _adapt(partial / "phase_held_out", setup, setup.speech, steps, watch, on_dev=False)
    passes.update(own["passes"])
    of_dev = {name: record[name] for name in ("best_step", "best_dev_score")} if setup.dev_speech else {}
    _save(partial, setup, model, setup.speech, own | of_dev)
    for folder in partial.glob("phase_*"):
        shutil.rmtree(folder)
    return {"passes": dict(passes)}


@dataclass(frozen=True)
class MixedPlan(BatchPlan):
    """Batches of a share of adaptation speech, the rest labelled; an epoch is one of the adaptation speech."""

    speech: tuple[Utterance, ...] = ()
    each: int = 0  # utterances of it in a batch

    def part(self, utterances: Sequence[Utterance], number: int, seed: int) -> list[list[Utterance]]:
        """The batches of an epoch."""
        shuffle = seed * 1009 + number
        mine = list(audio.batches(self.speech, self.each, seed=shuffle)) if self.each else [[]] * self.groups
        others: list[list[Utterance]] = []
        rest = self.batch_size - self.each
        while len(others) < len(mine):
            again = shuffle + 1_000_003 * (1 + len(others))
            wanted = len(mine) - len(others)
            others += audio.batches(utterances, rest, seed=again)[:wanted] if rest else [[]] * wanted
        return [[*own, *other] for own, other in zip(mine, others, strict=True)]


def _adapt(
    folder: Path, setup: AdaptationSetup, speech: Speech, steps: Sequence[int], watch: Watch | None, *, on_dev: bool
) -> tuple[hybrid.Hybrid, dict]:
    """Adapt to a speaker in rounds of so many steps each; returned are the model and its record."""
    model, _, start = hybrid.load(setup.start)
    best, alarm, score, passes = [], "", start.get("best_dev_score", 0.0), Counter()
    for number, count in enumerate(steps):
        of_round = folder / f"round{number + 1}"
        of_round.mkdir(parents=True, exist_ok=True)
        targets = _targets(setup, model, speech, again=number > 0)
        kept = len(targets.posteriors) if targets else len(speech.utterances)
        done = _Round(setup, speech, targets, number, on_dev, watch).train(of_round, model, count) if count else {}
        best.append(int(done.get("best_step", 0)))
        passes.update(done.get("passes", {}))
        alarm, score = alarm or done.get("alarm", ""), done.get("best_dev_score", score)
    record = {"best_steps": best, "best_step": sum(best), "best_dev_score": round(score, 6), "alarm": alarm}
    record["passes"] = dict(passes)
    return model.eval(), record | {"utterances_kept": kept}


def _targets(setup: AdaptationSetup, model: hybrid.Hybrid, speech: Speech, *, again: bool) -> WordTargets | None:
    """The posteriors of a round, of the utterances that are kept."""
    how, utterances = setup.how, list(speech.utterances)
    if how.targets in ("entropy", "references", "none"):
        return None
    check_lexicon(Distill(words=WordTerm(weight=how.weight)), setup.lexicon.words, few_labels=False)
    recognisers = setup.recognisers()
    if again:
        recognisers = [StudentRecogniser(model.eval(), _calibrated(recognisers, setup.lexicon))]
    posteriors = word_posteriors(recognisers, utterances)
    if how.prior and posteriors:
        names, rows = list(posteriors), torch.stack(list(posteriors.values())).double().numpy()
        prior = word_prior(setup.lexicon.words, Counter(normalise(utt.text) for utt in setup.labelled))
        moved = towards_prior(rows, prior, how.prior)
        posteriors = dict(zip(names, torch.from_numpy(moved).float(), strict=True))
    best = {name: int(row.argmax()) for name, row in posteriors.items()}
    kept = {name for name, row in posteriors.items() if float(row.max()) >= how.confidence}
    if how.agreement:
        same = agreement(recognisers[0], utterances, best)
        kept = {name for name in kept if same[name] >= how.agreement}
    rows = {name: row for name, row in posteriors.items() if name in kept}
    report(
        f"{setup.name}, seed {setup.seed}: {len(rows)} of {len(utterances)} utterances of {speech.speaker} have targets"
    )
    kind = AverageTargets if how.targets == "average" else WordTargets
    targets = kind(setup.lexicon, setup.tokens, rows)
    if isinstance(targets, AverageTargets):
        targets.calibrated = _calibrated(recognisers, setup.lexicon)
    return targets


def _calibrated(recognisers: Sequence[Recogniser], plain: Lexicon) -> Lexicon:
    """The lexicon of the first student among the recognisers, which is calibrated; the plain one without students."""
    return next((one.lexicon for one in recognisers if isinstance(one, StudentRecogniser)), plain)


@dataclass(frozen=True)
class _Round:
    """A round of training on a speaker's speech."""

    setup: AdaptationSetup
    speech: Speech
    targets: WordTargets | None
    number: int
    on_dev: bool  # validate on dev speech, and end with the best weights there; otherwise with the last
    watch: Watch | None

    def train(self, folder: Path, model: hybrid.Hybrid, steps: int) -> dict:
        """Train so many steps of the schedule; returned is the record."""
        setup, speech, targets = self.setup, self.speech, self.targets
        how, settings, tokens = setup.how, setup.settings, setup.tokens
        phase, total = settings.phases[0], settings.phases[0].steps
        model.encoder.preprocessor_frozen = settings.freeze_preprocessor
        model.encoder.spec_augment = SpecAugment.of(settings)
        if how.trains == "norms":
            only_norms(model)
        learner = Learner(model.train(), averages=how.targets == "average")
        words = setup.lexicon
        if how.targets == "entropy":
            words = _calibrated(setup.recognisers(), words)
        sources = Sources({"ctc": targets} if targets else {}, targets, words)
        objective = Objective(learner, _loss(setup, targets), terms.TERMS, sources)
        objective.cache = FeatureCache(model.encoder) if settings.freeze_preprocessor else None
        if isinstance(targets, AverageTargets):
            targets.objective = objective
        plan, curves = _plan(setup, speech), folder.parent.parent / (TENSORBOARD if self.on_dev else HELD_OUT)
        dev = [Batch.of(batch, tokens) for batch in audio.batches(setup.dev, 32)] if self.on_dev else []
        own = [Batch(batch) for batch in audio.batches(speech.utterances, 32)]
        alarm = SpeechAlarm(f"{setup.name}, seed {setup.seed}, adapted to {speech.speaker},", folder / ALARM)

        def step(batch: Batch) -> dict[str, torch.Tensor]:
            learner.update_average(how.decay)
            if model.encoder.spec_augment:
                model.encoder.spec_augment.done = 1.0
            return objective(batch, Progress(task.global_step / total, task.global_step / plan.epoch_steps))

        def validation() -> dict[str, float]:
            found = alarm(model, own)
            if not self.on_dev:
                return found | {"dev_score": float(task.global_step)}  # the last step is kept
            if self.watch:
                task.logger.experiment.flush()
                self.watch(read_curves(curves))
            words = setup.lexicon if settings.choose_by == "words" else None
            return validate(objective, dev, tokens, measure=setup.measure, words=words) | found

        earlier = self.number * total
        task = Task(learner, step, lr=phase.lr, scale=scale_of(settings, phase, total, model), earlier_steps=earlier)
        record = fit(
            task,
            EpochData(lambda part: plan.part(setup.labelled, part, setup.seed), lambda utts: Batch.of(utts, tokens)),
            Run(
                folder=folder,
                what=f"{setup.name}, seed {setup.seed}, {speech.speaker}",
                steps=steps,
                seed=setup.seed,
                clip=settings.clip,
                accumulate=settings.accumulate,
                tensorboard=curves,
                device=setup.device.type,
                batch_size=settings.batch_size,
            ),
            Validations(validation, patience=10_000),
        )
        passes = dict(zip(("forward", "backward"), last_weights(folder)["passes"].tolist(), strict=True))
        known = {"best_step": record["best_step"], "alarm": alarm.raised, "passes": passes}
        return known | ({"best_dev_score": record["best_dev_score"]} if self.on_dev else {})


def _loss(setup: AdaptationSetup, targets: WordTargets | None) -> Distill:
    """The loss of the labelled speech, and the targets'."""
    change: dict = {"use_teachers": targets is not None, "alpha": constant(0.0), "gamma": constant(0.0)}
    if targets is not None and setup.how.targets == "one_best":
        change["sequence"] = SequenceTerm(weight=setup.how.weight, weight_by_confidence=False)
    elif targets is not None:
        change["words"] = WordTerm(weight=setup.how.weight)
    elif setup.how.targets == "entropy":
        change["word_entropy"] = EntropyTerm(weight=setup.how.weight, diversity=setup.how.diversity)
    return setup.distill.model_copy(update=change)


def _plan(setup: AdaptationSetup, speech: Speech) -> MixedPlan:
    size, how = setup.settings.batch_size, setup.how
    most = size if how.share == 1 else size - 1
    each = 0 if how.targets == "none" else min(most, max(1, round(size * how.share)))
    groups = -(-len(speech.utterances) // max(1, each or round(size * how.share)))
    return MixedPlan(size, groups, 1, groups, [groups], tuple(speech.utterances), each)


def only_norms(model: hybrid.Hybrid) -> None:
    """Train nothing but the scales and shifts of normalisation layers (as TENT does, Wang et al. 2021)."""
    model.requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, torch.nn.LayerNorm | torch.nn.modules.batchnorm._BatchNorm):
            layer.requires_grad_(True)


class SpeechAlarm:
    """Watches what is recognised in the adaptation speech, without transcripts: fewer words, or one word everywhere."""

    def __init__(self, what: str, file: Path) -> None:
        """`file` keeps what it saw, for a run that is killed and resumes."""
        self.what, self.file, self.raised, self.first = what, file, "", 0
        if file.is_file():
            vars(self).update(read_json(file))

    def __call__(self, model: hybrid.Hybrid, speech: Sequence[Batch]) -> dict[str, float]:
        """The number of different hypotheses, and the share of the most frequent one."""
        counts: Counter[tuple[int, ...]] = Counter()
        device = next(model.parameters()).device
        with torch.inference_mode():
            for batch in speech:
                moved = batch.to(device)
                counts.update(map(tuple, greedy(model(moved.inputs, moved.lengths).ctc, BLANK)))
        found, most = len(counts), max(counts.values()) / max(1, counts.total())
        self.first = self.first or found
        few, same = found < FEW * self.first, most >= MANY and counts.total() > 4
        if (few or same) and not self.raised:
            self.raised = f"{found} different hypotheses, {self.first} at first; {100 * most:.0f} % are the same"
            print(f"ALARM: {self.what} collapses: {self.raised}", flush=True)
        write_json(self.file, {"first": self.first, "raised": self.raised})
        return {"speech_distinct": float(found), "speech_most_frequent": most}


def _save(folder: Path, setup: AdaptationSetup, model: hybrid.Hybrid, speech: Speech, record: dict) -> None:
    how, known = setup.how, {*setup.train_speakers, *(utt.speaker for utt in setup.labelled)}
    own = setup.fold.model_copy(update={"held_out": speech.speaker})
    remark = {
        "none": "",
        "references": "adapted on the held-out speaker's transcribed speech: an upper bound",
    }.get(how.targets, "adapted on the held-out speaker's untranscribed speech")
    if how.speech == "test":
        remark = "adapted on the scored speech itself, without transcripts: transductive"
    hybrid.save(
        model,
        setup.tokens,
        folder,
        train_speakers=sorted(known | ({speech.speaker} if how.targets == "references" else set())),
        labels=labels.record(own, unlabelled_held_out=how.targets != "none"),
        variant=setup.name,
        seed=setup.seed,
        uses_teachers=how.targets in UNLABELLED,
        references_only=how.targets in ("references", "none"),
        heads_trained=["ctc"],
        adapted_to=speech.speaker,
        adaptation_utterances=len(speech.utterances),
        remark=remark,
        steps=setup.settings.phases[0].steps * how.rounds,
        **record,
    )
