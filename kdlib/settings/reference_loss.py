"""The part of a loss that needs no teachers: all of a teacher's own, and of a student's what references give."""

from typing import Literal

from pydantic import Field

from kdlib.settings import Section
from kdlib.settings.schedule import Weight, constant


class HardWordTerm(Section):
    """Cross-entropy with the reference among the words of the closed lexicon; no teacher."""

    weight: Weight = constant(0.0)
    shortlist: int = Field(0, ge=0)  # of each utterance's most likely words, by the student; 0: the whole lexicon
    random_words: int = Field(0, ge=0)  # with a shortlist: additional random words per batch


class IntermediateTerm(Section):
    """A CTC head on an inner encoder layer, trained on references and on the outputs of the student's own last head."""

    weight: Weight = constant(0.0)
    layer: int = Field(2, ge=1)
    shared: bool = False  # the last head's own weights, in place of a head that only training needs


class ReferenceLoss(Section):
    """The terms of references (`objectives/reference_terms.py`), and the heads that are trained."""

    beta: Weight = constant(0.5)  # CTC, and cross-entropy of the decoder
    heads: Literal["ctc", "decoder", "both"] = "ctc"  # heads trained on teachers and references alike
    ctc_weight: float = Field(0.8, ge=0, le=1)  # of the CTC head, if both are trained
    label_smoothing: float = Field(0.1, ge=0, lt=1)  # of the decoder's references
    ctc_smoothing: float = Field(0.0, ge=0, lt=1)  # of the CTC references: towards a uniform distribution per frame
    hard_words: HardWordTerm = HardWordTerm()
    intermediate: IntermediateTerm = IntermediateTerm()
    use_teachers: bool = True  # else the weights of all terms of teachers count as 0
