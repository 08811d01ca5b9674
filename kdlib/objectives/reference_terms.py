"""The terms of the references: all that teachers, and students without teachers, are trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdlib.models import Emissions
from kdlib.objectives.term import Term
from kdlib.source_code import lazy
from kdlib.tokens import normalise

if TYPE_CHECKING:
    from torch import Tensor

    from kdlib.objectives.step import Step

# Imported when they are used: recipes are checked without torch.
torch = lazy("torch")
masks = lazy("kdlib.models.masks")
reference_losses = lazy("kdlib.objectives.reference_losses")
word_losses = lazy("kdlib.objectives.word_losses")


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


def reference_word(step: Step, _: str) -> Tensor | None:
    """Cross-entropy with the reference among the words of the closed lexicon: lattice-free MMI over whole words."""
    settings, places = step.settings.hard_words, step.word_places
    texts, frames = [normalise(utt.text) for utt in step.batch.utterances], step.outputs.lengths.tolist()
    known = [row for row in step.labelled if texts[row] in places]
    if not (rows := [row for row in known if step.lexicon.least_frames[places[texts[row]]] <= frames[row]]):
        return None
    lexicon, emissions = step.lexicon, step.emissions(rows)
    target = torch.zeros(len(rows), len(lexicon.words))
    target[range(len(rows)), [places[texts[row]] for row in rows]] = 1.0
    if settings.shortlist:  # the student's most likely words and the reference
        likely = lexicon.scores(emissions) + torch.where(target > 0, 1e9, 0.0)
        lexicon, target = word_losses.shortlist(lexicon, target, likely, settings.shortlist, settings.random_words)
    return word_losses.word_kl(*emissions, lexicon, target, torch.ones(len(rows)))


def intermediate_ctc(step: Step, _: str) -> Tensor | None:
    """CTC loss of the references by a head on an inner layer."""
    return _smoothed_ctc(step, step.inner_logits) if step.labelled else None


REFERENCE_TERMS: dict[str, Term] = {
    "ctc": Term("beta", "reference", "ctc", frozenset(), ctc),
    "decoder": Term("beta", "reference", "decoder", frozenset(), next_token),
    "intermediate_ctc": Term("intermediate.weight", "reference", "", frozenset({"layer"}), intermediate_ctc),
    "hard_words": Term("hard_words.weight", "reference", "ctc", frozenset({"lexicon"}), reference_word),
}


def _smoothed_ctc(step: Step, logits: Tensor) -> Tensor:
    """CTC loss of the labelled utterances with label smoothing."""
    rows: Sequence[int] = step.labelled
    share, ids = step.settings.ctc_smoothing, [step.batch.ids[row] for row in rows]
    emissions = Emissions(step.of(logits, rows), step.of(step.outputs.lengths, rows))
    loss = reference_losses.ctc_loss(emissions, ids)
    if not share:
        return loss
    inside = masks.length_mask(emissions.lengths, logits.shape[1]).float()
    return (1 - share) * loss + share * reference_losses.uniform_kl(emissions.logits, inside)
