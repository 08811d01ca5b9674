"""Adaptation of a trained student to a speaker's speech without transcripts."""

from typing import Annotated, Literal

from pydantic import Field

from kdlib.settings import Names, Section, Seeds

PACKAGED = ("hama",)  # recognisers of packages that may be teachers (`teachers/recognisers.py`)
UNLABELLED = ("words", "one_best", "average", "entropy")  # targets that need no transcripts
DEV_MODEL = "dev"  # folder in a student's: the model that is adapted to the dev speaker
Share = Annotated[float, Field(ge=0, le=1)]


class Adaptation(Section):
    """Training that continues with the held-out speaker's training blocks, whose transcripts are withheld.

    The same is done with the dev speaker, whose model chooses the number of steps and has the student's dev scores.
    """

    start: str  # the variant whose trained student of the same seed is adapted
    targets: Literal["words", "one_best", "average", "entropy", "references", "none"] = "words"
    # words: posteriors over the closed lexicon; one_best: their best word, as a reference; average: posteriors by the
    # moving average of the weights, in every step; entropy: of the student's own posteriors, without targets;
    # references: the true transcripts, an upper bound; none: only replay
    # variants whose calibrated students give posteriors, or the package hama; by default the start alone
    teachers: Names = ()
    teacher_seeds: Seeds = (1, 2, 3)
    weight: float = Field(0.5, ge=0)  # of the targets, beside the weights of `distill:` for the labelled speech
    share: float = Field(0.5, gt=0, le=1)  # of a batch; the rest is the fold's labelled training speech
    speech: Literal["train", "test"] = "train"  # blocks; test: the very speech that is scored (test-time adaptation)
    trains: Literal["all", "norms"] = "all"  # norms: normalisation layers alone
    diversity: float = Field(1.0, ge=0)  # of entropy: the weight of that of the mean posterior
    rounds: int = Field(1, ge=1)  # from the second on, posteriors are those of the model that was adapted before
    confidence: Share = 0.0  # least probability of the best word
    agreement: Share = 0.0  # least share of passes with dropout whose best word is the same (DUST, Khurana et al. 2021)
    prior: Share = 0.0  # how far the mean posterior is moved towards the words' frequencies in the training speech
    decay: float = Field(0.995, ge=0, lt=1)  # of the average

    def members(self, seed: int) -> list[tuple[str, int]]:
        """The students that give posteriors, by variant and seed."""
        named = [(name, one) for name in self.teachers if name not in PACKAGED for one in self.teacher_seeds]
        return named if self.teachers else [(self.start, seed)]

    @property
    def packaged(self) -> list[str]:
        """The recognisers of packages that give posteriors."""
        return [name for name in self.teachers if name in PACKAGED]
