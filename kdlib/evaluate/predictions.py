"""Read a system's hypotheses: kdlib's own files, other toolkits' (`result_formats.py`), or plain text.

Every reader returns the same table, one row per utterance: utt_id, speaker, reference, hypothesis; with `ids` also the
decoded token ids, where there are any. Where a file has no speakers, they are taken from its header, from ids such as
M08_B2_C1_M5, or from its path; otherwise all rows count as one speaker.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pandas as pd

from kdlib import stage
from kdlib.console import report_once
from kdlib.errors import UserError, nearest
from kdlib.evaluate.hypotheses import IDS, read_hypotheses
from kdlib.evaluate.result_formats import FORMATS as OTHERS
from kdlib.evaluate.result_formats import NAMES, Content, Parsed, has_hypotheses, no_result, parse_ids
from kdlib.evaluate.score import score
from kdlib.tokens import normalise

COLUMNS = ["utt_id", "speaker", "reference", "hypothesis"]
UASPEECH = re.compile(r"^(C?[FM]C?\d{2})_")  # ids that begin with the speaker
IN_PATH = re.compile(r"(?<![A-Za-z0-9])(C?[FM]C?\d{2})(?![A-Za-z0-9])")
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".trn", ".ctm")  # of result files, in a folder
CLOSE = 0.0006  # of rates: files round them
FORMATS = "a result file, or a folder of them (docs/result-files.md lists what is read)"


def read(
    path: Path,
    decoder: str = "greedy",
    references: Path | None = None,
    *,
    ids: bool = False,
    columns: Mapping[str, str] | None = None,
    speaker_of_path: bool = True,
) -> pd.DataFrame:
    """Read the hypotheses in a file or a folder; `decoder` chooses a column of hypotheses.csv.

    With `ids` there is a column `token_ids`, None if the file has none at all; a row with ids may lack its text (None).
    `columns` names those of a table: id, speaker, reference, hypothesis. Where neither the file nor its ids have a
    speaker, it is that of the path, unless `speaker_of_path` is False.
    """
    table = _read_path(path, decoder, references, columns or {})
    if not ids:
        return _check(path, table, speaker_of_path)[COLUMNS]
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
    checked = _check(path, table.assign(hypothesis=table.hypothesis.where(~textless, "")), speaker_of_path)
    checked["hypothesis"] = checked.hypothesis.astype(object).mask(textless, None)
    return checked


def named_columns(text: str) -> dict[str, str]:
    """The columns that a command names: id=utt,reference=gold,hypothesis=asr.

    >>> named_columns("id=utt,hypothesis=asr")
    {'id': 'utt', 'hypothesis': 'asr'}
    """
    found = dict(part.partition("=")[::2] for part in text.split(",") if part)
    if unknown := sorted(set(found) - set(NAMES)):
        raise UserError(f"columns: unknown part {unknown[0]!r}{nearest(unknown[0], list(NAMES))}")
    return found


def is_single(path: Path, decoder: str = "greedy") -> bool:
    """True for a file, and for a folder that is one system's scores."""
    return not path.is_dir() or (path / "hypotheses.csv").is_file() or (path / f"evaluation_{decoder}.json").is_file()


def result_files(folder: Path, decoder: str = "greedy") -> list[Path]:
    """The result files below a folder; what is none of them is left out, and said what it is.

    Where a report of words and one of characters have the same name, that of words is taken.
    """
    if is_single(folder, decoder):
        return [folder]
    found, left_out = [], []
    for path in _walk(folder, decoder):
        if path.is_dir():
            found.append(path)
            continue
        better = [
            path.name.replace(*pair, 1) for pair in (("cer", "wer"), ("ref", "hyp")) if path.name.startswith(pair[0])
        ]
        if any(path.with_name(name).is_file() for name in better):
            continue
        content = _content(path, None, {})
        if path.name == "hypotheses.csv" or (any(one.fits(content) for one in OTHERS) and has_hypotheses(content)):
            found.append(path)
        else:
            left_out.append((path, no_result(content) or "no result file"))
    for path, why in left_out[:5]:
        print(f"{path} is left out: {why}")
    if len(left_out) > 5:
        print(f"... and {len(left_out) - 5} more files of {folder}")
    if not found:
        raise UserError(f"{folder}: no result files in it; expected {FORMATS}")
    return found


