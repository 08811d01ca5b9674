"""Scores of trained students: of the held-out speaker, and of the dev speaker who chose the weights."""

from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus import audio, prepare
from kdlib.corpus.speakers import split
from kdlib.distill import faults
from kdlib.distill.students import student
from kdlib.evaluate import score
from kdlib.evaluate.decoder_setup import DECODER_SETUP_CODE, decoder_set, decoder_settings, tune_beam
from kdlib.evaluate.transcribe import TRANSCRIBE_CODE, transcribe
from kdlib.params import Params
from kdlib.stage import produce

if TYPE_CHECKING:
    from kdlib.models.hybrid import TrainedModel

SCORE_CODE = ("distill/student_scores.py", *DECODER_SETUP_CODE, *TRANSCRIBE_CODE)


def student_scores(params: Params, seed: int = 1) -> Path:
    """The folder of a student's hypotheses and scores: of the held-out speaker, and of the dev speaker in `dev/`."""
    folder = student(params, seed)

    def build(partial: Path) -> None:
        from kdlib.models.hybrid import TrainedModel

        one = TrainedModel(folder)
        score_trained(
            partial, params, one, f"{params.variant or 'student'}, seed {seed}", f"students/{params.variant}/seed{seed}"
        )

    return produce(
        folder / "scores",
        build,
        what=f"scores of {params.variant}, seed {seed}",
        parameters=score_settings(params),
        inputs=[prepare.corpus_folder(params), folder, *faults.tokenizer_files(params)],
        code=SCORE_CODE,
    )


def score_settings(params: Params) -> dict:
    """What of a recipe the scores of a system depend on."""
    found = {"scoring": params.scoring.model_dump(), "search": params.search.model_dump(mode="json")}
    return found | ({"faults": params.faults.model_dump(exclude_defaults=True)} if params.faults.named else {})


def score_trained(partial: Path, params: Params, one: "TrainedModel", name: str, checkpoint: str) -> None:
    """Let a trained system hear the held-out and the dev speaker, decode with all that applies, and score."""
    corpus = prepare.load(params)
    splits = split(corpus, params)
    heads = one.record["heads_trained"]  # what another head says is no result of this training
    heads = ["ctc", *heads] if params.faults.untrained_head and "ctc" not in heads else heads
    decoders = decoder_set(params, one.tokens, model=one.model, heads=heads)
    decoders = tune_beam(decoders, lambda batch: one(*audio.collate(batch)), splits.dev, params, partial)
    without = one.record.get("labels", {}).get("unlabelled_speakers", [])
    remark = f"has heard {', '.join(without)} without transcripts: no leave-one-speaker-out result" if without else ""
    if params.faults.named:
        remark = "; ".join([*([remark] if remark else []), f"with faults on purpose: {params.faults.named}"])
    read = faults.text_decoder(params, one.tokens)
    for part, utterances in (("", splits.test), ("dev", splits.dev)):
        if not utterances:
            continue
        (partial / part).mkdir(exist_ok=True)
        rows = transcribe(
            one,
            utterances,
            decoders,
            batch_size=params.scoring.batch_size,
            level=corpus.level,
            seen=splits.seen,
            what=f"{name}, {part or 'held-out'} speech",
            keep=None if part else partial / "posteriors",
        )
        if faults.changes_decoding(params):
            rows = [score.decode_again(row, read) for row in rows]
        score.write(
            rows,
            decoders.columns,
            partial / part,
            system=name,
            held_out="" if part else params.held_out,
            tokenizer=one.tokens.fingerprint,
            checkpoint=checkpoint,
            settings=decoder_settings(decoders, params, params.fold.dev or ""),
            remark=remark,
            fold_homophones=params.scoring.fold_homophones,
            bootstrap=params.scoring.bootstrap,
        )
