"""What does each kind of target cost compared with frame KL? A batch's term, forward and backward, as in training.

Peer: frame KL from the same three teachers' stores. Terms are timed when the teachers' words are cached (from the
second epoch on), and words also the first time. Memory: the highest amount in use at once for a term, of torch and of
numpy.
"""

import json
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch

from kdlib.corpus.embedded.synthetic import word_list
from kdlib.corpus.inputs import Batch
from kdlib.corpus.manifest import Utterance
from kdlib.decode.lexicon import Lexicon
from kdlib.io import repository_root, write_json
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

B, FRAMES, D, TEACHERS, ROUNDS = 16, (20, 45), 96, 3, 15
TERMS = {
    "frame KL": {"alpha": 1.0},
    "label smoothing": {"alpha": 0.0, "beta": 1.0, "ctc_smoothing": 0.1},
    "references": {"alpha": 0.0, "beta": 1.0},
    "1-best": {"alpha": 0.0, "sequence": {"weight": 1.0}},
    "5-best": {"alpha": 0.0, "sequence": {"weight": 1.0, "nbest": 5}},
    "occupancy": {"alpha": 0.0, "occupancy": {"weight": 1.0}},
    "words": {"alpha": 0.0, "words": {"weight": 1.0}},
    "words, 10 listed + 30": {"alpha": 0.0, "words": {"weight": 1.0, "shortlist": 10, "random_words": 30}},
}


class Still(torch.nn.Module):
    """A student with fixed outputs: only the loss is timed."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *_: object) -> Outputs:
        """The same outputs always."""
        return self.outputs


class Learner(torch.nn.Module):
    """What an objective needs of a learner."""

    layers = ()

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.student = Still(outputs)


def stores(folder: Path, tokens: Tokens, lengths: list[int]) -> dict[str, LogitStore]:
    """Three teachers' outputs of a batch."""
    found = {}
    for name in "ABC"[:TEACHERS]:
        header = Header(
            **{
                "teacher": name,
                "train_speakers": (name,),
                "output": "ctc",
                "encoding": "fp16",
                "size": tokens.size,
                "width": D,
            },
            **{"tokens": tokens.fingerprint, "blank": 2, "bos": 0, "eos": 1, "stride_ms": 40.0},
        )
        with Writer(folder / name, header, (torch.randn(tokens.size, D) / 3, torch.randn(tokens.size))) as writer:
            for index, length in enumerate(lengths):
                writer.add(f"u{index}", torch.randn(length, D))
        found[name] = LogitStore(folder / name)
    return found


def seconds(one: Objective, batch: Batch, logits: torch.Tensor) -> float:
    """Forward and backward of a term."""
    logits.grad = None
    started = time.perf_counter()
    one(batch)["loss"].backward()
    return time.perf_counter() - started


def megabytes(one: Objective, batch: Batch, logits: torch.Tensor) -> float:
    """The highest amount in use at once, of torch beyond the inputs, and of numpy."""
    from torch.profiler import ProfilerActivity, profile

    logits.grad = None
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        one(batch)["loss"].backward()
    numpys = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    used = highest = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        highest = max(highest, used)
    return (highest + numpys) / 1e6


def measured(words: list[str], tokens: Tokens, folder: Path) -> dict[str, dict[str, float]]:
    """Time and memory of every term over a lexicon."""
    torch.manual_seed(0)
    lengths = torch.linspace(*FRAMES, B).int().tolist()
    ensemble = TeacherEnsemble(stores(folder, tokens, lengths), Weighting())
    logits = torch.randn(B, max(lengths), tokens.size).requires_grad_()
    outputs = Outputs(Emissions(logits, torch.tensor(lengths)), torch.zeros(B, 1, 1))
    ids = [tokens.encode(words[index * 3 % len(words)]) for index in range(B)]
    utterances = [Utterance(f"u{index}", "S", Path("none.wav"), 1.0, "") for index in range(B)]
    batch = Batch(utterances, ids, loaded=[torch.zeros(B, 1), torch.ones(B)])
    lexicon = Lexicon(words, tokens)

    def objective(term: str) -> Objective:
        settings = Distill(**{"beta": 0.0, "temperature": 1.0} | TERMS[term])
        hypotheses = TeacherHypotheses(ensemble, lexicon, tokens) if terms.needs(settings, "texts") else None
        return Objective(Learner(outputs), settings, terms.TERMS, Sources({"ctc": ensemble}, hypotheses, lexicon))

    ready = {term: objective(term) for term in TERMS}
    for one in ready.values():
        seconds(one, batch, logits)
    times: dict[str, list[float]] = {term: [] for term in [*TERMS, "words, first time"]}
    for _ in range(ROUNDS):
        for term, one in ready.items():
            times[term].append(seconds(one, batch, logits))
        times["words, first time"].append(seconds(objective("words"), batch, logits))
    base = statistics.median(times["frame KL"])
    megabytes(ready["frame KL"], batch, logits)  # what the profiler itself takes, the first time
    memory = {term: megabytes(one, batch, logits) for term, one in ready.items()}
    return {
        term: {
            "ms": round(1000 * statistics.median(some), 2),
            "of_frame_kl": round(statistics.median(some) / base, 2),
            **({"mb": round(memory[term], 2)} if term in memory else {}),
            **({"memory_of_frame_kl": round(memory[term] / memory["frame KL"], 1)} if term in memory else {}),
        }
        for term, some in times.items()
    }


def main() -> None:
    """Measure, print, and write outputs/benchmarks/targets.json."""
    set_threads()
    listed = sorted(set(word_list().values()))
    result = {"shape": [B, FRAMES[1], 64], "teachers": TEACHERS, "words": {}}
    with tempfile.TemporaryDirectory() as folder:
        model = train_tokenizer(listed, 64, Path(folder), lower=True).read_bytes()
        tokens = Tokens(model, 2, 64, 0, 1)
        for count in (60, len(listed)):
            words = listed[:: len(listed) // count][:count]
            result["words"][count] = measured(words, tokens, Path(folder) / str(count))
    print(json.dumps(result, indent=1))
    folder = repository_root() / "outputs" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "targets.json", result)


if __name__ == "__main__":
    main()
