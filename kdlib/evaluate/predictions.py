"""What a system wrote, from whatever file it is in: ours, the original study's, NeMo's, or plain text.

Every reader gives the same table, one row an utterance: utt_id, speaker, reference, hypothesis; with `ids` also the
token ids that were decoded, where there are any. Where a file says nothing of speakers, ids such as M08_B2_C1_M5 do;
else all are taken for one.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from kdlib.errors import UserError, nearest
from kdlib.evaluate.score import IDS, read_hypotheses
from kdlib.tokens import normalise

COLUMNS = ["utt_id", "speaker", "reference", "hypothesis"]
UASPEECH = re.compile(r"^(C?[FM]C?\d{2})_")  # ids that begin with the speaker
FORMATS = (
    "a folder with hypotheses.csv, hypotheses.csv itself, an evaluation_*.json, NeMo's JSON lines with pred_text, or a "
    "text file of hypotheses with a text file of references"
)


def read(path: Path, decoder: str = "greedy", references: Path | None = None, *, ids: bool = False) -> pd.DataFrame:
    """The answers in a file or a folder; `decoder` chooses a column of hypotheses.csv.

    With `ids` there is a column `token_ids`, None where there are none at all; a row that has ids may lack its text
    (None).
    """
    table = _read(path, decoder, references)
    if not ids:
        return _checked(path, table)[COLUMNS]
    there = table.token_ids.map(lambda one: isinstance(one, tuple))
    if there.any() and not there.all():
        first = table.utt_id[~there].iloc[0]
        raise UserError(
            f"{path}: {int((~there).sum())} of {len(table)} rows have no usable token ids (a list of whole numbers), "
            f"first {first}; correct them, or remove the ids of all rows"
        )
    spoken = table.token_ids.map(bool)
    if not spoken.any() and not (there.any() and table.hypothesis.isna().all()):  # empty lists beside texts: no ids
        table["token_ids"], there = None, there & False
    untold = there & table.hypothesis.isna()
    checked = _checked(path, table.assign(hypothesis=table.hypothesis.where(~untold, "")))
    checked["hypothesis"] = checked.hypothesis.astype(object).mask(untold, None)
    return checked


def _read(path: Path, decoder: str, references: Path | None) -> pd.DataFrame:
    """The table as it stands in the file."""
    if path.is_dir() and (path / "hypotheses.csv").is_file():
        return _ours(path / "hypotheses.csv", decoder)
    if path.is_dir() and (path / f"evaluation_{decoder}.json").is_file():
        return _read(path / f"evaluation_{decoder}.json", decoder, references)
    if not path.is_file():
        raise UserError(f"{path}: no answers there; expected {FORMATS}")
    if path.suffix == ".csv":
        return _ours(path, decoder)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); expected {FORMATS}") from None
    if path.suffix == ".txt":
        return _plain(path, text, references)
    whole = _json(text)
    if isinstance(whole, dict) and "predictions" in whole:
        listed = whole["predictions"]
        rows = listed if isinstance(listed, list) and all(isinstance(row, dict) for row in listed) else []
        return _table(path, map(_predicted, rows))
    return _table(path, (_nemo(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()))


def _ours(path: Path, decoder: str) -> pd.DataFrame:
    try:
        rows = read_hypotheses(path)
    except (TypeError, ValueError, KeyError):  # other columns than ours, or no text
        raise UserError(f"{path}: not a hypotheses.csv of kdlib; expected {FORMATS}") from None
    if not rows:
        raise UserError(f"{path}: there is no prediction in it; expected {FORMATS}")
    if decoder not in decoders(path):  # what an untrained head wrote is no answer either
        hint = nearest(decoder, decoders(path))
        raise UserError(f"{path}: the decoder {decoder!r} was not used for this system{hint}")
    written = IDS.get(decoder)
    return _table(
        path,
        (
            (row.utt_id, row.speaker, row.reference, getattr(row, decoder), _ids(getattr(row, written).split()))
            if written
            else (row.utt_id, row.speaker, row.reference, getattr(row, decoder), None)
            for row in rows
        ),
    )


def decoders(path: Path) -> list[str]:
    """Which decoders were scored: said in the file beside it, else those that wrote something."""
    scores = path.with_name("scores.json")
    if scores.is_file():
        return list(json.loads(scores.read_text(encoding="utf-8"))["decoders"])
    table = pd.read_csv(path, keep_default_na=False, dtype=str)
    known = [name for name in table.columns[table.columns.get_loc("reference") + 1 :] if not name.endswith("_ids")]
    return [name for name in known if table[name].str.contains("[^0-9. ]", regex=True).any()]


def _predicted(row: dict) -> tuple:
    """A row of the original study's evaluation files."""
    said = _ids(row.get("prediction_tokens"))
    return row.get("utterance_id"), row.get("speaker", ""), row.get("target"), row.get("prediction_text"), said


