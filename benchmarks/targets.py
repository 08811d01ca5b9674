"""What does each kind of target cost, compared with frame KL?

Timed is a term of the objective, forward and backward as in training, on 16 utterances of 20 to 45 frames with 64
tokens, three stored teachers, and a closed lexicon of 60 or 449 words. The peer is frame KL from the same teachers. The
teachers' words are cached, as from the second epoch on; for the words' posterior the first time is shown as well.
Memory is the highest amount in use at once for a term, of torch and of numpy.
"""

import tempfile
import tracemalloc
from pathlib import Path

import report
import torch

from kdlib.corpus.embedded.synthetic import word_list
from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.decode.lexicon import Lexicon
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.models import Emissions, Outputs
from kdlib.objectives import terms
from kdlib.objectives.objective import Objective
from kdlib.objectives.step import Sources
from kdlib.runtime import set_threads
from kdlib.settings.distill import Distill
from kdlib.targets.aggregation import TeacherEnsemble, Weighting
from kdlib.targets.pseudo_labels import TeacherHypotheses
from kdlib.tokens import Tokens, train_tokenizer

FULL, SMOKE = (16, (60, 449), 15), (3, (60,), 1)  # utterances, words, rounds
FRAMES, D = (20, 45), 96
PEER, WORDS = "frame KL", "words' posterior"
TERMS = {
    PEER: {"alpha": 1.0},
    "references": {"alpha": 0.0, "beta": 1.0},
    "references, with label smoothing": {"alpha": 0.0, "beta": 1.0, "ctc_smoothing": 0.1},
    "teachers' best text": {"alpha": 0.0, "sequence": {"weight": 1.0}},
    "teachers' 5 best texts": {"alpha": 0.0, "sequence": {"weight": 1.0, "nbest": 5}},
    "occupancy": {"alpha": 0.0, "occupancy": {"weight": 1.0}},
    WORDS: {"alpha": 0.0, "words": {"weight": 1.0}},
    f"{WORDS}, 10 listed and 30 at random": {
        "alpha": 0.0,
        "words": {"weight": 1.0, "shortlist": 10, "random_words": 30},
    },
}


class Still(torch.nn.Module):
    """A student with fixed outputs: only the loss is timed."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.outputs = outputs

    @property
    def encoder(self) -> "Still":
        """Itself: there is none."""
        return self

    def of_batch(self, *_: object) -> None:
        """Nothing is encoded."""

    def apply_heads(self, *_: object) -> Outputs:
        """The same outputs always."""
        return self.outputs


class Learner(torch.nn.Module):
    """What an objective needs of a learner."""

    layers, passes = (), torch.zeros(2, dtype=torch.long)

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.student = Still(outputs)


def stores(folder: Path, tokens: Tokens, lengths: list[int]) -> dict[str, LogitStore]:
    """Three teachers' outputs of a batch."""
    found = {}
    for name in "ABC":
        known = {"train_speakers": (name,), "output": "ctc", "encoding": "fp16", "size": tokens.size, "width": D}
        header = Header(teacher=name, tokens=tokens.fingerprint, blank=2, bos=0, eos=1, stride_ms=40.0, **known)
        with Writer(folder / name, header, (torch.randn(tokens.size, D) / 3, torch.randn(tokens.size))) as writer:
            for index, length in enumerate(lengths):
                writer.add(f"u{index}", torch.randn(length, D))
        found[name] = LogitStore(folder / name)
    return found


def backward(one: Objective, batch: Batch, logits: torch.Tensor) -> None:
    """Forward and backward of a term; no gradient is left behind."""
    one(batch)["loss"].backward()
    logits.grad = None


def megabytes(one: Objective, batch: Batch, logits: torch.Tensor) -> float:
    """The highest amount in use at once, of torch beyond the inputs, and of numpy."""
    tracemalloc.start()
    torchs = report.torch_bytes(lambda: backward(one, batch, logits))
    numpys = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (torchs + numpys) / 1e6


def measured(words: list[str], tokens: Tokens, folder: Path, utterances: int, rounds: int) -> list[dict]:
    """Time and memory of every term over a lexicon."""
    torch.manual_seed(0)
    lengths = torch.linspace(*FRAMES, utterances).int().tolist()
    ensemble = TeacherEnsemble(stores(folder, tokens, lengths), Weighting())
    logits = torch.randn(utterances, max(lengths), tokens.size).requires_grad_()
    outputs = Outputs(Emissions(logits, torch.tensor(lengths)), torch.zeros(utterances, 1, 1))
    ids = [tokens.encode(words[index * 3 % len(words)]) for index in range(utterances)]
    listed = [Utterance(f"u{index}", "S", Path("none.wav"), 1.0, "") for index in range(utterances)]
    batch = Batch(listed, ids, loaded=[torch.zeros(utterances, 1), torch.ones(utterances)])
    lexicon = Lexicon(words, tokens)

    def objective(term: str) -> Objective:
        settings = Distill(**{"beta": 0.0, "temperature": 1.0} | TERMS[term])
        hypotheses = TeacherHypotheses(ensemble, lexicon, tokens) if terms.needs(settings, "texts") else None
        return Objective(Learner(outputs), settings, terms.TERMS, Sources({"ctc": ensemble}, hypotheses, lexicon))

    ready = {term: objective(term) for term in TERMS}
    for one in ready.values():
        backward(one, batch, logits)
    forms = {term: lambda _, one=one: backward(one, batch, logits) for term, one in ready.items()}
    forms[f"{WORDS}, the first time"] = lambda new: backward(new, batch, logits)
    found = report.against(report.interleaved(forms, rounds, lambda _: objective(WORDS)), PEER)
    megabytes(ready[PEER], batch, logits)  # what the profiler itself takes, the first time
    memory = {term: megabytes(one, batch, logits) for term, one in ready.items()}
    return [
        {
            "lexicon": len(lexicon.words),
            "term": term,
            "ms": 1000 * seconds,
            "ratio of times": ratio,
            "MB": memory.get(term),
            "ratio of memory": memory[term] / memory[PEER] if term in memory else None,
        }
        for term, (seconds, ratio) in found.items()
    ]


def main() -> None:
    run = report.start(__file__, __doc__)
    set_threads()
    utterances, counts, rounds = SMOKE if run.smoke else FULL
    listed, rows = sorted(set(word_list().values())), []
    with tempfile.TemporaryDirectory() as folder:
        model = train_tokenizer(listed, 64, Path(folder), lower=True).read_bytes()
        tokens = Tokens(model, 2, 64, 0, 1)
        for count in counts:
            words = listed[:: len(listed) // count][:count]
            rows += measured(words, tokens, Path(folder) / str(count), utterances, rounds)
    run.save(rows)


if __name__ == "__main__":
    main()
