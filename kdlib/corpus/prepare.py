"""The corpus stage: the corpus that a recipe names -> outputs/<recipe>/corpus, checked, for all later stages.

The folder holds manifest.csv (SpeechBrain's columns and ours), lexicon.txt (the closed vocabulary), report.txt and
left_out.csv (recordings that cannot be used). `make` checks every file and rebuilds the folder when a recording, a
label or the recipe has changed; `load` and `lexicon` trust a folder that this process has already made or checked.
"""

import contextlib
import hashlib
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from kdlib import stage
from kdlib.corpus import labels, manifest
from kdlib.corpus.audio_checks import CHECKED_FILES, check_recordings, file_stamps
from kdlib.corpus.embedded import synthetic
from kdlib.corpus.importers import torgo, uaspeech
from kdlib.corpus.manifest import Corpus, Excluded, ImportResult, Utterance
from kdlib.corpus.speakers import speaker_info
from kdlib.errors import UserError
from kdlib.io import resolve_path
from kdlib.params import Params
from kdlib.stage import produce
from kdlib.tokens import is_punctuation, normalise

CODE = (
    "corpus/prepare.py",
    "corpus/audio.py",
    "corpus/audio_checks.py",
    "corpus/manifest.py",
    "corpus/speakers.py",
    "tokens.py",
    *torgo.CODE,
    *synthetic.CODE,
)
SETTINGS = {"corpus", "data_folder", "speakers", "lexicon", "replace", "hyphens", "punctuation", "audio"}
_checked: dict[tuple[Path, str], str] = {}  # folders that this process has made or checked -> the keys of their stages


def make(params: Params) -> Path:
    """Build the corpus folder, unless it was built from the same files."""
    own = {"synthetic"} if params.corpus == "synthetic" else {params.corpus} & {"uaspeech", "torgo"}
    settings = params.model_dump(mode="json", include=SETTINGS | own) | {"blocks": params.blocks.source}
    lists = [resolve_path(name) for name in (params.manifest, params.lexicon) if name and params.corpus != "synthetic"]
    folder = produce(
        params.folder / "corpus",
        lambda partial: _build(partial, params),
        what="corpus",
        parameters=settings
        | {"files": files_fingerprint(params), "lists": [stage.fingerprint(path) for path in lists]},
        code=CODE,
    )
    _checked[folder, _identity(params)] = stage.fingerprint(folder)
    return folder


def corpus_folder(params: Params) -> Path:
    """The corpus folder: as this process has already checked it, without a second check of every file, or made now."""
    folder = params.folder / "corpus"
    key = stage.fingerprint(folder)
    return folder if key != "none" and _checked.get((folder, _identity(params))) == key else make(params)


def load(params: Params) -> Corpus:
    """Load the checked corpus, without the transcripts that the recipe withholds; build it first if needed."""
    corpus = manifest.read(corpus_folder(params) / "manifest.csv", _data_folder(params, params.folder / "corpus"))
    return labels.hide_unknown(replace(corpus, people=speaker_info(params, corpus.speakers)), params)


def lexicon(params: Params) -> list[str]:
    """The closed vocabulary of the corpus."""
    return list(spellings(params))


def spellings(params: Params) -> dict[str, list[str]]:
    """The closed vocabulary: each word with its spellings."""
    return parse_lexicon((corpus_folder(params) / "lexicon.txt").read_text(encoding="utf-8").splitlines())


def parse_lexicon(lines: Iterable[str], spell: Callable[[str], str] = normalise) -> dict[str, list[str]]:
    r"""Parse the lines of a lexicon into words and their spellings: `WORD` or `WORD<tab>SPELLING` per line.

    >>> parse_lexicon(["one", "seven", "seven\t7"])
    {'ONE': ['ONE'], 'SEVEN': ['SEVEN', '7']}
    """
    words: dict[str, list[str]] = {}
    for line in lines:
        word, _, text = (spell(part) for part in line.partition("\t"))
        if word:
            texts = words.setdefault(word, [])
            texts += [text or word] if (text or word) not in texts else []
    return dict(sorted(words.items()))


def files_fingerprint(params: Params) -> str:
    """Fingerprint the files of a corpus by their paths, sizes and dates; empty for the embedded corpus."""
    if params.corpus == "synthetic":
        return ""
    folder = _data_folder(params, Path())
    with _readable_errors():
        if params.corpus == "manifest":
            paths = [utt.wav for utt in manifest.read(resolve_path(params.manifest), folder)]
        else:
            paths = IMPORTERS[params.corpus].source_files(folder, getattr(params, params.corpus))
    return hashlib.sha256(json.dumps(file_stamps(paths)).encode()).hexdigest()[:16]


