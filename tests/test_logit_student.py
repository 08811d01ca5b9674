"""Seed 003's student: teachers' logits in, its own out."""

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from kdlib.decode.lexicon import Lexicon
from kdlib.distill.logit_student import LogitStudent, TeacherDecoders
from kdlib.io import read_json
from kdlib.models import hybrid


def test_the_logit_student_is_trained_validated_and_scored(with_teachers):
    params = with_teachers.params
    assert (params.logit_student.temperature, params.teacher.encoder) == (3.0, "sb")
    folder = with_teachers.logit_student()
    assert read_json(folder / "scores.json")["held_out"] == "M08"
    assert set(pd.read_csv(folder / "hypotheses.csv").speaker) == {"M08"}
    assert set(pd.read_csv(folder / "dev/hypotheses.csv").speaker) == {"M10"}
    validations = read_json(folder / "validations.json")
    assert [validation["step"] for validation in validations] == list(range(1, 9))


@pytest.mark.parametrize("model", ["mlp", "transformer"])
def test_over_decoders_it_recognises_without_a_reference(with_teachers, tmp_path, model):
    settings = with_teachers.params.logit_student.model_copy(update={"heads": "decoder", "model": model})
    fold = with_teachers.but(logit_student=settings)
    fold.layout.logit_student = tmp_path / model
    rows = pd.read_csv(fold.logit_student() / "hypotheses.csv", keep_default_na=False)
    assert "attention" in read_json(tmp_path / model / "scores.json")["decoders"]
    teachers = {name: hybrid.load(fold.teacher(name))[0].eval() for name in fold.target_teachers()}
    student = LogitStudent(len(teachers), fold.tokens.size, dim=16, layers=1, kind=model, causal=True)
    student.load_state_dict(load_file(tmp_path / model / "model.safetensors"))
    system = TeacherDecoders(list(teachers.values()), student.eval()).eval()
    nameless = [utt.replace(text="") for utt in fold.splits.test[:4]]  # the same without their references
    outputs = system.recognise(nameless)
    longest = max(map(len, Lexicon(fold.lexicon, fold.tokens).sequences)) + 4
    found = system.decode_greedy(outputs.encoded, longest, outputs.lengths)
    texts = dict(zip(rows.utt_id, rows.attention, strict=True))
    assert [fold.tokens.decode(ids) for ids in found] == [texts[utt.utt_id] for utt in nameless]


def test_a_step_of_a_decoder_reads_no_later_one():
    torch.manual_seed(0)
    student, logits = LogitStudent(2, 9, dim=16, layers=1, causal=True).eval(), [torch.randn(1, 7, 9) for _ in range(2)]
    outputs = student(logits, torch.tensor([7])).ctc.logits
    changed = [torch.cat([part[:, :4], torch.randn(1, 3, 9)], 1) for part in logits]
    assert torch.allclose(student(changed, torch.tensor([7])).ctc.logits[:, :4], outputs[:, :4], atol=1e-5)


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
