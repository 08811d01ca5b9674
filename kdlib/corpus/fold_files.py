"""Fold files for any corpus: `make folds-for RECIPE=...` writes one per speaker, controls excepted.

An existing file is never overwritten: it may have been edited.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from kdlib.corpus.manifest import Corpus, Speaker
from kdlib.corpus.speakers import dev_speaker
from kdlib.io import short_path


def write_fold_files(corpus: Corpus, folder: Path, recipe: str) -> None:
    """Write the fold files of a recipe's corpus into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for held_out in corpus.dysarthric:
        path, text = folder / f"{held_out}.yaml", fold_file(held_out, corpus.dysarthric, corpus.people)
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            kept.append(held_out)
        else:
            path.write_text(text, encoding="utf-8")
    print(f"{short_path(folder)}: fold files of {', '.join(corpus.dysarthric)}")
    unused = sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in corpus.dysarthric)
    if unused:
        print(f"not needed, since their speakers are controls or not in the corpus: {', '.join(unused)}")
    if kept:
        print(f"edited, and not overwritten: {', '.join(kept)}")
    print(f"next: make folds RECIPE={recipe} FOLDS={','.join(corpus.dysarthric[:2])}   (or FOLDS=all)")


def fold_file(held_out: str, speakers: Sequence[str], info: Mapping[str, Speaker], exclude: Sequence[str] = ()) -> str:
    """Return the text of a fold file, with the rule that chose its dev speaker.

    >>> print(fold_file("ANNA", ["ANNA", "BEN", "CLEO"], {}))
    # Held out: ANNA. Dev speaker: the next by name, since nothing else is known of the speakers.
    held_out: ANNA
    fold:
      dev: BEN
      exclude: []
      teachers: all     # or same_level, or a list of speakers
      levels: published # whose labels same_level reads: published or seed
    <BLANKLINE>
    """
    candidates = [name for name in speakers if name != held_out and name not in exclude]
    dev, rule = None, "none, since there are too few speakers"
    if len(candidates) > 1:
        dev, rule = dev_speaker(held_out, candidates, info)
    speaker = info.get(held_out, Speaker(held_out))
    about = f" ({speaker.intelligibility_pct:g} % intelligible)" if speaker.intelligibility_pct is not None else ""
    labels = "seed     " if speaker.seed_level else "published"
    remark = "    # not trained on, but a teacher; no effect when held out" if exclude else ""
    return (
        f"# Held out: {held_out}{about}. Dev speaker: {rule}.\n"
        f"held_out: {_yaml(held_out)}\n"
        "fold:\n"
        f"  dev: {_yaml(dev)}\n"
        f"  exclude: {_yaml(list(exclude))}{remark}\n"
        "  teachers: all     # or same_level, or a list of speakers\n"
        f"  levels: {labels} # whose labels same_level reads: published or seed\n"
    )


def _yaml(value: str | list | None) -> str:
    """Format a value so that YAML reads it back unchanged: names such as 01 and NO in quotes."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("...\n").strip()
