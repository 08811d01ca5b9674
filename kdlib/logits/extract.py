"""What every teacher says of every utterance, once: CTC frame by frame, and the attention decoder.

All teachers hear the same recordings. `training` holds every dysarthric speaker's training blocks, the decoder being
given the reference (BOS, the tokens; it is to say the tokens, EOS) and left out where the transcript is denied.
`analysis` holds the test blocks, the decoder running free: for scores, for choices on the dev speaker, and refused as a
training target. Both are stages that a run goes on with after a kill, behind the last whole batch and with the same
bytes.
"""

import contextlib
import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import pandas as pd

from kdlib.console import progress
from kdlib.corpus import audio, labels, prepare
from kdlib.corpus.manifest import Corpus, Utterance
from kdlib.corpus.speakers import in_blocks, is_test, split
from kdlib.errors import UserError
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.models import read_record
from kdlib.params import Params
from kdlib.stage import produce
from kdlib.teachers.adapt import speaker_teacher
from kdlib.teachers.teacher_sets import fold_settings, teacher_root
from kdlib.tokens import BLANK, BOS, EOS

if TYPE_CHECKING:
    import torch

    from kdlib.models.hybrid import TrainedModel

Purpose = Literal["training", "analysis"]
CODE = ("logits/extract.py", "logits/store.py", *labels.CODE, "models/hybrid.py", "models/encoder_conformer.py")
CODE += ("models/decoder.py", "models/encoder_nemo.py", "models/nemo_files.py", "tokens.py", "corpus/audio.py")
BATCH = 32
OUTPUTS = "outputs.csv"  # beside the stores: what the decoder says by itself, and the CTC loss of the reference


class TeacherOutput(NamedTuple):
    """A row of outputs.csv."""

    utt_id: str
    free_running: tuple[int, ...]  # of the attention decoder; not run for training utterances
    ctc_loss: float  # of the reference, in nats a token


def extracted_utterances(params: Params, corpus: Corpus, purpose: Purpose) -> list[Utterance]:
    """What teachers are asked about: the same for all of them and, where teachers serve all folds, for all folds."""
    blocks = params.blocks
    if purpose == "analysis":
        return corpus.where(lambda utt: utt.text and not corpus.is_control(utt.speaker) and is_test(utt, blocks.test))
    if teacher_root(params) != params.folder:
        splits = split(corpus, params)
        return [*splits.train, *splits.unlabelled]
    return corpus.where(lambda utt: not corpus.is_control(utt.speaker) and in_blocks(utt, blocks.train))


def extract(params: Params, speaker: str, purpose: Purpose) -> Path:
    """The folder of a teacher's outputs: `ctc` and, for training, `decoder`, and outputs.csv."""
    settings = {"encoding": params.aggregation.encoding, "purpose": purpose}
    blocks = params.blocks.train if purpose == "training" else params.blocks.test
    return produce(
        teacher_root(params) / "logits" / params.teacher.family / speaker / purpose,
        lambda partial: _build(partial, params, speaker, purpose),
        what=f"outputs of {speaker} for {purpose}",
        parameters=settings | {"blocks": blocks} | fold_settings(params),
        inputs=[prepare.corpus_folder(params), speaker_teacher(params, speaker)],
        code=CODE,
    )


def open_store(params: Params, speaker: str, purpose: Purpose, output: str = "ctc") -> LogitStore:
    """A teacher's store."""
    if output == "decoder" and not read_record(speaker_teacher(params, speaker))["heads"]["layers"]:
        raise UserError(
            f"teacher {speaker} has no decoder: it can teach by CTC alone; write distill: {{heads: ctc}}, or name "
            "teachers with a decoder"
        )
    return LogitStore(extract(params, speaker, purpose) / output)


