"""The command `make examine`: any predictions examined in seconds, without a model; the verdict first, and a page.

python -m kdlib.show.examination_page evaluation.json --tokenizer tokenizer.model
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from kdlib.diagnose import causes, examination
from kdlib.diagnose.causes import FITS, Diagnosis
from kdlib.diagnose.examination import Examination
from kdlib.errors import UserError
from kdlib.evaluate import posteriors, predictions
from kdlib.io import repository_root, write_json
from kdlib.tokens import Tokens


def find_tokenizers(named: Sequence[Path], near: Path) -> tuple[dict[str, Tokens], int]:
    """Tokenizers to decode with, and how many of the first are surely the file's own.

    Those named come first, then those beside the file, or of the student whose scores it is, then that of our recipes
    whose fingerprint the file gives; behind them all others of our recipes.
    """
    folder = near if near.is_dir() else near.parent
    places = [folder, *([folder.parent] if (folder.parent / "model.json").is_file() else [])]  # a student's scores
    beside = [one for place in places for one in sorted(place.glob("*.model"))]
    outputs = repository_root() / "outputs"
    ours = sorted([*outputs.glob("*/tokens/tokenizer.model"), *outputs.glob("*/*/tokens/tokenizer.model")])
    found: dict[str, Tokens] = {}
    for path in [*named, *beside]:
        _take(found, path, path in named)
    own = _fingerprint(near)
    sure = [path for path in ours if Tokens.for_teachers(path).fingerprint == own]
    for path in sure:
        _take(found, path, False)
    count = len(found)
    for path in ours:
        _take(found, path, False)
    return found, count


def _take(found: dict[str, Tokens], path: Path, named: bool) -> None:
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; TOKENIZER names sentencepiece models, separated by commas")
    try:
        one = Tokens.of_file(path)
    except (RuntimeError, OSError):
        if named:
            raise UserError(f"{path}: this is no sentencepiece model") from None
        return
    if one.model not in [other.model for other in found.values()]:
        found[_called(path, found)] = one


def _fingerprint(near: Path) -> str:
    """Of the tokenizer, where one of our files says it."""
    listed = sorted(near.glob("evaluation_*.json")) if near.is_dir() else [near] if near.suffix == ".json" else []
    for path in listed:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(content, dict) and isinstance(content.get("tokenizer"), str):
            return content["tokenizer"]
    return ""


def page(found: Examination, told: Diagnosis, source: str) -> str:
    """The examination as text, the verdict first."""
    one = found.figures
    per_cent = {name: f"{100 * one[name]:.1f} %" for name in one}
    lines = [
        f"{source}: {int(one['n'])} answers",
        "",
        found.verdict,
        told.text,
        "",
        f"WRA {per_cent['wra']}, WER {per_cent['wer']} (S {int(one['substitutions'])}, D {int(one['deletions'])}, "
        f"I {int(one['insertions'])}), CER {per_cent['cer']}; {one['words_per_reference']:.1f} words a reference word",
        f"{int(one['distinct_texts'])} different texts"
        + (f", {int(one['distinct_tokens'])} different token sequences" if "distinct_tokens" in one else "")
        + f" for {int(one['references'])} different references; as spread as {one['effective_answers']:.0f} equally common ones",
        f"empty {per_cent['empty']}, repeating themselves {100 * max(one['repetition'], one.get('token_repetition', 0)):.1f} %; "
        f"of the words {per_cent['vocabulary_words']} are in the vocabulary",
        f"one word, one answer: {per_cent['consistency']} of the pairs (any two answers: "
        f"{per_cent['consistency_by_chance']}); answers hold {one['bits']:.2f} of {one['bits_of']:.2f} bits "
        f"({one['bits_by_chance']:.2f} by chance)",
    ]
    if "tokens_right" in one:
        lines.append(
            f"tokens: right in their place {per_cent['tokens_right']}, id one off {per_cent['tokens_off_by_one']}, "
            f"one place off {per_cent['tokens_displaced']}, in no reference {per_cent['unknown_tokens']}"
        )
    if "blank_frames" in one:
        lines.append(f"frames: blank {per_cent['blank_frames']}, {one['entropy_bits']:.2f} bits of doubt each")
    if "agrees_with_teachers" in one:
        lines.append(
            f"as the teachers together answer: {per_cent['agrees_with_teachers']}, of their wrong answers "
            f"{per_cent['agrees_with_teachers_wrong']} (they recognise {per_cent['teachers_wra']})"
        )
    lines += ["", "The commonest answers:", found.most_frequent.head(8).to_string(index=False)]
    if found.redecodings:
        rows = [
            {
                "read with": str(way),
                "WRA %": round(100 * way.wra, 1),
                "as in the file %": round(100 * way.as_written, 1),
            }
            for way in found.redecodings
        ]
        rows = rows[:5] + [row for row in rows[5:] if row["as in the file %"] > 50]
        lines += ["", "The same token ids, decoded in other ways:", pd.DataFrame(rows).to_string(index=False)]
    if told.fits:
        shown = causes.table(told)[["what it is", "distance", "fits", "like"]]
        lines += ["", f"Causes by how near their fingerprints are (up to {FITS:g} fits):", shown.to_string()]
    return "\n".join(lines)


def _called(path: Path, taken: Mapping[str, Tokens]) -> str:
    name = path.name if path.name not in taken else f"{path.parent.parent.name}/{path.name}"
    return name if name not in taken else str(path)


def _place(path: Path) -> str:
    """A folder's name for the page: what tells the file from others."""
    whole = path.resolve()
    if whole.is_relative_to(repository_root() / "outputs"):
        return "-".join(whole.relative_to(repository_root() / "outputs").with_suffix("").parts) or "outputs"
    return f"{whole.parent.name}-{whole.stem}"


