"""Decoding and scoring."""

from typing import Annotated, Literal

from pydantic import Field

from kdlib.settings import AsTuple, Section


class BeamSearchSettings(Section):
    """Beam search with an n-gram language model of the training transcripts; tuned on the dev speaker."""

    units: Literal["words", "pieces"] = "words"  # words of the closed lexicon, or any text of the pieces
    order: int = Field(3, ge=2, le=6)  # of the n-grams; KenLM cannot read a unigram model
    lm_weight: float = 0.9  # without a dev speaker; the original study's
    word_bonus: float = 0.0  # nats per word
    beam_size: int = Field(20, ge=1)  # hypotheses kept
    lm_weights: Annotated[tuple[float, ...], AsTuple] = Field((0.0, 0.5, 0.9, 1.2, 1.5), min_length=1)  # tuning grid
    word_bonuses: Annotated[tuple[float, ...], AsTuple] = Field((0.0, 1.0), min_length=1)
    beam_sizes: Annotated[tuple[int, ...], AsTuple] = Field((10, 20, 50), min_length=1)
    max_utterances: int = Field(300, ge=1)  # dev utterances for tuning
    ctc_weight: float = Field(0.3, ge=0, le=1)  # of CTC against the attention decoder, if a model has both
    attention_beam_size: int = Field(8, ge=1)  # hypotheses kept by the attention decoder's search


class Scoring(Section):
    """Scoring of hypotheses."""

    measure: Literal["wra", "wer"] = "wra"  # of tables and verdicts: word recognition accuracy, or WER for sentences
    fold_homophones: bool = False  # count TO for TWO, RIGHT for WRITE, ... as correct
    bootstrap: int = Field(1000, ge=100)
    batch_size: int = Field(32, ge=1)
