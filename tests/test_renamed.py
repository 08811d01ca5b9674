"""Recipes and artefacts with the names of revisions up to 52d94dd are refused or made anew, each in one line."""

import json
import re
from importlib.resources import files

import pytest
import yaml

from kdlib.diagnose import causes
from kdlib.errors import UserError
from kdlib.logits.store import LogitStore
from kdlib.models import hybrid, read_record
from kdlib.params import Params, load
from kdlib.settings.messages import valid_names
from kdlib.stage import Stage, produce

RENAMED = yaml.safe_load(files("kdlib").joinpath("data/renamed.yaml").read_text())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"student": {"looks": 2}}, "student.looks was renamed to student.validations_per_epoch"),
        ({"hear_held_out": True}, "hear_held_out was renamed to use_unlabelled_held_out"),
        ({"ensembles": {"two": {"of": ["hard"]}}}, "ensembles.two.of was renamed to ensembles.variants"),
        ({"distill": {"pseudo": {"weight": 0.1}}}, "distill.pseudo was renamed to distill.pseudo_labels"),
        ({"distill": {"first_token": "no_specials"}}, "distill.first_token: 'no_specials' was renamed to 'suppress_sp"),
        ({"faults": {"choose_by": "words"}}, "faults.choose_by: 'words' was renamed to 'wra'"),
    ],
)
def test_an_old_setting_is_refused_with_its_new_name(overrides, message):
    with pytest.raises(UserError, match=message):
        load("params/demo.yaml", "M08", overrides=overrides)


def test_an_old_setting_in_a_variant_and_an_old_variant_are_refused_with_their_new_names():
    overrides = {"variants": {"mine": {"distill": {"around": 2}}}}
    with pytest.raises(UserError, match=r"variants.mine: distill.around was renamed to distill.context_frames"):
        load("params/demo.yaml", "M08", overrides=overrides, variant="mine")
    with pytest.raises(UserError, match="variants: 'untold' was renamed to 'no_references'"):
        load("params/ablations/collapse.yaml", "M08", variant="ctc_kd+untold")


@pytest.mark.parametrize("new", RENAMED["settings"].values())
def test_every_new_name_of_a_setting_exists(new):
    *place, name = re.match(r"[\w.]+", new)[0].split(".")  # what follows explains its value
    if place:  # else the name of a value
        assert name in valid_names(["ensembles", "name"] if place == ["ensembles"] else place, Params)
    else:
        assert name in Params.model_fields or name in ("suppress_specials", "wra")


def test_an_old_model_is_refused(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps({"backbone": "sb", "heard": ["M04"]}))
    for read in (read_record, hybrid.load):
        with pytest.raises(UserError, match=r"was written by an earlier version of kdlib.*; train it again"):
            read(tmp_path)


def test_an_old_store_is_refused(tmp_path):
    (tmp_path / "header.json").write_text(json.dumps({"heard": ["M04"], "schema": 1, "checksums": {}}))
    with pytest.raises(UserError, match=r"another version of kdlib \(schema 1, .*; extract the store again"):
        LogitStore(tmp_path)


def test_old_fingerprints_are_refused(tmp_path, monkeypatch):
    made = tmp_path / "outputs/collapse/M08/collapse"
    made.mkdir(parents=True)
    row = {"cause": "a", "case": "own", "seed": 1, "signs": {"misread": 1.0}, "checks": []}
    (made / "fingerprints.json").write_text(json.dumps({"fingerprints": [row]}))
    monkeypatch.setattr(causes, "repository_root", lambda: tmp_path)
    causes.known_fingerprints.cache_clear()
    with pytest.raises(UserError, match="earlier version of kdlib"):
        causes.known_fingerprints()
    causes.known_fingerprints.cache_clear()


def test_an_old_stage_is_named_once_and_made_anew(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"key": "old", "what": name}))
        produce(Stage(tmp_path / name, name, build=lambda partial: (partial / "x").write_text("new")))
        assert (tmp_path / name / "x").read_text() == "new"
    assert capsys.readouterr().out.count("made by an earlier version of kdlib") == 1
