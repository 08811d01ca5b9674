"""The study of collapses: which students belong to it, what they are said to have, and what is counted."""

import pandas as pd
import pytest

from kdlib.distill import study
from kdlib.distill.study import Case
from kdlib.errors import UserError
from kdlib.evaluate import answers, collapse, compare, diagnose
from kdlib.evaluate.diagnose import CAUSES, SOUND, Fingerprint
from kdlib.params import load

RECIPE = "params/ablations/collapse.yaml"
WORDS = ["ONE", "TWO", "SEVEN", "NINE", "COME", "GO", "YALE", "CAN", "THE", "WATER", "OTHER", "PEOPLE"]


def case(variant, seed, cause, wra):
    said = [word if place < wra * len(WORDS) * 4 else "THE" for place, word in enumerate(WORDS * 4)]
    rows = pd.DataFrame(
        [(f"u{place}", "", told, text) for place, (told, text) in enumerate(zip(WORDS * 4, said, strict=True))],
        columns=answers.COLUMNS,
    ).assign(token_ids=None)
    found = collapse.examine(rows)
    return Case(variant, seed, cause, found, diagnose.signs(found) | {"blank": 0.7})  # frames were kept


def test_every_cause_is_made_by_a_variant_of_the_recipe():
    params = load(RECIPE, "M08")
    made = {name: study.cause(load(RECIPE, "M08", variant=name)) for name in params.compare}
    alone = {Case(name, 1, cause, None, {}).fingerprint.cause for name, cause in made.items()}
    assert set(CAUSES) <= alone
    assert made["hard"] == made["decoder_hard"] == made["ctc_kd"] == made["few_labels"] == SOUND
    assert made["sb_decoder_kd+own+untold+shifted"] == "abd"
    assert Case("", 1, "abd", None, {}).mixed
    assert not Case("", 1, "bd", None, {}).mixed
    assert study.crossed(params)
    assert not study.crossed(load("params/demo.yaml", "M08"))
    assert len(params.seeds) >= 2


def test_every_student_of_the_factorial_has_the_control_of_its_head_and_backbone():
    for base, (student, head) in study.BASES.items():
        for name in study._joined():
            if name.split("+")[0] != base:
                continue
            params = load(RECIPE, "M08", variant=name)
            control = load(RECIPE, "M08", variant=params.distill.control)
            assert not control.distill.taught
            assert control.student == params.student
            assert control.distill.heads == params.distill.heads == {"CTC": "ctc", "decoder": "decoder"}[head]
            assert params.student.backbone == {"NeMo": "nemo", "SpeechBrain": "sb"}[student]
            assert params.faults.own_recordings == ("own" in name.split("+"))
            assert params.faults.shift == ("shifted" in name.split("+"))
            assert (params.distill.beta == 0) == ("untold" in name.split("+"))


def test_parts_share_the_students_and_miss_none():
    params = load(RECIPE, "M08")
    every = study.listed(params)
    assert sorted([*study.listed(params, "1/2"), *study.listed(params, "2/2")]) == sorted(every)
    assert len(every) == len(set(every))
    for wrong in ("3/2", "0/2", "one", "1/"):
        with pytest.raises(UserError, match="part: expected something like 1/2"):
            study.listed(params, wrong)


def test_who_is_told_apart_is_counted_with_false_alarms():
    cases = [case("hard", seed, SOUND, 0.8) for seed in (1, 2)]
    cases += [case("dead", seed, "f", 0.02 * seed) for seed in (1, 2)]
    known = study.fingerprints(cases)
    table = study.told_apart(known, [case("mixed", 1, "af", 0.03).fingerprint])
    assert table.loc["one cause"].to_dict() == {
        "n": 2, "the cause named first": 2, "only others named": 0, "none named": 0
    }  # fmt: skip
    assert table.loc["no fault"].to_dict() == {
        "n": 2, "the cause named first": 0, "only others named": 0, "none named": 2
    }  # fmt: skip
    assert table.loc["two or more causes", "the cause named first"] == 1
    alarms = study.told_apart([*known, *[Fingerprint("e", "same", seed, known[2].signs) for seed in (1, 2)]])
    assert alarms.loc["no fault", "the cause named first"] == 0  # whatever letters "none" has
    summary = study.summary(cases, known)
    assert summary.loc[("dead", 1), "named"] == "f"
    assert summary.loc[("hard", 2), "named"] == "-"
    assert not study.complete(cases)
    cases += [case(f"like {letter}", seed, letter, 0.5) for letter in "gh" for seed in (1, 2)]
    assert study.complete(cases)
    assert not study.complete([one for one in cases if one.seed == 1])


def test_the_factorial_says_what_kills_and_what_hurts(monkeypatch, tmp_path):
    """Students that are as good as their names say, 96 utterances, two seeds."""
    right = {"hard": 0.8, "own": 0.5, "untold": 0.78, "shifted": 0.02}

    def scored(params, seed):
        share = min(right.get(part, 0.8) for part in params.variant.split("+"))
        return tmp_path / f"{params.variant}-{share}-{seed}"

    def collected(folders, place):
        rows = []
        for seed, folder in enumerate(folders):
            share = float(folder.name.split("-")[1])
            for place_ in range(96):
                word = WORDS[place_ % 12]
                said = word if place_ < 96 * share + seed else "X"
                rows.append((f"u{place_}", "M08", word, said, seed))
        return pd.DataFrame(rows, columns=["utt_id", "speaker", "reference", "hypothesis", "seed"])

    monkeypatch.setattr(study.students, "scored", scored)
    monkeypatch.setattr(compare, "collected", collected)
    table = study.factorial(lambda name: load(RECIPE, "M08", variant=name), (1, 2)).set_index("system")
    assert len(table) == 4 * 9
    assert table.loc["ctc_kd+shifted", "verdict"] == "kills"
    assert table.loc["ctc_kd+own", "verdict"] == "hurts"
    assert table.loc["sb_decoder_kd", "verdict"] == "no difference shown"
    assert table.loc["ctc_kd+own", "low"] < 0.5 < table.loc["ctc_kd+own", "high"]
    assert (table.spread_of_seeds > 0).all()
    shown = study.shown(table.reset_index())
    assert shown.loc[("NeMo", "CTC", "ctc_kd+own"), "difference, 95 %"].startswith("-30")
