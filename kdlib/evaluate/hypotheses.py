"""`hypotheses.csv`: one row per utterance, with its hypothesis by each decoder."""

import csv
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kdlib.errors import UserError

IDS = {"greedy": "token_ids", "attention": "attention_ids"}  # decoder -> column of its token ids


@dataclass(frozen=True)
class Hypothesis:
    """One row of `hypotheses.csv`: an utterance and its hypothesis by each decoder, empty if not used."""

    utt_id: str
    speaker: str
    level: str
    word_type: str
    seen: str  # "yes", "no", or empty where it does not apply
    reference: str
    greedy: str = ""
    lexicon: str = ""
    lexicon_posterior: float = 0.0  # of the word that `lexicon` chose
    lexicon_plain: str = ""  # without calibration
    lexicon_transductive: str = ""  # with the mean posterior of all scored utterances moved to the prior of the words
    beam: str = ""
    attention: str = ""
    attention_beam: str = ""
    attention_lexicon: str = ""
    joint: str = ""
    joint_lexicon: str = ""
    n_tokens: int = 0
    blank_share: float = 0.0
    token_ids: str = ""  # greedy, space-separated
    attention_ids: str = ""  # of `attention`


def decode_again(row: Hypothesis, decode: Callable[[list[int]], str]) -> Hypothesis:
    """Decode the token ids of a hypothesis to text with another function."""
    ids = {name: [int(index) for index in getattr(row, column).split()] for name, column in IDS.items()}
    return replace(row, **{name: decode(indices) for name, indices in ids.items() if indices})


def write_hypotheses(rows: Iterable[Hypothesis], path: Path) -> None:
    """Write `hypotheses.csv`."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Hypothesis.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read_hypotheses(path: Path) -> list[Hypothesis]:
    """Read `hypotheses.csv`."""
    if not path.is_file():
        raise UserError(f"no hypotheses in {path}: first run the notebook that scores this system")
    with path.open(newline="", encoding="utf-8") as file:
        numbers = {"n_tokens": int, "blank_share": float, "lexicon_posterior": float}
        return [
            Hypothesis(**row | {name: kind(row[name]) for name, kind in numbers.items() if name in row})
            for row in csv.DictReader(file)
        ]
