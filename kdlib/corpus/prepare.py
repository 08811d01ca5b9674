"""The corpus stage: the corpus that a recipe names -> outputs/<recipe>/corpus, checked, for all later stages.

The folder holds manifest.csv (SpeechBrain's columns and ours), lexicon.txt (the closed vocabulary), report.txt and
left_out.csv (recordings that cannot be used).
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kdlib.corpus import features, manifest
from kdlib.corpus.audio_checks import CHECKED_FILES, check_recordings, file_stamps
from kdlib.corpus.embedded import skeleton, synthetic
from kdlib.corpus.feature_checks import check_features
from kdlib.corpus.importers import phoenix, torgo, uaspeech
from kdlib.corpus.manifest import Corpus, Excluded, ImportResult
from kdlib.corpus.speakers import speaker_info
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.io import resolve_path
from kdlib.settings.corpus import CorpusSettings
from kdlib.tokens import PER_WORD, Tokens, is_punctuation, normalise, pieces_per_word, train_tokenizer

EMBEDDED = ("synthetic", "skeleton")  # corpora that are generated
MANIFESTS = ("manifest", "features")  # that a manifest lists
MOST_PIECES = 1024  # of a tokenizer; with so many words the number is no matter


def build(partial: Path, settings: CorpusSettings, earlier: Path | None = None) -> None:
    """Build the corpus folder; results of an `earlier` check of the same files are used again."""
    data_folder = _data_folder(settings, partial)
    corpus, problems, notes = _read(settings, partial, data_folder)
    total = len(corpus) + len(problems)
    notes += _transcript_notes(corpus, settings)
    for clean in (_normalise_transcripts, _check_paths, _remove_orphans):
        corpus, left_out = clean(corpus, settings)
        problems += left_out
    corpus = _assign_blocks(corpus, settings)
    manifest.check_names(corpus)
    speakers = set(corpus.speakers)
    checked = None if settings.corpus in EMBEDDED or not settings.has_audio else partial
    if checked and earlier and (earlier / CHECKED_FILES).is_file() and not (partial / CHECKED_FILES).is_file():
        shutil.copy2(earlier / CHECKED_FILES, partial)
    if settings.has_audio:
        corpus, report = check_recordings(corpus, settings.audio, checked)
    else:
        corpus, report = check_features(corpus, settings.features)
    corpus, orphans = _remove_orphans(replace(corpus, people=speaker_info(settings, corpus.speakers)), settings)
    problems += [*report.problems, *orphans]
    words = _lexicon(corpus, settings)
    notes += [*report.notes, *_mismatch_notes(corpus, settings, words, speakers), *_pieces_notes(words)]
    report = replace(report, checked=total, problems=problems, notes=notes)
    manifest.write_speechbrain(corpus, partial / "manifest.csv", data_folder)
    lines = [word if text == word else f"{word}\t{text}" for word, texts in words.items() for text in texts]
    (partial / "lexicon.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (partial / "report.txt").write_text(f"{report}\n", encoding="utf-8", errors="backslashreplace")
    report.write(partial / "left_out.csv")


def read(folder: Path, settings: CorpusSettings) -> Corpus:
    """Read a corpus folder, with all transcripts."""
    corpus = manifest.read(folder / "manifest.csv", _data_folder(settings, folder))
    if settings.has_audio and settings.features.of_audio:
        made = f"{features.MELS}{settings.features.mels}x{settings.features.stack}x{settings.features.hop}"
        corpus = replace(corpus, utterances=(utt.replace(features=made) for utt in corpus))
    return replace(corpus, people=speaker_info(settings, corpus.speakers))


def read_lexicon(folder: Path) -> dict[str, list[str]]:
    """Read the closed vocabulary of a corpus folder: each word with its spellings."""
    return parse_lexicon((folder / "lexicon.txt").read_text(encoding="utf-8").splitlines())


def source_lists(settings: CorpusSettings) -> list[Path]:
    """The files that name the utterances and the words of a corpus."""
    if settings.corpus in EMBEDDED:
        return []
    return [resolve_path(name) for name in (settings.manifest, settings.lexicon) if name]


def files_fingerprint(settings: CorpusSettings) -> str:
    """Fingerprint the files of a corpus by their paths, sizes and dates; empty for the embedded corpus."""
    if settings.corpus in EMBEDDED:
        return ""
    folder = _data_folder(settings, Path())
    with _readable_errors():
        if settings.corpus in MANIFESTS:
            paths = [utt.wav for utt in manifest.read(resolve_path(settings.manifest), folder)]
        else:
            paths = IMPORTERS[settings.corpus].source_files(folder, getattr(settings, settings.corpus))
    return hashlib.sha256(json.dumps(file_stamps(paths)).encode()).hexdigest()[:16]


def identity(settings: CorpusSettings) -> str:
    """All that a corpus depends on and that is quick to check: the recipe, the manifest, the lexicon."""
    return settings.model_dump_json() + json.dumps(file_stamps(source_lists(settings)))


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


IMPORTERS = {"uaspeech": uaspeech, "torgo": torgo, "phoenix": phoenix}


def _read(settings: CorpusSettings, partial: Path, data_folder: Path) -> ImportResult:
    if settings.corpus == "synthetic":
        return ImportResult(synthetic.generate(settings.synthetic, partial), [], [])
    if settings.corpus == "skeleton":
        return ImportResult(skeleton.generate(settings.skeleton, partial), [], [])
    with _readable_errors():
        if settings.corpus in MANIFESTS:
            return ImportResult(manifest.read(resolve_path(settings.manifest), data_folder), [], [])
        return IMPORTERS[settings.corpus].read(data_folder, getattr(settings, settings.corpus))


@contextlib.contextmanager
def _readable_errors() -> Iterator[None]:
    """Turn an unreadable folder or a failing disk into an error message."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); check its permissions") from None


