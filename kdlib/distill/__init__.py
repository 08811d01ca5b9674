"""Distillation: losses, the objective that weighs them, the checks before training, and the students that result."""
