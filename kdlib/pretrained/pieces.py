"""The shared `tokens/` stage: the one sentencepiece model of the teachers and students of a recipe.

It is the pretrained model's own, so that a student keeps its head (`remap_head` moves the blank to its id); or trained
on the closed lexicon; or a file. There may be more outputs than pieces: the rest is never used.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus import prepare
from kdlib.errors import UserError
from kdlib.io import resolve_path
from kdlib.models.nemo_files import read_tokenizer
from kdlib.params import Params
from kdlib.pretrained.model import pretrained_model
from kdlib.stage import produce
from kdlib.tokens import BLANK, Tokens, check_round_trip, train_tokenizer

if TYPE_CHECKING:
    import torch

    from kdlib.models.hybrid import Hybrid

TOKENS_CODE = ("pretrained/pieces.py", "tokens.py")
FILE = "tokenizer.model"


def load_tokens(params: Params) -> Tokens:
    """The recipe's tokens; the stage is run first if needed."""
    return Tokens.for_teachers(tokens_folder(params) / FILE, params.tokens.size)


def tokens_folder(params: Params) -> Path:
    """The stage's folder."""
    source = params.tokens.source
    own = source not in ("pretrained", "corpus")
    if own and not resolve_path(source).is_file():
        raise UserError(
            f"tokens.source: there is no file {resolve_path(source)}; correct the path of the sentencepiece model in "
            "the recipe, or write tokens: {source: corpus}"
        )
    inputs = [resolve_path(source)] if own else [pretrained_model(params)] if source == "pretrained" else []
    return produce(
        (params.label_folder if tokens_per_fold(params) else params.folder) / "tokens",
        lambda partial: _build(partial, params),
        what="tokens",
        parameters=params.tokens.model_dump(mode="json"),
        inputs=[prepare.corpus_folder(params), *inputs],
        code=TOKENS_CODE,
    )


def tokens_per_fold(params: Params) -> bool:
    """Return whether each fold has its own pieces: those of a model that was trained on its speakers."""
    return params.tokens.source == "pretrained" and params.pretrained == "from_corpus"


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


def _build(partial: Path, params: Params) -> None:
    corpus = prepare.load(params.with_all_labels)  # for its word list; transcripts are not used
    words, source = prepare.lexicon(params), params.tokens.source
    spellings = {text for texts in prepare.spellings(params).values() for text in texts}
    if source == "pretrained":
        (partial / FILE).write_bytes(read_tokenizer(pretrained_model(params)))
    elif source == "corpus":
        characters = "".join([*sorted(spellings), *corpus.lexicon])
        setting = "tokens: {source: corpus, pieces: %d}"
        trained = train_tokenizer(words, params.tokens.pieces, partial / "made", characters=characters, setting=setting)
        trained.rename(partial / FILE)
        (partial / "made").rmdir()
    else:
        shutil.copyfile(resolve_path(source), partial / FILE)
    try:
        pieces = len(Tokens.for_teachers(partial / FILE).pieces)
    except RuntimeError:  # of sentencepiece
        raise UserError(
            f"tokens.source: {source} is not a sentencepiece model; name the .model file written by sentencepiece"
        ) from None
    if params.tokens.size and params.tokens.size < pieces:
        raise UserError(
            f"tokens.size is {params.tokens.size}, but the tokenizer has {pieces} pieces; write {pieces} or more"
        )
    try:
        check_round_trip(Tokens.for_teachers(partial / FILE, params.tokens.size), {*spellings, *corpus.lexicon})
    except UserError as error:
        raise UserError(
            f"tokens.source {source!r} does not fit the teachers, who need the ids 0, 1 and 2 for BOS, EOS and blank: "
            f"{error}; write tokens: {{source: corpus}}"
        ) from None
    print(f"tokens: {pieces} pieces ({source}), {params.tokens.size or pieces} outputs")
