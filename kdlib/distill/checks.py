"""The checks of the preflight: each judges its arguments, independently of recipes, and gives its reason in a line.

Each of these faults has cost somebody weeks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from rapidfuzz.distance import Levenshtein

from kdlib.decode.greedy import greedy
from kdlib.evaluate.measures import OFFSETS, position_matches
from kdlib.logits.store import Header
from kdlib.models import Emissions
from kdlib.pretrained.pieces import few_pieces
from kdlib.settings.distill import Distill
from kdlib.targets.aggregation import MAX_DRIFT
from kdlib.teachers.parent_scores import describe_gains
from kdlib.tokens import PER_WORD, Tokens

PASS, WARN, REFUSE = "pass", "warn", "refuse"
SWITCHED = (
    "decoder distillation from SpeechBrain teachers into a student on NeMo's encoder is switched to CTC: the original "
    "study ended at 0 % there and blamed the encoders' different features (to do it on purpose: distill: "
    "{allow_decoder_kd: true})"
)


@dataclass(frozen=True)
class Check:
    """A verdict and its reason."""

    name: str
    verdict: str
    reason: str


def check_tokens(tokens: Tokens, headers: Mapping[str, Header]) -> Check:
    """The same id must mean the same token for the student and every teacher, including the special ids."""
    fields = ("tokenizer", "number of tokens", "blank", "BOS", "EOS")
    student = (tokens.fingerprint, tokens.size, tokens.blank, tokens.bos, tokens.eos)
    for name, header in headers.items():
        teacher = (header.tokens, header.size, header.blank, header.bos, header.eos)
        if teacher != student:
            field, ours, theirs = next(row for row in zip(fields, student, teacher, strict=True) if row[1] != row[2])
            return Check("tokens", REFUSE, f"teacher {name}: {field} is {theirs}, the student's is {ours}")
    return Check("tokens", PASS, f"{len(headers)} teachers have the student's {tokens.size} tokens")


def check_shift(hypotheses: Sequence[Sequence[int]], references: Sequence[Sequence[int]], output: str) -> Check:
    """The teachers' ids must match the references at no offset, and a decoder's in the same step (BOS)."""
    name = f"shift of {output} targets"
    correct = {}
    for offset in OFFSETS:
        correct[offset] = _similarity([[token + offset for token in ids] for ids in hypotheses], references)
    best = max(OFFSETS, key=lambda offset: (correct[offset], -abs(offset)))
    if correct[best] > correct[0] + 0.1:
        reason = (
            f"every id is off by {-best:+d}: {100 * correct[0]:.0f} % of the tokens are correct as stored, "
            f"{100 * correct[best]:.0f} % with an offset of {best:+d}"
        )
        return Check(name, REFUSE, reason)
    if output == "decoder":
        matches = {step: position_matches(hypotheses, references, step) for step in (-1, 0, 1)}
        step = max(matches, key=lambda step: (matches[step], -abs(step)))
        if matches[step] > matches[0] + 0.1:
            reason = (
                f"tokens are displaced by {step:+d} step (BOS among the targets?): {100 * matches[0]:.0f} % are "
                f"correct in place, {100 * matches[step]:.0f} % displaced"
            )
            return Check(name, REFUSE, reason)
    reason = f"{100 * correct[0]:.0f} % of the teachers' tokens match the references, and no offset has more"
    return Check(name, PASS, reason)


def check_short_words(answers: Sequence[int], references: Sequence[int], what: str) -> Check:
    """Answers in a closed lexicon, by their numbers of tokens, must not be shorter than what was said.

    Tested is the mean difference over utterances, with three standard errors.
    """
    differences = np.subtract(references, answers)
    mean, n = float(differences.mean()), len(differences)
    doubt = 3 * float(differences.std()) / np.sqrt(n)
    lengths = (
        f"{what}: {np.mean(answers):.1f} tokens per answer, {np.mean(references):.1f} per reference, in {n} utterances"
    )
    if mean <= doubt or mean < 0.25:
        return Check("short words", PASS, lengths)
    why = "an unsure CTC model prefers short words; calibrate it: calibration: {form: per_word}"
    return Check("short words", WARN, f"{lengths}: {why}")


def check_decoding(
    tokens: Tokens, references: Sequence[str], text_of: Callable[[Iterable[int]], str] | None = None
) -> Check:
    """Reference -> ids -> perfect outputs -> text, by the same path as in evaluation."""
    text_of = text_of or tokens.decode
    wrong = []
    for text in sorted(set(references)):
        ids = tokens.encode(text)
        path = [token for index in ids for token in (index, tokens.blank)]
        logits = torch.nn.functional.one_hot(torch.tensor([path]), tokens.size).float()
        by_ctc = text_of(greedy(Emissions(logits, torch.tensor([len(path)])), tokens.blank)[0])
        has_eos = tokens.eos is not None and text_of == tokens.decode
        by_decoder = text_of([*ids, tokens.eos] if has_eos else ids)
        wrong += [(text, decoded) for decoded in (by_ctc, by_decoder) if decoded != text]
    if wrong:
        text, decoded = wrong[0]
        return Check("decoding", REFUSE, f"perfect outputs for {text} decode to {decoded!r}: the decoding is wrong")
    return Check("decoding", PASS, f"perfect outputs for {len(set(references))} words decode to these words")


def check_pieces(per_word: float) -> Check:
    """A word that is one piece is one class: there is nothing to align, and nothing for a lexicon to correct."""
    if per_word < PER_WORD:
        return Check("pieces", WARN, few_pieces(per_word))
    found = "all words are single letters" if np.isnan(per_word) else f"words have {per_word:.1f} pieces on average"
    return Check("pieces", PASS, found)


def check_logits(rows: Mapping[str, torch.Tensor]) -> Check:
    """Probabilities in place of logits would go through a second softmax, and come out nearly flat."""
    for name, values in rows.items():
        if len(values) and values.min() >= 0 and values.max() <= 1 and (values.sum(-1) - 1).abs().max() < 0.02:
            return Check("logits", REFUSE, f"teacher {name}: outputs between 0 and 1 that sum to 1 are probabilities")
    return Check("logits", PASS, "the teachers' outputs are logits")


def check_temperature(headers: Mapping[str, Header], settings: Distill) -> Check:
    """Stored outputs are at temperature 1; T ** 2 belongs to a loss that divides both sides."""
    for name, header in headers.items():
        if header.temperature != 1:
            reason = f"teacher {name}: stored at temperature {header.temperature:g}, which would be applied twice"
            return Check("temperature", REFUSE, reason)
    temperature = settings.temperature
    if settings.temperature_on != "both" and set(temperature.values) != {1.0}:
        side = f"only the {settings.temperature_on}'s logits are divided by {temperature}"
        return Check("temperature", WARN, f"{side}: the two distributions can never be equal")
    return Check("temperature", PASS, f"stored at 1; both sides are divided by {temperature}, the loss has T ** 2")


def check_lengths(too_short: int, total: int) -> Check:
    """CTC cannot output more tokens than there are frames."""
    if not too_short:
        return Check("lengths", PASS, f"all {total} references fit into the frames of their recordings")
    verdict, share = REFUSE if too_short > total / 2 else WARN, 100 * too_short / total
    reason = f"{too_short} of {total} references ({share:.1f} %) need more frames than their recordings have"
    return Check("lengths", verdict, reason)


def check_recording(
    frames: Mapping[str, Mapping[str, int]], expected: Mapping[str, int], stride_ms: float, student_ms: float
) -> Check:
    """A teacher's output of the student's recording has as many frames as the student's."""
    if stride_ms != student_ms:
        reason = f"teachers have one frame per {stride_ms:g} ms, the student one per {student_ms:g} ms"
        return Check("recording", REFUSE, reason)
    wrong = [
        (name, utt_id, count)
        for name, counts in frames.items()
        for utt_id, count in counts.items()
        if abs(count - expected[utt_id]) > MAX_DRIFT
    ]
    total = sum(map(len, frames.values()))
    if wrong:
        name, utt_id, count = wrong[0]
        return Check(
            "recording",
            REFUSE,
            f"{len(wrong)} of {total} outputs belong to another recording: teacher {name} has {count} frames for "
            f"{utt_id}, the student {expected[utt_id]}",
        )
    return Check("recording", PASS, f"{total} outputs have as many frames as the student's recordings")