def _walk(folder: Path, decoder: str) -> Iterator[Path]:
    """The files below a folder; of a system's scores the folder alone, not other decoders and dev speech in it."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and is_single(path, decoder):
            yield path
        elif path.is_dir() and not path.name.startswith("."):
            yield from _walk(path, decoder)
        elif path.suffix in SUFFIXES:
            yield path


def _content(path: Path, references: Path | None, columns: Mapping[str, str]) -> Content:
    try:
        return Content(path, path.read_text(encoding="utf-8-sig"), references, columns)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); expected {FORMATS}") from None


def _read_path(path: Path, decoder: str, references: Path | None, columns: Mapping[str, str]) -> pd.DataFrame:
    """The table of a file or of a folder, unchecked."""
    if path.is_dir() and (path / "hypotheses.csv").is_file():
        return _read_kdlib(path / "hypotheses.csv", decoder)
    if path.is_dir() and (path / f"evaluation_{decoder}.json").is_file():
        path = path / f"evaluation_{decoder}.json"
    if not path.is_file():
        raise UserError(f"{path}: no predictions found; expected {FORMATS}")
    content = _content(path, references, columns)
    if not columns and {"utt_id", "greedy"} <= set(content.header):
        return _read_kdlib(path, decoder)
    for one in OTHERS:
        if one.fits(content):
            return _parsed(path, one.parse(content), one.name)
    if what := no_result(content):
        raise UserError(f"{path}: it has no predictions: it is {what}; expected {FORMATS}")
    if content.lines and path.suffix not in (".json", ".jsonl", ".csv", ".tsv"):
        return _read_plain(path, content.text, references)
    raise UserError(f"{path}: it has no predictions; expected {FORMATS}")


def _parsed(path: Path, found: Parsed, name: str) -> pd.DataFrame:
    """The table of a file's rows; what the file says of them is checked."""
    table = _table(path, found.rows)
    if (table.speaker == "").all() and found.speaker:
        table["speaker"] = found.speaker
    pairs = table[table.hypothesis.map(lambda text: isinstance(text, str)) & table.reference.map(bool)]
    if len(pairs) == len(table) and (found.wer is not None or found.wra is not None):
        found_rates = score(*([normalise(str(text)) for text in pairs[side]] for side in ("reference", "hypothesis")))
        own, rates = {"WER": found.wer, "WRA": found.wra}, {"WER": found_rates.wer, "WRA": found_rates.wra}
        for measure, value in own.items():
            ours = rates[measure]
            if value is not None and min(abs(value - ours), abs(value / 100 - ours)) > CLOSE:
                report_once(f"{path}: the file says {measure} {value:g}, its rows ({name}) give {100 * ours:.2f} %")
    return table


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
    ids = [parse_ids(getattr(row, column).split()) if column else None for row in rows]
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


def _read_plain(path: Path, text: str, references: Path | None) -> pd.DataFrame:
    """Hypotheses, one per line; the references are in a file of their own, one per line."""
    if references is None or not references.is_file():
        raise UserError(f"{path}: plain text needs its references in a file, one per line: --references FILE")
    refs, hyps = references.read_text(encoding="utf-8-sig").splitlines(), text.splitlines()
    if len(refs) != len(hyps):
        raise UserError(f"{path} has {len(hyps)} lines, {references} has {len(refs)}; they must have equally many")
    return _table(path, ((f"line{i}", "", *pair, None) for i, pair in enumerate(zip(refs, hyps, strict=True), start=1)))


def _table(path: Path, rows: Iterable[tuple]) -> pd.DataFrame:
    table = pd.DataFrame(list(rows), columns=[*COLUMNS, "token_ids"], dtype=object)
    if table.empty:
        raise UserError(f"{path}: it has no predictions; expected {FORMATS}")
    return table


def _check(path: Path, table: pd.DataFrame, speaker_of_path: bool) -> pd.DataFrame:
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
    elif (table.speaker == "").all() and speaker_of_path:
        table["speaker"] = _speaker_of(path)
    return table


def _speaker_of(path: Path) -> str:
    """The only speaker that a path names, in the file's name or else in a folder's; empty if there is none."""
    for part in (path.stem, *(folder.name for folder in path.parents)):
        if len(names := set(IN_PATH.findall(part))) == 1:
            return names.pop()
    return ""
