"""Score a system on a fold: on the held-out speaker's test speech and, in `dev/`, on the dev speaker's.

The closed lexicon is calibrated on the fold's training speech, and beam search is tuned on the dev speaker's.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from kdlib.corpus.speakers import Splits
from kdlib.corpus.utterances import Utterance
from kdlib.decode.decoders import CLOSED, TRANSDUCTIVE, DecoderSet
from kdlib.evaluate.calibrate import Speech
from kdlib.evaluate.decoder_setup import DecoderSetup
from kdlib.evaluate.hypotheses import Hypothesis
from kdlib.evaluate.report import score_system
from kdlib.evaluate.score import About
from kdlib.evaluate.transcribe import Evaluation, Forward
from kdlib.settings.evaluation import Scoring

DEV = "dev"  # folder of the dev speaker's scores


@dataclass(frozen=True)
class FoldScoring:
    """What the systems of a fold are decoded and scored with."""

    splits: Splits
    setup: DecoderSetup
    scoring: Scoring


def score_fold(
    folder: Path,
    forward: Forward,
    decoders: DecoderSet,
    how: FoldScoring,
    about: About,
    *,
    seen: Callable[[Utterance], bool] | None = None,
    posteriors_ms: float = 0.0,
    change: Callable[[Hypothesis], Hypothesis] | None = None,
    usable: Collection[str] | None = None,
    dev_forward: Forward | None = None,
) -> None:
    """Write the reports of a system; with `posteriors_ms`, frame posteriors of the held-out speech are stored.

    `usable` are the training utterances that `forward` has outputs for, if not all; `dev_forward` gives those of
    the model for dev speech, if that is another one: it is calibrated by itself, and chooses the settings of both.
    """
    splits, setup, scoring = how.splits, how.setup, how.scoring
    speech, on_dev = Speech.of(splits, usable), dev_forward or forward
    (folder / DEV).mkdir(exist_ok=True)
    of_dev = setup.fitted(decoders, on_dev, speech, folder / DEV if dev_forward else folder, scoring.batch_size)
    own = setup.fitted_as(of_dev, decoders, forward, speech, folder) if dev_forward else of_dev
    if scoring.transductive and CLOSED in own.calibrators:
        own, of_dev = own.with_more(TRANSDUCTIVE), of_dev.with_more(TRANSDUCTIVE)
    about = replace(about, settings=setup.record(own, (splits.settings.fold.dev or "") if splits.dev else ""))
    for part, utterances in (("", splits.test), (DEV, splits.dev)):
        if utterances:
            used, what = of_dev if part else own, f"{about.system}, {part or 'held-out'} speech"
            evaluation = Evaluation(used, what, scoring, splits.corpus.level, seen or splits.seen, change=change)
            its_about = replace(about, held_out="" if part else splits.settings.held_out)
            score_system(
                on_dev if part else forward,
                utterances,
                folder / part,
                evaluation,
                its_about,
                0.0 if part else posteriors_ms,
            )
