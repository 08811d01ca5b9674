"""The shared `tokens/` stage: the one sentencepiece model of the teachers and students of a recipe.

It is the pretrained model's own, so that a student keeps its head (`hybrid.remap_head` moves the blank to its id); or
trained on the closed lexicon, with so few pieces that its words have two on average; or the whole words of a fold's
training speech; or a file. There may be more outputs than pieces: the rest is never used.
"""

import math
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from kdlib.console import report, warn
from kdlib.errors import UserError
from kdlib.io import read_json, resolve_path
from kdlib.models.nemo_files import read_tokenizer
from kdlib.settings.pretrained import TokenSettings
from kdlib.tokens import (
    PER_WORD,
    Tokens,
    check_round_trip,
    pieces_per_word,
    train_characters,
    train_tokenizer,
    train_words,
)

FILE = "tokenizer.model"
WORDS = "words"  # source of whole words
CHARACTERS = "vocab.json"  # in the folder of a Hugging Face CTC model: its characters


def own_model(settings: TokenSettings) -> Path | None:
    """The sentencepiece model that a recipe names itself."""
    if settings.source in ("pretrained", "corpus", WORDS):
        return None
    path = resolve_path(settings.source)
    path = path / CHARACTERS if (path / CHARACTERS).is_file() else path
    if not path.is_file():
        raise UserError(
            f"tokens.source: there is no file {path}; correct the path of the sentencepiece model in the recipe, or "
            "write tokens: {source: corpus}"
        )
    return path


def build_words(partial: Path, train: Sequence[str], texts: Collection[str]) -> None:
    """Write the vocabulary of the words of training texts, and report those of all `texts` that it does not have."""
    tokens = Tokens.for_teachers(train_words(train, partial))
    words = {word for text in texts for word in text.split()}
    unknown = sorted(word for word in words if tokens.unknown in tokens.encode(word))
    report(f"tokens: {len(tokens.pieces) - tokens.unknown - 1} words of the training texts, and one for all others")
    if unknown:
        report(f"tokens: {len(unknown)} words are in no training text, and cannot be recognised: {shown(unknown)}")


def shown(words: Sequence[str], count: int = 8) -> str:
    """The first words of a list."""
    return ", ".join(words[:count]) + (", ..." if len(words) > count else "")


def build(
    partial: Path, settings: TokenSettings, spellings: dict[str, list[str]], texts: list[str], pretrained: Path | None
) -> None:
    """Write the tokenizer; it must encode all spellings of the lexicon and the corpus's `texts`."""
    source, forms = settings.source, {text for variants in spellings.values() for text in variants}
    if source == "pretrained":
        (partial / FILE).write_bytes(read_tokenizer(pretrained))
    elif source == "corpus":
        characters, words = "".join([*sorted(forms), *texts]), list(spellings)
        setting = "tokens: {source: corpus, pieces: %d}"
        how = {"characters": characters, "per_word": PER_WORD, "setting": setting}
        trained = train_tokenizer(words, settings.pieces, partial / "made", **how)
        trained.rename(partial / FILE)
        (partial / "made").rmdir()
    elif (own := own_model(settings)).name == CHARACTERS:
        letters = [piece for piece in read_json(own) if len(piece) == 1 and piece != "|"]  # it stands between words
        train_characters(letters, partial)
    else:
        shutil.copyfile(own, partial / FILE)
    try:
        tokens = Tokens.for_teachers(partial / FILE)
    except UserError:
        raise UserError(
            f"tokens.source: {source} is not a sentencepiece model; name the .model file written by sentencepiece"
        ) from None
    pieces = len(tokens.pieces)
    if settings.size and settings.size < pieces:
        raise UserError(
            f"tokens.size is {settings.size}, but the tokenizer has {pieces} pieces; write {pieces} or more"
        )
    try:
        check_round_trip(Tokens.for_teachers(partial / FILE, settings.size), {*forms, *texts})
    except UserError as error:
        raise UserError(
            f"tokens.source {source!r} does not fit the teachers, who need the ids 0, 1 and 2 for BOS, EOS and blank: "
            f"{error}; write tokens: {{source: corpus}}"
        ) from None
    per_word = pieces_per_word(tokens, spellings)
    shown = "" if math.isnan(per_word) else f", {per_word:.1f} per word of the lexicon"
    report(f"tokens: {pieces} pieces ({source}){shown}, {settings.size or pieces} outputs")
    if per_word < PER_WORD:
        warn(f"tokens: {few_pieces(per_word)}")


def few_pieces(per_word: float) -> str:
    """What too few pieces per word do, and what to change."""
    return (
        f"words have {per_word:.1f} pieces on average, fewer than {PER_WORD:g}: where a word is one piece, greedy "
        "decoding, closed lexicon and beam search give the same, and CTC has no timing to learn; write tokens: "
        "{source: corpus}, which cuts words into more pieces"
    )
