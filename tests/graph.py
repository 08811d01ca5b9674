"""The notebooks and the graph of stages as a user runs them: papermill and Snakemake, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

from kdlib.io import repository_root

BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}


def papermill(name, out, *arguments):
    command = [
        BIN / "papermill",
        repository_root() / "notebooks" / f"{name}.ipynb",
        out,
        "--cwd",
        repository_root() / "notebooks",
    ]
    return subprocess.run([*map(str, command), *arguments], capture_output=True, text=True)


def snakemake(recipe, *arguments, **options):
    command = [BIN / "snakemake", "--profile", "profiles/local", "--config", f"recipe={recipe}", *arguments]
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, cwd=repository_root(), env=ENVIRONMENT, **options
    )


def output(run):
    return run.stdout + run.stderr
