"""The training loop: batches of utterances and a loss -> checkpoints."""
