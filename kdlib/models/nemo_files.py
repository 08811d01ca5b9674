"""NVIDIA NeMo's Conformer-CTC: build a small one, restore any `.nemo`, and run it.

`restore_model` serves the embedded stand-in, local files and NVIDIA's downloads. NeMo takes 6-15 s to import, so it is
imported inside functions, with its telemetry silenced first.
"""

import contextlib
import logging
import os
import socket
import tarfile
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.corpus.audio import RATE_HZ
from kdlib.errors import UserError
from kdlib.io import read_json, resolve_path
from kdlib.models import Emissions, Outputs
from kdlib.runtime import set_threads, torch_device
from kdlib.settings.pretrained import PretrainedSettings, Pretraining
from kdlib.tokens import Tokens

if TYPE_CHECKING:
    import torch

SHIPPED_MODEL = Path(__file__).parents[1] / "data" / "standin.nemo"
TRAINED = "pretrained.nemo"  # of a recipe's own
RECORD = "train_data.json"  # next to it: what it was trained on


class NeMoCTC:
    """An unchanged pretrained NeMo model, for evaluation: samples in, `Outputs` out, blank last."""

    def __init__(self, path: Path, device: str = "auto") -> None:
        set_threads()
        self.path, self.device = path, torch_device(device)
        self.model = restore_model(path)
        self.model.eval().to(self.device)
        self.tokens = Tokens.for_nemo(self.model.tokenizer.tokenizer.serialized_model_proto())
        config = self.model.cfg
        self.stride_ms = 1000 * config.preprocessor.window_stride * config.encoder.subsampling_factor

    def __call__(self, samples: "torch.Tensor", lengths: "torch.Tensor") -> Outputs:
        """Samples [B, N] and their lengths [B] -> log-probabilities over pieces and blank."""
        import torch

        with torch.inference_mode():
            features, sizes = self.model.preprocessor(
                input_signal=samples.to(self.device), length=lengths.to(self.device)
            )
            encoded, frames = self.model.encoder(audio_signal=features, length=sizes)
            logits = self.model.decoder(encoder_output=encoded)
        longest = int(frames.max())  # encodings can be a frame longer than their lengths
        return Outputs(Emissions(logits[:, :longest], frames), encoded.transpose(1, 2)[:, :longest])


def find_model(settings: PretrainedSettings) -> Path:
    """Return the `.nemo` file that a recipe names, if it needs no training; download it if necessary."""
    if settings.pretrained == "shipped":
        return SHIPPED_MODEL
    name = settings.nemo_model
    if name.endswith(".nemo"):
        path = resolve_path(name)
        if not path.is_file():
            raise UserError(
                f"nemo_model: there is no file {path}; correct the path in the recipe, name a model of "
                "NVIDIA's (nvidia/stt_en_conformer_ctc_small), or set pretrained: shipped"
            )
        return path
    return _download(name)


def training_record(model: Path, source: str, embedded: bool) -> dict | None:
    """The training speakers and words of a pretrained model; None for NVIDIA's, which have no record.

    `source` is the recipe's `pretrained`. The shipped model's speakers are the synthetic ones of the embedded corpus:
    none of any other corpus.
    """
    if source == "nemo":
        return None
    shipped = source == "shipped"
    path = SHIPPED_MODEL.with_suffix(f".{RECORD}") if shipped else model.with_name(RECORD)
    record = read_json(path)
    if shipped and not embedded:
        record |= {"speakers": [], "test_speakers": []}
    return record


def restore_model(path: Path):
    """Restore the model of a `.nemo` file on the CPU."""
    with _archive(path) as archive:
        members = archive.getnames()
    if not any(name.endswith("model_config.yaml") for name in members):
        raise UserError(
            f"{path} contains no model_config.yaml: not a .nemo file, or truncated; download or make it again"
        )
    with quiet_nemo():
        from nemo.collections.asr.models import ASRModel, EncDecCTCModelBPE
    try:
        with quiet_nemo():
            model = ASRModel.restore_from(str(path), map_location="cpu")
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} could not be restored by NeMo ({reason}); download or make it again") from error
    if not isinstance(model, EncDecCTCModelBPE):
        raise UserError(f"{path} contains a {type(model).__name__}; expected a CTC model with sentencepiece tokens")
    rate = int(model.cfg.preprocessor.sample_rate)
    if rate != RATE_HZ:
        raise UserError(f"{path} was trained on {rate} Hz; kdlib uses {RATE_HZ} Hz: choose a model of that rate")
    return model


