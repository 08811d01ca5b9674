"""What does a training step of a BiLSTM on feature sequences cost?

A step is the forward and backward pass on 24 sequences of 150 frames of 512 features, 1,229 tokens, gradient clipping
and AdamW's update. The peer is plain PyTorch of the same layers: a linear projection, a convolution of stride 2,
residual `nn.LSTM` layers on packed sequences, each normalised before, a linear head, `F.ctc_loss`. The hybrid step is
that of `params/bilstm.yaml`: KL to the stored outputs of a teacher of 5 layers of 384, CTC, and two hidden layers
matched with stored ones. Weights are random, on which time does not depend.
"""

import tempfile
from pathlib import Path

import report
import torch
from torch import nn

from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.models.encoder_bilstm import BiLSTM, BiLSTMShape
from kdlib.models.hybrid import Heads, Hybrid
from kdlib.objectives.objective import Learner, Objective
from kdlib.objectives.step import Sources
from kdlib.objectives.terms import TERMS
from kdlib.runtime import set_threads
from kdlib.settings.distill import Distill
from kdlib.targets.aggregation import TeacherEnsemble, Weighting

FULL, SMOKE = (24, 150, 512, 1229, (256, 4), (384, 5), 48, 5), (2, 20, 12, 30, (8, 2), (8, 2), 4, 1)
PEER = "plain PyTorch: nn.LSTM, F.ctc_loss"
PLAIN, HYBRID = "references alone", "hybrid, stored teacher and layers"


class PlainModel(nn.Module):
    """The same layers, as one would write them down."""

    def __init__(self, inputs: int, hidden: int, layers: int, tokens: int) -> None:
        super().__init__()
        self.project, self.halve = nn.Linear(inputs, hidden), nn.Conv1d(hidden, 2 * hidden, 3, stride=2, padding=1)
        self.norm, self.norm_halved = nn.LayerNorm(hidden), nn.LayerNorm(2 * hidden)
        self.dropout = nn.Dropout(0.3)
        of_layer = {"batch_first": True, "bidirectional": True}
        self.lstm = nn.ModuleList(nn.LSTM(2 * hidden, hidden, **of_layer) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(2 * hidden) for _ in range(layers))
        self.head = nn.Linear(2 * hidden, tokens)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values = self.halve(torch.relu(self.norm(self.project(x))).transpose(1, 2)).transpose(1, 2)
        values, frames = self.norm_halved(values), (lengths + 1) // 2
        for layer, norm in zip(self.lstm, self.norms, strict=True):
            given = self.dropout(norm(values))
            packed = nn.utils.rnn.pack_padded_sequence(given, frames, batch_first=True, enforce_sorted=False)
            values = values + nn.utils.rnn.pad_packed_sequence(layer(packed)[0], batch_first=True)[0]
        return self.head(values), frames


def stored(folder: Path, teacher: Hybrid, output: str, frames: int, utterances: int) -> TeacherEnsemble:
    """A teacher's stored outputs, or those of a layer, on some utterances."""
    head, width = teacher.ctc_head, teacher.encoder.width
    is_layer = output != "ctc"
    about = {"train_speakers": (), "output": output, "encoding": "dense16" if is_layer else "fp16"}
    about |= {"size": len(head.bias), "width": width, "tokens": "none", "blank": 2, "bos": 0, "eos": 1}
    header = Header(teacher="T", stride_ms=80.0, **about)
    with Writer(folder / output, header, None if is_layer else (head.weight, head.bias)) as writer:
        for index in range(utterances):
            writer.add(f"u{index}", torch.randn(frames, width) / 3)
    return TeacherEnsemble({"T": LogitStore(folder / output)}, Weighting())


def main() -> None:
    run = report.start(__file__, __doc__)
    set_threads()
    torch.manual_seed(0)
    size, frames, inputs, tokens, own, of_teacher, utterances, rounds = SMOKE if run.smoke else FULL
    plain = PlainModel(inputs, *own, tokens).train()
    students = {
        name: Hybrid(BiLSTM(BiLSTMShape(inputs=inputs, d_model=own[0], layers=own[1])), Heads(tokens, 0)).train()
        for name in (PLAIN, HYBRID)
    }
    teacher = Hybrid(BiLSTM(BiLSTMShape(inputs=inputs, d_model=of_teacher[0], layers=of_teacher[1])), Heads(tokens, 0))
    optimisers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        for name, model in {PEER: plain, **students}.items()
    }
    ids = [[5, 6, 7, 8, 9, 10, 11, 12][: max(1, frames // 5)]] * size

    def batch(number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        names = [f"u{int(one)}" for one in torch.randint(utterances, (size,), generator=generator)]
        listed = [Utterance(name, "S", Path(f"{name}.npy"), frames * 0.04, "") for name in names]
        values = torch.randn(size, frames, inputs, generator=generator)
        return Batch(listed, ids, loaded=[values, torch.full((size,), frames)])

    def plain_step(one: Batch) -> None:
        logits, lengths = plain(one.inputs, one.lengths)
        targets = torch.tensor(one.ids)
        sizes = torch.full((size,), targets.shape[1])
        loss = nn.functional.ctc_loss(logits.log_softmax(-1).transpose(0, 1), targets, lengths, sizes, blank=2)
        update(PEER, plain, loss)

    def update(name: str, model: nn.Module, loss: torch.Tensor) -> None:
        optimisers[name].zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimisers[name].step()

    with tempfile.TemporaryDirectory() as folder:
        after = (frames + 1) // 2
        layers = {2: 2, 1: 1} if run.smoke else {2: 2, 3: 4}
        outputs = {"ctc", *(f"layer{layer}" for layer in layers.values())}
        targets = {name: stored(Path(folder), teacher, name, after, utterances) for name in sorted(outputs)}
        hybrid = Distill(alpha=0.7, beta=0.2, gamma=0.1, layers=layers, temperature=4.0)
        widths = dict.fromkeys(layers, teacher.encoder.width)
        objectives = {
            PLAIN: Objective(Learner(students[PLAIN]), Distill(alpha=0.0, beta=1.0), TERMS),
            HYBRID: Objective(Learner(students[HYBRID], widths), hybrid, TERMS, Sources(targets)),
        }
        forms = {PEER: plain_step} | {
            name: lambda one, name=name: update(name, students[name], objectives[name](one)["loss"])
            for name in objectives
        }
        times = report.interleaved(forms, rounds, batch)
        by_plain, by_own = report.against(times, PEER), report.against(times, PLAIN)
    run.save(
        [
            {
                "step": name,
                "s": by_plain[name][0],
                "ratio of times to plain PyTorch": by_plain[name][1],
                "to references alone": by_own[name][1],
            }
            for name in times
        ]
    )


if __name__ == "__main__":
    main()