def check_target(texts: Sequence[str], references: Sequence[str]) -> Check:
    """A student trained on a target that is empty, or the same few words throughout, outputs the same."""
    empty = sum(not text for text in texts) / len(texts)
    distinct, words = len({text for text in texts if text}), len(set(references))
    reason = f"the target is empty in {100 * empty:.0f} %, and has {distinct} distinct texts for {words} words"
    if empty > 0.9 or (words > 5 and distinct <= 2):
        return Check("target", REFUSE, reason)
    return Check("target", WARN if empty > 0.3 or distinct < words / 4 else PASS, reason)


def check_pseudo_labels(labels: Sequence[tuple[float, bool]], confidence: float, source: str) -> Check:
    """Pseudo-labels, as (confidence, correct): how many pass the confidence, and how many of these are correct."""
    used = [correct for value, correct in labels if value >= confidence]
    correct = sum(used) / max(1, len(used))
    reason = (
        f"pseudo-labels ({source}) of labelled speech: {100 * len(used) / len(labels):.0f} % pass the confidence "
        f"{confidence:g}, and {100 * correct:.0f} % of these are correct (the teachers were trained on some of them)"
    )
    if not used:
        reason += ": there would be no pseudo-label; lower distill.sequence.confidence"
        return Check("pseudo-labels", REFUSE, reason)
    return Check("pseudo-labels", WARN if correct < 0.5 else PASS, reason)


