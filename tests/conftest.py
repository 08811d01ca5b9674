"""Shared fixtures: the smoke recipe, run once per session in a temporary folder."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # before torch is imported by any test

if TYPE_CHECKING:
    from kdlib.pipeline import Fold


@pytest.fixture(scope="session")
def outputs(tmp_path_factory) -> Path:
    """A folder for the smoke recipe's outputs, the same for the whole session."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="session")
def smoke(outputs) -> "Fold":
    """The smoke recipe's fold, writing into `outputs`."""
    from kdlib.pipeline import Fold

    return Fold.load("params/smoke.yaml", "M08", overrides={"outputs": str(outputs)})


@pytest.fixture(scope="session")
def corpus(smoke):
    """The smoke recipe's corpus."""
    return smoke.corpus


@pytest.fixture(scope="session")
def small_model(smoke) -> Path:
    """A `.nemo` file trained for a few steps on the smoke corpus."""
    return smoke.pretrained_model()


@pytest.fixture(scope="session")
def with_teachers(smoke) -> "Fold":
    """The smoke recipe's fold, with the teachers of all its three speakers trained, extracted and scored."""
    for name in ("M04", "M08", "M10"):
        smoke.teacher_scores(name)
        smoke.outputs(name, "training")
    return smoke


def pytest_collection_modifyitems(items):
    """Run the longest file first: one of several processes runs it while the others run the rest."""
    longest = ("test_notebooks", "test_external_corpus", "test_students")
    items.sort(
        key=lambda item: next((place for place, name in enumerate(longest) if name in item.nodeid), len(longest))
    )
