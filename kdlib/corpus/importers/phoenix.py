"""RWTH-PHOENIX-Weather 2014 (Koller et al. 2015), continuous sign language: annotations as they are given out.

    annotations/manual/{train,dev,test}.corpus.csv      id|folder|signer|annotation
    annotations/manual/{train,dev,test}.SI5.corpus.csv  the signer-independent split

Features of the videos are the user's own, one file per video (`phoenix: {features: "features/{split}/{id}.npz"}`).
Every row is an utterance, its block is its split; rows without features are counted by the check of the files.
"""

from pathlib import Path

from kdlib.corpus.manifest import Corpus, ImportResult
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.settings.corpus import Phoenix

SPLITS = ("train", "dev", "test")
HEADER = ["id", "folder", "signer", "annotation"]


def source_files(folder: Path, settings: Phoenix) -> list[Path]:
    """List every file that `read` depends on."""
    lists = [_annotations(folder, split, settings) for split in SPLITS]
    return [*lists, *(utt.wav for utt in read(folder, settings).corpus)]


def read(folder: Path, settings: Phoenix) -> ImportResult:
    """Read the utterances of all splits."""
    utterances: list[Utterance] = []
    counts = {}
    for split in SPLITS:
        path = _annotations(folder, split, settings)
        rows = [line.split("|") for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if not rows or [name.strip() for name in rows[0]] != HEADER:
            found = "|".join(rows[0]) if rows else "nothing"
            raise UserError(f"{path}: the first line is {found!r}; expected {'|'.join(HEADER)}")
        for number, row in enumerate(rows[1:], start=2):
            if len(row) != len(HEADER):
                raise UserError(f"{path}, line {number}: {len(row)} fields; expected {'|'.join(HEADER)}")
            name, _, signer, annotation = (field.strip() for field in row)
            wav = folder / settings.features.format(split=split, id=name)
            utterances.append(Utterance(name, signer, wav, 0.0, annotation, block=split))
        counts[split] = len(rows) - 1
    signers = {utt.speaker for utt in utterances}
    note = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    glosses = {word for utt in utterances for word in utt.text.split()}
    notes = [f"PHOENIX-2014, {settings.part}: {note} sentences, {len(signers)} signers, {len(glosses):,} glosses"]
    return ImportResult(Corpus(utterances, f"PHOENIX-2014 in {folder}"), [], notes)


def _annotations(folder: Path, split: str, settings: Phoenix) -> Path:
    """The annotations of a split, wherever they lie below the folder."""
    name = f"{split}.SI5.corpus.csv" if settings.part == "SI5" else f"{split}.corpus.csv"
    found = sorted(folder.rglob(name)) if folder.is_dir() else []
    if not found:
        raise UserError(f"data_folder: there is no {name} in {folder}; expected PHOENIX-2014's annotations/manual/")
    if len(found) > 1:
        raise UserError(
            f"data_folder: {name} is there {len(found)} times, first {found[0]}; name a folder with one part"
        )
    return found[0]
