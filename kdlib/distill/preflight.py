"""Before any training: can this distillation work? Each check says pass, warn or refuse, and why, in a line.

The `check_...` functions judge what they are given and know nothing of recipes; `preflight` gathers it, on a sample of
the fold's training speech, and `demand` stops a run that a check refuses. Each of them has cost somebody weeks.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from rapidfuzz.distance import Levenshtein

from kdlib.corpus import audio, prepare
from kdlib.corpus.manifest import Utterance
from kdlib.corpus.speakers import split
from kdlib.decode.greedy import greedy
from kdlib.distill import students
from kdlib.errors import UserError
from kdlib.models import Outputs, nemo, vocabulary
from kdlib.models.pretrain import pretrained
from kdlib.params import Params
from kdlib.settings import Distill
from kdlib.stage import produce, read_json, write_json
from kdlib.teachers import adapt, aggregates, extract, targets
from kdlib.teachers.ensemble import MAX_DRIFT, Ensemble
from kdlib.teachers.store import Header, LogitStore
from kdlib.tokens import BLANK, EOS, Tokens

if TYPE_CHECKING:
    import torch

    from kdlib.models.hybrid import Hybrid

CODE = ("distill/preflight.py", "teachers/aggregates.py", "evaluate/system.py", *students.CODE)
PASS, WARN, REFUSE = "pass", "warn", "refuse"
SAMPLE, LIVE, GRADIENTS = 64, 2, 8  # utterances that are looked at
OFFSETS = range(-3, 4)


@dataclass(frozen=True)
class Check:
    """A verdict and its reason."""

    name: str
    verdict: str
    reason: str


def check_tokens(tokens: Tokens, headers: Mapping[str, Header]) -> Check:
    """The same id must mean the same to the student and to every teacher, the special ids among them."""
    for name, header in headers.items():
        theirs = (header.tokens, header.size, header.blank, header.bos, header.eos)
        ours = (tokens.fingerprint, tokens.size, tokens.blank, tokens.bos, tokens.eos)
        if theirs != ours:
            what = ("tokenizer", "number of tokens", "blank", "BOS", "EOS")
            of, mine, other = next(part for part in zip(what, ours, theirs, strict=True) if part[1] != part[2])
            return Check("tokens", REFUSE, f"teacher {name}: {of} is {other}, the student's {mine}")
    return Check("tokens", PASS, f"{len(headers)} teachers write in the student's {tokens.size} tokens")


def check_shift(said: Sequence[Sequence[int]], references: Sequence[Sequence[int]], output: str) -> Check:
    """Are the teachers' tokens the references' at an offset of ids, or a decoder's at another step (BOS)?"""
    name = f"shift of {output} targets"
    found = {offset: _likeness([[one + offset for one in ids] for ids in said], references) for offset in OFFSETS}
    best = max(OFFSETS, key=lambda offset: (found[offset], -abs(offset)))
    if found[best] > found[0] + 0.1:
        return Check(
            name,
            REFUSE,
            f"every id is {-best:+d} off: as they are, {100 * found[0]:.0f} % of the tokens are right, "
            f"with {best:+d} {100 * found[best]:.0f} %",
        )
    if output == "decoder":
        at = {step: _same_place(said, references, step) for step in (-1, 0, 1)}
        place = max(at, key=lambda step: (at[step], -abs(step)))
        if at[place] > at[0] + 0.1:
            return Check(
                name,
                REFUSE,
                f"tokens stand {place:+d} step from where they belong (BOS among them?): in place "
                f"{100 * at[0]:.0f} % are right, moved {100 * at[place]:.0f} %",
            )
    return Check(name, PASS, f"{100 * found[0]:.0f} % of the teachers' tokens are the references', at no offset more")


def check_decoding(tokens: Tokens, references: Sequence[str]) -> Check:
    """Reference -> ids -> perfect outputs -> text, by the very path that evaluation uses."""
    import torch

    wrong = []
    for text in sorted(set(references)):
        ids = tokens.encode(text)
        path = [one for token in ids for one in (token, tokens.blank)]
        logits = torch.nn.functional.one_hot(torch.tensor([path]), tokens.size).float()
        said = tokens.decode(greedy(Outputs(logits, torch.tensor([len(path)]), logits), tokens.blank)[0])
        spoken = tokens.decode([*ids, tokens.eos] if tokens.eos is not None else ids)
        wrong += [(text, other) for other in (said, spoken) if other != text]
    if wrong:
        text, other = wrong[0]
        return Check("decoding", REFUSE, f"perfect outputs for {text} are read as {other!r}: the decoding is wrong")
    return Check("decoding", PASS, f"perfect outputs for {len(set(references))} words are read as these words")