def read_tokenizer(path: Path) -> bytes:
    """Read the sentencepiece model of a `.nemo` file, without importing NeMo."""
    with _archive(path) as archive:
        for member in archive.getmembers():
            if member.name.endswith("tokenizer.model"):
                return archive.extractfile(member).read()
    raise UserError(f"{path} contains no tokenizer.model; expected a CTC model with sentencepiece tokens")


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path) as archive:
            yield archive
    except (tarfile.TarError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise UserError(f"{path} is not a complete .nemo file ({reason}); download or make it again") from None


def build_model(tokenizer: Path, settings: Pretraining):
    """Build a small Conformer-CTC from NeMo's own classes, with random weights."""
    sizes = {"d_model": settings.d_model, "layers": settings.layers, "heads": settings.heads}
    return assemble(tokenizer, conformer_config(**sizes, channels=settings.conv_channels, mels=40, kernel=15))


def conformer_config(
    *, d_model: int = 176, layers: int = 16, heads: int = 4, channels: int = 176, mels: int = 80, kernel: int = 31
) -> dict:
    """Configure a preprocessor and an encoder; the defaults are those of stt_en_conformer_ctc_small."""
    return {
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "sample_rate": 16_000,
            "normalize": "per_feature",
            "window_size": 0.025,
            "window_stride": 0.01,
            "window": "hann",
            "features": mels,
            "n_fft": 512,
            "frame_splicing": 1,
            "dither": 1e-5,
            "pad_to": 0,
        },
        "encoder": {
            "_target_": "nemo.collections.asr.modules.ConformerEncoder",
            "feat_in": mels,
            "feat_out": -1,
            "n_layers": layers,
            "d_model": d_model,
            "subsampling": "striding",
            "subsampling_factor": 4,
            "subsampling_conv_channels": channels,
            "ff_expansion_factor": 4,
            "self_attention_model": "rel_pos",
            "n_heads": heads,
            "att_context_size": [-1, -1],
            "xscaling": True,
            "untie_biases": True,
            "pos_emb_max_len": 5000,
            "conv_kernel_size": kernel,
            "dropout": 0.1,
            "dropout_pre_encoder": 0.1,
            "dropout_emb": 0.0,
            "dropout_att": 0.1,
        },
    }


def assemble(tokenizer: Path, config: dict):
    """Build a complete NeMo model with random weights: `config`, and a CTC head over a tokenizer's pieces."""
    with quiet_nemo():
        from nemo.collections.asr.models import EncDecCTCModelBPE
        from omegaconf import OmegaConf, open_dict
    pieces = Tokens.for_nemo(tokenizer.read_bytes()).pieces
    (tokenizer.parent / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    complete = {
        "sample_rate": 16_000,
        "tokenizer": {"dir": str(tokenizer.parent), "type": "bpe"},
        **config,
        "decoder": {
            "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
            "feat_in": config["encoder"]["d_model"],
            "num_classes": len(pieces),
            "vocabulary": pieces,
        },
    }
    with quiet_nemo():
        model = EncDecCTCModelBPE(cfg=OmegaConf.create(complete))
    with open_dict(model.cfg):
        model.cfg.tokenizer.dir = "tokens"  # a .nemo file contains its tokenizer, and needs no local path
        model.cfg.validation_ds = {"manifest_filepath": None, "use_start_end_token": False}  # `transcribe` reads it
    return model


@contextlib.contextmanager
def quiet_nemo() -> Iterator[None]:
    """Suppress NeMo's telemetry, hints and import warnings; errors are still shown."""
    for name in ("nv_one_logger", "nv_one_logger.training_telemetry", "nv_one_logger.exporter"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for name in ("nemo_logger", "nemo", "torch.distributed.elastic.multiprocessing.redirects"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("NEMO_LOGGING_LEVEL", "ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from nemo.utils import logging as nemo_logging

            nemo_logging.setLevel(logging.ERROR)
        except ImportError as error:
            raise UserError(
                f"NeMo cannot be imported ({error}); set the environment up again with: rm -r .venv; make setup"
            ) from error
        yield


def _download(name: str) -> Path:
    """Return NVIDIA's model of a name, from the Hugging Face hub or its local cache."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    file = f"{name.split('/')[-1]}.nemo"
    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(hf_hub_download(name, file, local_files_only=True))
        if not urllib.request.getproxies():  # fail at once, not after the hub's retries
            address = urllib.parse.urlsplit(constants.ENDPOINT)
            socket.create_connection((address.hostname, address.port or 443), timeout=5).close()
        return Path(hf_hub_download(name, file))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"nemo_model: {name} is not on this machine, and it cannot be downloaded ({reason}). Either get its .nemo "
            "file where there is a network and set nemo_model: path/to/it.nemo, or set pretrained: shipped for the "
            "small stand-in"
        ) from None