def check_speaker_independence(held_out: str, unlabelled: int) -> Check:
    """A speaker in the training speech, even without transcripts, is no unseen speaker."""
    return Check(
        "speaker independence",
        WARN,
        f"{held_out}'s training blocks are used without transcripts (of {unlabelled} such utterances): the system is "
        "adapted to the speaker, and this is no leave-one-speaker-out result",
    )


def check_accuracy(target: float, student: float | None) -> Check:
    """Wrong targets contradict the references; where the student is better than the target, it gains nothing."""
    reason = f"with greedy decoding the target is correct on {100 * target:.0f} % of the sample"
    if student is not None:
        reason += f", the student before training on {100 * student:.0f} %"
    if student is not None and target < student:
        return Check("target accuracy", WARN, f"{reason}: the target is worse than the student")
    if target < 0.5:
        return Check("target accuracy", WARN, f"{reason}: on the rest target and references conflict")
    return Check("target accuracy", PASS, reason)


def check_best_teacher(target: float, teachers: Mapping[str, float], margin: float = 0.1) -> Check:
    """An average should not be worse than its best member."""
    best = max(teachers, key=lambda name: teachers[name])
    reason = f"the target recognises {100 * target:.0f} % of the sample, {best} alone {100 * teachers[best]:.0f} %"
    return Check("best teacher", WARN if target < teachers[best] - margin else PASS, reason)


def check_on_dev(teachers: float, control: float | None, measure: str) -> Check:
    """A teacher that loses to the student that it is to teach, on dev speech, has little to teach it.

    Both are greedy, WRA or 1 - WER; `control` is the student trained on the references alone, once there is one.
    """
    name, value = measure.upper(), lambda right: 100 * (1 - right if measure == "wer" else right)
    reason = f"on dev speech the teachers have {value(teachers):.1f} % {name}"
    if control is None:
        return Check("teachers on dev", PASS, f"{reason}; the control is not trained yet")
    reason += f", the same student without them {value(control):.1f} %"
    return Check("teachers on dev", WARN if teachers < control else PASS, reason)


def check_gains(gains: pd.DataFrame) -> Check:
    """A teacher that is worse than the model it was adapted from was harmed by its training."""
    reason = describe_gains(gains)
    if (gains.gain < 0).any():
        reason += ". Leave them out (fold: {teachers: [...]} names the others), or lower teacher.adapt.lr"
        return Check("parent", WARN, reason)
    return Check("parent", PASS, reason)


def check_spikes(shifts: Sequence[int], fits: Sequence[float]) -> Check:
    """Frame-level distillation expects the student's spikes in the same frames as the teachers'."""
    shift, fit = float(np.median(shifts)), float(np.mean(fits))
    reason = f"the student's spikes fit the target's by {fit:.2f} (1: identical), best when shifted {shift:+g} frames"
    return Check("spikes", WARN if fit < 0.3 or abs(shift) >= 1 else PASS, reason)


def check_blanks(mass: float, dropped: bool = False) -> Check:
    """A target of almost only blanks trains little else; without its blank frames the blank is not trained at all."""
    reason = f"{100 * mass:.0f} % of the target's mass is blank"
    if dropped:
        return Check("blanks", WARN, f"{reason}, and such frames are left out: no target trains the blank")
    return Check("blanks", WARN if mass > 0.95 else PASS, reason)


