"""All decoders of a system: `Outputs` -> the columns of a table of hypotheses."""

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch

from kdlib.decode.attention import AttentionDecoding
from kdlib.decode.beam import BeamSearch
from kdlib.decode.calibration import CalibratedLexicon, Calibrator
from kdlib.decode.greedy import blank_share, greedy
from kdlib.decode.lexicon import Lexicon
from kdlib.models import Outputs
from kdlib.tokens import Tokens

GREEDY, CLOSED, PLAIN, BEAM = "greedy", "lexicon", "lexicon_plain", "beam"
TRANSDUCTIVE = "lexicon_transductive"  # a caller's, who knows all utterances


class DecoderSet:
    """Greedy and closed-lexicon decoding, with beam search and an attention decoder where they are given.

    `columns` are the decoders whose heads are trained, and which are therefore scored; the hypotheses of an untrained
    CTC head are written all the same. The words of the closed lexicon are plain until `calibrated`; without a lexicon
    (of sentences) nothing chooses among them.
    """

    def __init__(
        self,
        tokens: Tokens,
        lexicon: Lexicon | None,
        *,
        beam: BeamSearch | None = None,
        attention: AttentionDecoding | None = None,
        ctc: bool = True,
        more: Iterable[str] = (),
    ) -> None:
        """`more` names further columns, which the caller fills."""
        self.tokens, self.beam, self.attention, self.ctc = tokens, beam, attention, ctc
        self.plain = self.lexicon = lexicon
        self.more, self.calibrators = tuple(more), {}

    @property
    def columns(self) -> tuple[str, ...]:
        """The decoders that are scored."""
        closed = () if self.plain is None else (CLOSED, PLAIN) if CLOSED in self.calibrators else (CLOSED,)
        ctc = (GREEDY, *closed, *([BEAM] if self.beam else [])) if self.ctc else ()
        return (*ctc, *(self.attention.columns if self.attention else ()), *self.more)

    @property
    def word_columns(self) -> list[str]:
        """The decoders that choose a word of the closed lexicon."""
        return [CLOSED] * (CLOSED in self.columns) + [name for name in self.columns if name.endswith("_lexicon")]

    def with_beam(self, beam: BeamSearch | None) -> "DecoderSet":
        """Return the same decoders with another beam search."""
        changed = copy.copy(self)
        changed.beam = beam
        return changed

    def with_more(self, *names: str) -> "DecoderSet":
        """Return the same decoders with further columns, which the caller fills."""
        changed = copy.copy(self)
        changed.more = (*self.more, *names)
        return changed

    def calibrated(self, calibrators: Mapping[str, Calibrator]) -> "DecoderSet":
        """Return the same decoders with calibrated words, by decoder."""
        changed = copy.copy(self)
        changed.calibrators = dict(calibrators)
        if CLOSED in calibrators:
            changed.lexicon = CalibratedLexicon(self.plain, calibrators[CLOSED])
            changed.beam = self.beam.calibrated(calibrators[CLOSED], self.plain) if self.beam else None
        if self.attention:
            changed.attention = self.attention.calibrated(calibrators)
        return changed

    def word_scores(self, outputs: Outputs, *, slow: bool = True) -> dict[str, torch.Tensor]:
        """[B, W] by decoder: the plain score of every word; without `slow` only those of CTC."""
        if self.plain is None:
            return {}
        scores = {CLOSED: self.plain.scores(outputs.ctc)} if self.ctc else {}
        return scores | (self.attention.word_scores(outputs) if slow and self.attention else {})

    def __call__(self, outputs: Outputs) -> Mapping[str, Sequence]:
        """Decode a batch into columns, one value per utterance."""
        ids = greedy(outputs.ctc, self.tokens.blank)
        columns = {
            GREEDY: [self.tokens.decode(row) for row in ids],
            **(self._words(outputs) if self.plain else {}),
            "n_tokens": [len(row) for row in ids],
            "blank_share": [round(share, 4) for share in blank_share(outputs.ctc, self.tokens.blank).tolist()],
            "token_ids": [" ".join(map(str, row)) for row in ids],
        }
        if self.beam and self.ctc:
            columns[BEAM] = self.beam(outputs.ctc)
        return columns | (self.attention(outputs) if self.attention else {})

    def _words(self, outputs: Outputs) -> dict[str, Sequence]:
        """The columns of the closed lexicon."""
        plain = self.plain.scores(outputs.ctc)
        best = self.lexicon.rank(self.lexicon.calibrate(plain, outputs.ctc), 1)
        return {
            CLOSED: [ranked[0].word if ranked else "" for ranked in best],
            "lexicon_posterior": [round(ranked[0].posterior, 4) if ranked else 0.0 for ranked in best],
            PLAIN: self.plain.best_of(plain),
        }
