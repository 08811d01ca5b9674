"""One of each kind, with every value as it was at revision 52d94dd; `make unchanged` compares everything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from unchanged.__main__ import FROZEN, machine


def test_values_of_every_kind_are_as_they_were_before_the_rebuild(tmp_path):
    frozen, here = json.loads(FROZEN.read_text(encoding="utf-8"))["machine"], machine()
    if here != frozen:
        pytest.skip(f"the values were frozen on {frozen}, this is {here}: `make unchanged` compares them to 1e-5")
    command = [sys.executable, "-m", "unchanged", str(tmp_path), "--quick"]
    search = {"PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | search)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    assert " 0 differ" in run.stdout
