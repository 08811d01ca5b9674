"""What a run of `run.py` left, as numbers and checksums that do not depend on names: {file: {name: value}}.

Weights and stores count by the checksums of their tensors, whatever these are called; tables by column; JSON by key.
Left out are texts meant for reading, times, paths, and fingerprints of code.
"""

import csv
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np

UNSTABLE = {
    "key", "inputs", "code", "revision", "packages", "python", "platform", "finished", "peak_memory_mb", "wall_s",
    "what", "parameters", "checkpoint", "system", "reason", "text", "verdict_text", "diagnosis", "remark", "note",
    "schema", "checksums", "index",
}  # fmt: skip
NAMES = {"name", "student", "a", "b", "decoder", "heads_trained", "checks", "case"}  # whose values are names of our own
READING = {"what it says", "named", "state", "wav", "evidence"}  # columns whose words may be put better


def snapshot(folder: Path) -> dict[str, dict[str, object]]:
    """Every file below a folder that a stage has made."""
    found: dict[str, dict[str, object]] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and (values := _values(path)):
            found[name] = values
    curves = sorted({path.parent for path in folder.rglob("events.*")})
    return found | {folder_.relative_to(folder).as_posix(): _curves(folder_) for folder_ in curves}


def _values(path: Path) -> dict[str, object] | None:
    if path.name in ("examined.csv", "checked_files.csv"):  # it has the dates of files
        return None
    if path.name == "scores.csv":  # tidy, of scores.json; there was none
        return None
    if path.suffix == ".safetensors":
        return {"tensors": _tensors(path)} | _posteriors(path)
    if path.suffix == ".bin":
        return {"bytes": _sum(path.read_bytes())}
    if path.suffix == ".nemo":
        return {"tensors": _nemo(path)}
    if path.suffix in (".arpa", ".model") or path.name in ("lexicon.txt",):
        return {"bytes": _sum(path.read_bytes())}
    if path.suffix == ".csv":
        return _table(path)
    if path.suffix == ".json" and path.name != "run.json" and not path.name.startswith("evaluation_"):
        return dict(_json(json.loads(path.read_text(encoding="utf-8"))))
    return None


def _sum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _tensors(path: Path) -> str:
    """One checksum of all tensors, in the order of their own checksums."""
    import torch
    from safetensors.torch import load_file

    return _all(load_file(path).values(), torch)


def _nemo(path: Path) -> str:
    import io
    import tarfile

    import torch

    with tarfile.open(path) as archive:
        name = next(name for name in archive.getnames() if name.endswith("model_weights.ckpt"))
        weights = torch.load(io.BytesIO(archive.extractfile(name).read()), weights_only=True)
    return _all(weights.values(), torch)


def _all(tensors, torch) -> str:
    sums = [
        f"{_sum(one.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())}{list(one.shape)}" for one in tensors
    ]
    return _sum("".join(sorted(sums)).encode())


def _posteriors(path: Path) -> dict[str, object]:
    from safetensors import safe_open

    about = (safe_open(path, framework="numpy").metadata() or {}).get("about")
    return {"about": _sum("".join(json.loads(about)["utterances"]).encode())} if about else {}


def _table(path: Path) -> dict[str, object]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    if not rows or len(rows) == 1:
        return {"rows": 0}
    found: dict[str, object] = {"rows": len(rows) - 1}
    for place, name in enumerate(rows[0]):
        values = [row[place] if place < len(row) else "" for row in rows[1:]]
        if name in READING or name in UNSTABLE:
            continue
        numbers = _numbers(values)
        found[name or "(index)"] = _summary(numbers) if numbers else _texts(values, name)
    return found


def _texts(values: list, name: str) -> list | str:
    """Names as they are, for they may be changed; all else by its checksum."""
    return values if name in NAMES else _sum(json.dumps(values).encode())


def _numbers(values: list[str]) -> list[float]:
    try:
        return [float(value or "nan") for value in values]
    except ValueError:
        return []


def _summary(values) -> list[float]:
    """The sum, and a sum that knows the order: to be compared exactly, or to within a tolerance."""
    array = np.nan_to_num(np.asarray(values, dtype=float))
    return [float(array.sum()), float((array * np.cos(np.arange(len(array)))).sum())]


def _json(content, name: str = ""):
    if isinstance(content, dict):
        for key, value in content.items():
            if key not in UNSTABLE and key != "by":  # scores of groups: the hypotheses are there
                yield from _json(value, f"{name}.{key}" if name else key)
    elif isinstance(content, list) and content and all(isinstance(one, dict) for one in content):
        keys = {key for one in content for key in one} - UNSTABLE
        for key in sorted(keys):
            values = [one.get(key) for one in content]
            if all(isinstance(value, dict) for value in values):
                for part in sorted({part for value in values for part in value}):
                    yield f"{name}[].{key}.{part}", _summary([value.get(part, 0.0) for value in values])
                continue
            simple = all(isinstance(value, int | float) for value in values)
            yield f"{name}[].{key}", _summary(values) if simple else _texts(values, key)
    elif isinstance(content, list):
        simple = content and all(isinstance(one, int | float) for one in content)
        yield name, _summary(content) if simple else _texts(content, name)
    elif isinstance(content, bool) or content is None or (isinstance(content, str) and not re.search("[/ ]", content)):
        yield name, content
    elif isinstance(content, int | float):
        yield name, float(content) if math.isfinite(content) else str(content)


def _curves(folder: Path) -> dict[str, object]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, object] = {}
    for path in sorted(folder.glob("events.*")):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            found[name] = _summary([one.value for one in events.Scalars(name)])
    return found
