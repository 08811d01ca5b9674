"""All decoders that apply to a system, side by side: `Outputs` -> the columns of a table of hypotheses."""

from collections.abc import Iterable, Mapping, Sequence

from kdlib.decode import attention, beam
from kdlib.decode import lexicon as closed
from kdlib.decode.attention import AttentionDecoding
from kdlib.decode.beam import BeamSearch
from kdlib.decode.greedy import blank_share, greedy
from kdlib.decode.lexicon import Lexicon
from kdlib.models import Outputs
from kdlib.tokens import Tokens

DECODERS_CODE = ("decode/decoders.py", "decode/greedy.py", *closed.CODE, *beam.CODE, *attention.CODE)
GREEDY, CLOSED, BEAM = "greedy", "lexicon", "beam"


class DecoderSet:
    """Greedy and closed-lexicon decoding always; beam search and an attention decoder where they are given.

    `columns` are the decoders whose heads are trained, and so are scored; what an untrained CTC head says is written
    down all the same.
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
        """`more` names columns that are filled from elsewhere."""
        self.tokens, self.lexicon, self.beam, self.attention, self.ctc = tokens, lexicon, beam, attention, ctc
        self.more = tuple(more)

    @property
    def columns(self) -> tuple[str, ...]:
        """The decoders that are scored."""
        heard = (GREEDY, CLOSED, *([BEAM] if self.beam else [])) if self.ctc else ()
        return (*heard, *(self.attention.columns if self.attention else ()), *self.more)

    def with_beam(self, found: BeamSearch | None) -> "DecoderSet":
        """The same decoders with another beam search."""
        return DecoderSet(self.tokens, self.lexicon, beam=found, attention=self.attention, ctc=self.ctc, more=self.more)

    def __call__(self, outputs: Outputs) -> Mapping[str, Sequence]:
        """Columns of a batch, one value an utterance."""
        ids = greedy(outputs, self.tokens.blank)
        best = self.lexicon.nbest(outputs, 1)
        found = {
            GREEDY: [self.tokens.decode(one) for one in ids],
            CLOSED: [ranked[0].word if ranked else "" for ranked in best],
            "lexicon_posterior": [round(ranked[0].posterior, 4) if ranked else 0.0 for ranked in best],
            "n_tokens": [len(one) for one in ids],
            "blank_share": [round(share, 4) for share in blank_share(outputs, self.tokens.blank).tolist()],
            "token_ids": [" ".join(map(str, one)) for one in ids],
        }
        if self.beam and self.ctc:
            found[BEAM] = self.beam(outputs)
        return found | (self.attention(outputs) if self.attention else {})
