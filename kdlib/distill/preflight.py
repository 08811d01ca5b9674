"""Preflight: check before training that a distillation can work; each check passes, warns or refuses, with its reason.

`preflight` computes on a sample of the fold's training speech what the checks (`checks.py`) judge; `require` stops a
run that one of them refuses.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kdlib.corpus import audio, prepare
from kdlib.corpus.manifest import Utterance
from kdlib.corpus.speakers import split
from kdlib.decode.greedy import greedy
from kdlib.distill import checks, faults
from kdlib.distill.checks import PASS, REFUSE, WARN, Check
from kdlib.distill.setup import (
    SETUP_CODE,
    build_objective,
    crosses_encoders,
    initial_student,
    make_batch,
    needed_outputs,
    resolved,
    student_data,
    student_folder,
    student_inputs,
    student_settings,
    student_targets,
    teacher_hypotheses,
    text_source,
)
from kdlib.errors import UserError
from kdlib.io import read_json, write_json
from kdlib.logits import extract
from kdlib.logits.store import LogitStore
from kdlib.models import Outputs
from kdlib.models.decoder import teacher_forced
from kdlib.models.hybrid import Hybrid, TrainedModel
from kdlib.models.nemo_files import read_tokenizer
from kdlib.objectives import losses
from kdlib.params import Params
from kdlib.pretrained.model import pretrained_model
from kdlib.pretrained.pieces import load_tokens
from kdlib.stage import produce
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.targets.choice import target_teachers
from kdlib.targets.pseudo_labels import TeacherHypotheses
from kdlib.targets.target_report import sample_utterances
from kdlib.teachers.adapt import speaker_teacher
from kdlib.tokens import BLANK, EOS, Tokens, normalise

CODE = (
    *("distill/preflight.py", "distill/checks.py", "evaluate/measures.py", "targets/target_report.py"),
    *("evaluate/transcribe.py", *SETUP_CODE),
)
SAMPLE, LIVE, GRADIENTS = 64, 2, 8  # utterances: of the sample, per teacher for live outputs, for gradients


def preflight(params: Params, seed: int = 1) -> list[Check]:
    """Run all checks that apply to a recipe's student."""
    used = resolved(params)
    folder = produce(
        student_folder(params, seed).parent / f"preflight{seed if params.student.resume else ''}",
        lambda partial: _build(partial, params, used, seed),
        what=f"preflight of {params.variant or 'the student'}",
        parameters=student_settings(used) | {"asked": params.distill.heads},
        inputs=student_inputs(used, seed),
        code=CODE,
    )
    return [Check(**row) for row in read_json(folder / "checks.json")]


def require(params: Params, seed: int = 1) -> None:
    """Stop if a check refuses, unless the recipe allows it."""
    results, allowed = preflight(params, seed), params.distill.allow
    refused = [check for check in results if check.verdict == REFUSE and check.name not in allowed]
    if refused:
        reasons = "\n".join(f"  {check.name}: {check.reason}" for check in refused)
        allow = ", ".join(check.name for check in refused)
        raise UserError(
            f"preflight of {params.variant or 'the student'} refuses to train:\n{reasons}\n"
            f"correct this; or, to train all the same, write in the recipe: distill: {{allow: [{allow}]}}"
        )


def table(results: Sequence[Check]) -> pd.DataFrame:
    """One row per check, the most severe first."""
    order = {REFUSE: 0, WARN: 1, PASS: 2}
    rows = sorted(results, key=lambda check: order[check.verdict])
    return pd.DataFrame([asdict(check) for check in rows]).rename(columns={"name": "check"}).set_index("check")


def _build(partial: Path, params: Params, used: Params, seed: int) -> None:
    tokens = load_tokens(params)
    splits, data = split(prepare.load(params), params), student_data(params, tokens)
    labelled = [utt.text for utt in data.train if utt.text]
    train, test = set(labelled), [utt.text for utt in splits.test]
    heads = ["ctc", "decoder"] if used.distill.heads == "both" else [used.distill.heads]
    text_of = faults.text_decoder(params, tokens) if faults.changes_decoding(params) else None
    results = [
        checks.check_decoding(tokens, [*train, *test], text_of),
        checks.check_choice(params.faults.choose_by),
        checks.check_heads(["ctc", *heads] if params.faults.untrained_head else heads, heads),
        checks.check_lengths(data.too_short, data.too_short + len(labelled)),
        checks.check_words(test, sorted(train), used.distill.heads != "ctc"),
    ]
    if params.use_unlabelled_held_out:
        results.append(checks.check_speaker_independence(params.held_out, len(splits.unlabelled)))
    if crosses_encoders(params):
        results.append(checks.check_decoder_kd(params.distill, used.distill))
    if used.distill.uses_teachers:
        results += _check_teachers(used, tokens, seed)
    write_json(partial / "checks.json", [asdict(check) for check in results])


