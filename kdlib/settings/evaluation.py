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
    # what counts as the same: homophones TO and TWO, RIGHT and WRITE, ...; PHOENIX's glosses
    normaliser: Literal["none", "homophones", "phoenix2014", "phoenix2014t"] = "none"
    # what comparisons draw at random: utterances, or words with all recordings of them by a speaker (many repetitions)
    unit: Literal["utterance", "word"] = "utterance"
    # decode the closed lexicon once more: the mean posterior of all scored speech is moved to the words' prior
    transductive: bool = False
    bootstrap: int = Field(1000, ge=100)
    batch_size: int = Field(32, ge=1)


class Calibration(Section):
    """Calibration of the closed lexicon's scores: fitted on training speech, its strength chosen on the dev speaker."""

    form: Literal["per_word", "features", "label_prior", "none"] = "per_word"  # shrunk towards the features
    prior: Literal["texts", "sample", "uniform"] = "texts"  # of the words: of all training texts, or of the sample
    new_words: float | None = Field(0.1, ge=0, lt=1)  # share of words without training text; null: half a count each
    utterances: int = Field(1200, ge=1)  # random training utterances: the sample
    word_sd: float = Field(1.0, gt=0)  # of the words' own biases around what their features predict, in nats
    feature_sd: float = Field(0.3, gt=0)  # of the features' weights, in nats per standard deviation
    strengths: Annotated[tuple[float, ...], AsTuple] = Field((0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5), min_length=1)
