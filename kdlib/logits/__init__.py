"""Teacher outputs on disk: stored once per teacher and utterance, scored, imported from other code."""
