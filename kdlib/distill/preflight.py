"""Before any training: can this distillation work? Each check says pass, warn or refuse, and why, in a line.

`preflight` gathers what the checks (`checks.py`) judge, on a sample of the fold's training speech; `demand` stops a run
that one of them refuses.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

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
from kdlib.models.nemo_files import read_tokenizer
from kdlib.params import Params
from kdlib.pretrained.model import pretrained_model
from kdlib.pretrained.pieces import load_tokens
from kdlib.stage import produce
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.targets.choice import target_teachers
from kdlib.targets.target_report import sample_utterances
from kdlib.teachers.adapt import speaker_teacher
from kdlib.tokens import BLANK, EOS, Tokens, normalise

if TYPE_CHECKING:
    import torch

    from kdlib.models.hybrid import Hybrid
    from kdlib.targets.pseudo_labels import TeacherHypotheses

CODE = (
    "distill/preflight.py",
    "distill/checks.py",
    "evaluate/measures.py",
    "targets/target_report.py",
    "evaluate/transcribe.py",
    *SETUP_CODE,
)
SAMPLE, LIVE, GRADIENTS = 64, 2, 8  # utterances that are looked at


def preflight(params: Params, seed: int = 1) -> list[Check]:
    """All checks that apply to a recipe's student."""
    used = resolved(params)
    folder = produce(
        student_folder(params, seed).parent / f"preflight{seed if params.student.resume else ''}",
        lambda partial: _build(partial, params, used, seed),
        what=f"preflight of {params.variant or 'the student'}",
        parameters=student_settings(used) | {"asked": params.distill.heads},
        inputs=student_inputs(used, seed),
        code=CODE,
    )
    return [Check(**one) for one in read_json(folder / "checks.json")]


def require(params: Params, seed: int = 1) -> None:
    """Stop where a check refuses, unless the recipe allows that."""
    refused = [one for one in preflight(params, seed) if one.verdict == REFUSE and one.name not in params.distill.allow]
    if refused:
        reasons = "\n".join(f"  {one.name}: {one.reason}" for one in refused)
        allow = ", ".join(one.name for one in refused)
        raise UserError(
            f"preflight of {params.variant or 'the student'} refuses to train:\n{reasons}\n"
            f"mend it; or, to see what happens, write in the recipe: distill: {{allow: [{allow}]}}"
        )


def table(found: Sequence[Check]) -> pd.DataFrame:
    """One row a check, the gravest first."""
    order = {REFUSE: 0, WARN: 1, PASS: 2}
    rows = sorted(found, key=lambda one: order[one.verdict])
    return pd.DataFrame([asdict(one) for one in rows]).rename(columns={"name": "check"}).set_index("check")


def _build(partial: Path, params: Params, used: Params, seed: int) -> None:
    tokens = load_tokens(params)
    splits, chosen = split(prepare.load(params), params), student_data(params, tokens)
    told = [utt.text for utt in chosen.train if utt.text]
    train = set(told)
    heads = ["ctc", "decoder"] if used.distill.heads == "both" else [used.distill.heads]
    made = [
        checks.check_decoding(
            tokens,
            [*train, *(utt.text for utt in splits.test)],
            faults.text_decoder(params, tokens) if faults.changes_decoding(params) else None,
        ),
        checks.check_choice(params.faults.choose_by),
        checks.check_heads(["ctc", *heads] if params.faults.untrained_head else heads, heads),
        checks.check_lengths(chosen.too_short, chosen.too_short + len(told)),
        checks.check_words([utt.text for utt in splits.test], sorted(train), used.distill.heads != "ctc"),
    ]
    if params.use_unlabelled_held_out:
        made.append(checks.check_speaker_independence(params.held_out, len(splits.unlabelled)))
    if crosses_encoders(params):
        made.append(checks.check_decoder_kd(params.distill, used.distill))
    if used.distill.uses_teachers:
        made += _taught(used, tokens, seed)
    write_json(partial / "checks.json", [asdict(one) for one in made])


def _taught(params: Params, tokens: Tokens, seed: int) -> list[Check]:
    """The checks of the teachers' part."""
    names = target_teachers(params, params.aggregation.method)
    main = needed_outputs(params)[0]
    headers = {name: extract.open_store(params, name, "training", main).header for name in names}
    away = [name for name in (params.held_out, params.fold.dev) if name]
    made = [
        checks.check_tokens(tokens, headers),
        checks.check_training_speakers(headers, away),
        checks.check_temperature(headers, params.distill),
    ]
    if any(one.verdict == REFUSE for one in made):
        return made  # such stores cannot even be combined
    found = student_targets(params)
    ensemble = found[main]
    sample = [utt for utt in sample_utterances(params, SAMPLE) if ensemble.coverage([utt.utt_id]).usable]
    if not sample:
        return [*made, Check("target", REFUSE, "no training utterance has a target; see aggregation.missing")]
    rows = {name: store.logits(next(iter(store))) for name, store in ensemble.stores.items()}
    made.append(checks.check_logits(rows))
    references = [tokens.encode(utt.text) for utt in sample]
    model = initial_student(params, tokens, seed).eval()
    if "ctc" in found:
        made.append(_recording(found["ctc"], sample, model))
        if made[-1].verdict == REFUSE:
            return made  # and no frame can be compared with another
    for output, one in found.items():
        logits = [one.logits([utt.utt_id], [utt.speaker])[0][0] for utt in sample]
        said = [_read(row, output) for row in logits]
        made.append(checks.check_shift(said, references, output))
        if output == "ctc" and (guessed := teacher_hypotheses(params, found)):
            made.append(_guessed(params, guessed, sample))
        if output == main:
            texts, words = [tokens.decode(ids) for ids in said], [utt.text for utt in sample]
            made.append(checks.check_target(texts, words))
            made.append(checks.check_pairs(said, references))
            right = sum(a == b for a, b in zip(said, references, strict=True)) / len(sample)
            made.append(checks.check_accuracy(right, _before(params, model, sample, tokens)))
            made.append(checks.check_best_teacher(right, _each(one, sample, references, output)))
    if "ctc" in found:
        made += _frames(params, found["ctc"], sample, model)
    made.append(_gradients(params, model, found, sample, tokens))
    made.append(_live(params, ensemble.stores, sample, main))
    return made


