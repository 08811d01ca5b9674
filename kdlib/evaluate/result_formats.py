"""Other toolkits' result files, recognised by their content: JSON of studies, NeMo's and Hugging Face's lines, tables,
SpeechBrain's aligned reports, NIST's trn and ctm, Kaldi's text, icefall's recogs and errs.

A reader gives rows of utterance, speaker, reference, hypothesis and token ids, and what the file itself says of its
error rate.
"""

import ast
import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kdlib.errors import UserError
from kdlib.evaluate import nist

Row = tuple[Any, Any, Any, Any, tuple[int, ...] | None]  # utterance, speaker, reference, hypothesis, token ids
# Names of columns and fields, the most telling first.
NAMES = {
    "id": "utterance_id utt_id utt uttid uid id audio_filepath audio_path audio_file audio wav path file filename name",
    "speaker": "speaker speaker_id spk spk_id",
    "hypothesis": "hypothesis hyp prediction_text prediction pred_text pred_str pred predicted predicted_text decoded",
    "reference": "reference ref target transcript transcription gold ground_truth sentence text label labels",
}
LISTS = ("predictions", "details", "results", "utterances", "samples")  # of rows, in a JSON object
METADATA = ("utterance_ids", "utterances")  # of ids, beside extracted logits
ALIGNED = re.compile(r"^(.+), %WER [\d.]+ \[ (\d+) / (\d+), (\d+) ins, (\d+) del, (\d+) sub \]", re.MULTILINE)
TRN = re.compile(r"^(.*)\(([^()\s]+)\)\s*$")
RECOGS = re.compile(r"^(\S+):\s+(ref|hyp)=(\[.*\])\s*$")
ERRS, ERRORS = "PER-UTT DETAILS", re.compile(r"\(([^()]*)->([^()]*)\)|(\S+)")


@dataclass(frozen=True)
class Content:
    """A file, and what was said about it on the command line."""

    path: Path
    text: str
    references: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # id, speaker, reference, hypothesis -> column

    @cached_property
    def json(self) -> Any:
        """The content of a JSON file; None if it is none."""
        try:
            return json.loads(self.text)
        except json.JSONDecodeError:
            return None

    @cached_property
    def lines(self) -> list[str]:
        """The lines that are not empty."""
        return [line for line in self.text.splitlines() if line.strip()]

    @cached_property
    def header(self) -> list[str]:
        """The names of the columns of a table."""
        return next(csv.reader([self.lines[0]], delimiter=self.delimiter), []) if self.lines else []

    @property
    def delimiter(self) -> str:
        """What separates the columns of a table."""
        return "\t" if self.lines and "\t" in self.lines[0] else ","


@dataclass(frozen=True)
class Parsed:
    """The rows of a file, and what it says of all of them."""

    rows: list[Row]
    wer: float | None = None  # by the file itself
    wra: float | None = None
    speaker: str = ""  # of the whole file


@dataclass(frozen=True)
class Format:
    """A kind of result file."""

    name: str  # in messages
    fits: Callable[[Content], bool]
    parse: Callable[[Content], Parsed]


def parse_ids(ids: object) -> tuple[int, ...] | None:
    """Token ids from a list or a space-separated text; None if these are not ids."""
    ids = ids.split() if isinstance(ids, str) else ids
    try:
        numbers = [float(index) for index in ids] if isinstance(ids, list) else [math.nan]
    except (TypeError, ValueError):
        return None
    return tuple(map(int, numbers)) if all(number.is_integer() for number in numbers) else None


def chosen_columns(names: Iterable[str], content: Content) -> dict[str, str]:
    """The column of each part of a row: that which the command names, or the first of the usual names."""
    known = {str(name).strip().lower(): name for name in reversed(list(names))}
    found = {}
    for part, usual in NAMES.items():
        if part in content.columns:
            if content.columns[part].lower() not in known:
                shown = ", ".join(map(str, known.values()))
                raise UserError(f"{content.path}: there is no column {content.columns[part]!r}; its columns: {shown}")
            found[part] = known[content.columns[part].lower()]
        elif name := next((known[name] for name in usual.split() if name in known), ""):
            found[part] = name
    return found


def _dicts(content: Content, dicts: list[dict]) -> list[Row]:
    """Rows from dicts with the usual names."""
    rows = []
    for number, one in enumerate(dicts, start=1):
        columns = chosen_columns(one, content)
        if "hypothesis" not in columns and "prediction_tokens" not in one:
            shown = ", ".join(one) or "no names"
            raise UserError(
                f"{content.path}, row {number}: no hypothesis in it (found {shown}); name the columns: "
                'COLUMNS="id=...,reference=...,hypothesis=..." (make verdict, make examine)'
            )
        value = {part: one[name] for part, name in columns.items()}
        name = value.get("id", None if _has_ids(dicts) else f"line{number}")
        speaker = value.get("speaker") or ""
        about = str(name) if isinstance(name, int) else name, str(speaker)
        rows.append((*about, value.get("reference"), value.get("hypothesis"), parse_ids(one.get("prediction_tokens"))))
    return rows


