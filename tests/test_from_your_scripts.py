"""Every setting and command that the page for scripts names exists."""

import re
import typing
from pathlib import Path

import pytest
import yaml

from kdlib.distill import checks
from kdlib.io import repository_root
from kdlib.params import Params, load
from kdlib.pipeline import Fold

PAGE = (repository_root() / "docs/from-your-scripts.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1:4] for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| flag")]
SETTINGS = sorted({name for row in ROWS for name in re.findall(r"`([a-z_]+(?:\.[a-z_]+)?)`", row[1])})


def field_of(model, name):
    """The type of a setting."""
    kind = model.model_fields[name].annotation
    kinds = [one for one in (kind, *typing.get_args(kind)) if hasattr(one, "model_fields")]
    return kinds[0] if kinds else None


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_exist(name):
    section, _, rest = name.partition(".")
    assert section in Params.model_fields
    assert not rest or rest in field_of(Params, section).model_fields


def test_there_are_enough_of_them():
    assert len(SETTINGS) > 20
    assert len(ROWS) > 25


def test_commands_exist():
    makefile = (repository_root() / "Makefile").read_text(encoding="utf-8")
    for command, variables in re.findall(r"make ([a-z-]+)((?: [A-Z_]+=)*)", PAGE):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
        assert all(
            f"$({name})" in makefile or f"option,{name}," in makefile for name in re.findall("[A-Z_]+", variables)
        )


def test_recipes_exist():
    for name in re.findall(r"params/[\w/]+\.yaml", PAGE):
        assert (repository_root() / Path(name)).is_file(), name


@pytest.mark.parametrize("held_out", ["M08", "M05", "M16", "M01"])
def test_the_study_as_it_was_is_a_recipe(held_out):
    params = load("params/original_study.yaml", held_out, variant="decoder_kd")
    assert (params.blocks.train, params.blocks.test) == (("B3",), ("B3",))
    assert (params.uaspeech.microphone, params.fold.dev, params.fold.exclude) == ("all", None, ("M01",))
    assert (params.tokens.size, params.distill.heads, params.distill.temperature.values) == (5000, "decoder", (2.0,))
    assert [phase.epochs for phase in params.student.phases] == [5, 40]
    assert params.student.curriculum.by == "composite"
    own = yaml.safe_load((repository_root() / "params/original_study.yaml").read_text(encoding="utf-8"))["variants"]
    for variant in (*own, "decoder_hard"):
        load("params/original_study.yaml", held_out, variant=variant)


def test_the_preflight_says_what_is_wrong_in_it(smoke):
    """Its decoders across encoders, without a dev speaker, on the block and microphones that it is trained on."""
    recipe = {"distill": {"heads": "decoder", "allow_decoder_kd": True}, "student": {"decoder_layers": 1}}
    recipe |= {"blocks": {"train": ["B3"], "test": ["B3"]}, "outputs": smoke.params.outputs}
    fold = Fold.load("params/smoke.yaml", "M08", "decoder_kd", fold={"dev": None}, overrides=recipe)
    warned = {check.name: check.reason for check in fold.preflight() if check.verdict != "pass"}
    assert {"decoder", "dev speech", "test speech"} <= set(warned)
    assert "the block B3 is trained on and tested" in warned["test speech"]


def test_recordings_of_one_utterance_by_several_microphones_are_told_apart():
    blocks = (["B1"], ["B2"])
    check = checks.check_blocks(blocks, unseen=True, recordings=1785, utterances=255)
    assert check.verdict == "warn"
    assert "the 1,785 test recordings are of 255 utterances" in check.reason
    assert checks.check_blocks(blocks, unseen=True, recordings=255, utterances=255).verdict == "pass"
    assert (
        "without blocks; all of their words are trained on"
        in checks.check_blocks(None, unseen=False, recordings=9, utterances=9).reason
    )
