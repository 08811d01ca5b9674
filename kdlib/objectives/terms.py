"""The terms of the training loss: a new one is an entry of `TERMS` and a test.

Those of references are in `reference_terms.py`: teachers are trained on them, and do not depend on what is here. An
entry says where in `distill:` its weight is, whether it belongs to the references, to the teachers or to the model
itself, whose head it trains, what it needs, and how it is computed. The objective, the recipes' checks, the preflight's
gradients and the controls without teachers all read this table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kdlib.objectives.reference_terms import REFERENCE_TERMS
from kdlib.objectives.term import Term, active_among
from kdlib.settings.distill import Distill
from kdlib.source_code import lazy
from kdlib.tokens import BLANK, BOS, EOS

if TYPE_CHECKING:
    from torch import Tensor

    from kdlib.objectives.step import Step

# Imported when they are used: recipes are checked without torch.
torch = lazy("torch")
levenshtein = lazy("rapidfuzz.distance.Levenshtein")
losses = lazy("kdlib.objectives.losses")
masks = lazy("kdlib.models.masks")
reference_losses = lazy("kdlib.objectives.reference_losses")
word_losses = lazy("kdlib.objectives.word_losses")
attention = lazy("kdlib.models.decoder")


LAYER = "layer"


def active(settings: Distill) -> dict[str, Term]:
    """The terms of a loss."""
    return active_among(TERMS, settings)


def uses_teachers(settings: Distill) -> bool:
    """True if a term of the loss is of the teachers."""
    return any(term.side == "teachers" for term in active(settings).values())


def needs(settings: Distill, what: str) -> bool:
    """True if a term of the loss needs something (`Term.needs`)."""
    return any(what in term.needs for term in active(settings).values())


def references_only(settings: Distill) -> bool:
    """True if the references, one by one, are all that the loss knows: the control of a distillation."""
    return {term.side for term in active(settings).values()} <= {"reference"} and not settings.ctc_smoothing


def outputs(settings: Distill) -> tuple[str, ...]:
    """The teachers' outputs that the loss needs: "ctc" for frames and texts, "decoder" for steps, "layer2", ..."""
    needed = {what for term in active(settings).values() if term.side == "teachers" for what in term.needs}
    layers = tuple(map(layer_output, sorted(set(settings.layers.values())))) if "features" in active(settings) else ()
    return ("ctc",) * bool(needed & {"frames", "texts"}) + ("decoder",) * ("steps" in needed) + layers


def layer_output(layer: int) -> str:
    """The name of the output of an encoder's layer."""
    return f"{LAYER}{layer}"


def matched(settings: Distill) -> dict[int, str]:
    """The student's layers of `gamma`, 0 the encodings, and the teachers' outputs that they are to be like."""
    return {own: layer_output(of_teacher) for own, of_teacher in settings.layers.items()} or {0: "ctc"}


def text_source(settings: Distill) -> tuple[str, float]:
    """The source of the teachers' texts (`sequence.hypotheses_from`), and the least confidence of a used text."""
    if settings.sequence.weight:
        return settings.sequence.hypotheses_from, settings.sequence.confidence
    return "lexicon", 0.0 if settings.words.weight else settings.occupancy.confidence


def record(settings: Distill) -> dict:
    """The settings that a loss depends on; without teachers, those of its other terms alone."""
    names = {"heads", "ctc_weight", "label_smoothing", "ctc_smoothing"}
    of_others = {term.setting.split(".")[0] for term in TERMS.values() if term.side != "teachers"}
    left_out = {"allow", "control", "allow_decoder_kd", "use_teachers"}
    included = None if uses_teachers(settings) else names | of_others
    return settings.model_dump(mode="json", include=included, exclude=left_out)


# The losses of a step; every one is a mean over the utterances that have what it needs.


class Target(NamedTuple):
    """The teachers' target of one head, for the utterances that have one; B utterances, T frames or decoder steps."""

    student: Tensor  # [B, T, V], the student's logits
    teachers: Tensor  # [B, T, V], at the step's temperature
    plain: Tensor  # [B, T, V], at temperature 1
    weights: Tensor  # [B, T], of frames or steps


def target_of(step: Step, head: str) -> Target | None:
    """The target of a head; None if no utterance of the batch has one."""
    rows = step.taught(head)
    return step.once(f"target of {head}", lambda: _read_target(step, head, rows)) if rows else None


