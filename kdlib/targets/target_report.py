"""What would a student be taught? Every way of combining a fold's teachers, decoded as if it were a model.

On a sample of the training speech, which is what targets are made for, and on the dev speaker's test blocks. The first
thing that tells whether distillation can work: a target that recognises little, or is nearly all blank, teaches little.
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
    ("weighted_loss", "training"): "weighed by the reference",
    ("weighted_loss", "dev"): "weighed by the reference",
    ("weighted_accuracy", "dev"): "weighed on the other half",
    ("best", "dev"): "chosen on the other half",
    ("attention", "dev"): "learnt on the other half",
    ("transformer", "dev"): "learnt on the other half",
    ("own", "dev"): "the mean: there is no own teacher",
    ("own", "training"): "trained on most of this speech",
}
DEV_FITTED = ("weighted_accuracy", "best", *FUSIONS)  # of dev speech
NOT_COMPARABLE = ("weighted_loss", "own")  # which the dev speaker cannot judge: by its references, by no own teacher
SAMPLE, ALIGNED = 360, 120  # training utterances that are decoded, and that are aligned for the times of spikes


def target_report(params: Params) -> Path:
    """The stage's folder: <method>/<speech>/scores.json, coverage.json, spikes.csv, simultaneous.csv."""
    names = target_teachers(params)
    return produce(
        params.label_folder / "target_report" / params.teacher.teacher_set,
        lambda partial: _build(partial, params),
        what="aggregates",
        parameters={
            "aggregation": params.aggregation.model_dump(exclude={"method"}),
            "labels": labels.record(params),
            "fold": params.fold.model_dump(mode="json"),
            "scoring": params.scoring.model_dump(),
            "search": params.search.model_dump(mode="json"),
        },
        inputs=[
            prepare.corpus_folder(params),
            *(extract.extract(params, name, purpose) for name in names for purpose in ("training", "analysis")),
            *([features_folder(params)] if "weighted_similarity" in methods(params) else []),
        ],
        seed=params.seed,
        code=REPORT_CODE,
    )


def combined_teacher_scores(params: Params) -> Path | None:
    """What the fold's teachers together say of the held-out speaker's test speech: to be looked at, and no target.

    The folder has hypotheses, scores, and what is said of every frame. There is none where nothing is taught, or where
    students teach.
    """
    if not params.distill.uses_teachers or params.teacher.backbone == "students":
        return None
    method = params.aggregation.method
    method = best_method(params)[0] if method == "auto" else method
    method = "logprob_mean" if method == "weighted_loss" else method  # that would look at the references
    names = target_teachers(params, method)

    def build(partial: Path) -> None:
        ensemble = load_target(params, method, purpose="analysis")
        _score(partial, params, method, ensemble, split(prepare.load(params), params).test, keep=True)

    return produce(
        params.label_folder / "combined_teachers" / params.teacher.teacher_set / method,
        build,
        what=f"the teachers together ({method}) on the held-out speaker's speech",
        parameters={
            "aggregation": params.aggregation.model_dump(exclude={"method"}),
            "labels": labels.record(params),
            "fold": params.fold.model_dump(mode="json"),
            "scoring": params.scoring.model_dump(),
            "search": params.search.model_dump(mode="json"),
        },
        inputs=[
            prepare.corpus_folder(params),
            *(extract.extract(params, name, "analysis") for name in names),
            *([features_folder(params)] if method == "weighted_similarity" else []),
        ],
        seed=params.seed,
        code=REPORT_CODE,
    )


def report_table(folder: Path) -> pd.DataFrame:
    """One row a method and kind of speech; shares in per cent."""
    rows = []
    for method in METHODS:
        for speech in ("training", "dev"):
            path = folder / method / speech
            if not (path / "scores.json").is_file():
                continue
            found = read_json(path / "scores.json")
            heard = pd.DataFrame(score.read_hypotheses(path / "hypotheses.csv"))
            rows.append(
                {
                    "aggregate": method,
                    "speech": speech,
                    "teachers": read_json(folder / method / "coverage.json")["teachers"],
                    "n": found["n"],
                    "greedy WRA": round(100 * found["decoders"]["greedy"]["wra"], 1),
                    "lexicon WRA": round(100 * found["decoders"]["lexicon"]["wra"], 1),
                    "blank frames": round(100 * heard.blank_share.mean(), 1),
                    "empty": round(100 * float((heard.greedy == "").mean()), 1),
                    "distinct words": heard.greedy[heard.greedy != ""].nunique(),
                    "of": heard.reference.nunique(),
                    "remark": REMARKS.get((method, speech), ""),
                }
            )
    return pd.DataFrame(rows)


