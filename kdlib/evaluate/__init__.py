"""Evaluation: hypotheses -> scores, comparison of systems, tables."""
