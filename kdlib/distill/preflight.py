"""Preflight: check before training that a distillation can work; each check passes, warns or refuses, with its reason.

`run_checks` computes on a sample of the fold's training speech what the checks (`checks.py`) judge; `require` stops a
run that one of them refuses.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kdlib.corpus import audio
from kdlib.corpus.inputs import Batch
from kdlib.corpus.speakers import Splits
from kdlib.corpus.utterances import Utterance
from kdlib.corpus.views import View, same
from kdlib.decode.greedy import greedy
from kdlib.distill import checks
from kdlib.distill.checks import PASS, REFUSE, WARN, Check
from kdlib.distill.setup import StudentData, StudentSetup
from kdlib.errors import UserError
from kdlib.io import write_json
from kdlib.logits.store import LogitStore
from kdlib.models import Emissions
from kdlib.models.decoder import teacher_forced
from kdlib.models.hybrid import TrainedModel
from kdlib.objectives import losses, term, terms
from kdlib.settings.distill import Distill
from kdlib.settings.schedule import Progress
from kdlib.settings.student import Faults
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.targets.target_report import sample_utterances
from kdlib.tokens import BLANK, EOS, Tokens, normalise, pieces_per_word
from kdlib.training.validation import Recognised

SAMPLE, LIVE, GRADIENTS = 64, 2, 8  # utterances: of the sample, per teacher for live outputs, for gradients


@dataclass(frozen=True)
class Plan:
    """What is known of a student before anything is loaded."""

    splits: Splits
    tokens: Tokens
    data: StudentData
    requested: Distill  # the loss that the recipe names
    used: Distill  # and the one that is carried out: a decoder may be left out
    faults: Faults
    text_of: Callable | None = None  # decodes token ids to text, where that is a fault
    switched: bool = False  # decoder distillation across encoders was asked for


@dataclass(frozen=True)
class Teachers:
    """What the checks of teachers need."""

    stores: Mapping[str, LogitStore]  # of the main output, as they are on disk
    folders: Mapping[str, Path]  # of their models, where these are there
    setup: Callable[[], StudentSetup]  # called once the stores are known to fit together
    gains: pd.DataFrame  # over their parent, where they have one: see `parent_scores.read_gains`
    on_dev: Callable[[], TeacherEnsemble] | None = None  # their outputs on dev speech, where there is any
    control_on_dev: float | None = None  # WRA, or 1 - WER, of the student without teachers
    measure: str = "wra"
    view: View = same  # the recordings that teachers get


def require(results: Sequence[Check], allowed: Sequence[str], name: str) -> None:
    """Stop if a check refuses, unless the recipe allows it."""
    refused = [check for check in results if check.verdict == REFUSE and check.name not in allowed]
    if refused:
        reasons = "\n".join(f"  {check.name}: {check.reason}" for check in refused)
        allow = ", ".join(check.name for check in refused)
        raise UserError(
            f"preflight of {name} refuses to train:\n{reasons}\n"
            f"correct this; or, to train all the same, write in the recipe: distill: {{allow: [{allow}]}}"
        )


def table(results: Sequence[Check]) -> pd.DataFrame:
    """One row per check, the most severe first."""
    order = {REFUSE: 0, WARN: 1, PASS: 2}
    rows = sorted(results, key=lambda check: order[check.verdict])
    return pd.DataFrame([asdict(check) for check in rows]).rename(columns={"name": "check"}).set_index("check")


def run_checks(partial: Path, plan: Plan, teachers: Teachers | None = None) -> None:
    """Run all checks that apply to a student, and write them; `teachers` where its loss uses them."""
    splits, data, used = plan.splits, plan.data, plan.used
    labelled = [utt.text for utt in data.train if utt.text]
    train, test = set(labelled), [utt.text for utt in splits.test]
    heads = list(term.heads(used))
    results = [
        checks.check_decoding(plan.tokens, [*train, *test], plan.text_of),
        _check_pieces(plan.tokens, [*train, *test]),
        checks.check_choice(plan.faults.choose_by),
        checks.check_heads(["ctc", *heads] if plan.faults.untrained_head else heads, heads),
        checks.check_lengths(data.too_short, data.too_short + len(labelled)),
        checks.check_words(test, sorted(train), used.heads != "ctc"),
        checks.check_dev(has_dev=bool(splits.dev)),
        _check_blocks(splits),
    ]
    if splits.settings.use_unlabelled_held_out:
        results.append(checks.check_speaker_independence(splits.settings.held_out, len(splits.unlabelled)))
    if plan.switched:
        results.append(checks.check_decoder_kd(plan.requested, used))
    if teachers:
        results += _check_teachers(plan, teachers)
    write_json(partial / "checks.json", [asdict(check) for check in results])


def _check_blocks(splits: Splits) -> Check:
    """The blocks of training and test, and the test utterances that several microphones have recorded."""
    blocks, utterances = splits.settings.blocks, len({utt.spoken for utt in splits.test})
    has_blocks = all(utt.block for utt in splits.test)
    unseen = any(utt.text not in splits.train_words for utt in splits.test)
    known = (blocks.train, blocks.test) if has_blocks else None
    return checks.check_blocks(known, unseen=unseen, recordings=len(splits.test), utterances=utterances)


def _check_pieces(tokens: Tokens, texts: Sequence[str]) -> Check:
    """The pieces of a word; of a vocabulary of words, the words of the test speech that it does not have."""
    if tokens.unknown is None:
        return checks.check_pieces(pieces_per_word(tokens, texts))
    words = {word for text in texts for word in text.split()}
    unknown = sum(tokens.unknown in tokens.encode(word) for word in words)
    reason = f"the tokens are whole words; {unknown} of {len(words)} words are in no training text, and count as errors"
    return Check("pieces", WARN if unknown > len(words) / 10 else PASS, reason)


def _check_teachers(plan: Plan, teachers: Teachers) -> list[Check]:
    """The checks of the teachers' stores and targets."""
    tokens, main = plan.tokens, terms.outputs(plan.used)[0]
    headers = {name: store.header for name, store in teachers.stores.items()}
    results = [checks.check_gains(teachers.gains)] if len(teachers.gains) else []
    results += [
        checks.check_tokens(tokens, headers),
        checks.check_training_speakers(headers, list(plan.splits.settings.excluded_speakers)),
        checks.check_temperature(headers, plan.used),
    ]
    if any(check.verdict == REFUSE for check in results):
        return results  # such stores cannot be combined at all
    setup = teachers.setup()
    targets = setup.targets
    setup.model.eval().to(setup.device)
    ensemble = targets[main]
    sample = [utt for utt in sample_utterances(plan.splits, SAMPLE) if ensemble.coverage([utt.utt_id]).usable]
    if not sample:
        return [*results, Check("target", REFUSE, "no training utterance has a target; see aggregation.missing")]
    rows = {name: store.logits(next(iter(store))) for name, store in ensemble.stores.items() if len(store)}
    results.append(checks.check_logits(rows))
    references = [tokens.encode(utt.text) for utt in sample]
    if "ctc" in targets:
        results.append(_check_recording(setup, targets["ctc"], sample))
        if results[-1].verdict == REFUSE:
            return results  # no frame can be compared with another
    for output, target in targets.items():
        if output.startswith(terms.LAYER):
            continue
        logits = [target.logits(Batch([utt])).logits[0] for utt in sample]
        hypotheses = [_decode(row, output) for row in logits]
        results.append(checks.check_shift(hypotheses, references, output))
        if output == "ctc" and setup.hypotheses:
            results.append(_check_pseudo_labels(setup, sample))
            results.append(_check_short_words(setup, sample))
        if output == main:
            texts, words = [tokens.decode(ids) for ids in hypotheses], [utt.text for utt in sample]
            results.append(checks.check_target(texts, words))
            results.append(checks.check_pairs(hypotheses, references))
            correct = sum(hyp == ref for hyp, ref in zip(hypotheses, references, strict=True)) / len(sample)
            results.append(checks.check_accuracy(correct, _student_accuracy(setup, sample)))
            by_teacher = _teacher_accuracies(target, sample, references, output)
            results.append(checks.check_best_teacher(correct, by_teacher))
    if "ctc" in targets:
        results += _check_frames(setup, targets["ctc"], sample)
    if teachers.on_dev and main == "ctc":
        results.append(_check_on_dev(teachers, plan.splits.dev, tokens))
    results.append(_check_gradients(setup, sample))
    if teachers.folders:
        results.append(_check_live(setup, teachers, sample, main))
    return results


