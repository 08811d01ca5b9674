"""What does beam search cost, and what does it gain? On the embedded sentences, fold M08, hard labels, seed 1.

Peers of the same run, on the same log-probabilities of the held-out speaker, one thread: torchaudio's decoder as it
stands (its own defaults: beam 50, no limit of tokens) with the same words and language model, and
NeMo's `beam_batch` with an n-gram model of pieces. This repository's settings are those chosen on the dev speaker; of
NeMo's weights the one that is best on the held-out speaker itself is shown, which flatters it.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import jiwer
import torch
from torchaudio.models.decoder import ctc_decoder

from kdlib.decode import beam, lm
from kdlib.decode.beam import UNUSED, BeamSearch, BeamSettings
from kdlib.decode.greedy import greedy
from kdlib.evaluate import posteriors
from kdlib.evaluate.hypotheses import read_hypotheses
from kdlib.evaluate.posteriors import Posteriors
from kdlib.io import read_json, repository_root, write_json
from kdlib.models import Emissions, Outputs
from kdlib.models.nemo_files import quiet_nemo
from kdlib.pipeline import Fold
from kdlib.runtime import set_threads
from kdlib.tokens import BLANK, Tokens

ROUNDS, OFFSET, ALPHAS = 5, 100, (0.0, 0.3, 0.6, 1.0, 1.5)  # NeMo writes a piece as the character of its id + 100


def plain(tokens: Tokens, words: list[str], arpa: Path, setting: BeamSettings, folder: Path):
    """Torchaudio's decoder with its own defaults."""
    lexicon = folder / "plain.txt"
    lexicon.write_text("".join(f"{word}\t{' '.join(map(str, tokens.encode(word)))}\n" for word in words))
    decoder = ctc_decoder(
        lexicon=str(lexicon),
        tokens=[*map(str, range(tokens.size)), UNUSED],
        lm=str(arpa),
        lm_weight=setting.lm_weight * beam.LN10,
        word_score=setting.word_bonus,
        blank_token=str(BLANK),
        sil_token=UNUSED,
    )

    def texts(outputs: Outputs) -> list[str]:
        logprobs = torch.nn.functional.pad(outputs.ctc.logits.log_softmax(-1), (0, 1), value=beam.IMPOSSIBLE)
        rows = zip(logprobs, outputs.lengths.tolist(), strict=True)
        return [" ".join(decoder(row[None, :length].contiguous())[0][0].words) for row, length in rows]

    return texts


def nemos(tokens: Tokens, sentences: list[str], order: int, alpha: float, folder: Path):
    """NeMo's batched beam search; the blank is last."""
    with quiet_nemo():
        from nemo.collections.asr.parts.submodules.ctc_beam_decoding import BeamBatchedCTCInfer

        path = folder / "nemo.arpa"
        if not path.is_file():
            as_characters = [" ".join(chr(index + OFFSET) for index in tokens.encode(text)) for text in sentences]
            lm.write(lm.estimate(as_characters, order), path)
        search = BeamBatchedCTCInfer(
            blank_index=tokens.size - 1, beam_size=20, ngram_lm_alpha=alpha, ngram_lm_model=str(path)
        )
    order_ = [index for index in range(tokens.size) if index != BLANK] + [BLANK]
    back = torch.tensor(order_)

    def texts(outputs: Outputs) -> list[str]:
        logprobs = outputs.ctc.logits.log_softmax(-1)[..., back]
        (found,) = search(decoder_output=logprobs, decoder_lengths=outputs.lengths)
        return [tokens.decode(back[one.y_sequence].tolist()) for one in found]

    return texts


def student_outputs(fold: Fold) -> tuple[Outputs, list[str], dict]:
    """The student's outputs on the held-out speaker's test sentences, the references, and the chosen settings."""
    folder = fold.scores(1)
    kept, rows = Posteriors(folder / "posteriors" / posteriors.FILE), read_hypotheses(folder / "hypotheses.csv")
    frames = [torch.from_numpy(kept[row.utt_id]) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)
    outputs = Emissions(padded, torch.tensor([len(one) for one in frames]))
    return outputs, [row.reference for row in rows], read_json(folder / "scores.json")["settings"]["beam"]


def main() -> None:
    """Measure, print, and write outputs/benchmarks/beam.json."""
    set_threads()
    fold = Fold.load(repository_root() / "params" / "demo_sentences.yaml", "M08", "hard")
    outputs, references, chosen = student_outputs(fold)
    tokens = fold.tokens
    setting = BeamSettings(chosen["lm_weight"], chosen["word_bonus"], chosen["size"])
    arpa = fold.decoder_setup().language_model
    sentences = [utt.text for utt in fold.splits.train]
    words = BeamSearch(tokens, fold.lexicon, arpa, setting)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pieces = folder / "pieces.arpa"
        lm.write(lm.estimate(beam.in_pieces(sentences, tokens), 5), pieces)
        alone = {alpha: nemos(tokens, sentences, 5, alpha, folder) for alpha in ALPHAS}
        best = min(ALPHAS, key=lambda alpha: jiwer.wer(references, alone[alpha](outputs)))
        forms = {
            "greedy": lambda some: [tokens.decode(ids) for ids in greedy(some, BLANK)],
            "words": words,
            "words, no language model": words.at(BeamSettings(0.0, setting.word_bonus, setting.size)),
            "pieces": BeamSearch(tokens, None, pieces, setting),
            "torchaudio's defaults": plain(tokens, list(words.words), arpa, setting, folder),
            f"NeMo beam_batch, pieces, weight {best}": alone[best],
        }
        times: dict[str, list[float]] = {name: [] for name in forms}
        hypotheses = {name: form(outputs) for name, form in forms.items()}
        for _ in range(ROUNDS):
            for name, form in forms.items():
                started = time.perf_counter()
                form(outputs)
                times[name].append(time.perf_counter() - started)
    result = {
        name: {
            "wer": round(jiwer.wer(references, hypotheses[name]), 4),
            "utterances_per_s": round(len(references) / statistics.median(some), 1),
        }
        for name, some in times.items()
    }
    print(json.dumps({"utterances": len(references), "setting": chosen} | result, indent=1))
    folder = repository_root() / "outputs" / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "beam.json", {"utterances": len(references), "setting": chosen} | result)


if __name__ == "__main__":
    main()