def _check_teachers(params: Params, tokens: Tokens, seed: int) -> list[Check]:
    """The checks of the teachers' stores and targets."""
    names = target_teachers(params, params.aggregation.method)
    main = needed_outputs(params)[0]
    headers = {name: extract.open_store(params, name, "training", main).header for name in names}
    excluded = [name for name in (params.held_out, params.fold.dev) if name]
    results = [
        checks.check_tokens(tokens, headers),
        checks.check_training_speakers(headers, excluded),
        checks.check_temperature(headers, params.distill),
    ]
    if any(check.verdict == REFUSE for check in results):
        return results  # such stores cannot be combined at all
    targets = student_targets(params)
    ensemble = targets[main]
    sample = [utt for utt in sample_utterances(params, SAMPLE) if ensemble.coverage([utt.utt_id]).usable]
    if not sample:
        return [*results, Check("target", REFUSE, "no training utterance has a target; see aggregation.missing")]
    rows = {name: store.logits(next(iter(store))) for name, store in ensemble.stores.items()}
    results.append(checks.check_logits(rows))
    references = [tokens.encode(utt.text) for utt in sample]
    model = initial_student(params, tokens, seed).eval()
    if "ctc" in targets:
        results.append(_check_recording(targets["ctc"], sample, model))
        if results[-1].verdict == REFUSE:
            return results  # no frame can be compared with another
    for output, target in targets.items():
        logits = [target.logits([utt.utt_id], [utt.speaker])[0][0] for utt in sample]
        hypotheses = [_decode(row, output) for row in logits]
        results.append(checks.check_shift(hypotheses, references, output))
        if output == "ctc" and (pseudo_labels := teacher_hypotheses(params, targets)):
            results.append(_check_pseudo_labels(params, pseudo_labels, sample))
        if output == main:
            texts, words = [tokens.decode(ids) for ids in hypotheses], [utt.text for utt in sample]
            results.append(checks.check_target(texts, words))
            results.append(checks.check_pairs(hypotheses, references))
            correct = sum(hyp == ref for hyp, ref in zip(hypotheses, references, strict=True)) / len(sample)
            results.append(checks.check_accuracy(correct, _student_accuracy(params, model, sample, tokens)))
            by_teacher = _teacher_accuracies(target, sample, references, output)
            results.append(checks.check_best_teacher(correct, by_teacher))
    if "ctc" in targets:
        results += _check_frames(params, targets["ctc"], sample, model)
    results.append(_check_gradients(params, model, targets, sample, tokens))
    results.append(_check_live(params, ensemble.stores, sample, main))
    return results


def _check_pseudo_labels(params: Params, pseudo_labels: TeacherHypotheses, sample: Sequence[Utterance]) -> Check:
    """The pseudo-labels of the sample, which has references."""
    source, confidence = text_source(params)
    best = zip(pseudo_labels.best(sample, source), sample, strict=True)
    labels = [(share, text == normalise(utt.text)) for (text, share), utt in best]
    return checks.check_pseudo_labels(labels, confidence, source)


def _student_accuracy(params: Params, model: Hybrid, sample: Sequence[Utterance], tokens: Tokens) -> float | None:
    """The share of the sample that the student recognises by CTC before training, unless its head is new."""
    if params.distill.heads == "decoder" or not _head_is_trained(params):
        return None
    correct = 0
    for batch in audio.batches(sample, 16):
        with torch.inference_mode():
            hypotheses = greedy(model(*audio.collate(batch)), BLANK)
        correct += sum(ids == tokens.encode(utt.text) for ids, utt in zip(hypotheses, batch, strict=True))
    return correct / len(sample)


