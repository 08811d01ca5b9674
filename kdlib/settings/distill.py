"""The loss of a student."""

from typing import Annotated, Literal

from pydantic import Field

from kdlib.settings import Names, Section
from kdlib.settings.reference_loss import ReferenceLoss
from kdlib.settings.schedule import Temperature, Weight, constant

Layer = Annotated[int, Field(ge=1)]  # of an encoder, the first is 1


class PseudoLabelTerm(Section):
    """Cross-entropy with the teachers' best token, in frames of high confidence (the original study's `PL CE`)."""

    weight: Weight = constant(0.0)
    confidence: float = Field(0.5, ge=0, le=1)  # minimum probability of the best token
    min_nonblank: float = Field(0.0, ge=0, le=1)  # minimum probability that a frame is not blank
    smoothing: float = Field(0.0, ge=0, lt=1)


class WordTerm(Section):
    """KL between the teachers' and the student's posteriors over the words of the closed lexicon."""

    weight: Weight = constant(0.0)
    temperature: float = Field(1.0, gt=0)  # divides log-probabilities of whole words
    shortlist: int = Field(0, ge=0)  # most likely words per utterance by the teachers; 0: the whole lexicon
    random_words: int = Field(0, ge=0)  # with a shortlist: additional random words per batch
    pooled: bool = False  # the mean over all training recordings of a word, each by its teachers, is the word's target


class SequenceTerm(Section):
    """The teachers' hypotheses of an utterance as references of CTC and the decoder."""

    weight: Weight = constant(0.0)
    nbest: int = Field(1, ge=1)  # hypotheses per utterance, weighted by their shares
    hypotheses_from: Literal["lexicon", "greedy", "beam"] = "lexicon"  # words, or any text
    confidence: float = Field(0.0, ge=0, le=1)  # minimum share of the best one: below it the utterance has no target
    weight_by_confidence: bool = True  # weight an utterance by its hypotheses' shares


class OccupancyTerm(Section):
    """KL per frame with the teachers' occupancies of the reference's tokens; without one, those of a confident word."""

    weight: Weight = constant(0.0)
    confidence: float = Field(0.5, ge=0, le=1)  # minimum share of a word that replaces a missing reference


class ErrorTerm(Section):
    """Expected word errors among the n-best texts of the student's own beam search (MWER, Prabhavalkar et al. 2018)."""

    weight: Weight = constant(0.0)
    nbest: int = Field(4, ge=2)


class ConsistencyTerm(Section):
    """KL between the student's outputs on two views of an utterance, with other masks and dropout; no teacher.

    A batch has half as many utterances, each twice, so that a step costs the same (CR-CTC, Yao et al. 2024).
    """

    weight: Weight = constant(0.0)


class EntropyTerm(Section):
    """Entropy of the student's own posterior over words, of utterances without transcripts; no teacher.

    Less the entropy of the mean posterior of a batch, which keeps a student from one word for all (as in SHOT, Liang et
    al. 2020).
    """

    weight: Weight = constant(0.0)
    diversity: float = Field(1.0, ge=0)  # of the mean posterior


class AverageTerm(Section):
    """KL from the moving average of the student's own weights, on speech without masks (Tarvainen & Valpola 2017)."""

    weight: Weight = constant(0.0)
    decay: float = Field(0.995, ge=0, lt=1)  # of a step's weights


class Distill(ReferenceLoss):
    """The terms of the student's loss (`objectives/terms.py`): alpha x teachers + beta x references + ...

    Every weight, and the temperature, may change during training: a number, `{from: 0.5, to: 0.1}`, or
    `[[1, 0.5], [31, 0.1]]` by epoch.
    """

    alpha: Weight = constant(0.5)
    gamma: Weight = constant(0.0)
    layers: dict[Layer, Layer] = Field({})  # of gamma: the student's -> the teachers'; empty: the encodings
    allow_decoder_kd: bool = False  # train a decoder on NeMo's encoder on SpeechBrain teachers all the same
    temperature: Temperature = constant(2.0)
    temperature_on: Literal["both", "student", "teacher"] = "both"  # what the temperature divides; T ** 2 only for both
    blanks: Literal["all", "drop_blank", "symmetric"] = "all"  # frames that are trained on
    context_frames: int = Field(2, ge=0)  # frames on each side of a non-blank frame, for symmetric
    max_shift: int = Field(0, ge=0)  # frames by which targets may be moved to fit the student's spikes
    first_token: Literal["keep", "suppress_specials", "skip"] = "keep"  # of the decoder's targets
    pseudo_labels: PseudoLabelTerm = PseudoLabelTerm()
    words: WordTerm = WordTerm()
    sequence: SequenceTerm = SequenceTerm()
    occupancy: OccupancyTerm = OccupancyTerm()
    word_errors: ErrorTerm = ErrorTerm()
    consistency: ConsistencyTerm = ConsistencyTerm()
    average: AverageTerm = AverageTerm()
    word_entropy: EntropyTerm = EntropyTerm()
    live_teachers: bool = False  # run the teachers in every step, instead of reading their stored outputs by frame
    control: str = "hard"  # the variant of the same student and steps without teachers
    allow: Names = ()  # preflight checks that may refuse without stopping the run
