"""CTC prefix beam search with an n-gram language model: torchaudio's decoder, which is flashlight's with KenLM.

It finds the words (or, without a lexicon, the pieces) that maximise
log P_ctc + weight x log P_lm + bonus x (number of words), P_lm with the natural logarithm. Flashlight ends a word at
the first frame of its last token, and has no alignment in which that token lasts. So every spelling is listed a second
time, with a symbol of the same probability after it; as that allows too much (A for A, blank, A), the texts that the
search finds are ranked by their exact CTC probability. A word that ends and the same word that could go on have equal
scores in a search; at the margin of its beam flashlight keeps one of them by where they lie in memory, which differs
from process to process. So the search has a bonus, too small to matter, for a word that has ended. Where the pieces
are whole words, the search is over pieces. `tune` chooses weight, bonus and beam size on the dev speaker's speech,
never on the speech that is reported.
"""

import copy
import itertools
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import pandas as pd
import torch

from kdlib.console import progress, report
from kdlib.decode import lm
from kdlib.decode.calibration import Calibrator
from kdlib.decode.lexicon import Lexicon, Words
from kdlib.decode.lm import BEGIN, END, UNKNOWN
from kdlib.errors import UserError
from kdlib.models import Emissions
from kdlib.settings.evaluation import BeamSearchSettings
from kdlib.tokens import Tokens, normalise

NAMES = "names.txt"
UNUSED = "<never>"  # flashlight requires a token for silence between words: one that no model outputs
IMPOSSIBLE = -1e4  # its log-probability
ENDED = 1e-3  # bonus, in the search alone, of a word that has ended
LN10 = 2.302585092994046


@dataclass(frozen=True)
class BeamSettings:
    """The weights of a search, and its beam size."""

    lm_weight: float = 0.9
    word_bonus: float = 0.0
    size: int = 20


