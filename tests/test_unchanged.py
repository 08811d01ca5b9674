"""Everything once, with every value as it was at revision 52d94dd (`make unchanged`), while kdlib is being rebuilt."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

NET = Path(__file__).parent / "unchanged"


def test_every_value_is_as_it_was_before_the_rebuild(tmp_path):
    frozen = json.loads((NET / "frozen.json").read_text(encoding="utf-8"))["machine"]
    here = runpy.run_path(str(NET / "__main__.py"))["machine"]()
    if here != frozen:
        pytest.skip(f"the values were frozen on {frozen}, this is {here}: `make unchanged` compares them to 1e-5")
    run = subprocess.run([sys.executable, str(NET), str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
    assert " 0 differ" in run.stdout
