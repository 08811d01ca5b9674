import json

from kdlib.corpus import inputs
from kdlib.decode.greedy import greedy
from kdlib.logits import teacher_scores
from kdlib.models import hybrid


def test_stored_outputs_give_the_hypotheses_of_the_model(with_teachers):
    teacher = hybrid.TrainedModel(with_teachers.teacher("M04"))
    store = with_teachers.store("M04", "analysis")
    batch = with_teachers.splits.speech_of_all(test=True)[:6]
    hypotheses = greedy(teacher(*inputs.collate(batch)).ctc, 2)
    assert greedy(teacher_scores.stored_outputs(store, batch).ctc, 2) == hypotheses


def test_every_decoder_and_speaker_is_scored(with_teachers):
    folder = with_teachers.teacher_scores("M04")
    decoders = json.loads((folder / "scores.json").read_text())["decoders"]
    assert list(decoders) == ["greedy", "lexicon", "beam", "attention"]
    for scores in decoders.values():
        assert set(scores["by"]["speaker"]) == {"M04", "M08", "M10"}
    assert (folder / "evaluation_attention.json").is_file()
    assert set(with_teachers.lexicon) >= {
        row["target"] for row in json.loads((folder / "evaluation_lexicon.json").read_text())["predictions"]
    }


def test_the_matrix_is_in_order_of_intelligibility(with_teachers, corpus):
    scores = {name: with_teachers.teacher_scores(name) for name in ("M08", "M04")}
    table = teacher_scores.accuracy_matrix(corpus, scores, "lexicon")
    assert list(table.index) == ["M04", "M08"]
    assert list(table.columns) == ["M04", "M08", "M10"]  # M08 and M10: 93 %, then by name
    comparison = teacher_scores.own_and_others(table)
    assert list(comparison.index) == ["M04", "M08"]  # M10 has no teacher here
    expected = {"own teacher": table.loc["M04", "M04"], "other teachers": table.loc["M08", "M04"]}
    assert comparison.loc["M04"].to_dict() == expected
