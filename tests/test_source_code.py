"""The code that stages depend on: its fingerprint, and that every stage's builder leads to files that exist."""

import pytest

from kdlib import fold_stage, source_code

STAGES = source_code.stage_methods("pipeline.py", "Fold") + source_code.stage_methods(
    "fold_imports.py", "ImportedTeachers"
)


def test_comments_and_docstrings_do_not_change_the_fingerprint_of_code():
    before = source_code._canonical('"""Doc."""\ndef f(x):\n    """Add."""\n    return x + 1\n')
    assert source_code._canonical("# other\ndef f(x):\n\n    return x + 1  # why\n") == before
    assert source_code._canonical("def f(x):\n    return x + 2\n") != before


def test_every_stage_is_found():
    assert {"prepared_corpus", "pretraining", "pretrained_scores"} <= set(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_the_code_files_of_stages_exist(stage):
    code = fold_stage.code_of(stage)
    assert code
    assert code <= set(source_code.SOURCES)
