"""The table of the loss's terms, and what follows from it: what a recipe needs, and which recipes are refused."""

import pytest

from kdlib.errors import UserError
from kdlib.objectives import terms
from kdlib.params import load
from kdlib.settings.distill import Distill
from kdlib.settings.schedule import Schedule

WEIGHTS = {  # one setting for every weight of the table
    "alpha": 0.5,
    "beta": 0.5,
    "gamma": 0.1,
    "pseudo_labels": {"weight": 0.1},
    "words": {"weight": 0.1},
    "sequence": {"weight": 0.1},
    "occupancy": {"weight": 0.1},
    "intermediate": {"weight": 0.1},
    "hard_words": {"weight": 0.1},
    "consistency": {"weight": 0.1},
    "word_errors": {"weight": 0.1},
    "average": {"weight": 0.1},
    "word_entropy": {"weight": 0.1},
}
OF_REFERENCES = {"ctc", "decoder", "hard_words", "intermediate_ctc", "word_errors"}
NONE = {"alpha": 0.0, "beta": 0.0}


def of(**settings):
    return Distill(**NONE | settings)


@pytest.mark.parametrize("name", terms.TERMS)
def test_every_weight_of_the_table_is_a_setting_that_may_change(name):
    term, section = terms.TERMS[name], Distill
    *places, field = term.setting.split(".")
    for place in places:
        section = section.model_fields[place].annotation
    assert section.model_fields[field].annotation is Schedule
    value: object = {"from": 0.0, "to": 0.5}
    for place in reversed([*places, field]):
        value = {place: value}
    rising = of(**{"heads": "both"} | value)
    assert term.weight(rising) == Schedule((0.0, 0.5))
    assert name in terms.active(rising)  # although its first weight is 0
    assert name not in terms.active(of(heads="both"))


def test_the_settings_of_the_table_are_all_weights_of_the_loss():
    settings = {term.setting for term in terms.TERMS.values()}
    assert {name.removesuffix(".weight") for name in settings} == set(WEIGHTS)
    assert set(terms.active(Distill(heads="both", **WEIGHTS))) == set(terms.TERMS)


@pytest.mark.parametrize(
    ("settings", "active", "outputs", "needed"),
    [
        ({"beta": 1.0}, {"ctc"}, (), set()),
        ({"beta": 1.0, "heads": "decoder"}, {"decoder"}, (), set()),
        ({"alpha": 0.5}, {"kd_ctc"}, ("ctc",), {"frames"}),
        ({"alpha": 0.5, "heads": "decoder"}, {"kd_decoder"}, ("decoder",), {"steps"}),
        ({"alpha": 0.5, "heads": "both"}, {"kd_ctc", "kd_decoder"}, ("ctc", "decoder"), {"frames", "steps"}),
        (
            {"gamma": 0.1, "alpha": 0.5, "heads": "decoder"},
            {"features", "kd_decoder"},
            ("ctc", "decoder"),
            {"frames", "steps"},
        ),
        ({"sequence": {"weight": 1.0}}, {"sequence_ctc"}, ("ctc",), {"texts"}),
        ({"sequence": {"weight": 1.0}, "heads": "decoder"}, {"sequence_decoder"}, ("ctc",), {"texts"}),
        ({"words": {"weight": 1.0}}, {"words_ctc"}, ("ctc",), {"texts", "lexicon"}),
        ({"occupancy": {"weight": 1.0}}, {"occupancy_ctc"}, ("ctc",), {"frames", "texts"}),
        ({"pseudo_labels": {"weight": 1.0}}, {"pseudo_ctc"}, ("ctc",), {"frames"}),
        ({"intermediate": {"weight": 1.0}}, {"intermediate_self", "intermediate_ctc"}, (), {"layer"}),
        ({"hard_words": {"weight": 1.0}}, {"hard_words"}, (), {"lexicon"}),
        ({"alpha": {"from": 0.0, "to": 0.5}, "beta": 1.0}, {"kd_ctc", "ctc"}, ("ctc",), {"frames"}),
        ({}, set(), (), set()),
    ],
)
def test_what_a_loss_needs_follows_from_its_terms(settings, active, outputs, needed):
    distill = of(**settings)
    assert set(terms.active(distill)) == active
    assert terms.outputs(distill) == outputs
    assert terms.uses_teachers(distill) == bool(outputs)
    assert {what for what in ("frames", "steps", "texts", "layer", "lexicon") if terms.needs(distill, what)} == needed