def check_logits(rows: "Mapping[str, torch.Tensor]") -> Check:
    """Probabilities that pass for logits would be softmaxed again, and nearly flat."""
    for name, values in rows.items():
        if len(values) and values.min() >= 0 and values.max() <= 1 and (values.sum(-1) - 1).abs().max() < 0.02:
            return Check("logits", REFUSE, f"teacher {name}: outputs between 0 and 1 that sum to 1 are probabilities")
    return Check("logits", PASS, "the teachers' outputs are logits")


def check_temperature(headers: Mapping[str, Header], settings: Distill) -> Check:
    """Stored outputs are at temperature 1; T ** 2 belongs to a loss that divides both sides."""
    for name, header in headers.items():
        if header.temperature != 1:
            return Check(
                "temperature", REFUSE, f"teacher {name}: stored at temperature {header.temperature:g}, would be twice"
            )
    temperatures = {settings.temperature, settings.temperature_end or settings.temperature}
    if settings.soften != "both" and temperatures != {1.0}:
        return Check(
            "temperature",
            WARN,
            f"only the {settings.soften}'s side is divided by {settings.temperature:g}: the two can never be equal",
        )
    shown = " to ".join(f"{one:g}" for one in sorted(temperatures, reverse=True))
    return Check("temperature", PASS, f"stored at 1; both sides are divided by {shown}, the loss has T ** 2")


def check_lengths(too_short: int, total: int) -> Check:
    """CTC can write no more tokens than there are frames."""
    if not too_short:
        return Check("lengths", PASS, f"all {total} references fit into the frames of their recordings")
    verdict = REFUSE if too_short > total / 2 else WARN
    share = 100 * too_short / total
    return Check(
        "lengths", verdict, f"{too_short} of {total} references ({share:.1f} %) need more frames than there are"
    )


def check_recording(
    frames: Mapping[str, Mapping[str, int]], expected: Mapping[str, int], stride_ms: float, student_ms: float
) -> Check:
    """A teacher that heard the student's recording has as many frames as the student."""
    if stride_ms != student_ms:
        return Check(
            "recording", REFUSE, f"teachers have a frame each {stride_ms:g} ms, the student each {student_ms:g} ms"
        )
    wrong = [
        (name, utt_id, count, expected[utt_id])
        for name, found in frames.items()
        for utt_id, count in found.items()
        if abs(count - expected[utt_id]) > MAX_DRIFT
    ]
    total = sum(map(len, frames.values()))
    if wrong:
        name, utt_id, count, wanted = wrong[0]
        return Check(
            "recording",
            REFUSE,
            f"{len(wrong)} of {total} outputs are of another recording: teacher {name} has {count} frames of {utt_id}, "
            f"the student {wanted}",
        )
    return Check("recording", PASS, f"{total} outputs have the frames of the recordings that the student hears")


def check_aggregate(texts: Sequence[str], references: Sequence[str]) -> Check:
    """A target that decodes to nothing, or to a few words over and over, teaches that."""
    empty = sum(not text for text in texts) / len(texts)
    distinct, wanted = len({text for text in texts if text}), len(set(references))
    said = f"the target writes nothing in {100 * empty:.0f} %, and {distinct} distinct texts for {wanted} words"
    if empty > 0.9 or (wanted > 5 and distinct <= 2):
        return Check("target", REFUSE, said)
    return Check("target", WARN if empty > 0.3 or distinct < wanted / 4 else PASS, said)


def check_best_teacher(target: float, teachers: Mapping[str, float], margin: float = 0.1) -> Check:
    """A mean that is worse than its best member was better not taken."""
    best = max(teachers, key=lambda name: teachers[name])
    said = f"the target recognises {100 * target:.0f} % of the sample, {best} alone {100 * teachers[best]:.0f} %"
    return Check("best teacher", WARN if target < teachers[best] - margin else PASS, said)


def check_spikes(shifts: Sequence[int], fits: Sequence[float]) -> Check:
    """Frame by frame distillation asks the student to spike where the teachers do."""
    middle, fit = float(np.median(shifts)), float(np.mean(fits))
    said = f"the student's spikes fit the target's by {fit:.2f} (1: the same), best when moved by {middle:+g} frames"
    return Check("spikes", WARN if fit < 0.3 or abs(middle) >= 1 else PASS, said)


def check_blanks(mass: float) -> Check:
    """Where nearly all is blank, so is nearly all that is learnt."""
    return Check("blanks", WARN if mass > 0.95 else PASS, f"{100 * mass:.0f} % of the target's mass is blank")