def check_pairs(hypotheses: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> Check:
    """Targets that match the references of other utterances belong to those utterances."""
    distinct = set(map(tuple, references))
    own = sum(list(hyp) == list(ref) for hyp, ref in zip(hypotheses, references, strict=True)) / len(hypotheses)
    others = sum(tuple(hyp) in distinct for hyp in hypotheses) / len(hypotheses) - own
    reason = f"{100 * own:.0f} % of the targets match their own utterance's reference, {100 * others:.0f} % another's"
    return Check("pairs", REFUSE if len(distinct) > 3 and others > 0.2 and own < others / 4 else PASS, reason)


def check_choice(choose_by: str) -> Check:
    """The best checkpoint is the one that recognises most words, not the one most similar to a teacher."""
    if choose_by == "kl":
        return Check("choice", WARN, "the best checkpoint is the one closest to the teachers (KL), whatever its WRA")
    return Check("choice", PASS, "the best checkpoint is the one with the highest WRA on the dev speaker")


def check_heads(decoded: Sequence[str], trained: Sequence[str]) -> Check:
    """The hypotheses of an untrained head are noise."""
    if untrained := [head for head in decoded if head not in trained]:
        reason = f"hypotheses are decoded from the {untrained[0]} head, which this training does not update"
        return Check("heads", REFUSE, reason)
    return Check("heads", PASS, f"only trained heads are decoded: {', '.join(trained)}")


def check_gradients(soft: float, hard: float) -> Check:
    """The balance of the teachers' and the references' terms."""
    if not hard:
        reason = "there is no ground truth in the loss: the student is trained on the teachers' errors"
        return Check("gradients", WARN, reason)
    ratio = soft / hard
    return Check(
        "gradients",
        WARN if not 0.1 <= ratio <= 10 else PASS,
        f"at the first step the teachers' gradient is {ratio:.2g} times as large as the references'",
    )


def check_live(kl: float, teacher: str) -> Check:
    """Stored outputs must equal the teacher's present outputs."""
    verdict = PASS if kl < 1e-3 else WARN if kl < 1e-2 else REFUSE
    return Check("stored and live", verdict, f"teacher {teacher}, computed again, differs by {kl:.1e} nats per frame")


def check_training_speakers(headers: Mapping[str, Header], excluded: Sequence[str]) -> Check:
    """A teacher that was trained on the held-out or the dev speaker leaks them."""
    for name, header in headers.items():
        if leaked := sorted(set(header.train_speakers) & set(excluded)):
            return Check("held out", REFUSE, f"teacher {name} was trained on {', '.join(leaked)}")
    whom = " or ".join(excluded) or "an excluded speaker (a given split excludes none)"
    return Check("held out", PASS, f"no teacher was trained on {whom}")


def check_words(test: Sequence[str], train: Sequence[str], decoder: bool) -> Check:
    """A decoder memorises the words that it was trained on."""
    unseen = sorted(set(test) - set(train))
    reason = f"{len(unseen)} of {len(set(test))} test words are not among the training words"
    if decoder and unseen:
        return Check("unseen words", WARN, f"{reason}: a decoder will rarely output them (first: {unseen[0]})")
    return Check("unseen words", PASS, reason)


def check_dev(*, has_dev: bool) -> Check:
    """What is chosen on training speakers is best for them."""
    if has_dev:
        return Check("dev speech", PASS, "checkpoints are chosen on speech that is neither trained on nor scored")
    reason = "no dev speaker: checkpoints are chosen on training speakers' speech, and are the best for these; name one"
    return Check("dev speech", WARN, f"{reason} (fold.dev)")


def check_blocks(
    blocks: tuple[Sequence[str], Sequence[str]] | None, *, unseen: bool, recordings: int, utterances: int
) -> Check:
    """What a test set can show: words beyond those of training, and as many utterances as it has recordings.

    `blocks` are those of training and of test, where the corpus has any; `unseen` if there are words of the test alone.
    """
    found = []
    if blocks and (both := sorted(set(blocks[0]) & set(blocks[1]))):
        found.append(
            f"the block {', '.join(both)} is trained on and tested: every test word is one that was trained on, so "
            "that nothing is shown of other words (the usual split: blocks: {train: [B1, B3], test: [B2]})"
        )
    if recordings > utterances:
        found.append(
            f"the {recordings:,} test recordings are of {utterances:,} utterances, by several microphones: they are "
            "not independent, so that intervals and tests are too sure"
        )
    where = "of blocks that are not trained on" if blocks else "of a corpus without blocks"
    words = "some of their words" if unseen else "all of their words"
    about = f"{words} are {'not ' * unseen}trained on, by other speakers"
    reason = f"{utterances:,} test utterances {where}; {about}"
    return Check("test speech", WARN if found else PASS, "; ".join(found) or reason)


def check_decoder_kd(requested: Distill, used: Distill) -> Check:
    """Seed 000's rule."""
    if requested.heads != used.heads:
        return Check("decoder", WARN, SWITCHED)
    reason = "a decoder on NeMo's encoder is trained on targets of SpeechBrain teachers: on purpose"
    return Check("decoder", WARN, reason)


def _similarity(hypotheses: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> float:
    """1 - edits per token."""
    edits = sum(Levenshtein.distance(hyp, ref) for hyp, ref in zip(hypotheses, references, strict=True))
    return max(0.0, 1 - edits / max(1, sum(map(len, references))))
