"""A student's encoder and CTC head as a standard `.nemo` file, which plain NeMo restores and transcribes with.

NeMo knows neither BOS nor EOS and has its blank last: the head's rows are moved, and outputs beyond the pieces, which
no piece has, are left out. `python -m kdlib.models.export STUDENT OUT.nemo`
"""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.errors import UserError
from kdlib.models.nemo_files import assemble
from kdlib.tokens import BLANK, BOS, EOS, Tokens

if TYPE_CHECKING:
    import torch


def export(folder: Path, out: Path) -> Path:
    """Write the student in a folder to a `.nemo` file. A decoder, where it has one, stays behind."""
    from kdlib.models import hybrid
    from kdlib.models.encoder_nemo import NeMoEncoder

    model, tokens, _ = hybrid.load(folder)
    if not isinstance(model.encoder, NeMoEncoder):
        raise UserError(f"{folder} holds a SpeechBrain encoder, which NeMo has no class for; export a NeMo student")
    if model.decoder is not None:
        print(f"{folder.name}: its attention decoder is left out; what is exported decodes by CTC")
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "tokenizer.model"
        path.write_bytes(tokens.model)
        whole = assemble(path, model.encoder.config)
        for part in ("preprocessor", "encoder"):
            getattr(whole, part).load_state_dict(getattr(model.encoder, part).state_dict())
        weight, bias = _head(model.ctc_head.weight.detach(), model.ctc_head.bias.detach(), tokens)
        whole.decoder.decoder_layers[0].load_state_dict({"weight": weight[..., None], "bias": bias})
        whole.eval()
        out.parent.mkdir(parents=True, exist_ok=True)
        whole.save_to(str(out))
    return out


def _head(weight: "torch.Tensor", bias: "torch.Tensor", tokens: Tokens) -> "tuple[torch.Tensor, torch.Tensor]":
    """Rows of a head [V, D] in NeMo's order: the pieces, of which those in the special ids' places never win, blank."""
    import torch

    pieces = len(tokens.pieces)
    wide, high = torch.cat([weight[:pieces], weight[BLANK, None]]), torch.cat([bias[:pieces], bias[BLANK, None]])
    specials = [one for one in (BOS, EOS, BLANK) if one < pieces]
    wide[specials], high[specials] = 0.0, float(bias.min()) - 100.0
    return wide, high


if __name__ == "__main__":
    try:
        if len(sys.argv) != 3:
            raise UserError(
                "expected the folder of a student and the name of a .nemo file: make export CHECKPOINT=... NEMO=..."
            )
        made = export(Path(sys.argv[1]), Path(sys.argv[2]))
        print(f"{made}: {made.stat().st_size / 1e6:.1f} MB")
    except UserError as error:
        sys.exit(f"\n{error}\n")