def _check_on_dev(teachers: Teachers, dev: Sequence[Utterance], tokens: Tokens) -> Check:
    """The combined teachers on dev speech, beside the student's control."""
    ensemble, recognised = teachers.on_dev(), Recognised(tokens, teachers.measure)
    usable = set(ensemble.coverage([utt.utt_id for utt in dev]).usable)
    known = [utt for utt in dev if utt.utt_id in usable]
    if not known:
        return Check("teachers on dev", PASS, "the teachers have no outputs on dev speech: not compared there")
    for batch in audio.batches(known, 16):
        given = Batch.of(batch, tokens)
        recognised.add(given, greedy(ensemble.logits(given), BLANK), 0.0)
    return checks.check_on_dev(recognised.metrics()["dev_score"], teachers.control_on_dev, teachers.measure)


def _check_pseudo_labels(setup: StudentSetup, sample: Sequence[Utterance]) -> Check:
    """The pseudo-labels of the sample, which has references."""
    source, confidence = terms.text_source(setup.distill)
    best = zip(setup.hypotheses.best(sample, source), sample, strict=True)
    labels = [(share, text == normalise(utt.text)) for (text, share), utt in best]
    return checks.check_pseudo_labels(labels, confidence, source)


def _check_short_words(setup: StudentSetup, sample: Sequence[Utterance]) -> Check:
    """The lengths of the teachers' words in the closed lexicon, and of the references."""
    pairs = zip(setup.hypotheses.best(sample), sample, strict=True)
    lengths = [(len(setup.tokens.encode(text)), len(setup.tokens.encode(utt.text))) for (text, _), utt in pairs if text]
    return checks.check_short_words(*zip(*lengths, strict=True), "the teachers' words")


