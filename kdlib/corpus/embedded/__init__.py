"""The embedded synthetic corpus: prompts, synthetic voices, simulated dysarthria."""
