"""Importers of real corpora: UA-Speech and TORGO."""
