"""How often the examination names a cause where there is none: on sound results, weak ones among them.

    python -m kdlib.diagnose.false_names OUTPUTS...         # folders of recipes: the pretrained model's scores of all
                                                            # speakers, and those of every teacher on every speaker
    python -m kdlib.diagnose.false_names --write OUTPUTS... # make kdlib/data/sound_results.json of them instead

What is reported must be of other voices and words than what the file is made of.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from kdlib.diagnose import causes, examination
from kdlib.evaluate import predictions
from kdlib.io import repository_root
from kdlib.tokens import Tokens

LEAST = 40  # utterances of a speaker
BANDS = [0, 0.05, 0.1, 0.2, 0.5, 1.01]  # of WRA


def systems(outputs: Path) -> Iterator[tuple[str, Path]]:
    """The scored systems without a fault, by name."""
    yield "pretrained", outputs / "zero_shot"
    for path in sorted((outputs / "teachers").glob("*/*/scores/hypotheses.csv")):
        yield f"teacher {path.parents[1].name}", path.parent


def sound_results(outputs: Path) -> Iterator[tuple[dict, examination.Examination]]:
    """The examination of every system on every speaker."""
    tokens = {"own": Tokens.of_file(outputs / "tokens/tokenizer.model")}
    for name, folder in systems(outputs):
        table = predictions.read(folder, "greedy", ids=True)
        for speaker, part in table.groupby("speaker"):
            if len(part) >= LEAST:
                found = examination.examine(part.reset_index(drop=True), tokens, vocabulary=set(table.reference))
                yield {"system": name, "speaker": speaker}, found


def main() -> None:
    """Report the rates, or write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = [(about, found, causes.signs(found)) for folder in options.outputs for about, found in sound_results(folder)]
    if options.write:
        content = [
            about | {"signs": {name: round(value, 4) for name, value in signs.items()}} for about, _, signs in rows
        ]
        lines = ",\n".join(json.dumps(one) for one in content)
        (repository_root() / "kdlib/data/sound_results.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        return
    table = pd.DataFrame(
        [
            about | {"wra": signs["wra"], "severity": found.severity, "named": "".join(causes.diagnose(signs).named)}
            for about, found, signs in rows
        ]
    )
    table["band"] = pd.cut(table.wra, BANDS, right=False)
    by_band = table.groupby("band", observed=True).named.agg(n="size", named=lambda column: (column != "").sum())
    print(by_band.to_string())
    print(f"{(table.named != '').sum()} of {len(table)} sound results have a cause named")
    print(table[table.named != ""].to_string())


if __name__ == "__main__":
    main()
