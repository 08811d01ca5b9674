"""`make unchanged`: run everything once and compare every value with those frozen at revision 52d94dd.

`PYTHONPATH=tests python -m unchanged FOLDER` runs into a folder (and resumes there after a kill); `--quick` runs one of
each kind, `--freeze` writes frozen.json instead. Keys, stage folders and settings may be called otherwise than then, as
kdlib/data/renamed.yaml says; values may not differ: not in a bit on a processor and with versions as they were,
elsewhere by 1e-5.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import platform
import re
import sys
from pathlib import Path

import yaml

FROZEN = Path(__file__).with_name("frozen.json")
TABLE = Path(__file__).parents[2] / "kdlib/data/renamed.yaml"
TOLERANCE = 1e-5  # relative, on another machine


def machine() -> dict[str, str]:
    """The processor, and the versions of what computes."""
    model = None
    with contextlib.suppress(OSError):
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "nemo_toolkit", "speechbrain")}
    return {"processor": model[1] if model else platform.processor()} | versions


def renamed(old: dict) -> dict:
    """Return a frozen snapshot under the names of today."""
    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    names = table["variants"] | table["checks"]

    def variant(name: str) -> str:
        return "+".join(names.get(part, part) for part in name.split("+"))

    def path(name: str) -> str:
        parts = [table["files"].get(part, part) for part in name.split("/")]
        return "/".join(variant(part) if "students" in parts[:place] else part for place, part in enumerate(parts))

    def key(name: str) -> str:
        known = table["keys"] | (table["signs"] if ".signs." in name else {})
        if name.startswith("encoder."):  # of a model's record
            return f"encoder_config.{name.removeprefix('encoder.')}"
        if name in known:
            return known[name]
        parts = re.split(r"(\[\]\.|\.| )", name)  # of nested keys, or a cause and its variant
        return "".join(known.get(part, variant(part)) for part in parts)

    def value(content, name: str):
        if isinstance(content, list):
            return [value(part, name) for part in content]
        if name == "severity":
            return table["values"].get(content, content)
        return ", ".join(map(variant, content.split(", "))) if isinstance(content, str) else content

    def entry(name: str, found: dict) -> dict:
        curves = table["curves"] if name.endswith("/tensorboard") and "/students/" not in name else {}
        return {curves.get(k) or key(k): value(v, k) for k, v in found.items()}

    return {path(name): entry(name, found) for name, found in old.items()}


def differences(frozen: dict, found: dict, exact: bool) -> list[str]:
    """What differs, a line each."""
    lines = []
    for name in sorted(frozen.keys() | found.keys()):
        if name not in found or name not in frozen:
            lines.append(f"{name}: {'no longer made' if name not in found else 'new'}")
            continue
        before, after = frozen[name], found[name]
        for key in sorted(before.keys() | after.keys()):
            if key not in after or key not in before:
                lines.append(f"{name}: {key}: {'no longer there' if key not in after else 'new'}")
            elif not _same(before[key], after[key], exact):
                lines.append(f"{name}: {key}: {before[key]} -> {after[key]}")
    return lines


def _same(before, after, exact: bool) -> bool:
    if before == after:
        return True
    if exact:
        return False
    if isinstance(before, str) and re.fullmatch("[0-9a-f]{16}", before):
        return True  # a checksum holds on the machine on which it was made
    before, after = (one if isinstance(one, list) else [one] for one in (before, after))
    if len(before) != len(after) or any(isinstance(one, str) for one in [*before, *after]):
        return False
    return all(abs(a - b) <= TOLERANCE * max(1.0, abs(a)) for a, b in zip(before, after, strict=True))


def main(folder: Path, freeze: bool, quick: bool = False) -> int:
    """Run, and freeze or compare; with `quick` one of each kind."""
    from unchanged import run, snapshot

    with contextlib.redirect_stdout(io.StringIO()):
        run.run(folder, quick)
    found = snapshot.snapshot(folder)
    if freeze:
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in found.items())
        FROZEN.write_text(f'{{"machine": {json.dumps(machine())},\n"files": {{\n{rows}\n}}}}\n')
        print(f"{FROZEN.name}: {len(found)} files, {sum(map(len, found.values()))} values")
        return 0
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))
    exact = frozen["machine"] == machine()
    before = renamed(frozen["files"])
    if not run.ORIGINAL.is_dir():
        before = {name: one for name, one in before.items() if not re.match("examined/(evaluation|misnamed)_", name)}
    if quick:
        before = {name: values for name, values in before.items() if name in found}
    lines = differences(before, found, exact)
    count, how = sum(map(len, found.values())), "to the bit" if exact else f"to {TOLERANCE:g} (another machine)"
    print("\n".join(lines[:200]))
    print(f"{count} values in {len(found)} files compared {how}: {len(lines)} differ")
    return min(1, len(lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m unchanged", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="to run in; a killed run resumes there")
    parser.add_argument("--quick", action="store_true", help="one of each kind only")
    parser.add_argument("--freeze", action="store_true", help="write frozen.json instead of comparing")
    options = parser.parse_args()
    sys.exit(main(options.folder.resolve(), options.freeze, options.quick))
