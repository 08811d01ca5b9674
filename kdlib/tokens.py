"""Text <-> token ids: the only module with normalisation, special tokens and offsets.

In the teachers' space 0 = BOS, 1 = EOS, 2 = blank, and every other id is sentencepiece's own, without any offset (an
offset spoilt the results of the original study). NeMo's blank is its last id, and it has neither BOS nor EOS. All
stored data has `Tokens.fingerprint`; before scoring, `check_round_trip` encodes and decodes every reference.
"""

import bisect
import functools
import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdlib.errors import UserError

BOS, EOS, BLANK = 0, 1, 2
WORD_START = "\u2581"  # sentencepiece's mark in a word's first piece
CHARACTER_SPACE = WORD_START  # between words, where the pieces are characters
PER_WORD = 2.0  # pieces of a word on average, at least: with one, all decoders agree and CTC has nothing to align
JOINERS = "\u200c\u200d"  # invisible, but part of words in Persian and the scripts of India


@dataclass(frozen=True)
class Tokens:
    """A sentencepiece model and its special ids."""

    model: bytes
    blank: int
    size: int  # of the output layer, special tokens included
    bos: int | None = None
    eos: int | None = None

    @classmethod
    def for_teachers(cls, path: Path, size: int | None = None) -> "Tokens":
        """BOS 0, EOS 1, blank 2, over a sentencepiece model; `size` may be larger than its number of pieces."""
        model = _read_model(path)
        return cls(model, BLANK, size or _processor(model).get_piece_size(), BOS, EOS)

    @classmethod
    def of_file(cls, path: Path) -> "Tokens":
        """Load any sentencepiece model: in the teachers' space if its first three ids are not text, else in NeMo's."""
        model = _read_model(path)
        processor = _processor(model)
        special = all(processor.is_control(index) or processor.is_unknown(index) for index in (BOS, EOS, BLANK))
        return cls.for_teachers(path) if special else cls.for_nemo(model)

    @classmethod
    def for_nemo(cls, model: bytes) -> "Tokens":
        """NeMo's space: sentencepiece's ids, then the blank; no BOS, no EOS."""
        pieces = _processor(model).get_piece_size()
        return cls(model, pieces, pieces + 1)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the pieces and the special ids: equal only if all ids have the same meaning."""
        contract = f"{self.blank},{self.size},{self.bos},{self.eos}".encode()
        return hashlib.sha256(self.model + contract).hexdigest()[:16]

    @functools.cached_property
    def pieces(self) -> list[str]:
        """The piece of each sentencepiece id."""
        processor = _processor(self.model)
        return [processor.id_to_piece(index) for index in range(processor.get_piece_size())]

    @functools.cached_property
    def cased(self) -> str:
        """Case of the pieces: 'upper', 'lower' or 'mixed'."""
        text = "".join(piece for piece in self.pieces if not piece.startswith("<"))
        return "upper" if text == text.upper() else "lower" if text == text.lower() else "mixed"

    @functools.cached_property
    def unknown(self) -> int | None:
        """The id of all other words, where the pieces are whole words (`train_words`)."""
        index = _processor(self.model).unk_id()
        texts = [piece for place, piece in enumerate(self.pieces) if place > BLANK and place != index]
        return index if index > BLANK and all(piece.startswith(WORD_START) for piece in texts) else None

    def encode(self, text: str) -> list[int]:
        """Encode a text; characters outside the tokenizer are refused, words outside a vocabulary of words unknown."""
        normal = normalise(text)
        if self.unknown is not None:
            return [index for word in normal.split() for index in _processor(self.model).encode(self._case(word))]
        ids = _processor(self.model).encode(self._case(normal))
        if self.decode(ids) != normal:
            raise UserError(self._encoding_error(normal))
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids into normalised text; special ids and ids beyond the pieces are skipped."""
        return self.decode_all([ids])[0]

    def decode_all(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """Decode every row of ids; see `decode`."""
        text_ids = self._text_ids
        kept = [[index for index in map(int, ids) if index in text_ids] for ids in rows]
        return [normalise(text) for text in _processor(self.model).decode(kept)] if kept else []

    @functools.cached_property
    def _text_ids(self) -> frozenset[int]:
        """The ids of pieces of text."""
        return frozenset(range(len(self.pieces))) - {self.blank, self.bos, self.eos}

    def _case(self, text: str) -> str:
        return {"upper": text.upper(), "lower": text.lower(), "mixed": text}[self.cased]

    def _encoding_error(self, text: str) -> str:
        """Error message for a text with characters outside the tokenizer, with advice."""
        ids = {char: _processor(self.model).encode(self._case(char)) for char in set(text) - {" "}}
        bad = sorted(char for char in ids if self.decode(ids[char]) != char)
        named = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in bad) or "it as a whole"
        advice = "correct it, or choose another model"
        if bad == ["-"]:
            advice = "write hyphens: space in the recipe"
        elif bad:
            advice = (
                f'correct it (in the recipe, for all transcripts: replace: {{{json.dumps(bad[0])}: ""}}), '
                "or choose a model that has it (pretrained: from_corpus trains one)"
            )
        return f"the tokenizer cannot encode {named} of the text {text!r}; {advice}"


