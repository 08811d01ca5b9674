"""Graded dysarthria for the embedded corpus: changes to the phonemes and to the signal.

Severity is s = 1 - intelligibility/100. Traits are drawn once per speaker; 60 % of the substitutions follow the
speaker's own map. Articulation explains most of the loss; slowness follows the word durations published for UA-Speech;
prosody and voice add to it. Noise is the same for all speakers. All randomness comes from the generator that is passed
in. The strength was calibrated on the error of the pretrained baseline, never on the gain of distillation.
"""

from dataclasses import dataclass

import numpy as np
from scipy import signal

from kdlib.corpus.embedded.espeak import RATE_HZ, Phone

PAUSE, SILENCE_S = "_:", 0.15
VOWEL_STARTS = "aAeEiIoOuUV03@"
VOICED_TO_VOICELESS = {"b": "p", "d": "t", "g": "k", "v": "f", "z": "s", "Z": "S", "dZ": "tS", "D": "T"}
PLACE = dict(["pt", "tk", "kt", "bd", "dg", "gd", "sS", "Ss", "Tf", "Dv", "fT", "zZ", "nm", "mn", "Nn"])  # p -> t
STOPPING = {"f": "p", "v": "b", "s": "t", "z": "d", "S": "t", "Z": "d", "T": "t", "D": "d", "tS": "t", "dZ": "d"}
FRICATION = {"p": "f", "t": "s", "k": "h", "b": "v", "d": "z", "g": "h", "tS": "S", "dZ": "Z"}
GLIDING = {"r": "w", "l": "w", "n": "l", "j": "w"}
MILD, SEVERE = (VOICED_TO_VOICELESS, PLACE), (VOICED_TO_VOICELESS, PLACE, STOPPING, FRICATION, GLIDING)
CENTRAL = ("@", "V", "U", "I")
STRETCH = {"vowel": 1.2, "nasal": 1.2, "approximant": 1.0, "stop": 0.5, "fricative": 0.3, "pause": 1.0}  # exponents


@dataclass(frozen=True)
class Traits:
    """Traits of a speaker: severity and its forms."""

    severity: float  # 0 healthy .. 1 unintelligible
    articulation: float  # gain x severity ** 0.7: recognisers are worse than listeners on mild speakers
    ratio: float  # median duration of a word relative to a control's
    ratio_sd: float  # of the log, from word to word
    pausing: float
    monotony: float
    tremor: float
    tremor_hz: float
    nasality: float
    breathiness: float
    habits: dict[str, str]  # the speaker's own substitutions


def draw_traits(
    intelligibility_pct: float, gain: float, rng: np.random.Generator, duration: tuple[float, float] | None = None
) -> Traits:
    """Draw a speaker's traits. `duration`: the published median ratio and log deviation, if any."""
    severity = 1 - intelligibility_pct / 100
    drawn = (
        (1 + 0.85 * severity) * np.exp((0.22 if severity > 0 else 0.08) * np.clip(rng.normal(), -1, 1)),
        0.1 + 0.3 * severity,
    )
    ratio, ratio_sd = duration or drawn
    kinds = SEVERE if severity >= 0.4 else MILD
    habits = {}
    for phone in sorted(set().union(*kinds)):
        options = [kind[phone] for kind in kinds if phone in kind]
        habits[phone] = options[rng.integers(len(options))]
    shares = rng.uniform(0, 1, 5)
    return Traits(
        severity,
        gain * severity**0.7,
        float(ratio),
        float(ratio_sd),
        *map(float, shares[:3]),
        float(rng.uniform(4, 7)),
        *map(float, shares[3:]),
        habits,
    )


def misarticulate(phonemes: list[str], traits: Traits, rng: np.random.Generator) -> list[str]:
    """Substitute, centralise, delete and pause, with the speaker's probabilities."""
    s = traits.articulation
    result: list[str] = []
    for index, phoneme in enumerate(phonemes):
        stress, base = _stress(phoneme)
        if is_vowel(base):
            result.append(stress + str(rng.choice(CENTRAL)) if rng.random() < 0.45 * s else phoneme)
            if index + 1 < len(phonemes) and rng.random() < 0.35 * s * traits.pausing:
                result.append(PAUSE)
        elif rng.random() >= _deletion(phonemes, index) * s:
            result.append(_substitute(base, index, phonemes, traits, rng))
    return result if any(phoneme != PAUSE for phoneme in result) else phonemes


def distort(
    samples: np.ndarray, phones: list[Phone], healthy: list[Phone], traits: Traits, rng: np.random.Generator
) -> np.ndarray:
    """Slow down one utterance, and add tremor, nasality, breathiness and decay. Same rate in and out."""
    s, voice = traits.severity, slow_down(samples, phones, healthy, traits, rng)
    time_s = np.arange(len(voice)) / RATE_HZ
    phase = rng.uniform(0, 2 * np.pi)
    voice = voice * (1 + 0.4 * s * traits.tremor * np.sin(2 * np.pi * traits.tremor_hz * time_s + phase))
    voice = _nasalise(voice, 0.8 * s * traits.nasality)
    envelope = np.sqrt(signal.lfilter([0.01], [1, -0.99], voice**2) + 1e-12)
    breath = signal.lfilter([1, -0.9], [1], rng.normal(size=len(voice)))
    voice = voice + 0.35 * s * traits.breathiness * envelope * breath
    return voice * np.exp(-1.2 * s * rng.uniform() * np.linspace(0, 1, len(voice)))


