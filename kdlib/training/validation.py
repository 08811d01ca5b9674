"""What a validation on dev speech measures."""


def dev_metrics(correct: int, loss: float, total: int) -> dict[str, float]:
    """WRA, mean loss, and the score by which checkpoints are chosen: between equal WRA the loss decides.

    `loss` is the sum over the utterances.
    """
    wra, loss = correct / total, loss / total
    return {"dev_wra": wra, "dev_loss": loss, "dev_score": wra - 1e-3 * min(loss, 100.0)}
