"""Read a system's hypotheses from kdlib's files, the original study's, NeMo's, or plain text.

Every reader returns the same table, one row per utterance: utt_id, speaker, reference, hypothesis; with `ids` also the
decoded token ids, where there are any. Where a file has no speakers, they are taken from ids such as M08_B2_C1_M5;
otherwise all rows count as one speaker.
"""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from kdlib import stage
from kdlib.errors import UserError, nearest
from kdlib.evaluate.hypotheses import IDS, read_hypotheses
from kdlib.tokens import normalise

COLUMNS = ["utt_id", "speaker", "reference", "hypothesis"]
UASPEECH = re.compile(r"^(C?[FM]C?\d{2})_")  # ids that begin with the speaker
FORMATS = (
    "a folder with hypotheses.csv, hypotheses.csv itself, an evaluation_*.json, NeMo's JSON lines with pred_text, or a "
    "text file of hypotheses with a text file of references"
)


def read(path: Path, decoder: str = "greedy", references: Path | None = None, *, ids: bool = False) -> pd.DataFrame:
    """Read the hypotheses in a file or a folder; `decoder` chooses a column of hypotheses.csv.

    With `ids` there is a column `token_ids`, None if the file has none at all; a row with ids may lack its text (None).
    """
    table = _read_file(path, decoder, references)
    if not ids:
        return _check(path, table)[COLUMNS]
    has_ids = table.token_ids.map(lambda value: isinstance(value, tuple))
    if has_ids.any() and not has_ids.all():
        first = table.utt_id[~has_ids].iloc[0]
        raise UserError(
            f"{path}: {int((~has_ids).sum())} of {len(table)} rows have no usable token ids (a list of whole numbers), "
            f"first {first}; correct them, or remove the ids of all rows"
        )
    filled = table.token_ids.map(bool)
    if not filled.any() and not (has_ids.any() and table.hypothesis.isna().all()):  # texts with empty lists: no ids
        table["token_ids"], has_ids = None, has_ids & False
    textless = has_ids & table.hypothesis.isna()
    checked = _check(path, table.assign(hypothesis=table.hypothesis.where(~textless, "")))
    checked["hypothesis"] = checked.hypothesis.astype(object).mask(textless, None)
    return checked


def _read_file(path: Path, decoder: str, references: Path | None) -> pd.DataFrame:
    """The table of a file, unchecked."""
    if path.is_dir() and (path / "hypotheses.csv").is_file():
        return _read_kdlib(path / "hypotheses.csv", decoder)
    if path.is_dir() and (path / f"evaluation_{decoder}.json").is_file():
        return _read_file(path / f"evaluation_{decoder}.json", decoder, references)
    if not path.is_file():
        raise UserError(f"{path}: no predictions found; expected {FORMATS}")
    if path.suffix == ".csv":
        return _read_kdlib(path, decoder)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); expected {FORMATS}") from None
    if path.suffix == ".txt":
        return _read_plain(path, text, references)
    content = _parse_json(text)
    if isinstance(content, dict) and "predictions" in content:
        rows = content["predictions"]
        rows = rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else []
        return _table(path, map(_evaluation_row, rows))
    lines = enumerate(text.splitlines(), 1)
    return _table(path, (_nemo_row(path, number, line) for number, line in lines if line.strip()))


def _read_kdlib(path: Path, decoder: str) -> pd.DataFrame:
    if damage := stage.damaged(path.parent):
        raise UserError(f"{path.parent}/{damage}; score the system again, or take the folder from a copy")
    try:
        rows = read_hypotheses(path)
    except (TypeError, ValueError, KeyError):  # other columns than kdlib's, or no text
        raise UserError(f"{path}: not a hypotheses.csv of kdlib; expected {FORMATS}") from None
    if not rows:
        raise UserError(f"{path}: it has no predictions; expected {FORMATS}")
    if decoder not in decoders(path):  # the output of an untrained head is not a result
        hint = nearest(decoder, decoders(path))
        raise UserError(f"{path}: the decoder {decoder!r} was not used for this system{hint}")
    column = IDS.get(decoder)
    ids = [_parse_ids(getattr(row, column).split()) if column else None for row in rows]
    texts = ((row.utt_id, row.speaker, row.reference, getattr(row, decoder)) for row in rows)
    return _table(path, ((*text, indices) for text, indices in zip(texts, ids, strict=True)))


