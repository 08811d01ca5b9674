"""Teachers as they lie: models that other code has trained, as models of kdlib.

    <name>/**/hyperparams.yaml, CKPT+*   a SpeechBrain experiment of a Transformer recipe for LibriSpeech
    <name>.nemo                          a CTC model of NeMo's
    <name>/config.json                   a Wav2Vec2ForCTC (HubertForCTC, WavLMForCTC) of Hugging Face's

Nothing in these files is executed: of a hyperparams.yaml the values that are needed are read (`hyperparams.py`),
weights are loaded as tensors alone, and the classes are those of kdlib, SpeechBrain, NeMo and torchaudio.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from kdlib.corpus.manifest import Corpus
from kdlib.errors import UserError
from kdlib.io import resolve_path
from kdlib.models import hybrid
from kdlib.models.decoder import Heads
from kdlib.models.encoder_nemo import NeMoEncoder
from kdlib.models.encoder_speechbrain import SpeechBrainASR
from kdlib.models.encoder_wav2vec2 import from_checkpoint
from kdlib.settings.teacher import Teacher
from kdlib.teachers.hyperparams import Hyperparams
from kdlib.teachers.teacher_sets import by_speaker, trained_on
from kdlib.tokens import BLANK, CHARACTER_SPACE, Tokens, places_of_ids

MODULES = ("CNN", "Transformer", "seq_lin", "ctc_lin")  # of the recipes' `model`, in order
HUGGING_FACE = ("Wav2Vec2ForCTC", "HubertForCTC", "WavLMForCTC")
HUGGING_FACE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there counts
NORMS = ("global", "sentence")


@dataclass(frozen=True)
class Checkpoint:
    """A model of other code: what it is, where it lies, and whom it was trained on."""

    kind: str  # speechbrain, nemo_file or hugging_face
    path: Path  # of hyperparams.yaml, of the .nemo file, or of the folder
    train_speakers: tuple[str, ...]

    @property
    def files(self) -> list[Path]:
        """The files that it is made of, as stages take them for inputs."""
        if self.kind == "nemo_file":
            return [self.path]
        if self.kind == "hugging_face":
            names = "config.json", "vocab.json", *HUGGING_FACE_WEIGHTS
            return [one for name in names if (one := self.path / name).is_file()]
        folder = best_folder(self.path)
        return [self.path, folder / "model.ckpt", *(one for one in [folder / "normalizer.ckpt"] if one.is_file())]


def find_teachers(settings: Teacher, corpus: Corpus) -> dict[str, Checkpoint]:
    """The models in a recipe's folder: by their speaker, else by the name of the file or folder of each."""
    folder = resolve_path(settings.folder or "")
    if not folder.is_dir():
        raise UserError(f"teacher.folder: there is no folder {folder}; name the one that has a model per teacher")
    found = {}
    for path in sorted(folder.iterdir()):
        kind, source = _kind_of(path)
        name = path.stem if kind == "nemo_file" else path.name
        if kind and name not in settings.without:
            found[name] = Checkpoint(kind, source, trained_on(name, settings, corpus))
    if not found:
        raise UserError(
            f"teacher.folder: no models in {folder}; expected <name>/.../hyperparams.yaml with CKPT+... (SpeechBrain), "
            "<name>.nemo, or <name>/config.json with weights (Hugging Face)"
        )
    return by_speaker(found)


def convert(partial: Path, checkpoint: Checkpoint, tokens: Tokens) -> None:
    """Write a model of other code as one of kdlib, with the recipe's tokens."""
    make = {"speechbrain": _of_speechbrain, "nemo_file": _of_nemo, "hugging_face": _of_hugging_face}[checkpoint.kind]
    model = make(checkpoint.path, tokens)
    heads = ["ctc", *(["decoder"] if model.heads.layers else [])]
    about = {"train_speakers": list(checkpoint.train_speakers), "heads_trained": heads}
    hybrid.save(model.eval(), tokens, partial, **about, source=str(checkpoint.path))


