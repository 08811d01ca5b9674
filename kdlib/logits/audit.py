"""Audit logits of other code before they are used: what each file holds, whether it fits, and whose speech it is of.

The point that matters most is the last. Teachers' outputs can be averaged frame by frame only where they are outputs on
the same recordings. Where every teacher speaks of its own speaker's recordings, frame t of one and frame t of another
are different sounds, whatever their lengths are cut to.
"""

import argparse
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from kdlib.console import progress
from kdlib.corpus import manifest
from kdlib.corpus.manifest import Corpus, Speaker
from kdlib.corpus.speakers import published_speakers
from kdlib.decode.greedy import collapse_repeats
from kdlib.errors import UserError
from kdlib.io import atomic_write, repository_root
from kdlib.logits import found
from kdlib.logits.found import FoundLogits
from kdlib.tokens import Tokens, normalise

SAMPLE = 100  # utterances of each file that are read
SURE = 0.999  # share of the rows
STEP_MS = (10.0, 90.0)  # from a frame of an encoder to the next


@dataclass(frozen=True)
class FileAudit:
    """What one file of logits holds."""

    teacher: str
    output: str
    utterances: int
    speakers: str  # whose recordings they are, by the ids
    duplicates: int = 0
    missing: int = 0  # utterances of the manifest, of these speakers, that it does not have
    unknown: int = 0  # of it, that the manifest does not have
    vocabulary: int = 0
    kind: str = ""  # logits, log-probabilities or probabilities
    special: str = ""  # what the data say of blank, or of the end of sequence
    special_id: int | None = None
    frames: float = 0.0  # mean per utterance
    ms_per_frame: float = float("nan")  # with a manifest
    nan: int = 0  # utterances of the sample
    texts: int = 0  # distinct ones of the best tokens, of the sample
    wra: float = float("nan")  # with a manifest and a tokenizer
    problem: str = ""  # why it cannot be used


@dataclass(frozen=True)
class Audit:
    """All files of a folder, and what can be done with them."""

    files: list[FileAudit]
    findings: list[str]  # sentences, the gravest first
    own_recordings: bool  # each teacher has outputs on its own speaker's speech alone

    @property
    def table(self) -> pd.DataFrame:
        """One row per file."""
        return pd.DataFrame([asdict(one) for one in self.files])


def audit(folder: Path, corpus: Corpus | None = None, tokens: Tokens | None = None) -> Audit:
    """Audit the logits in a folder; a manifest tells what is missing, and a tokenizer what they say."""
    sources, files = found.find(folder), []
    known = {utt.utt_id: utt for utt in corpus} if corpus else {}
    with progress(len(sources), f"audit of {folder.name}", "file") as bar:
        for source in sources:
            files.append(_audit_file(source, known, tokens))
            bar.update(1)
    common = shared(sources)
    own = not common and of_own_speakers(sources, known)
    return Audit(files, _findings(files, sources, common, own), own)


def speaker_of(utt_id: str, known: Mapping) -> str:
    """The speaker of an utterance: the manifest's, or what its id begins with."""
    return known[utt_id].speaker if utt_id in known else utt_id.split("_")[0]