def check_gradients(soft: float, hard: float) -> Check:
    """Which of the two terms steers?"""
    if not hard:
        return Check("gradients", WARN, "there is no ground truth in the loss: the student learns the teachers' errors")
    ratio = soft / hard
    return Check(
        "gradients",
        WARN if not 0.1 <= ratio <= 10 else PASS,
        f"at the first step the teachers pull {ratio:.2g} times as much as the references",
    )


def check_live(kl: float, teacher: str) -> Check:
    """What was stored is what the teacher says now."""
    verdict = PASS if kl < 1e-3 else WARN if kl < 1e-2 else REFUSE
    return Check("stored and live", verdict, f"teacher {teacher}, asked again, differs by {kl:.1e} nats a frame")


def check_heard(headers: Mapping[str, Header], away: Sequence[str]) -> Check:
    """A teacher that heard the held-out or the dev speaker leaks them."""
    for name, header in headers.items():
        if leaked := sorted(set(header.heard) & set(away)):
            return Check("held out", REFUSE, f"teacher {name} has heard {', '.join(leaked)}")
    return Check("held out", PASS, f"no teacher has heard {' or '.join(away)}")


def check_words(test: Sequence[str], train: Sequence[str], decoder: bool) -> Check:
    """A decoder memorises the words that it was trained on."""
    unseen = sorted(set(test) - set(train))
    said = f"{len(unseen)} of {len(set(test))} test words are not among the training words"
    if decoder and unseen:
        return Check("unseen words", WARN, f"{said}: a decoder will hardly write them (first: {unseen[0]})")
    return Check("unseen words", PASS, said)


def check_decoder_kd(asked: Distill, used: Distill) -> Check:
    """Seed 000's rule."""
    if asked.heads != used.heads:
        return Check("decoder", WARN, students.SWITCHED)
    return Check("decoder", WARN, "a decoder on NeMo's encoder learns from SpeechBrain teachers: on purpose")


def preflight(params: Params, seed: int = 1) -> list[Check]:
    """All checks that apply to a recipe's student."""
    used = students.effective(params)
    folder = produce(
        students.place(params, seed).parent / f"preflight{seed if params.student.resume else ''}",
        lambda partial: _build(partial, params, used, seed),
        what=f"preflight of {params.variant or 'the student'}",
        parameters=students.depends(used) | {"asked": params.distill.heads},
        inputs=students.inputs(used, seed),
        code=CODE,
    )
    return [Check(**one) for one in read_json(folder / "checks.json")]


def demand(params: Params, seed: int = 1) -> None:
    """Stop where a check refuses, unless the recipe allows that."""
    refused = [one for one in preflight(params, seed) if one.verdict == REFUSE and one.name not in params.distill.allow]
    if refused:
        reasons = "\n".join(f"  {one.name}: {one.reason}" for one in refused)
        allow = ", ".join(one.name for one in refused)
        raise UserError(
            f"preflight of {params.variant or 'the student'} refuses to train:\n{reasons}\n"
            f"mend it; or, to see what happens, write in the recipe: distill: {{allow: [{allow}]}}"
        )


def table(checks: Sequence[Check]) -> pd.DataFrame:
    """One row a check, the gravest first."""
    order = {REFUSE: 0, WARN: 1, PASS: 2}
    rows = sorted(checks, key=lambda one: order[one.verdict])
    return pd.DataFrame([asdict(one) for one in rows]).rename(columns={"name": "check"}).set_index("check")


class _Heard(NamedTuple):
    """What student and target say of the sample, utterance by utterance."""

    target: "list[torch.Tensor]"  # logits [T, V]
    frames: dict[str, int]
    shifts: list[int]
    fits: list[float]


def _build(partial: Path, params: Params, used: Params, seed: int) -> None:
    tokens = vocabulary.vocabulary(params)
    splits, chosen = split(prepare.load(params), params), students.material(params, tokens)
    train = {utt.text for utt in chosen.train}
    checks = [
        check_decoding(tokens, [*train, *(utt.text for utt in splits.test)]),
        check_lengths(chosen.too_short, chosen.too_short + len(chosen.train)),
        check_words([utt.text for utt in splits.test], sorted(train), used.distill.heads != "ctc"),
    ]
    if students.crosses(params):
        checks.append(check_decoder_kd(params.distill, used.distill))
    if used.distill.taught:
        checks += _taught(used, tokens, seed)
    write_json(partial / "checks.json", [asdict(one) for one in checks])