def _has_ids(dicts: list[dict]) -> bool:
    """True if any row is of a kind that names its utterances: then each must."""
    usual = set(NAMES["id"].split()) | {"prediction_tokens", "prediction_text"}
    return any(usual & {str(name).lower() for name in one} for one in dicts)


# JSON


def _json_rows(content: Content) -> list[dict] | None:
    """The list of rows in a JSON file; None if there is none."""
    found = content.json
    if isinstance(found, dict):
        found = next((found[name] for name in LISTS if isinstance(found.get(name), list)), None)
    dicts = isinstance(found, list) and bool(found) and all(isinstance(row, dict) for row in found)
    return found if dicts else None


def has_hypotheses(content: Content) -> bool:
    """True unless a file has rows of something else, such as the losses of a training."""
    rows = _json_rows(content)
    return rows is None or "hypothesis" in chosen_columns(rows[0], content) or "prediction_tokens" in rows[0]


def _study(content: Content) -> Parsed:
    about = content.json if isinstance(content.json, dict) else {}
    names = ("speaker_id", "speaker", "held_out", "held_out_speaker")
    speaker = next((about[name] for name in names if isinstance(about.get(name), str)), "")
    return Parsed(_dicts(content, _json_rows(content)), _total(about, "wer"), _total(about, "wra"), speaker)


def _total(about: dict, name: str) -> float | None:
    """A rate that a file states, in whatever unit."""
    value = about.get(name, about.get(name.upper()))
    value = value.get("value") if isinstance(value, dict) else value
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _json_lines(content: Content) -> bool:
    if not content.lines or not content.lines[0].lstrip().startswith("{"):
        return False
    one = content.json
    return one is None or (isinstance(one, dict) and {"reference", "hypothesis"} <= set(chosen_columns(one, content)))


def _parse_lines(content: Content) -> Parsed:
    rows = []
    for number, line in enumerate(content.text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except json.JSONDecodeError:
            one = None
        if not isinstance(one, dict):
            raise UserError(f"{content.path}, line {number}: no JSON object; every line must be one, or none")
        rows.append(one)
    return Parsed(_dicts(content, rows))


# tables


def _is_table(content: Content) -> bool:
    if len(content.header) < 2:
        return False
    if content.columns:
        return True
    return {"reference", "hypothesis"} <= set(chosen_columns(content.header, content))


def _parse_table(content: Content) -> Parsed:
    reader = csv.DictReader(io.StringIO(content.text), delimiter=content.delimiter)
    return Parsed(_dicts(content, [{name: value or "" for name, value in row.items() if name} for row in reader]))


# SpeechBrain's reports


def _parse_aligned(content: Content) -> Parsed:
    blocks = re.split(r"^={20,}\s*$", content.text, flags=re.MULTILINE)
    tokens, empty = [], "<eps>"
    for block in blocks:
        first, _, rest = block.lstrip("\n").partition("\n")
        if not (found := ALIGNED.match(first)):
            continue
        lines = rest.split("\n")[:3]
        sides = [[one.strip() for one in line.split(" ; ")] for line in (lines[0], lines[2] if len(lines) > 2 else "")]
        tokens.append((found[1], *([one for one in side if one and one != empty] for side in sides)))
    sides = [side for _, *both in tokens for side in both]
    characters = all(len(one) == 1 for side in sides for one in side) and any(len(side) > 1 for side in sides)
    join = (lambda side: "".join(side).replace("_", " ")) if characters else " ".join
    own = re.search(r"^%WER ([\d.]+)", content.text, re.MULTILINE)
    total = float(own[1]) if own and not characters else None
    return Parsed([(name, "", join(ref), join(hyp), None) for name, ref, hyp in tokens], wer=total)


# pairs of files: references, and hypotheses


def _is_trn(content: Content) -> bool:
    return bool(content.lines) and all(TRN.match(line) for line in content.lines)


def _trn(text: str, path: Path) -> dict[str, str]:
    found = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        if not (parts := TRN.match(line)):
            raise UserError(f"{path}, line {number}: no id in brackets at its end; expected: words (speaker_utterance)")
        if parts[2] in found:
            raise UserError(f"{path}: {parts[2]!r} appears twice in it; ids must be unique")
        found[parts[2]] = " ".join(parts[1].split())
    return found


def _kaldi(text: str, path: Path) -> dict[str, str]:
    found = {}
    for line in text.splitlines():
        if not line.strip():
            continue
        name, *words = line.split()
        if name in found:
            raise UserError(f"{path}: {name!r} appears twice in it; ids must be unique")
        found[name] = " ".join(words)
    return found


def _sibling(path: Path) -> Path | None:
    """The references that lie beside hypotheses: ref.trn beside hyp.trn, test.stm beside test.ctm."""
    names = [path.name.replace("hyp", "ref", 1)] if "hyp" in path.name else []
    names += [path.with_suffix(".stm").name] if path.suffix == ".ctm" else []
    return next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)


def _references(content: Content, form: str) -> tuple[Path, str]:
    path = content.references or _sibling(content.path)
    if path is None or not path.is_file():
        raise UserError(
            f"{content.path}: hypotheses ({form}) without references; name the file that has them: REFERENCES=..."
        )
    return path, path.read_text(encoding="utf-8-sig")


