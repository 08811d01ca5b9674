"""Score the pretrained model without any training: always run this baseline first.

`baseline` scores the held-out speaker of a fold. `zero_shot` scores all speakers that the pretrained model was not
trained on: once for all folds, except where each fold has a model of its own (`pretrained: from_corpus`). Its scores
show how hard each speaker is.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from kdlib.corpus import audio, prepare
from kdlib.corpus.manifest import Corpus, Utterance
from kdlib.corpus.speakers import is_test, split
from kdlib.evaluate import score
from kdlib.evaluate.decoder_setup import DECODER_SETUP_CODE, decoder_set, decoder_settings, tune_beam
from kdlib.evaluate.transcribe import TRANSCRIBE_CODE, transcribe
from kdlib.models.nemo_files import NEMO_CODE, NeMoCTC
from kdlib.params import Params
from kdlib.pretrained.model import pretrained_model, training_record
from kdlib.stage import produce

CODE = ("evaluate/baseline.py", "pretrained/model.py", *DECODER_SETUP_CODE, *TRANSCRIBE_CODE, *NEMO_CODE)


def baseline(params: Params) -> Path:
    """Score the pretrained model on the held-out speaker's test blocks; return the stage's folder."""
    params = params.with_all_labels  # one pretrained on the fold's speakers had all of their transcripts

    def build(partial: Path) -> None:
        corpus = prepare.load(params)
        splits = split(corpus, params)
        words = set(training_record(params)["words"]) if params.pretrained == "from_corpus" else splits.train_words
        _score(
            partial,
            params,
            corpus,
            splits.test,
            dev=splits.dev,
            held_out=params.held_out,
            seen=lambda utt: utt.text in words,
        )

    return produce(
        params.fold_folder / "baseline",
        build,
        what="baseline",
        inputs=[prepare.corpus_folder(params), pretrained_model(params)],
        parameters={
            "scoring": params.scoring.model_dump(),
            "search": params.search.model_dump(mode="json"),
            "fold": params.fold.model_dump(mode="json"),
            "blocks": params.blocks.model_dump(mode="json"),
        },
        code=CODE,
    )


def zero_shot(params: Params) -> Path:
    """Score the pretrained model on the test blocks of all speakers unseen in its training, controls separately."""
    params = params.with_all_labels

    def build(partial: Path) -> None:
        corpus, record = prepare.load(params), training_record(params) or {"speakers": [], "words": None}
        words = set(record["words"] or ())
        seen = None if record["words"] is None else lambda utt: utt.text in words
        new = corpus.where(lambda utt: utt.speaker not in record["speakers"] and not utt.copy_of)
        test = [utt for utt in new if not corpus.is_control(utt.speaker) and is_test(utt, params.blocks.test)]
        _score(partial, params, corpus, test, held_out="", seen=seen)
        if controls := [utt for utt in new if corpus.is_control(utt.speaker)]:
            (partial / "controls").mkdir(exist_ok=True)
            _score(partial / "controls", params, corpus, controls, held_out="", seen=seen, words=corpus.lexicon)

    return produce(
        (params.fold_folder if params.pretrained == "from_corpus" else params.folder) / "zero_shot",
        build,
        what="zero-shot scores",
        inputs=[prepare.corpus_folder(params), pretrained_model(params)],
        parameters={
            "scoring": params.scoring.model_dump(),
            "search": params.search.model_dump(mode="json"),
            "blocks": params.blocks.model_dump(mode="json"),
        },
        code=CODE,
    )


def _score(
    folder: Path,
    params: Params,
    corpus: Corpus,
    utterances: list[Utterance],
    *,
    held_out: str,
    seen: Callable[[Utterance], bool] | None,
    dev: Sequence[Utterance] = (),
    words: list[str] | None = None,
) -> None:
    model = NeMoCTC(pretrained_model(params))
    all_speakers = not held_out and params.pretrained != "from_corpus"
    decoders = decoder_set(params, model.tokens, words=words, all_speakers=all_speakers)
    decoders = tune_beam(decoders, lambda batch: model(*audio.collate(batch)), dev, params, folder)
    rows = transcribe(
        model,
        utterances,
        decoders,
        batch_size=params.scoring.batch_size,
        level=corpus.level,
        seen=seen,
        what="baseline" if held_out else "zero-shot",
        posteriors_folder=folder / "posteriors" if held_out else None,
    )
    score.write(
        rows,
        decoders.columns,
        folder,
        system="pretrained",
        held_out=held_out,
        tokenizer=model.tokens.fingerprint,
        checkpoint=model.path.name,
        settings=decoder_settings(decoders, params, params.fold.dev or "" if dev else ""),
        fold_homophones=params.scoring.fold_homophones,
        bootstrap=params.scoring.bootstrap,
    )
