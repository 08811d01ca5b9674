"""Score trained students on the held-out speaker, and on the dev speaker that chose the checkpoint."""

from pathlib import Path

from kdlib.corpus import audio, prepare
from kdlib.corpus.speakers import split
from kdlib.distill import faults
from kdlib.distill.students import student
from kdlib.evaluate import score
from kdlib.evaluate.decoder_setup import DECODER_SETUP_CODE, decoder_set, decoder_settings, tune_beam
from kdlib.evaluate.transcribe import TRANSCRIBE_CODE, transcribe
from kdlib.models.hybrid import TrainedModel
from kdlib.params import Params
from kdlib.stage import produce

SCORE_CODE = ("distill/student_scores.py", *DECODER_SETUP_CODE, *TRANSCRIBE_CODE)


def student_scores(params: Params, seed: int = 1) -> Path:
    """Return the folder of a student's hypotheses and scores on the held-out speaker; on the dev speaker in `dev/`."""
    folder, name = student(params, seed), f"{params.variant or 'student'}, seed {seed}"
    checkpoint = f"students/{params.variant}/seed{seed}"
    return produce(
        folder / "scores",
        lambda partial: score_trained(partial, params, TrainedModel(folder), name, checkpoint),
        what=f"scores of {params.variant}, seed {seed}",
        parameters=score_settings(params),
        inputs=[prepare.corpus_folder(params), folder, *faults.tokenizer_files(params)],
        code=SCORE_CODE,
    )


def score_settings(params: Params) -> dict:
    """The settings of a recipe that the scores of a system depend on."""
    settings = {"scoring": params.scoring.model_dump(), "search": params.search.model_dump(mode="json")}
    return settings | ({"faults": params.faults.model_dump(exclude_defaults=True)} if params.faults.named else {})


def score_trained(partial: Path, params: Params, system: TrainedModel, name: str, checkpoint: str) -> None:
    """Transcribe the held-out and the dev speaker with a trained system, by all decoders that apply, and score them."""
    corpus = prepare.load(params)
    splits = split(corpus, params)
    heads = system.record["heads_trained"]  # the outputs of an untrained head are no result of this training
    heads = ["ctc", *heads] if params.faults.untrained_head and "ctc" not in heads else heads
    decoders = decoder_set(params, system.tokens, model=system.model, heads=heads)
    decoders = tune_beam(decoders, lambda batch: system(*audio.collate(batch)), splits.dev, params, partial)
    unlabelled = ", ".join(system.record.get("labels", {}).get("unlabelled_speakers", []))
    remarks = [f"trained on {unlabelled} without transcripts: no leave-one-speaker-out result"] if unlabelled else []
    if params.faults.named:
        remarks.append(f"with faults on purpose: {params.faults.named}")
    text_of = faults.text_decoder(params, system.tokens)
    for part, utterances in (("", splits.test), ("dev", splits.dev)):
        if not utterances:
            continue
        (partial / part).mkdir(exist_ok=True)
        rows = transcribe(
            system,
            utterances,
            decoders,
            batch_size=params.scoring.batch_size,
            level=corpus.level,
            seen=splits.seen,
            what=f"{name}, {part or 'held-out'} speech",
            posteriors_folder=None if part else partial / "posteriors",
        )
        if faults.changes_decoding(params):
            rows = [score.decode_again(row, text_of) for row in rows]
        score.write(
            rows,
            decoders.columns,
            partial / part,
            system=name,
            held_out="" if part else params.held_out,
            tokenizer=system.tokens.fingerprint,
            checkpoint=checkpoint,
            settings=decoder_settings(decoders, params, params.fold.dev or ""),
            remark="; ".join(remarks),
            fold_homophones=params.scoring.fold_homophones,
            bootstrap=params.scoring.bootstrap,
        )