def best_method(params: Params) -> tuple[str, str]:
    """The method that `auto` comes to, and why: what writes the dev speaker's words best, by the closed lexicon.

    What was learnt of dev speech is judged on the half of it that it was not learnt on.
    """
    dev, sentences = params.fold.dev, params.scoring.measure == "wer"
    if not dev:
        raise UserError("aggregation.method is 'auto', but the fold has no dev speaker to choose by; name a method")
    found, folder = {}, target_report(params)
    for method in methods(params):
        if method not in (NOT_COMPARABLE if params.distill.heads == "ctc" else (*NOT_COMPARABLE, *FUSIONS)):
            scores_of = read_json(folder / method / "dev" / "scores.json")["decoders"]
            greedy = 1 - scores_of["greedy"]["wer"] if sentences else scores_of["greedy"]["wra"]
            found[method] = (greedy,) if sentences else (scores_of["lexicon"]["wra"], greedy)
    first, second = sorted(found, key=lambda method: found[method], reverse=True)[:2]
    by = "of words right (1 - WER, greedy)" if sentences else "by the closed lexicon"
    return first, (
        f"auto: {first}, with {100 * found[first][0]:.1f} % {by} on the dev speaker {dev}; next {second}, "
        f"{100 * found[second][0]:.1f} %; of {len(found)} that dev speech can judge"
    )


def disagreement(folder: Path) -> tuple[pd.DataFrame, pd.Series]:
    """What `spikes.compare` and `spikes.together` found."""
    together = pd.read_csv(folder / "simultaneous.csv", index_col=0).iloc[:, 0]
    return pd.read_csv(folder / "spikes.csv"), together


def sample_utterances(params: Params, size: int) -> list[Utterance]:
    """Training utterances of a fold, drawn at random."""
    train = split(prepare.load(params), params).train
    return sorted(random.Random(params.seed).sample(train, min(size, len(train))), key=lambda utt: utt.utt_id)


def _build(partial: Path, params: Params) -> None:
    drawn, dev = sample_utterances(params, SAMPLE), split(prepare.load(params), params).dev
    for method in methods(params):
        folder = partial / method
        if (folder / "coverage.json").is_file():  # a killed run came that far
            continue
        for speech, purpose, utterances in (("training", "training", drawn), ("dev", "analysis", dev)):
            if utterances:
                crossed = purpose == "analysis" and method in DEV_FITTED
                ensemble = CrossFitted(params, method) if crossed else load_target(params, method, purpose=purpose)
                _score(folder / speech, params, method, ensemble, utterances)
        training = load_target(params, method)
        usable = training.coverage([utt.utt_id for utt in split(prepare.load(params), params).train])
        write_json(
            folder / "coverage.json",
            {
                "teachers": len(training.stores),
                "usable": len(usable.usable),
                "incomplete": usable.incomplete,
                "left_out": len(usable.left_out),
            },
        )
    stores = load_target(params, "logprob_mean").stores
    shared = [utt for utt in drawn if all(utt.utt_id in store for store in stores.values())][:ALIGNED]
    spikes.compare_times(stores, shared, load_tokens(params)).to_csv(partial / "spikes.csv", index=False)
    spikes.simultaneous(stores, shared).to_csv(partial / "simultaneous.csv")


def _score(
    folder: Path,
    params: Params,
    method: str,
    ensemble: TeacherEnsemble,
    utterances: list[Utterance],
    *,
    keep: bool = False,
) -> None:
    tokens, corpus = load_tokens(params), prepare.load(params)
    usable = set(ensemble.coverage([utt.utt_id for utt in utterances]).usable)
    folder.mkdir(parents=True, exist_ok=True)

    def answer(batch: list[Utterance]) -> Outputs:
        log_probs, frames = ensemble.log_probs([utt.utt_id for utt in batch], [utt.speaker for utt in batch])
        return Outputs(log_probs, frames, log_probs)

    keeper = PosteriorWriter(tokens, ensemble.stride_ms) if keep else None
    decoders = decoder_set(params, tokens).with_beam(None)  # of every method and kind of speech it would take long
    rows = decode_outputs(
        answer,
        [utt for utt in utterances if utt.utt_id in usable],
        decoders,
        level=corpus.level,
        what=f"{method}, {'held-out' if keep else folder.name} speech",
        keeper=keeper,
    )
    if keeper and rows:
        keeper.write(folder / "posteriors")
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
