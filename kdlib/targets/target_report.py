"""Report on a fold's training targets: every aggregation method, decoded as if it were a model.

Methods are decoded on a sample of the training speech, which targets are made for, and on the dev speaker's test
blocks. This is the first check whether distillation can work: a student gains little from a target that recognises
little or is nearly all blank.
"""

import random
from pathlib import Path

import pandas as pd

from kdlib.corpus import labels, prepare
from kdlib.corpus.manifest import Utterance
from kdlib.corpus.speakers import split
from kdlib.errors import UserError
from kdlib.evaluate import score
from kdlib.evaluate.decoder_setup import DECODER_SETUP_CODE, decoder_set, decoder_settings
from kdlib.evaluate.posteriors import PosteriorWriter
from kdlib.evaluate.transcribe import decode_outputs
from kdlib.io import read_json, write_json
from kdlib.logits import extract, spikes, teacher_scores
from kdlib.models import Outputs
from kdlib.params import Params
from kdlib.pretrained.pieces import load_tokens
from kdlib.stage import produce
from kdlib.targets.aggregation import FUSIONS, TeacherEnsemble
from kdlib.targets.choice import CHOICE_CODE, METHODS, CrossFitted, load_target, methods, target_teachers
from kdlib.targets.similarity import features_folder

REPORT_CODE = ("targets/target_report.py", "logits/spikes.py", *CHOICE_CODE, *teacher_scores.CODE, *DECODER_SETUP_CODE)
REMARKS = {
    ("weighted_loss", "training"): "weighted by the reference",
    ("weighted_loss", "dev"): "weighted by the reference",
    ("weighted_accuracy", "dev"): "weighted on the other half",
    ("best", "dev"): "chosen on the other half",
    ("attention", "dev"): "trained on the other half",
    ("transformer", "dev"): "trained on the other half",
    ("own", "dev"): "the mean: there is no teacher of this speaker",
    ("own", "training"): "trained on most of this speech",
}
DEV_FITTED = ("weighted_accuracy", "best", *FUSIONS)  # methods estimated on dev speech
NOT_COMPARABLE = ("weighted_loss", "own")  # on dev speech: one uses its references, one needs a teacher of the speaker
SAMPLE, ALIGNED = 360, 120  # training utterances that are decoded, and that are aligned for spike times


def target_report(params: Params) -> Path:
    """The stage's folder: <method>/<speech>/scores.json, <method>/coverage.json, spikes.csv, simultaneous.csv."""
    names = target_teachers(params)
    return produce(
        params.label_folder / "target_report" / params.teacher.teacher_set,
        lambda partial: _build(partial, params),
        what="target report",
        parameters=_parameters(params),
        inputs=[
            prepare.corpus_folder(params),
            *(extract.extract(params, name, purpose) for name in names for purpose in ("training", "analysis")),
            *([features_folder(params)] if "weighted_similarity" in methods(params) else []),
        ],
        seed=params.seed,
        code=REPORT_CODE,
    )


def combined_teacher_scores(params: Params) -> Path | None:
    """Score the fold's combined teachers on the held-out speaker's test speech: for inspection, not a target.

    The folder has hypotheses, scores and frame posteriors. None if the student uses no teachers, or if the teachers are
    students.
    """
    if not params.distill.uses_teachers or params.teacher.backbone == "students":
        return None
    method = params.aggregation.method
    method = best_method(params)[0] if method == "auto" else method
    method = "logprob_mean" if method == "weighted_loss" else method  # which would use the references
    names = target_teachers(params, method)

    def build(partial: Path) -> None:
        ensemble = load_target(params, method, purpose="analysis")
        _score(partial, params, method, ensemble, split(prepare.load(params), params).test, posteriors=True)

    return produce(
        params.label_folder / "combined_teachers" / params.teacher.teacher_set / method,
        build,
        what=f"combined teachers ({method}) on the held-out speaker's speech",
        parameters=_parameters(params),
        inputs=[
            prepare.corpus_folder(params),
            *(extract.extract(params, name, "analysis") for name in names),
            *([features_folder(params)] if method == "weighted_similarity" else []),
        ],
        seed=params.seed,
        code=REPORT_CODE,
    )


def report_table(folder: Path) -> pd.DataFrame:
    """One row per method and kind of speech; shares in per cent."""
    rows = []
    for method in METHODS:
        for speech in ("training", "dev"):
            path = folder / method / speech
            if not (path / "scores.json").is_file():
                continue
            scores = read_json(path / "scores.json")
            hypotheses = pd.DataFrame(score.read_hypotheses(path / "hypotheses.csv"))
            rows.append(
                {
                    "aggregate": method,
                    "speech": speech,
                    "teachers": read_json(folder / method / "coverage.json")["teachers"],
                    "n": scores["n"],
                    "greedy WRA": round(100 * scores["decoders"]["greedy"]["wra"], 1),
                    "lexicon WRA": round(100 * scores["decoders"]["lexicon"]["wra"], 1),
                    "blank frames": round(100 * hypotheses.blank_share.mean(), 1),
                    "empty output": round(100 * float((hypotheses.greedy == "").mean()), 1),
                    "distinct hypotheses": hypotheses.greedy[hypotheses.greedy != ""].nunique(),
                    "distinct references": hypotheses.reference.nunique(),
                    "remark": REMARKS.get((method, speech), ""),
                }
            )
    return pd.DataFrame(rows)