def _paired(content: Content, references: Mapping[str, str], hypotheses: Mapping[str, str], of: Path) -> Parsed:
    if unknown := [name for name in hypotheses if name not in references]:
        raise UserError(f"{content.path}: {len(unknown)} utterances have no reference in {of}, first {unknown[0]}")
    if missing := [name for name in references if name not in hypotheses]:
        print(f"{content.path}: {len(missing)} utterances of {of} have no hypothesis, and count as empty")
    return Parsed([(name, "", text, hypotheses.get(name, ""), None) for name, text in references.items()])


def _parse_trn(content: Content) -> Parsed:
    of, text = _references(content, "trn")
    return _paired(content, _trn(text, of), _trn(content.text, content.path), of)


def _is_kaldi(content: Content) -> bool:
    """Both files begin their lines with ids, and those of the hypotheses are among those of the references."""
    if content.references is None or not content.references.is_file() or not content.lines:
        return False
    first = [line.split()[0] for line in content.lines]
    known = [
        line.split()[0] for line in content.references.read_text(encoding="utf-8-sig").splitlines() if line.strip()
    ]
    named = any(re.search(r"\d", name) for name in first)
    return named and len(set(first)) == len(first) and len(set(known)) == len(known) and set(first) <= set(known)


def _parse_kaldi(content: Content) -> Parsed:
    of, text = _references(content, "Kaldi's text")
    return _paired(content, _kaldi(text, of), _kaldi(content.text, content.path), of)


def _is_ctm(content: Content) -> bool:
    lines = [line.split() for line in content.lines if not line.startswith(nist.COMMENT)]
    return bool(lines) and all(
        len(fields) in (5, 6) and _is_number(fields[2]) and _is_number(fields[3]) for fields in lines
    )


def _parse_ctm(content: Content) -> Parsed:
    of, _ = _references(content, "ctm")
    rows = nist.pair(nist.read_stm(of), nist.read_ctm(content.path), str(content.path))
    return Parsed([(row["utt_id"], row["speaker"], row["reference"], row["hypothesis"], None) for row in rows])


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# icefall


def _is_recogs(content: Content) -> bool:
    return bool(content.lines) and all(RECOGS.match(line) for line in content.lines)


def _parse_recogs(content: Content) -> Parsed:
    found: dict[str, dict[str, str]] = {}
    for line in content.lines:
        name, side, tokens = RECOGS.match(line).groups()
        try:
            words = ast.literal_eval(tokens)
        except (ValueError, SyntaxError):
            raise UserError(f"{content.path}: {name}: {side} is no list of words: {tokens[:60]}") from None
        found.setdefault(name, {})[side] = " ".join(map(str, words))
    return Parsed([(name, "", both.get("ref"), both.get("hyp"), None) for name, both in found.items()])


def _parse_errs(content: Content) -> Parsed:
    rows, inside = [], False
    for line in content.text.splitlines():
        if line.startswith(ERRS):
            inside = True
        elif inside and not line.strip():
            break
        elif inside:
            name, _, words = line.partition(":\t")
            parts = [(same, same) if same else (ref, hyp) for ref, hyp, same in ERRORS.findall(words)]
            sides = [" ".join(part[side] for part in parts if part[side].strip("*")) for side in (0, 1)]
            rows.append((name, "", *(" ".join(side.split()) for side in sides), None))
    own = re.search(r"^%WER = ([\d.]+)", content.text, re.MULTILINE)
    return Parsed(rows, wer=float(own[1]) if own else None)


FORMATS = [
    Format("JSON with predictions or details", lambda content: _json_rows(content) is not None, _study),
    Format("JSON lines with references and hypotheses", _json_lines, _parse_lines),
    Format("SpeechBrain's report", lambda content: bool(ALIGNED.search(content.text)), _parse_aligned),
    Format("icefall's recogs", _is_recogs, _parse_recogs),
    Format("icefall's errs", lambda content: any(line.startswith(ERRS) for line in content.lines), _parse_errs),
    Format("trn", _is_trn, _parse_trn),
    Format("ctm", _is_ctm, _parse_ctm),
    Format("Kaldi's text", _is_kaldi, _parse_kaldi),
    Format("a table with columns of references and hypotheses", _is_table, _parse_table),
]


def no_result(content: Content) -> str:
    """What a file is that has no predictions; empty if that is not known."""
    found = content.json
    if isinstance(found, dict):
        ids = next((found[name] for name in METADATA if isinstance(found.get(name), list)), None)
        if ids is not None and _json_rows(content) is None:
            return f"the metadata of {len(ids)} extracted utterances, without hypotheses"
        if any(isinstance(found.get(name), list) for name in LISTS):
            return "a result file without rows"
        numbers = [value for value in _leaves(found) if isinstance(value, int | float)]
        if numbers:
            return f"a summary of {len(numbers)} numbers, without the utterances' hypotheses"
        return "a JSON object without predictions"
    return ""


def _leaves(value: Any) -> Iterable[Any]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    else:
        yield value
