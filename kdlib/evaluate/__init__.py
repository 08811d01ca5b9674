"""The scorers' room: hypotheses -> tables."""
