"""The pretrained model as it came, before any training: always test it first.

`baseline` scores the held-out speaker of a fold. `zero_shot` scores everybody once, for all folds: the pretrained model
has heard none of them, so there is nobody to protect, and the picture shows how hard each speaker is.
"""

from collections.abc import Callable
from pathlib import Path

from kdlib.corpus import prepare
from kdlib.corpus.manifest import Utterance
from kdlib.corpus.speakers import in_blocks, is_control, split
from kdlib.evaluate import score, system
from kdlib.models import nemo
from kdlib.models.pretrain import heard, pretrained
from kdlib.params import Params
from kdlib.stage import produce

CODE = ("evaluate/baseline.py", "models/pretrain.py", "corpus/speakers.py", *system.CODE, *nemo.CODE)


def baseline(params: Params) -> Path:
    """Score the pretrained model on the held-out speaker's test blocks; return the stage's folder."""

    def build(partial: Path) -> None:
        splits = split(prepare.load(params), params)
        _score(partial, params, splits.test, held_out=params.held_out, seen=splits.seen)

    return produce(
        params.fold_folder / "baseline",
        build,
        what="baseline",
        inputs=[prepare.make(params), pretrained(params)],
        parameters={
            "scoring": params.scoring.model_dump(),
            "fold": params.fold.model_dump(mode="json"),
            "blocks": params.blocks.model_dump(mode="json"),
        },
        code=CODE,
    )


def zero_shot(params: Params) -> Path:
    """Score the pretrained model on everybody's test blocks, and on controls that it has not heard."""

    def build(partial: Path) -> None:
        corpus, known = prepare.load(params), heard(params)
        seen = (lambda utt: utt.text in known["words"]) if known else None
        _score(partial, params, corpus.where(lambda utt: _tested(utt, params)), held_out="", seen=seen)
        new = corpus.where(lambda utt: known is not None and utt.speaker in known["test_speakers"])
        if new:
            (partial / "controls").mkdir(exist_ok=True)
            _score(partial / "controls", params, new, held_out="", seen=seen, words=corpus.lexicon)

    return produce(
        params.folder / "zero_shot",
        build,
        what="zero-shot scores",
        inputs=[prepare.make(params), pretrained(params)],
        parameters={"scoring": params.scoring.model_dump(), "blocks": params.blocks.model_dump(mode="json")},
        code=CODE,
    )


def _tested(utt: Utterance, params: Params) -> bool:
    return not is_control(utt.speaker) and in_blocks(utt, params.blocks.test)


def _score(
    folder: Path,
    params: Params,
    utterances: list[Utterance],
    *,
    held_out: str,
    seen: Callable[[Utterance], bool] | None,
    words: list[str] | None = None,
) -> None:
    model = nemo.NeMoCTC(pretrained(params))
    rows = system.hear(
        model,
        utterances,
        words or prepare.lexicon(params),
        batch_size=params.scoring.batch_size,
        seen=seen,
        what="baseline" if held_out else "zero-shot",
        posteriors=folder / "posteriors" if held_out else None,
    )
    score.write(
        rows,
        system.DECODERS,
        folder,
        system="pretrained",
        held_out=held_out,
        tokenizer=model.tokens.fingerprint,
        checkpoint=model.path.name,
        fold_homophones=params.scoring.fold_homophones,
        bootstrap=params.scoring.bootstrap,
    )
