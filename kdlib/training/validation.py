"""What a validation on dev speech measures."""

from collections.abc import Callable, Sequence

from kdlib.corpus.inputs import Batch
from kdlib.decode.greedy import greedy
from kdlib.models import Emissions


def validate_greedy(
    dev: Sequence[Batch], blank: int, outputs: Callable[[Batch], tuple[Emissions, float]]
) -> dict[str, float]:
    """Validate by greedy CTC; `outputs` gives the CTC outputs of a batch and its mean loss."""
    correct, loss = 0, 0.0
    for batch in dev:
        emissions, batch_loss = outputs(batch)
        hypotheses = greedy(emissions, blank)
        correct += sum(hypothesis == reference for hypothesis, reference in zip(hypotheses, batch.ids, strict=True))
        loss += batch_loss * len(batch)
    return dev_metrics(correct, loss, sum(map(len, dev)))


def dev_metrics(correct: int, loss: float, total: int) -> dict[str, float]:
    """WRA, mean loss, and the score by which checkpoints are chosen: between equal WRA the loss decides.

    `loss` is the sum over the utterances.
    """
    wra, loss = correct / total, loss / total
    return {"dev_wra": wra, "dev_loss": loss, "dev_score": wra - 1e-3 * min(loss, 100.0)}
