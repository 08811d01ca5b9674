"""Score any saved model on any manifest: `make evaluate CHECKPOINT=... MANIFEST=...` (TOKENIZER, MAX_DECODE_LEN).

A checkpoint is the folder of a student or a teacher, or a `.nemo` file. A tokenizer, if given, must be the one that the
model was trained with: another one makes every word wrong without any other sign of it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from kdlib.corpus.audio_checks import check_recordings
from kdlib.corpus.manifest import read
from kdlib.corpus.prepare import parse_lexicon
from kdlib.decode.attention import AttentionDecoding
from kdlib.decode.beam import BeamSearch, BeamSettings
from kdlib.decode.decoders import DecoderSet
from kdlib.decode.lexicon import Lexicon
from kdlib.errors import UserError
from kdlib.evaluate.report import score_system
from kdlib.evaluate.score import About
from kdlib.evaluate.transcribe import Evaluation, System, recordings
from kdlib.models.hybrid import TrainedModel
from kdlib.models.nemo_files import NeMoCTC

CHECKPOINT = "the folder of a saved model (model.json, model.safetensors, tokenizer.model), or a .nemo file"


@dataclass(frozen=True)
class Options:
    """How a saved model decodes."""

    tokenizer: Path | None = None  # for a check: must be the model's own
    max_decode_len: int | None = None  # of the attention decoder, in tokens
    lexicon: Path | None = None  # closed vocabulary; by default all transcripts
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
    for name, path in (("lexicon", options.lexicon), ("lm", options.lm)):
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
    about = About(checkpoint.stem, checkpoint=str(checkpoint), settings=settings)
    return score_system(recordings(system), list(corpus), out, Evaluation(decoders, level=corpus.level), about)
