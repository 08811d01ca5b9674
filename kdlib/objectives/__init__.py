"""Losses against references and teachers, and the objective that weights them."""
