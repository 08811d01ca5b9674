"""Scores as tidy tables: one value per row, shares unrounded. `show.format` makes tables for reading of them."""

from pathlib import Path

import pandas as pd

from kdlib.corpus.manifest import Corpus
from kdlib.io import read_json


def by_speaker(folder: Path, corpus: Corpus) -> pd.DataFrame:
    """WRA by speaker and decoder of a scored stage, from least to most intelligible; unseen controls at the end."""
    rows = []
    for part in (folder, folder / "controls"):
        if (part / "scores.json").is_file():
            for decoder, scores in read_json(part / "scores.json")["decoders"].items():
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
