"""The study of collapses: its students, their causes, and the tables of diagnoses and of the factorial."""

import pandas as pd
import pytest

from kdlib.diagnose import causes, collapse_study, examination
from kdlib.diagnose.causes import CAUSES, NO_FAULT, Fingerprint
from kdlib.diagnose.collapse_study import Case
from kdlib.errors import UserError
from kdlib.evaluate import compare, predictions
from kdlib.objectives import terms
from kdlib.params import load
from kdlib.pipeline import Fold
from kdlib.show import format
from kdlib.teachers.teacher_sets import share_of

RECIPE = "params/ablations/collapse.yaml"
WORDS = ["ONE", "TWO", "SEVEN", "NINE", "COME", "GO", "YALE", "CAN", "THE", "WATER", "OTHER", "PEOPLE"]


def case(variant, seed, cause, wra):
    hypotheses = [word if place < wra * len(WORDS) * 4 else "THE" for place, word in enumerate(WORDS * 4)]
    rows = [(f"u{place}", "", *pair) for place, pair in enumerate(zip(WORDS * 4, hypotheses, strict=True))]
    found = examination.examine(pd.DataFrame(rows, columns=predictions.COLUMNS).assign(token_ids=None))
    return Case(variant, seed, cause, found, causes.signs(found) | {"blank_frames": 0.7})  # with frames


def test_the_recipe_has_a_variant_for_every_cause():
    params = load(RECIPE, "M08")
    variants = {name: load(RECIPE, "M08", variant=name) for name in params.compare}
    true = {name: collapse_study.causes_of(variant.faults, variant.distill) for name, variant in variants.items()}
    fingerprints = {Case(name, 1, cause, None, {}).fingerprint.cause for name, cause in true.items()}
    assert set(CAUSES) <= fingerprints
    assert true["hard"] == true["decoder_hard"] == true["ctc_kd"] == true["few_labels"] == NO_FAULT
    assert true["sb_decoder_kd+own_recordings+no_references+shifted_tokens"] == "abd"
    assert Case("", 1, "abd", None, {}).mixed
    assert not Case("", 1, "bd", None, {}).mixed
    assert collapse_study.is_factorial(params.compare)
    assert not collapse_study.is_factorial(load("params/demo.yaml", "M08").compare)
    assert len(params.seeds) >= 2


def test_every_student_of_the_factorial_has_the_control_of_its_head_and_encoder():
    for base, (student, head) in collapse_study.BASES.items():
        for name in collapse_study._factorial_variants():
            if name.split("+")[0] != base:
                continue
            params = load(RECIPE, "M08", variant=name)
            control = load(RECIPE, "M08", variant=params.distill.control)
            assert not terms.uses_teachers(control.distill)
            assert control.student == params.student
            assert control.distill.heads == params.distill.heads == {"CTC": "ctc", "decoder": "decoder"}[head]
            assert params.student.encoder == {"NeMo": "nemo", "SpeechBrain": "sb"}[student]
            assert params.faults.own_recordings == ("own_recordings" in name.split("+"))
            assert params.faults.token_shift == ("shifted_tokens" in name.split("+"))
            assert (not params.distill.beta) == ("no_references" in name.split("+"))


def test_the_parts_cover_every_student_once():
    students = Fold.load(RECIPE, "M08").students()
    parts = [share_of(students, part) for part in ("1/2", "2/2")]
    assert sorted([*parts[0], *parts[1]]) == sorted(students)
    assert len(students) == len(set(students))
    for wrong in ("3/2", "0/2", "one", "1/"):
        with pytest.raises(UserError, match="share: expected something like 1/2"):
            share_of(students, wrong)


def test_identification_rates_count_correct_causes_and_false_alarms():
    cases = [case("hard", seed, NO_FAULT, 0.8) for seed in (1, 2)]
    cases += [case("collapsed", seed, "f", 0.02 * seed) for seed in (1, 2)]
    known = collapse_study.fingerprints(cases)
    table = collapse_study.identification_rates(known, [case("mixed", 1, "af", 0.03).fingerprint])
    assert table.loc["one cause"].to_dict() == {
        "n": 2, "correct cause first": 2, "wrong causes only": 0, "none": 0
    }  # fmt: skip
    assert table.loc["no fault"].to_dict() == {
        "n": 2, "correct cause first": 0, "wrong causes only": 0, "none": 2
    }  # fmt: skip
    assert table.loc["two or more causes", "correct cause first"] == 1
    alarms = collapse_study.identification_rates(
        [*known, *[Fingerprint("e", "same", seed, known[2].signs) for seed in (1, 2)]]
    )
    assert alarms.loc["no fault", "correct cause first"] == 0  # although "none" has the letter e
    summary = collapse_study.summary(cases, known).set_index(["student", "seed"])
    assert summary.loc[("collapsed", 1), "causes_named"] == "f"
    assert summary.loc[("hard", 2), "causes_named"] == "-"
    assert not collapse_study.is_complete(cases)
    cases += [case(f"like {letter}", seed, letter, 0.5) for letter in "gh" for seed in (1, 2)]
    assert collapse_study.is_complete(cases)
    assert not collapse_study.is_complete([case for case in cases if case.seed == 1])


def test_the_factorial_reports_what_collapses_and_what_hurts(monkeypatch, tmp_path):
    """Students with the WRA of their variants, 96 utterances, two seeds."""
    right = {"hard": 0.8, "own_recordings": 0.5, "no_references": 0.78, "shifted_tokens": 0.02}

    def fake_scores(variant, seed):
        share = min(right.get(part, 0.8) for part in variant.split("+"))
        return tmp_path / f"{variant}-{share}-{seed}"

    def control_of(variant):
        return load(RECIPE, "M08", variant=variant).distill.control

    def fake_collect(folders, decoder):
        rows = []
        for seed, folder in enumerate(folders):
            share = float(folder.name.split("-")[1])
            for place in range(96):
                word = WORDS[place % 12]
                rows.append((f"u{place}", "M08", word, word if place < 96 * share + seed else "X", seed))
        return pd.DataFrame(rows, columns=["utt_id", "speaker", "reference", "hypothesis", "seed"])

    monkeypatch.setattr(compare, "collect", fake_collect)
    table = collapse_study.factorial(fake_scores, control_of, (1, 2)).set_index("system")
    assert len(table) == 4 * 9
    assert table.loc["ctc_kd+shifted_tokens", "verdict"] == "collapses"
    assert table.loc["ctc_kd+own_recordings", "verdict"] == "hurts"
    assert table.loc["sb_decoder_kd", "verdict"] == "no difference shown"
    assert table.loc["ctc_kd+own_recordings", "low"] < 0.5 < table.loc["ctc_kd+own_recordings", "high"]
    assert (table.spread_of_seeds > 0).all()
    shown = format.factorial(table.reset_index())
    assert shown.loc[("NeMo", "CTC", "ctc_kd+own_recordings"), "difference, 95 %"].startswith("-30")
