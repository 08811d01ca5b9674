"""How alike speakers sound to the pretrained model: weights for teachers by who is speaking.

A speaker's voice is the mean of the pretrained encoder's encodings over some of the speaker's training recordings, the
middle of the fold's teachers taken away; alike are voices in one direction (cosine). No transcript is read.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.corpus import audio, prepare
from kdlib.corpus.speakers import in_blocks
from kdlib.models import nemo
from kdlib.models.pretrain import pretrained
from kdlib.params import Params
from kdlib.stage import produce

CODE = ("teachers/voices.py", "models/nemo.py", "corpus/audio.py")
SAMPLE = 24  # recordings a speaker
SHARPNESS = 4.0  # a teacher of the very same voice weighs e^4 times one of no likeness
FILE = "voices.csv"


def voices(params: Params) -> pd.DataFrame:
    """One row a speaker: the mean encoding."""
    table = pd.read_csv(made(params) / FILE, dtype={"speaker": str}, keep_default_na=False)
    return table.set_index("speaker").astype(float)


def made(params: Params) -> Path:
    """The stage's folder."""
    own = params.pretrained == "from_corpus"  # and so of the fold, and of its labels

    def build(partial: Path) -> None:
        corpus, model = prepare.load(params), nemo.NeMoCTC(pretrained(params))
        rows = {}
        for name in corpus.dysarthric:
            there = corpus.where(lambda utt, name=name: utt.speaker == name and in_blocks(utt, params.blocks.train))
            some = random.Random(f"{params.seed} {name}").sample(there, min(SAMPLE, len(there)))
            means = []
            for batch in audio.batches(some, SAMPLE):
                outputs = model(*audio.collate(batch))
                for row, length in zip(outputs.encoded, outputs.lengths.tolist(), strict=True):
                    means.append(row[:length].mean(0).numpy())
            if means:
                rows[name] = np.mean(means, 0)
        pd.DataFrame.from_dict(rows, orient="index").rename_axis("speaker").to_csv(partial / FILE)

    return produce(
        (params.label_folder if own else params.folder) / "voices",
        build,
        what="voices",
        parameters={"blocks": params.blocks.train},
        inputs=[prepare.made(params), pretrained(params)],
        seed=params.seed,
        code=CODE,
    )


def likeness(table: pd.DataFrame, teachers: Sequence[str]) -> pd.DataFrame:
    """Cosines between speakers' (rows) and teachers' voices (columns), -1 to 1, from the middle of the teachers'."""
    centred = table - table.loc[list(teachers)].mean()
    unit = centred.div(np.maximum(np.linalg.norm(centred.to_numpy(), axis=1), 1e-9), axis=0)
    return (unit @ unit.loc[list(teachers)].T).rename_axis(columns="teacher")


def weights(params: Params, teachers: Sequence[str]) -> Mapping[str, Mapping[str, float]]:
    """Speaker -> teacher -> weight."""
    alike = likeness(voices(params), teachers)
    return {who: {name: float(np.exp(SHARPNESS * one)) for name, one in row.items()} for who, row in alike.iterrows()}
