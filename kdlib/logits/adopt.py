"""Logits of other code as a fold's teachers: whom each was trained on, and their stores with the recipe's tokens.

Logits are adopted once, as small as their rank allows (`importing`). Special tokens move to kdlib's ids, probabilities
are taken by their logarithm, and a temperature that they were divided by is undone: what is stored is logits again.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kdlib.console import report, warn
from kdlib.corpus.manifest import Corpus
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.evaluate.rounding import percent
from kdlib.io import resolve_path, write_json
from kdlib.logits import audit, extract, found, importing
from kdlib.logits.found import FoundLogits, Load
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.settings.teacher import Teacher, TokenIds
from kdlib.teachers.teacher_sets import by_speaker, trained_on
from kdlib.tokens import BLANK, BOS, EOS, Tokens, places_of_ids

LOOKED_AT = 20  # utterances of each file that are read before it is used
SEEN = 0.2  # share of the frames whose best token is the blank, at least, where there is one
SMALLEST = 1e-8  # probabilities below it were rounded to 0
OFF = 1.5  # frames by which an utterance of a padded batch may be longer than its recording


@dataclass(frozen=True)
class FoundTeacher:
    """A teacher of other code: its speakers, and its logits by output."""

    name: str
    train_speakers: tuple[str, ...]
    outputs: Mapping[str, FoundLogits]  # "ctc", "decoder"
    timed: Sequence[Utterance] = ()  # of the corpus, that it has outputs on

    @property
    def files(self) -> dict[str, list]:
        """Size and time of its files, as stages record them: to compare tens of gigabytes takes minutes."""
        paths = [path for one in self.outputs.values() for path in _files(one.path)]
        found: dict[str, list] = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
        return found | {f"utterances of {name}": [order_of(one)] for name, one in self.outputs.items()}


def order_of(source: FoundLogits) -> str:
    """A fingerprint of which utterance is which: of a list, its metadata says so."""
    return hashlib.sha256("\n".join(source.items).encode()).hexdigest()[:16]


def find_teachers(settings: Teacher, corpus: Corpus) -> dict[str, FoundTeacher]:
    """The teachers whose logits lie in a recipe's folder, by name; what cannot be used is refused by name."""
    folder = resolve_path(settings.folder or "")
    sources: dict[str, list[FoundLogits]] = {}
    for one in found.find(folder):
        if one.teacher not in settings.without:
            sources.setdefault(one.teacher, []).append(one)
    if not sources:
        raise UserError(f"teacher.without: no teacher is left in {folder}")
    found_teachers = [_teacher(name, parts, settings, corpus) for name, parts in sources.items()]
    return by_speaker({one.name: one for one in found_teachers})


def _teacher(name: str, parts: Sequence[FoundLogits], settings: Teacher, corpus: Corpus) -> FoundTeacher:
    outputs: dict[str, FoundLogits] = {}
    for one in parts:
        problem = one.problem or (f"{one.path}: it has no utterances" if not one.items else "")
        if problem:
            raise UserError(f"{problem}. To go on without this teacher, write teacher: {{without: [{name}]}}")
        output = one.output or audit.output_of(_best(one, LOOKED_AT))
        if output in outputs:
            raise UserError(
                f"{one.path}: {name} has other {output} logits in {outputs[output].path}; remove one of them"
            )
        if one.twice:
            warn(f"{one.path}: {len(one.twice)} utterances occur twice; the first of each counts ({one.twice[0]})")
        outputs[output] = one
    if "ctc" not in outputs:
        raise UserError(
            f"{parts[0].path}: {name} has no CTC logits, which targets are compared and scored by; extract them too, "
            f"or write teacher: {{without: [{name}]}}"
        )
    said = parts[0].metadata.get("train_speakers")
    speakers = tuple(map(str, said)) if isinstance(said, list) and name not in settings.trained_on else ()
    speakers = speakers or trained_on(name, settings, corpus)
    known = [utt for utt in corpus if utt.utt_id in outputs["ctc"].items]
    if not known:
        theirs, ours = next(iter(outputs["ctc"].items)), next(iter(corpus)).utt_id
        raise UserError(
            f"{outputs['ctc'].path}: none of its utterances is in the corpus: it has {theirs}, the corpus {ours}; give "
            "both the same ids"
        )
    return FoundTeacher(name, speakers, outputs, known)


