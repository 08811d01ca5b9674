"""Diagnosis of failures: examination of predictions, known causes, and the study that made their fingerprints."""