def places_of_ids(found: int, tokens: "Tokens", blank: int, bos: int | None, eos: int | None, source: str) -> list[int]:
    """For each of our ids the id that other code, with so many outputs, has for it; a blank of -1 is the last.

    >>> tokens = Tokens(b"", 2, 6, 0, 1)
    >>> places_of_ids(6, tokens, 0, 1, 2, "SpeechBrain"), places_of_ids(7, tokens, -1, None, None, "NeMo")
    ([1, 2, 0, 3, 4, 5], [0, 1, 6, 3, 4, 5])
    """
    size, beside = tokens.size, blank == -1  # the blank beside the pieces
    blank = found - 1 if beside else blank
    if found not in (size, size + beside):
        raise UserError(
            f"{source}: {found:,} tokens, but the recipe's tokenizer has {size:,} (tokens.source, tokens.size): the "
            "same id would be another token; name the tokenizer of this teacher, or leave it out with teacher: "
            "{without: [...]}"
        )
    places = list(range(size))
    for ours, theirs in ((BOS, bos), (EOS, eos), (BLANK, blank)):
        if theirs is None:
            continue
        if theirs >= found:
            raise UserError(f"{source}: the special id {theirs} is beyond its {found:,} tokens")
        if theirs in places:
            places[places.index(theirs)] = places[ours]
        places[ours] = theirs
    return places


def normalise(text: str, hyphens: str = "keep", punctuation: str = "keep") -> str:
    """Normalise a text for all comparisons: composed characters, upper case, straight quotes, single spaces.

    With `hyphens="space"` a hyphen is a space; with `punctuation="drop"` marks other than apostrophes and hyphens go.

    >>> normalise(" it\u2019s  a CAFE\u0301 ")
    "IT'S A CAFÉ"
    >>> normalise("Well, well-known!", punctuation="drop")
    'WELL WELL-KNOWN'
    """
    if text.isascii() and (hyphens, punctuation) == ("keep", "keep"):  # the fast path
        return " ".join(text.upper().split())
    text = unicodedata.normalize("NFC", text).replace("\u2019", "'").replace("\u2010", "-").replace("\u2011", "-")
    text = "".join(char for char in text if char in JOINERS or unicodedata.category(char) != "Cf")  # Cf: invisible
    if hyphens == "space":
        text = text.replace("-", " ")
    if punctuation == "drop":
        text = "".join(" " if is_punctuation(char) else char for char in text)
    return " ".join(text.upper().split())


def is_punctuation(char: str) -> bool:
    """True if a character is punctuation or a symbol, and neither an apostrophe nor a hyphen."""
    return char not in "'-" and unicodedata.category(char)[0] in "PS"


def train_tokenizer(
    texts: Iterable[str],
    pieces: int,
    folder: Path,
    *,
    lower: bool = False,
    characters: str = "",
    per_word: float = 0.0,
    setting: str = "pretraining: {pieces: %d}",
) -> Path:
    """Train a byte-pair model on texts; return `folder/tokenizer.model`. Each text counts once.

    It can encode the texts and all of `characters`. There are fewer than `pieces` where the texts yield no more, and
    where their words would have fewer than `per_word` pieces on average: merging ends before that. `setting` is the
    recipe's setting of the number, for error messages.
    """
    sentences = sorted({normalise(text).lower() if lower else normalise(text) for text in texts})
    required = set(characters.lower() if lower else characters) - {" "}
    needed = len((set("".join(sentences)) - {" "}) | required) + 4  # and <unk> <s> </s> ▁
    if pieces < needed:
        raise UserError(
            f"no tokenizer of {pieces} pieces can encode the {needed - 4} different characters of these "
            f"{len(sentences)} texts; write at least {needed} in the recipe ({setting % (2 * needed)})"
        )
    train = functools.partial(_train, sentences, "".join(sorted(required)))

    def too_few(model: bytes) -> bool:
        return pieces_per_word(Tokens.for_nemo(model), sentences) < per_word

    model, smaller = train(pieces), range(needed, pieces)
    if smaller and per_word and too_few(model):
        first_bad = bisect.bisect_left(smaller, True, key=lambda size: too_few(train(size)))
        model = train(smaller[max(0, first_bad - 1)])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    path.write_bytes(model)
    return path