def main(arguments: Sequence[str]) -> None:
    """The command: examine a file of predictions."""
    parser = argparse.ArgumentParser(prog="python -m kdlib.show.examination_page", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help=predictions.FORMATS)
    parser.add_argument("--tokenizer", default="", help="sentencepiece models, commas between, the system's own first")
    parser.add_argument("--decoder", default="greedy", help="of a folder of kdlib's: which decoder's answers")
    parser.add_argument("--references", type=Path, help="of a text file of hypotheses: the references")
    parser.add_argument("--out", type=Path, help="folder of the page; by default below outputs/examined")
    given = parser.parse_args(arguments)
    path = given.file.expanduser()
    rows = predictions.read(path, given.decoder, given.references, ids=True)
    named = [Path(one).expanduser() for one in given.tokenizer.split(",") if one]
    has_ids = rows.token_ids.notna().all()
    tokenizers, own = find_tokenizers(named, path) if has_ids else ({}, 0)
    if not own and rows.hypothesis.isna().any():
        tokenizers = {}  # whose these ids are cannot be guessed
    folder = path if path.is_dir() else path.parent
    ours = given.decoder == "greedy" and (folder.parent / "model.json").is_file()  # in the students' tokens
    found = examination.examine(rows, tokenizers, posteriors=folder / "posteriors" / posteriors.FILE if ours else None)
    told = causes.diagnose(causes.signs(found))
    text = page(found, told, given.file.name)
    print(text)
    if not has_ids:
        print("\nThere are no token ids in it, so that no other decoding could be tried.")
    elif not own:
        print("\nName the sentencepiece model of these token ids, to see them decoded in other ways: TOKENIZER=...")
    from kdlib.show import (
        failure_figures,
        figures,  # behind the verdict: they take a second
    )

    out = given.out or repository_root() / "outputs" / "examined" / _place(path)
    out.mkdir(parents=True, exist_ok=True)
    (out / "page.txt").write_text(text + "\n", encoding="utf-8")
    found.texts.to_csv(out / "answers.csv", index=False)
    known = {name: None if math.isnan(value) else value for name, value in found.figures.items()}
    record = {"severity": found.severity, "verdict": found.verdict, "figures": known}
    write_json(out / "examination.json", record | {"causes": list(told.named), "diagnosis": told.text})
    figures.save(failure_figures.examination(found, told), out, "examination")
    print(f"\nWritten: {out}/page.txt, answers.csv, examination.json, examination.png and .pdf")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"\n{error}\n")
