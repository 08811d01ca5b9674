"""A corpus of one's own, UA-Speech's and TORGO's layouts: from their files to scored folds, by the notebooks."""

import json
import os
import re
import shutil
import subprocess
import sys

import corpora
import pytest
import yaml
from graph import output, papermill, snakemake

from kdlib.io import repository_root


@pytest.fixture(scope="module")
def external(tmp_path_factory):
    """A recipe for a corpus of six unlisted speakers: 8 kHz stereo FLAC, 12 words, and a model of a few steps."""
    folder = tmp_path_factory.mktemp("external")
    corpora.own(folder, repetitions=1, spoken=False)
    tiny = {"steps": 2, "d_model": 16, "layers": 1, "heads": 2, "conv_channels": 8, "batch_size": 8, "warmup_steps": 1}
    pace = {"steps": 2, "batch_size": 4, "warmup_steps": 1}
    teacher = {"encoder": "nemo", "parent": "from_corpus", "heads": 2, "ffn": 16, "base_training": pace, "adapt": pace}
    settings = {"corpus": "manifest", "manifest": str(folder / "corpus.csv"), "outputs": str(folder)}
    settings |= {"pretrained": "from_corpus", "pretraining": tiny, "teacher": teacher, "folds": f"test-{os.getpid()}"}
    settings |= {"student": {"batch_size": 8, "phases": [{"epochs": 1}]}, "distill": {"allow": ["target"]}}
    (folder / "mine.yaml").write_text(yaml.safe_dump(settings))
    yield folder / "mine.yaml"
    shutil.rmtree(repository_root() / "params/folds" / settings["folds"], ignore_errors=True)


def test_an_external_corpus_goes_from_its_csv_to_two_scored_folds_with_two_commands(external):
    """Speakers 07 and NO, which YAML would read as 7 and false; words with an apostrophe, an accent and a hyphen."""
    command = [sys.executable, "-m", "kdlib", "folds-for", str(external)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=repository_root())
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"next: make folds RECIPE={external} FOLDS=07,Alma" in run.stdout
    run = snakemake(external, "folds=07,NO,", "--until", "baseline")
    assert run.returncode == 0, run.stdout + run.stderr
    out = external.parent / "mine"
    assert (out / "corpus/report.txt").read_text().splitlines() == [
        "72 recordings checked, 0 left out",
        "  72 files of 8000 Hz, 2 channels are read as 16000 Hz mono",
        "note: a tokenizer of the lexicon's words has at most 74 pieces, 2.0 per word: with more, fewer than 2 on "
        "average",
    ]
    for held_out, names in (("07", ["Boris", "Chidi", "NO", "Žofie"]), ("NO", ["07", "Alma", "Boris", "Chidi"])):
        scores = json.loads((out / held_out / "baseline/scores.json").read_text())
        assert (scores["held_out"], scores["n"], set(scores["decoders"])) == (
            held_out,
            12,
            {"greedy", "lexicon", "lexicon_plain", "beam"},
        )
        assert json.loads((out / held_out / "pretrained/train_data.json").read_text())["speakers"] == names
        hypotheses = (out / held_out / "baseline/hypotheses.csv").read_text(encoding="utf-8")
        assert all(word in hypotheses for word in ("CAN'T", "CAFÉ", "X-RAY"))
    again = snakemake(external, "folds=07,NO,", "--until", "baseline", "--dry-run", "--quiet", "host")
    assert set(re.findall(r"^total +(\d+)", output(again), re.MULTILINE)) == {"0"}


def test_teachers_of_a_corpus_without_controls_belong_to_the_fold(external):
    """They start from the fold's own pretrained model, so the shared folders must not contain them."""
    out = external.parent / "mine"
    run = papermill("03_logits", out / "03.ipynb", "-r", "recipe", str(external), "-r", "held_out", "07")
    assert run.returncode == 0, run.stderr
    assert "all 4 others" not in (out / "03.ipynb").read_text()  # nobody asked for teachers of the same level
    assert not (out / "07/target_report/nemo/same_level").exists()
    assert (out / "07/target_report/nemo/own").is_dir()
    assert not (out / "teachers").exists()
    assert not (out / "logits").exists()
    train_speakers = {
        path.parent.name: json.loads(path.read_text())["train_speakers"]
        for path in out.glob("07/teachers/nemo/*/model.json")
    }
    assert sorted(train_speakers) == ["Boris", "Chidi", "NO", "Žofie"]
    assert all("07" not in names and "Alma" not in names for names in train_speakers.values())
    assert (out / "07/figures/aggregates.png").is_file()


def test_a_student_of_an_external_corpus_is_compared_with_its_control(external):
    out = external.parent / "mine"
    run = papermill("04_distill", out / "04.ipynb", "-r", "recipe", str(external), "-r", "held_out", "07")
    assert run.returncode == 0, run.stderr
    record = json.loads((out / "07/students/ctc_kd/seed1/model.json").read_text())
    assert sorted(record["train_speakers"]) == ["Boris", "Chidi", "NO", "Žofie"]
    assert (out / "07/students/hard/seed1/scores/scores.json").is_file()


def test_an_unknown_variant_is_refused_before_any_work(external):
    run = snakemake(external, "folds=07,", "variants=hrad", "--dry-run")
    assert run.returncode != 0
    assert "variants: unknown variant 'hrad'; did you mean 'hard'?" in output(run)


def test_a_changed_recording_triggers_the_graph(external):
    path = next(external.parent.glob("wav/Alma/*.flac"))
    before, dates = path.read_bytes(), path.stat()
    try:
        path.write_bytes(b"none")
        assert "corpus" in output(snakemake(external, "folds=07,NO,", "--dry-run", "--quiet", "host"))
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(dates.st_atime_ns, dates.st_mtime_ns))


@pytest.mark.parametrize("corpus", ["uaspeech", "torgo"])
def test_data_card_of_real_layouts(corpus, tmp_path):
    """The notebook on the folder layouts of the publishers, with controls, sentences and exclusions."""
    if corpus == "uaspeech":
        held_out = "M08"
        corpora.uaspeech(tmp_path / "data", ("M08", "M10", "F05", "CM01"), old=True, labels="xls", microphones=["M5"])
        (tmp_path / "data/audio/M08/M08_B1_D1_M5.wav").write_bytes(b"")
    else:
        held_out = "F03"
        corpora.torgo(tmp_path / "data", ("F/F01", "F/F03", "F/F04", "M01", "FC/FC01"))
    overrides = json.dumps({"data_folder": str(tmp_path / "data"), "outputs": str(tmp_path)})
    arguments = ("-r", "recipe", f"params/{corpus}.yaml", "-r", "held_out", held_out, "-y", f"overrides: {overrides}")
    run = papermill("00_corpus", tmp_path / "out.ipynb", *arguments)
    assert run.returncode == 0, run.stderr
    text = (tmp_path / "out.ipynb").read_text()
    assert "1 x empty file" in text if corpus == "uaspeech" else "10 x empty file" in text
    assert "CONTROL" in text
    assert (tmp_path / corpus / "figures/durations.png").is_file()