def train_words(texts: Iterable[str], folder: Path) -> Path:
    """Make a vocabulary of the whole words of texts; return `folder/tokenizer.model`.

    Its ids: 0 BOS, 1 EOS, 2 blank, 3 every other word, then the words, the most frequent first.
    """
    ids = {"bos_id": BOS, "eos_id": EOS, "pad_id": BLANK, "unk_id": BLANK + 1}
    sentences = [normalise(text) for text in texts]
    size = len({word for sentence in sentences for word in sentence.split()}) + len(ids)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    path.write_bytes(_train(sentences, "", size, model_type="word", **ids))
    return path


def train_characters(characters: Iterable[str], folder: Path) -> Path:
    """Make a vocabulary of single characters and the space between words; return `folder/tokenizer.model`.

    Its ids: 0 BOS, 1 EOS, 2 blank, 3 unknown, then the characters. No mark stands before a text's first character.
    """
    ids = {"bos_id": BOS, "eos_id": EOS, "pad_id": BLANK, "unk_id": BLANK + 1}
    letters = sorted(set(characters))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    size = len(letters) + len(ids) + 1
    options = {"model_type": "char", "add_dummy_prefix": False, **ids}
    path.write_bytes(_train([" ".join(letters)], "".join(letters), size, **options))
    return path


def pieces_per_word(tokens: Tokens, texts: Iterable[str]) -> float:
    """Mean number of pieces of the words of texts, each word once; not a number without a word of two letters.

    Words of one letter have one piece in any tokenizer, and are left out. The bare mark of a word's start is no piece.
    """
    words = {tokens._case(word) for text in texts for word in normalise(text).split() if len(word) > 1}
    rows = _processor(tokens.model).encode(sorted(words), out_type=str)
    return sum(piece != WORD_START for row in rows for piece in row) / len(rows) if rows else math.nan


def _train(sentences: Sequence[str], required: str, pieces: int, **options: object) -> bytes:
    """Train a byte-pair model, or that of `options`, on sentences with sentencepiece."""
    import io

    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=pieces,
            character_coverage=1.0,
            required_chars=required,
            hard_vocab_limit=False,
            normalization_rule_name="identity",  # only `normalise` is used; the default would change Thai, Persian, ...
            minloglevel=2,
            num_threads=1,
            **{"model_type": "bpe"} | options,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"no tokenizer of {pieces} pieces can be trained on these {len(sentences)} texts ({reason}); "
            "change the number of pieces in the recipe"
        ) from None
    return model.getvalue()


def check_round_trip(tokens: Tokens, references: Iterable[str]) -> None:
    """Check before scoring that every reference is encoded and decoded correctly, with all ids in range."""
    special = (tokens.blank, tokens.bos, tokens.eos)
    for text in sorted(set(references)):
        ids = tokens.encode(text)
        wrong = [index for index in ids if not 0 <= index < tokens.size or index in special]
        if wrong:
            raise UserError(
                f"the reference {text!r} encodes to {ids}: {wrong[0]} is a special id or beyond the "
                f"{tokens.size} outputs; this tokenizer does not fit this model"
            )


def _read_model(path: Path) -> bytes:
    """The bytes of a sentencepiece model, if the file is one."""
    try:
        model = path.read_bytes()
        if not model or not _processor(model).get_piece_size():
            raise RuntimeError
    except (OSError, RuntimeError):
        raise UserError(f"{path} is not a sentencepiece model, or damaged; restore it, or name another file") from None
    return model


@functools.lru_cache(maxsize=16)
def _processor(model: bytes):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model)
