"""The setup files agree: pyproject.toml, requirements.lock, environment.yml, Makefile."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

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
    assert f"python{PROJECT['requires-python']}" in conda
    assert pip == ["-r requirements.lock", "-e ."]
    assert {"pip", "kenlm"} <= set(conda)


def test_the_lock_holds_for_every_supported_python():
    """The same packages in the same versions, but for those that an old micro version cannot have."""
    assert PROJECT["requires-python"] == ">=3.11,<3.13"
    assert [name.rpartition(" ")[2] for name in PROJECT["classifiers"]] == ["3.11", "3.12"]
    chosen = {}
    for version in ("3.11.7", "3.12.1"):
        system = {"python_full_version": version, "python_version": version[:4], "sys_platform": "linux"}
        lines = [Requirement(line) for line in LOCK.splitlines()]
        chosen[version] = {str(line).partition(";")[0] for line in lines if line.marker.evaluate(system)}
    assert chosen["3.11.7"] == chosen["3.12.1"]
    assert len(chosen["3.12.1"]) > 250


def test_the_extras_are_named():
    assert set(PROJECT["optional-dependencies"]) == {"embedded", "hdf5", "tune", "recognisers", "dev", "cluster"}


def test_every_make_command_in_the_readme_and_the_docs_exists():
    makefile = (repository_root() / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    pages = [repository_root() / "README.md", *sorted((repository_root() / "docs").glob("*.md"))]
    named = {
        name for page in pages for name in re.findall(r"(?:`|^)make ([a-z][\w-]+)", page.read_text(), re.MULTILINE)
    }
    assert {"demo", "test"} <= named
    assert named <= targets


@pytest.fixture
def clone(tmp_path):
    """A folder with the setup files alone, and a lock of what a bare environment has."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(repository_root() / name, folder)
    (folder / "requirements.lock").write_text("pip==1.0\n")
    return folder


def make(folder, *arguments, **environment):
    command = ["make", "--no-print-directory", *arguments]
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "PYTHONPATH", "MAKEFLAGS")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=clean | environment)


def program(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)
    return path


WORKS = ('[ "$1" = -m ] && echo "$0 $*" && exit 1', "exit 0")  # a Python that is supported, and says that it was chosen
SHIM = ("exit 127",)  # as of pyenv, where that version is not active


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3.11": WORKS, "python3.12": WORKS}, "python3.11"),
        ({"python3.11": SHIM, "python3.12": WORKS, "python3": WORKS}, "python3.12"),
        ({"python3.11": SHIM, "python3.12": SHIM, "python3": WORKS}, "python3"),
        ({"python3.11": SHIM, "python3.12": SHIM, "python3": SHIM, "uv": ('echo "$(dirname $0)/of_uv"',)}, "of_uv"),
    ],
)
def test_the_first_supported_python_that_runs_is_taken(clone, tmp_path, pythons, chosen):
    for name, lines in {"uv": SHIM, "of_uv": WORKS, **pythons}.items():
        program(tmp_path / "bin" / name, *lines)
    run = make(clone, "setup", PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert run.stdout.splitlines()[0] == f"{tmp_path}/bin/{chosen} -m venv .venv"


@pytest.mark.parametrize("arguments", [(), ("PYTHON={bin}/python3",)])
def test_without_a_supported_python_one_message_names_the_command_that_brings_one(clone, tmp_path, arguments):
    old = ('[ "$1" = --version ] && echo "Python 3.9.1" && exit 0', "exit 1")
    for name, lines in {"python3.11": SHIM, "python3.12": SHIM, "python3": old, "uv": SHIM}.items():
        program(tmp_path / "bin" / name, *lines)
    arguments = [text.format(bin=tmp_path / "bin") for text in arguments]
    run = make(clone, "test", *arguments, PATH=f"{tmp_path}/bin:/usr/bin:/bin")
    assert run.returncode != 0
    assert run.stdout.count("\n") == 1
    assert "kdlib needs Python 3.11 or 3.12, found Python 3.9.1. This brings one, without root: " in run.stdout
    assert "without root: uv python install 3.12 (uv itself: pip install uv)" in run.stdout
    assert "make test PYTHON=/path/to/python3.12" in run.stdout
    assert not (clone / ".venv").exists()


def test_an_environment_of_another_python_is_named(clone):
    program(clone / ".venv/bin/python", '[ "$1" = --version ] && echo "Python 3.13.0" && exit 0', "exit 1")
    run = make(clone, "setup")
    assert run.returncode != 0
    assert "kdlib needs Python 3.11 or 3.12, but .venv has Python 3.13.0: remove it (rm -r .venv)" in run.stdout


@pytest.fixture
def linked(clone, tmp_path):
    """A clone that links the environment of another one, made earlier; its uv and jupyter only say what they do."""
    venv = tmp_path / "other" / ".venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    for name in ("kdlib-0.1.0", "uv-0.0.1"):
        (site / f"{name}.dist-info").mkdir()
        about = "Metadata-Version: 2.1\nName: {}\nVersion: {}\n".format(*name.split("-"))
        (site / f"{name}.dist-info/METADATA").write_text(about)
    uv = Path(sys.executable).parent / "uv"
    program(venv / "bin/uv", f'case "$*" in *--dry-run*|*" show "*) exec {uv} "$@";; esac', 'echo "uv $*"')
    program(venv / "bin/jupyter", 'echo "path $PYTHONPATH"')
    (venv / ".ready").touch()  # of an earlier Makefile
    (clone / ".venv").symlink_to(venv)
    versions = {path.name.split("-")[0]: path.name.split("-")[1] for path in site.glob("*.dist-info")}
    versions = {name: version.removesuffix(".dist") for name, version in versions.items() if name != "kdlib"}
    lock = "".join(f"{name}=={version.removesuffix('.dist-info')}\n" for name, version in versions.items())
    (clone / "requirements.lock").write_text(lock)
    return clone


def test_an_older_environment_with_the_same_versions_is_used_as_it_is(linked):
    run = make(linked, "setup")
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines() == [
        ".venv has the versions of requirements.lock: nothing is installed",
        f"outside of make, another clone's .venv needs PYTHONPATH={linked}",
    ]
    assert "nothing is installed" not in make(linked, "setup").stdout  # and it is checked once


def test_commands_in_the_environment_of_another_clone_import_this_kdlib(linked):
    assert f"path {linked}\n" in make(linked, "lab").stdout
    assert f"path {linked}:/more\n" in make(linked, "lab", PYTHONPATH="/more").stdout


@pytest.mark.parametrize("difference", ["another version", "a missing package", "no kdlib"])
def test_an_environment_with_other_versions_is_installed_again(linked, difference):
    lock = linked / "requirements.lock"
    make(linked, "setup")
    if difference == "another version":
        lock.write_text(re.sub(r"pip==.*", "pip==0.2", lock.read_text()))
    elif difference == "a missing package":
        lock.write_text(f"{lock.read_text()}torch==2.11.0\n")
    else:
        (site,) = linked.glob(".venv/lib/python*/site-packages")
        shutil.rmtree(site / "kdlib-0.1.0.dist-info")
        lock.write_text(f"{lock.read_text()}\n")
    stamps = set(linked.glob(".venv/.ready*"))
    run = make(linked, "setup")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "uv pip install --quiet --python .venv/bin/python --no-deps -e .\n" in run.stdout
    assert not stamps & set(linked.glob(".venv/.ready*"))  # a clone with the lock of before has to look again
    assert "uv pip install" not in make(linked, "setup").stdout
