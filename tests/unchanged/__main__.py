"""Does a change of the code change any value? `make unchanged AGAINST=HEAD` runs everything once, before and after.

`PYTHONPATH=tests python -m unchanged FOLDER` compares the code as it is with that of a revision (`--against`): both run
`params/unchanged.yaml`, the revision in a worktree of its own, and every value must be the same to the bit. A killed
run resumes. With `--write FILE` only this code is run, and its values are written.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from kdlib.io import read_json, repository_root, write_json


def differences(before: Mapping[str, dict], after: Mapping[str, dict]) -> list[str]:
    """What differs, a line each."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if name not in after or name not in before:
            lines.append(f"{name}: {'no longer made' if name not in after else 'new'}")
            continue
        old, new = before[name], after[name]
        for key in sorted(old.keys() | new.keys()):
            if key not in new or key not in old:
                lines.append(f"{name}: {key}: {'no longer there' if key not in new else 'new'}")
            elif old[key] != new[key]:
                lines.append(f"{name}: {key}: {old[key]} -> {new[key]}")
    return lines


def values_here(folder: Path) -> dict[str, dict]:
    """Run everything once with this code; the values by file."""
    from unchanged import run, snapshot

    with contextlib.redirect_stdout(io.StringIO()):
        run.run(folder)
    return json.loads(json.dumps(snapshot.snapshot(folder)))


def values_of(revision: str, folder: Path) -> dict[str, dict]:
    """The values of a revision, run once in a worktree of its own, and kept."""
    root = repository_root()
    found = subprocess.run(["git", "rev-parse", "--short", revision], cwd=root, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"AGAINST: git knows no revision {revision!r}")
    folder /= found.stdout.strip()
    values, code = folder / "values.json", folder / "code"
    if not values.is_file():
        if not code.is_dir():
            subprocess.run(["git", "worktree", "add", "--quiet", "--detach", code, revision], cwd=root, check=True)
        command = [sys.executable, "-m", "unchanged", folder / "run", "--write", values]
        search = {"PYTHONPATH": os.pathsep.join(map(str, (code, code / "tests")))}
        run = subprocess.run(command, cwd=code, env=os.environ | search, check=False)
        if run.returncode:
            sys.exit(f"AGAINST: {revision} could not be run; it must be one that has `python -m unchanged --write`")
        subprocess.run(["git", "worktree", "remove", "--force", code], cwd=root, check=True)
    return read_json(values)


def main(folder: Path, against: str, write: Path | None) -> int:
    """Write the values of this code, or compare them with those of a revision."""
    if write:
        write_json(write, values_here(folder))
        return 0
    before, after = values_of(against, folder), values_here(folder / "now")
    lines = differences(before, after)
    print("\n".join(lines[:200]))
    print(f"{sum(map(len, after.values()))} values in {len(after)} files compared with {against}: {len(lines)} differ")
    return min(1, len(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m unchanged", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="to run in; a killed run resumes there")
    parser.add_argument("--against", default="HEAD", help="the revision to compare with")
    parser.add_argument("--write", type=Path, help="write the values of this code, and compare nothing")
    options = parser.parse_args()
    sys.exit(main(options.folder.resolve(), options.against, options.write))
