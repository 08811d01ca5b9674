"""Everything once, with every value as it was at revision 52d94dd (`make unchanged`), while kdlib is being rebuilt."""

import subprocess
import sys
from pathlib import Path


def test_every_value_is_as_it_was_before_the_rebuild(tmp_path):
    command = [sys.executable, str(Path(__file__).parent / "unchanged"), str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-6000:]
