"""Tables for display: scores in per cent, as data frames."""

import json
from pathlib import Path

import pandas as pd

from kdlib.corpus.manifest import Corpus


def headline(scores: dict) -> pd.DataFrame:
    """One row per decoder: WRA with its interval, first-word WRA, WER with its parts, CER. Shares in per cent."""
    rows = [{"decoder": name, **_row(result)} for name, result in scores["decoders"].items()]
    return pd.DataFrame(rows).set_index("decoder")


def breakdown(scores: dict) -> pd.DataFrame:
    """WRA in per cent by word type and by whether the word was seen in training; one column per decoder."""
    rows = {}
    for name, decoder in scores["decoders"].items():
        for group in ("word_type", "seen"):
            for part, result in decoder["by"][group].items():
                label = f"seen in training: {part}" if group == "seen" else part
                rows.setdefault(label, {"n": result["n"]})[f"{name} WRA"] = _percent(result["wra"])
    return pd.DataFrame.from_dict(rows, orient="index")


def by_speaker(folder: Path, corpus: Corpus) -> pd.DataFrame:
    """WRA by speaker and decoder of a scored stage, from least to most intelligible; unseen controls at the end."""
    rows = []
    for part in (folder, folder / "controls"):
        if (part / "scores.json").is_file():
            for decoder, scores in json.loads((part / "scores.json").read_text(encoding="utf-8"))["decoders"].items():
                rows += [
                    {
                        "speaker": name,
                        "level": corpus.level(name) or "?",
                        "decoder": decoder,
                        "n": result["n"],
                        "wra": result["wra"],
                        "low": result["ci95"][0],
                        "high": result["ci95"][1],
                    }
                    for name, result in scores["by"]["speaker"].items()
                ]
    order = {name: index for index, name in enumerate(corpus.by_intelligibility)}
    decoders = {name: index for index, name in enumerate(dict.fromkeys(row["decoder"] for row in rows))}
    return pd.DataFrame(rows).sort_values(
        ["speaker", "decoder"],
        key=lambda column: column.map(order if column.name == "speaker" else decoders),
        ignore_index=True,
    )


def by_level(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean WRA in per cent over the speakers of each published intelligibility level, by decoder."""
    wide = scores.assign(wra=100 * scores.wra).pivot_table(index="level", columns="decoder", values="wra").round(1)
    wide = wide[list(dict.fromkeys(scores.decoder))]
    wide.insert(0, "speakers", scores.groupby("level").speaker.nunique())
    return wide.reindex([name for name in ("CONTROL", "HIGH", "MID", "LOW", "VERY_LOW", "?") if name in wide.index])


def _row(result: dict) -> dict:
    low, high = result["ci95"]
    return {
        "n": result["n"],
        "WRA": _percent(result["wra"]),
        "95 % interval": f"{_percent(low)} - {_percent(high)}",
        "first-word WRA": _percent(result["wra_first_word"]),
        "WER": _percent(result["wer"]),
        "S": result["substitutions"],
        "D": result["deletions"],
        "I": result["insertions"],
        "CER": _percent(result["cer"]),
    }


def _percent(share: float) -> float:
    return round(100 * share, 1)