def _audit_file(source: FoundLogits, known: Mapping, tokens: Tokens | None) -> FileAudit:
    names = list(source.items)
    speakers = Counter(speaker_of(name, known) for name in names)
    about = {"teacher": source.teacher, "output": source.output, "utterances": len(names)}
    about["speakers"] = ", ".join(f"{name} {count}" for name, count in speakers.most_common(4))
    about["speakers"] += f", {len(speakers) - 4} more" if len(speakers) > 4 else ""
    about["duplicates"] = len(source.twice)
    if source.problem or not names:
        return FileAudit(**about, problem=source.problem or f"{source.path}: it has no utterances")
    if known:
        about["missing"] = sum(utt.speaker in speakers and name not in source.items for name, utt in known.items())
        about["unknown"] = sum(name not in known for name in names)
    drawn = random.Random(0).sample(names, min(SAMPLE, len(names)))
    rows, bad = {}, 0
    for name in drawn:
        try:
            values = found.as_array(source.items[name](), name, source.path).astype(np.float32)
        except UserError as error:
            return FileAudit(**about, problem=str(error))
        if values.ndim != 2:
            shape = list(values.shape)
            return FileAudit(**about, problem=f"{source.path}: {name} has the shape {shape}, expected [frames, tokens]")
        bad += not np.isfinite(values).all()
        rows[name] = values
    sizes = Counter(values.shape[1] for values in rows.values())
    if len(sizes) > 1:
        return FileAudit(**about, problem=f"{source.path}: tokens differ between utterances: {dict(sizes)}")
    sound = {name: values for name, values in rows.items() if np.isfinite(values).all() and len(values)}
    about |= {
        "vocabulary": next(iter(sizes)),
        "nan": bad,
        "frames": float(np.mean([len(one) for one in rows.values()])),
    }
    if not sound:
        return FileAudit(**about, problem=f"{source.path}: no utterance of the sample has finite values")
    about["kind"] = kind_of(np.concatenate(list(sound.values())))
    best = {name: values.argmax(1) for name, values in sound.items()}
    known_sound = [name for name in sound if name in known and known[name].duration_s]
    if known_sound:
        about["ms_per_frame"] = float(
            np.median([1000 * known[name].duration_s / len(sound[name]) for name in known_sound])
        )
    output = source.output or output_of(best, about.get("ms_per_frame", float("nan")))
    about["output"] = output
    blank, about["special"] = _special(best, output)
    about["special_id"] = blank
    hypotheses = {name: _text_ids(row, output, blank) for name, row in best.items()}
    about["texts"] = len(set(map(tuple, hypotheses.values())))
    if tokens and known:
        pairs = [(tokens.decode(ids), normalise(known[name].text)) for name, ids in hypotheses.items() if name in known]
        about["wra"] = float(np.mean([said == text for said, text in pairs])) if pairs else float("nan")
    problem = ""
    if tokens and tokens.size != about["vocabulary"]:
        problem = f"{source.path}: {about['vocabulary']:,} tokens, but the tokenizer has {tokens.size:,}"
    return FileAudit(**about, problem=problem)


def kind_of(rows: np.ndarray) -> str:
    """Logits, log-probabilities or probabilities, from rows [N, V]."""
    if rows.min() >= 0 and (np.abs(rows.sum(1) - 1) < 1e-2).mean() > SURE:
        return "probabilities"
    largest = rows.max(1, keepdims=True)
    sums = largest[:, 0] + np.log(np.exp(rows - largest).sum(1))
    return "log-probabilities" if (np.abs(sums) < 1e-2).mean() > SURE else "logits"


def output_of(best: Mapping[str, np.ndarray], ms_per_frame: float = float("nan")) -> str:
    """CTC outputs repeat tokens and have a blank; a decoder's steps end with the same token."""
    last = Counter(int(row[-1]) for row in best.values())
    all_tokens = Counter(int(token) for row in best.values() for token in row)
    ends = last.most_common(1)[0][1] / len(best)
    share = all_tokens.most_common(1)[0][1] / all_tokens.total()
    if STEP_MS[0] <= ms_per_frame <= STEP_MS[1] or share > 0.5:
        return "ctc"
    return "decoder" if ends > 0.5 else "ctc"


def _special(best: Mapping[str, np.ndarray], output: str) -> tuple[int | None, str]:
    """The blank, or the end of sequence, by how often it is the best token and where."""
    if output == "ctc":
        counts = Counter(int(token) for row in best.values() for token in row)
        token, count = counts.most_common(1)[0]
        share = count / counts.total()
        return (
            (token, f"blank {token} ({100 * share:.0f} % of the frames)") if share > 0.2 else (None, "no blank found")
        )
    token, count = Counter(int(row[-1]) for row in best.values()).most_common(1)[0]
    return token, f"end {token} ({100 * count / len(best):.0f} % of the last steps)"


def _text_ids(row: np.ndarray, output: str, special: int | None) -> list[int]:
    ids = [int(token) for token in row]
    if output == "ctc":
        return collapse_repeats(ids, -1 if special is None else special)
    return ids[: ids.index(special)] if special in ids else ids


def _teachers(sources: Sequence[FoundLogits]) -> set[str]:
    return {source.teacher for source in sources if source.items}


