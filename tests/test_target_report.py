import json

from kdlib.pipeline import Fold
from kdlib.settings.targets import METHODS
from kdlib.targets.target_report import SAMPLE, disagreement, report_frame


def test_every_method_is_decoded_on_training_and_dev_speech(with_teachers):
    folder = with_teachers.target_report()
    table = report_frame(folder)
    assert set(zip(table.method, table.speech, strict=True)) == {
        (method, speech) for method in METHODS for speech in ("training", "dev")
    }
    train = with_teachers.splits.train
    assert table[table.speech == "training"].n.unique().tolist() == [min(SAMPLE, len(train))]
    coverage = json.loads((folder / "logprob_mean" / "coverage.json").read_text())
    assert coverage == {"teachers": 1, "usable": len(train), "incomplete": 0, "left_out": 0}


def test_a_single_teacher_scores_the_same_under_every_mean(with_teachers):
    table = report_frame(with_teachers.target_report()).set_index(["method", "speech"])
    for speech in ("training", "dev"):
        means = [method for method in METHODS if method != "transformer"]  # which corrects even a single teacher
        scores = {tuple(table.loc[(method, speech)].drop(["teachers", "remark"])) for method in means}
        assert len(scores) == 1


def test_a_fold_without_a_dev_speaker_has_no_dev_speech(with_teachers):
    speakers = {"dev": None, "exclude": ["M01"], "teachers": ["M04", "M10"]}
    fold = Fold.load("params/smoke.yaml", "M08", fold=speakers, overrides={"outputs": with_teachers.params.outputs})
    folder = fold.target_report()
    assert set(report_frame(folder).speech) == {"training"}
    pairs, simultaneous = disagreement(folder)
    assert len(pairs) == 1
    assert len(simultaneous) == 2