class BeamSearch:
    """A search over the words of a lexicon, or freely over the tokenizer's pieces."""

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
        """Search over `words`, or without them over pieces; the language model in `lm` has the same units."""
        self.tokens, self.lm, self.setting = tokens, lm, setting or BeamSettings()
        self.tokens_at_once, self.threshold = tokens_at_once, threshold
        special = {tokens.blank, tokens.bos, tokens.eos}
        self.lasting: list[int] = []
        if words is None or tokens.unknown is not None:
            self.words = None
            marks = {BEGIN, END, UNKNOWN}
            ids = [index for index, piece in enumerate(tokens.pieces) if index not in special and piece not in marks]
        else:
            self.words = _encode_words(words, tokens)
            if not self.words:
                raise UserError("beam search: expected at least one word, found none")
            ids = sorted({index for spellings in self.words.values() for row in spellings for index in row})
            self.lasting = sorted({row[-1] for spellings in self.words.values() for row in spellings})
        self.columns = [tokens.blank, *ids]  # of a search's input; after them those of tokens that last
        self._decoder = self._kenlm = self._nbest = None
        self._biases: dict[str, float] = {}
        self._word_index = {word: index for index, word in enumerate(self.words or ())}

    def at(self, setting: BeamSettings) -> "BeamSearch":
        """Return the same search with another setting."""
        self._kenlm = self._load_kenlm()  # read once for all settings
        search = copy.copy(self)
        search.setting, search._decoder, search._nbest = setting, None, None
        return search

    def calibrated(self, calibrator: Calibrator, lexicon: Lexicon) -> "BeamSearch":
        """Return the same search whose hypotheses are ranked anew, with the calibrated words of a lexicon.

        The words' prior is the language model's. A search over pieces is unchanged.
        """
        if self.words is None or not calibrator.strength:
            return self
        biases = calibrator.strength * calibrator.bias(lexicon, with_prior=self.lm is None)
        search = copy.copy(self)
        search._decoder = search._nbest = None
        search._biases = dict(zip(lexicon.words, biases.tolist(), strict=True))
        return search

    def __call__(self, emissions: Emissions) -> list[str]:
        """Decode every utterance of a batch."""
        return self.texts(self.search_input(emissions))

    def search_input(self, emissions: Emissions) -> list[torch.Tensor]:
        """Return the input of a search: [T, C] log-probabilities of the tokens in `columns`, one per utterance."""
        logits = emissions.logits.detach()
        chosen = (logits[..., [*self.columns, *self.lasting]] - logits.logsumexp(-1, keepdim=True)).float().cpu()
        chosen = torch.cat([chosen, chosen.new_full((*chosen.shape[:2], 1), IMPOSSIBLE)], -1)
        return [row[:length].contiguous() for row, length in zip(chosen, emissions.lengths.tolist(), strict=True)]

    def texts(self, emissions: Sequence[torch.Tensor]) -> list[str]:
        """Return the best text of each utterance."""
        return [self._text(emission) for emission in emissions]

    def nbest(self, emissions: Emissions, count: int) -> list[list[tuple[list[int], float]]]:
        """Return every utterance's best texts as token ids, with their shares among the n-best, n being at least 5."""
        if self.words is None and (self._nbest is None or self._nbest[0] < count):
            self._nbest = max(count, 5), self._build(max(count, 5))
        return [self._rank(emission)[:count] for emission in self.search_input(emissions)]

    def _rank(self, emission: torch.Tensor) -> list[tuple[list[int], float]]:
        scores: dict[tuple[int, ...], float] = {}
        if self.words is not None:
            found = self._exact(emission)
            scores = {tuple(self.tokens.encode(" ".join(words))): score for words, score in found.items() if words}
        else:
            for hypothesis in self._nbest[1](emission[None])[0] if len(emission) else ():
                if ids := tuple(self._ids(hypothesis)):
                    scores[ids] = np.logaddexp(scores.get(ids, -np.inf), hypothesis.score)
        total = np.logaddexp.reduce(list(scores.values())) if scores else 0.0
        ranked = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        return [(list(ids), float(np.exp(score - total))) for ids, score in ranked]

    def _ids(self, hypothesis) -> list[int]:
        return [self.columns[index] for index in self._places(hypothesis)]

    def _places(self, hypothesis) -> tuple[int, ...]:
        """The tokens of a hypothesis by their columns, without those that only last."""
        return tuple(index for index in hypothesis.tokens.tolist() if index < len(self.columns))

    def _text(self, emission: torch.Tensor) -> str:
        if self.words is None:
            hypotheses = self._search(emission[None])[0] if len(emission) else []
            return self.tokens.decode(self._ids(hypotheses[0])) if hypotheses else ""
        found = self._exact(emission)
        calibrated = bool(self._biases)  # calibrated are words: an empty hypothesis is the last
        best = max(found, key=lambda words: (bool(words) or not calibrated, found[words], words), default=())
        return " ".join(best)

    def _exact(self, emission: torch.Tensor) -> dict[tuple[str, ...], float]:
        """The texts that the search finds, with their exact scores: over all alignments, and the spellings found."""
        hypotheses = self._search(emission[None])[0] if len(emission) else []
        if not hypotheses:
            return {}
        found = list(dict.fromkeys((tuple(one.words), self._places(one)) for one in hypotheses))
        ctc = _ctc_scores(emission, [places for _, places in found])
        scores: dict[tuple[str, ...], float] = {}
        for (words, _), score in zip(found, ctc, strict=True):
            scores[words] = np.logaddexp(scores.get(words, -np.inf), score)
        return {words: score + self._prior(words) for words, score in scores.items()}

    def _prior(self, words: tuple[str, ...]) -> float:
        """The language model's share of a score, the bonus of words, and their calibration."""
        total = sum(self.setting.word_bonus + self._biases.get(word, 0.0) for word in words)
        if self._kenlm is None:
            return total
        state, logprob = self._kenlm.start(False), 0.0
        for word in words:
            state, score = self._kenlm.score(state, self._word_index[word])
            logprob += score
        return total + self.setting.lm_weight * LN10 * (logprob + self._kenlm.finish(state)[1])

    @property
    def _search(self):
        if self._decoder is None:
            self._decoder = self._build(1 if self.words is None else self.setting.size)
        return self._decoder

    def _build(self, nbest: int = 1):
        from torchaudio.models.decoder import ctc_decoder

        names = list(map(str, self.columns))  # ids: pieces may hold marks that files cannot
        names += [*(f"{index}+" for index in self.lasting), UNUSED]
        with tempfile.TemporaryDirectory() as folder:
            lexicon, lm_names = Path(folder) / "lexicon.txt", Path(folder) / NAMES
            if self.words is not None:
                lines = ((word, " ".join(map(str, ids))) for word, ids in self.spellings())
                both = (f"{word}\t{ids}\n{word}\t{ids} {ids.split()[-1]}+\n" for word, ids in lines)
                lexicon.write_text("".join(both), encoding="utf-8")
            self._write_names(lm_names)
            self._kenlm = self._load_kenlm()
            return ctc_decoder(
                lexicon=str(lexicon) if self.words is not None else None,
                tokens=names,
                lm=self._kenlm,
                lm_dict=str(lm_names),
                nbest=nbest,
                beam_size=self.setting.size,
                beam_size_token=min(self.tokens_at_once, len(names)),
                beam_threshold=self.threshold,
                lm_weight=self.setting.lm_weight * LN10,  # KenLM's logarithms are decimal
                word_score=self.setting.word_bonus + (ENDED if self.words is not None else 0.0),
                log_add=True,
                blank_token=names[0],
                sil_token=UNUSED,
            )

    def spellings(self) -> list[tuple[str, list[int]]]:
        """Words with their token ids, in the form of flashlight's lexicon."""
        return [(word, ids) for word, rows in self.words.items() for ids in rows]

    def _load_kenlm(self):
        """Load KenLM's n-grams, without its progress bar on the terminal; return None without a file."""
        from flashlight.lib.text.decoder.kenlm import KenLM
        from flashlight.lib.text.dictionary import Dictionary

        if self.lm is None or self._kenlm is not None:
            return self._kenlm
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
        """Write the language model's names of the units of the search: words; or pieces, in the order of the columns.

        Without this list flashlight numbers the pieces in an order of its own, and the language model scores other
        pieces than those that are decoded.
        """
        pieces = ["<blank>", *(self.tokens.pieces[index] for index in self.columns[1:]), UNUSED]
        names = pieces if self.words is None else list(self.words)
        path.write_text("\n".join([*names, UNKNOWN]) + "\n", encoding="utf-8")


