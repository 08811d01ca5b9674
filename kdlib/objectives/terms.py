"""The terms of the training loss: a new one is an entry of `TERMS` and a test.

An entry says where in `distill:` its weight is, whether it belongs to the references, to the teachers or to the model
itself, whose head it trains, what it needs, and how it is computed. The objective, the recipes' checks, the preflight's
gradients and the controls without teachers all read this table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Literal

from kdlib.models import Emissions
from kdlib.settings.distill import Distill
from kdlib.settings.schedule import Schedule, constant
from kdlib.source_code import lazy
from kdlib.tokens import BLANK

if TYPE_CHECKING:
    from torch import Tensor

    from kdlib.decode.lexicon import Lexicon
    from kdlib.objectives.step import Step

# Imported when they are used: recipes are checked without torch.
torch = lazy("torch")
losses = lazy("kdlib.objectives.losses")
masks = lazy("kdlib.models.masks")
reference_losses = lazy("kdlib.objectives.reference_losses")
attention = lazy("kdlib.models.decoder")


@dataclass(frozen=True)
class Term:
    """A loss of the objective."""

    setting: str  # place of its weight in `distill:`
    side: Literal["reference", "teachers", "self"]
    head: Literal["ctc", "decoder", ""]  # takes the head's share of the weight, where the head is trained
    needs: frozenset[str]  # of teachers' "frames", "steps" or "texts", an inner "layer", the "lexicon"
    loss: Callable[[Step, str], Tensor | None]  # of a step and the head; None if no utterance has what it needs

    def weight(self, settings: Distill) -> Schedule:
        """Its weight, of which a head has a share."""
        schedule = reduce(getattr, self.setting.split("."), settings)
        return schedule if settings.use_teachers or self.side != "teachers" else constant(0.0)

    def is_active(self, settings: Distill) -> bool:
        """True if the loss has this term at any time."""
        return bool(self.weight(settings)) and (not self.head or self.head in heads(settings))


def heads(settings: Distill) -> tuple[str, ...]:
    """The heads that are trained."""
    return ("ctc", "decoder") if settings.heads == "both" else (settings.heads,)


def active(settings: Distill) -> dict[str, Term]:
    """The terms of a loss."""
    return {name: term for name, term in TERMS.items() if term.is_active(settings)}


def uses_teachers(settings: Distill) -> bool:
    """True if a term of the loss is of the teachers."""
    return any(term.side == "teachers" for term in active(settings).values())


def needs(settings: Distill, what: str) -> bool:
    """True if a term of the loss needs the teachers' "frames", "steps" or "texts", an inner "layer", the "lexicon"."""
    return any(what in term.needs for term in active(settings).values())


def references_only(settings: Distill) -> bool:
    """True if the references, one by one, are all that the loss knows: the control of a distillation."""
    return {term.side for term in active(settings).values()} <= {"reference"} and not settings.ctc_smoothing


def outputs(settings: Distill) -> tuple[str, ...]:
    """The teachers' outputs that the loss needs: "ctc" for frames and texts, "decoder" for the decoder's steps."""
    needed = {what for term in active(settings).values() if term.side == "teachers" for what in term.needs}
    return ("ctc",) * bool(needed & {"frames", "texts"}) + ("decoder",) * ("steps" in needed)


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


def ctc(step: Step, _: str) -> Tensor | None:
    """CTC loss of the references, with label smoothing."""
    return _smoothed_ctc(step, step.outputs.ctc.logits) if step.labelled else None


def next_token(step: Step, _: str) -> Tensor | None:
    """Cross-entropy of the decoder's next token, given the reference's previous ones."""
    if not (rows := step.labelled):
        return None
    ids = [step.batch.ids[row] for row in rows]
    logits = step.of(step.outputs.decoder_logits, rows)
    return reference_losses.cross_entropy(logits[:, : max(map(len, ids)) + 1], ids, step.settings.label_smoothing)


def divergence(step: Step, head: str) -> Tensor | None:
    """KL per frame, or decoder step, from the teachers' distribution at a temperature (Hinton et al. 2015)."""
    if not (target := step.target(head)):
        return None
    student = 1.0 if step.settings.temperature_on == "teacher" else step.temperature
    squared = step.settings.temperature_on == "both"
    return losses.soft_kl(target.student, target.teachers, target.weights, student, squared=squared)


def best_token(step: Step, head: str) -> Tensor | None:
    """Cross-entropy with the teachers' best token, in frames of high confidence."""
    if not (target := step.target(head)):
        return None
    options = step.settings.pseudo_labels.model_dump(exclude={"weight"}) | {"blank": BLANK if head == "ctc" else None}
    return losses.pseudo_label(target.student, target.plain, target.weights, **options)


def words(step: Step, _: str) -> Tensor | None:
    """KL between the teachers' and the student's posteriors over the words of the closed lexicon."""
    if not (rows := step.taught("ctc")):
        return None
    settings, lexicon = step.settings.words, step.hypotheses.lexicon
    target = step.hypotheses.posterior(step.batch.select(rows), settings.temperature)
    lexicon, target = shortlist(lexicon, target, target, settings.shortlist, settings.random_words)
    weights = target.sum(1).clamp(0, 1).round()  # 0 if no word fits into the frames
    return losses.word_kl(*step.emissions(rows), lexicon, target, weights, settings.temperature)


