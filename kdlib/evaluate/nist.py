"""NIST's STM and CTM files: references, and hypotheses with the time of every word, for sclite and for reading.

STM: `file channel speaker begin end <labels> words`. CTM: `file channel begin duration word`.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from kdlib.errors import UserError

COMMENT = ";;"


def write_stm(path: Path, rows: Iterable[tuple[str, str, float, str]]) -> None:
    """Write references: utterance, speaker, seconds, text."""
    lines = [f"{utt_id} 1 {speaker} 0.00 {seconds:.2f} {text}".rstrip() for utt_id, speaker, seconds, text in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_ctm(path: Path, rows: Iterable[tuple[str, float, str]]) -> None:
    """Write hypotheses: utterance, seconds, text; the words share its time evenly."""
    lines = []
    for utt_id, seconds, text in rows:
        words: Sequence[str] = text.split()
        each = seconds / max(1, len(words))
        lines += [f"{utt_id} 1 {place * each:.3f} {each:.3f} {word}" for place, word in enumerate(words)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_stm(path: Path) -> dict[str, tuple[str, str]]:
    """Utterance -> speaker and text; the parts of a file in the order of their times."""
    found: dict[str, list[tuple[float, str, str]]] = defaultdict(list)
    for number, fields in _lines(path, 5, "file channel speaker begin end words"):
        words = fields[6:] if fields[5:] and fields[5].startswith("<") and fields[5].endswith(">") else fields[5:]
        found[fields[0]].append((_seconds(fields[3], path, number), fields[2], " ".join(words)))
    return {
        name: (parts[0][1], " ".join(text for *_, text in sorted(parts, key=lambda part: part[0])).strip())
        for name, parts in found.items()
    }


def read_ctm(path: Path) -> dict[str, str]:
    """Utterance -> text, its words in the order of their times. An utterance without words has no line."""
    found: dict[str, list[tuple[float, int, str]]] = defaultdict(list)
    for number, fields in _lines(path, 5, "file channel begin duration word"):
        found[fields[0]].append((_seconds(fields[2], path, number), number, fields[4]))
    return {name: " ".join(word for *_, word in sorted(rows)) for name, rows in found.items()}


def pair(references: Mapping[str, tuple[str, str]], hypotheses: Mapping[str, str], name: str) -> list[dict[str, str]]:
    """References and hypotheses by utterance; hypotheses of other utterances are refused."""
    if unknown := sorted(set(hypotheses) - set(references)):
        raise UserError(f"{name}: {len(unknown)} utterances have no reference, first {unknown[0]}; name the STM file")
    return [
        {"utt_id": utt_id, "speaker": speaker, "reference": text, "hypothesis": hypotheses.get(utt_id, "")}
        for utt_id, (speaker, text) in references.items()
    ]


def _lines(path: Path, least: int, form: str) -> Iterable[tuple[int, list[str]]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if line.strip() and not line.startswith(COMMENT):
            fields = line.split()
            if len(fields) < least:
                raise UserError(f"{path}, line {number}: {len(fields)} fields; expected {form}")
            yield number, fields


def _seconds(text: str, path: Path, number: int) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{path}, line {number}: {text!r} is not a number of seconds") from None
