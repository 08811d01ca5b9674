"""CTC prefix beam search with an n-gram language model: torchaudio's decoder, which is flashlight's with KenLM.

It finds the words (or, without a lexicon, the pieces) that maximise
log P_ctc + weight x log P_lm + bonus x (number of words), P_lm with the natural logarithm. How much weight, bonus and
beam is a choice, made by `sweep` on the dev speaker's speech, never on what is reported.
"""

import copy
import itertools
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdlib.decode.lexicon import Words
from kdlib.decode.lm import BEGIN, END, UNKNOWN
from kdlib.errors import UserError
from kdlib.models import Outputs
from kdlib.settings import BeamSearchSettings
from kdlib.tokens import Tokens, normalise

if TYPE_CHECKING:
    import pandas as pd
    import torch

CODE = ("decode/beam.py", "decode/lm.py")
NAMES = "names.txt"
UNUSED = "<never>"  # flashlight wants a token for silence between words: one that no model emits
IMPOSSIBLE = -1e4  # its log-probability
LN10 = 2.302585092994046


@dataclass(frozen=True)
class BeamSettings:
    """What a search weighs, and how many hypotheses it keeps."""

    lm_weight: float = 0.9
    word_bonus: float = 0.0
    size: int = 20


class BeamSearch:
    """A search over words of a lexicon, or freely over the tokenizer's pieces."""

    def __init__(
        self,
        tokens: Tokens,
        words: Words | None,
        lm: Path | None,
        setting: BeamSettings | None = None,
        *,
        tokens_at_once: int = 30,
        threshold: float = 50.0,
    ) -> None:
        """Search over `words`, or without them over pieces; the model in `lm` is one of words, or of pieces."""
        self.tokens, self.lm, self.setting = tokens, lm, setting or BeamSettings()
        self.tokens_at_once, self.threshold = tokens_at_once, threshold
        special = {tokens.blank, tokens.bos, tokens.eos}
        if words is None:
            self.words = None
            marks = {BEGIN, END, UNKNOWN}
            ids = [index for index, piece in enumerate(tokens.pieces) if index not in special and piece not in marks]
        else:
            self.words = _spelt(words, tokens)
            if not self.words:
                raise UserError("beam search needs a word: none was given")
            ids = sorted({index for spelt in self.words.values() for one in spelt for index in one})
        self.columns = [tokens.blank, *ids]
        self._decoder = self._ngrams = self._several = None

    def at(self, setting: BeamSettings) -> "BeamSearch":
        """The same search with another setting."""
        self._ngrams = self._loaded()  # read once for all of them
        other = copy.copy(self)
        other.setting, other._decoder, other._several = setting, None, None
        return other

    def __call__(self, outputs: Outputs) -> list[str]:
        """The text of every utterance of a batch."""
        return self.texts(self.emissions(outputs))

    def emissions(self, outputs: Outputs) -> list["torch.Tensor"]:
        """What a search needs of a batch: [T, C] log-probabilities of the tokens in question, one an utterance."""
        import torch

        logits = outputs.ctc_logits.detach()
        chosen = (logits[..., self.columns] - logits.logsumexp(-1, keepdim=True)).float().cpu()
        chosen = torch.cat([chosen, chosen.new_full((*chosen.shape[:2], 1), IMPOSSIBLE)], -1)
        return [row[:length].contiguous() for row, length in zip(chosen, outputs.lengths.tolist(), strict=True)]

    def texts(self, emissions: Sequence["torch.Tensor"]) -> list[str]:
        """The best text of each utterance."""
        return [self._text(one) for one in emissions]

    def nbest(self, outputs: Outputs, count: int) -> list[list[tuple[list[int], float]]]:
        """The best texts of every utterance as token ids, with their shares among at least five that were found."""
        if self._several is None or self._several[0] < count:
            self._several = max(count, 5), self._built(max(count, 5))
        return [self._ranked(one)[:count] for one in self.emissions(outputs)]

    def _ranked(self, emission: "torch.Tensor") -> list[tuple[list[int], float]]:
        found: dict[tuple[int, ...], float] = {}
        for one in self._several[1](emission[None])[0] if len(emission) else ():
            ids = self.tokens.encode(" ".join(one.words)) if self.words is not None else self._ids(one)
            if ids:
                found[tuple(ids)] = np.logaddexp(found.get(tuple(ids), -np.inf), one.score)
        total = np.logaddexp.reduce(list(found.values())) if found else 0.0
        ordered = sorted(found.items(), key=lambda one: (-one[1], one[0]))
        return [(list(ids), float(np.exp(score - total))) for ids, score in ordered]

    def _ids(self, found) -> list[int]:
        return [self.columns[index] for index in found.tokens.tolist() if index < len(self.columns)]

    def _text(self, emission: "torch.Tensor") -> str:
        if not len(emission):
            return ""
        found = self._search(emission[None])[0]
        if not found:
            return ""
        if self.words is not None:
            return " ".join(found[0].words)
        return self.tokens.decode(self._ids(found[0]))

    @property
    def _search(self):
        if self._decoder is None:
            self._decoder = self._built()
        return self._decoder

    def _built(self, nbest: int = 1):
        from torchaudio.models.decoder import ctc_decoder

        names = [*(str(index) for index in self.columns), UNUSED]  # ids: pieces may hold marks that files cannot
        with tempfile.TemporaryDirectory() as folder:
            lexicon, spoken = Path(folder) / "lexicon.txt", Path(folder) / NAMES
            if self.words is not None:
                lines = (f"{word}\t{' '.join(map(str, ids))}\n" for word, ids in self.spellings())
                lexicon.write_text("".join(lines), encoding="utf-8")
            self._write_names(spoken)
            self._ngrams = self._loaded()
            return ctc_decoder(
                lexicon=str(lexicon) if self.words is not None else None,
                tokens=names,
                lm=self._ngrams,
                lm_dict=str(spoken),
                nbest=nbest,
                beam_size=self.setting.size,
                beam_size_token=min(self.tokens_at_once, len(names)),
                beam_threshold=self.threshold,
                lm_weight=self.setting.lm_weight * LN10,  # KenLM's logarithms are decimal
                word_score=self.setting.word_bonus,
                log_add=True,
                blank_token=names[0],
                sil_token=UNUSED,
            )

    def spellings(self) -> list[tuple[str, list[int]]]:
        """Words with their token ids, as flashlight's lexicon takes them."""
        return [(word, ids) for word, spelt in self.words.items() for ids in spelt]

    def _loaded(self):
        """KenLM's n-grams, without what it draws on the terminal while it reads them; nothing without a file."""
        from flashlight.lib.text.decoder.kenlm import KenLM
        from flashlight.lib.text.dictionary import Dictionary

        if self.lm is None or self._ngrams is not None:
            return self._ngrams
        terminal = os.dup(2)
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            self._write_names(Path(folder) / NAMES)
            os.dup2(nowhere.fileno(), 2)
            try:
                return KenLM(str(self.lm), Dictionary(str(Path(folder) / NAMES)))
            except RuntimeError:
                raise UserError(f"{self.lm}: KenLM cannot read it; name an ARPA file of at least bigrams") from None
            finally:
                os.dup2(terminal, 2)
                os.close(terminal)

    def _write_names(self, path: Path) -> None:
        """Write down what the language model calls what is searched: words; or pieces, in the order of the columns.

        Without this list flashlight numbers the pieces in an order of its own, and the language model scores other
        pieces than those that are written.
        """
        pieces = ["<blank>", *(self.tokens.pieces[index] for index in self.columns[1:]), UNUSED]
        names = pieces if self.words is None else list(self.words)
        path.write_text("\n".join([*names, UNKNOWN]) + "\n", encoding="utf-8")


