"""The matrix of teachers by speakers, from other people's result files."""

import argparse
import json

import pandas as pd
import pytest

from kdlib.errors import UserError
from kdlib.show import cross_tests

RIGHT = {("M04", "M04"): 3, ("M04", "F03"): 1, ("F03", "M04"): 0, ("F03", "F03"): 4}  # of four words


@pytest.fixture
def study(tmp_path):
    """Two teachers on two speakers, in one file each."""
    for (teacher, speaker), right in RIGHT.items():
        rows = [
            {"id": f"{speaker}_B2_C{number}_M5", "reference": "ONE", "prediction": "ONE" if number < right else "TWO"}
            for number in range(4)
        ]
        folder = tmp_path / "study" / f"teacher_{teacher}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"test_{speaker}.json").write_text(json.dumps({"details": rows}))
    return tmp_path / "study"


def test_every_teacher_is_scored_on_every_speaker(study):
    table = cross_tests.cross_tests(study)
    assert {(row.teacher, row.speaker): row.value * 4 for row in table.itertuples()} == RIGHT
    wide = cross_tests.matrix(table)
    assert list(wide.index) == list(wide.columns) == ["M04", "F03"]  # the least intelligible first
    text = cross_tests.summary(wide)
    assert "own teacher 87.5 %, of the others 12.5 %" in text
    assert "best first: M04 25.0, F03 0.0" in text
    errors = cross_tests.matrix(cross_tests.cross_tests(study, "wer"))
    assert errors.loc["M04", "F03"] == 0.75
    assert "best first: M04 75.0, F03 100.0" in cross_tests.summary(errors, "wer")


def test_the_command_writes_table_and_figure(study, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    cross_tests.add_arguments(parser)
    cross_tests.run(parser.parse_args([str(study), "--out", str(tmp_path / "out")]))
    assert "75.0" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "out/matrix.csv")) == 4
    assert (tmp_path / "out/matrix.pdf").is_file()


def test_names_alone_tell_teacher_and_speaker(tmp_path):
    rows = [{"id": f"u{number}", "reference": "ONE", "prediction": "ONE"} for number in range(3)]
    for name in ("M04_on_M08.json", "teacher_F03/wer_M08.json", "M05/M05_on_M08.json", "M16/wer_M16.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"details": rows}))
    (tmp_path / "teacher_M10").mkdir()
    (tmp_path / "teacher_M10/test.json").write_text(json.dumps({"held_out": "M01", "details": rows}))
    table = cross_tests.cross_tests(tmp_path)
    pairs = {("M04", "M08"), ("F03", "M08"), ("M05", "M08"), ("M16", "M16"), ("M10", "M01")}
    assert set(zip(table.teacher, table.speaker, strict=True)) == pairs
    with pytest.raises(UserError, match="expected a folder of result files"):
        cross_tests.cross_tests(tmp_path / "M04_on_M08.json")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wer.json", "no teacher is in its path"),
        ("M04/M05/wer_F03.json", r"several speakers are in its path .M04, M05."),
    ],
)
def test_a_path_without_one_teacher_is_refused(tmp_path, name, message):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": "F03_B2_C1_M5", "reference": "ONE", "prediction": "ONE"}]
    (tmp_path / name).write_text(json.dumps({"details": rows}))
    with pytest.raises(UserError, match=message):
        cross_tests.cross_tests(tmp_path)


def test_speech_of_nobody_is_refused(tmp_path):
    rows = [{"id": "u1", "reference": "ONE", "prediction": "ONE"}]
    (tmp_path / "a.json").write_text(json.dumps({"details": rows}))
    with pytest.raises(UserError, match="whose speech it is of is not known"):
        cross_tests.cross_tests(tmp_path)
