"""The first stage: whatever a recipe names as its corpus -> outputs/<recipe>/corpus, checked, for everything after it.

The folder holds manifest.csv (SpeechBrain's columns and ours), lexicon.txt (the words that are not only controls'),
report.txt and left_out.csv (files that cannot be used).
"""

from dataclasses import replace
from pathlib import Path

from kdlib.corpus import audio, manifest, synthetic
from kdlib.corpus.manifest import Corpus
from kdlib.corpus.speakers import is_control
from kdlib.errors import UserError
from kdlib.params import Params, root
from kdlib.stage import produce
from kdlib.tokens import normalise

CODE = (
    "corpus/prepare.py",
    "corpus/audio.py",
    "corpus/manifest.py",
    "corpus/speakers.py",
    "tokens.py",
    *synthetic.CODE,
)


def make(params: Params) -> Path:
    """Make the corpus folder, or find it made."""
    embedded = params.corpus == "synthetic"
    settings = {"hyphens": params.hyphens, "data_folder": params.data_folder}
    if embedded:
        settings |= {"synthetic": params.synthetic.model_dump(mode="json")}
    return produce(
        params.folder / "corpus",
        lambda partial: _build(partial, params),
        what="corpus",
        parameters=settings,
        inputs=[] if embedded else [root() / params.manifest],
        code=CODE,
    )


def load(params: Params) -> Corpus:
    """The checked corpus; made first where it is not there yet."""
    return manifest.read(make(params) / "manifest.csv", _data_folder(params, params.folder / "corpus"))


def lexicon(params: Params) -> list[str]:
    """The closed vocabulary of the corpus."""
    return (make(params) / "lexicon.txt").read_text(encoding="utf-8").splitlines()


def _build(partial: Path, params: Params) -> None:
    data_folder = _data_folder(params, partial)
    if params.corpus == "synthetic":
        corpus = synthetic.speak(params, partial)
    else:
        corpus = manifest.read(root() / params.manifest, data_folder)
    corpus, report = audio.check(corpus)
    spelt = (replace(utt, text=normalise(utt.text, params.hyphens)) for utt in corpus)
    corpus = Corpus(tuple(spelt), corpus.source)
    words = sorted({utt.text for utt in corpus if not is_control(utt.speaker)})
    if not words:
        raise UserError(f"{corpus.source}: all of its speakers are controls; nobody could be held out")
    manifest.write_speechbrain(corpus, partial / "manifest.csv", data_folder)
    (partial / "lexicon.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (partial / "report.txt").write_text(f"{report}\n", encoding="utf-8")
    report.write(partial / "left_out.csv")


def _data_folder(params: Params, folder: Path) -> Path:
    """What `$data_folder` stands for: the corpus's own folder where it was made here."""
    if params.corpus == "synthetic":
        return folder
    return root() / params.data_folder if params.data_folder else (root() / params.manifest).parent
