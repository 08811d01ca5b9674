"""The loss of a student."""

from typing import Literal

from pydantic import Field

from kdlib.settings import Names, Section


class PseudoLabelTerm(Section):
    """Cross-entropy with the teachers' best token, in frames of high confidence (seed 001's `PL CE`)."""

    weight: float = Field(0.0, ge=0)
    confidence: float = Field(0.5, ge=0, le=1)  # minimum probability of the best token
    min_nonblank: float = Field(0.0, ge=0, le=1)  # minimum probability that a frame is not blank
    smoothing: float = Field(0.0, ge=0, lt=1)


class WordTerm(Section):
    """KL between the teachers' and the student's posteriors over the words of the closed lexicon."""

    weight: float = Field(0.0, ge=0)
    temperature: float = Field(1.0, gt=0)  # divides log-probabilities of whole words
    shortlist: int = Field(0, ge=0)  # most likely words per utterance by the teachers; 0: the whole lexicon
    random_words: int = Field(0, ge=0)  # with a shortlist: additional random words per batch


class SequenceTerm(Section):
    """The teachers' hypotheses of an utterance as references of CTC and the decoder."""

    weight: float = Field(0.0, ge=0)
    nbest: int = Field(1, ge=1)  # hypotheses per utterance, weighted by their shares
    hypotheses_from: Literal["lexicon", "greedy", "beam"] = "lexicon"  # words, or any text
    confidence: float = Field(0.0, ge=0, le=1)  # minimum share of the best one: below it the utterance has no target
    weight_by_confidence: bool = True  # weight an utterance by its hypotheses' shares


class OccupancyTerm(Section):
    """KL per frame with the teachers' occupancies of the reference's tokens; without one, those of a confident word."""

    weight: float = Field(0.0, ge=0)
    confidence: float = Field(0.5, ge=0, le=1)  # minimum share of a word that replaces a missing reference


class IntermediateTerm(Section):
    """A CTC head on an inner encoder layer, trained on references and on the outputs of the student's own last head."""

    weight: float = Field(0.0, ge=0)
    layer: int = Field(2, ge=1)


class Distill(Section):
    """The terms of the student's loss: alpha x teachers + beta x references + gamma x the teachers' encodings.

    Besides KL per frame (alpha) there are other kinds of targets, each with its own weight.
    """

    alpha: float = Field(0.5, ge=0)
    alpha_end: float | None = Field(None, ge=0)  # at the end of training, linear from alpha
    beta: float = Field(0.5, ge=0)
    gamma: float = Field(0.0, ge=0)
    heads: Literal["ctc", "decoder", "both"] = "ctc"  # heads trained on teachers and references alike
    ctc_weight: float = Field(0.8, ge=0, le=1)  # of the CTC head, if both are trained
    allow_decoder_kd: bool = False  # train a decoder on NeMo's encoder on SpeechBrain teachers all the same
    temperature: float = Field(2.0, gt=0)
    temperature_end: float | None = Field(None, gt=0)
    temperature_on: Literal["both", "student", "teacher"] = "both"  # what the temperature divides; T ** 2 only for both
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # of the decoder's references
    blanks: Literal["all", "drop_blank", "symmetric"] = "all"  # frames that are trained on
    context_frames: int = Field(2, ge=0)  # frames on each side of a non-blank frame, for symmetric
    max_shift: int = Field(0, ge=0)  # frames by which targets may be moved to fit the student's spikes
    first_token: Literal["keep", "suppress_specials", "skip"] = "keep"  # of the decoder's targets
    pseudo_labels: PseudoLabelTerm = PseudoLabelTerm()
    words: WordTerm = WordTerm()
    sequence: SequenceTerm = SequenceTerm()
    occupancy: OccupancyTerm = OccupancyTerm()
    ctc_smoothing: float = Field(0.0, ge=0, lt=1)  # of the CTC references: towards a uniform distribution per frame
    intermediate: IntermediateTerm = IntermediateTerm()
    control: str = "hard"  # the variant of the same student and steps without teachers
    allow: Names = ()  # preflight checks that may refuse without stopping the run

    @property
    def uses_teachers(self) -> bool:
        """True if the loss has a term of the teachers."""
        return any([self.uses_frame_targets, self.words.weight, self.sequence.weight])

    @property
    def uses_frame_targets(self) -> bool:
        """True if a target is per frame or per decoder step."""
        return any([self.alpha, self.alpha_end, self.gamma, self.pseudo_labels.weight, self.occupancy.weight])

    @property
    def references_only(self) -> bool:
        """True if the references are the only term of the loss."""
        return not (self.uses_teachers or self.ctc_smoothing or self.intermediate.weight)

    @property
    def uses_hypotheses(self) -> bool:
        """True if a term uses the teachers' words or texts."""
        return any([self.words.weight, self.sequence.weight, self.occupancy.weight])

    @property
    def outputs(self) -> tuple[str, ...]:
        """The teachers' outputs that the loss needs: those of the trained heads, and CTC where another term uses it."""
        if not self.uses_teachers:
            return ()
        if not any([self.alpha, self.alpha_end, self.pseudo_labels.weight]):
            return ("ctc",)
        outputs = ("ctc", "decoder") if self.heads == "both" else (self.heads,)
        return outputs if "ctc" in outputs or not (self.gamma or self.uses_hypotheses) else ("ctc", *outputs)

    @property
    def text_source(self) -> tuple[str, float]:
        """The source of the teachers' texts (`sequence.hypotheses_from`), and the least confidence of a used text."""
        if self.sequence.weight:
            return self.sequence.hypotheses_from, self.sequence.confidence
        return "lexicon", 0.0 if self.words.weight else self.occupancy.confidence