def _read_target(step: Step, head: str, rows: list[int]) -> Target:
    settings, source, batch = step.settings, step.targets[head], step.batch.select(rows)
    own = step.of(step.head_lengths(head), rows)
    logits = step.outputs.ctc.logits if head == "ctc" else step.outputs.decoder_logits
    logits = step.of(logits, rows)[:, : int(own.max())]
    temperature = 1.0 if settings.temperature_on == "student" else settings.temperature.at(step.now)
    target, lengths = source.logits(batch, own, temperature)
    chooses = head == "ctc" and (settings.max_shift or settings.blanks != "all")
    plain = target
    if temperature != 1 and (chooses or settings.pseudo_labels.weight):
        plain = source.logits(batch, own, 1.0).logits
    if head == "decoder":
        weights = masks.length_mask(lengths, logits.shape[1]).float()
        if settings.first_token == "skip":
            weights[:, 0] = 0
        elif settings.first_token == "suppress_specials":
            target, plain = (losses.mask_specials(side, (BOS, EOS, BLANK)) for side in (target, plain))
        return Target(logits, target, plain, weights)
    if settings.max_shift:
        shifts, _ = losses.best_shift(logits, plain, lengths, settings.max_shift, BLANK)
        target, plain = (losses.shift_frames(side, shifts, lengths) for side in (target, plain))
    weights = losses.frame_weights(plain, lengths, settings.blanks, BLANK, settings.context_frames)
    return Target(logits, target, plain, weights)


def divergence(step: Step, head: str) -> Tensor | None:
    """KL per frame, or decoder step, from the teachers' distribution at a temperature (Hinton et al. 2015)."""
    if not (target := target_of(step, head)):
        return None
    student = 1.0 if step.settings.temperature_on == "teacher" else step.settings.temperature.at(step.now)
    squared = step.settings.temperature_on == "both"
    return losses.soft_kl(target.student, target.teachers, target.weights, student, squared=squared)


def best_token(step: Step, head: str) -> Tensor | None:
    """Cross-entropy with the teachers' best token, in frames of high confidence."""
    if not (target := target_of(step, head)):
        return None
    options = step.settings.pseudo_labels.model_dump(exclude={"weight"}) | {"blank": BLANK if head == "ctc" else None}
    return losses.pseudo_label(target.student, target.plain, target.weights, **options)


def words(step: Step, _: str) -> Tensor | None:
    """KL between the teachers' and the student's posteriors over the words of the closed lexicon."""
    settings, rows = step.settings.words, step.taught("ctc")
    if settings.pooled:  # a word's target is for whoever says it
        known = step.hypotheses.pooled
        rows = [row for row, utt in enumerate(step.batch.utterances) if row in rows or utt.text in known]
    if not rows:
        return None
    lexicon = step.hypotheses.lexicon
    target = step.hypotheses.posterior(step.batch.select(rows), settings.temperature)
    lexicon, target = word_losses.shortlist(lexicon, target, target, settings.shortlist, settings.random_words)
    weights = target.sum(1).clamp(0, 1).round()  # 0 if no word fits into the frames
    return word_losses.word_kl(*step.emissions(rows), lexicon, target, weights, settings.temperature)


def sequence(step: Step, head: str) -> Tensor | None:
    """The teachers' hypotheses as references, of the utterances whose best one has enough confidence."""
    which, ids, weights = step.pseudo_labels
    if not which:
        return None
    if head == "ctc":
        return losses.sequence_ctc(*step.outputs.ctc, which, ids, weights)
    encoded, lengths = step.outputs.encoded, step.outputs.lengths
    inputs = attention.teacher_forced(ids)[0].to(encoded.device)
    logits = step.learner.student.forward_decoder(encoded[which], inputs, lengths[which])
    each = reference_losses.cross_entropies(logits, ids, step.settings.label_smoothing)
    return (each * weights.to(each)).sum() / len(set(which))


def occupancy(step: Step, _: str) -> Tensor | None:
    """KL per frame from the teachers' mean occupancy of the reference's tokens, or of a confident word's."""
    if not (rows := step.taught("ctc")):
        return None
    known, settings = step.batch.select(rows), step.settings.occupancy
    best = step.hypotheses.texts(known) if not all(known.ids) else [[]] * len(rows)
    ids = [
        reference or (texts[0][0] if texts and texts[0][1] >= settings.confidence else [])
        for reference, texts in zip(known.ids, best, strict=True)
    ]
    if not (places := [place for place, text in enumerate(ids) if text]):
        return None
    texts, rows = [ids[place] for place in places], [rows[place] for place in places]
    logits, lengths = step.emissions(rows)
    target = 0.0
    for _, teacher, weights in step.targets["ctc"].each(step.batch.select(rows), lengths):
        target = target + weights[:, None, None] * losses.occupancy(teacher, lengths, texts)
    counts = (target.sum(-1) > 0.5).float()
    normalised = target / target.sum(-1, keepdim=True).clamp_min(1e-9)
    return losses.soft_kl(logits, normalised.clamp_min(1e-12).log(), counts)


