"""Losses against references and teachers, and the objective that combines them."""