def _spelt(words: Words, tokens: Tokens) -> dict[str, list[list[int]]]:
    """Single words with the ids of their spellings; an entry of several words is taken apart."""
    given = words if isinstance(words, Mapping) else {word: [word] for word in words}
    texts: dict[str, set[str]] = {}
    for entry, several in given.items():
        for word in normalise(entry).split():
            texts.setdefault(word, set()).update(several if " " not in entry.strip() else [word])
    return {word: sorted(tokens.encode(text) for text in some) for word, some in sorted(texts.items())}


def in_pieces(texts: Iterable[str], tokens: Tokens) -> list[str]:
    """Texts as sequences of pieces, for a language model of pieces."""
    return [" ".join(tokens.pieces[index] for index in tokens.encode(text)) for text in texts]


def tune(
    beam: BeamSearch, emissions: Sequence["torch.Tensor"], references: Sequence[str], settings: BeamSearchSettings
) -> "pd.DataFrame":
    """WER and WRA of every setting on dev speech, one row each: lm_weight, word_bonus, size, wer, wra."""
    import jiwer
    import pandas as pd

    from kdlib.console import progress

    told = [normalise(text) for text in references]
    grid = list(itertools.product(settings.beam_sizes, settings.lm_weights, settings.word_bonuses))
    rows = []
    with progress(len(grid), "beam search on dev speech", "setting") as bar:
        for size, weight, bonus in grid:
            said = beam.at(BeamSettings(weight, bonus, size)).texts(emissions)
            right = np.mean([one == other for one, other in zip(told, said, strict=True)])
            rows.append((weight, bonus, size, jiwer.wer(told, said), float(right)))
            bar.update(1)
    return pd.DataFrame(rows, columns=["lm_weight", "word_bonus", "size", "wer", "wra"])


def best_settings(table: "pd.DataFrame") -> BeamSettings:
    """The setting of the lowest WER; of equal ones the smallest beam, then the least weight and bonus."""
    ordered = table.assign(far=table.word_bonus.abs()).sort_values(["wer", "size", "lm_weight", "far"], kind="stable")
    row = ordered.iloc[0]
    return BeamSettings(float(row.lm_weight), float(row.word_bonus), int(row["size"]))
