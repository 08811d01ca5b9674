"""The command `make examine`: examine any predictions in seconds, without a model; print the verdict, write a page.

python -m kdlib examine evaluation.json --tokenizer tokenizer.model
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from kdlib.diagnose import causes, examination
from kdlib.diagnose.causes import FITS, Diagnosis
from kdlib.diagnose.examination import Examination
from kdlib.errors import UserError
from kdlib.evaluate import posteriors, predictions
from kdlib.evaluate.rounding import percent
from kdlib.io import repository_root, write_json
from kdlib.tokens import Tokens


def find_tokenizers(named: Sequence[Path], near: Path) -> tuple[dict[str, Tokens], int]:
    """Tokenizers to decode with, and how many of the first are certainly those of the file.

    The named ones come first, then those in the folder of the file or of the student that was scored, then that of our
    recipes whose fingerprint the file has; last all others of our recipes.
    """
    folder = near if near.is_dir() else near.parent
    folders = [folder, *([folder.parent] if (folder.parent / "model.json").is_file() else [])]  # a student's scores
    beside = [path for place in folders for path in sorted(place.glob("*.model"))]
    outputs = repository_root() / "outputs"
    ours = sorted([*outputs.glob("*/tokens/tokenizer.model"), *outputs.glob("*/*/tokens/tokenizer.model")])
    found: dict[str, Tokens] = {}
    for path in [*named, *beside]:
        _add_tokenizer(found, path, path in named)
    own = _fingerprint(near)
    certain = [path for path in ours if Tokens.for_teachers(path).fingerprint == own]
    for path in certain:
        _add_tokenizer(found, path, False)
    count = len(found)
    for path in ours:
        _add_tokenizer(found, path, False)
    return found, count


def _add_tokenizer(found: dict[str, Tokens], path: Path, required: bool) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file; TOKENIZER takes sentencepiece models, separated by commas")
    try:
        tokens = Tokens.of_file(path)
    except UserError:
        if required:
            raise
        return
    if tokens.model not in [added.model for added in found.values()]:
        found[_display_name(path, found)] = tokens


def _fingerprint(near: Path) -> str:
    """The fingerprint of the tokenizer, where a file of kdlib has it."""
    listed = sorted(near.glob("evaluation_*.json")) if near.is_dir() else [near] if near.suffix == ".json" else []
    for path in listed:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(content, dict) and isinstance(content.get("tokenizer"), str):
            return content["tokenizer"]
    return ""


def page(result: Examination, diagnosis: Diagnosis, source: str) -> str:
    """The examination as text, the verdict first."""
    values = result.figures
    per_cent = {name: f"{percent(values[name])} %" for name in values}
    repetition = percent(max(values["repetition"], values.get("token_repetition", 0)))
    kinds = ("substitutions", "deletions", "insertions")
    errors = ", ".join(f"{kind[0].upper()} {int(values[kind])}" for kind in kinds)
    pairs = (
        f"same hypothesis for two utterances of one word: {per_cent['consistency']} of the pairs (any two: "
        f"{per_cent['consistency_by_chance']}); "
    )
    pairs = "" if math.isnan(values["consistency"]) else pairs  # no text was said twice
    lines = [
        f"{source}: {int(values['n'])} hypotheses",
        "",
        result.verdict,
        diagnosis.text,
        "",
        f"WRA {per_cent['wra']}, WER {per_cent['wer']} ({errors}), CER {per_cent['cer']}; "
        f"{values['words_per_reference']:.1f} words per reference word",
        f"{int(values['distinct_texts'])} different texts"
        + (f", {int(values['distinct_tokens'])} different token sequences" if "distinct_tokens" in values else "")
        + f" for {int(values['references'])} different references; effective number of texts: "
        f"{values['effective_answers']:.0f}",
        f"empty {per_cent['empty']}, repetitive {repetition} %; "
        f"{per_cent['vocabulary_words']} of the words are in the vocabulary",
        pairs + f"mutual information {values['bits']:.2f} of {values['bits_of']:.2f} bits "
        f"({values['bits_by_chance']:.2f} by chance)",
    ]
    if "tokens_right" in values:
        lines.append(
            f"tokens: correct in position {per_cent['tokens_right']}, id off by one {per_cent['tokens_off_by_one']}, "
            f"position off by one {per_cent['tokens_displaced']}, in no reference {per_cent['unknown_tokens']}"
        )
    short = f"{per_cent['short_answers']} of the answers, {per_cent['short_references']} of the references"
    lines.append(f"words of one token, or else of one or two letters: {short}")
    if "blank_frames" in values:
        lines.append(f"frames: blank {per_cent['blank_frames']}, mean entropy {values['entropy_bits']:.2f} bits")
    if "agrees_with_teachers" in values:
        lines.append(
            f"same hypothesis as the combined teachers: {per_cent['agrees_with_teachers']}, where theirs is wrong "
            f"{per_cent['agrees_with_teachers_wrong']} (WRA of the teachers {per_cent['teachers_wra']})"
        )
    lines += ["", "Most frequent hypotheses:", result.most_frequent.head(8).to_string(index=False)]
    if result.redecodings:
        rows = [
            {
                "decoded with": str(way),
                "WRA %": percent(way.wra),
                "as in the file %": percent(way.as_written),
            }
            for way in result.redecodings
        ]
        rows = rows[:5] + [row for row in rows[5:] if row["as in the file %"] > 50]
        lines += ["", "Other decodings of the same token ids:", pd.DataFrame(rows).to_string(index=False)]
    if diagnosis.fits:
        shown = causes.table(diagnosis)[["description", "distance", "fits", "nearest case"]]
        rule = f"up to {FITS:g} fits, if clearly nearer than no fault"
        lines += ["", f"Causes by the distance of their fingerprints ({rule}):", shown.to_string()]
    return "\n".join(lines)


def _display_name(path: Path, taken: Mapping[str, Tokens]) -> str:
    """A short name of a tokenizer that is not taken yet."""
    name = path.name if path.name not in taken else f"{path.parent.parent.name}/{path.name}"
    return name if name not in taken else str(path)


def _page_folder(path: Path) -> str:
    """The name of the folder of a page, unique to the examined file."""
    whole = path.resolve()
    if whole.is_relative_to(repository_root() / "outputs"):
        return "-".join(whole.relative_to(repository_root() / "outputs").with_suffix("").parts) or "outputs"
    return f"{whole.parent.name}-{whole.stem}"


def main(arguments: Sequence[str]) -> None:
    """Examine a file of predictions, with the arguments of the command."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args(arguments))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.add_argument("file", type=Path, help=predictions.FORMATS)
    parser.add_argument("--tokenizer", default="", help="sentencepiece models, comma-separated, the system's own first")
    parser.add_argument("--decoder", default="greedy", help="in a folder of kdlib: the decoder to examine")
    parser.add_argument("--references", type=Path, help="the references of a text file of hypotheses")
    parser.add_argument("--columns", default="", help="of a table: id=...,reference=...,hypothesis=...")
    parser.add_argument("--out", type=Path, help="folder of the page; by default below outputs/examined")


