"""The export for a thesis: figures in exact widths, tables, macros and the page, from tidy tables alone."""

import json
import re
import shutil
import subprocess
import warnings
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from kdlib.diagnose import causes
from kdlib.errors import UserError
from kdlib.evaluate import score
from kdlib.evaluate.hypotheses import Hypothesis
from kdlib.evaluate.score import About
from kdlib.io import repository_root
from kdlib.settings.evaluation import Scoring
from kdlib.show import latex, thesis, thesis_figures, thesis_tables
from kdlib.show.drawing import fit_texts
from kdlib.show.thesis_tables import Results

SYSTEMS = ("pretrained", "hard", "ctc_kd")


def study(wra=(0.5, 0.7, 0.65), seeds=(1, 2), measure="wra"):
    """Results of three systems on two folds."""
    rows, curves, confidence = [], [], []
    for held_out, system in [(a, b) for a in ("M08", "M05") for b in SYSTEMS]:
        value = wra[SYSTEMS.index(system)]
        for seed in [""] if system == "pretrained" else seeds:
            for decoder in ("greedy", "lexicon"):
                row = {"held_out": held_out, "system": system, "seed": seed, "decoder": decoder, "measure": measure}
                shift = 0.01 * (seed or 0) - 0.2 * (decoder == "greedy")
                rows.append(row | {"value": value + shift, "low": value - 0.1, "high": value + 0.1, "n": 96})
            for step in range(0, 300, 100) if seed else ():
                curves.append({"held_out": held_out, "system": system, "seed": seed, "step": step, "value": step / 400})
    for system in SYSTEMS:
        for place in range(10):
            share = (place + 0.5) / 10
            about = {"system": system, "bin": place, "n": 10, "confidence": share, "accuracy": share}
            confidence.append(about | {"low": max(0, share - 0.1), "high": min(1, share + 0.1), "ece": 0.02})
    verdicts = [
        verdict("hard", "pretrained", 0.2, 0.15, 0.25, 0.001, "better", "lexicon"),
        verdict("ctc_kd", "hard", -0.05, -0.09, 0.01, 0.2, "no difference shown", "lexicon"),
    ]
    frames = (pd.DataFrame(some) for some in (rows, verdicts))
    runs = [{"folder": "outputs/x", "system": "hard", "seed": 1, "held_out": "M08", "revision": "abc", "key": "k"}]
    return Results(
        "mine",
        "by name",
        *frames,
        curves=pd.DataFrame(curves),
        confidence=pd.DataFrame(confidence),
        hours={"hard": 0.05},
        runs=runs,
        measure=measure,
    )


def verdict(a, b, difference, low, high, p, word, decoder):
    return {
        "a": a,
        "b": b,
        "measure": "wra",
        "difference": difference,
        "these_low": low,
        "these_high": high,
        "new_low": np.nan,
        "new_high": np.nan,
        "holm_p": p,
        "verdict": word,
        "decoder": decoder,
    }


def test_a_study_of_sentences_is_of_word_error_rates(tmp_path):
    results = study(measure="wer")
    teachers = [("M08", "M05", 0.4, "greedy"), ("M05", "M05", 0.3, "greedy")]
    teachers = pd.DataFrame(teachers, columns=["teacher", "speaker", "value", "decoder"])
    thesis.export(replace(results, teachers=teachers), tmp_path)
    about = json.loads((tmp_path / "accuracy.json").read_text())
    assert about["caption"] == "Word error rate by held-out speaker"
    assert "mean word error rate (lexicon) was: pretrained 50.0 %" in about["sentence"]
    assert "WER" in (tmp_path / "main.tex").read_text()
    assert "had word error rates of 30.0 % on their own speakers" in (tmp_path / "teachers.json").read_text()
    assert "\\newcommand{\\kdWerHard}" in (tmp_path / "numbers.tex").read_text()