def _kind_of(path: Path) -> tuple[str, Path]:
    """What a file or folder is, and where its main file lies; nothing for what is no model."""
    if path.suffix == ".nemo" and path.is_file():
        return "nemo_file", path
    if not path.is_dir():
        return "", path
    if (path / "config.json").is_file():
        return "hugging_face", path
    experiments = [one for depth in ("", "*/", "*/*/") for one in sorted(path.glob(f"{depth}hyperparams.yaml"))]
    if len(experiments) > 1:
        names = ", ".join(str(one.parent.relative_to(path)) for one in experiments)
        raise UserError(f"{path}: several experiments ({names}); keep one for each teacher, or name a folder above one")
    return ("speechbrain", experiments[0]) if experiments else ("", path)


def best_folder(hyperparams: Path) -> Path:
    """The folder of an experiment's best checkpoint: by WER, CER or accuracy if they are noted, else the last one."""
    root = hyperparams.parent
    folders = [path.parent for depth in ("", "*/", "*/*/") for path in root.glob(f"{depth}CKPT+*/model.ckpt")]
    if not folders:
        raise UserError(f"{root}: no checkpoint of SpeechBrain in it (CKPT+.../model.ckpt); was the training ended?")
    noted = {folder: _noted(folder) for folder in folders}
    for measure, sign in (("WER", 1), ("CER", 1), ("ACC", -1)):
        if all(measure in notes for notes in noted.values()):
            return min(folders, key=lambda folder: (sign * noted[folder][measure], folder.name))
    return max(folders, key=lambda folder: (noted[folder].get("unixtime", 0), folder.name))


