"""Two folds on a real Slurm: a job that is killed, one that fails once, and the scores of one machine."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cluster import slurm
from kdlib.io import read_json

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    bool(slurm.missing()) or not os.environ.get("KDLIB_CLUSTER_TESTS"),
    reason=slurm.missing() or "KDLIB_CLUSTER_TESTS is not set (.ci/run sets it when files of the cluster change)",
)
FOLDS = "M08,M10"


def clone(folder: Path) -> Path:
    """The repository in another folder, with this environment."""
    ignored = shutil.ignore_patterns(".git", "outputs", ".venv", ".snakemake", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    return folder


def scores(folder: Path) -> dict[str, dict]:
    """Every score of a run, by its place."""
    found = sorted((folder / "outputs/smoke").glob("*/students/*/seed1/scores/scores.json"))
    return {str(path.relative_to(folder)): read_json(path)["decoders"] for path in found}


def jobs(folder: Path, name: str) -> list[int]:
    """The processes that execute a notebook of this clone; other tests may execute one of the same name."""
    found = subprocess.run(["pgrep", "-f", f"papermill.*{name}"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split() if _works_in(folder, pid)]


def _works_in(folder: Path, pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/cwd").readlink().is_relative_to(folder)
    except FileNotFoundError:  # it has ended meanwhile
        return False


def wait_for_job(folder: Path, name: str, seconds: float = 600) -> list[int]:
    """Wait until a job executes a notebook; its processes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := jobs(folder, name):
            return found
        time.sleep(0.3)
    raise AssertionError(f"no job has executed {name}")


def test_two_folds_survive_a_killed_and_a_failing_job_with_the_scores_of_one_machine(tmp_path):
    here, there = clone(tmp_path / "local"), clone(tmp_path / "cluster")
    profile = there / "profiles/slurm/config.yaml"  # this cluster keeps no accounts
    polled = "slurm-status-command: squeue\nslurm-init-seconds-before-status-checks: 5"
    profile.write_text(profile.read_text().replace("# slurm-status-command: squeue", polled))
    plain = os.environ | {"PYTHONPATH": str(here)}
    command = ["make", "folds", "RECIPE=params/smoke.yaml", f"FOLDS={FOLDS}"]
    subprocess.run(command, cwd=here, env=plain, check=True, capture_output=True)
    failing = there / "outputs/smoke/M10/students/ctc_kd/.seed1.partial"  # a file where a folder is to be
    failing.parent.mkdir(parents=True)
    failing.write_text("")
    with slurm.running(tmp_path / "slurm") as environment:
        environment |= {"PYTHONPATH": str(there)}
        run = subprocess.Popen(
            ["make", "cluster", "RECIPE=params/smoke.yaml", f"FOLDS={FOLDS}"],  # its profile asks squeue: no accounts
            cwd=there,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        killed = wait_for_job(there, "04_distill_M08_hard_1")
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        wait_for_job(there, "04_distill_M10_ctc_kd_1")
        while jobs(there, "04_distill_M10_ctc_kd_1"):
            time.sleep(0.5)
        failing.unlink()  # it has failed, and is sent again
        text, _ = run.communicate(timeout=1800)
    assert run.returncode == 0, text[-3000:]
    assert len(re.findall("Trying to restart", text)) == 2
    assert scores(there) == scores(here)
    assert len(scores(there)) == 4