def test_what_each_step_gives_is_compared_where_every_fold_has_it(tmp_path):
    def scored(name, right, decoders):
        rows = [
            Hypothesis(
                f"M08_B2_C{place}_M5",
                "M08",
                "",
                "",
                "",
                "ONE",
                **{decoder: "ONE" if place < count else "TWO" for decoder, count in zip(decoders, right, strict=True)},
            )
            for place in range(40)
        ]
        (tmp_path / name).mkdir()
        score.write(rows, decoders, tmp_path / name, About(name))
        return tmp_path / name

    both = ("lexicon", "lexicon_plain")
    fold = {
        ("hard", 1): scored("hard", (30, 10), both),
        ("hard_words", 1): scored("hard_words", (36, 20), both),
        ("masks", 1): scored("masks", (30,), ("greedy",)),
    }
    table = thesis_tables._gains([fold], Scoring()).set_index("a")
    assert list(table.index) == ["calibration: hard (lexicon)", "objective: hard_words"]
    assert table.difference.round(3).tolist() == [0.5, 0.15]
    assert table.b.tolist() == ["hard (lexicon_plain)", "hard"]
    assert thesis_tables._gains([fold, {("hard", 1): fold["hard", 1]}], Scoring()).a.tolist() == [
        "calibration: hard (lexicon)"
    ]
    results = replace(study(), gains=table.reset_index())
    thesis.export(results, tmp_path / "out")
    assert "calibration: hard (lexicon) differed from hard (lexicon_plain)" in (tmp_path / "out/gains.json").read_text()


def test_every_figure_is_written_with_its_numbers_and_where_they_come_from(tmp_path):
    thesis.export(study(), tmp_path, "article")
    for name in ("accuracy", "differences", "curves", "confidence"):
        for kind in ("pdf", "png", "csv", "json"):
            assert (tmp_path / f"{name}.{kind}").is_file(), (name, kind)
        about = json.loads((tmp_path / f"{name}.json").read_text())
        assert about["folds"] == ["M08", "M05"]
        assert about["seeds"] == [1, 2]
        assert about["utterances"] == 192
        assert about["runs"][0]["revision"] == "abc"
        assert about["caption"]
        assert about["sentence"].endswith(".")
    assert not (tmp_path / "speakers.pdf").exists()  # there is no table of speakers
    assert plt.get_fignums() == []


@pytest.mark.parametrize("document", thesis.WIDTHS_IN)
def test_a_pdf_has_the_width_of_the_document_class_and_embedded_fonts(document, tmp_path):
    thesis.export(study(), tmp_path, document)
    content = (tmp_path / "accuracy.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+)", content)
    assert float(box[1]) == pytest.approx(72 * thesis.WIDTHS_IN[document], abs=0.1)
    assert b"/Type3" not in content
    assert b"/FontFile2" in content  # TrueType, embedded


def test_what_notebooks_left_is_drawn_too(tmp_path):
    sweep = [(weight, bonus, 10, 0.3 - 0.1 * weight, weight == 0.9) for weight in (0.0, 0.9) for bonus in (0.0, 1.0)]
    tables = {
        "sweep": pd.DataFrame(sweep, columns=["lm_weight", "word_bonus", "size", "wer", "chosen"]).assign(
            dev="M10", held_out="M08"
        ),
        "by_speaker": pd.DataFrame(
            [("kd+t.t4", speaker, gain, "wra") for speaker, gain in (("M08", 0.05), ("M05", -0.02))],
            columns=["cell", "speaker", "difference", "measure"],
        ),
        "durations": pd.DataFrame(
            [("M08", "HIGH", 1.3, 1.2, 0.6), ("M04", "VERY_LOW", 2.5, 2.2, 1.1)],
            columns=["speaker", "level", "duration_ratio", "published_ratio", "median_s"],
        ),
        "fingerprints": causes.frame(causes.known_fingerprints()).reset_index(),
        "confusion": pd.DataFrame({"cause": ["a", "d"], "a": [2, 1], "d": [0, 1], "-": [0, 0]}),
    }
    effect = verdict("x", "y", 0.02, -0.01, 0.05, 0.3, "no difference shown", "lexicon")
    effects = pd.DataFrame([{"factor": "t", "level": "t4", "against": "t2"} | effect]).drop(columns=["a", "b"])
    thesis.export(replace(study(), more=tables, effects=effects), tmp_path)
    for name in ("beam_sweep", "by_speaker", "durations", "effect_sizes", "fingerprints", "confusion"):
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert len(pd.read_csv(tmp_path / f"{name}.csv"))
    said = json.loads((tmp_path / "beam_sweep.json").read_text())["sentence"]
    assert said.startswith(
        "Beam search was set on the dev speaker M10 of the fold M08: LM weight 0.9, word bonus 0 nats"
    )
    assert said.endswith("gave 21.0 % WER, 30.0 % without a language model.")
    said = json.loads((tmp_path / "confusion.json").read_text())["sentence"]
    assert said == "From other seeds' fingerprints the cause was named in 3 of 4 students."


