"""The setup files agree: pyproject.toml, requirements.lock, environment.yml, Makefile."""

import re
import subprocess
import tomllib

import pytest
import yaml

from kdlib.io import repository_root

PROJECT = tomllib.loads((repository_root() / "pyproject.toml").read_text())["project"]
LOCK = (repository_root() / "requirements.lock").read_text()


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def locked():
    versions = {}
    for line in LOCK.splitlines():
        name, _, version = line.split(";")[0].strip().partition("==")
        versions.setdefault(plain(name), []).append(version)
    return versions


def direct():
    extras = PROJECT["optional-dependencies"].values()
    for requirement in [*PROJECT["dependencies"], *(name for extra in extras for name in extra)]:
        name, version = re.match(r"([\w.-]+)(?:\[[\w,]+\])?(.*)", requirement).groups()
        yield plain(name), version


@pytest.mark.parametrize(("name", "version"), list(direct()))
def test_every_direct_dependency_is_locked_as_required(name, version):
    assert name in locked()
    if version.startswith("=="):
        assert version.removeprefix("==") in locked()[name]


def test_the_lock_pins_everything_and_names_no_index():
    assert all("==" in line for line in LOCK.splitlines())
    assert not re.search(r"://|--(extra-)?index-url|--find-links", LOCK)


def test_torch_and_torchaudio_have_matching_versions():
    assert locked()["torch"] == locked()["torchaudio"] == ["2.11.0"]


def test_conda_installs_from_the_same_lock():
    environment = yaml.safe_load((repository_root() / "environment.yml").read_text())
    conda = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert any(re.fullmatch(r"python=3\.11.*", item) for item in conda)
    assert pip == ["-r requirements.lock", "-e ."]
    assert {"pip", "kenlm"} <= set(conda)
    assert PROJECT["requires-python"] == ">=3.11,<3.12"


def test_the_extras_are_named():
    assert set(PROJECT["optional-dependencies"]) == {"embedded", "hdf5", "dev", "cluster"}


def test_every_make_command_in_the_readme_and_the_docs_exists():
    makefile = (repository_root() / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    pages = [repository_root() / "README.md", *sorted((repository_root() / "docs").glob("*.md"))]
    named = {
        name for page in pages for name in re.findall(r"(?:`|^)make ([a-z][\w-]+)", page.read_text(), re.MULTILINE)
    }
    assert {"demo", "test"} <= named
    assert named <= targets


def test_the_error_for_a_wrong_python_is_one_sentence(tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    (tmp_path / "python").chmod(0o755)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_text((repository_root() / name).read_text())
    run = subprocess.run(["make", "test", f"PYTHON={tmp_path}/python"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode != 0
    assert "kdlib needs Python 3.11, found Python 3.9.1" in run.stdout
    assert not (tmp_path / ".venv").exists()
