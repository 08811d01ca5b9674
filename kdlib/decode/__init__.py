"""The decoders' room: `Outputs` -> hypotheses."""
