"""The shared `tokens/` stage: the one sentencepiece model of the teachers and students of a recipe.

It is the pretrained model's own, so that a student keeps its head (`remap_head` moves the blank to its id); or trained
on the closed lexicon; or a file. There may be more outputs than pieces: the rest is never used.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.errors import UserError
from kdlib.io import resolve_path
from kdlib.models.nemo_files import read_tokenizer
from kdlib.settings.pretrained import TokenSettings
from kdlib.tokens import BLANK, Tokens, check_round_trip, train_tokenizer

if TYPE_CHECKING:
    import torch

    from kdlib.models.hybrid import Hybrid

FILE = "tokenizer.model"


def own_model(settings: TokenSettings) -> Path | None:
    """The sentencepiece model that a recipe names itself."""
    if settings.source in ("pretrained", "corpus"):
        return None
    path = resolve_path(settings.source)
    if not path.is_file():
        raise UserError(
            f"tokens.source: there is no file {path}; correct the path of the sentencepiece model in the recipe, or "
            "write tokens: {source: corpus}"
        )
    return path


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
        trained = train_tokenizer(words, settings.pieces, partial / "made", characters=characters, setting=setting)
        trained.rename(partial / FILE)
        (partial / "made").rmdir()
    else:
        shutil.copyfile(own_model(settings), partial / FILE)
    try:
        pieces = len(Tokens.for_teachers(partial / FILE).pieces)
    except RuntimeError:  # of sentencepiece
        raise UserError(
            f"tokens.source: {source} is not a sentencepiece model; name the .model file written by sentencepiece"
        ) from None
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
    print(f"tokens: {pieces} pieces ({source}), {settings.size or pieces} outputs")


def remap_head(weight: "torch.Tensor", bias: "torch.Tensor", tokens: Tokens) -> "tuple[torch.Tensor, torch.Tensor]":
    """Map a pretrained CTC head (blank last) to `tokens`: the blank at its id, unused tokens with the lowest bias."""
    pieces = len(tokens.pieces)
    wide = weight.new_zeros(tokens.size, weight.shape[1])
    low = bias.new_full((tokens.size,), float(bias.min()) - 10)
    wide[:pieces], low[:pieces] = weight[:pieces], bias[:pieces]
    wide[BLANK], low[BLANK] = weight[pieces], bias[pieces]
    return wide, low


def copy_head(model: "Hybrid", source: "torch.nn.Module", tokens: Tokens) -> bool:
    """Copy the CTC head of the NeMo model that a model starts from; returns False if their pieces differ."""
    if source.tokenizer.tokenizer.serialized_model_proto() != tokens.model:
        return False
    head = source.decoder.decoder_layers[0]
    weight, bias = remap_head(head.weight.detach()[:, :, 0], head.bias.detach(), tokens)
    model.ctc_head.load_state_dict({"weight": weight, "bias": bias})
    return True
