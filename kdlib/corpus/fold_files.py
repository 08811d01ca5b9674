"""Fold files for any corpus: `make folds-for RECIPE=...` writes one for each of its speakers who is no control.

A file that is there already is never written over: it may have been edited.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from kdlib.corpus import prepare
from kdlib.corpus.manifest import Speaker
from kdlib.corpus.speakers import dev_speaker
from kdlib.errors import UserError
from kdlib.io import repository_root
from kdlib.params import load


def write_fold_files(recipe: str) -> Path:
    """Write the fold files of a recipe's corpus; return their folder."""
    params = load(recipe, "nobody", fold={"exclude": []})
    corpus = prepare.load(params)
    folder = repository_root() / "params" / "folds" / params.fold_set
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for held_out in corpus.dysarthric:
        path, text = folder / f"{held_out}.yaml", fold_file(held_out, corpus.dysarthric, corpus.people)
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            kept.append(held_out)
        else:
            path.write_text(text, encoding="utf-8")
    shown = folder.relative_to(repository_root())
    print(f"{shown}: fold files of {', '.join(corpus.dysarthric)}")
    gone = sorted(path.stem for path in folder.glob("*.yaml") if path.stem not in corpus.dysarthric)
    if gone:
        print(f"of speakers who are not in the corpus, or are controls, and can go: {', '.join(gone)}")
    if kept:
        print(f"left as they are, because they differ from what would be written: {', '.join(kept)}")
    print(f"next: make folds RECIPE={recipe} FOLDS={','.join(corpus.dysarthric[:2])}   (or FOLDS=all)")
    return folder


def fold_file(held_out: str, speakers: Sequence[str], known: Mapping[str, Speaker], exclude: Sequence[str] = ()) -> str:
    """The text of a fold file, with the rule that chose its dev speaker.

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
    dev, rule = None, "nobody, since there are too few speakers"
    if len(candidates) > 1:
        dev, rule = dev_speaker(held_out, candidates, known)
    me = known.get(held_out, Speaker(held_out))
    about = f" ({me.intelligibility_pct:g} % intelligible)" if me.intelligibility_pct is not None else ""
    labels = "seed     " if me.seed_level else "published"
    remark = "    # not trained on, but teaching; no effect where held out" if exclude else ""
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
    """A value as YAML reads it back: names such as 01 and NO in quotes."""
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("...\n").strip()


if __name__ == "__main__":
    try:
        write_fold_files(sys.argv[1])
    except UserError as error:
        sys.exit(f"\n{error}\n")
