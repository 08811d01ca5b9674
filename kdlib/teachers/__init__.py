"""Teachers: one model per speaker, adapted from a shared base model."""