def _normalise_transcripts(corpus: Corpus, settings: CorpusSettings) -> tuple[Corpus, list[Excluded]]:
    """Normalise every transcript, and label it as a word or a sentence where a corpus has both."""
    texts = {utt.text: _spell(utt.text, settings) for utt in corpus}
    corpus, problems = _filter(corpus, lambda utt: texts[utt.text] != "", "the transcript has no letters")
    kept = [utt.replace(text=texts[utt.text]) for utt in corpus]
    if any(" " in utt.text for utt in kept) and any(" " not in utt.text for utt in kept):
        kept = [utt.replace(word_type=utt.word_type or ("sentence" if " " in utt.text else "word")) for utt in kept]
    return replace(corpus, utterances=kept), problems


def _spell(text: str, settings: CorpusSettings) -> str:
    for old, new in settings.replace.items():
        text = text.replace(old, new)
    return normalise(text, settings.hyphens, settings.punctuation)


def _assign_blocks(corpus: Corpus, settings: CorpusSettings) -> Corpus:
    """Assign blocks as the recipe requires; all utterances have a block, or none has."""
    if settings.blocks.source == "repetition":
        times: Counter[tuple[str, str]] = Counter()
        blocks = {}
        for utt in corpus:
            if not utt.copy_of:
                times[utt.speaker, utt.text] += 1
                blocks[utt.utt_id] = f"R{utt.repetition or times[utt.speaker, utt.text]}"
        return replace(corpus, utterances=(utt.replace(block=blocks[utt.copy_of or utt.utt_id]) for utt in corpus))
    without = [utt for utt in corpus if not utt.block]
    if without and len(without) < len(corpus):
        raise UserError(
            f"{corpus.source}: {len(without)} of {len(corpus)} utterances have no block, for example "
            f"{without[0].utt_id}; give a block to every utterance or to none, or write blocks: {{source: repetition}}"
        )
    return corpus


def _check_paths(corpus: Corpus, settings: CorpusSettings) -> tuple[Corpus, list[Excluded]]:
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


def _remove_orphans(corpus: Corpus, settings: CorpusSettings) -> tuple[Corpus, list[Excluded]]:
    """Exclude other microphones' recordings of utterances that are not in the corpus."""
    ids = {utt.utt_id for utt in corpus}
    reason = "another recording of an utterance that was left out"
    return _filter(corpus, lambda utt: not utt.copy_of or utt.copy_of in ids, reason)