def _check_recording(ensemble: TeacherEnsemble, sample: Sequence[Utterance], model: Hybrid) -> Check:
    """The frame counts of the stores against the student's."""
    expected: dict[str, int] = {}
    for batch in audio.batches(sample, 16):
        with torch.inference_mode():
            outputs = model(*audio.collate(batch))
        expected |= {utt.utt_id: length for utt, length in zip(batch, outputs.lengths.tolist(), strict=True)}
    frames = {
        name: {utt.utt_id: store.frames(utt.utt_id) for utt in sample if utt.utt_id in store}
        for name, store in ensemble.stores.items()
    }
    return checks.check_recording(frames, expected, ensemble.stride_ms, model.encoder.stride_ms)


def _check_frames(params: Params, ensemble: TeacherEnsemble, sample: Sequence[Utterance], model: Hybrid) -> list[Check]:
    """The checks of blanks and spikes, from the frames of student and teachers."""
    shifts, fits, mass = [], [], []
    for batch in audio.batches(sample, 16):
        with torch.inference_mode():
            outputs = model(*audio.collate(batch))
        for utt, length, row in zip(batch, outputs.lengths.tolist(), outputs.ctc_logits, strict=True):
            target, _ = ensemble.logits([utt.utt_id], [utt.speaker])
            count = min(length, target.shape[1])
            target = target[:, :count]
            lengths = torch.tensor([count])
            shift, _ = losses.best_shift(row[None, :count], target, lengths, 5, BLANK)
            _, fit = losses.best_shift(row[None, :count], target, lengths, 0, BLANK)
            shifts, fits = [*shifts, int(shift)], [*fits, float(fit)]
            mass.append(float(target.softmax(-1)[..., BLANK].mean()))
    blanks = checks.check_blanks(float(np.mean(mass)), params.distill.blanks == "drop_blank")
    if _head_is_trained(params):
        return [blanks, checks.check_spikes(shifts, fits)]
    return [blanks, Check("spikes", PASS, "the student's CTC head is new: it has no spikes yet to compare")]


def _head_is_trained(params: Params) -> bool:
    """True if the student's CTC head is trained before this training."""
    if params.student.resume:
        return True
    if params.student.backbone == "sb":
        return params.student.start == "pretrained"
    return read_tokenizer(pretrained_model(params)) == load_tokens(params).model


def _check_gradients(
    params: Params, model: Hybrid, targets: Mapping[str, TeacherEnsemble], sample: Sequence[Utterance], tokens: Tokens
) -> Check:
    """The gradient norms of the teachers' and the references' terms at step 0."""
    settings = params.distill
    model.freeze(params.student.phases[0].freeze_encoder)
    objective = build_objective(params, model, targets)
    progress = float((settings.alpha_end or 0.0) > settings.alpha)  # the end of training, if alpha starts lower
    parts = objective.parts(make_batch(sample[:GRADIENTS], tokens), progress)
    weights = [weight for weight in objective.learner.student.parameters() if weight.requires_grad]
    norms = {}
    for kind, names in (
        ("soft", [name for name in parts if "_" in name or name == "features"]),
        ("hard", ["ctc", "decoder"]),
    ):
        loss = sum((parts[name][0] * parts[name][1] for name in names if name in parts), start=torch.zeros(()))
        norms[kind] = 0.0
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            norms[kind] = math.sqrt(sum(float(grad.pow(2).sum()) for grad in grads if grad is not None))
    return checks.check_gradients(norms["soft"], norms["hard"])


def _check_live(params: Params, stores: Mapping[str, LogitStore], sample: Sequence[Utterance], output: str) -> Check:
    """Every teacher's outputs computed again; reported is the one that differs most from its store."""
    worst = -1.0, ""
    for name, store in stores.items():
        teacher = TrainedModel(speaker_teacher(params, name))
        utts = [utt for utt in sample if utt.utt_id in store][:LIVE]
        inputs = teacher_forced([teacher.tokens.encode(utt.text) for utt in utts])[0] if output == "decoder" else None
        with torch.inference_mode():
            outputs = teacher.model(*audio.collate(utts), inputs)
        logits = outputs.ctc_logits if output == "ctc" else outputs.decoder_logits
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
        return greedy(Outputs(logits[None], torch.tensor([len(logits)]), logits), BLANK)[0]
    return list(itertools.takewhile(lambda token: token != EOS, logits.argmax(-1).tolist()))