def intermediate_self(step: Step, _: str) -> Tensor:
    """KL per frame of a CTC head on an inner layer from the model's own last head."""
    logits = step.inner_logits
    inside = masks.length_mask(step.outputs.lengths, logits.shape[1]).float()
    return losses.soft_kl(logits, step.outputs.ctc.logits.detach(), inside)


def word_errors(step: Step, _: str) -> Tensor | None:
    """Expected word errors, per word of the reference, among the n-best texts and the reference itself."""
    if not (rows := step.labelled):
        return None
    emissions, tokens = step.emissions(rows), step.search.tokens
    which, ids, errors = [], [], []
    for place, texts in enumerate(step.search.nbest(emissions, step.settings.word_errors.nbest)):
        reference = step.batch.ids[rows[place]]
        words = tokens.decode(reference).split()
        for text in dict.fromkeys([tuple(reference), *(tuple(text) for text, _ in texts)]):
            which.append(place)
            ids.append(list(text))
            errors.append(levenshtein.distance(words, tokens.decode(text).split()) / max(1, len(words)))
    return losses.expected_errors(emissions, which, ids, errors)


def consistency(step: Step, _: str) -> Tensor:
    """KL per frame between the two views of each utterance, both ways; the second half of a batch are the others."""
    logits, half = step.outputs.ctc.logits, len(step.batch) // 2
    inside = masks.length_mask(step.outputs.lengths, logits.shape[1]).float()
    return losses.soft_kl(logits, torch.cat([logits[half:], logits[:half]]).detach(), inside)


def word_entropy(step: Step, _: str) -> Tensor | None:
    """Entropy over the words of each utterance without a transcript, less that of their mean posterior."""
    if not (rows := [row for row, ids in enumerate(step.batch.ids) if not ids]):
        return None
    return word_losses.word_entropy(*step.emissions(rows), step.lexicon, step.settings.word_entropy.diversity)


def average(step: Step, _: str) -> Tensor:
    """KL per frame from the moving average of the student's weights."""
    logits = step.outputs.ctc.logits
    inside = masks.length_mask(step.outputs.lengths, logits.shape[1]).float()
    return losses.soft_kl(logits, step.of_average().logits[:, : logits.shape[1]], inside)


def encodings(step: Step, _: str) -> Tensor | None:
    """Squared distance of projected layers, or encodings, from the teachers' mean (FitNets, Romero et al. 2015)."""
    found = []
    for own, output in matched(step.settings).items():
        if rows := step.taught(output):
            lengths = step.outputs.lengths[rows]
            target = step.targets[output].hidden(step.batch.select(rows), lengths)
            frames = step.outputs.hidden[own] if own else step.outputs.encoded
            inside = masks.length_mask(lengths, target.shape[1]).float()
            project = step.learner.project[str(own)]
            found.append(losses.feature_mse(step.of(frames, rows)[:, : target.shape[1]], target, inside, project))
    return sum(found) / len(found) if found else None


TERMS: dict[str, Term] = REFERENCE_TERMS | {
    "kd_ctc": Term("alpha", "teachers", "ctc", frozenset({"frames"}), divergence),
    "pseudo_ctc": Term("pseudo_labels.weight", "teachers", "ctc", frozenset({"frames"}), best_token),
    "kd_decoder": Term("alpha", "teachers", "decoder", frozenset({"steps"}), divergence),
    "pseudo_decoder": Term("pseudo_labels.weight", "teachers", "decoder", frozenset({"steps"}), best_token),
    "words_ctc": Term("words.weight", "teachers", "ctc", frozenset({"texts", "lexicon"}), words),
    "sequence_ctc": Term("sequence.weight", "teachers", "ctc", frozenset({"texts"}), sequence),
    "sequence_decoder": Term("sequence.weight", "teachers", "decoder", frozenset({"texts"}), sequence),
    "occupancy_ctc": Term("occupancy.weight", "teachers", "ctc", frozenset({"frames", "texts"}), occupancy),
    "word_errors": Term("word_errors.weight", "reference", "ctc", frozenset({"search"}), word_errors),
    "intermediate_self": Term("intermediate.weight", "self", "", frozenset({"layer"}), intermediate_self),
    "consistency": Term("consistency.weight", "self", "ctc", frozenset({"views"}), consistency),
    "word_entropy": Term("word_entropy.weight", "self", "ctc", frozenset({"lexicon", "unlabelled"}), word_entropy),
    "average": Term("average.weight", "self", "ctc", frozenset({"average"}), average),
    "features": Term("gamma", "teachers", "", frozenset({"frames"}), encodings),
}
