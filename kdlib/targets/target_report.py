"""Report on a fold's training targets: every aggregation method, decoded as if it were a model.

Methods are decoded on a sample of the training speech, which targets are made for, and on the dev speaker's test
blocks. This is the first check whether distillation can work: a student gains little from a target that recognises
little or is nearly all blank.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.corpus.inputs import Batch
from kdlib.corpus.speakers import Splits
from kdlib.corpus.utterances import Utterance
from kdlib.decode import calibration
from kdlib.decode.decoders import CLOSED, DecoderSet
from kdlib.errors import UserError
from kdlib.evaluate import hypotheses
from kdlib.evaluate.calibrate import Speech, calibrate
from kdlib.evaluate.fold_scores import FoldScoring
from kdlib.evaluate.report import score_system
from kdlib.evaluate.rounding import percent
from kdlib.evaluate.score import About
from kdlib.evaluate.transcribe import Evaluation, Forward
from kdlib.io import read_json, write_json
from kdlib.logits import spikes
from kdlib.logits.spikes import Timing
from kdlib.models import Outputs
from kdlib.settings.targets import FUSIONS, METHODS
from kdlib.targets.aggregation import TeacherEnsemble
from kdlib.targets.choice import CrossFitted

REMARKS = {
    ("weighted_loss", "training"): "weighted by the reference",
    ("weighted_loss", "dev"): "weighted by the reference",
    ("weighted_accuracy", "dev"): "weighted on other words",
    ("best", "dev"): "chosen on other words",
    ("attention", "dev"): "trained on other words",
    ("transformer", "dev"): "trained on other words",
    ("own", "dev"): "the mean: there is no teacher of this speaker",
    ("own", "training"): "trained on most of this speech",
}
PLAIN = "logprob_mean"
# What `auto` compares. On dev speech weighted_loss uses the references, and own needs a teacher of the speaker.
SIMPLEST_FIRST = (PLAIN, "prob_mean", "same_level", "weighted_similarity", "weighted_accuracy", "best", *FUSIONS)
SAMPLE, ALIGNED = 360, 120  # training utterances that are decoded, and that are aligned for spike times


def build_report(
    partial: Path,
    methods: Sequence[str],
    target: Callable[[str, str], TeacherEnsemble | CrossFitted],
    how: FoldScoring,
) -> None:
    """Write <method>/<speech>/scores.json, <method>/coverage.json, spikes.csv, timing.json and simultaneous.csv.

    `target` gives a method's targets on "training" or "dev" speech.
    """
    splits = how.splits
    sample = sample_utterances(splits, SAMPLE)
    for method in methods:
        folder = partial / method
        if (folder / "coverage.json").is_file():  # from a killed run
            continue
        training = target(method, "training")
        on_dev = target(method, "dev") if splits.dev else None
        if on_dev and not on_dev.coverage([utt.utt_id for utt in splits.dev]).usable:
            on_dev = None  # teachers of other code have outputs on what was extracted
        decoders = target_decoders(folder, training, on_dev, how, besides=sample)
        for speech, ensemble, utterances in (("training", training, sample), ("dev", on_dev, splits.dev)):
            if utterances and ensemble:
                score_target(folder / speech, method, ensemble, utterances, decoders, how)
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
    stores = target(methods[0], "training").stores
    shared = [utt for utt in sample if all(utt.utt_id in store for store in stores.values())][:ALIGNED]
    stride_ms = next(iter(stores.values())).header.stride_ms
    times = spikes.token_times(stores, shared, how.setup.tokens)
    spikes.compare_times(times, stride_ms).to_csv(partial / "spikes.csv", index=False)
    write_json(partial / "timing.json", asdict(spikes.timing(times, shared, stride_ms)))
    spikes.simultaneous(stores, shared).to_csv(partial / "simultaneous.csv")


def target_decoders(
    folder: Path,
    training: TeacherEnsemble,
    on_dev: TeacherEnsemble | CrossFitted | None,
    how: FoldScoring,
    besides: Sequence[Utterance] = (),
) -> DecoderSet:
    """Greedy decoding and the closed lexicon, which is calibrated on other training speech than that of `besides`."""
    away = {utt.utt_id for utt in besides}
    usable = set(training.coverage([utt.utt_id for utt in how.splits.train if utt.utt_id not in away]).usable)
    speech = Speech.of(how.splits, usable)
    usable = set(on_dev.coverage([utt.utt_id for utt in how.splits.dev]).usable) if on_dev else set()
    speech = replace(speech, dev=[utt for utt in how.splits.dev if utt.utt_id in usable])
    settings = how.setup.calibration
    settings = settings.model_copy(update={"utterances": min(settings.utterances, SAMPLE)})
    plain = how.setup.without_beam().decoders()  # beam search is too slow for every method and kind of speech
    forward, dev_forward = _forward(training), _forward(on_dev) if on_dev else None
    found = calibrate(plain, forward, speech, settings, dev_forward)
    folder.mkdir(parents=True, exist_ok=True)
    calibration.save(folder / calibration.FILE, found)
    return plain.calibrated(found)


def _forward(ensemble: TeacherEnsemble | CrossFitted) -> Forward:
    return lambda batch: Outputs(ensemble.log_probs(Batch(batch)))


def score_target(
    folder: Path,
    method: str,
    ensemble: TeacherEnsemble | CrossFitted,
    utterances: Sequence[Utterance],
    decoders: DecoderSet,
    how: FoldScoring,
    *,
    posteriors: bool = False,
) -> None:
    """Decode and score the utterances that have a target; with `posteriors`, store frame posteriors too."""
    usable = set(ensemble.coverage([utt.utt_id for utt in utterances]).usable)
    what = f"{method}, {'held-out' if posteriors else folder.name} speech"
    splits = how.splits
    settings = how.setup.record(decoders, (splits.settings.fold.dev or "") if splits.dev else "")
    score_system(
        _forward(ensemble),
        [utt for utt in utterances if utt.utt_id in usable],
        folder,
        Evaluation(decoders, what, how.scoring, splits.corpus.level),
        About(f"teachers, {method}", splits.settings.held_out, f"{len(ensemble.stores)} stores", settings=settings),
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
            if not scores["n"]:  # no utterance has a target
                continue
            decoded = pd.DataFrame(hypotheses.read_hypotheses(path / "hypotheses.csv"))
            rows.append(
                {
                    "method": method,
                    "speech": speech,
                    "teachers": read_json(folder / method / "coverage.json")["teachers"],
                    "n": scores["n"],
                    "greedy_wra": scores["decoders"]["greedy"]["wra"],
                    "lexicon_wra": scores["decoders"].get(CLOSED, {}).get("wra", np.nan),
                    "greedy_wer": scores["decoders"]["greedy"]["wer"],
                    "lexicon_wer": scores["decoders"].get(CLOSED, {}).get("wer", np.nan),
                    "blank_share": decoded.blank_share.mean(),
                    "empty_share": float((decoded.greedy == "").mean()),
                    "distinct_hypotheses": decoded.greedy[decoded.greedy != ""].nunique(),
                    "distinct_references": decoded.reference.nunique(),
                    "remark": REMARKS.get((method, speech), ""),
                }
            )
    return pd.DataFrame(rows)


def method_gains(folder: Path, measure: str) -> pd.DataFrame:
    """What every comparable method gains over the plain mean of log-probabilities, from the simplest method on.

    Columns: dev and training, the shares that are right on this speech (of words the mean of greedy and closed-lexicon
    WRA, of sentences 1 - greedy WER); dev_gain and training_gain, over the plain mean; gain, the smaller of the two.
    """
    rows = {}
    for method in SIMPLEST_FIRST:
        if (folder / method / "dev" / "scores.json").is_file():
            rows[method] = {speech: _right(folder / method / speech, measure) for speech in ("dev", "training")}
    columns = ["dev", "training"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns if not rows else None).rename_axis("method")
    if not rows:  # without outputs on dev speech nothing can be compared
        return table.assign(dev_gain=[], training_gain=[], gain=[])
    for speech in ("dev", "training"):
        table[f"{speech}_gain"] = table[speech] - table[speech][PLAIN]
    return table.assign(gain=table[["dev_gain", "training_gain"]].min(axis=1))


def best_method(
    folder: Path, methods: Sequence[str], dev: Sequence[Utterance], heads: str, measure: str
) -> tuple[str, str]:
    """Select the method for `auto`, with the reason.

    The rule: a method counts by its gain over the plain mean of log-probabilities on the dev speaker, or on training
    speech, whichever is smaller; the largest gain wins, and of equal ones the simplest method. So one that gains on the
    dev speaker and loses on the training speech, which its targets are made for, is never chosen, and without any gain
    on both kinds of speech it is the plain mean. What is estimated on dev speech is scored there on words that it was
    not estimated on (`choice.halves`). `heads` are those that are trained: fusions cannot combine a decoder's outputs.
    """
    if not dev:
        raise UserError("aggregation.method is 'auto', but the fold has no dev speaker to choose by; name a method")
    allowed = set(methods) - set(() if heads == "ctc" else FUSIONS)
    gains = method_gains(folder, measure)
    gains = gains[gains.index.isin(allowed)]
    if gains.empty:
        raise UserError("aggregation.method is 'auto', but the teachers have no outputs on dev speech; name a method")
    first, on_dev = gains.gain.round(9).idxmax(), gains.dev.idxmax()  # of equal ones the first, which is the simplest

    def scores(method: str) -> str:
        return f"{percent(gains.dev[method]):.1f} and {percent(gains.training[method]):.1f} %"

    what = "words correct, greedy" if measure == "wer" else "WRA, the mean of greedy and closed lexicon"
    why = f"auto: {first}, with {scores(first)} on the dev speaker {dev[0].speaker} and on training speech ({what})"
    if first != PLAIN:
        why += f"; the plain mean has {scores(PLAIN)}"
    if on_dev != first:
        why += f"; {on_dev}, the best on the dev speaker, has {scores(on_dev)}: it gains less on training speech"
    repeated = ", but sentences repeat words" if any(" " in utt.text for utt in dev) else ""
    halves = f"halves of the dev speech share no {'text' if repeated else 'word'}{repeated}"
    return first, f"{why}; {len(gains)} methods were compared; {halves}"


def _right(scores: Path, measure: str) -> float:
    """The share that is right in the scores of a folder."""
    decoders = read_json(scores / "scores.json")["decoders"]
    if measure == "wer":
        return 1 - decoders["greedy"]["wer"]
    return (decoders["greedy"]["wra"] + decoders.get(CLOSED, decoders["greedy"])["wra"]) / 2


def disagreement(folder: Path) -> tuple[pd.DataFrame, pd.Series, Timing]:
    """Read what `spikes.compare_times`, `spikes.simultaneous` and `spikes.timing` found."""
    pairs, simultaneous = pd.read_csv(folder / "spikes.csv"), pd.read_csv(folder / "simultaneous.csv", index_col=0)
    return pairs, simultaneous.iloc[:, 0], Timing(**read_json(folder / "timing.json"))


def sample_utterances(splits: Splits, size: int) -> list[Utterance]:
    """A random sample of a fold's training utterances."""
    train = splits.train
    drawn = random.Random(splits.settings.seed).sample(train, min(size, len(train)))
    return sorted(drawn, key=lambda utt: utt.utt_id)
