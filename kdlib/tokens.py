"""Text <-> token ids: the one place that knows of normalisation, special tokens and offsets.

In the teachers' space 0 = BOS, 1 = EOS, 2 = blank, and every other id is sentencepiece's own, with no offset anywhere
(the original study lost its results to one). NeMo keeps its blank last and has neither BOS nor EOS. Whatever is stored
carries `Tokens.fingerprint`; before anything is scored, `check_round_trip` sends every reference there and back.
"""

import functools
import hashlib
import json
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kdlib.errors import UserError

BOS, EOS, BLANK = 0, 1, 2
JOINERS = "\u200c\u200d"  # unseen, but part of words in Persian and the scripts of India


@dataclass(frozen=True)
class Tokens:
    """A sentencepiece model with the contract for its special ids."""

    model: bytes
    blank: int
    size: int  # of the output layer, special tokens included
    bos: int | None = None
    eos: int | None = None

    @classmethod
    def for_teachers(cls, path: Path, size: int | None = None) -> "Tokens":
        """BOS 0, EOS 1, blank 2, over a sentencepiece model; `size` may be larger than its number of pieces."""
        model = path.read_bytes()
        pieces = _processor(model).get_piece_size()
        return cls(model, BLANK, size or pieces, BOS, EOS)

    @classmethod
    def of_file(cls, path: Path) -> "Tokens":
        """Of any sentencepiece model: the teachers' contract, where its first three ids stand for no text."""
        model = path.read_bytes()
        processor = _processor(model)
        special = all(processor.is_control(one) or processor.is_unknown(one) for one in (BOS, EOS, BLANK))
        return cls.for_teachers(path) if special else cls.for_nemo(model)

    @classmethod
    def for_nemo(cls, model: bytes) -> "Tokens":
        """NeMo's space: sentencepiece's ids, then the blank; no BOS, no EOS."""
        pieces = _processor(model).get_piece_size()
        return cls(model, pieces, pieces + 1)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the pieces and the special ids: equal only if the same ids mean the same."""
        contract = f"{self.blank},{self.size},{self.bos},{self.eos}".encode()
        return hashlib.sha256(self.model + contract).hexdigest()[:16]

    @functools.cached_property
    def pieces(self) -> list[str]:
        """What each of sentencepiece's ids stands for."""
        processor = _processor(self.model)
        return [processor.id_to_piece(index) for index in range(processor.get_piece_size())]

    @functools.cached_property
    def cased(self) -> str:
        """The case that the pieces are written in: 'upper', 'lower' or 'mixed'."""
        text = "".join(piece for piece in self.pieces if not piece.startswith("<"))
        return "upper" if text == text.upper() else "lower" if text == text.lower() else "mixed"

    def encode(self, text: str) -> list[int]:
        """The ids of a text; characters that the pieces cannot write are refused."""
        normal = normalise(text)
        ids = _processor(self.model).encode(self._case(normal))
        if self.decode(ids) != normal:
            raise UserError(self._unwritable(normal))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, normalised; special ids and ids beyond the pieces write nothing."""
        return self.decode_all([ids])[0]

    def decode_all(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """The text of every row of ids; see `decode`."""
        known = self._writing
        kept = [[index for index in map(int, ids) if index in known] for ids in rows]
        return [normalise(text) for text in _processor(self.model).decode(kept)] if kept else []

    @functools.cached_property
    def _writing(self) -> frozenset[int]:
        """The ids that stand for a piece of text."""
        return frozenset(range(len(self.pieces))) - {self.blank, self.bos, self.eos}

    def _case(self, text: str) -> str:
        return {"upper": text.upper(), "lower": text.lower(), "mixed": text}[self.cased]

    def _unwritable(self, text: str) -> str:
        """Which characters of a text cannot be written, and what to do."""
        ids = {char: _processor(self.model).encode(self._case(char)) for char in set(text) - {" "}}
        bad = sorted(char for char in ids if self.decode(ids[char]) != char)
        named = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in bad) or "it as a whole"
        way_out = (
            f'correct it (in the recipe, for all transcripts: replace: {{{json.dumps(bad[0])}: ""}}), '
            "or choose a model that knows it (pretrained: from_corpus trains one)"
            if bad
            else "correct it, or choose another model"
        )
        if bad == ["-"]:
            way_out = "write hyphens: space in the recipe"
        return f"the tokenizer cannot write {named} of the text {text!r}; {way_out}"


def normalise(text: str, hyphens: str = "keep", punctuation: str = "keep") -> str:
    """One spelling of a text for every comparison: composed characters, upper case, straight quotes, single spaces.

    With `hyphens="space"` a hyphen is a space; with `punctuation="drop"` marks other than apostrophes and hyphens go.

    >>> normalise(" it\u2019s  a CAFE\u0301 ")
    "IT'S A CAFÉ"
    >>> normalise("Well, well-known!", punctuation="drop")
    'WELL WELL-KNOWN'
    """
    if text.isascii() and (hyphens, punctuation) == ("keep", "keep"):  # nothing to straighten
        return " ".join(text.upper().split())
    straight = unicodedata.normalize("NFC", text).replace("\u2019", "'").replace("\u2010", "-").replace("\u2011", "-")
    straight = "".join(
        char for char in straight if char in JOINERS or unicodedata.category(char) != "Cf"
    )  # marks unseen
    if hyphens == "space":
        straight = straight.replace("-", " ")
    if punctuation == "drop":
        straight = "".join(" " if is_punctuation(char) else char for char in straight)
    return " ".join(straight.upper().split())


def is_punctuation(char: str) -> bool:
    """Whether a character is punctuation or a symbol, and neither an apostrophe nor a hyphen."""
    return char not in "'-" and unicodedata.category(char)[0] in "PS"


def train_tokenizer(
    texts: Iterable[str],
    pieces: int,
    folder: Path,
    *,
    lower: bool = False,
    characters: str = "",
    setting: str = "pretraining: {pieces: %d}",
) -> Path:
    """Train a byte-pair model on texts; return `folder/tokenizer.model`. Each text counts once.

    It can write the texts and all of `characters`. Few texts may yield fewer pieces than asked for. `setting` is what a
    recipe says of the number.
    """
    import io

    import sentencepiece

    sentences = sorted({normalise(text).lower() if lower else normalise(text) for text in texts})
    required = set(characters.lower() if lower else characters) - {" "}
    needed = len((set("".join(sentences)) - {" "}) | required) + 4  # and <unk> <s> </s> ▁
    if pieces < needed:
        raise UserError(
            f"no tokenizer of {pieces} pieces can write the {needed - 4} different characters of these "
            f"{len(sentences)} texts; write at least {needed} in the recipe ({setting % (2 * needed)})"
        )
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=pieces,
            model_type="bpe",
            character_coverage=1.0,
            required_chars="".join(sorted(required)),
            hard_vocab_limit=False,
            normalization_rule_name="identity",  # ours is the only one; theirs would rewrite Thai, Persian, ellipses
            minloglevel=2,
            num_threads=1,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"no tokenizer of {pieces} pieces can be trained on these {len(sentences)} texts ({reason}); "
            "change the number of pieces in the recipe"
        ) from None
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def check_round_trip(tokens: Tokens, references: Iterable[str]) -> None:
    """Text -> ids -> text for every reference, and every id within its range, before anything is scored."""
    for text in sorted(set(references)):
        ids = tokens.encode(text)
        wrong = [
            index for index in ids if not 0 <= index < tokens.size or index in (tokens.blank, tokens.bos, tokens.eos)
        ]
        if wrong:
            raise UserError(
                f"the reference {text!r} encodes to {ids}: {wrong[0]} is a special id or beyond the "
                f"{tokens.size} outputs; this tokenizer does not fit this model"
            )


@functools.lru_cache(maxsize=16)
def _processor(model: bytes):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model)