def _ctc_scores(emission: torch.Tensor, texts: Sequence[tuple[int, ...]]) -> list[float]:
    """The log-probability of each text, over all alignments; texts are places of columns, of which 0 is the blank."""
    used = sorted({0}.union(*texts))
    place = {column: index for index, column in enumerate(used)}
    targets = torch.tensor([place[column] for text in texts for column in text], dtype=torch.long)
    lengths = torch.full((len(texts),), len(emission)), torch.tensor(list(map(len, texts)))
    logprobs = emission[:, used].double()[:, None].expand(-1, len(texts), -1)
    return (-torch.nn.functional.ctc_loss(logprobs, targets, *lengths, reduction="none")).tolist()


def _encode_words(words: Words, tokens: Tokens) -> dict[str, list[list[int]]]:
    """Map single words to the ids of their spellings; an entry of several words is split."""
    entries = words if isinstance(words, Mapping) else {word: [word] for word in words}
    texts: dict[str, set[str]] = {}
    for entry, spellings in entries.items():
        for word in normalise(entry).split():
            texts.setdefault(word, set()).update(spellings if " " not in entry.strip() else [word])
    return {word: sorted(tokens.encode(text) for text in spellings) for word, spellings in sorted(texts.items())}


def in_pieces(texts: Iterable[str], tokens: Tokens) -> list[str]:
    """Return texts as sequences of pieces, for a language model of pieces."""
    return [" ".join(tokens.pieces[index] for index in tokens.encode(text)) for text in texts]


def build_language_model(
    partial: Path, texts: Sequence[str], settings: BeamSearchSettings, tokens: Tokens | None
) -> None:
    """Estimate a language model on texts: of words or, with `tokens`, of pieces."""
    estimator = lm.build(in_pieces(texts, tokens) if tokens else texts, settings.order, partial / lm.ARPA)
    report(f"language model: {settings.order}-grams of {len(texts):,} training texts, estimated by {estimator}")


def recipe_search(settings: BeamSearchSettings, tokens: Tokens, lexicon: Words, language_model: Path) -> BeamSearch:
    """Beam search with the settings of a recipe."""
    setting = BeamSettings(settings.lm_weight, settings.word_bonus, settings.beam_size)
    return BeamSearch(tokens, None if settings.units == "pieces" else lexicon, language_model, setting)


def tune(
    beam: BeamSearch, emissions: Sequence[torch.Tensor], references: Sequence[str], settings: BeamSearchSettings
) -> pd.DataFrame:
    """Score every setting on dev speech: one row each, with lm_weight, word_bonus, size, wer and wra."""
    references = [normalise(text) for text in references]
    bonuses = settings.word_bonuses if beam.words is not None else (0.0,)  # of words, not of pieces
    grid = list(itertools.product(settings.beam_sizes, settings.lm_weights, bonuses))
    rows = []
    with progress(len(grid), "beam search on dev speech", "setting") as bar:
        for size, weight, bonus in grid:
            hypotheses = beam.at(BeamSettings(weight, bonus, size)).texts(emissions)
            correct = np.mean([text == hyp for text, hyp in zip(references, hypotheses, strict=True)])
            rows.append((weight, bonus, size, jiwer.wer(references, hypotheses), float(correct)))
            bar.update(1)
    return pd.DataFrame(rows, columns=["lm_weight", "word_bonus", "size", "wer", "wra"])


def best_settings(table: pd.DataFrame) -> BeamSettings:
    """Return the setting of the lowest WER; on ties the smallest beam, then the least weight and bonus."""
    ordered = table.assign(far=table.word_bonus.abs()).sort_values(["wer", "size", "lm_weight", "far"], kind="stable")
    row = ordered.iloc[0]
    return BeamSettings(float(row.lm_weight), float(row.word_bonus), int(row["size"]))
