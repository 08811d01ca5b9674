"""Recognisers from packages (the extra `recognisers`) that were trained on none of a corpus's voices.

`pocketsphinx` recognises a closed grammar of words. `hama` is a Conformer-CTC over phonemes, whose training data are
not disclosed; the closed lexicon's words are scored by exact CTC over their pronunciations, those of the CMU
dictionary that pocketsphinx brings: words that are not in it cannot be recognised, and are left out by name.
"""

import importlib.util
import itertools
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kdlib.console import progress
from kdlib.corpus import audio, inputs
from kdlib.corpus.manifest import CONTROL, LEVELS, Corpus
from kdlib.corpus.utterances import Utterance
from kdlib.decode.calibration import best_temperature, posterior
from kdlib.decode.trie import Trie
from kdlib.errors import UserError
from kdlib.tokens import normalise

PACKAGES = ("hama", "pocketsphinx")
MOST, LEAST = 6, 10  # pronunciations of a word that are scored; words that are worth a table
# The phonemes of the CMU dictionary as hama's symbols; several where the dictionary makes no difference.
SYMBOLS = {
    **{"AA": "ɑ", "AE": "æ", "AH": "ʌ ə", "AO": "ɔ ɑ", "AW": "aʊ", "AY": "aɪ", "B": "b", "CH": "t͡ʃ", "D": "d"},
    **{"DH": "ð", "EH": "ɛ", "ER": "ɝ", "EY": "eɪ", "F": "f", "G": "ɡ", "HH": "h", "IH": "ɪ", "IY": "i", "JH": "d͡ʒ"},
    **{"K": "k", "L": "l", "M": "m", "N": "n", "NG": "ŋ", "OW": "oʊ", "OY": "ɔɪ", "P": "p", "R": "ɹ", "S": "s"},
    **{"SH": "ʃ", "T": "t", "TH": "θ", "UH": "ʊ", "UW": "u", "V": "v", "W": "w", "Y": "j", "Z": "z", "ZH": "ʒ"},
}


def missing() -> list[str]:
    """The packages that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def pronunciations(words: Sequence[str]) -> dict[str, list[list[str]]]:
    """The pronunciations of those words that the CMU dictionary has; of several words, one after another."""
    if absent := missing():
        raise UserError(f"recognisers: {', '.join(absent)} is not installed; run: pip install 'kdlib[recognisers]'")
    import pocketsphinx

    known: dict[str, list[list[str]]] = {}
    dictionary = Path(pocketsphinx.get_model_path()) / "en-us" / "cmudict-en-us.dict"
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        word, *phonemes = line.split()
        known.setdefault(word.split("(")[0].upper(), []).append(phonemes)
    found = {}
    for word in words:
        parts = [known.get(part, []) for part in word.replace("-", " ").split()]
        if parts and all(parts):
            found[word] = [
                list(itertools.chain(*choice)) for choice in itertools.islice(itertools.product(*parts), MOST)
            ]
    return found


class Grammar:
    """pocketsphinx with a grammar of single words."""

    name = "pocketsphinx"

    def __init__(self, spoken: dict[str, list[list[str]]]) -> None:
        import pocketsphinx

        self._words = dict(zip(map("w{}".format, range(len(spoken))), spoken, strict=True))
        self._decoder = pocketsphinx.Decoder(samprate=float(audio.RATE_HZ), lm=None, loglevel="FATAL")
        listed = [
            (name if not number else f"{name}({number + 1})", " ".join(phonemes))
            for name, word in self._words.items()
            for number, phonemes in enumerate(spoken[word])
        ]
        for place, (name, phonemes) in enumerate(listed, start=1):
            self._decoder.add_word(name, phonemes, place == len(listed))
        grammar = f"#JSGF V1.0; grammar words; public <word> = {' | '.join(self._words)};"
        self._decoder.add_jsgf_string("words", grammar)
        self._decoder.activate_search("words")

    def best(self, utt: Utterance) -> str:
        """The word that is recognised; empty if none is."""
        samples = (np.clip(inputs.load(utt), -1, 1) * 32767).astype(np.int16)
        self._decoder.start_utt()
        self._decoder.process_raw(samples.tobytes(), False, True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return self._words.get(found.hypstr.split("(")[0], "") if found and found.hypstr else ""


class Phonemes:
    """hama's phonemes, and the exact CTC scores of the words."""

    name = "hama"

    def __init__(self, spoken: dict[str, list[list[str]]]) -> None:
        import hama

        self._model = hama.ASRModel()
        symbols = {symbol: place for place, symbol in enumerate(self._model.decoder_tokens)}
        self.words, sequences, self._of_word = list(spoken), [], []
        for place, rows in enumerate(spoken.values()):
            spelt = {
                tuple(symbols[symbol] for symbol in choice)
                for row in rows
                for choice in itertools.islice(itertools.product(*(SYMBOLS[one].split() for one in row)), MOST)
            }
            sequences += sorted(spelt)
            self._of_word += [place] * len(spelt)
        self._boundary, self._blank = symbols["<wb>"], symbols["<blank>"]
        self._trie = Trie(sequences, self._blank)

    @cached_property
    def _groups(self) -> np.ndarray:
        return np.flatnonzero(np.diff([-1, *self._of_word]))

    def scores(self, utt: Utterance) -> np.ndarray:
        """[W]: the log-probability of every word, over all alignments and pronunciations."""
        session, samples = self._model.session, np.clip(inputs.load(utt), -1, 1)
        names = ["log_probs", "out_lengths"]
        waveform = {"waveform": samples[None].astype(np.float32), "waveform_lengths": np.array([len(samples)])}
        found, lengths = session.run(names, waveform)
        frames = (
            torch.from_numpy(np.array(found[0][: int(np.asarray(lengths).reshape(-1)[0])])).double().log_softmax(-1)
        )
        frames[:, self._blank] = torch.logaddexp(frames[:, self._blank], frames[:, self._boundary])
        logprobs = frames[:, self._trie.columns].numpy()[None]
        rows = self._trie.scores(logprobs, np.array([frames.shape[0]]))[0]
        return np.logaddexp.reduceat(rows, self._groups)

    def best(self, utt: Utterance) -> str:
        """The word that is recognised."""
        return self.words[int(self.scores(utt).argmax())]