def _guessed(params: Params, guessed: "TeacherHypotheses", sample: Sequence[Utterance]) -> Check:
    """The texts that teachers take the sample for."""
    over, sure = text_source(params)
    best = zip(guessed.best(sample, over), sample, strict=True)
    return checks.check_pseudo_labels([(share, text == normalise(utt.text)) for (text, share), utt in best], sure, over)


def _before(params: Params, model: "Hybrid", sample: Sequence[Utterance], tokens: Tokens) -> float | None:
    """The share of the sample that the student writes right by CTC before training, if its head is not new."""
    import torch

    if params.distill.heads == "decoder" or not _head_is_trained(params):
        return None
    right = 0
    for batch in audio.batches(sample, 16):
        with torch.inference_mode():
            said = greedy(model(*audio.collate(batch)), BLANK)
        right += sum(one == tokens.encode(utt.text) for one, utt in zip(said, batch, strict=True))
    return right / len(sample)


def _recording(ensemble: TeacherEnsemble, sample: Sequence[Utterance], model: "Hybrid") -> Check:
    """The stores' frames beside the student's."""
    import torch

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


def _frames(params: Params, ensemble: TeacherEnsemble, sample: Sequence[Utterance], model: "Hybrid") -> list[Check]:
    """What can be seen where student and teachers answer frame by frame."""
    import torch

    from kdlib.objectives import losses

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
    made = [checks.check_blanks(float(np.mean(mass)), params.distill.blanks == "drop_blank")]
    if _head_is_trained(params):
        return [*made, checks.check_spikes(shifts, fits)]
    return [*made, Check("spikes", PASS, "the student's CTC head is new: it has no spikes yet to compare")]


def _head_is_trained(params: Params) -> bool:
    """Whether the student has a CTC head that says something before training."""
    if params.student.resume:
        return True
    if params.student.backbone == "sb":
        return params.student.start == "pretrained"
    return read_tokenizer(pretrained_model(params)) == load_tokens(params).model


def _gradients(
    params: Params, model: "Hybrid", found: Mapping[str, TeacherEnsemble], sample: Sequence[Utterance], tokens: Tokens
) -> Check:
    """Norms of the gradients of what teachers and what references ask for, at step 0."""
    import torch

    settings = params.distill
    model.freeze(params.student.phases[0].freeze_encoder)
    minimised = build_objective(params, model, found)
    loudest = float((settings.alpha_end or 0.0) > settings.alpha)  # the end of training, where teachers begin at 0
    parts = minimised.parts(make_batch(sample[:GRADIENTS], tokens), loudest)
    weights = [one for one in minimised.learner.student.parameters() if one.requires_grad]
    norms = {}
    for kind, names in (
        ("soft", [name for name in parts if "_" in name or name == "features"]),
        ("hard", ["ctc", "decoder"]),
    ):
        loss = sum((parts[name][0] * parts[name][1] for name in names if name in parts), start=torch.zeros(()))
        norms[kind] = 0.0
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            norms[kind] = math.sqrt(sum(float(one.pow(2).sum()) for one in grads if one is not None))
    return checks.check_gradients(norms["soft"], norms["hard"])


def _live(params: Params, stores: Mapping[str, LogitStore], sample: Sequence[Utterance], output: str) -> Check:
    """Every teacher, asked again; the one that differs most."""
    import torch

    from kdlib.models.decoder import teacher_forced
    from kdlib.models.hybrid import TrainedModel

    worst = -1.0, ""
    for name, store in stores.items():
        teacher = TrainedModel(speaker_teacher(params, name))
        asked = [utt for utt in sample if utt.utt_id in store][:LIVE]
        inputs = teacher_forced([teacher.tokens.encode(utt.text) for utt in asked])[0] if output == "decoder" else None
        with torch.inference_mode():
            outputs = teacher.model(*audio.collate(asked), inputs)
        said = outputs.ctc_logits if output == "ctc" else outputs.decoder_logits
        for row, utt in zip(said, asked, strict=True):
            stored = store.logits(utt.utt_id).log_softmax(-1)
            now = row[: len(stored)].log_softmax(-1)
            kl = float((now.exp() * (now - stored)).sum(-1).mean()) if len(now) == len(stored) else math.inf
            worst = max(worst, (kl, name))
    return checks.check_live(*worst)


def _each(
    ensemble: TeacherEnsemble, sample: Sequence[Utterance], references: Sequence[Sequence[int]], output: str
) -> dict[str, float]:
    """The share of the sample that each teacher writes right."""
    found = {}
    for name, store in ensemble.stores.items():
        pairs = [(utt, ids) for utt, ids in zip(sample, references, strict=True) if utt.utt_id in store]
        found[name] = sum(_read(store.logits(utt.utt_id), output) == ids for utt, ids in pairs) / max(1, len(pairs))
    return found


def _read(logits: "torch.Tensor", output: str) -> list[int]:
    """The tokens that logits [T, V] write; of a teacher-forced decoder the best at every step before EOS."""
    import torch

    if output == "ctc":
        return greedy(Outputs(logits[None], torch.tensor([len(logits)]), logits), BLANK)[0]
    return list(itertools.takewhile(lambda one: one != EOS, logits.argmax(-1).tolist()))
