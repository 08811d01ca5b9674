"""The data card: what is in a corpus, as tables."""

import statistics
from collections import defaultdict

import numpy as np
import pandas as pd

from kdlib.corpus import audio
from kdlib.corpus.embedded.synthetic import published_durations
from kdlib.corpus.manifest import Corpus, Utterance
from kdlib.corpus.speakers import Splits


def speaker_table(corpus: Corpus, labels: str = "published") -> pd.DataFrame:
    """One row a speaker: level, utterances, words, hours, and how long a word takes relative to controls.

    Columns of which nothing is known are left out, but for those that figures need.
    """
    spoken = _by_speaker(corpus)
    ratios, published = duration_ratios(corpus), published_durations()
    rows = []
    for name in corpus.by_intelligibility:
        known, utterances = corpus.person(name), spoken[name]
        rows.append(
            {
                "speaker": name,
                "level": corpus.level(name, labels) or "?",
                "seed_level": known.seed_level,
                "intelligibility_pct": known.intelligibility_pct,
                "utterances": len(utterances),
                "copies": sum(1 for utt in utterances if utt.copy_of),
                "words": len({utt.text for utt in utterances}),
                "hours": round(sum(utt.duration_s for utt in utterances) / 3600, 3),
                "median_s": round(statistics.median(utt.duration_s for utt in utterances), 2),
                "duration_ratio": ratios.get(name, np.nan),
                "published_ratio": published.get(name, (np.nan,))[0] if known.seed_level else np.nan,
            }
        )
    people = pd.DataFrame(rows)
    return people.drop(columns=[name for name in ("seed_level", "copies") if not any(people[name])])


def duration_ratios(corpus: Corpus, each: int = 60) -> dict[str, float]:
    """Median over words of a speaker's spoken duration relative to the controls' median for the same word.

    Measured between the first and the last 20 ms within 30 dB of the loudest, on some `each` utterances a speaker.
    """
    controls: dict[str, list[float]] = defaultdict(list)
    spoken = _by_speaker(corpus)
    words = {utt.text for utt in corpus if not corpus.is_control(utt.speaker)}
    measured = {
        name: [(utt.text, spoken_s(utt)) for utt in _some([u for u in utterances if u.text in words], each)]
        for name, utterances in spoken.items()
    }
    for name in filter(corpus.is_control, measured):
        for text, seconds in measured[name]:
            controls[text].append(seconds)
    medians = {text: statistics.median(seconds) for text, seconds in controls.items()}
    ratios = {
        name: [seconds / medians[text] for text, seconds in pairs if text in medians]
        for name, pairs in measured.items()
    }
    return {name: round(statistics.median(values), 3) for name, values in ratios.items() if values}


def spoken_s(utt: Utterance) -> float:
    """Seconds between the first and the last frame of 20 ms that is within 30 dB of the loudest."""
    start_s, end_s = audio.loud_part(audio.load(utt), audio.RATE_HZ, 30)
    return end_s - start_s


def split_table(splits: Splits) -> pd.DataFrame:
    """What a fold does with whom: utterances and words by role."""
    parts = {"training": splits.train, "dev": splits.dev, "test": splits.test, "controls": splits.controls}
    parts |= {"training, without transcripts": splits.unlabelled} if splits.unlabelled else {}
    return pd.DataFrame(
        [
            {
                "role": role,
                "speakers": len({utt.speaker for utt in part}),
                "utterances": len(part),
                "words": len({utt.text for utt in part} - {""}),
                "words not trained on": len({utt.text for utt in part if utt.text and not splits.seen(utt)}),
            }
            for role, part in parts.items()
        ]
    )


def example_speakers(people: pd.DataFrame) -> list[str]:
    """One dysarthric speaker of each level, from high to very low; where levels are not known, four of them."""
    others = people[people.level != "CONTROL"]
    middle = [
        part.speaker.iloc[len(part) // 2]
        for name in ("HIGH", "MID", "LOW", "VERY_LOW")
        if len(part := others[others.level == name])
    ]
    return middle if len(middle) > 1 else others.speaker.tolist()[:4]


def same_word(corpus: Corpus, names: list[str]) -> list[Utterance]:
    """One word that all the named speakers say, an utterance each; a word of middling length."""
    spoken = {
        name: {utt.text: utt for utt in reversed(corpus.where(lambda utt, name=name: utt.speaker == name))}
        for name in names
    }
    common = sorted(
        set.intersection(*(set(words) for words in spoken.values())), key=lambda word: (abs(len(word) - 7), word)
    )
    return [spoken[name][common[0]] for name in names] if common else []


def caption(corpus: Corpus, utt: Utterance) -> str:
    """Who says what, for a caption: speaker, level where it is known, text."""
    level = corpus.level(utt.speaker).replace("_", " ").lower()
    return f"{utt.speaker} ({level}): {utt.text}" if level else f"{utt.speaker}: {utt.text}"


def _by_speaker(corpus: Corpus) -> dict[str, list[Utterance]]:
    spoken: dict[str, list[Utterance]] = defaultdict(list)
    for utt in corpus:
        spoken[utt.speaker].append(utt)
    return dict(sorted(spoken.items()))


def _some(utterances: list[Utterance], most: int) -> list[Utterance]:
    return utterances[:: max(1, len(utterances) // most)]
