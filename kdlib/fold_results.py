"""What a fold's students gave: their results side by side, their losses and targets, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.fold_students import StudentObjects
from kdlib.objectives import terms
from kdlib.source_code import lazy

if TYPE_CHECKING:
    from kdlib.diagnose.collapse_study import Case
    from kdlib.distill.loss_view import LossView
    from kdlib.targets.pseudo_labels import TeacherHypotheses

# Imported when they are used: torch and its companions take seconds.
checks = lazy("kdlib.distill.checks")
collapse_study = lazy("kdlib.diagnose.collapse_study")
loss_view = lazy("kdlib.distill.loss_view")


class StudentResults(StudentObjects):
    """One fold of a recipe, under one of its variants: with the results of its students."""

    def students(self) -> list[tuple[str, int]]:
        """The students that the recipe compares, by variant and seed."""
        return [(variant, seed) for seed in self.params.seeds for variant in self.params.compare]

    def systems(self, seed: int = 1) -> dict[str, Path]:
        """The scores of the pretrained model, of the control and of the student."""
        folds = {fold.params.variant: fold for fold in (self.control, self)}
        first = {} if self.params.pretrained == "none" else {"pretrained": self.baseline()}
        return first | {name: fold.scores(seed) for name, fold in folds.items()}

    def loss_view(self, seed: int = 1) -> LossView:
        """Some utterances as the loss sees them, before and after training."""
        fold = self.resolved
        return loss_view.view(fold.student_setup(seed), self.student(seed))

    def teacher_hypotheses(self) -> TeacherHypotheses | None:
        """The teachers' hypotheses that the student is trained on, if it is."""
        return self._hypotheses(
            {output: self._student_targets(output) for output in terms.outputs(self.params.distill)}
        )

    def combined_teachers(self) -> Path | None:
        """Scores of the combined teachers on the held-out speaker's speech; None without such teachers."""
        settings = self.params.teacher
        taught = terms.uses_teachers(self.params.distill) and (settings.of_speakers or settings.average_weights)
        if not taught or self.own_recordings:  # no teacher has outputs on the held-out speaker's
            return None
        method = self.params.aggregation.method
        method = self.best_method()[0] if method == "auto" else method
        return self.combined_teacher_scores("logprob_mean" if method == "weighted_loss" else method)

    # 05: what is wrong

    def examination(self, seed: int = 1) -> Case:
        """Examine a student's hypotheses on the held-out speaker's test speech, with the record of its training."""
        scores, used = self.scores(seed), self.resolved
        results = collapse_study.StudentResults(
            variant=self.params.variant,
            seed=seed,
            cause=collapse_study.causes_of(used.params.faults, used.params.distill),
            scores=scores,
            decoder=collapse_study.examined_decoder(used.params.faults, used.params.distill),
            tokens=self.tokens,
            vocabulary=list(self.lexicon),
            training=[utt.text for utt in self.student_data().train if utt.text],
            teachers=used.combined_teachers(),
            checks=tuple(check.name for check in self.preflight(seed) if check.verdict != checks.PASS),
        )
        return collapse_study.examine_student(results)