@pytest.mark.parametrize(
    ("settings", "references_only"),
    [
        ({"beta": 1.0}, True),
        ({"beta": 1.0, "heads": "both"}, True),
        ({"beta": 1.0, "hard_words": {"weight": 0.5}}, True),
        ({"beta": 1.0, "ctc_smoothing": 0.1}, False),
        ({"beta": 1.0, "intermediate": {"weight": 0.3}}, False),
        ({"beta": 1.0, "alpha": {"from": 0.0, "to": 0.1}}, False),
        ({"beta": 1.0, "alpha": 0.5, "use_teachers": False}, True),
        ({"beta": 1.0, "sequence": {"weight": 0.5}}, False),
    ],
)
def test_a_control_knows_the_references_alone(settings, references_only):
    assert terms.references_only(of(**settings)) == references_only


def test_use_teachers_turns_off_every_term_of_teachers_and_no_other():
    taught, untaught = (Distill(heads="both", use_teachers=use, **WEIGHTS) for use in (True, False))
    own = {name for name, term in terms.TERMS.items() if term.side != "teachers"}
    assert own == OF_REFERENCES | {"intermediate_self", "consistency", "average", "word_entropy"}
    assert set(terms.active(untaught)) == own
    assert set(terms.active(taught)) == set(terms.TERMS)
    assert (terms.uses_teachers(untaught), terms.outputs(untaught)) == (False, ())
    assert [terms.needs(untaught, what) for what in ("frames", "steps", "texts")] == [False] * 3
    for name in own:
        assert terms.TERMS[name].weight(untaught) == terms.TERMS[name].weight(taught)


def test_without_teachers_their_settings_are_not_recorded():
    """A control is not trained anew when a setting of the teachers' terms changes."""
    control = Distill(beta=1.0, use_teachers=False)
    same = Distill(beta=1.0, use_teachers=False, alpha=0.7, temperature=4.0, words={"weight": 0.3}, allow=("target",))
    assert terms.record(control) == terms.record(same)
    for change in ({"beta": 0.5}, {"hard_words": {"weight": 0.5}}, {"ctc_smoothing": 0.1}, {"heads": "both"}):
        assert terms.record(Distill(**{"beta": 1.0, "use_teachers": False} | change)) != terms.record(control)
    taught = [terms.record(Distill(temperature=temperature)) for temperature in (2.0, {"from": 4.0, "to": 2.0})]
    assert taught[0] != taught[1]
    assert taught[1]["temperature"] == {"from": 4.0, "to": 2.0}


@pytest.mark.parametrize(
    "section", ["words", "occupancy", "intermediate", "hard_words", "consistency", "average", "word_errors"]
)
def test_a_student_with_a_decoder_alone_is_refused_terms_of_a_ctc_head(section):
    settings = {"student": {"decoder_layers": 1}, "distill": {"heads": "decoder", section: {"weight": 0.5}}}
    message = rf"distill\.{section} is a loss of a CTC head, but distill\.heads is 'decoder'; write heads: both, or ctc"
    with pytest.raises(UserError, match=message):
        load("params/smoke.yaml", "M08", overrides=settings)
    settings["distill"]["heads"] = "both"
    assert load("params/smoke.yaml", "M08", overrides=settings).distill.heads == "both"


@pytest.mark.parametrize("section", ["sequence", "pseudo_labels"])
def test_terms_of_either_head_are_accepted_for_a_decoder(section):
    settings = {"student": {"decoder_layers": 1}, "distill": {"heads": "decoder", section: {"weight": 0.5}}}
    distill = load("params/smoke.yaml", "M08", overrides=settings).distill
    assert {term.head for term in terms.active(distill).values()} == {"decoder"}


@pytest.mark.parametrize("distill", [{"alpha": 0, "beta": 0}, {"beta": 0, "use_teachers": False}])
def test_a_loss_without_terms_is_refused(distill):
    with pytest.raises(UserError, match="all other weights are 0: the loss would be empty"):
        load("params/smoke.yaml", "M08", overrides={"distill": distill})


@pytest.mark.parametrize("changes", [{"live_teachers": True}, {"use_teachers": False}, {"alpha": 0.0}])
def test_stored_frames_do_not_follow_a_change_of_tempo(changes):
    settings = {"student": {"augment": "mask_and_tempo"}, "distill": {"beta": 1.0}}
    with pytest.raises(UserError, match="stored outputs are those of the unchanged recording"):
        load("params/smoke.yaml", "M08", overrides=settings)
    settings["distill"] |= changes
    assert load("params/smoke.yaml", "M08", overrides=settings).student.augment == "mask_and_tempo"
