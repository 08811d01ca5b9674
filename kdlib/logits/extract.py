"""Extract every teacher's outputs on every utterance once: CTC per frame, and the attention decoder per token.

All teachers get the same recordings. `training` covers every dysarthric speaker's training blocks; the decoder is
teacher-forced on the reference (input BOS and the tokens, target the tokens and EOS) and left out for unlabelled
speech. `analysis` covers the test blocks with a free-running decoder: for scores and for choices on the dev speaker,
refused as a training target. Both are stages that resume after a kill behind the last complete batch, with the same
bytes.
"""

import contextlib
import csv
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import pandas as pd
import torch

from kdlib.console import progress, report
from kdlib.corpus import audio
from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance, Utterances
from kdlib.errors import UserError
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.models.decoder import teacher_forced
from kdlib.models.hybrid import TrainedModel
from kdlib.tokens import BLANK, BOS, EOS

Purpose = Literal["training", "analysis"]
BATCH = 32
OUTPUTS = "outputs.csv"  # next to the stores: hypotheses of the free-running decoder, and CTC losses of the references


class TeacherOutput(NamedTuple):
    """A row of outputs.csv."""

    utt_id: str
    free_running: tuple[int, ...]  # hypothesis of the attention decoder; empty for training utterances
    ctc_loss: float  # of the reference, in nats per token


@dataclass(frozen=True)
class Extraction:
    """Whose outputs are stored, what for, and how."""

    teacher: str
    purpose: Purpose
    encoding: str


def extract(
    partial: Path, model: TrainedModel, utterances: Sequence[Utterance], lexicon: Iterable[str], job: Extraction
) -> None:
    """Store a teacher's outputs on utterances: `ctc` and, for training, `decoder`; and outputs.csv."""
    has_decoder = model.model.decoder is not None  # a student as teacher may have none
    outputs = ("ctc", "decoder") if job.purpose == "training" and has_decoder else ("ctc",)
    longest = max(len(model.tokens.encode(text)) for text in {*lexicon, *(utt.text for utt in utterances)})
    max_len = longest + 4 if job.purpose == "analysis" and has_decoder else 0
    with contextlib.ExitStack() as stack:
        headers = {name: _header(model, name, job) for name in outputs}
        _announce(job.teacher, model, utterances, [header for header, _ in headers.values()])
        writers = {name: stack.enter_context(Writer(partial / name, *headers[name])) for name in outputs}
        rows = stack.enter_context(OutputsFile(partial / OUTPUTS))
        bar = stack.enter_context(progress(len(utterances), f"{job.teacher} on {job.purpose} speech", "utt"))
        for batch in _batches(utterances):
            sinks = {"rows": rows, **writers}
            if any(utt.utt_id not in sinks[name] for utt in batch for name in sinks if _has_output(utt, name)):
                _extract_batch(model, batch, writers, rows, max_len)
            bar.update(len(batch))


def extract_layer(
    partial: Path, model: TrainedModel, utterances: Sequence[Utterance], layer: int, job: Extraction
) -> None:
    """Store the outputs of one of an encoder's layers, as they are: dense, without a head."""
    encoder = model.model.encoder
    if not 1 <= layer <= encoder.layers:
        raise UserError(
            f"distill.layers: the teacher {job.teacher} has {encoder.layers} layers, counted from 1; there is no layer "
            f"{layer}"
        )
    header = replace(_header(model, "ctc", job)[0], output=f"layer{layer}", encoding=job.encoding)
    with (
        Writer(partial, header, None) as writer,
        progress(len(utterances), f"layer {layer} of {job.teacher}", "utt") as bar,
    ):
        for batch in _batches(utterances):
            if any(utt.utt_id not in writer for utt in batch):
                inputs = Batch(batch)
                with torch.inference_mode():
                    hidden = model(inputs.inputs, inputs.lengths, layers=(layer,))
                for utt, values, length in zip(batch, hidden.hidden[layer], hidden.lengths.tolist(), strict=True):
                    if utt.utt_id not in writer:
                        writer.add(utt.utt_id, values[:length])
                writer.flush()
            bar.update(len(batch))


