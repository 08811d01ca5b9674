"""An embedded corpus without sound: signers who sign sentences of known glosses, as sequences of joints.

A gloss is a path of both hands through a few places, with a shape of the fingers; a signer has their own size, speed,
place and tremor, and moves from gloss to gloss in a straight line (coarticulation). A frame, of 40 ms, has the places
of 16 joints (four of the body, six of each hand) and their velocities: 64 features. Everything follows from the seed.
The corpus tests that nothing assumes audio.
"""

import functools
import zlib
from pathlib import Path

import numpy as np

from kdlib.corpus.manifest import Corpus
from kdlib.corpus.utterances import Utterance
from kdlib.settings.corpus import Skeleton

BLOCKS = ("B1", "B2", "B3")
JOINTS, WIDTH, STRIDE_MS = 16, 64, 40.0
LETTERS = "BCDFGHKLMNPRSTVW"
GLOSSES = tuple(f"{first}{vowel}{last}" for vowel in "AEIOU" for first, last in zip(LETTERS, LETTERS[5:], strict=False))


def glosses(settings: Skeleton) -> tuple[str, ...]:
    """The names of the glosses."""
    return GLOSSES[: settings.glosses]


def generate(settings: Skeleton, folder: Path) -> Corpus:
    """Write the features of all utterances below `folder`."""
    utterances = []
    for number in range(1, settings.signers + 1):
        signer = f"S{number:02}"
        (folder / "features" / signer).mkdir(parents=True, exist_ok=True)
        for block in BLOCKS:
            for index in range(settings.sentences):
                utt_id = f"{signer}_{block}_{index + 1:03}"
                text = sentence(settings, utt_id)
                path = folder / "features" / signer / f"{utt_id}.npy"
                values = render(settings, signer, text, utt_id)
                np.save(path, values)
                seconds = len(values) * STRIDE_MS / 1000
                utterances.append(Utterance(utt_id, signer, path, seconds, " ".join(text), block=block))
    return Corpus(utterances, "the embedded signers")


def sentence(settings: Skeleton, utt_id: str) -> list[str]:
    """Three to six glosses; after each, some others are likely: a language model has something to learn."""
    rng, names = _rng(settings, utt_id), glosses(settings)
    text = [names[rng.integers(len(names))]]
    for _ in range(rng.integers(2, 6)):
        place = names.index(text[-1])
        likely = [names[(place * 5 + step) % len(names)] for step in (1, 2, 3)]
        others = [name for name in names if name != text[-1]]
        text.append(str(rng.choice(likely) if rng.random() < 0.7 else rng.choice(others)))
    return text


def render(settings: Skeleton, signer: str, text: list[str], utt_id: str) -> np.ndarray:
    """The frames of a sentence by a signer: [T, 64], float32."""
    rng, body = _rng(settings, f"{utt_id} frames"), _signer(settings, signer)
    parts, last = [], _rest()
    for gloss in text:
        pace, keys = body["speed"] * rng.uniform(0.85, 1.15), _gloss(settings, gloss)
        for place, key in enumerate(keys):  # first the way to the sign, then the sign
            parts.append(_between(last, key, max(2, round((3 if place == 0 else 5) / pace))))
            last = key
    parts.append(_between(last, _rest(), 3))
    joints = np.concatenate(parts) * body["size"] + body["place"]
    joints = joints + rng.normal(0, body["tremor"], joints.shape)
    velocity = np.diff(joints, axis=0, prepend=joints[:1])
    frames = [part.reshape(len(joints), -1) for part in (joints, velocity)]
    return np.concatenate(frames, 1).astype(np.float32)


def _between(start: np.ndarray, end: np.ndarray, steps: int) -> np.ndarray:
    """The joints on a straight way, without its start: [steps, joints, 2]."""
    share = np.arange(1, steps + 1)[:, None, None] / steps
    return start + share * (end - start)


@functools.cache
def _rest() -> np.ndarray:
    """The body, and both hands hanging down."""
    joints = np.zeros((JOINTS, 2))
    joints[:4] = [(0, 1.6), (0, 1.3), (-0.3, 1.2), (0.3, 1.2)]
    joints[4:10], joints[10:] = (-0.4, 0.3), (0.4, 0.3)
    return joints


@functools.lru_cache(maxsize=512)
def _gloss(settings: Skeleton, gloss: str) -> tuple[np.ndarray, ...]:
    """Three key poses: places of both hands, and a shape of the fingers that lasts."""
    rng = _rng(settings, gloss)
    fingers = rng.normal(0, 0.12, (2, 6, 2))
    both = rng.random() < 0.5  # else one hand rests
    keys = []
    for _ in range(3):
        joints = _rest().copy()
        hands = rng.uniform((-0.7, 0.6), (0.7, 1.7), (2, 2))
        joints[4:10] = hands[0] + fingers[0]
        if both:
            joints[10:] = hands[1] + fingers[1]
        keys.append(joints)
    return tuple(keys)


@functools.lru_cache(maxsize=64)
def _signer(settings: Skeleton, signer: str) -> dict:
    """The size, speed, place and tremor of a signer."""
    rng = _rng(settings, signer)
    size, speed, tremor = rng.uniform(0.75, 1.25), rng.uniform(0.7, 1.4), rng.uniform(0.01, 0.08)
    return {"size": size, "speed": speed, "tremor": tremor, "place": rng.normal(0, 0.25, 2)}


def _rng(settings: Skeleton, what: str) -> np.random.Generator:
    return np.random.default_rng([settings.seed, zlib.crc32(what.encode())])