def best_method(params: Params) -> tuple[str, str]:
    """Select the method for `auto`, with the reason: the best one on the dev speaker, with the closed lexicon.

    A method estimated on dev speech is scored on the half that it was not estimated on.
    """
    dev, sentences = params.fold.dev, params.scoring.measure == "wer"
    if not dev:
        raise UserError("aggregation.method is 'auto', but the fold has no dev speaker to choose by; name a method")
    scores, folder = {}, target_report(params)
    for method in methods(params):
        if method not in (NOT_COMPARABLE if params.distill.heads == "ctc" else (*NOT_COMPARABLE, *FUSIONS)):
            decoders = read_json(folder / method / "dev" / "scores.json")["decoders"]
            greedy = 1 - decoders["greedy"]["wer"] if sentences else decoders["greedy"]["wra"]
            scores[method] = (greedy,) if sentences else (decoders["lexicon"]["wra"], greedy)
    first, second = sorted(scores, key=lambda method: scores[method], reverse=True)[:2]
    measure = "of words correct (1 - WER, greedy)" if sentences else "WRA (closed lexicon)"
    return first, (
        f"auto: {first}, with {100 * scores[first][0]:.1f} % {measure} on the dev speaker {dev}; next {second}, "
        f"{100 * scores[second][0]:.1f} %; {len(scores)} methods were compared"
    )


def disagreement(folder: Path) -> tuple[pd.DataFrame, pd.Series]:
    """Read the tables of `spikes.compare_times` and `spikes.simultaneous`."""
    return pd.read_csv(folder / "spikes.csv"), pd.read_csv(folder / "simultaneous.csv", index_col=0).iloc[:, 0]


def sample_utterances(params: Params, size: int) -> list[Utterance]:
    """A random sample of a fold's training utterances."""
    train = split(prepare.load(params), params).train
    return sorted(random.Random(params.seed).sample(train, min(size, len(train))), key=lambda utt: utt.utt_id)


def _parameters(params: Params) -> dict:
    return {
        "aggregation": params.aggregation.model_dump(exclude={"method"}),
        "labels": labels.record(params),
        "fold": params.fold.model_dump(mode="json"),
        "scoring": params.scoring.model_dump(),
        "search": params.search.model_dump(mode="json"),
    }


def _build(partial: Path, params: Params) -> None:
    sample, dev = sample_utterances(params, SAMPLE), split(prepare.load(params), params).dev
    for method in methods(params):
        folder = partial / method
        if (folder / "coverage.json").is_file():  # from a killed run
            continue
        for speech, purpose, utterances in (("training", "training", sample), ("dev", "analysis", dev)):
            if utterances:
                cross_fit = purpose == "analysis" and method in DEV_FITTED
                ensemble = CrossFitted(params, method) if cross_fit else load_target(params, method, purpose=purpose)
                _score(folder / speech, params, method, ensemble, utterances)
        target = load_target(params, method)
        coverage = target.coverage([utt.utt_id for utt in split(prepare.load(params), params).train])
        write_json(
            folder / "coverage.json",
            {
                "teachers": len(target.stores),
                "usable": len(coverage.usable),
                "incomplete": coverage.incomplete,
                "left_out": len(coverage.left_out),
            },
        )
    stores = load_target(params, "logprob_mean").stores
    shared = [utt for utt in sample if all(utt.utt_id in store for store in stores.values())][:ALIGNED]
    spikes.compare_times(stores, shared, load_tokens(params)).to_csv(partial / "spikes.csv", index=False)
    spikes.simultaneous(stores, shared).to_csv(partial / "simultaneous.csv")


def _score(
    folder: Path,
    params: Params,
    method: str,
    ensemble: TeacherEnsemble,
    utterances: list[Utterance],
    posteriors: bool = False,
) -> None:
    """Decode and score the utterances that have a target; with `posteriors`, store frame posteriors too."""
    tokens, corpus = load_tokens(params), prepare.load(params)
    usable = set(ensemble.coverage([utt.utt_id for utt in utterances]).usable)
    folder.mkdir(parents=True, exist_ok=True)

    def combine(batch: list[Utterance]) -> Outputs:
        log_probs, frames = ensemble.log_probs([utt.utt_id for utt in batch], [utt.speaker for utt in batch])
        return Outputs(log_probs, frames, log_probs)

    writer = PosteriorWriter(tokens, ensemble.stride_ms) if posteriors else None
    decoders = decoder_set(params, tokens).with_beam(None)  # too slow for every method and kind of speech
    rows = decode_outputs(
        combine,
        [utt for utt in utterances if utt.utt_id in usable],
        decoders,
        level=corpus.level,
        what=f"{method}, {'held-out' if posteriors else folder.name} speech",
        writer=writer,
    )
    if writer and rows:
        writer.write(folder / "posteriors")
    score.write(
        rows,
        decoders.columns,
        folder,
        system=f"teachers, {method}",
        held_out=params.held_out,
        tokenizer=tokens.fingerprint,
        checkpoint=f"{len(ensemble.stores)} stores",
        settings=decoder_settings(decoders, params, ""),
        fold_homophones=params.scoring.fold_homophones,
        bootstrap=params.scoring.bootstrap,
    )
