import json

from kdlib.corpus import audio, prepare
from kdlib.decode.greedy import greedy
from kdlib.logits import extract, teacher_scores
from kdlib.models import hybrid
from kdlib.teachers.adapt import speaker_teacher


def test_a_teachers_scores_are_those_of_the_model_itself(taught, corpus):
    teacher = hybrid.TrainedModel(speaker_teacher(taught, "M04"))
    store = extract.open_store(taught, "M04", "analysis")
    batch = extract.extracted_utterances(taught, corpus, "analysis")[:6]
    said = greedy(teacher(*audio.collate(batch)), 2)
    assert greedy(teacher_scores.stored_outputs(store, batch), 2) == said


def test_every_decoder_and_speaker_is_scored(taught):
    folder = teacher_scores.teacher_scores(taught, "M04")
    found = json.loads((folder / "scores.json").read_text())
    assert list(found["decoders"]) == ["greedy", "lexicon", "beam", "attention"]
    for one in found["decoders"].values():
        assert set(one["by"]["speaker"]) == {"M04", "M08", "M10"}
    assert (folder / "evaluation_attention.json").is_file()
    assert set(prepare.lexicon(taught)) >= {
        row["target"] for row in json.loads((folder / "evaluation_lexicon.json").read_text())["predictions"]
    }


def test_the_matrix_stands_in_order_of_intelligibility(taught):
    table = teacher_scores.accuracy_matrix(taught, ["M08", "M04"], "lexicon")
    assert list(table.index) == ["M04", "M08"]
    assert list(table.columns) == ["M04", "M08", "M10"]  # M08 and M10: 93 %, then by name
    by = teacher_scores.own_and_others(table)
    assert list(by.index) == ["M04", "M08"]  # M10 has no teacher here
    expected = {"own teacher": table.loc["M04", "M04"], "other teachers": table.loc["M08", "M04"]}
    assert by.loc["M04"].to_dict() == expected
