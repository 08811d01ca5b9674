"""What does beam search cost, and what does it gain?

The log-probabilities are those of a student on the held-out speaker's sentences: the demo's sentences, fold M08, hard
labels, seed 1; it is trained first where there is none. The peers, on the same log-probabilities, are torchaudio's
decoder as it stands (its own defaults: a beam of 50 and no limit of tokens) with the same words and language model,
and NeMo's `beam_batch` with an n-gram model of pieces. kdlib's weights are those chosen on the dev speaker; of NeMo's
the one that is best on the held-out speaker itself is shown, which flatters it.
"""

import tempfile
from pathlib import Path

import jiwer
import numpy as np
import report
import systems  # in tests/: PYTHONPATH=tests, as `make bench` has it
import torch
from torchaudio.models.decoder import ctc_decoder

from kdlib.decode import beam, lm
from kdlib.decode.beam import UNUSED, BeamSearch, BeamSettings
from kdlib.decode.greedy import greedy
from kdlib.evaluate import posteriors
from kdlib.evaluate.hypotheses import read_hypotheses
from kdlib.evaluate.posteriors import Posteriors
from kdlib.io import read_json
from kdlib.models import Emissions
from kdlib.models.nemo_files import quiet_nemo
from kdlib.pipeline import Fold
from kdlib.runtime import set_threads
from kdlib.tokens import BLANK, Tokens

FULL, SMOKE = (5, (0.0, 0.3, 0.6, 1.0, 1.5)), (1, (0.6,))  # rounds, NeMo's weights
TINY = {"speakers": ["M08", "M10", "M04"], "sentences": 4, "controls": ["CF05"], "control_words": 4}
OFFSET = 100  # NeMo writes a piece as the character of its id + 100
PEER = "torchaudio's defaults"


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

    def texts(emissions: Emissions) -> list[str]:
        logprobs = torch.nn.functional.pad(emissions.logits.log_softmax(-1), (0, 1), value=beam.IMPOSSIBLE)
        rows = zip(logprobs, emissions.lengths.tolist(), strict=True)
        return [" ".join(decoder(row[None, :length].contiguous())[0][0].words) for row, length in rows]

    return texts


def nemos(tokens: Tokens, sentences: list[str], order: int, alpha: float, folder: Path):
    """NeMo's batched beam search. There the blank is last, which moves the ids behind kdlib's; it counts for the LM."""
    back = torch.tensor([index for index in range(tokens.size) if index != BLANK] + [BLANK])
    nemo_ids = back.argsort().tolist()
    with quiet_nemo():
        from nemo.collections.asr.parts.submodules.ctc_beam_decoding import BeamBatchedCTCInfer

        path = folder / "nemo.arpa"
        if not path.is_file():
            as_characters = [" ".join(chr(nemo_ids[id_] + OFFSET) for id_ in tokens.encode(text)) for text in sentences]
            lm.write(lm.estimate(as_characters, order), path)
        search = BeamBatchedCTCInfer(
            blank_index=tokens.size - 1, beam_size=20, ngram_lm_alpha=alpha, ngram_lm_model=str(path)
        )

    def texts(emissions: Emissions) -> list[str]:
        logprobs = emissions.logits.log_softmax(-1)[..., back]
        (found,) = search(decoder_output=logprobs, decoder_lengths=emissions.lengths)
        return [tokens.decode(back[one.y_sequence].tolist()) for one in found]

    return texts


def student(fold: Fold) -> tuple[Emissions, list[str], BeamSettings]:
    """The student's outputs on the held-out speaker's test sentences, the references, and the chosen settings."""
    folder = fold.scores(1)
    kept, rows = Posteriors(folder / "posteriors" / posteriors.FILE), read_hypotheses(folder / "hypotheses.csv")
    chosen = read_json(folder / "scores.json")["settings"]["beam"]
    setting = BeamSettings(chosen["lm_weight"], chosen["word_bonus"], chosen["size"])
    return padded([kept[row.utt_id] for row in rows]), [row.reference for row in rows], setting


def simulated(fold: Fold) -> tuple[Emissions, list[str], BeamSettings]:
    """The same without a model, for a smoke run."""
    noise, tests = np.random.default_rng(0), fold.splits.test
    frames = [systems.frames(fold.tokens.encode(utt.text), fold.tokens, utt.duration_s, noise) for utt in tests]
    return padded(frames), [utt.text for utt in tests], BeamSettings()


def padded(frames: list[np.ndarray]) -> Emissions:
    """Log-probabilities as a batch, in the precision that decoders take."""
    rows = [torch.from_numpy(one).float() for one in frames]
    return Emissions(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor([len(one) for one in rows]))


def main() -> None:
    run = report.start(__file__, __doc__)
    set_threads()
    rounds, alphas = SMOKE if run.smoke else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        overrides = {"outputs": name, "synthetic": TINY} if run.smoke else {}
        fold = Fold.load("params/demo_sentences.yaml", "M08", "hard", overrides=overrides)
        emissions, references, setting = simulated(fold) if run.smoke else student(fold)
        tokens, arpa = fold.tokens, fold.decoder_setup().language_model
        sentences = [utt.text for utt in fold.splits.train]
        pieces = folder / "pieces.arpa"
        lm.write(lm.estimate(beam.in_pieces(sentences, tokens), 5), pieces)
        words = BeamSearch(tokens, fold.lexicon, arpa, setting)
        of_nemo = {alpha: nemos(tokens, sentences, 5, alpha, folder) for alpha in alphas}
        best = min(alphas, key=lambda alpha: jiwer.wer(references, of_nemo[alpha](emissions)))
        decoders = {
            PEER: plain(tokens, list(words.words), arpa, setting, folder),
            f"NeMo's `beam_batch`, pieces, weight {best}": of_nemo[best],
            "kdlib: words": words,
            "kdlib: words, no language model": words.at(BeamSettings(0.0, setting.word_bonus, setting.size)),
            "kdlib: pieces": BeamSearch(tokens, None, pieces, setting),
            "kdlib: greedy": lambda some: [tokens.decode(ids) for ids in greedy(some, BLANK)],
        }
        wer = {name: jiwer.wer(references, decode(emissions)) for name, decode in decoders.items()}
        found = report.against(report.interleaved(decoders, rounds, lambda _: emissions), PEER)
    rows = [
        {
            "decoder": name,
            "WER %": 100 * wer[name],
            "sentences per second": len(references) / seconds,
            "ratio of times": ratio,
        }
        for name, (seconds, ratio) in found.items()
    ]
    weights = f"language model {setting.lm_weight}, bonus for each word {setting.word_bonus}, beam {setting.size}"
    run.save(rows, [f"Decoded are {len(references)} sentences. kdlib's settings: {weights}."])


if __name__ == "__main__":
    main()
