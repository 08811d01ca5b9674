"""Export a student's encoder and CTC head to a standard `.nemo` file, with which plain NeMo transcribes.

NeMo has neither BOS nor EOS, and its blank is last: the head's rows are moved, and outputs without a
piece are left out.
"""

import tempfile
from pathlib import Path

import torch

from kdlib.errors import UserError
from kdlib.models import hybrid
from kdlib.models.encoder_nemo import NeMoEncoder
from kdlib.models.nemo_files import assemble
from kdlib.tokens import BLANK, BOS, EOS, Tokens


def export(folder: Path, out: Path) -> Path:
    """Write the student of a folder to a `.nemo` file, without its attention decoder."""
    model, tokens, _ = hybrid.load(folder)
    if not isinstance(model.encoder, NeMoEncoder):
        kind = type(model.encoder).__name__
        raise UserError(f"{folder} has a {kind} as encoder, for which NeMo has no class; export a student with NeMo's")
    if model.decoder is not None:
        print(f"{folder.name}: its attention decoder is left out; the exported model decodes by CTC")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "tokenizer.model"
        path.write_bytes(tokens.model)
        nemo = assemble(path, model.encoder.config)
        for part in ("preprocessor", "encoder"):
            getattr(nemo, part).load_state_dict(getattr(model.encoder, part).state_dict())
        weight, bias = _nemo_head(model.ctc_head.weight.detach(), model.ctc_head.bias.detach(), tokens)
        nemo.decoder.decoder_layers[0].load_state_dict({"weight": weight[..., None], "bias": bias})
        nemo.eval()
        out.parent.mkdir(parents=True, exist_ok=True)
        nemo.save_to(str(out))
    return out


def _nemo_head(weight: torch.Tensor, bias: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Reorder the rows of a head [V, D] for NeMo: pieces, of which those at special ids never win, then the blank."""
    pieces = len(tokens.pieces)
    rows, biases = torch.cat([weight[:pieces], weight[BLANK, None]]), torch.cat([bias[:pieces], bias[BLANK, None]])
    specials = [index for index in (BOS, EOS, BLANK) if index < pieces]
    rows[specials], biases[specials] = 0.0, float(bias.min()) - 100.0
    return rows, biases
