"""kdlib: the tested core of a repository on knowledge distillation in dysarthric speech recognition.

Speech enters in `corpus`, passes through `models`, `decode` and `evaluate`, and ends as figures in `show`. NeMo and
SpeechBrain are imported inside the functions that need them, and no heavy library here: `import kdlib` is fast.
"""

__version__ = "0.1.0"