IMPORTERS = {"uaspeech": uaspeech, "torgo": torgo}


def _build(partial: Path, params: Params) -> None:
    data_folder = _data_folder(params, partial)
    corpus, problems, notes = _read(params, partial, data_folder)
    total = len(corpus) + len(problems)
    notes += _transcript_notes(corpus, params)
    for clean in (_normalise_transcripts, _check_paths, _remove_orphans):
        corpus, left_out = clean(corpus, params)
        problems += left_out
    corpus = _assign_blocks(corpus, params)
    manifest.check_names(corpus)
    speakers = set(corpus.speakers)
    corpus, report = check_recordings(corpus, params.audio, _checked_files_folder(partial, params))
    corpus, orphans = _remove_orphans(replace(corpus, people=speaker_info(params, corpus.speakers)), params)
    problems += [*report.problems, *orphans]
    words = _lexicon(corpus, params)
    notes += [*report.notes, *_mismatch_notes(corpus, params, words, speakers)]
    report = replace(report, checked=total, problems=problems, notes=notes)
    manifest.write_speechbrain(corpus, partial / "manifest.csv", data_folder)
    lines = [word if text == word else f"{word}\t{text}" for word, texts in words.items() for text in texts]
    (partial / "lexicon.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (partial / "report.txt").write_text(f"{report}\n", encoding="utf-8", errors="backslashreplace")
    report.write(partial / "left_out.csv")


def _checked_files_folder(partial: Path, params: Params) -> Path | None:
    """The folder that keeps the result for each file, with the results of an earlier build copied into it."""
    if params.corpus == "synthetic":
        return None
    earlier = params.folder / "corpus" / CHECKED_FILES
    if earlier.is_file() and not (partial / CHECKED_FILES).is_file():
        shutil.copy2(earlier, partial)
    return partial


def _read(params: Params, partial: Path, data_folder: Path) -> ImportResult:
    if params.corpus == "synthetic":
        return ImportResult(synthetic.generate(params, partial), [], [])
    with _readable_errors():
        if params.corpus == "manifest":
            return ImportResult(manifest.read(resolve_path(params.manifest), data_folder), [], [])
        return IMPORTERS[params.corpus].read(data_folder, getattr(params, params.corpus))


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Turn an unreadable folder or a failing disk into an error message."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None


def _normalise_transcripts(corpus: Corpus, params: Params) -> tuple[Corpus, list[Excluded]]:
    """Normalise every transcript, and label it as a word or a sentence where a corpus has both."""
    texts = {utt.text: _spell(utt.text, params) for utt in corpus}
    corpus, problems = _filter(corpus, lambda utt: texts[utt.text] != "", "the transcript has no letters")
    kept = [replace(utt, text=texts[utt.text]) for utt in corpus]
    if any(" " in utt.text for utt in kept) and any(" " not in utt.text for utt in kept):
        kept = [replace(utt, word_type=utt.word_type or ("sentence" if " " in utt.text else "word")) for utt in kept]
    return replace(corpus, utterances=tuple(kept)), problems


def _spell(text: str, params: Params) -> str:
    for old, new in params.replace.items():
        text = text.replace(old, new)
    return normalise(text, params.hyphens, params.punctuation)


def _assign_blocks(corpus: Corpus, params: Params) -> Corpus:
    """Assign blocks as the recipe requires; all utterances have a block, or none has."""
    if params.blocks.source == "repetition":
        times: Counter[tuple[str, str]] = Counter()
        blocks = {}
        for utt in corpus:
            if not utt.copy_of:
                times[utt.speaker, utt.text] += 1
                blocks[utt.utt_id] = f"R{utt.repetition or times[utt.speaker, utt.text]}"
        return replace(
            corpus, utterances=tuple(replace(utt, block=blocks[utt.copy_of or utt.utt_id]) for utt in corpus)
        )
    without = [utt for utt in corpus if not utt.block]
    if without and len(without) < len(corpus):
        raise UserError(
            f"{corpus.source}: {len(without)} of {len(corpus)} utterances have no block, for example "
            f"{without[0].utt_id}; give a block to every utterance or to none, or write blocks: {{source: repetition}}"
        )
    return corpus


def _check_paths(corpus: Corpus, params: Params) -> tuple[Corpus, list[Excluded]]:
    """Exclude files whose path is not UTF-8; refuse a recording that is listed for two speakers."""
    speakers: dict[tuple[Path, float | None], str] = {}
    for utt in corpus:
        if (name := speakers.setdefault((utt.wav, utt.offset_s), utt.speaker)) != utt.speaker:
            raise UserError(
                f"{corpus.source}: {utt.wav} is listed for {name} and for {utt.speaker}; if one of them is held out, "
                "the recording would still be in the training set: correct one of the two speakers"
            )
    return _filter(corpus, lambda utt: _is_utf8(str(utt.wav)), "its path is not UTF-8")


def _is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _remove_orphans(corpus: Corpus, params: Params) -> tuple[Corpus, list[Excluded]]:
    """Exclude other microphones' recordings of utterances that are not in the corpus."""
    ids = {utt.utt_id for utt in corpus}
    reason = "another recording of an utterance that was left out"
    return _filter(corpus, lambda utt: not utt.copy_of or utt.copy_of in ids, reason)


def _filter(corpus: Corpus, usable: Callable[[Utterance], bool], reason: str) -> tuple[Corpus, list[Excluded]]:
    problems = [Excluded(utt.utt_id, utt.speaker, str(utt.wav), reason) for utt in corpus if not usable(utt)]
    return (replace(corpus, utterances=tuple(corpus.where(usable))), problems) if problems else (corpus, [])


def _lexicon(corpus: Corpus, params: Params) -> dict[str, list[str]]:
    """The closed vocabulary with its spellings: from a file, or the transcripts of all speakers except controls."""
    if params.lexicon:
        path = resolve_path(params.lexicon)
        if not path.is_file():
            raise UserError(f"lexicon: there is no file {path}; correct the recipe, or omit `lexicon`")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
        words = parse_lexicon(lines, lambda text: _spell(text, params))
    else:
        words = {text: [text] for text in sorted({utt.text for utt in corpus if not corpus.is_control(utt.speaker)})}
    if not corpus.dysarthric:
        raise UserError(f"{corpus.source}: all its speakers are controls; there is no speaker to hold out")
    if not words:
        raise UserError(f"lexicon: there is no word in {params.lexicon}; write one word per line")
    return words


def _transcript_notes(corpus: Corpus, params: Params) -> Iterator[str]:
    """Notes on the transcripts before normalisation: variant spellings, punctuation marks, files listed twice."""
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for utt in corpus:
        spellings[_spell(utt.text, params)][utt.text] += 1
    several = {word: variants for word, variants in spellings.items() if len(variants) > 1}
    if several:
        word, variants = next(iter(several.items()))
        named = ", ".join(f"{variant!r} {times}" for variant, times in variants.most_common(4))
        yield f"transcripts with more than one spelling, merged into one: {len(several)}, first {word} ({named})"
    if marks := {char for word in spellings for char in word if is_punctuation(char)}:
        yield (
            f"the transcripts contain the marks {' '.join(sorted(marks))}, which count as part of the words; "
            "write punctuation: drop if they should not"
        )
    files = Counter(str(utt.wav) for utt in corpus if utt.offset_s is None)
    if twice := [path for path, times in files.items() if times > 1]:
        yield f"files that are listed under more than one id, and count each time: {len(twice)}, first {twice[0]}"


def _mismatch_notes(corpus: Corpus, params: Params, words: Iterable[str], speakers: set[str]) -> Iterator[str]:
    """Notes on mismatches of the recipe and the usable part of the corpus."""
    for speaker in sorted(speakers - set(corpus.speakers)):
        yield f"{speaker} has no usable recording, and was removed from the corpus"
    named = [] if isinstance(params.speakers, str) else sorted(set(params.speakers) - set(corpus.speakers))
    if named:
        yield f"the recipe names speakers who are not in the corpus: {', '.join(named)}"
    closed = set(words)
    missed = corpus.where(lambda utt: not corpus.is_control(utt.speaker) and utt.text not in closed)
    if missed:
        yield (
            f"utterances whose transcript is not in the lexicon {params.lexicon}, and cannot be recognised with it: "
            f"{len(missed):,}, first {missed[0].text!r} ({missed[0].utt_id})"
        )


def _identity(params: Params) -> str:
    """All that a corpus depends on and that is quick to check: the recipe, the manifest, the lexicon."""
    unrelated = {"held_out", "fold", "seed", "scoring", "pretraining", "pretrained", "nemo_model"}
    lists = file_stamps(resolve_path(name) for name in (params.manifest, params.lexicon) if name)
    return params.model_dump_json(exclude=unrelated) + json.dumps(lists)


def _data_folder(params: Params, folder: Path) -> Path:
    """The value of `$data_folder`: the corpus's own folder for the embedded corpus."""
    if params.corpus == "synthetic":
        return folder
    chosen = resolve_path(params.data_folder) if params.data_folder else resolve_path(params.manifest).parent
    if not chosen.is_dir():
        name = "data_folder" if params.data_folder else "manifest"
        raise UserError(f"{name}: there is no folder {chosen}; correct {name} in the recipe")
    return chosen