def _student_accuracy(setup: StudentSetup, sample: Sequence[Utterance]) -> float | None:
    """The share of the sample that the student recognises by CTC before training, unless its head is new."""
    tokens = setup.tokens
    if setup.distill.heads == "decoder" or not setup.start.head_is_trained:
        return None
    correct = 0
    for batch in audio.batches(sample, 16):
        with torch.inference_mode():
            hypotheses = greedy(setup.outputs(batch).ctc, BLANK)
        correct += sum(ids == tokens.encode(utt.text) for ids, utt in zip(hypotheses, batch, strict=True))
    return correct / len(sample)


def _check_recording(setup: StudentSetup, ensemble: TeacherEnsemble, sample: Sequence[Utterance]) -> Check:
    """The frame counts of the stores against the student's."""
    expected: dict[str, int] = {}
    for batch in audio.batches(sample, 16):
        with torch.inference_mode():
            outputs = setup.outputs(batch)
        expected |= {utt.utt_id: length for utt, length in zip(batch, outputs.lengths.tolist(), strict=True)}
    frames = {
        name: {utt.utt_id: store.frames(utt.utt_id) for utt in sample if utt.utt_id in store}
        for name, store in ensemble.stores.items()
    }
    return checks.check_recording(frames, expected, ensemble.stride_ms, setup.model.encoder.stride_ms)