def shared(sources: Sequence[FoundLogits]) -> int:
    """The utterances that at least two teachers have outputs on."""
    counts: Counter[str] = Counter()
    for teacher in _teachers(sources):
        counts.update({name for source in sources if source.teacher == teacher for name in source.items})
    return sum(count > 1 for count in counts.values())


def of_own_speakers(sources: Sequence[FoundLogits], known: Mapping) -> bool:
    """True if every teacher's utterances are of one speaker, another for each."""
    of_teacher: dict[str, Counter[str]] = {}
    for source in sources:
        of_teacher.setdefault(source.teacher, Counter()).update(speaker_of(name, known) for name in source.items)
    main = []
    for counts in filter(None, of_teacher.values()):
        name, count = counts.most_common(1)[0]
        if count < 0.9 * counts.total():
            return False
        main.append(name)
    return len(main) > 1 and len(set(main)) == len(main)


def _findings(files: Sequence[FileAudit], sources: Sequence[FoundLogits], common: int, own: bool) -> list[str]:
    said = [f"{one.teacher}: {one.problem}" for one in files if one.problem]
    usable = [one for one in files if not one.problem]
    for one in usable:
        if one.kind == "probabilities":
            said.append(
                f"{one.teacher}: probabilities, not logits: a second softmax would flatten them; their logarithm can "
                "be taken, as far as their precision goes (what was rounded to 0 is lost)"
            )
        if one.duplicates:
            said.append(f"{one.teacher}: {one.duplicates} utterances occur twice; the first of each counts")
        if one.nan:
            said.append(
                f"{one.teacher}: {one.nan} utterances of {min(SAMPLE, one.utterances)} have NaN or infinite values"
            )
        if one.unknown:
            said.append(f"{one.teacher}: {one.unknown} of {one.utterances} utterances are not in the manifest")
        if one.missing:
            said.append(f"{one.teacher}: {one.missing} utterances of these speakers in the manifest have no logits")
    said = list(dict.fromkeys(said))  # one sentence for both outputs of a teacher
    sizes = Counter(one.vocabulary for one in usable)
    if len(sizes) > 1:
        usual = sizes.most_common(1)[0][0]
        different = {one.teacher: one.vocabulary for one in usable if one.vocabulary != usual}
        others = ", ".join(f"{name} {size:,}" for name, size in different.items())
        said.append(
            f"Vocabularies differ ({usual:,} tokens, but {others}): the same id is another token; leave these out"
        )
    if own:
        said.append(
            "Every teacher has outputs on its own speaker's recordings alone. An average over teachers, frame by "
            "frame, would mix different recordings; cutting them to the shortest does not make them the same. What is "
            "sound: each speaker's own teacher; word posteriors, averaged over the recordings of a word; or the "
            "teachers' models, run on the student's recordings"
        )
    elif len(_teachers(sources)) > 1 and not common:
        said.append("No utterance has outputs of two teachers: there is nothing to average")
    elif common:
        said.append(f"{common:,} utterances have outputs of at least two teachers, and can be averaged frame by frame")
    return said


def recipe(result: Audit, folder: Path) -> str:
    """What a recipe would say, to go on from what can be used; empty if that is nothing."""
    usable = [one for one in result.files if not one.problem]
    sizes = Counter(one.vocabulary for one in usable)
    if not usable:
        return ""
    usual = sizes.most_common(1)[0][0]
    bad = [one.teacher for one in result.files if one.problem or one.vocabulary != usual]
    special = {one.output: one.special_id for one in usable if one.special_id is not None}
    blank, eos = special.get("ctc"), special.get("decoder")
    lines = [f"tokens: {{source: <the sentencepiece model of these logits>, size: {usual}}}"]
    more = f", without: [{', '.join(dict.fromkeys(bad))}]" if bad else ""
    if blank not in (None, 2) or eos not in (None, 1):
        ends = "null" if eos is None else eos
        bos = {(0, 2): 1, (0, 1): 2}.get((blank, eos), "null")
        more += f", ids: {{blank: {2 if blank is None else blank}, bos: {bos}, eos: {ends}}}"
    lines.append(f"teacher: {{source: stores, folder: {folder}{more}}}")
    if result.own_recordings:
        lines.append("aggregation: {method: own}")
    return "\n".join(lines)


