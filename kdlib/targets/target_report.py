"""Report on a fold's training targets: every aggregation method, decoded as if it were a model.

Methods are decoded on a sample of the training speech, which targets are made for, and on the dev speaker's test
blocks. This is the first check whether distillation can work: a student gains little from a target that recognises
little or is nearly all blank.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from kdlib.corpus.inputs import Batch
from kdlib.corpus.manifest import Utterance
from kdlib.corpus.speakers import Splits
from kdlib.errors import UserError
from kdlib.evaluate import hypotheses
from kdlib.evaluate.decoder_setup import DecoderSetup
from kdlib.evaluate.report import score_system
from kdlib.evaluate.score import About
from kdlib.evaluate.transcribe import Evaluation
from kdlib.io import read_json, write_json
from kdlib.logits import spikes
from kdlib.models import Outputs
from kdlib.settings.evaluation import Scoring
from kdlib.settings.targets import FUSIONS, METHODS
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.targets.choice import CrossFitted

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
NOT_COMPARABLE = ("weighted_loss", "own")  # on dev speech: one uses its references, one needs a teacher of the speaker
SAMPLE, ALIGNED = 360, 120  # training utterances that are decoded, and that are aligned for spike times


@dataclass(frozen=True)
class TargetScoring:
    """What targets are decoded and scored with."""

    splits: Splits
    setup: DecoderSetup
    scoring: Scoring


def build_report(
    partial: Path,
    methods: Sequence[str],
    target: Callable[[str, str], TeacherEnsemble | CrossFitted],
    how: TargetScoring,
) -> None:
    """Write <method>/<speech>/scores.json, <method>/coverage.json, spikes.csv and simultaneous.csv.

    `target` gives a method's targets on "training" or "dev" speech.
    """
    splits = how.splits
    sample = sample_utterances(splits, SAMPLE)
    for method in methods:
        folder = partial / method
        if (folder / "coverage.json").is_file():  # from a killed run
            continue
        for speech, utterances in (("training", sample), ("dev", splits.dev)):
            if utterances:
                score_target(folder / speech, method, target(method, speech), utterances, how)
        training = target(method, "training")
        coverage = training.coverage([utt.utt_id for utt in splits.train])
        write_json(
            folder / "coverage.json",
            {
                "teachers": len(training.stores),
                "usable": len(coverage.usable),
                "incomplete": coverage.incomplete,
                "left_out": len(coverage.left_out),
            },
        )
    stores = target("logprob_mean", "training").stores
    shared = [utt for utt in sample if all(utt.utt_id in store for store in stores.values())][:ALIGNED]
    spikes.compare_times(stores, shared, how.setup.tokens).to_csv(partial / "spikes.csv", index=False)
    spikes.simultaneous(stores, shared).to_csv(partial / "simultaneous.csv")


def score_target(
    folder: Path,
    method: str,
    ensemble: TeacherEnsemble | CrossFitted,
    utterances: Sequence[Utterance],
    how: TargetScoring,
    *,
    posteriors: bool = False,
) -> None:
    """Decode and score the utterances that have a target; with `posteriors`, store frame posteriors too."""
    usable = set(ensemble.coverage([utt.utt_id for utt in utterances]).usable)

    def combined(batch: list[Utterance]) -> Outputs:
        return Outputs(ensemble.log_probs(Batch(batch)))

    setup = how.setup.without_beam()  # too slow for every method and kind of speech
    decoders = setup.decoders()
    what = f"{method}, {'held-out' if posteriors else folder.name} speech"
    score_system(
        combined,
        [utt for utt in utterances if utt.utt_id in usable],
        folder,
        Evaluation(decoders, what, how.scoring, how.splits.corpus.level),
        About(
            f"teachers, {method}",
            how.splits.settings.held_out,
            f"{len(ensemble.stores)} stores",
            settings=setup.record(decoders),
        ),
        ensemble.stride_ms if posteriors else 0.0,
    )


def report_frame(folder: Path) -> pd.DataFrame:
    """One row per method and kind of speech; shares unrounded."""
    rows = []
    for method in METHODS:
        for speech in ("training", "dev"):
            path = folder / method / speech
            if not (path / "scores.json").is_file():
                continue
            scores = read_json(path / "scores.json")
            decoded = pd.DataFrame(hypotheses.read_hypotheses(path / "hypotheses.csv"))
            rows.append(
                {
                    "method": method,
                    "speech": speech,
                    "teachers": read_json(folder / method / "coverage.json")["teachers"],
                    "n": scores["n"],
                    "greedy_wra": scores["decoders"]["greedy"]["wra"],
                    "lexicon_wra": scores["decoders"]["lexicon"]["wra"],
                    "blank_share": decoded.blank_share.mean(),
                    "empty_share": float((decoded.greedy == "").mean()),
                    "distinct_hypotheses": decoded.greedy[decoded.greedy != ""].nunique(),
                    "distinct_references": decoded.reference.nunique(),
                    "remark": REMARKS.get((method, speech), ""),
                }
            )
    return pd.DataFrame(rows)


def best_method(folder: Path, methods: Sequence[str], dev: str | None, heads: str, measure: str) -> tuple[str, str]:
    """Select the method for `auto`, with the reason: the best one on the dev speaker, with the closed lexicon.

    A method estimated on dev speech is scored on the half that it was not estimated on. `heads` are those that are
    trained; with the `measure` "wer" speech is of sentences.
    """
    if not dev:
        raise UserError("aggregation.method is 'auto', but the fold has no dev speaker to choose by; name a method")
    scores, sentences = {}, measure == "wer"
    for method in methods:
        if method not in (NOT_COMPARABLE if heads == "ctc" else (*NOT_COMPARABLE, *FUSIONS)):
            decoders = read_json(folder / method / "dev" / "scores.json")["decoders"]
            greedy = 1 - decoders["greedy"]["wer"] if sentences else decoders["greedy"]["wra"]
            scores[method] = (greedy,) if sentences else (decoders["lexicon"]["wra"], greedy)
    first, second = sorted(scores, key=lambda method: scores[method], reverse=True)[:2]
    named = "of words correct (1 - WER, greedy)" if sentences else "WRA (closed lexicon)"
    return first, (
        f"auto: {first}, with {100 * scores[first][0]:.1f} % {named} on the dev speaker {dev}; next {second}, "
        f"{100 * scores[second][0]:.1f} %; {len(scores)} methods were compared"
    )


def disagreement(folder: Path) -> tuple[pd.DataFrame, pd.Series]:
    """Read the tables of `spikes.compare_times` and `spikes.simultaneous`."""
    return pd.read_csv(folder / "spikes.csv"), pd.read_csv(folder / "simultaneous.csv", index_col=0).iloc[:, 0]


def sample_utterances(splits: Splits, size: int) -> list[Utterance]:
    """A random sample of a fold's training utterances."""
    train = splits.train
    drawn = random.Random(splits.settings.seed).sample(train, min(size, len(train)))
    return sorted(drawn, key=lambda utt: utt.utt_id)
