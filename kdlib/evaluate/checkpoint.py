"""Score any saved model on any manifest: `make evaluate CHECKPOINT=... MANIFEST=...` (TOKENIZER, MAX_DECODE_LEN).

A checkpoint is the folder of a student or a teacher, or a `.nemo` file. A tokenizer, if given, must be the one that the
model was trained with: another one makes every word wrong without any other sign of it.
"""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from kdlib.corpus.audio_checks import check_recordings
from kdlib.corpus.manifest import read
from kdlib.corpus.prepare import parse_lexicon
from kdlib.decode.attention import AttentionDecoding
from kdlib.decode.beam import BeamSearch, BeamSettings
from kdlib.decode.decoders import DecoderSet
from kdlib.decode.lexicon import Lexicon
from kdlib.errors import UserError
from kdlib.evaluate import score
from kdlib.evaluate.tables import headline
from kdlib.evaluate.transcribe import System, transcribe
from kdlib.io import repository_root
from kdlib.models.hybrid import TrainedModel
from kdlib.models.nemo_files import NeMoCTC

OPTIONS = {
    "checkpoint": "the folder of a saved model (model.json, model.safetensors, tokenizer.model), or a .nemo file",
    "manifest": "SpeechBrain CSV or NeMo JSON lines",
}


def load_system(path: Path) -> System:
    """Load the system in a folder or a `.nemo` file."""
    if path.suffix == ".nemo":
        return NeMoCTC(path)
    if not path.is_dir():
        raise UserError(f"checkpoint: there is no {path}; expected {OPTIONS['checkpoint']}")
    return TrainedModel(path)


def evaluate(
    checkpoint: Path,
    manifest: Path,
    out: Path,
    *,
    tokenizer: Path | None = None,
    max_decode_len: int | None = None,
    lexicon: Path | None = None,
    data_folder: Path | None = None,
    lm: Path | None = None,
    lm_weight: float = 0.9,
    word_bonus: float = 0.0,
    size: int = 20,
) -> dict:
    """Score a model on a manifest; write hypotheses, scores and evaluation files to `out`; return the scores."""
    system = load_system(checkpoint)
    if tokenizer and not tokenizer.is_file():
        raise UserError(f"tokenizer: there is no file {tokenizer}")
    if tokenizer and tokenizer.read_bytes() != system.tokens.model:
        raise UserError(
            f"tokenizer: {tokenizer} is not the one that {checkpoint} was trained with: its ids are other pieces, and "
            "all words would be wrong; leave the option out, the model includes its own"
        )
    for name, path in (("lexicon", lexicon), ("lm", lm)):
        if path and not path.is_file():
            raise UserError(f"{name}: there is no file {path}")
    corpus, report = check_recordings(read(manifest, data_folder))
    print(report)
    words = corpus.lexicon
    if lexicon:
        try:
            words = parse_lexicon(lexicon.read_text(encoding="utf-8-sig").splitlines())
        except UnicodeDecodeError as error:
            raise UserError(f"{lexicon}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    heads = getattr(system, "record", {"heads_trained": ("ctc",)}).get("heads_trained", ("ctc", "decoder"))
    closed, attention = Lexicon(words, system.tokens), None
    if "decoder" in heads:
        attention = AttentionDecoding(system.model, system.tokens, closed, longest=max_decode_len, joint="ctc" in heads)
    elif max_decode_len:
        print("max_decode_len has no effect: this model has no trained decoder, and CTC output ends with the recording")
    search = BeamSearch(system.tokens, words, lm, BeamSettings(lm_weight, word_bonus, size)) if lm else None
    decoders = DecoderSet(system.tokens, closed, beam=search, attention=attention, ctc="ctc" in heads)
    rows = transcribe(system, list(corpus), decoders, level=corpus.level, what="evaluation")
    out.mkdir(parents=True, exist_ok=True)
    return score.write(
        rows,
        decoders.columns,
        out,
        system=checkpoint.stem,
        held_out="",
        tokenizer=system.tokens.fingerprint,
        checkpoint=str(checkpoint),
        settings={"beam": asdict(search.setting) | {"lm": str(lm), "chosen_on": ""}} if search else {},
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Score a saved model on a manifest.")
    for name, text in OPTIONS.items():
        parser.add_argument(name, type=Path, help=text)
    parser.add_argument("--tokenizer", type=Path, help="for a check: must be the model's own")
    parser.add_argument("--max-decode-len", type=int, help="of the attention decoder, in tokens")
    parser.add_argument(
        "--lexicon",
        type=Path,
        help="closed vocabulary, one word (tab, spelling) per line; by default all transcripts",
    )
    parser.add_argument("--lm", type=Path, help="ARPA file of words, for beam search")
    parser.add_argument("--lm-weight", type=float, default=0.9, help="weight of its natural log-probabilities")
    parser.add_argument("--word-bonus", type=float, default=0.0, help="nats per word")
    parser.add_argument("--beam", dest="size", type=int, default=20, help="hypotheses kept")
    parser.add_argument("--data-folder", type=Path, help="what $data_folder stands for in the manifest")
    parser.add_argument("--out", type=Path, help="by default outputs/evaluations/<checkpoint>-<manifest>")
    options = vars(parser.parse_args())
    model = "-".join(options["checkpoint"].resolve().parts[-4:])
    default = repository_root() / "outputs" / "evaluations" / f"{model}-{options['manifest'].stem}"
    target = options.pop("out") or default
    try:
        print(headline(evaluate(**options, out=target)).to_string())
        print(f"written to {target}")
    except UserError as error:
        sys.exit(f"\n{error}\n")