def _noted(folder: Path) -> dict:
    try:
        content = yaml.safe_load((folder / "CKPT.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return {}
    return {key: value for key, value in (content or {}).items() if isinstance(value, int | float)}


def _of_speechbrain(path: Path, tokens: Tokens) -> hybrid.Hybrid:
    given, folder = Hyperparams(path), best_folder(path)
    config = _config(given)
    size = _linear_size(given, "ctc_lin", config["transformer"])
    places = places_of_ids(
        size, tokens, given.get("blank_index", 0), given.get("bos_index"), given.get("eos_index"), str(path)
    )
    _check_tokenizer(path, tokens)
    config["transformer"]["tgt_vocab"] = tokens.size
    weights = _tensors(folder / "model.ckpt")
    parts = given.order("model")
    if not parts and "model" in given.values:
        raise UserError(f"{path}: its `model` is no list of modules that it names; expected [CNN, Transformer, ...]")
    parts = parts or list(MODULES)
    missing = {"CNN", "Transformer", "ctc_lin"} - set(parts)
    if missing:
        raise UserError(f"{path}: its `model` has no {', '.join(sorted(missing))}; expected {', '.join(MODULES)}")
    by_part = {name: _under(weights, f"{place}.") for place, name in enumerate(parts)}
    layers = config["transformer"]["num_decoder_layers"] if "seq_lin" in parts else 0
    config["transformer"]["num_decoder_layers"] = layers
    shape = config["transformer"]
    heads = Heads(tokens.size, layers, shape.get("nhead", 8), shape.get("d_ffn", 2048), shape.get("dropout", 0.1))
    model = hybrid.Hybrid(SpeechBrainASR(config), heads)
    encoder, whole = model.encoder, by_part["Transformer"]
    _fill(encoder.front_end, by_part["CNN"], path)
    _fill(encoder.transformer, {name: value for name, value in whole.items() if not _of_decoder(name)}, path)
    _fill(model.ctc_head, _linear(by_part["ctc_lin"], places), path)
    if layers:
        decoder = model.decoder
        embedding = {name: value[places] for name, value in _under(whole, "custom_tgt_module.").items()}
        _fill(decoder.embed, embedding, path)
        _fill(decoder.decoder, _under(whole, "decoder."), path)
        _fill(decoder.head, _linear(by_part["seq_lin"], places), path)
    _normaliser(encoder, folder, path)
    return model


def _config(given: Hyperparams) -> dict:
    """The arguments of SpeechBrain's classes that an experiment was made with."""
    found = {}
    for name, what in (("Fbank", "features"), ("ConvolutionFrontEnd", "front_end"), ("TransformerASR", "transformer")):
        described = given.objects(name)
        if len(described) != 1:
            raise UserError(
                f"{given.path}: {len(described) or 'no'} {name} in it; expected an experiment of SpeechBrain's "
                "Transformer recipes for LibriSpeech (Fbank, ConvolutionFrontEnd, TransformerASR)"
            )
        found[what] = {key: value for key, value in described[0][1].items() if key != "input_shape"}
        code = [key for key, value in found[what].items() if "." in str(value) and isinstance(value, str)]
        if set(code) - {"activation"}:
            raise UserError(
                f"{given.path}: {name} is given code, {code[0]}: {found[what][code[0]]}; it is not supported"
            )
    norms = [arguments.get("norm_type", "global") for _, arguments in given.objects("InputNormalization")]
    norm = norms[0] if norms else "none"
    if norm not in NORMS:
        raise UserError(f"{given.path}: its features are normalised by {norm!r}; expected {' or '.join(NORMS)}")
    shape = {"num_encoder_layers": 6, "num_decoder_layers": 6, "d_model": 512} | found["transformer"]
    front_end = {"strides": [1, 2, 2]} | found["front_end"]
    return {"features": found["features"], "front_end": front_end, "transformer": shape, "norm": norm}


def _linear_size(given: Hyperparams, name: str, shape: Mapping) -> int:
    described = dict(given.objects("Linear")).get(name, {})
    size = described.get("n_neurons", shape.get("tgt_vocab"))
    if not isinstance(size, int):
        raise UserError(f"{given.path}: the number of its tokens is not a number ({size!r})")
    return size


def _check_tokenizer(path: Path, tokens: Tokens) -> None:
    """Refuse an experiment with another tokenizer than the recipe's, where it has a copy of its own."""
    for own in (path.parent / "save" / "tokenizer.ckpt", path.parent / "tokenizer.ckpt"):
        if own.is_file() and own.read_bytes() != tokens.model:
            raise UserError(
                f"{own} is another tokenizer than the recipe's: the same id would be another token; write tokens: "
                f"{{source: {own}}}, or leave the teacher out with teacher: {{without: [...]}}"
            )


def _normaliser(encoder: SpeechBrainASR, folder: Path, path: Path) -> None:
    if encoder.norm != "global":
        return
    if not (folder / "normalizer.ckpt").is_file():
        raise UserError(f"{folder}: no normalizer.ckpt, which has the mean and the deviation of its features ({path})")
    known = _tensors(folder / "normalizer.ckpt")
    if not {"glob_mean", "glob_std"} <= set(known) or known["glob_mean"].shape[-1:] != encoder.mean.shape:
        raise UserError(f"{folder / 'normalizer.ckpt'}: expected glob_mean and glob_std of {len(encoder.mean)} bands")
    encoder.mean.copy_(known["glob_mean"].reshape(-1))
    encoder.deviation.copy_(known["glob_std"].reshape(-1))


def _of_nemo(path: Path, tokens: Tokens) -> hybrid.Hybrid:
    encoder, head = NeMoEncoder.pretrained(path, tokens)
    if head is None:
        raise UserError(
            f"{path}: its tokenizer is not the recipe's: the same id would be another token; write tokens: {{source: "
            "pretrained}} with nemo_model of the same pieces, or leave the teacher out with teacher: {without: [...]}"
        )
    model = hybrid.Hybrid(encoder, Heads(tokens.size, 0))
    model.ctc_head.load_state_dict(head)
    return model


def _of_hugging_face(path: Path, tokens: Tokens) -> hybrid.Hybrid:
    """A CTC model over characters; the recipe's tokens are these characters (`tokens: {source: <folder>}`)."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    kinds = config.get("architectures") or []
    if not set(kinds) & set(HUGGING_FACE):
        raise UserError(f"{path}: a {', '.join(kinds) or 'model without a name'}; expected {', '.join(HUGGING_FACE)}")
    if config.get("add_adapter") or config.get("adapter_attn_dim"):
        raise UserError(f"{path}: a model with adapters, which is not supported; merge them, and save it again")
    vocabulary = read_vocabulary(path)
    files = [path / name for name in HUGGING_FACE_WEIGHTS if (path / name).is_file()]
    encoder = from_checkpoint(path, {"dropout": 0.1, "mix_layers": False})
    weights = _tensors(files[0])
    weight, bias = weights.get("lm_head.weight"), weights.get("lm_head.bias")
    if weight is None or len(weight) != len(vocabulary):
        found = "no lm_head" if weight is None else f"{len(weight)} outputs"
        raise UserError(f"{path}: {found}, but its vocab.json has {len(vocabulary)} tokens")
    model = hybrid.Hybrid(encoder, Heads(tokens.size, 0))
    wide, low = torch.zeros(tokens.size, encoder.width), torch.full((tokens.size,), float(bias.min()) - 10)
    missing = []
    for place, piece in enumerate(tokens.pieces):
        theirs = vocabulary.get("|" if piece == CHARACTER_SPACE else piece, vocabulary.get(piece.lower()))
        if theirs is not None and place > BLANK:
            wide[place], low[place] = weight[theirs], bias[theirs]
        elif place > BLANK and not piece.startswith("<"):
            missing.append(piece)
    if missing:
        raise UserError(
            f"{path}: its vocabulary has no {missing[0]!r} of the recipe's tokens, which are to be its characters; "
            f"write tokens: {{source: {path}}}"
        )
    pad = vocabulary.get(config.get("pad_token", "<pad>"), config.get("pad_token_id", 0))
    wide[BLANK], low[BLANK] = weight[pad], bias[pad]
    model.ctc_head.load_state_dict({"weight": wide, "bias": low})
    return model


def read_vocabulary(path: Path) -> dict[str, int]:
    """The characters of a Hugging Face CTC model, and their ids."""
    try:
        content = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{path}: no vocab.json, which says what its ids mean") from None
    if not isinstance(content, dict) or not all(isinstance(place, int) for place in content.values()):
        raise UserError(f'{path}: its vocab.json is of several languages; save that of one: {{"A": 5, ...}}')
    return {str(name): place for name, place in content.items()}


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file; nothing in it is executed."""
    from safetensors.torch import load_file

    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # of pickle, zip and safetensors, in many classes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path}: cannot be read as weights ({reason})") from None
    if not isinstance(found, Mapping):
        raise UserError(f"{path}: a {type(found).__name__}; expected weights by name")
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


def _under(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def _of_decoder(name: str) -> bool:
    return name.startswith(("decoder.", "custom_tgt_module.", "positional_encoding_decoder."))


def _linear(weights: Mapping[str, torch.Tensor], places: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights of SpeechBrain's Linear as torch's, one row per token in kdlib's order."""
    return {name.removeprefix("w."): value[places] for name, value in weights.items()}


def _fill(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Load weights into a module; missing ones, and ones of another shape, are refused. Fixed positions may differ."""
    own = module.state_dict()
    fixed = {name for name in own if name.endswith((".pe", "inv_freq"))}
    missing = [name for name in own if name not in weights and name not in fixed]
    unlike = [name for name in own if name in weights and name not in fixed and weights[name].shape != own[name].shape]
    if missing or unlike:
        name = (missing or unlike)[0]
        shape = f"has the shape {list(weights[name].shape)}, its hyperparams.yaml says {list(own[name].shape)}"
        raise UserError(f"{path}: its weights do not fit it: {name} {'is missing' if missing else shape}")
    module.load_state_dict({name: own[name] if name in fixed else weights[name] for name in own})
