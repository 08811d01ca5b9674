"""Decoders of a recipe's systems: closed lexicon, language model, and beam search settings chosen on dev speech.

A fold's language model is estimated on the texts of its training speech alone; the one for scores outside any fold, on
the training blocks of all speakers. Beam search is tuned on the fold's dev speaker; without one, the recipe's settings
are used.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from kdlib.console import print_once
from kdlib.corpus import audio, labels, prepare
from kdlib.corpus.manifest import Utterance
from kdlib.corpus.speakers import in_blocks, split
from kdlib.decode import beam, lm
from kdlib.decode.attention import AttentionDecoding
from kdlib.decode.beam import BeamSearch, BeamSettings
from kdlib.decode.decoders import BEAM, DecoderSet
from kdlib.decode.lexicon import Lexicon, Words
from kdlib.io import atomic_write
from kdlib.models import Outputs
from kdlib.models.hybrid import Hybrid
from kdlib.params import Params
from kdlib.runtime import set_threads
from kdlib.stage import produce
from kdlib.tokens import Tokens

DECODER_SETUP_CODE = ("evaluate/decoder_setup.py", *labels.CODE)
TUNING = "beam_tuning.csv"  # next to a system's scores: WER and WRA of each beam search setting on dev speech


def decoder_set(
    params: Params,
    tokens: Tokens,
    *,
    words: Words | None = None,
    all_speakers: bool = False,
    model: Hybrid | None = None,
    heads: Sequence[str] = ("ctc",),
    more: Sequence[str] = (),
) -> DecoderSet:
    """Build the decoders of a system: `heads` are its trained heads, `model` has the attention decoder."""
    settings, lexicon = params.search, Lexicon(words or prepare.spellings(params), tokens)
    if (sentences := sum(" " in word for word in lexicon.words)) > len(lexicon.words) / 2:
        print_once(
            f"lexicon: {sentences:,} of its {len(lexicon.words):,} entries are whole sentences, including those of "
            "the test speech: the scores of the lexicon decoders are no open-vocabulary results"
        )
    ctc = "ctc" in heads
    search = attention = None
    if ctc:
        setting = BeamSettings(settings.lm_weight, settings.word_bonus, settings.beam_size)
        vocabulary = None if settings.units == "pieces" else words or prepare.spellings(params)
        search = BeamSearch(tokens, vocabulary, language_model(params, tokens, all_speakers=all_speakers), setting)
    if "decoder" in heads:
        attention = AttentionDecoding(
            model, tokens, lexicon, size=settings.attention_beam_size, ctc_weight=settings.ctc_weight, joint=ctc
        )
    return DecoderSet(tokens, lexicon, beam=search, attention=attention, ctc=ctc, more=more)


def language_model(params: Params, tokens: Tokens, *, all_speakers: bool = False) -> Path:
    """Build the language model of the fold's or of all speakers' training texts, of words or pieces: its ARPA file."""
    settings = params.search
    pieces = settings.units == "pieces"
    if all_speakers:
        params = params.with_all_labels
    fold = {"fold": params.fold.model_dump(mode="json"), "held_out": params.held_out, "labels": labels.record(params)}
    name = f"pieces-{tokens.fingerprint}" if pieces else "words"

    def build(partial: Path) -> None:
        corpus = prepare.load(params)
        train = (
            split(corpus, params).train
            if not all_speakers
            else corpus.where(lambda utt: not corpus.is_control(utt.speaker) and in_blocks(utt, params.blocks.train))
        )
        texts = [utt.text for utt in train if not utt.copy_of]
        estimator = lm.build(beam.in_pieces(texts, tokens) if pieces else texts, settings.order, partial / "lm.arpa")
        print(f"language model: {settings.order}-grams of {len(texts):,} training texts, estimated by {estimator}")

    folder = produce(
        (params.folder if all_speakers else params.label_folder) / "lm" / name,
        build,
        what="language model",
        parameters={"order": settings.order, "units": settings.units, "blocks": params.blocks.train}
        | ({} if all_speakers else fold),
        inputs=[prepare.corpus_folder(params)],
        code=(*lm.CODE, *DECODER_SETUP_CODE),
    )
    return folder / "lm.arpa"


def tune_beam(
    decoders: DecoderSet,
    forward: Callable[[list[Utterance]], Outputs],
    dev: Sequence[Utterance],
    params: Params,
    folder: Path,
) -> DecoderSet:
    """Set beam search to the setting of the lowest dev WER; the scores of all settings are written to `folder`."""
    if decoders.beam is None or not dev:
        return decoders
    set_threads()
    subset = list(dev)[:: -(-len(dev) // params.search.max_utterances)]
    emissions, references = [], []
    for batch in audio.batches(subset, params.scoring.batch_size):
        emissions += decoders.beam.emissions(forward(batch))
        references += [utt.text for utt in batch]
    table = beam.tune(decoders.beam, emissions, references, params.search)
    with atomic_write(folder / TUNING) as partial:
        table.to_csv(partial, index=False)
    return decoders.with_beam(decoders.beam.at(beam.best_settings(table)))


def decoder_settings(decoders: DecoderSet, params: Params, chosen_on: str) -> dict:
    """Decoder settings for scores.json; `chosen_on` is the dev speaker, or empty."""
    settings = {}
    if decoders.beam:
        more = {"units": params.search.units, "order": params.search.order, "chosen_on": chosen_on}
        settings[BEAM] = asdict(decoders.beam.setting) | more
    if decoders.attention:
        settings["attention"] = {"size": decoders.attention.size, "ctc_weight": decoders.attention.ctc_weight}
    return settings