def many_systems():
    """A set of ablations: thirteen systems with long names."""
    first, names = study(), [f"ctc_kd+temperature.t{place}_to_3+weight.quarter" for place in range(11)]
    frames = {}
    for field in ("scores", "curves", "confidence"):
        table = getattr(first, field)
        copies = [table[table.system == "ctc_kd"].assign(system=name) for name in names]
        frames[field] = pd.concat([table, *copies], ignore_index=True)
    rows = first.verdicts[first.verdicts.a == "ctc_kd"]
    frames["verdicts"] = pd.concat([first.verdicts, *(rows.assign(a=name) for name in names)], ignore_index=True)
    return replace(first, **frames)


@pytest.mark.parametrize("document", thesis.WIDTHS_IN)
def test_no_text_of_a_figure_is_cut_off_and_many_systems_keep_a_colour_each(document):
    results = many_systems()
    shown = thesis_figures.main_systems(results)
    assert shown[:2] == ["pretrained", "hard"]
    assert len(shown) == 8
    found = thesis_figures.colours(results)
    assert len({found[name] for name in shown}) == 8
    speakers = pd.DataFrame(
        [(f"M{number:02}", "LOW" if number % 2 else "VERY_LOW", 1.5, 1.2, 0.6) for number in range(15)],
        columns=["speaker", "level", "duration_ratio", "published_ratio", "median_s"],
    )
    results = replace(results, more=dict(results.more) | {"durations": speakers})
    for name in ("accuracy", "curves", "confidence", "differences", "durations"):
        item = thesis.FIGURES[name]
        figure = item.draw(item.table(results), results)
        figure.set_size_inches(thesis.WIDTHS_IN[document], figure.get_figheight())
        fit_texts(figure)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as that nothing is left for the axes
            figure.canvas.draw()
        box = figure.get_tightbbox()
        assert box.x0 >= -0.05, name
        assert box.x1 <= figure.get_figwidth() + 0.05, name
        assert box.y1 <= figure.get_figheight() + 0.05, name
        plt.close(figure)


def test_a_second_export_changes_no_byte_and_a_changed_result_its_macro(tmp_path):
    first = thesis.export(study(), tmp_path)
    assert len(first) > 15
    assert thesis.export(study(), tmp_path) == []
    before = (tmp_path / "numbers.tex").read_text()
    assert r"\newcommand{\kdWraHard}{71.5\,\%}" in before
    assert r"\newcommand{\kdDifferenceCtcKd}{$-5.0$ points (95\,\% $-9.0$ to $+1.0$)}" in before
    assert r"\newcommand{\kdUtterances}{192}" in before
    changed = thesis.export(study(wra=(0.5, 0.8, 0.65)), tmp_path)
    assert tmp_path / "numbers.tex" in changed
    assert r"\newcommand{\kdWraHard}{81.5\,\%}" in (tmp_path / "numbers.tex").read_text()


def test_the_main_table_is_bold_only_where_a_verdict_says_so(tmp_path):
    thesis.export(study(), tmp_path)
    text = (tmp_path / "main.tex").read_text()
    assert r"\toprule" in text
    assert r"\bottomrule" in text
    rows = {line.split("&")[0].strip(): line for line in text.splitlines() if "&" in line}
    assert r"\bfseries +20.0" in rows["hard"]
    assert "-5.0" in rows[r"ctc\_kd"]
    assert "bfseries" not in rows[r"ctc\_kd"]
    assert "0.05" in rows["hard"]  # hours of a training
    assert "[$-9.0$, $+1.0$]" in rows[r"ctc\_kd"]


def test_systems_have_one_colour_each_that_differs_in_grey():
    found = thesis_figures.colours(study())
    assert list(found) == ["pretrained", "hard", "ctc_kd"]
    grey = [np.dot(to_rgb(colour), (0.299, 0.587, 0.114)) for colour in found.values()]
    assert min(abs(a - b) for i, a in enumerate(grey) for b in grey[:i]) > 0.02
    assert len(set(thesis_figures.MARKERS)) == len(thesis_figures.MARKERS)  # and a marker each


