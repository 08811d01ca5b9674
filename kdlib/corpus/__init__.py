"""The corpus package: a folder, a manifest or the embedded synthesiser -> a checked `Corpus` -> batches."""
