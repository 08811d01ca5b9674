"""Decoding: `Outputs` -> hypotheses."""
