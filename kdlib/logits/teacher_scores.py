"""How well each teacher recognises each speaker: scores of its outputs on the test blocks, and the matrix of them all.

What a teacher was trained on is left out of its scores: where a corpus has no blocks, its own speaker's column holds
what it was stopped on. Nothing is chosen by these numbers but the weights of `targets`, on the fold's dev speaker.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from kdlib.corpus import prepare
from kdlib.corpus.manifest import Utterance
from kdlib.evaluate import score
from kdlib.evaluate.decoder_setup import DECODER_SETUP_CODE, decoder_set, decoder_settings
from kdlib.evaluate.transcribe import TRANSCRIBE_CODE, decode_outputs
from kdlib.io import read_json
from kdlib.logits.extract import extract, extracted_utterances, open_store, teacher_outputs
from kdlib.logits.store import LogitStore
from kdlib.models import Outputs, read_record
from kdlib.params import Params
from kdlib.pretrained.pieces import load_tokens
from kdlib.stage import produce
from kdlib.teachers.adapt import speaker_teacher, training_utterances
from kdlib.teachers.teacher_sets import teacher_root

CODE = ("logits/teacher_scores.py", "logits/store.py", *DECODER_SETUP_CODE, *TRANSCRIBE_CODE)


def teacher_scores(params: Params, speaker: str) -> Path:
    """The folder with a teacher's hypotheses and scores on everybody's test blocks."""

    def build(partial: Path) -> None:
        corpus, tokens = prepare.load(params), load_tokens(params)
        store, learnt = open_store(params, speaker, "analysis"), training_utterances(params, corpus, speaker)
        spoken = teacher_outputs(params, speaker, "analysis")
        trained, known = {utt.utt_id for utt in learnt}, {utt.text for utt in learnt}
        asked = [utt for utt in extracted_utterances(params, corpus, "analysis") if utt.utt_id not in trained]
        everybody = teacher_root(params) == params.folder
        speaks = read_record(speaker_teacher(params, speaker))["heads"]["layers"] > 0
        decoders = decoder_set(params, tokens, everybody=everybody, more=("attention",) if speaks else ())
        rows = decode_outputs(
            lambda batch: stored_outputs(store, batch),
            asked,
            decoders,
            level=corpus.level,
            seen=lambda utt: utt.text in known,
            what=f"scores of {speaker}",
            say=lambda batch: {"attention": [tokens.decode(spoken[utt.utt_id].free_running) for utt in batch]},
        )
        score.write(
            rows,
            decoders.columns,
            partial,
            system=f"teacher {speaker}",
            held_out="",
            tokenizer=tokens.fingerprint,
            checkpoint=f"teachers/{params.teacher.family}/{speaker}",
            settings=decoder_settings(decoders, params, ""),
            fold_homophones=params.scoring.fold_homophones,
            bootstrap=params.scoring.bootstrap,
        )

    return produce(
        teacher_root(params) / "teachers" / params.teacher.family / speaker / "scores",
        build,
        what=f"scores of {speaker}",
        parameters={
            "scoring": params.scoring.model_dump(),
            "search": params.search.model_dump(mode="json"),
            "blocks": params.blocks.train,
        },
        seed=params.seed,
        inputs=[prepare.corpus_folder(params), extract(params, speaker, "analysis")],
        code=CODE,
    )


def stored_outputs(store: LogitStore, batch: Sequence[Utterance]) -> Outputs:
    """What a teacher said of a batch, as if it said it now."""
    hidden, lengths = store.batch([utt.utt_id for utt in batch])
    weight, bias = store.head
    return Outputs(hidden @ weight.T + bias, lengths, hidden)


def accuracy_matrix(params: Params, teachers: Sequence[str], decoder: str) -> pd.DataFrame:
    """WRA of each teacher (row) on each speaker (column), from the least to the most intelligible."""
    corpus = prepare.load(params)
    rows = {}
    for name in teachers:
        found = read_json(teacher_scores(params, name) / "scores.json")
        rows[name] = {who: one["wra"] for who, one in found["decoders"][decoder]["by"]["speaker"].items()}
    order = [name for name in corpus.by_intelligibility if name in corpus.dysarthric]
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.reindex(index=[name for name in order if name in rows], columns=[n for n in order if n in table])


def own_and_others(table: pd.DataFrame) -> pd.DataFrame:
    """Of every speaker of a matrix who has a teacher: WRA by the own teacher, and the mean over the others."""
    own = [name for name in table.columns if name in table.index]
    return pd.DataFrame(
        {
            "own teacher": {name: table.loc[name, name] for name in own},
            "other teachers": {name: table[name].drop(name).mean() for name in own},
        }
    )