def store_sizes(folders: Mapping[str, Path]) -> pd.DataFrame:
    """Contents and sizes of stores, one row per teacher, with the size of their logits in float32."""
    rows = {}
    for name, folder in folders.items():
        stores = {output: LogitStore(folder / output) for output in ("ctc", "decoder") if (folder / output).is_dir()}
        frames = {output: sum(map(store.frames, store)) for output, store in stores.items()}
        stored = sum(file.stat().st_size for store in stores.values() for file in store.folder.iterdir())
        dense = sum(4 * store.header.size * frames[output] for output, store in stores.items())
        rows[name] = {
            "utterances": len(stores["ctc"]),
            "CTC frames": frames["ctc"],
            "decoder steps": frames.get("decoder", 0),
            "MB": round(stored / 1e6, 1),
            "MB as float32 logits": round(dense / 1e6, 1),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def _extract_batch(
    teacher: TrainedModel, batch: list[Utterance], writers: dict[str, Writer], rows: "OutputsFile", max_len: int
) -> None:
    """Run a teacher on a batch and store what is missing; `max_len` 0: without the free-running decoder."""
    ids = [teacher.tokens.encode(utt.text) for utt in batch]
    with torch.inference_mode():
        inputs = Batch(batch)
        outputs = teacher(inputs.inputs, inputs.lengths)
        activations = {"ctc": (outputs.encoded, outputs.lengths.tolist())}
        if "decoder" in writers:
            given, _, steps = teacher_forced(ids)
            given = given.to(teacher.device)
            hidden = teacher.model.decoder.activations(outputs.encoded, outputs.lengths, given)
            activations["decoder"] = (hidden, steps.tolist())
        losses = reference_losses(outputs.ctc.logits, outputs.lengths, ids)
        free = teacher.model.decode_greedy(outputs.encoded, max_len, outputs.lengths) if max_len else [[]] * len(batch)
    for name, writer in writers.items():
        for utt, hidden, length in zip(batch, *activations[name], strict=True):
            if utt.utt_id not in writer and _has_output(utt, name):
                writer.add(utt.utt_id, hidden[:length])
        writer.flush()
    rows.add(TeacherOutput(utt.utt_id, tuple(hyp), loss) for utt, hyp, loss in zip(batch, free, losses, strict=True))


def _has_output(utt: Utterance, output: str) -> bool:
    """True if a teacher has this output on an utterance: a teacher-forced decoder needs a transcript."""
    return bool(utt.text) or output != "decoder"


def reference_losses(logits: torch.Tensor, lengths: torch.Tensor, ids: list[list[int]]) -> list[float]:
    """CTC loss of each reference in nats per token: inf if it has too many tokens for the frames, nan if unlabelled."""
    flat = torch.nn.utils.rnn.pad_sequence([torch.tensor(row or [BLANK + 1]) for row in ids], batch_first=True)
    flat, sizes = flat.to(logits.device), torch.tensor(list(map(len, ids)), device=logits.device)
    logprobs = logits.log_softmax(-1).transpose(0, 1)
    losses = torch.nn.functional.ctc_loss(logprobs, flat, lengths, sizes, blank=BLANK, reduction="none")
    return torch.where(sizes > 0, losses / sizes, torch.nan).tolist()


def _batches(utterances: Sequence[Utterance]) -> Iterator[list[Utterance]]:
    """Batches, speaker by speaker, so that a killed run has complete speakers."""
    return (batch for own in Utterances.of(utterances).by_speaker().values() for batch in audio.batches(own, BATCH))


def _header(teacher: TrainedModel, output: str, job: Extraction) -> tuple[Header, tuple[torch.Tensor, torch.Tensor]]:
    """The header of a store, and the head that turns its activations into logits."""
    head = teacher.model.ctc_head if output == "ctc" else teacher.model.decoder.head
    header = Header(
        teacher=job.teacher,
        train_speakers=tuple(teacher.record["train_speakers"]),
        output=output,
        encoding=job.encoding,
        size=teacher.tokens.size,
        width=head.in_features,
        tokens=teacher.tokens.fingerprint,
        blank=BLANK,
        bos=BOS,
        eos=EOS,
        stride_ms=teacher.model.encoder.stride_ms if output == "ctc" else 0.0,
        purpose=job.purpose,
    )
    return header, (head.weight, head.bias)


def _announce(speaker: str, teacher: TrainedModel, utts: Sequence[Utterance], headers: Sequence[Header]) -> None:
    """Print an estimate of the time and size of an extraction."""
    purpose = headers[0].purpose
    if not utts:
        raise UserError(f"outputs of {speaker} for {purpose}: there are no utterances; check `blocks` in the recipe")
    seconds = sum(utt.duration_s for utt in utts)
    probe = sorted(utts, key=lambda utt: utt.duration_s)[len(utts) // 2 :][:BATCH]
    with torch.inference_mode():
        one, all_of_it = Batch(probe[:1]), Batch(probe)
        teacher(one.inputs, one.lengths)
        started = time.perf_counter()
        teacher(all_of_it.inputs, all_of_it.lengths)
    real_time_factor = (time.perf_counter() - started) / sum(utt.duration_s for utt in probe)
    steps = sum(len(teacher.tokens.encode(utt.text)) + 1 for utt in utts)
    rows = {"ctc": 1000 * seconds / teacher.model.encoder.stride_ms, "decoder": steps}
    stored = sum(rows[header.output] * header.row.itemsize for header in headers)
    dense = sum(rows[header.output] * 4 * header.size for header in headers)
    report(
        f"outputs of {speaker} for {purpose}: {len(utts):,} utterances, {seconds / 60:.0f} min of speech; "
        f"about {1.3 * real_time_factor * seconds:.0f} s and {stored / 1e6:.0f} MB "
        f"(as float32 logits {dense / 1e6:,.0f} MB)"
    )


class OutputsFile:
    """outputs.csv, appended batch by batch; a row that a killed run left incomplete is dropped."""

    def __init__(self, path: Path) -> None:
        self._done = read_outputs(path) if path.is_file() else {}
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow([*TeacherOutput._fields, "whole"])
        self._write(self._done.values())

    def __contains__(self, utt_id: str) -> bool:
        return utt_id in self._done

    def __enter__(self) -> "OutputsFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, rows: Iterable[TeacherOutput]) -> None:
        """Append what is new among some rows."""
        new = [row for row in rows if row.utt_id not in self._done]
        self._done |= {row.utt_id: row for row in new}
        self._write(new)

    def _write(self, rows: Iterable[TeacherOutput]) -> None:
        for row in rows:
            self._writer.writerow([row.utt_id, " ".join(map(str, row.free_running)), f"{row.ctc_loss:.6g}", "."])
        self._file.flush()


def read_outputs(path: Path) -> dict[str, TeacherOutput]:
    """Rows of an outputs.csv, by utterance."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if len(row) == 4 and row[3] == "."]
    return {row[0]: TeacherOutput(row[0], tuple(map(int, row[1].split())), float(row[2])) for row in rows}
