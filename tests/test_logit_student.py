"""Seed 003's student: teachers' logits in, its own out."""

import pandas as pd
import torch

from kdlib.distill.logit_student import LogitStudent
from kdlib.io import read_json


def test_the_logit_student_is_trained_validated_and_scored(with_teachers):
    params = with_teachers.params
    assert (params.logit_student.temperature, params.teacher.encoder) == (3.0, "sb")
    folder = with_teachers.logit_student()
    assert read_json(folder / "scores.json")["held_out"] == "M08"
    assert set(pd.read_csv(folder / "hypotheses.csv").speaker) == {"M08"}
    assert set(pd.read_csv(folder / "dev/hypotheses.csv").speaker) == {"M10"}
    validations = read_json(folder / "validations.json")
    assert [validation["step"] for validation in validations] == list(range(1, 9))


def test_outputs_depend_on_differences_of_logits_and_not_on_padding():
    torch.manual_seed(0)
    student = LogitStudent(2, 9, dim=16, layers=1).eval()
    logits, lengths = [torch.randn(2, 7, 9) for _ in range(2)], torch.tensor([7, 4])
    outputs = student(logits, lengths).ctc.logits
    shifted = [part + 5 * torch.randn(2, 7, 1) for part in logits]
    assert torch.allclose(student(shifted, lengths).ctc.logits, outputs, atol=1e-4)
    changed = [part.clone() for part in logits]
    for part in changed:
        part[1, 4:] = 9.0
    assert torch.allclose(student(changed, lengths).ctc.logits[1, :4], outputs[1, :4], atol=1e-5)
