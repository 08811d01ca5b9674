"""Accuracy of each teacher on each speaker: scores of its outputs on the test blocks, and the matrix of all teachers.

A teacher's training utterances are left out of its scores: where a corpus has no blocks, the column of its own speaker
is of its dev utterances. These scores decide nothing but the weights of `targets`, on the fold's dev speaker.
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
    """The folder with a teacher's hypotheses and scores on the test blocks of all speakers."""

    def build(partial: Path) -> None:
        corpus, tokens = prepare.load(params), load_tokens(params)
        store, rows = open_store(params, speaker, "analysis"), teacher_outputs(params, speaker, "analysis")
        train = training_utterances(params, corpus, speaker)
        train_ids, train_words = {utt.utt_id for utt in train}, {utt.text for utt in train}
        test = [utt for utt in extracted_utterances(params, corpus, "analysis") if utt.utt_id not in train_ids]
        shared = teacher_root(params) == params.folder
        has_decoder = read_record(speaker_teacher(params, speaker))["heads"]["layers"] > 0
        decoders = decoder_set(params, tokens, all_speakers=shared, more=("attention",) if has_decoder else ())
        hypotheses = decode_outputs(
            lambda batch: stored_outputs(store, batch),
            test,
            decoders,
            level=corpus.level,
            seen=lambda utt: utt.text in train_words,
            what=f"scores of {speaker}",
            extra_columns=lambda batch: {"attention": [tokens.decode(rows[utt.utt_id].free_running) for utt in batch]},
        )
        score.write(
            hypotheses,
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
    """A teacher's stored outputs on a batch."""
    hidden, lengths = store.batch([utt.utt_id for utt in batch])
    weight, bias = store.head
    return Outputs(hidden @ weight.T + bias, lengths, hidden)


def accuracy_matrix(params: Params, teachers: Sequence[str], decoder: str) -> pd.DataFrame:
    """WRA of each teacher (row) on each speaker (column), from the least to the most intelligible."""
    corpus = prepare.load(params)
    rows = {}
    for name in teachers:
        scores = read_json(teacher_scores(params, name) / "scores.json")["decoders"][decoder]["by"]["speaker"]
        rows[name] = {speaker: result["wra"] for speaker, result in scores.items()}
    order = [name for name in corpus.by_intelligibility if name in corpus.dysarthric]
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.reindex(index=[name for name in order if name in rows], columns=[n for n in order if n in table])


def own_and_others(table: pd.DataFrame) -> pd.DataFrame:
    """WRA of the own teacher and mean WRA of the other teachers, for each speaker of a matrix who has a teacher."""
    own = [name for name in table.columns if name in table.index]
    return pd.DataFrame(
        {
            "own teacher": {name: table.loc[name, name] for name in own},
            "other teachers": {name: table[name].drop(name).mean() for name in own},
        }
    )