def _ids(listed: object) -> tuple[int, ...] | None:
    """Token ids, if these are some: a list of them, or a text with spaces between."""
    listed = listed.split() if isinstance(listed, str) else listed
    try:
        numbers = [float(one) for one in listed] if isinstance(listed, list) else [math.nan]
    except (TypeError, ValueError):
        return None
    return tuple(map(int, numbers)) if all(one.is_integer() for one in numbers) else None


def _nemo(path: Path, number: int, line: str) -> tuple:
    """A line of NeMo's manifest with predictions."""
    row = _json(line)
    if not isinstance(row, dict) or "pred_text" not in row:
        raise UserError(f"{path}, line {number}: no pred_text in it; expected {FORMATS}")
    return row.get("audio_filepath", str(number)), row.get("speaker", ""), row.get("text"), row["pred_text"], None


def _plain(path: Path, text: str, references: Path | None) -> pd.DataFrame:
    """A hypothesis a line; the references, a line each, are in a file of their own."""
    if references is None or not references.is_file():
        raise UserError(f"{path}: plain text needs its references, a line each: --references FILE")
    told, said = references.read_text(encoding="utf-8-sig").splitlines(), text.splitlines()
    if len(told) != len(said):
        raise UserError(f"{path} has {len(said)} lines, {references} has {len(told)}: they must go in pairs")
    return _table(path, ((f"line{i}", "", *pair, None) for i, pair in enumerate(zip(told, said, strict=True), start=1)))


def _json(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {}


def _table(path: Path, rows: Iterable[tuple]) -> pd.DataFrame:
    table = pd.DataFrame(list(rows), columns=[*COLUMNS, "token_ids"], dtype=object)
    if table.empty:
        raise UserError(f"{path}: there is no prediction in it; expected {FORMATS}")
    return table


def _checked(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The table, whole: every row has an id of its own, a reference and a text; one spelling for all."""
    table = table.copy()
    for column, name in (("utt_id", "an id"), ("reference", "a reference"), ("hypothesis", "a text of what was heard")):
        bad = table[column].map(lambda value: not isinstance(value, str))
        if bad.any():
            first = table[bad].iloc[0]
            raise UserError(f"{path}: {int(bad.sum())} of {len(table)} rows have not {name}, first {first.utt_id}")
    short = table.utt_id.map(lambda name: Path(name).name.removesuffix(".wav").removesuffix(".flac"))
    if short.str.match(UASPEECH).all():  # other names may be those of other speakers' recordings in other folders
        table["utt_id"] = short
    if (twice := table.utt_id[table.utt_id.duplicated()]).any():
        raise UserError(f"{path}: {twice.iloc[0]!r} stands twice in it; ids must be unique")
    for column in ("reference", "hypothesis"):
        table[column] = table[column].map(normalise)
    if (table.reference == "").any():
        raise UserError(f"{path}: the reference of {table.utt_id[table.reference == ''].iloc[0]} is empty")
    named = table.utt_id.str.extract(UASPEECH)[0]
    if (table.speaker == "").all() and named.notna().all():
        table["speaker"] = named
    return table
