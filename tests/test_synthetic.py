import subprocess
import sys
from collections import Counter

import pytest

from kdlib.corpus import manifest
from kdlib.corpus.embedded import synthetic
from kdlib.corpus.importers import uaspeech
from kdlib.corpus.speakers import published_speakers
from kdlib.errors import UserError
from kdlib.io import read_json, sha256
from kdlib.models.nemo_files import SHIPPED_MODEL
from kdlib.pipeline import Fold
from kdlib.settings.corpus import Synthetic

MAKE = """
import sys
from kdlib.pipeline import Fold
Fold.load("params/smoke.yaml", "M08", overrides={"outputs": sys.argv[1]}).prepared_corpus()
"""


def test_the_word_list_is_that_of_uaspeech():
    words = uaspeech.word_list()
    assert len(words) == 455
    assert len(set(words.values())) == 449
    assert Counter(map(uaspeech.kind, words)) == {
        "uncommon": 300,
        "common": 100,
        "letter": 26,
        "computer": 19,
        "digit": 10,
    }


@pytest.mark.parametrize(("recipe", "control_count"), [("demo", 3), ("shipped", 13)])
def test_prompts_follow_the_recipe(recipe, control_count):
    prompts = synthetic.make_prompts(Fold.load(f"params/{recipe}.yaml", "M08").params.synthetic)
    speakers, controls = (
        [name for name in prompts if published_speakers()[name].control == control] for control in (False, True)
    )
    assert (len(speakers), len(controls)) == (15, control_count)
    assert {len(prompts[name]) for name in speakers} == {3 * (10 + 6 + 5 + 21 + 6) * 2} == {288}
    assert {len(prompts[name]) for name in controls} == {449 + 60}
    words = {block: {prompt.word for prompt in prompts["M08"] if prompt.block == block} for block in synthetic.BLOCKS}
    assert len(set.union(*words.values())) == 60
    assert len(set.intersection(*words.values())) == 42
    assert all(len(words["B2"] - words[block]) == 6 for block in ("B1", "B3"))  # so unseen test words exist


def test_a_block_may_have_more_repetitions():
    plain = Fold.load("params/demo.yaml", "M08").params.synthetic
    prompts = synthetic.make_prompts(plain.model_copy(update={"repetitions_in": {"B2": 5}}))["M08"]
    assert [prompt for prompt in prompts if prompt.repetition <= 2] == synthetic.make_prompts(plain)["M08"]
    assert {prompt.block for prompt in prompts if prompt.repetition > 2} == {"B2"}
    assert len(prompts) == 288 + 3 * 48


def test_ids_are_unique():
    prompts = synthetic.make_prompts(Fold.load("params/demo.yaml", "M08").params.synthetic)
    ids = [prompt.utt_id for speaker_prompts in prompts.values() for prompt in speaker_prompts]
    assert len(ids) == len(set(ids)) == 15 * 288 + 3 * 509


def test_controls_may_be_named():
    prompts = synthetic.make_prompts(Synthetic(speakers=("M08",), controls=("CM13", "CF05")))
    assert list(prompts) == ["M08", "CF05", "CM13"]
    with pytest.raises(UserError, match="unknown control 'CX05'; did you mean 'CM05'"):
        synthetic.make_prompts(Synthetic(controls=("CX05",)))


def test_the_demos_controls_are_the_shipped_models_test_speakers():
    record = read_json(SHIPPED_MODEL.with_suffix(".train_data.json"))
    assert Fold.load("params/demo.yaml", "M08").params.synthetic.controls == tuple(record["test_speakers"])


def test_unknown_speakers_are_refused():
    fold = Fold.load("params/demo.yaml", "M08", overrides={"synthetic": {"speakers": ["M08", "M80"]}})
    with pytest.raises(UserError, match="unknown speaker 'M80'"):
        synthetic.make_prompts(fold.params.synthetic)


def test_two_fresh_processes_make_the_same_bytes(tmp_path, corpus, smoke):
    subprocess.run([sys.executable, "-c", MAKE, str(tmp_path)], check=True, capture_output=True)
    second = manifest.read(tmp_path / "smoke" / "corpus" / "manifest.csv")
    assert (tmp_path / "smoke/corpus/manifest.csv").read_bytes() == (
        smoke.layout.recipe / "corpus/manifest.csv"
    ).read_bytes()
    assert all(a.wav.read_bytes() == b.wav.read_bytes() for a, b in zip(corpus, second, strict=True))


def test_no_temporary_files_are_left_behind(tmp_path, smoke, monkeypatch):
    """A voice's process is forked and ends without Python's usual cleaning."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "corpus").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    synthetic.generate(smoke.params.synthetic.model_copy(update={"speakers": ("M08",)}), tmp_path / "corpus")
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_hash_in_the_manifest_is_the_files(corpus):
    assert all(sha256(utt.wav)[:16] == utt.sha256 for utt in corpus)


def test_another_seed_gives_another_corpus(tmp_path, corpus):
    fold = Fold.load("params/smoke.yaml", "M08", overrides={"outputs": str(tmp_path), "synthetic": {"seed": 2}})
    hashes = {utt.utt_id: utt.sha256 for utt in fold.corpus}
    assert all(hashes[utt.utt_id] != utt.sha256 for utt in corpus)


def test_a_killed_run_keeps_the_completed_speakers(tmp_path, corpus, smoke):
    """Kill the synthesis as soon as one speaker is complete; the next run must not synthesise that one again."""
    process = subprocess.Popen(
        [sys.executable, "-c", MAKE, str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    partial = tmp_path / "smoke" / ".corpus.partial"
    while process.poll() is None and not list(partial.glob("*.csv")):
        pass
    process.kill()
    process.wait()
    assert not (tmp_path / "smoke" / "corpus").exists()
    ready = {path: path.stat().st_mtime_ns for path in partial.glob("*.csv")}
    subprocess.run([sys.executable, "-c", MAKE, str(tmp_path)], check=True, capture_output=True)
    speakers = [path.stem for path in ready]
    wavs = [wav for name in speakers for wav in (tmp_path / "smoke/corpus/audio" / name).glob("*.wav")]
    assert wavs
    assert all(wav.stat().st_mtime_ns <= max(ready.values()) for wav in wavs)
    assert (tmp_path / "smoke/corpus/manifest.csv").read_bytes() == (
        smoke.layout.recipe / "corpus/manifest.csv"
    ).read_bytes()


def test_a_failed_synthesis_is_one_error(tmp_path):
    settings = Fold.load("params/smoke.yaml", "M08", overrides={"outputs": str(tmp_path)}).params.synthetic
    (tmp_path / "audio").write_text("in the way of the folder")
    with pytest.raises(UserError, match=r"the speech synthesis failed: .*audio") as caught:
        list(synthetic._synthesise(synthetic.make_prompts(settings), settings, tmp_path))
    assert "\n" not in str(caught.value)


def test_a_killed_speaker_process_ends_the_synthesis_with_one_error(tmp_path):
    program = (
        "import os\nfrom kdlib.corpus.embedded import synthetic\n"
        "synthetic._run_job = lambda job: os.kill(os.getpid(), 9)\n"
        "list(synthetic._run_jobs([{'speaker': 'M08'}], 1))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert run.stderr.strip() == "speaker M08 was ended by signal 9"
