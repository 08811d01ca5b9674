"""The training loop: batches of utterances and an objective -> checkpoints."""
