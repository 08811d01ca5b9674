"""What a validation on dev speech measures."""

from collections.abc import Callable, Sequence

from kdlib.corpus.inputs import Batch
from kdlib.decode.greedy import greedy
from kdlib.models import Emissions
from kdlib.tokens import Tokens, normalise


class Recognised:
    """What is recognised of dev speech, batch by batch; `measure` is what checkpoints are chosen by."""

    def __init__(self, tokens: Tokens, measure: str = "wra") -> None:
        self.tokens, self.measure = tokens, measure
        self.hypotheses: list[Sequence[int]] = []
        self._references: list[str] = []
        self._correct = 0
        self._loss = 0.0

    def add(self, batch: Batch, hypotheses: Sequence[Sequence[int]], loss: float) -> None:
        """Add a batch's hypotheses, and its mean loss."""
        self.hypotheses += hypotheses
        self._references += [normalise(utt.text) for utt in batch.utterances]  # a word that is unknown is an error
        pairs = zip(hypotheses, batch.ids, strict=True)
        self._correct += sum(hyp == ref and self.tokens.unknown not in ref for hyp, ref in pairs)
        self._loss += loss * len(batch)

    def metrics(self) -> dict[str, float]:
        """WRA, WER, mean loss, and the score that chooses checkpoints: WRA or 1 - WER, between equal ones by loss."""
        import jiwer

        total = len(self._references)
        wra, loss = self._correct / total, self._loss / total
        wer = jiwer.wer(self._references, self.tokens.decode_all(self.hypotheses))
        score = (1 - wer if self.measure == "wer" else wra) - 1e-3 * min(loss, 100.0)
        return {"dev_wra": wra, "dev_wer": wer, "dev_loss": loss, "dev_score": score}


def validate_greedy(
    dev: Sequence[Batch], tokens: Tokens, outputs: Callable[[Batch], tuple[Emissions, float]], measure: str = "wra"
) -> dict[str, float]:
    """Validate by greedy CTC; `outputs` gives the CTC outputs of a batch and its mean loss."""
    recognised = Recognised(tokens, measure)
    for batch in dev:
        emissions, loss = outputs(batch)
        recognised.add(batch, greedy(emissions, tokens.blank), loss)
    return recognised.metrics()
