"""Everything once, with every value as it was at revision 52d94dd (`make unchanged`), while kdlib is being rebuilt."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from unchanged.__main__ import FROZEN, machine


def test_every_value_is_as_it_was_before_the_rebuild(tmp_path):
    frozen, here = json.loads(FROZEN.read_text(encoding="utf-8"))["machine"], machine()
    if here != frozen:
        pytest.skip(f"the values were frozen on {frozen}, this is {here}: `make unchanged` compares them to 1e-5")
    command, search = [sys.executable, "-m", "unchanged", str(tmp_path)], {"PYTHONPATH": str(Path(__file__).parent)}
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ | search)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    assert " 0 differ" in run.stdout
