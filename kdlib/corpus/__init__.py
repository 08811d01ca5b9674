"""The corpus room: a folder, a manifest or nothing at all -> a checked `Corpus` -> batches."""