def reference_word(step: Step, _: str) -> Tensor | None:
    """Cross-entropy with the reference among the words of the closed lexicon: lattice-free MMI over whole words."""
    settings, places = step.settings.hard_words, step.word_places
    if not (rows := [row for row in step.labelled if step.batch.utterances[row].text in places]):
        return None
    lexicon, emissions = step.lexicon, step.emissions(rows)
    target = torch.zeros(len(rows), len(lexicon.words))
    target[range(len(rows)), [places[step.batch.utterances[row].text] for row in rows]] = 1.0
    if settings.shortlist:  # the student's most likely words and the reference
        likely = lexicon.scores(emissions) + torch.where(target > 0, 1e9, 0.0)
        lexicon, target = shortlist(lexicon, target, likely, settings.shortlist, settings.random_words)
    return losses.word_kl(*emissions, lexicon, target, torch.ones(len(rows)))


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
    for teacher, weights in step.targets["ctc"].each(step.batch.select(rows), lengths):
        target = target + weights[:, None, None] * losses.occupancy(teacher, lengths, texts)
    counts = (target.sum(-1) > 0.5).float()
    normalised = target / target.sum(-1, keepdim=True).clamp_min(1e-9)
    return losses.soft_kl(logits, normalised.clamp_min(1e-12).log(), counts)


def intermediate_self(step: Step, _: str) -> Tensor:
    """KL per frame of a CTC head on an inner layer from the model's own last head."""
    logits = step.inner_logits
    inside = masks.length_mask(step.outputs.lengths, logits.shape[1]).float()
    return losses.soft_kl(logits, step.outputs.ctc.logits.detach(), inside)


def intermediate_ctc(step: Step, _: str) -> Tensor | None:
    """CTC loss of the references by a head on an inner layer."""
    return _smoothed_ctc(step, step.inner_logits) if step.labelled else None


def encodings(step: Step, _: str) -> Tensor | None:
    """Squared distance of the projected encodings from the teachers' mean (FitNets, Romero et al. 2015)."""
    if not (rows := step.taught("ctc")):
        return None
    lengths = step.outputs.lengths[rows]
    target = step.targets["ctc"].hidden(step.batch.select(rows), lengths)
    encoded = step.of(step.outputs.encoded, rows)[:, : target.shape[1]]
    inside = masks.length_mask(lengths, target.shape[1]).float()
    return losses.feature_mse(encoded, target, inside, step.learner.project)


TERMS: dict[str, Term] = {
    "ctc": Term("beta", "reference", "ctc", frozenset(), ctc),
    "kd_ctc": Term("alpha", "teachers", "ctc", frozenset({"frames"}), divergence),
    "pseudo_ctc": Term("pseudo_labels.weight", "teachers", "ctc", frozenset({"frames"}), best_token),
    "decoder": Term("beta", "reference", "decoder", frozenset(), next_token),
    "kd_decoder": Term("alpha", "teachers", "decoder", frozenset({"steps"}), divergence),
    "pseudo_decoder": Term("pseudo_labels.weight", "teachers", "decoder", frozenset({"steps"}), best_token),
    "words_ctc": Term("words.weight", "teachers", "ctc", frozenset({"texts", "lexicon"}), words),
    "sequence_ctc": Term("sequence.weight", "teachers", "ctc", frozenset({"texts"}), sequence),
    "sequence_decoder": Term("sequence.weight", "teachers", "decoder", frozenset({"texts"}), sequence),
    "occupancy_ctc": Term("occupancy.weight", "teachers", "ctc", frozenset({"frames", "texts"}), occupancy),
    "intermediate_self": Term("intermediate.weight", "self", "", frozenset({"layer"}), intermediate_self),
    "intermediate_ctc": Term("intermediate.weight", "reference", "", frozenset({"layer"}), intermediate_ctc),
    "features": Term("gamma", "teachers", "", frozenset({"frames"}), encodings),
    "hard_words": Term("hard_words.weight", "reference", "ctc", frozenset({"lexicon"}), reference_word),
}


def shortlist(lexicon: Lexicon, target: Tensor, likely: Tensor, size: int, at_random: int) -> tuple[Lexicon, Tensor]:
    """The lexicon and the target [B, W] over it: all words, or each utterance's `size` likeliest and some at random."""
    if not size or size >= len(lexicon.words):
        return lexicon, target
    places = likely.topk(size, 1).indices.unique()
    if at_random:
        places = torch.cat([places, torch.randperm(len(lexicon.words))[:at_random]]).unique()
    part = target[:, places]
    return lexicon.among(places.tolist()), part / part.sum(1, keepdim=True).clamp_min(1e-9)


def _smoothed_ctc(step: Step, logits: Tensor) -> Tensor:
    """CTC loss of the labelled utterances with label smoothing."""
    rows: Sequence[int] = step.labelled
    share, ids = step.settings.ctc_smoothing, [step.batch.ids[row] for row in rows]
    emissions = Emissions(step.of(logits, rows), step.of(step.outputs.lengths, rows))
    loss = reference_losses.ctc_loss(emissions, ids)
    if not share:
        return loss
    inside = masks.length_mask(emissions.lengths, logits.shape[1]).float()
    return (1 - share) * loss + share * losses.uniform_kl(emissions.logits, inside)
