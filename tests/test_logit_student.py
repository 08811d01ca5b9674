"""Seed 003's student: teachers' logits in, its own out."""

import pandas as pd
import torch

from kdlib.distill import logit_student
from kdlib.distill.logit_student import LogitStudent
from kdlib.io import read_json
from kdlib.params import load


def test_it_is_trained_scored_and_keeps_its_best_look(taught):
    params = load("params/smoke.yaml", "M08", overrides={"outputs": taught.outputs})
    assert (params.logit_student.temperature, params.teacher.backbone) == (3.0, "sb")
    folder = logit_student.logit_student_scores(params)
    assert read_json(folder / "scores.json")["held_out"] == "M08"
    assert set(pd.read_csv(folder / "hypotheses.csv").speaker) == {"M08"}
    assert set(pd.read_csv(folder / "dev/hypotheses.csv").speaker) == {"M10"}
    looks = read_json(folder / "validations.json")
    assert [one["step"] for one in looks] == list(range(1, 9))


def test_it_hears_nothing_but_differences_of_logits_and_no_padding():
    torch.manual_seed(0)
    student = LogitStudent(2, 9, dim=16, layers=1).eval()
    logits, lengths = [torch.randn(2, 7, 9) for _ in range(2)], torch.tensor([7, 4])
    said = student(logits, lengths).ctc_logits
    louder = [one + 5 * torch.randn(2, 7, 1) for one in logits]
    assert torch.allclose(student(louder, lengths).ctc_logits, said, atol=1e-4)
    changed = [one.clone() for one in logits]
    for one in changed:
        one[1, 4:] = 9.0
    assert torch.allclose(student(changed, lengths).ctc_logits[1, :4], said[1, :4], atol=1e-5)
