"""Decoding with the attention decoder: greedy, beam search, and the most probable word of a closed lexicon.

The last two also run jointly with CTC (Watanabe et al. 2017): weight x log P_ctc + (1 - weight) x log P_attention.
P(word | encodings) is the product of the conditional probabilities of its tokens and EOS, exact because the words are
few. The beam search and its CTC prefix scores are SpeechBrain's.
"""

import copy
from collections.abc import Mapping

import torch

from kdlib.decode.calibration import CalibratedLexicon, Calibrator
from kdlib.decode.lexicon import Lexicon
from kdlib.models import Outputs
from kdlib.models.decoder import teacher_forced
from kdlib.models.hybrid import Hybrid
from kdlib.models.masks import length_mask
from kdlib.tokens import Tokens

LONGEST = 100  # tokens, where no lexicon bounds them
CHUNK = 2000  # spellings per pass of the decoder


class AttentionDecoding:
    """The decoders of a model's attention branch, for batches that its encoder has encoded."""

    def __init__(
        self,
        model: Hybrid,
        tokens: Tokens,
        lexicon: Lexicon | None,
        *,
        longest: int | None = None,
        size: int = 8,
        ctc_weight: float = 0.3,
    ) -> None:
        """Decode at most `longest` tokens with a beam of `size`; `ctc_weight` is 0 if the CTC head is not trained."""
        self.model, self.tokens, self.lexicon, self.size = model, tokens, lexicon, size
        self.ctc_weight, self._calibrated = ctc_weight, {}
        self.longest = longest or (max(map(len, lexicon.sequences)) + 4 if lexicon else LONGEST)
        columns = ("attention", "attention_beam", "attention_lexicon")
        columns += ("joint", "joint_lexicon") if self.ctc_weight else ()
        self.columns = tuple(name for name in columns if lexicon or not name.endswith("_lexicon"))

    def calibrated(self, calibrators: Mapping[str, Calibrator]) -> "AttentionDecoding":
        """Return the same decoders with calibrated words, by column."""
        changed = copy.copy(self)
        own = (name for name in self.columns if name in calibrators)
        changed._calibrated = {name: CalibratedLexicon(self.lexicon, calibrators[name]) for name in own}
        return changed

    def __call__(self, outputs: Outputs) -> dict[str, list[str]]:
        """Decode a batch into the columns of a table of hypotheses."""
        ids = self.model.decode_greedy(outputs.encoded, self.longest, outputs.lengths)
        columns = {
            "attention": [self.tokens.decode(row) for row in ids],
            "attention_ids": [" ".join(map(str, row)) for row in ids],
            "attention_beam": [self.tokens.decode(row) for row in self.search(outputs)],
        }
        if self.ctc_weight:
            columns["joint"] = [self.tokens.decode(row) for row in self.search(outputs, self.ctc_weight)]
        return columns | {name: self._best_words(name, scores) for name, scores in self.word_scores(outputs).items()}

    def word_scores(self, outputs: Outputs) -> dict[str, torch.Tensor]:
        """[B, W] by column: the plain score of every word."""
        if self.lexicon is None:
            return {}
        scores = {"attention_lexicon": self.scores(outputs)}
        if self.ctc_weight:
            of_ctc = self.ctc_weight * self.lexicon.scores(outputs.ctc).to(scores["attention_lexicon"])
            scores["joint_lexicon"] = of_ctc + (1 - self.ctc_weight) * scores["attention_lexicon"]
        return scores

    def scores(self, outputs: Outputs) -> torch.Tensor:
        """[B, W]: the log-probability of every word followed by EOS."""
        ids = self.lexicon.sequences
        inputs, targets, steps = (part.to(outputs.encoded.device) for part in teacher_forced(ids))
        mask = length_mask(steps, targets.shape[1])
        rows = []
        with torch.inference_mode():
            for encoded, length in zip(outputs.encoded, outputs.lengths.tolist(), strict=True):
                parts = []
                for first in range(0, len(ids), CHUNK):
                    chunk = slice(first, first + CHUNK)
                    count = len(inputs[chunk])
                    expanded = encoded[None, :length].expand(count, -1, -1)
                    lengths = torch.full((count,), length, device=encoded.device)
                    logprobs = self.model.forward_decoder(expanded, inputs[chunk], lengths).log_softmax(-1)
                    chosen = logprobs.gather(2, targets[chunk, :, None])[..., 0]
                    parts.append((chosen * mask[chunk]).sum(1))
                rows.append(torch.cat(parts))
        return self.lexicon.by_word(torch.stack(rows).cpu())

    def search(self, outputs: Outputs, ctc_weight: float = 0.0) -> list[list[int]]:
        """Return the token ids of beam search, with `ctc_weight` of CTC.

        One utterance at a time: beyond an utterance's end SpeechBrain's CTC scores give id 0, our BOS, probability 1.
        """
        searcher = _searcher(self.model, self.tokens, self.longest, self.size, ctc_weight)
        rows = []
        with torch.inference_mode():
            for encoded, length in zip(outputs.encoded, outputs.lengths.tolist(), strict=True):
                hypotheses, *_ = searcher(encoded[None, :length], torch.ones(1, device=encoded.device))
                rows.append([int(token) for token in hypotheses[0] if token != self.tokens.eos])
        return rows

    def _best_words(self, column: str, scores: torch.Tensor) -> list[str]:
        if column in self._calibrated:
            scores = self._calibrated[column].add_bias(scores)
        return self.lexicon.best_of(scores)


def _searcher(model: Hybrid, tokens: Tokens, longest: int, size: int, ctc_weight: float):
    """SpeechBrain's beam search over a model's decoder."""
    from speechbrain.decoders.scorer import CTCScorer, ScorerBuilder
    from speechbrain.decoders.seq2seq import S2SBeamSearcher

    class Searcher(S2SBeamSearcher):
        def reset_mem(self, batch_size, device):
            return torch.zeros(batch_size, 0, dtype=torch.long, device=device)

        def permute_mem(self, memory, index):
            return memory.index_select(0, index)

        def forward_step(self, inp_tokens, memory, enc_states, enc_lens):
            prefixes = torch.cat([memory, inp_tokens[:, None]], 1)
            logits = model.forward_decoder(enc_states, prefixes, enc_lens)
            return logits[:, -1].log_softmax(-1), prefixes, None

        def set_n_out(self):
            return tokens.size

        def change_max_decoding_length(self, min_decode_steps, max_decode_steps):
            return 0, longest

        def _fill_alived_hyps_with_eos_token(self, alived_hyps, ended, scores):
            """Append EOS only if no hypothesis has ended: the score of a truncated one lacks that of its EOS."""
            return ended if ended[0] else super()._fill_alived_hyps_with_eos_token(alived_hyps, ended, scores)

    scorer = None
    if ctc_weight:
        ctc = CTCScorer(model.ctc_head, blank_index=tokens.blank, eos_index=tokens.eos)
        scorer = ScorerBuilder({"ctc": ctc_weight}, full_scorers=[ctc])
    return Searcher(
        bos_index=tokens.bos,
        eos_index=tokens.eos,
        min_decode_ratio=0.0,
        max_decode_ratio=1.0,
        beam_size=size,
        scorer=scorer,
        using_eos_threshold=False,
        length_normalization=False,
    )