def _check_frames(setup: StudentSetup, ensemble: TeacherEnsemble, sample: Sequence[Utterance]) -> list[Check]:
    """The checks of blanks and spikes, from the frames of student and teachers."""
    shifts, fits, mass = [], [], []
    for batch in audio.batches(sample, 16):
        with torch.inference_mode():
            outputs = setup.outputs(batch)
        for utt, length, row in zip(batch, outputs.lengths.tolist(), outputs.ctc.logits.cpu(), strict=True):
            target, _ = ensemble.logits(Batch([utt]))
            count = min(length, target.shape[1])
            target = target[:, :count]
            lengths = torch.tensor([count])
            shift, _ = losses.best_shift(row[None, :count], target, lengths, 5, BLANK)
            _, fit = losses.best_shift(row[None, :count], target, lengths, 0, BLANK)
            shifts, fits = [*shifts, int(shift)], [*fits, float(fit)]
            mass.append(float(target.softmax(-1)[..., BLANK].mean()))
    blanks = checks.check_blanks(float(np.mean(mass)), setup.distill.blanks == "drop_blank")
    if setup.start.head_is_trained:
        return [blanks, checks.check_spikes(shifts, fits)]
    return [blanks, Check("spikes", PASS, "the student's CTC head is new: it has no spikes yet to compare")]


def _check_gradients(setup: StudentSetup, sample: Sequence[Utterance]) -> Check:
    """The gradient norms of the teachers' terms and of all others, before training, where they weigh most."""
    setup.model.freeze(setup.settings.phases[0].freeze_encoder)
    objective = setup.objective()
    objective.learner.to(setup.device)
    batch = Batch.of(sample[:GRADIENTS], setup.tokens).to(setup.device)
    weights = [weight for weight in objective.learner.student.parameters() if weight.requires_grad]
    norms = []
    for of_teachers in (True, False):
        of_side = {name: term for name, term in objective.terms.items() if (term.side == "teachers") == of_teachers}
        schedules = [term.weight(setup.distill) for term in of_side.values()]
        heaviest = max((Progress(), Progress(1.0, math.inf)), key=lambda now: sum(one.at(now) for one in schedules))
        parts = objective.parts(batch, heaviest)
        loss = sum(
            (weight * value for name, (weight, value) in parts.items() if name in of_side),
            torch.zeros((), device=setup.device),
        )
        norms.append(0.0)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, weights, allow_unused=True)
            norms[-1] = math.sqrt(sum(float(grad.pow(2).sum()) for grad in grads if grad is not None))
    return checks.check_gradients(*norms)


def _check_live(setup: StudentSetup, teachers: Teachers, sample: Sequence[Utterance], output: str) -> Check:
    """Every teacher's outputs computed again; reported is the one that differs most from its store."""
    worst = -1.0, ""
    for name, store in setup.targets[output].stores.items():
        teacher = TrainedModel(teachers.folders[name], setup.device.type)
        utts = teachers.view([utt for utt in sample if utt.utt_id in store][:LIVE])
        batch = Batch.of(utts, teacher.tokens).to(setup.device)
        given = teacher_forced(batch.ids)[0].to(setup.device) if output == "decoder" else None
        with torch.inference_mode():
            outputs = teacher.model(batch.inputs, batch.lengths, given)
        logits = (outputs.ctc.logits if output == "ctc" else outputs.decoder_logits).cpu()
        for row, utt in zip(logits, utts, strict=True):
            stored = store.logits(utt.utt_id).log_softmax(-1)
            live = row[: len(stored)].log_softmax(-1)
            kl = float((live.exp() * (live - stored)).sum(-1).mean()) if len(live) == len(stored) else math.inf
            worst = max(worst, (kl, name))
    return checks.check_live(*worst)


def _teacher_accuracies(
    ensemble: TeacherEnsemble, sample: Sequence[Utterance], references: Sequence[Sequence[int]], output: str
) -> dict[str, float]:
    """The share of the sample that each teacher recognises."""
    accuracies = {}
    for name, store in ensemble.stores.items():
        pairs = [(utt, ids) for utt, ids in zip(sample, references, strict=True) if utt.utt_id in store]
        correct = sum(_decode(store.logits(utt.utt_id), output) == ids for utt, ids in pairs)
        accuracies[name] = correct / max(1, len(pairs))
    return accuracies


def _decode(logits: torch.Tensor, output: str) -> list[int]:
    """The tokens of logits [T, V]; of a teacher-forced decoder the best at every step before EOS."""
    if output == "ctc":
        return greedy(Emissions(logits[None], torch.tensor([len(logits)])), BLANK)[0]
    return list(itertools.takewhile(lambda token: token != EOS, logits.argmax(-1).tolist()))
