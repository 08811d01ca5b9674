"""All decoders of a system: `Outputs` -> the columns of a table of hypotheses."""

from collections.abc import Iterable, Mapping, Sequence

from kdlib.decode.attention import AttentionDecoding
from kdlib.decode.beam import BeamSearch
from kdlib.decode.greedy import blank_share, greedy
from kdlib.decode.lexicon import Lexicon
from kdlib.models import Outputs
from kdlib.tokens import Tokens

GREEDY, CLOSED, BEAM = "greedy", "lexicon", "beam"


class DecoderSet:
    """Greedy and closed-lexicon decoding, with beam search and an attention decoder where they are given.

    `columns` are the decoders whose heads are trained, and which are therefore scored; the hypotheses of an untrained
    CTC head are written all the same.
    """

    def __init__(
        self,
        tokens: Tokens,
        lexicon: Lexicon,
        *,
        beam: BeamSearch | None = None,
        attention: AttentionDecoding | None = None,
        ctc: bool = True,
        more: Iterable[str] = (),
    ) -> None:
        """`more` names further columns, which the caller fills."""
        self.tokens, self.lexicon, self.beam, self.attention, self.ctc = tokens, lexicon, beam, attention, ctc
        self.more = tuple(more)

    @property
    def columns(self) -> tuple[str, ...]:
        """The decoders that are scored."""
        ctc = (GREEDY, CLOSED, *([BEAM] if self.beam else [])) if self.ctc else ()
        return (*ctc, *(self.attention.columns if self.attention else ()), *self.more)

    def with_beam(self, beam: BeamSearch | None) -> "DecoderSet":
        """Return the same decoders with another beam search."""
        return DecoderSet(self.tokens, self.lexicon, beam=beam, attention=self.attention, ctc=self.ctc, more=self.more)

    def __call__(self, outputs: Outputs) -> Mapping[str, Sequence]:
        """Decode a batch into columns, one value per utterance."""
        ids = greedy(outputs.ctc, self.tokens.blank)
        best = self.lexicon.nbest(outputs.ctc, 1)
        columns = {
            GREEDY: [self.tokens.decode(row) for row in ids],
            CLOSED: [ranked[0].word if ranked else "" for ranked in best],
            "lexicon_posterior": [round(ranked[0].posterior, 4) if ranked else 0.0 for ranked in best],
            "n_tokens": [len(row) for row in ids],
            "blank_share": [round(share, 4) for share in blank_share(outputs.ctc, self.tokens.blank).tolist()],
            "token_ids": [" ".join(map(str, row)) for row in ids],
        }
        if self.beam and self.ctc:
            columns[BEAM] = self.beam(outputs.ctc)
        return columns | (self.attention(outputs) if self.attention else {})