def own_recordings(teachers: Iterable[FoundTeacher], corpus: Corpus) -> bool:
    """True if every teacher has outputs on its own speaker's recordings alone: nothing to average by frame."""
    sources = [one.outputs["ctc"] for one in teachers]
    return not audit.shared(sources) and audit.of_own_speakers(sources, {utt.utt_id: utt for utt in corpus})


def record(partial: Path, teacher: FoundTeacher, tokens: Tokens) -> None:
    """What is known of a teacher of other code, in place of a saved model."""
    outputs = {name: str(one.path) for name, one in teacher.outputs.items()}
    heads = {"size": tokens.size, "layers": int("decoder" in teacher.outputs)}
    about = {"train_speakers": list(teacher.train_speakers), "tokens": tokens.fingerprint, "heads": heads}
    write_json(partial / "model.json", about | {"encoder": "", "logits": outputs})


def adopt(
    partial: Path,
    teacher: FoundTeacher,
    utterances: Sequence[Utterance],
    tokens: Tokens,
    job: extract.Extraction,
    settings: Teacher,
) -> None:
    """Store a teacher's logits on utterances: `ctc` and, for training, `decoder`; and the losses of the references."""
    for output, source in teacher.outputs.items():
        if output == "decoder" and job.purpose != "training":
            continue  # teacher-forced on the reference: nothing that could be scored
        known = [utt for utt in utterances if utt.utt_id in source.items]
        wanted = [utt for utt in known if utt.text or output != "decoder"]  # it has read the reference
        stride_ms = _stride_ms(source, teacher.timed) if output == "ctc" else 0.0
        header = _header(teacher, output, stride_ms, tokens, job)
        _store(partial / output, source, wanted, header, tokens, settings)
        if len(wanted) < len(utterances):
            count = f"{len(wanted):,} of {len(utterances):,} utterances for {job.purpose}"
            report(f"{teacher.name}: {output} logits on {count}")
    _write_losses(partial, utterances, tokens)


def _store(
    folder: Path,
    source: FoundLogits,
    wanted: Sequence[Utterance],
    header: Header,
    tokens: Tokens,
    settings: Teacher,
) -> None:
    """Import the logits of some utterances as logits with kdlib's ids."""
    if not wanted:
        with Writer(folder, replace(header, encoding="dense16", width=header.size), None):
            return
    sample = _rows(source, [utt.utt_id for utt in wanted][:LOOKED_AT])
    ids, size = settings.ids, sample[next(iter(sample))].shape[1]
    columns = np.array(places_of_ids(size, tokens, ids.blank, ids.bos, ids.eos, str(source.path)))
    if header.output == "ctc":
        _check_blank(source, {name: row.argmax(1) for name, row in sample.items()}, ids)
    rows = np.concatenate(list(sample.values()))
    probable = np.isfinite(rows).all() and audit.kind_of(rows) == "probabilities"
    if probable:
        warn(f"{source.path}: probabilities, taken by their logarithm; what was rounded to 0 counts as {SMALLEST:g}")
    longest = {utt.utt_id: _length(utt, header, tokens) for utt in wanted} if source.padded else {}

    def logits(name: str, load: Load) -> np.ndarray:
        values = found.as_array(load(), name, source.path)
        if values.ndim != 2 or values.shape[1] <= columns.max():
            shape = list(values.shape)
            raise UserError(f"{source.path}: {name} has the shape {shape}, expected [frames, {len(columns)} tokens]")
        values = values[: longest.get(name), columns].astype(np.float32)
        if probable:
            values = np.log(np.maximum(values, SMALLEST))
        return values * settings.logits_temperature

    items = {name: lambda name=name: logits(name, source.items[name]) for name in (utt.utt_id for utt in wanted)}
    key = " ".join(f"{path.stat().st_size} {path.stat().st_mtime_ns}" for path in _files(source.path))
    key += f" {order_of(source)}"
    importing.import_logits(replace(source, items=items, twice=()), folder, header, key=key)