def test_the_sentences_say_what_was_shown(tmp_path):
    results = study()
    item = thesis.FIGURES["differences"]
    text = item.sentence(item.table(results), results)
    assert text.startswith(
        "On 2 folds (192 utterances, 2 seeds), hard differed from pretrained by +20.0 points (95 % +15.0"
    )
    assert "better than pretrained; ctc_kd differed from hard by -5.0 points" in text
    assert text.endswith("corrected p = 0.2): no difference shown.")


def test_the_page_shows_everything(tmp_path):
    thesis.export(study(), tmp_path)
    page = (tmp_path / "index.html").read_text()
    for name in ("accuracy.png", "differences.pdf", "main.tex", r"\kdWraHard", "One may write", "outputs/x"):
        assert name in page
    assert all((tmp_path / name).is_file() for name in re.findall(r'(?:src|href)="([^"]+)"', page))


def test_other_peoples_files_are_exported_too(tmp_path):
    paths = {}
    for name, right in (("theirs", 5), ("ours", 8)):
        rows = [(f"M08_B1_C{i}_M5", "WORD", "WORD" if i < right else "OTHER") for i in range(12)]
        predictions = [{"utterance_id": a, "target": b, "prediction_text": c} for a, b, c in rows]
        paths[name] = [tmp_path / f"{name}.json"]
        paths[name][0].write_text(json.dumps({"predictions": predictions}))
    out = tmp_path / "out"
    thesis.run("params/demo.yaml", [], paths, out, "thesis")
    assert (out / "accuracy.pdf").is_file()
    assert r"\newcommand{\kdDifferenceOurs}{$+25.0$ points" in (out / "numbers.tex").read_text()
    with pytest.raises(UserError, match="expected at least two systems"):
        thesis_tables.of_files({"ours": paths["ours"]})


def test_mistakes_are_one_sentence(tmp_path, smoke):
    with pytest.raises(UserError, match="unknown document class 'articel'; did you mean 'article'"):
        thesis.export(study(), tmp_path, "articel")


def test_names_of_macros_and_texts_are_latex():
    assert latex.macro("wra ctc_kd+temperature.t4") == "kdWraCtcKdTemperatureTFour"
    assert latex.escape("ctc_kd & 5 %") == r"ctc\_kd \& 5 \%"
    assert latex.points(0.05, -0.012, 0.1) == r"$+5.0$ points (95\,\% $-1.2$ to $+10.0$)"


def test_the_results_of_a_recipe_are_found_on_disk(with_teachers, outputs, tmp_path):
    recipe = tmp_path / "smoke.yaml"
    text = {"extends": str(repository_root() / "params/smoke.yaml"), "outputs": str(outputs)}
    recipe.write_text(json.dumps(text))
    from kdlib.pipeline import Fold

    for name in ("hard", "ctc_kd"):
        fold = Fold.load(recipe, "M08", name)
        fold.scores(1)
    fold.baseline()
    results = thesis_tables.of_recipe(recipe, ["M08"])
    assert {"pretrained", "hard", "ctc_kd"} <= set(results.systems)
    assert set(results.verdicts.a) >= {"hard", "ctc_kd"}
    assert results.hours["hard"] > 0
    assert not results.curves.empty
    changed = thesis.export(results, tmp_path / "out")
    assert tmp_path / "out/accuracy.pdf" in changed
    with pytest.raises(UserError, match=r"there are no scores in .*run it first: make folds"):
        thesis_tables.of_recipe(recipe, ["M04"])


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX: pdflatex is not installed")
def test_the_example_document_is_compiled(tmp_path):
    folder = tmp_path / "example"
    shutil.copytree(repository_root() / "docs/thesis-example", folder)
    thesis.export(study(), folder / "figures", "article")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "example.tex"]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]
    assert (folder / "example.pdf").read_bytes().startswith(b"%PDF")


def test_a_figure_and_a_table_of_one_name_would_write_one_file_twice():
    assert not set(thesis.FIGURES) & set(thesis.TABLES)