def people_of(corpus: Corpus | None, names: Sequence[str]) -> pd.DataFrame:
    """Intelligibility of the speakers that the teachers are named after; nothing of others."""
    people = {name: corpus.person(name) if corpus else Speaker(name) for name in names}
    people = {name: one if one.level else published_speakers().get(name, one) for name, one in people.items()}
    known = {name: one for name, one in people.items() if one.level}
    return pd.DataFrame(
        {
            name: {
                "intelligibility": f"{one.intelligibility_pct:g} %" if one.intelligibility_pct else "",
                "level": one.level,
            }
            for name, one in known.items()
        }
    ).T


def roles(folds: Path) -> dict[str, str]:
    """What each speaker is in the folds of a folder of fold files."""
    if not folds.is_dir():
        raise UserError(f"folds: there is no folder {folds}; name one of params/folds, such as original_study")
    files = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folds.glob("*.yaml"))]
    held, dev = [str(one["held_out"]) for one in files], {}
    for one in files:
        dev.setdefault(one["fold"].get("dev"), []).append(str(one["held_out"]))
    found = dict.fromkeys(held, "held out")
    for name, of in dev.items():
        if name:
            found[name] = "; ".join(filter(None, [found.get(name, ""), f"dev of {', '.join(of)}"]))
    return found


def page(result: Audit, folder: Path, corpus: Corpus | None = None, folds: Path | None = None) -> str:
    """The audit as text; with the roles of speakers in a folder of fold files."""
    table = result.table.drop(columns=["problem", "special_id"])
    if folds:
        table.insert(1, "role", table.teacher.map(roles(folds)).fillna("teacher"))
    known = people_of(corpus, list(dict.fromkeys(table.teacher)))
    if len(known):
        table.insert(1, "level", table.teacher.map(known.level))
        table.insert(2, "intelligibility", table.teacher.map(known.intelligibility))
    table["wra"] = (100 * table.wra).round(1)
    for name in ("frames", "ms_per_frame"):
        table[name] = table[name].round(1)
    shown = table.dropna(axis=1, how="all").to_string(index=False, na_rep="-")
    lines = [
        f"{folder}: {len(result.files)} files of {len({one.teacher for one in result.files})} teachers",
        "",
        shown,
        "",
    ]
    lines += [f"- {text}." for text in result.findings]
    if how := recipe(result, folder):
        lines += ["", "A recipe that goes on from these:", "", *(f"    {line}" for line in how.splitlines())]
    return "\n".join(lines)


def write(result: Audit, folder: Path, out: Path, corpus: Corpus | None = None, folds: Path | None = None) -> str:
    """Write the page and the table; return the page."""
    out.mkdir(parents=True, exist_ok=True)
    text = page(result, folder, corpus, folds)
    (out / "audit.txt").write_text(text + "\n", encoding="utf-8")
    with atomic_write(out / "audit.csv") as hidden:
        result.table.to_csv(hidden, index=False)
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of the command."""
    parser.add_argument("logits", type=Path, help="a folder with a file, or a folder, of logits per teacher")
    parser.add_argument("--manifest", type=Path, help="SpeechBrain CSV or NeMo JSON lines: what is missing, and frames")
    parser.add_argument("--tokenizer", type=Path, help="a sentencepiece model: what the logits say")
    parser.add_argument("--folds", help="a folder of params/folds, such as original_study: what speakers are in each")
    parser.add_argument("--out", type=Path, help="by default outputs/audits/<folder>")


def run(options: argparse.Namespace) -> None:
    """Run the command: audit a folder of logits."""
    corpus = manifest.read(options.manifest) if options.manifest else None
    tokens = Tokens.of_file(options.tokenizer) if options.tokenizer else None
    out = options.out or repository_root() / "outputs" / "audits" / options.logits.resolve().name
    folds = repository_root() / "params" / "folds" / options.folds if options.folds else None
    print(write(audit(options.logits, corpus, tokens), options.logits, out, corpus, folds))
    print(f"\nWritten: {out}/audit.txt, audit.csv")
