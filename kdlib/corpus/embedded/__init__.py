"""The embedded synthetic corpus: prompts, voices, simulated dysarthria."""
