"""Score any saved model on any manifest: `make evaluate CHECKPOINT=... MANIFEST=...` (TOKENIZER, MAX_DECODE_LEN).

A checkpoint is the folder of a student or a teacher, or a `.nemo` file. A tokenizer, if given, must be the one that the
model was trained with: another one makes every word wrong without any other sign of it.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kdlib.corpus.audio_checks import check_recordings
from kdlib.corpus.manifest import Corpus, read
from kdlib.corpus.prepare import parse_lexicon
from kdlib.decode import calibration
from kdlib.decode.attention import AttentionDecoding
from kdlib.decode.beam import BeamSearch, BeamSettings
from kdlib.decode.calibration import Calibrator
from kdlib.decode.decoders import CLOSED, DecoderSet
from kdlib.decode.lexicon import Lexicon
from kdlib.errors import UserError
from kdlib.evaluate.calibrate import Speech, calibrate
from kdlib.evaluate.report import score_system
from kdlib.evaluate.score import About
from kdlib.evaluate.transcribe import Evaluation, System, recordings
from kdlib.io import short_path
from kdlib.models.hybrid import TrainedModel
from kdlib.models.nemo_files import NeMoCTC
from kdlib.settings.evaluation import Calibration
from kdlib.tokens import BLANK, Tokens

CHECKPOINT = "the folder of a saved model (model.json, model.safetensors, tokenizer.model), or a .nemo file"


@dataclass(frozen=True)
class Options:
    """How a saved model decodes."""

    tokenizer: Path | None = None  # for a check: must be the model's own
    max_decode_len: int | None = None  # of the attention decoder, in tokens
    lexicon: Path | None = None  # closed vocabulary; by default all transcripts
    calibration: Path | None = None  # of the closed lexicon; by default the one that belongs to the checkpoint
    calibrate_on: Path | None = None  # manifest of training speech; a new calibration is fitted
    data_folder: Path | None = None  # what $data_folder stands for in the manifest
    lm: Path | None = None  # ARPA file of words, for beam search
    lm_weight: float = 0.9
    word_bonus: float = 0.0
    beam: int = 20
    device: str = "auto"


DEFAULT = Options()


def load_system(path: Path, device: str = "auto") -> System:
    """Load the system in a folder or a `.nemo` file."""
    if path.suffix == ".nemo":
        return NeMoCTC(path, device)
    if not path.is_dir():
        raise UserError(f"checkpoint: there is no {path}; expected {CHECKPOINT}")
    return TrainedModel(path, device)


def evaluate(checkpoint: Path, manifest: Path, out: Path, options: Options = DEFAULT) -> dict:
    """Score a model on a manifest; write hypotheses, scores and evaluation files to `out`; return the scores."""
    system = load_system(checkpoint, options.device)
    tokenizer = options.tokenizer
    if tokenizer and not tokenizer.is_file():
        raise UserError(f"tokenizer: there is no file {tokenizer}")
    if tokenizer and tokenizer.read_bytes() != system.tokens.model:
        raise UserError(
            f"tokenizer: {tokenizer} is not the one that {checkpoint} was trained with: its ids are other pieces, and "
            "all words would be wrong; leave the option out, the model includes its own"
        )
    files = {"lexicon": options.lexicon, "lm": options.lm, "calibration": options.calibration}
    for name, path in files.items():
        if path and not path.is_file():
            raise UserError(f"{name}: there is no file {path}")
    corpus, report = check_recordings(read(manifest, options.data_folder))
    print(report)
    words = corpus.lexicon
    if path := options.lexicon:
        try:
            words = parse_lexicon(path.read_text(encoding="utf-8-sig").splitlines())
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    heads = getattr(system, "record", {"heads_trained": ("ctc",)}).get("heads_trained", ("ctc", "decoder"))
    closed, attention, ctc = Lexicon(words, system.tokens), None, "ctc" in heads
    if "decoder" in heads:
        weight, longest = 0.3 if ctc else 0.0, options.max_decode_len
        attention = AttentionDecoding(system.model, system.tokens, closed, longest=longest, ctc_weight=weight)
    elif options.max_decode_len:
        print("max_decode_len has no effect: this model has no trained decoder, and CTC output ends with the recording")
    search, settings = None, {}
    if options.lm:
        setting = BeamSettings(options.lm_weight, options.word_bonus, options.beam)
        search = BeamSearch(system.tokens, words, options.lm, setting)
        settings = {"beam": asdict(setting) | {"lm": str(options.lm), "chosen_on": ""}}
    decoders = DecoderSet(system.tokens, closed, beam=search, attention=attention, ctc=ctc)
    if options.calibrate_on:
        found = _calibrate(system, decoders, corpus, options)
        out.mkdir(parents=True, exist_ok=True)
        calibration.save(out / calibration.FILE, found)
    else:
        found = _own_calibration(checkpoint, decoders, options.calibration)
    settings |= {name: one.summary() for name, one in found.items()}
    seen = sorted({name for one in found.values() for name in one.speakers} & {utt.speaker for utt in corpus})
    remark = f"the closed lexicon was calibrated on other speech of {', '.join(seen)}" if seen else ""
    about = About(checkpoint.stem, checkpoint=str(checkpoint), settings=settings, remark=remark)
    evaluation = Evaluation(decoders.calibrated(found), level=corpus.level)
    return score_system(recordings(system), list(corpus), out, evaluation, about)


def _own_calibration(checkpoint: Path, decoders: DecoderSet, path: Path | None) -> dict[str, Calibrator]:
    """The calibration in a file, by default next to a `.nemo` file or in the scores of a student."""
    nemo = checkpoint.suffix == ".nemo"
    own = checkpoint.with_suffix(f".{calibration.FILE}") if nemo else checkpoint / "scores" / calibration.FILE
    path = path or own
    if not path.is_file():
        return {}
    print(f"closed lexicon: calibrated by {short_path(path)}")
    found = calibration.load(path)
    for one in found.values():
        one.check(decoders.tokens, {}, str(path))
    return {name: one for name, one in found.items() if name in decoders.word_columns}


def _calibrate(system: System, decoders: DecoderSet, corpus: Corpus, options: Options) -> dict[str, Calibrator]:
    """A calibration on a manifest of training speech, none of which is in the manifest that is scored."""
    training, report = check_recordings(read(options.calibrate_on, options.data_folder))
    print(report)
    scored = {(utt.wav, utt.offset_s) for utt in corpus}
    if both := [utt.utt_id for utt in training if (utt.wav, utt.offset_s) in scored]:
        raise UserError(
            f"calibrate-on: {len(both)} of its utterances are in the manifest that is scored, first {both[0]}; name a "
            "manifest of training speech alone"
        )
    speech = Speech([utt for utt in training if utt.text])
    return calibrate(decoders, recordings(system), speech, Calibration())


def export_calibration(folder: Path, out: Path) -> Path | None:
    """Write the calibration of a student's closed lexicon for its `.nemo` file; None if the student has none."""
    calibrators = calibration.of_scores(folder / "scores")
    if CLOSED not in calibrators:
        return None
    tokens = Tokens.for_teachers(folder / "tokenizer.model")
    of_nemo, found = Tokens.for_nemo(tokens.model), calibrators[CLOSED]
    log_prior = (*found.log_prior[: len(tokens.pieces)], found.log_prior[BLANK])
    path = out.with_suffix(f".{calibration.FILE}")
    calibration.save(path, {CLOSED: replace(found, tokens=of_nemo.fingerprint, log_prior=log_prior)})
    return path