def _filter(corpus: Corpus, usable: Callable[[Utterance], bool], reason: str) -> tuple[Corpus, list[Excluded]]:
    problems = [Excluded(utt.utt_id, utt.speaker, str(utt.wav), reason) for utt in corpus if not usable(utt)]
    return (replace(corpus, utterances=corpus.where(usable)), problems) if problems else (corpus, [])


def _lexicon(corpus: Corpus, settings: CorpusSettings) -> dict[str, list[str]]:
    """The closed vocabulary with its spellings: from a file, or the transcripts of all speakers except controls."""
    if settings.lexicon:
        path = resolve_path(settings.lexicon)
        if not path.is_file():
            raise UserError(f"lexicon: there is no file {path}; correct the recipe, or omit `lexicon`")
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
        words = parse_lexicon(lines, lambda text: _spell(text, settings))
    else:
        words = {text: [text] for text in sorted({utt.text for utt in corpus if not corpus.is_control(utt.speaker)})}
    if not corpus.dysarthric:
        raise UserError(f"{corpus.source}: all its speakers are controls; there is no speaker to hold out")
    if not words:
        raise UserError(f"lexicon: there is no word in {settings.lexicon}; write one word per line")
    return words


def _transcript_notes(corpus: Corpus, settings: CorpusSettings) -> Iterator[str]:
    """Notes on the transcripts before normalisation: variant spellings, punctuation marks, files listed twice."""
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for utt in corpus:
        spellings[_spell(utt.text, settings)][utt.text] += 1
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


def _mismatch_notes(
    corpus: Corpus, settings: CorpusSettings, words: Iterable[str], speakers: set[str]
) -> Iterator[str]:
    """Notes on mismatches of the recipe and the usable part of the corpus."""
    for speaker in sorted(speakers - set(corpus.speakers)):
        yield f"{speaker} has no usable recording, and was removed from the corpus"
    named = [] if isinstance(settings.speakers, str) else sorted(set(settings.speakers) - set(corpus.speakers))
    if named:
        yield f"the recipe names speakers who are not in the corpus: {', '.join(named)}"
    closed = set(words)
    missed = corpus.where(lambda utt: not corpus.is_control(utt.speaker) and utt.text not in closed)
    if missed:
        yield (
            f"utterances whose transcript is not in the lexicon {settings.lexicon}, and cannot be recognised with it: "
            f"{len(missed):,}, first {missed[0].text!r} ({missed[0].utt_id})"
        )


def _pieces_notes(words: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """How many pieces a tokenizer of few words can have: with more of them, most words would be a single piece."""
    characters = "".join(text for texts in words.values() for text in texts)

    def tokenizer(per_word: float) -> Tokens:
        with tempfile.TemporaryDirectory() as folder:
            most = MOST_PIECES + len(set(characters))
            path = train_tokenizer(words, most, Path(folder), characters=characters, per_word=per_word)
            return Tokens.for_nemo(path.read_bytes())

    with contextlib.suppress(UserError):  # of texts without a word: what trains a tokenizer in earnest says why
        if pieces_per_word(tokenizer(0), words) < PER_WORD:
            tokens = tokenizer(PER_WORD)
            yield (
                f"a tokenizer of the lexicon's words has at most {len(tokens.pieces):,} pieces, "
                f"{pieces_per_word(tokens, words):.1f} per word: with more, fewer than {PER_WORD:g} on average"
            )


def _data_folder(settings: CorpusSettings, folder: Path) -> Path:
    """The value of `$data_folder`: the corpus's own folder for the embedded corpus."""
    if settings.corpus in EMBEDDED:
        return folder
    chosen = resolve_path(settings.data_folder) if settings.data_folder else resolve_path(settings.manifest).parent
    if not chosen.is_dir():
        name = "data_folder" if settings.data_folder else "manifest"
        raise UserError(f"{name}: there is no folder {chosen}; correct {name} in the recipe")
    return chosen
