"""The shared `tokens/` stage: the one piece set that teachers and students of a recipe write in.

It is the pretrained model's own, so that a student keeps its head (`moved_head` puts the blank where it belongs); or
trained on the closed lexicon; or given as a file. There may be more outputs than pieces: the rest is never used.
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
    """The recipe's tokens, made or found."""
    return Tokens.for_teachers(tokens_folder(params) / FILE, params.tokens.size)


def tokens_folder(params: Params) -> Path:
    """The stage's folder."""
    given = params.tokens.source
    own = given not in ("pretrained", "corpus")
    if own and not resolve_path(given).is_file():
        raise UserError(
            f"tokens.source: there is no file {resolve_path(given)}; correct the path of the sentencepiece model in the "
            "recipe, or write tokens: {source: corpus}"
        )
    inputs = [resolve_path(given)] if own else [pretrained_model(params)] if given == "pretrained" else []
    return produce(
        (params.label_folder if tokens_per_fold(params) else params.folder) / "tokens",
        lambda partial: _build(partial, params),
        what="tokens",
        parameters=params.tokens.model_dump(mode="json"),
        inputs=[prepare.corpus_folder(params), *inputs],
        code=TOKENS_CODE,
    )


def tokens_per_fold(params: Params) -> bool:
    """Whether each fold has pieces of its own: those of a model that was trained on its speakers."""
    return params.tokens.source == "pretrained" and params.pretrained == "from_corpus"


def remap_head(weight: "torch.Tensor", bias: "torch.Tensor", tokens: Tokens) -> "tuple[torch.Tensor, torch.Tensor]":
    """A pretrained CTC head (blank last) over the same pieces, with the blank at its id and unused tokens silent."""
    pieces = len(tokens.pieces)
    wide = weight.new_zeros(tokens.size, weight.shape[1])
    low = bias.new_full((tokens.size,), float(bias.min()) - 10)
    wide[:pieces], low[:pieces] = weight[:pieces], bias[:pieces]
    wide[BLANK], low[BLANK] = weight[pieces], bias[pieces]
    return wide, low


def copy_head(model: "Hybrid", source: "torch.nn.Module", tokens: Tokens) -> bool:
    """Give a model the CTC head of the NeMo model that it was made of, if they write in the same pieces."""
    if source.tokenizer.tokenizer.serialized_model_proto() != tokens.model:
        return False
    head = source.decoder.decoder_layers[0]
    weight, bias = remap_head(head.weight.detach()[:, :, 0], head.bias.detach(), tokens)
    model.ctc_head.load_state_dict({"weight": weight, "bias": bias})
    return True


def _build(partial: Path, params: Params) -> None:
    corpus, words = prepare.load(params.with_all_labels), prepare.lexicon(params)  # words, not who said which
    given = params.tokens.source
    spelt = {text for texts in prepare.spellings(params).values() for text in texts}
    if given == "pretrained":
        (partial / FILE).write_bytes(read_tokenizer(pretrained_model(params)))
    elif given == "corpus":
        characters = "".join([*sorted(spelt), *corpus.lexicon])
        setting = "tokens: {source: corpus, pieces: %d}"
        trained = train_tokenizer(words, params.tokens.pieces, partial / "made", characters=characters, setting=setting)
        trained.rename(partial / FILE)
        (partial / "made").rmdir()
    else:
        shutil.copyfile(resolve_path(given), partial / FILE)
    try:
        pieces = len(Tokens.for_teachers(partial / FILE).pieces)
    except RuntimeError:  # of sentencepiece
        raise UserError(
            f"tokens.source: {given} is no sentencepiece model; name the .model file that sentencepiece has written"
        ) from None
    if params.tokens.size and params.tokens.size < pieces:
        raise UserError(
            f"tokens.size is {params.tokens.size}, but the tokenizer has {pieces} pieces; write {pieces} or more"
        )
    try:
        check_round_trip(Tokens.for_teachers(partial / FILE, params.tokens.size), {*spelt, *corpus.lexicon})
    except UserError as error:
        raise UserError(
            f"tokens.source {given!r} cannot serve the teachers, who need the ids 0, 1 and 2 for BOS, EOS and blank: "
            f"{error}; write tokens: {{source: corpus}}"
        ) from None
    print(f"tokens: {pieces} pieces ({given}), {params.tokens.size or pieces} outputs")
