"""The data card: tables that describe a corpus."""

import statistics
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pandas as pd

from kdlib.corpus import audio, features
from kdlib.corpus.embedded.synthetic import published_durations
from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import Splits
from kdlib.corpus.utterances import Utterance


def speaker_table(corpus: Corpus, labels: str = "published") -> pd.DataFrame:
    """One row per speaker: level, utterances, words, hours, and word durations relative to controls.

    Columns without any value are omitted, except those that figures need.
    """
    by_speaker = corpus.utterances.by_speaker()
    ratios, published = duration_ratios(corpus), published_durations()
    rows = []
    for name in corpus.by_intelligibility:
        person, utterances = corpus.person(name), by_speaker[name]
        rows.append(
            {
                "speaker": name,
                "level": corpus.level(name, labels) or "?",
                "seed_level": person.seed_level,
                "intelligibility_pct": person.intelligibility_pct,
                "utterances": len(utterances),
                "copies": sum(1 for utt in utterances if utt.copy_of),
                "words": len({utt.text for utt in utterances}),
                "hours": round(sum(utt.duration_s for utt in utterances) / 3600, 3),
                "median_s": round(statistics.median(utt.duration_s for utt in utterances), 2),
                "duration_ratio": ratios.get(name, np.nan),
                "published_ratio": published.get(name, (np.nan,))[0] if person.seed_level else np.nan,
            }
        )
    people = pd.DataFrame(rows)
    return people.drop(columns=[name for name in ("seed_level", "copies") if not any(people[name])])


def duration_ratios(corpus: Corpus, count: int = 60) -> dict[str, float]:
    """Median over words of a speaker's word duration relative to the controls' median for the same word.

    Measured between the first and the last 20 ms within 30 dB of the loudest, on about `count` utterances per speaker.
    """
    words = {utt.text for utt in corpus if not corpus.is_control(utt.speaker)}
    measured = {
        name: [(utt.text, spoken_s(utt)) for utt in _sample([u for u in utterances if u.text in words], count)]
        for name, utterances in corpus.utterances.by_speaker().items()
    }
    controls: dict[str, list[float]] = defaultdict(list)
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
    """Seconds between the first and the last frame of 20 ms that is within 30 dB of the loudest; of features all."""
    if features.is_file(utt.wav):
        return utt.duration_s
    start_s, end_s = audio.loud_part(audio.load(utt), audio.RATE_HZ, 30)
    return end_s - start_s


def split_table(splits: Splits) -> pd.DataFrame:
    """Speakers, utterances and words of a fold, by role."""
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
    """One dysarthric speaker per level, from high to very low; four speakers where levels are unknown."""
    dysarthric = people[people.level != "CONTROL"]
    middle = [
        part.speaker.iloc[len(part) // 2]
        for name in ("HIGH", "MID", "LOW", "VERY_LOW")
        if len(part := dysarthric[dysarthric.level == name])
    ]
    return middle if len(middle) > 1 else dysarthric.speaker.tolist()[:4]


def same_word(corpus: Corpus, names: list[str]) -> list[Utterance]:
    """Utterances of one word, of about seven letters, by all the named speakers."""
    spoken = corpus.utterances.by_speaker()
    words = {name: {utt.text: utt for utt in reversed(list(spoken[name]))} for name in names}
    common = sorted(set.intersection(*map(set, words.values())), key=lambda word: (abs(len(word) - 7), word))
    return [words[name][common[0]] for name in names] if common else []


def caption(corpus: Corpus, utt: Utterance) -> str:
    """Caption of an utterance: speaker, level if known, text."""
    level = corpus.level(utt.speaker).replace("_", " ").lower()
    return f"{utt.speaker} ({level}): {utt.text}" if level else f"{utt.speaker}: {utt.text}"


def _sample(utterances: Sequence[Utterance], count: int) -> Sequence[Utterance]:
    return utterances[:: max(1, len(utterances) // count)]