def decoders(path: Path) -> list[str]:
    """The decoders that were scored: those in scores.json next to the file, else those with any non-empty output."""
    scores = path.with_name("scores.json")
    if scores.is_file():
        try:
            return list(json.loads(scores.read_text(encoding="utf-8"))["decoders"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{scores} is damaged; score the system again, or take the file from a copy") from None
    table = pd.read_csv(path, keep_default_na=False, dtype=str)
    names = [name for name in table.columns[table.columns.get_loc("reference") + 1 :] if not name.endswith("_ids")]
    return [name for name in names if table[name].str.contains("[^0-9. ]", regex=True).any()]


def _evaluation_row(row: dict) -> tuple:
    """A row of the original study's evaluation files."""
    ids = _parse_ids(row.get("prediction_tokens"))
    return row.get("utterance_id"), row.get("speaker", ""), row.get("target"), row.get("prediction_text"), ids


def _parse_ids(ids: object) -> tuple[int, ...] | None:
    """Token ids from a list or a space-separated text; None if these are not ids."""
    ids = ids.split() if isinstance(ids, str) else ids
    try:
        numbers = [float(index) for index in ids] if isinstance(ids, list) else [math.nan]
    except (TypeError, ValueError):
        return None
    return tuple(map(int, numbers)) if all(number.is_integer() for number in numbers) else None


def _nemo_row(path: Path, number: int, line: str) -> tuple:
    """A line of NeMo's manifest with predictions."""
    row = _parse_json(line)
    if not isinstance(row, dict) or "pred_text" not in row:
        raise UserError(f"{path}, line {number}: no pred_text in it; expected {FORMATS}")
    return row.get("audio_filepath", str(number)), row.get("speaker", ""), row.get("text"), row["pred_text"], None


def _read_plain(path: Path, text: str, references: Path | None) -> pd.DataFrame:
    """Hypotheses, one per line; the references are in a file of their own, one per line."""
    if references is None or not references.is_file():
        raise UserError(f"{path}: plain text needs its references in a file, one per line: --references FILE")
    refs, hyps = references.read_text(encoding="utf-8-sig").splitlines(), text.splitlines()
    if len(refs) != len(hyps):
        raise UserError(f"{path} has {len(hyps)} lines, {references} has {len(refs)}; they must have equally many")
    return _table(path, ((f"line{i}", "", *pair, None) for i, pair in enumerate(zip(refs, hyps, strict=True), start=1)))


def _parse_json(text: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {}


def _table(path: Path, rows: Iterable[tuple]) -> pd.DataFrame:
    table = pd.DataFrame(list(rows), columns=[*COLUMNS, "token_ids"], dtype=object)
    if table.empty:
        raise UserError(f"{path}: it has no predictions; expected {FORMATS}")
    return table


def _check(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Check that every row has a unique id, a reference and a hypothesis; normalise the texts."""
    table = table.copy()
    for column, name in (("utt_id", "an id"), ("reference", "a reference"), ("hypothesis", "a hypothesis")):
        bad = table[column].map(lambda value: not isinstance(value, str))
        if bad.any():
            first = table[bad].iloc[0]
            raise UserError(f"{path}: {int(bad.sum())} of {len(table)} rows lack {name}, first {first.utt_id}")
    short = table.utt_id.map(lambda name: Path(name).name.removesuffix(".wav").removesuffix(".flac"))
    if short.str.match(UASPEECH).all():  # other file names may repeat in the folders of other speakers
        table["utt_id"] = short
    if (twice := table.utt_id[table.utt_id.duplicated()]).any():
        raise UserError(f"{path}: {twice.iloc[0]!r} appears twice in it; ids must be unique")
    for column in ("reference", "hypothesis"):
        table[column] = table[column].map(normalise)
    if (table.reference == "").any():
        raise UserError(f"{path}: the reference of {table.utt_id[table.reference == ''].iloc[0]} is empty")
    speakers = table.utt_id.str.extract(UASPEECH)[0]
    if (table.speaker == "").all() and speakers.notna().all():
        table["speaker"] = speakers
    return table