def slow_down(
    samples: np.ndarray, phones: list[Phone], healthy: list[Phone], traits: Traits, rng: np.random.Generator
) -> np.ndarray:
    """The utterance at the speaker's pace.

    `healthy` are the phones of the intended word: durations are relative to them, even if phones were deleted.
    """
    ratio = np.clip(traits.ratio * np.exp(rng.normal(0, traits.ratio_sd)), 0.5, 6.0)
    ratio = ratio * _speech_length(healthy) / _speech_length(phones)
    return _stretch(samples, *_time_map(phones, float(ratio)))


def record_clean(voice: np.ndarray) -> np.ndarray:
    """The recording without noise, at the mean level, with the same silence around the voice."""
    voice = np.pad(voice, int(SILENCE_S * RATE_HZ))
    return np.clip(voice * 10 ** (-26 / 20) / np.sqrt(np.mean(voice**2) + 1e-12), -0.99, 0.99).astype(np.float32)


def record(voice: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Simulate the recording, with the same conditions for all speakers: silence around the voice, noise, a level."""
    voice = np.pad(voice, int(SILENCE_S * RATE_HZ))
    rms = np.sqrt(np.mean(voice**2) + 1e-12)
    noise = signal.lfilter([1], [1, -0.85], rng.normal(size=len(voice)))
    noise *= rms * 10 ** (-rng.uniform(18, 32) / 20) / np.sqrt(np.mean(noise**2))
    level = 10 ** (rng.uniform(-29, -23) / 20) / rms
    return np.clip((voice + noise) * level, -0.99, 0.99).astype(np.float32)


def is_vowel(base: str) -> bool:
    """True if a mnemonic without stress mark is a vowel.

    >>> is_vowel("eI"), is_vowel("tS")
    (True, False)
    """
    return base[0] in VOWEL_STARTS


def phone_class(name: str) -> str:
    """Class of a phone: vowel, nasal, approximant, stop, fricative or pause."""
    base = _stress(name)[1]
    if base.startswith("_"):
        return "pause"
    if is_vowel(base):
        return "vowel"
    classes = {"mnN": "nasal", "lrwj": "approximant", "pbtdkg": "stop"}
    return next((kind for bases, kind in classes.items() if base[0] in bases), "fricative")


def _stress(phoneme: str) -> tuple[str, str]:
    base = phoneme.lstrip("',")
    return (phoneme[: len(phoneme) - len(base)], base) if base else ("", phoneme)


def _deletion(phonemes: list[str], index: int) -> float:
    """Probability that a consonant is deleted at severity 1: in clusters, codas, onsets."""

    def consonant(at: int) -> bool:
        return 0 <= at < len(phonemes) and not is_vowel(_stress(phonemes[at])[1])

    if consonant(index - 1) or consonant(index + 1):
        return 0.45
    return 0.25 if index == len(phonemes) - 1 else 0.08


def _substitute(base: str, index: int, phonemes: list[str], traits: Traits, rng: np.random.Generator) -> str:
    if rng.random() >= 0.40 * traits.articulation:
        return base
    if index == len(phonemes) - 1 and base in VOICED_TO_VOICELESS:
        return VOICED_TO_VOICELESS[base]
    if rng.random() < 0.6:
        return traits.habits.get(base, base)
    options = [kind[base] for kind in (SEVERE if traits.severity >= 0.4 else MILD) if base in kind]
    return options[rng.integers(len(options))] if options else base


def _without_end(phones: list[Phone]) -> list[Phone]:
    """The phones without the final silence of an utterance."""
    return phones[:-1] if phones[-1].name.startswith("_") else phones


def _speech_length(phones: list[Phone]) -> int:
    speech = _without_end(phones)
    return speech[-1].end - speech[0].start


def _time_map(phones: list[Phone], ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Knots (in, out) that stretch vowels and nasals more than stops and fricatives, and the utterance by `ratio`."""
    speech = _without_end(phones)
    lengths = np.array([phone.end - phone.start for phone in speech], float)
    grown = lengths * np.array([ratio ** STRETCH[phone_class(phone.name)] for phone in speech])
    grown *= lengths.sum() * ratio / grown.sum()
    start = speech[0].start
    return start + np.append(0, lengths.cumsum()), np.append(0, grown.cumsum())


def _stretch(samples: np.ndarray, knots_in: np.ndarray, knots_out: np.ndarray) -> np.ndarray:
    """Waveform-similarity overlap-add (Verhelst and Roelands 1993) along a piecewise linear time map."""
    hop, reach = RATE_HZ // 100, RATE_HZ // 170
    window = signal.windows.hann(2 * hop, sym=False)
    padded = np.pad(samples, 2 * hop + reach)
    frames = int(np.ceil(knots_out[-1] / hop)) + 1
    out = np.zeros((frames + 1) * hop)
    centres = np.interp(np.arange(frames) * hop, knots_out, knots_in).astype(int) + hop + reach
    start = centres[0]
    for index, centre in enumerate(centres):
        low = max(centre - reach, 0)
        region = padded[low : centre + reach + 2 * hop]
        natural = padded[start + hop : start + 3 * hop]
        if index and len(natural) == 2 * hop and len(region) > 2 * hop:
            start = low + int(np.argmax(np.correlate(region, natural, "valid")))
        elif index:
            start = centre
        frame = padded[start : start + 2 * hop]
        out[index * hop : index * hop + len(frame)] += window[: len(frame)] * frame
    return out[hop:]


def _nasalise(voice: np.ndarray, amount: float) -> np.ndarray:
    """Blend in a nasal formant near 250 Hz and an antiformant near 900 Hz."""
    if amount <= 0:
        return voice
    nasal = signal.lfilter(*signal.iirnotch(900, 2, RATE_HZ), voice)
    nasal = nasal + 2 * signal.lfilter(*signal.iirpeak(250, 2, RATE_HZ), voice)
    nasal *= np.sqrt(np.mean(voice**2) / (np.mean(nasal**2) + 1e-12))
    return (1 - amount) * voice + amount * nasal
