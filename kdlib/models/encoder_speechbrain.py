"""The model of SpeechBrain's Transformer recipes for LibriSpeech, for teachers that were trained with them.

Mel features -> normalisation by the training speech -> convolutional front end -> Conformer or Transformer encoder of
`TransformerASR`, whose decoder is this module's too. Each utterance is encoded alone: SpeechBrain's front end lets
padding into the last frames. The classes are SpeechBrain's own; it takes 1-4 s to import, inside functions.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from kdlib.corpus import inputs as corpus_inputs
from kdlib.corpus.audio import RATE_HZ
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.models.decoder import AttentionDecoder, Heads
from kdlib.models.encoder import Encoded, Encoder
from kdlib.settings.encoder import EncoderSizes, InputShape

ACTIVATIONS = {"torch.nn.GELU": nn.GELU, "torch.nn.ReLU": nn.ReLU, "torch.nn.SiLU": nn.SiLU}
FRONT_END = {"num_blocks": 2, "num_layers_per_block": 1, "out_channels": [64, 32], "kernel_sizes": [3, 3]}
FRONT_END |= {"strides": [2, 2], "residuals": [False, False]}
SPEECH = 200  # utterances that the mean and the deviation of the features are estimated on
SMALLEST = 1e-10  # deviation, as in SpeechBrain


class SpeechBrainASR(Encoder):
    """The features, front end and encoder of a SpeechBrain Transformer recipe."""

    def __init__(self, config: dict) -> None:
        """`config`: the arguments of SpeechBrain's classes, as `features`, `front_end`, `transformer`, and `norm`."""
        from speechbrain.lobes.features import Fbank
        from speechbrain.lobes.models.convolution import ConvolutionFrontEnd

        super().__init__()
        self._config = config
        features, shape = {"sample_rate": RATE_HZ, "hop_length": 10} | config["features"], config["transformer"]
        if features["sample_rate"] != RATE_HZ:
            raise UserError(f"encoder: its recordings have {features['sample_rate']} Hz, those here {RATE_HZ}")
        self.features, bands = Fbank(**features), features.get("n_mels", 40)
        self.hop = int(RATE_HZ * features["hop_length"] / 1000)
        self.front_end = ConvolutionFrontEnd(**{"input_shape": (8, 10, bands)} | config["front_end"])
        self.transformer = transformer(shape | {"num_decoder_layers": 0, "output_hidden_states": True})
        self.norm = config["norm"]  # global or sentence
        self.register_buffer("mean", torch.zeros(bands))
        self.register_buffer("deviation", torch.zeros(bands))  # 0: not estimated yet
        self.width, self.layers = shape["d_model"], shape["num_encoder_layers"]
        self.stride_ms = float(features["hop_length"] * math.prod(config["front_end"]["strides"]))

    @property
    def config(self) -> dict:
        """The arguments of SpeechBrain's classes."""
        return self._config

    @classmethod
    def build(cls, config: dict) -> "SpeechBrainASR":
        """Build an encoder with random weights."""
        return cls(config)

    @classmethod
    def of_sizes(cls, sizes: EncoderSizes, inputs: InputShape) -> "SpeechBrainASR":
        """Build an encoder with random weights and the sizes of a recipe."""
        shape = {"d_model": sizes.d_model, "nhead": sizes.heads, "d_ffn": sizes.ffn, "dropout": sizes.dropout}
        shape |= {"num_encoder_layers": sizes.layers, "num_decoder_layers": 0, "encoder_module": "conformer"}
        shape |= {"attention_type": "RelPosMHAXL", "normalize_before": True, "causal": False}
        shape |= {"kernel_size": sizes.kernel, "activation": "torch.nn.GELU", "tgt_vocab": 1}
        shape["input_size"] = FRONT_END["out_channels"][-1] * math.ceil(sizes.mels / 4)
        features = {"n_mels": sizes.mels, "n_fft": 400}
        return cls({"features": features, "front_end": FRONT_END, "transformer": shape, "norm": "global"})

    def new_decoder(self, heads: Heads) -> AttentionDecoder:
        """The decoder of the recipe, if the encoder is one that was trained with it."""
        shape = self._config["transformer"]
        return RecipeDecoder(shape) if shape.get("num_decoder_layers") else super().new_decoder(heads)

    def learn_statistics(self, utterances: Sequence[Utterance]) -> None:
        """Estimate mean and deviation of the features on training speech, unless the weights have them."""
        if self.deviation.any() or not utterances or self.norm != "global":
            return
        rows = []
        for utt in utterances[:: -(-len(utterances) // SPEECH)]:
            rows.append(self.features(torch.from_numpy(corpus_inputs.load(utt))[None])[0])
        frames = torch.cat(rows)
        self.mean.copy_(frames.mean(0))
        self.deviation.copy_(frames.std(0))

    def extract_features(self, inputs: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised mel features [B, T, F], 0 in padding, and their lengths; each utterance alone."""
        rows = []
        with torch.no_grad():
            for samples, length in zip(inputs, lengths.tolist(), strict=True):
                mels = self.features(samples[None, :length])[0]
                if self.norm == "sentence":
                    mean, deviation = mels.mean(0), mels.std(0, unbiased=False)
                else:
                    mean, deviation = self.mean, self.deviation
                known = deviation if deviation.any() else torch.ones_like(deviation)
                rows.append((mels - mean) / known.clamp_min(SMALLEST))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(
            [len(row) for row in rows], device=inputs.device
        )

    def encode(self, features: torch.Tensor, lengths: torch.Tensor, layers: tuple[int, ...] = ()) -> Encoded:
        """Features [B, T, F], their lengths [B], and the layers to return."""
        features = self.masked(features, lengths)
        alone = [self._encode(row[None, :length]) for row, length in zip(features, lengths.tolist(), strict=True)]
        rows = [[encoded[0], *(hidden[layer][0] for layer in layers)] for encoded, hidden in alone]
        frames, *kept = (nn.utils.rnn.pad_sequence(part, batch_first=True) for part in zip(*rows, strict=True))
        sizes = torch.tensor([len(row[0]) for row in rows], device=features.device)
        return Encoded(frames, sizes, dict(zip(layers, kept, strict=True)))

    def _encode(self, features: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        return self.transformer.encode(self.front_end(features), torch.ones(1, device=features.device))


class RecipeDecoder(AttentionDecoder):
    """The Transformer decoder of a SpeechBrain recipe, with its embedding and its output layer."""

    def __init__(self, shape: dict) -> None:
        nn.Module.__init__(self)
        whole = transformer(shape)
        self.embed, self.decoder = whole.custom_tgt_module, whole.decoder
        relative = shape.get("attention_type") in ("RelPosMHAXL", "RoPEMHA")
        self.positions = whole.positional_encoding_decoder if relative else whole.positional_encoding
        self.head = nn.Linear(shape["d_model"], shape["tgt_vocab"])


def transformer(shape: dict) -> nn.Module:
    """SpeechBrain's TransformerASR of these arguments; an activation is given by its name."""
    import inspect

    from speechbrain.lobes.models.transformer.TransformerASR import TransformerASR

    known = inspect.signature(TransformerASR.__init__).parameters
    unknown = sorted(set(shape) - set(known))
    if unknown:
        raise UserError(f"encoder: the installed SpeechBrain's TransformerASR has no argument {unknown[0]!r}")
    given = {name: ACTIVATIONS.get(value, value) if name == "activation" else value for name, value in shape.items()}
    if isinstance(given.get("activation"), str):
        names = ", ".join(ACTIVATIONS)
        raise UserError(f"encoder: unknown activation {given['activation']!r}; expected one of {names}")
    return TransformerASR(**given)
