"""Other recordings of the same utterances with the same timing, which teachers may get in place of the students'.

`clean` is what the embedded corpus keeps of an utterance before noise and the effects of the voice; the name of a
microphone is its recording of the utterance, where the corpus has several.
"""

from collections.abc import Callable, Sequence

from kdlib.corpus.manifest import Corpus
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError

SAME, CLEAN = "same", "clean"
View = Callable[[Sequence[Utterance]], Sequence[Utterance]]


def same(utterances: Sequence[Utterance]) -> Sequence[Utterance]:
    """The utterances themselves."""
    return utterances


def view_of(corpus: Corpus, name: str) -> View:
    """What gives utterances their other recordings; the same utterances for `same`."""
    if name == SAME:
        return same
    copies = {utt.copy_of: utt for utt in corpus if utt.copy_of and utt.utt_id.endswith(f"_{name}")}

    def other(utt: Utterance) -> Utterance:
        if name == CLEAN:
            path = utt.wav.parents[2] / CLEAN / utt.speaker / utt.wav.name
            if path.is_file():
                return utt.replace(wav=path, sha256="")
            raise UserError(
                f"teacher.input: there is no clean recording of {utt.utt_id}; the embedded corpus has them with "
                "synthetic: {clean: true}"
            )
        found = copies.get(utt.copy_of or utt.utt_id)
        if found is None:
            raise UserError(
                f"teacher.input: {utt.utt_id} has no recording by the microphone {name!r}; name one that the "
                "corpus has of every utterance (uaspeech: {augment: [M6]}, torgo: {augment: true})"
            )
        return utt.replace(wav=found.wav, offset_s=found.offset_s, sha256=found.sha256)

    return lambda utterances: [other(utt) for utt in utterances]
