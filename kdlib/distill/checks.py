"""What the preflight asks: each check judges what it is given, knows nothing of recipes, and says why in a line.

Each of these faults has cost somebody weeks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rapidfuzz.distance import Levenshtein

from kdlib.decode.greedy import greedy
from kdlib.evaluate.measures import OFFSETS, position_matches
from kdlib.logits.store import Header
from kdlib.models import Outputs
from kdlib.settings import Distill
from kdlib.targets.aggregation import MAX_DRIFT
from kdlib.tokens import Tokens

if TYPE_CHECKING:
    import torch

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
    found = {offset: _similarity([[one + offset for one in ids] for ids in said], references) for offset in OFFSETS}
    best = max(OFFSETS, key=lambda offset: (found[offset], -abs(offset)))
    if found[best] > found[0] + 0.1:
        return Check(
            name,
            REFUSE,
            f"every id is {-best:+d} off: as they are, {100 * found[0]:.0f} % of the tokens are right, "
            f"with {best:+d} {100 * found[best]:.0f} %",
        )
    if output == "decoder":
        at = {step: position_matches(said, references, step) for step in (-1, 0, 1)}
        place = max(at, key=lambda step: (at[step], -abs(step)))
        if at[place] > at[0] + 0.1:
            return Check(
                name,
                REFUSE,
                f"tokens stand {place:+d} step from where they belong (BOS among them?): in place "
                f"{100 * at[0]:.0f} % are right, moved {100 * at[place]:.0f} %",
            )
    return Check(name, PASS, f"{100 * found[0]:.0f} % of the teachers' tokens are the references', at no offset more")


def check_decoding(
    tokens: Tokens, references: Sequence[str], read: Callable[[Iterable[int]], str] | None = None
) -> Check:
    """Reference -> ids -> perfect outputs -> text, by the very path that evaluation uses."""
    import torch

    read = read or tokens.decode

    wrong = []
    for text in sorted(set(references)):
        ids = tokens.encode(text)
        path = [one for token in ids for one in (token, tokens.blank)]
        logits = torch.nn.functional.one_hot(torch.tensor([path]), tokens.size).float()
        said = read(greedy(Outputs(logits, torch.tensor([len(path)]), logits), tokens.blank)[0])
        spoken = read([*ids, tokens.eos] if tokens.eos is not None and read == tokens.decode else ids)
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
    if settings.temperature_on != "both" and temperatures != {1.0}:
        return Check(
            "temperature",
            WARN,
            f"only the {settings.temperature_on}'s side is divided by {settings.temperature:g}: the two can never be equal",
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


def check_target(texts: Sequence[str], references: Sequence[str]) -> Check:
    """A target that decodes to nothing, or to a few words over and over, teaches that."""
    empty = sum(not text for text in texts) / len(texts)
    distinct, wanted = len({text for text in texts if text}), len(set(references))
    said = f"the target writes nothing in {100 * empty:.0f} %, and {distinct} distinct texts for {wanted} words"
    if empty > 0.9 or (wanted > 5 and distinct <= 2):
        return Check("target", REFUSE, said)
    return Check("target", WARN if empty > 0.3 or distinct < wanted / 4 else PASS, said)


def check_pseudo_labels(found: Sequence[tuple[float, bool]], confidence: float, over: str) -> Check:
    """Texts that stand for references: how many are taught, and how many of these are right (share, right)."""
    taught = [right for share, right in found if share >= confidence]
    right = sum(taught) / max(1, len(taught))
    said = (
        f"over {over}, of labelled speech, {100 * len(taught) / len(found):.0f} % of the texts pass the confidence "
        f"{confidence:g}, and {100 * right:.0f} % of these are right (the teachers were trained on some of them)"
    )
    if not taught:
        return Check("pseudo-labels", REFUSE, f"{said}: nothing would be taught; lower distill.sequence.confidence")
    return Check("pseudo-labels", WARN if right < 0.5 else PASS, said)


def check_speaker_independence(held_out: str, heard: int) -> Check:
    """Whose speech is heard, even without transcripts, is no new speaker."""
    return Check(
        "speaker independence",
        WARN,
        f"{held_out}'s training blocks are heard without transcripts (of {heard} such utterances): what comes out is "
        "adapted to the speaker, and no leave-one-speaker-out result",
    )


def check_accuracy(target: float, student: float | None) -> Check:
    """What a target writes wrong contradicts the references; what the student knows already it need not be taught."""
    said = f"greedily the target writes {100 * target:.0f} % of the sample as the references do"
    if student is not None:
        said += f", the student before training {100 * student:.0f} %"
    if student is not None and target < student:
        return Check("target accuracy", WARN, f"{said}: it knows less than its pupil")
    if target < 0.5:
        return Check("target accuracy", WARN, f"{said}: on the rest the two pull apart")
    return Check("target accuracy", PASS, said)


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


def check_blanks(mass: float, dropped: bool = False) -> Check:
    """Where nearly all is blank, so is nearly all that is learnt; and blank that is left out is not learnt at all."""
    said = f"{100 * mass:.0f} % of the target's mass is blank"
    if dropped:
        return Check("blanks", WARN, f"{said}, and no frame of it is taught: the teachers never say when to be silent")
    return Check("blanks", WARN if mass > 0.95 else PASS, said)


def check_pairs(said: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> Check:
    """Targets that write what other utterances say belong to these."""
    known = set(map(tuple, references))
    own = sum(list(one) == list(other) for one, other in zip(said, references, strict=True)) / len(said)
    others = sum(tuple(one) in known for one in said) / len(said) - own
    text = f"{100 * own:.0f} % of the targets write their own utterance's words, {100 * others:.0f} % another's"
    return Check("pairs", REFUSE if len(known) > 3 and others > 0.2 and own < others / 4 else PASS, text)


def check_choice(by: str) -> Check:
    """The best weights are those that recognise words, not those that are most like a teacher."""
    if by == "kl":
        return Check("choice", WARN, "the best look is the one nearest to the teachers (KL), whatever it recognises")
    return Check("choice", PASS, "the best look is the one that recognises most of the dev speaker's words")


def check_heads(decoded: Sequence[str], learnt: Sequence[str]) -> Check:
    """What is decoded through a head that has learnt nothing is noise."""
    if idle := [head for head in decoded if head not in learnt]:
        return Check(
            "heads", REFUSE, f"answers are decoded through the {idle[0]} head, which this training never moves"
        )
    return Check("heads", PASS, f"only heads that learn are decoded: {', '.join(learnt)}")


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


def check_training_speakers(headers: Mapping[str, Header], away: Sequence[str]) -> Check:
    """A teacher that heard the held-out or the dev speaker leaks them."""
    for name, header in headers.items():
        if leaked := sorted(set(header.train_speakers) & set(away)):
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
        return Check("decoder", WARN, SWITCHED)
    return Check("decoder", WARN, "a decoder on NeMo's encoder learns from SpeechBrain teachers: on purpose")


def _similarity(said: Sequence[Sequence[int]], references: Sequence[Sequence[int]]) -> float:
    """1 - edits a token."""
    edits = sum(Levenshtein.distance(one, other) for one, other in zip(said, references, strict=True))
    return max(0.0, 1 - edits / max(1, sum(map(len, references))))