class PhonemeTeacher:
    """hama's posterior over words, for students; its temperature is chosen on labelled training speech.

    Words that are not in the CMU dictionary have none.
    """

    def __init__(self, words: Sequence[str], labelled: Sequence[Utterance], count: int = 200, seed: int = 1) -> None:
        """`words` are those of the closed lexicon, in its order; `count`: utterances that the temperature is of."""
        spoken = pronunciations(words)
        if not spoken:
            raise UserError(
                "adapt: teachers: no word of the lexicon is in the CMU dictionary; hama cannot be a teacher"
            )
        self._model, self._size = Phonemes(spoken), len(words)
        self._places = [list(words).index(word) for word in self._model.words]
        usable = [utt for utt in labelled if normalise(utt.text) in spoken]
        if not usable:
            raise UserError(
                "adapt: teachers: hama's temperature is chosen on labelled words of the CMU dictionary; none is"
            )
        drawn = random.Random(seed).sample(usable, min(count, len(usable)))
        index = {word: place for place, word in enumerate(self._model.words)}
        rows = [self._model.scores(utt) for utt in drawn]
        self.temperature = best_temperature(np.stack(rows), [index[normalise(utt.text)] for utt in drawn])[0]

    def posterior(self, batch: inputs.Batch) -> torch.Tensor:
        """[B, W]: of every utterance of a batch."""
        found = torch.zeros(len(batch), self._size)
        scores = np.stack([self._model.scores(utt) for utt in batch.utterances])
        found[:, self._places] = torch.from_numpy(posterior(scores, self.temperature)).float()
        return found


def table(corpus: Corpus, words: Sequence[str], kind: str = "audio") -> pd.DataFrame | None:
    """WRA by level, in per cent; None, with a sentence why, where it cannot be measured."""
    if absent := missing():
        return print(f"Not measured: {', '.join(absent)} is not installed (pip install 'kdlib[recognisers]').")
    spoken = pronunciations(words) if kind == "audio" else {}
    if len(spoken) < LEAST:
        return print(
            f"Not measured: {len(spoken)} entries of the lexicon are English words of this corpus's recordings."
        )
    if not any(corpus.is_control(name) or corpus.level(name) for name in corpus.speakers):
        return print("Not measured: no speaker's level of intelligibility is known; write `speakers:` in the recipe.")
    if left_out := sorted(set(words) - set(spoken)):
        named = ", ".join(left_out[:8]) + (", ..." if len(left_out) > 8 else "")
        print(f"{len(left_out)} of {len(words)} words are not in the CMU dictionary, and are left out: {named}")
    return by_level(corpus, spoken)


def by_level(corpus: Corpus, spoken: dict[str, list[list[str]]], count: int = 30, seed: int = 1) -> pd.DataFrame:
    """WRA in per cent by level: so many utterances of each, of words with pronunciations."""
    systems = [Grammar(spoken), Phonemes(spoken)]
    usable = corpus.where(lambda utt: normalise(utt.text) in spoken)
    speech: dict[str, list[Utterance]] = {level: [] for level in reversed(LEVELS)}
    for utt in usable:
        if level := CONTROL if corpus.is_control(utt.speaker) else corpus.level(utt.speaker):
            speech[level].append(utt)
    drawn = {
        level: random.Random(f"{seed} {level}").sample(utterances, min(count, len(utterances)))
        for level, utterances in speech.items()
        if utterances
    }
    rows = []
    with progress(sum(map(len, drawn.values())), "recognisers", "utt") as bar:
        for level, utterances in drawn.items():
            right = {system.name: 0 for system in systems}
            for utt in utterances:
                for system in systems:
                    right[system.name] += system.best(utt) == normalise(utt.text)
                bar.update(1)
            rows.append(
                {"level": level, "utterances": len(utterances)}
                | {name: round(100 * number / len(utterances), 1) for name, number in right.items()}
            )
    return pd.DataFrame(rows).set_index("level")
