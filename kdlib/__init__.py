"""kdlib: the thin, tested core of a repository on knowledge distillation in dysarthric speech recognition.

Speech enters in `corpus`, passes through `models`, `decode` and `evaluate`, and leaves as figures in `show`.
Heavy libraries (torch, NeMo) are imported inside the functions that need them: `import kdlib` takes milliseconds.
"""

__version__ = "0.1.0"