def run(args: argparse.Namespace) -> None:
    """Run the command: examine a file of predictions."""
    path = args.file.expanduser()
    rows = predictions.read(
        path, args.decoder, args.references, ids=True, columns=predictions.named_columns(args.columns)
    )
    named = [Path(name).expanduser() for name in args.tokenizer.split(",") if name]
    has_ids = rows.token_ids.notna().all()
    tokenizers, own = find_tokenizers(named, path) if has_ids or named else ({}, 0)
    if not own and rows.hypothesis.isna().any():
        tokenizers = {}  # ids without text: their tokenizer cannot be guessed
    folder = path if path.is_dir() else path.parent
    ours = args.decoder == "greedy" and (folder.parent / "model.json").is_file()  # in the students' tokens
    frames = folder / "posteriors" / posteriors.FILE if ours else None
    result = examination.examine(rows, tokenizers, posteriors=frames)
    diagnosis = causes.diagnose(causes.signs(result))
    text = page(result, diagnosis, args.file.name)
    print(text)
    if not has_ids:
        print("\nThe file has no token ids, so no other decoding was tried.")
    elif not own:
        print("\nName the sentencepiece model of these token ids to decode them in other ways: TOKENIZER=...")
    from kdlib.show import failure_figures, figures  # after the verdict is printed: their import takes a second

    out = args.out or repository_root() / "outputs" / "examined" / _page_folder(path)
    out.mkdir(parents=True, exist_ok=True)
    (out / "page.txt").write_text(text + "\n", encoding="utf-8")
    result.texts.to_csv(out / "answers.csv", index=False)
    values = {name: None if math.isnan(value) else value for name, value in result.figures.items()}
    record = {"severity": result.severity, "verdict": result.verdict, "figures": values}
    write_json(out / "examination.json", record | {"causes": list(diagnosis.named), "diagnosis": diagnosis.text})
    figures.save(failure_figures.examination(result, diagnosis), out, "examination")
    print(f"\nWritten: {out}/page.txt, answers.csv, examination.json, examination.png and .pdf")