def _taught(params: Params, tokens: Tokens, seed: int) -> list[Check]:
    """The checks of the teachers' part."""
    names = targets.teachers(params, params.aggregation.method)
    main = students.outputs(params)[0]
    headers = {name: extract.opened(params, name, "training", main).header for name in names}
    away = [name for name in (params.held_out, params.fold.dev) if name]
    checks = [check_tokens(tokens, headers), check_heard(headers, away), check_temperature(headers, params.distill)]
    if any(one.verdict == REFUSE for one in checks):
        return checks  # such stores cannot even be combined
    found = students.ensembles(params)
    ensemble = found[main]
    sample = [utt for utt in aggregates.sample(params, SAMPLE) if ensemble.coverage([utt.utt_id]).usable]
    if not sample:
        return [*checks, Check("target", REFUSE, "no training utterance has a target; see aggregation.missing")]
    rows = {name: store.logits(next(iter(store))) for name, store in ensemble.stores.items()}
    checks.append(check_logits(rows))
    references = [tokens.encode(utt.text) for utt in sample]
    model = students.first(params, tokens, seed).eval()
    if "ctc" in found:
        checks.append(_recording(found["ctc"], sample, model))
        if checks[-1].verdict == REFUSE:
            return checks  # and no frame can be compared with another
    for output, one in found.items():
        logits = [one.logits([utt.utt_id], [utt.speaker])[0][0] for utt in sample]
        said = [_read(row, output) for row in logits]
        checks.append(check_shift(said, references, output))
        if output == main:
            texts, words = [tokens.decode(ids) for ids in said], [utt.text for utt in sample]
            checks.append(check_aggregate(texts, words))
            right = sum(a == b for a, b in zip(said, references, strict=True)) / len(sample)
            checks.append(check_best_teacher(right, _each(one, sample, references, output)))
    if "ctc" in found:
        checks += _frames(params, found["ctc"], sample, model)
    checks.append(_gradients(params, model, found, sample, tokens))
    checks.append(_live(params, ensemble.stores, sample, main))
    return checks


def _recording(ensemble: Ensemble, sample: Sequence[Utterance], model: "Hybrid") -> Check:
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
    return check_recording(frames, expected, ensemble.stride_ms, model.encoder.stride_ms)


def _frames(params: Params, ensemble: Ensemble, sample: Sequence[Utterance], model: "Hybrid") -> list[Check]:
    """What can be seen where student and teachers answer frame by frame."""
    import torch

    from kdlib.distill import losses

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
    checks = [check_blanks(float(np.mean(mass)))]
    if _head_is_trained(params):
        return [*checks, check_spikes(shifts, fits)]
    return [*checks, Check("spikes", PASS, "the student's CTC head is new: it has no spikes yet to compare")]


def _head_is_trained(params: Params) -> bool:
    """Whether the student has a CTC head that says something before training."""
    if params.student.resume:
        return True
    if params.student.backbone == "sb":
        return params.student.start == "pretrained"
    return nemo.tokenizer(pretrained(params)) == vocabulary.vocabulary(params).model


def _gradients(
    params: Params, model: "Hybrid", found: Mapping[str, Ensemble], sample: Sequence[Utterance], tokens: Tokens
) -> Check:
    """Norms of the gradients of what teachers and what references ask for, at step 0."""
    import torch

    settings = params.distill
    model.freeze(params.student.phases[0].freeze_encoder)
    minimised = students.objective(params, model, found)
    loudest = float((settings.alpha_end or 0.0) > settings.alpha)  # the end of training, where teachers begin at 0
    parts = minimised.parts(students.read(sample[:GRADIENTS], tokens), loudest)
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
    return check_gradients(norms["soft"], norms["hard"])


def _live(params: Params, stores: Mapping[str, LogitStore], sample: Sequence[Utterance], output: str) -> Check:
    """Every teacher, asked again; the one that differs most."""
    import torch

    from kdlib.models.decoder import teacher_forced
    from kdlib.models.hybrid import Trained

    worst = -1.0, ""
    for name, store in stores.items():
        teacher = Trained(adapt.teacher(params, name))
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
    return check_live(*worst)


def _each(
    ensemble: Ensemble, sample: Sequence[Utterance], references: Sequence[Sequence[int]], output: str
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


def _likeness(said: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> float:
    """1 - edits a token."""
    edits = sum(Levenshtein.distance(one, other) for one, other in zip(said, references, strict=True))
    return max(0.0, 1 - edits / max(1, sum(map(len, references))))


def _same_place(said: Sequence[Sequence[int]], references: Sequence[Sequence[int]], step: int) -> float:
    """The share of reference tokens that stand `step` places later in what was said."""
    hits = total = 0
    for one, other in zip(said, references, strict=True):
        hits += sum(0 <= index + step < len(one) and one[index + step] == token for index, token in enumerate(other))
        total += len(other)
    return hits / max(1, total)
