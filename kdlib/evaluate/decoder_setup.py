"""With which decoders a recipe's systems are scored: their lexicon, language model, and settings chosen on dev speech.

A fold's language model knows the texts of its training speech alone; one for scores that belong to no fold, those of
everybody's training blocks. Settings of beam search are tried out on the fold's dev speaker; without one they are the
recipe's.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

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
from kdlib.params import Params
from kdlib.runtime import set_threads
from kdlib.stage import produce
from kdlib.tokens import Tokens

if TYPE_CHECKING:
    from kdlib.models.hybrid import Hybrid

DECODER_SETUP_CODE = ("evaluate/decoder_setup.py", *labels.CODE)
TUNING = "beam_tuning.csv"  # beside a system's scores: what each setting of beam search gave on dev speech


def decoder_set(
    params: Params,
    tokens: Tokens,
    *,
    words: Words | None = None,
    everybody: bool = False,
    model: "Hybrid | None" = None,
    heads: Sequence[str] = ("ctc",),
    more: Sequence[str] = (),
) -> DecoderSet:
    """The decoders of a system of a recipe; `heads` are those that are trained, `model` has the attention decoder."""
    settings, lexicon = params.search, Lexicon(words or prepare.spellings(params), tokens)
    if (sentences := sum(" " in word for word in lexicon.words)) > len(lexicon.words) / 2:
        print_once(
            f"lexicon: {sentences:,} of its {len(lexicon.words):,} entries are whole sentences, the test speech's "
            "among them: what the lexicon columns find there is no result on open speech"
        )
    ctc = "ctc" in heads
    search = None
    if ctc:
        chosen = BeamSettings(settings.lm_weight, settings.word_bonus, settings.beam_size)
        spoken = None if settings.units == "pieces" else words or prepare.spellings(params)
        search = BeamSearch(tokens, spoken, language_model(params, tokens, everybody=everybody), chosen)
    says = None
    if "decoder" in heads:
        says = AttentionDecoding(
            model, tokens, lexicon, size=settings.attention_beam_size, ctc_weight=settings.ctc_weight, joint=ctc
        )
    return DecoderSet(tokens, lexicon, beam=search, attention=says, ctc=ctc, more=more)


def language_model(params: Params, tokens: Tokens, *, everybody: bool = False) -> Path:
    """The ARPA file of a fold's training texts, or of everybody's; of words or of this tokenizer's pieces."""
    settings = params.search
    pieces = settings.units == "pieces"
    if everybody:
        params = params.with_all_labels
    own = {"fold": params.fold.model_dump(mode="json"), "held_out": params.held_out, "labels": labels.record(params)}
    name = f"pieces-{tokens.fingerprint}" if pieces else "words"

    def build(partial: Path) -> None:
        corpus = prepare.load(params)
        train = (
            split(corpus, params).train
            if not everybody
            else corpus.where(lambda utt: not corpus.is_control(utt.speaker) and in_blocks(utt, params.blocks.train))
        )
        texts = [utt.text for utt in train if not utt.copy_of]
        by = lm.build(beam.in_pieces(texts, tokens) if pieces else texts, settings.order, partial / "lm.arpa")
        print(f"language model: {settings.order}-grams of {len(texts):,} training texts, estimated by {by}")

    folder = produce(
        (params.folder if everybody else params.label_folder) / "lm" / name,
        build,
        what="language model",
        parameters={"order": settings.order, "units": settings.units, "blocks": params.blocks.train}
        | ({} if everybody else own),
        inputs=[prepare.corpus_folder(params)],
        code=(*lm.CODE, *DECODER_SETUP_CODE),
    )
    return folder / "lm.arpa"


def tune_beam(
    decoders: DecoderSet,
    answer: Callable[[list[Utterance]], Outputs],
    dev: Sequence[Utterance],
    params: Params,
    folder: Path,
) -> DecoderSet:
    """The panel with the setting of beam search that does best on dev speech; what each gave is in `folder`."""
    if decoders.beam is None or not dev:
        return decoders
    set_threads()
    some = list(dev)[:: -(-len(dev) // params.search.max_utterances)]
    emissions, references = [], []
    for batch in audio.batches(some, params.scoring.batch_size):
        emissions += decoders.beam.emissions(answer(batch))
        references += [utt.text for utt in batch]
    table = beam.tune(decoders.beam, emissions, references, params.search)
    with atomic_write(folder / TUNING) as hidden:
        table.to_csv(hidden, index=False)
    return decoders.with_beam(decoders.beam.at(beam.best_settings(table)))


def decoder_settings(decoders: DecoderSet, params: Params, chosen_on: str) -> dict:
    """What scores.json says of the settings of decoders; `chosen_on` is the dev speaker, or empty."""
    found = {}
    if decoders.beam:
        known = {"units": params.search.units, "order": params.search.order, "chosen_on": chosen_on}
        found[BEAM] = asdict(decoders.beam.setting) | known
    if decoders.attention:
        found["attention"] = {"size": decoders.attention.size, "ctc_weight": decoders.attention.ctc_weight}
    return found
