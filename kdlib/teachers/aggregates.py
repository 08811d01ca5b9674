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
from kdlib.evaluate import panels, score, system
from kdlib.evaluate.posteriors import Keeper
from kdlib.models import Outputs
from kdlib.models.vocabulary import vocabulary
from kdlib.params import Params
from kdlib.stage import produce, read_json, write_json
from kdlib.teachers import extract, scores, spikes, targets, voices
from kdlib.teachers.ensemble import FUSIONS, Ensemble

CODE = ("teachers/aggregates.py", "teachers/spikes.py", *targets.CODE, *scores.CODE, *panels.CODE)
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
LEARNT = ("weighted_accuracy", "best", *FUSIONS)  # of dev speech
ANSWERED = ("weighted_loss", "own")  # which the dev speaker cannot judge: by its references, by no own teacher
SAMPLE, ALIGNED = 360, 120  # training utterances that are decoded, and that are aligned for the times of spikes


def aggregates(params: Params) -> Path:
    """The stage's folder: <method>/<speech>/scores.json, coverage.json, spikes.csv, together.csv."""
    names = targets.teachers(params)
    return produce(
        params.label_folder / "aggregates" / params.teacher.circle,
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
            prepare.made(params),
            *(extract.extract(params, name, purpose) for name in names for purpose in ("training", "analysis")),
            *([voices.made(params)] if "weighted_similarity" in targets.methods(params) else []),
        ],
        seed=params.seed,
        code=CODE,
    )


def together(params: Params) -> Path | None:
    """What the fold's teachers together say of the held-out speaker's test speech: to be looked at, and no target.

    The folder has hypotheses, scores, and what is said of every frame. There is none where nothing is taught, or where
    students teach.
    """
    if not params.distill.taught or params.teacher.backbone == "students":
        return None
    method = params.aggregation.method
    method = decided(params)[0] if method == "auto" else method
    method = "logprob_mean" if method == "weighted_loss" else method  # that would look at the references
    names = targets.teachers(params, method)

    def build(partial: Path) -> None:
        ensemble = targets.target(params, method, purpose="analysis")
        _score(partial, params, method, ensemble, split(prepare.load(params), params).test, keep=True)

    return produce(
        params.label_folder / "together" / params.teacher.circle / method,
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
            prepare.made(params),
            *(extract.extract(params, name, "analysis") for name in names),
            *([voices.made(params)] if method == "weighted_similarity" else []),
        ],
        seed=params.seed,
        code=CODE,
    )


def table(folder: Path) -> pd.DataFrame:
    """One row a method and kind of speech; shares in per cent."""
    rows = []
    for method in targets.METHODS:
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


def decided(params: Params) -> tuple[str, str]:
    """The method that `auto` comes to, and why: what writes the dev speaker's words best, by the closed lexicon.

    What was learnt of dev speech is judged on the half of it that it was not learnt on.
    """
    dev, sentences = params.fold.dev, params.scoring.measure == "wer"
    if not dev:
        raise UserError("aggregation.method is 'auto', but the fold has no dev speaker to choose by; name a method")
    found, folder = {}, aggregates(params)
    for method in targets.methods(params):
        if method not in (ANSWERED if params.distill.heads == "ctc" else (*ANSWERED, *FUSIONS)):
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
    together = pd.read_csv(folder / "together.csv", index_col=0).iloc[:, 0]
    return pd.read_csv(folder / "spikes.csv"), together


def sample(params: Params, size: int) -> list[Utterance]:
    """Training utterances of a fold, drawn at random."""
    train = split(prepare.load(params), params).train
    return sorted(random.Random(params.seed).sample(train, min(size, len(train))), key=lambda utt: utt.utt_id)


def _build(partial: Path, params: Params) -> None:
    drawn, dev = sample(params, SAMPLE), split(prepare.load(params), params).dev
    for method in targets.methods(params):
        folder = partial / method
        if (folder / "coverage.json").is_file():  # a killed run came that far
            continue
        for speech, purpose, utterances in (("training", "training", drawn), ("dev", "analysis", dev)):
            if utterances:
                crossed = purpose == "analysis" and method in LEARNT
                ensemble = (
                    targets.Crossed(params, method) if crossed else targets.target(params, method, purpose=purpose)
                )
                _score(folder / speech, params, method, ensemble, utterances)
        training = targets.target(params, method)
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
    stores = targets.target(params, "logprob_mean").stores
    shared = [utt for utt in drawn if all(utt.utt_id in store for store in stores.values())][:ALIGNED]
    spikes.compare(stores, shared, vocabulary(params)).to_csv(partial / "spikes.csv", index=False)
    spikes.together(stores, shared).to_csv(partial / "together.csv")


def _score(
    folder: Path,
    params: Params,
    method: str,
    ensemble: Ensemble,
    utterances: list[Utterance],
    *,
    keep: bool = False,
) -> None:
    tokens, corpus = vocabulary(params), prepare.load(params)
    usable = set(ensemble.coverage([utt.utt_id for utt in utterances]).usable)
    folder.mkdir(parents=True, exist_ok=True)

    def answer(batch: list[Utterance]) -> Outputs:
        log_probs, frames = ensemble.log_probs([utt.utt_id for utt in batch], [utt.speaker for utt in batch])
        return Outputs(log_probs, frames, log_probs)

    keeper = Keeper(tokens, ensemble.stride_ms) if keep else None
    decoders = panels.panel(params, tokens).with_beam(None)  # of every method and kind of speech it would take long
    rows = system.decode(
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
        settings=panels.settings(decoders, params, ""),
        fold_homophones=params.scoring.fold_homophones,
        bootstrap=params.scoring.bootstrap,
    )
