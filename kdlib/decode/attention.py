"""Decoding by the attention decoder: what it says by itself, and the word of a closed lexicon that it finds likeliest.

P(word | encodings) is the product of its tokens' probabilities and that of EOS, each given those before: exact, for the
words are few.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdlib.models import Outputs
from kdlib.tokens import Tokens, normalise

if TYPE_CHECKING:
    import torch

    from kdlib.models.hybrid import Hybrid

CODE = ("decode/attention.py", "models/decoder.py")
AT_ONCE = 2000  # words x utterances in one pass of the decoder


class Spoken:
    """A model's decoder, asked about batches that its encoder has heard."""

    def __init__(self, model: "Hybrid", tokens: Tokens, words: Sequence[str], longest: int | None = None) -> None:
        self.model, self.tokens = model, tokens
        self.words = sorted({normalise(word) for word in words})
        self.ids = [tokens.encode(word) for word in self.words]
        self.longest = longest or max(map(len, self.ids)) + 4

    def __call__(self, outputs: Outputs) -> dict[str, list[str]]:
        """The two columns of a table of hypotheses, for a batch."""
        free = self.model.decode_greedy(outputs.encoded, self.longest, outputs.lengths)
        best = self.scores(outputs).argmax(-1).tolist()
        return {
            "attention": [self.tokens.decode(ids) for ids in free],
            "attention_lexicon": [self.words[index] for index in best],
        }

    def scores(self, outputs: Outputs) -> "torch.Tensor":
        """[B, W]: the log-probability of every word and its end."""
        import torch

        from kdlib.models.conformer import mask
        from kdlib.models.decoder import teacher_forced

        inputs, targets, steps = (part.to(outputs.encoded.device) for part in teacher_forced(self.ids))
        inside = mask(steps, targets.shape[1])
        rows = []
        with torch.inference_mode():
            for encoded, length in zip(outputs.encoded, outputs.lengths.tolist(), strict=True):
                parts = []
                for first in range(0, len(self.ids), AT_ONCE):
                    some = slice(first, first + AT_ONCE)
                    count = len(inputs[some])
                    heard = encoded[None, :length].expand(count, -1, -1)
                    lengths = torch.full((count,), length, device=encoded.device)
                    logprobs = self.model.forward_decoder(heard, inputs[some], lengths).log_softmax(-1)
                    chosen = logprobs.gather(2, targets[some, :, None])[..., 0]
                    parts.append((chosen * inside[some]).sum(1))
                rows.append(torch.cat(parts))
        return torch.stack(rows)