def store_sizes(folders: Mapping[str, Path]) -> pd.DataFrame:
    """What stores hold and take, one row a teacher, beside what their logits would take as float32."""
    rows = {}
    for name, folder in folders.items():
        stores = {output: LogitStore(folder / output) for output in ("ctc", "decoder") if (folder / output).is_dir()}
        kept = sum(file.stat().st_size for store in stores.values() for file in store.folder.iterdir())
        dense = sum(4 * store.header.size * sum(map(store.frames, store)) for store in stores.values())
        rows[name] = {
            "utterances": len(stores["ctc"]),
            "CTC frames": sum(map(stores["ctc"].frames, stores["ctc"])),
            "decoder steps": sum(sum(map(one.frames, one)) for name, one in stores.items() if name == "decoder"),
            "MB": round(kept / 1e6, 1),
            "MB as float32 logits": round(dense / 1e6, 1),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def teacher_outputs(params: Params, speaker: str, purpose: Purpose) -> dict[str, TeacherOutput]:
    """What lies beside a teacher's stores, by utterance."""
    return _read_outputs(extract(params, speaker, purpose) / OUTPUTS)


def _build(partial: Path, params: Params, speaker: str, purpose: Purpose) -> None:
    from kdlib.models.hybrid import TrainedModel

    teacher = TrainedModel(speaker_teacher(params, speaker))
    corpus = prepare.load(params)
    asked = extracted_utterances(params, corpus, purpose)
    speaks = teacher.model.decoder is not None  # a student that teaches may have no decoder
    outputs = ("ctc", "decoder") if purpose == "training" and speaks else ("ctc",)
    longest = max(len(teacher.tokens.encode(text)) for text in {*prepare.lexicon(params), *(u.text for u in asked)})
    with contextlib.ExitStack() as stack:
        headed = {name: _header(teacher, speaker, name, params, purpose) for name in outputs}
        _announce(speaker, teacher, asked, [header for header, _ in headed.values()])
        writers = {name: stack.enter_context(Writer(partial / name, *headed[name])) for name in outputs}
        rows = stack.enter_context(_Rows(partial / OUTPUTS))
        bar = stack.enter_context(progress(len(asked), f"{speaker} on {purpose} speech", "utt"))
        for batch in (batch for part in _parts(asked) for batch in audio.batches(part, BATCH)):
            sinks = {"rows": rows, **writers}
            if any(utt.utt_id not in sinks[name] for utt in batch for name in sinks if _has_output(utt, name)):
                _extract_batch(teacher, batch, writers, rows, longest + 4 if purpose == "analysis" and speaks else 0)
            bar.update(len(batch))


def _extract_batch(
    teacher: "TrainedModel", batch: list[Utterance], writers: dict[str, Writer], rows: "_Rows", longest: int
) -> None:
    """Ask about a batch and write down what is not there yet."""
    import torch

    from kdlib.models.decoder import teacher_forced

    ids = [teacher.tokens.encode(utt.text) for utt in batch]
    with torch.inference_mode():
        outputs = teacher(*audio.collate(batch))
        kept = {"ctc": (outputs.encoded, outputs.lengths.tolist())}
        if "decoder" in writers:
            inputs, _, steps = teacher_forced(ids)
            said = teacher.model.decoder.activations(outputs.encoded, outputs.lengths, inputs)
            kept["decoder"] = (said, steps.tolist())
        losses = _losses(outputs.ctc_logits, outputs.lengths, ids)
        free = teacher.model.decode_greedy(outputs.encoded, longest, outputs.lengths) if longest else [[]] * len(batch)
    for name, writer in writers.items():
        for utt, activations, length in zip(batch, *kept[name], strict=True):
            if utt.utt_id not in writer and _has_output(utt, name):
                writer.add(utt.utt_id, activations[:length])
        writer.flush()
    rows.add(TeacherOutput(utt.utt_id, tuple(one), loss) for utt, one, loss in zip(batch, free, losses, strict=True))


def _has_output(utt: Utterance, output: str) -> bool:
    """Whether a teacher says something of an utterance: its decoder does not, without a text to begin with."""
    return bool(utt.text) or output != "decoder"


def _losses(logits: "torch.Tensor", lengths: "torch.Tensor", ids: list[list[int]]) -> list[float]:
    """The CTC loss of each reference in nats a token: infinite if the frames cannot hold it, nan if it is unknown."""
    import torch

    flat = torch.nn.utils.rnn.pad_sequence([torch.tensor(one or [BLANK + 1]) for one in ids], batch_first=True)
    sizes = torch.tensor([len(one) for one in ids])
    logprobs = logits.log_softmax(-1).transpose(0, 1)
    found = torch.nn.functional.ctc_loss(logprobs, flat, lengths, sizes, blank=BLANK, reduction="none")
    return torch.where(sizes > 0, found / sizes, torch.nan).tolist()


def _parts(asked: Sequence[Utterance]) -> list[list[Utterance]]:
    """A speaker at a time, so that what a killed run has done is whole speakers."""
    return [[utt for utt in asked if utt.speaker == name] for name in sorted({utt.speaker for utt in asked})]


def _header(
    teacher: "TrainedModel", speaker: str, output: str, params: Params, purpose: Purpose
) -> "tuple[Header, tuple[torch.Tensor, torch.Tensor]]":
    """What a store's numbers mean, and the head that expands them."""
    head = teacher.model.ctc_head if output == "ctc" else teacher.model.decoder.head
    header = Header(
        teacher=speaker,
        train_speakers=tuple(teacher.record["train_speakers"]),
        output=output,
        encoding=params.aggregation.encoding,
        size=teacher.tokens.size,
        width=head.in_features,
        tokens=teacher.tokens.fingerprint,
        blank=BLANK,
        bos=BOS,
        eos=EOS,
        stride_ms=teacher.model.encoder.stride_ms if output == "ctc" else 0.0,
        purpose=purpose,
    )
    return header, (head.weight, head.bias)


def _announce(speaker: str, teacher: "TrainedModel", asked: Sequence[Utterance], headers: Sequence[Header]) -> None:
    """Say beforehand how long it will take and how large it will be."""
    import torch

    purpose = headers[0].purpose
    if not asked:
        raise UserError(
            f"outputs of {speaker} for {purpose}: no utterance is asked for; look at `blocks` in the recipe"
        )
    seconds = sum(utt.duration_s for utt in asked)
    probe = sorted(asked, key=lambda utt: utt.duration_s)[len(asked) // 2 :][:BATCH]
    with torch.inference_mode():
        teacher(*audio.collate(probe[:1]))
        started = time.perf_counter()
        teacher(*audio.collate(probe))
    pace = (time.perf_counter() - started) / sum(utt.duration_s for utt in probe)
    frames = 1000 * seconds / teacher.model.encoder.stride_ms
    words = sum(len(teacher.tokens.encode(utt.text)) + 1 for utt in asked)
    rows = {"ctc": frames, "decoder": words}
    stored = sum(rows[one.output] * one.row.itemsize for one in headers)
    dense = sum(rows[one.output] * 4 * one.size for one in headers)
    print(
        f"outputs of {speaker} for {purpose}: {len(asked):,} utterances, {seconds / 60:.0f} min of speech; "
        f"about {1.3 * pace * seconds:.0f} s and {stored / 1e6:.0f} MB (as float32 logits {dense / 1e6:,.0f} MB)"
    )


class _Rows:
    """outputs.csv, appended batch by batch; a row that a killed run left unfinished is dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._done = _read_outputs(path) if path.is_file() else {}
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow([*TeacherOutput._fields, "whole"])
        self._write(self._done.values())

    def __contains__(self, utt_id: str) -> bool:
        return utt_id in self._done

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, rows) -> None:
        new = [row for row in rows if row.utt_id not in self._done]
        self._done |= {row.utt_id: row for row in new}
        self._write(new)

    def _write(self, rows) -> None:
        for row in rows:
            self._writer.writerow([row.utt_id, " ".join(map(str, row.free_running)), f"{row.ctc_loss:.6g}", "."])
        self._file.flush()


def _read_outputs(path: Path) -> dict[str, TeacherOutput]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if len(row) == 4 and row[3] == "."]
    return {row[0]: TeacherOutput(row[0], tuple(map(int, row[1].split())), float(row[2])) for row in rows}
