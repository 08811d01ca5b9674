"""Where every artefact of a recipe lies, below outputs/<recipe>/.

Shared by all folds is only what was trained on no speaker of any fold, or on one speaker alone; all else is in the
folder of the held-out speaker and, with few labels, in a folder of that label condition.
"""

from pathlib import Path

from kdlib.corpus.views import SAME
from kdlib.io import repository_root
from kdlib.models.encoders import ENCODERS
from kdlib.params import Params
from kdlib.settings.targets import FUSIONS
from kdlib.settings.teacher import Teacher
from kdlib.teachers.teacher_sets import AVERAGE


class Layout:
    """The folders of one fold of a recipe."""

    def __init__(self, params: Params) -> None:
        self.family = family = _family(params.teacher)
        self.recipe = repository_root() / params.outputs / params.name
        self.fold = self.recipe / params.held_out
        self.labels = self.fold / params.labels if params.labels else self.fold
        self.teachers = self.labels if params.teachers_per_fold else self.recipe  # and their outputs
        self._set, self._variant = _teacher_set(params.teacher), params.variant
        self._of_students = params.teacher.source == "students"
        own = params.pretrained == "from_corpus"
        # shared by folds, unless they depend on one
        self.corpus = self.recipe / "corpus"
        self.pretrained = (self.labels if own else self.recipe) / "pretrained"
        self.tokens = (self.labels if params.tokens_per_fold else self.recipe) / "tokens"
        self.zero_shot = (self.fold if own else self.recipe) / "zero_shot"
        self.base_model = (self.labels if params.base_model_per_fold else self.recipe) / "parents" / family
        self.speaker_features = self.recipe / "speaker_features"
        # of the fold
        self.baseline = self.fold / "baseline"
        self.target_report = self.labels / "target_report" / self._set
        self.logit_student = self.labels / "logit_student" / self._set
        self.collapse = self.fold / "collapse"
        self.notes = self.fold / "notes.csv"
        self.figures = self.fold / "figures"
        # across folds
        self.shared_figures = self.recipe / "figures"
        self.compare = self.recipe / "compare"

    def language_model(self, name: str, *, all_speakers: bool = False) -> Path:
        """The language model of the fold's training texts, or of all speakers'."""
        return (self.recipe if all_speakers else self.labels) / "lm" / name

    def teacher(self, name: str) -> Path:
        """The teacher of a speaker; students that teach are among the fold's students."""
        if self._of_students and name != AVERAGE:
            return self.fold / "students" / name
        if self._of_students:  # of one set
            return self.teachers / "teachers" / self._set / name
        return self.teachers / "teachers" / self.family / name

    def teacher_scores(self, name: str) -> Path:
        """A teacher's scores on all speakers."""
        return self.teachers / "teachers" / self.family / name / "scores"

    def parent_scores(self, name: str) -> Path:
        """A speaker's teacher and its parent on the speech that was set aside from its training."""
        return self.teachers / "teachers" / self.family / name / "parent"

    def outputs(self, name: str, purpose: str) -> Path:
        """A teacher's outputs on training speech or, for analysis, on the test blocks."""
        return self.teachers / "logits" / self.family / name / purpose

    def layer_outputs(self, name: str, output: str) -> Path:
        """The outputs of one of a teacher's layers on training speech."""
        return self.teachers / "logits" / self.family / name / output

    def fusion(self, kind: str) -> Path:
        """A learned fusion of the fold's teachers."""
        return self.labels / "fusion" / self._set / kind

    def word_calibration(self, method: str) -> Path:
        """The calibration of the teachers' words; of a fusion's it is one of all teachers together."""
        return self.labels / "word_calibration" / self._set / (method if method in FUSIONS else "each_teacher")

    def combined_teachers(self, method: str) -> Path:
        """The combined teachers on the held-out speaker's speech."""
        return self.labels / "combined_teachers" / self._set / method

    def student(self, seed: int, variant: str = "") -> Path:
        """A student, of this variant or of another."""
        return self.fold / "students" / (variant or self._variant or "unnamed") / f"seed{seed}"

    def student_scores(self, seed: int, variant: str = "") -> Path:
        """A student's scores."""
        return self.student(seed, variant) / "scores"

    def start_scores(self, seed: int) -> Path:
        """The scores of a student before training."""
        return self.student(seed) / "start"

    def preflight(self, seed: int, *, resumes: bool = False) -> Path:
        """The checks before training: the same for all seeds, unless each continues another student."""
        return self.student(seed).parent / f"preflight{seed if resumes else ''}"

    def ensemble(self, name: str) -> Path:
        """An ensemble of the fold's students."""
        return self.fold / "ensembles" / name


def _family(teacher: Teacher) -> str:
    """Folder name of teachers that can be averaged with each other."""
    if teacher.average_weights:
        single = _family(teacher.model_copy(update={"average_weights": None}))
        return f"{single}-average" + ("-same_level" if teacher.average_weights == "same_level" else "")
    other = "" if teacher.input == SAME else f"-{teacher.input}"
    if teacher.source == "model":
        return f"model-{Path(teacher.model).name if teacher.model else teacher.encoder}{other}"
    if teacher.imported:
        return f"{teacher.source}-{Path(teacher.folder or '').name}{other}"
    if teacher.source != "speakers":
        return teacher.source + other
    scratch = teacher.parent == "none" and not ENCODERS[teacher.encoder].checkpoint
    return teacher.encoder + "-scratch" * scratch + other


def _teacher_set(teacher: Teacher) -> str:
    """Folder name of what depends on the whole set: students are of one family, but form several sets."""
    if teacher.source != "students":
        return _family(teacher)
    return "-".join([_family(teacher), *teacher.students, *map(str, teacher.student_seeds)])
