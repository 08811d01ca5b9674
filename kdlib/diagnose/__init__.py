"""Diagnosis of failures: examination of predictions, known causes, and the study that produced their fingerprints."""