def _header(teacher: FoundTeacher, output: str, stride_ms: float, tokens: Tokens, job: extract.Extraction) -> Header:
    return Header(
        teacher=teacher.name,
        train_speakers=teacher.train_speakers,
        output=output,
        encoding="fp16",
        size=tokens.size,
        width=0,
        tokens=tokens.fingerprint,
        blank=BLANK,
        bos=BOS,
        eos=EOS,
        stride_ms=stride_ms,
        purpose=job.purpose,
    )


def _stride_ms(source: FoundLogits, known: Sequence[Utterance]) -> float:
    """Milliseconds of a frame, from the lengths of recordings of whatever purpose: a multiple of 10."""
    timed = [utt for utt in known if utt.duration_s and utt.utt_id in source.items]
    timed = timed[:: max(1, len(timed) // LOOKED_AT)]
    if source.padded or not timed:
        return 40.0
    frames = {name: len(row) for name, row in _rows(source, [utt.utt_id for utt in timed]).items()}
    each = [1000 * utt.duration_s / frames[utt.utt_id] for utt in timed if frames[utt.utt_id]]
    return max(10.0, 10.0 * round(float(np.median(each)) / 10)) if each else 40.0


def _check_blank(source: FoundLogits, best: Mapping[str, np.ndarray], ids: TokenIds) -> None:
    """Refuse logits whose blank, by the data, is another token than the recipe's."""
    tokens, counts = np.unique(np.concatenate(list(best.values())), return_counts=True)
    usual, share = int(tokens[counts.argmax()]), counts.max() / max(1, counts.sum())
    size = found.as_array(next(iter(source.items.values()))(), "", source.path).shape[-1]
    expected = size - 1 if ids.blank == -1 else ids.blank
    if len(tokens) > 2 and usual != expected and share > SEEN and expected not in tokens:
        raise UserError(
            f"{source.path}: token {usual} is the best in {percent(share, 0):.0f} % of the frames, and {expected}, the "
            f"blank of teacher.ids, in none; write teacher: {{ids: {{blank: {usual}, bos: ..., eos: ...}}}} "
            "(SpeechBrain: blank 0, bos 1, eos 2; NeMo: blank -1, the last)"
        )


def _length(utt: Utterance, header: Header, tokens: Tokens) -> int:
    """The frames, or steps, of an utterance whose batch was padded to the longest."""
    if header.output == "decoder":
        return len(tokens.encode(utt.text)) + 1
    return int(1000 * utt.duration_s / header.stride_ms + OFF)


def _write_losses(partial: Path, utterances: Sequence[Utterance], tokens: Tokens) -> None:
    """outputs.csv: no free-running hypotheses, and the CTC loss of each reference."""
    store = LogitStore(partial / "ctc")
    known = [utt for utt in utterances if utt.utt_id in store]
    with extract.OutputsFile(partial / extract.OUTPUTS) as rows:
        for start in range(0, len(known), extract.BATCH):
            batch = known[start : start + extract.BATCH]
            logits = [store.logits(utt.utt_id) for utt in batch]
            lengths = torch.tensor([len(row) for row in logits])
            padded = torch.nn.utils.rnn.pad_sequence(logits, batch_first=True)
            losses = extract.reference_losses(padded, lengths, [tokens.encode(utt.text) for utt in batch])
            rows.add(extract.TeacherOutput(utt.utt_id, (), loss) for utt, loss in zip(batch, losses, strict=True))


def _rows(source: FoundLogits, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The logits of some utterances, as they are."""
    rows = {name: found.as_array(source.items[name](), name, source.path).astype(np.float32) for name in names}
    for name, values in rows.items():
        if values.ndim != 2:
            raise UserError(f"{source.path}: {name} has the shape {list(values.shape)}, expected [frames, tokens]")
    return rows


def _best(source: FoundLogits, count: int) -> dict[str, np.ndarray]:
    """The best tokens of some utterances."""
    names = list(source.items)
    return {
        name: row.argmax(1) for name, row in _rows(source, names[:: max(1, len(names) // count)]).items() if len(row)
    }


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file())
