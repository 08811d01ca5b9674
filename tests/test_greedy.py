import pytest
import torch

from kdlib.decode.greedy import blank_share, collapse_repeats, greedy
from kdlib.models import Emissions

BLANK = 3


def outputs(rows, lengths):
    logits = torch.nn.functional.one_hot(torch.tensor(rows), 4).float()
    return Emissions(logits, torch.tensor(lengths))


@pytest.mark.parametrize(
    ("frames", "expected"),
    [([], []), ([3, 3], []), ([0, 0, 1], [0, 1]), ([0, 3, 0], [0, 0]), ([1, 1, 3, 3, 1, 2], [1, 1, 2])],
)
def test_repetitions_are_merged_before_blanks_are_dropped(frames, expected):
    assert collapse_repeats(frames, BLANK) == expected


def test_padding_frames_are_not_decoded():
    assert greedy(outputs([[0, 3, 1, 2], [2, 2, 0, 1]], [4, 2]), BLANK) == [[0, 1, 2], [2]]


def test_the_blank_share_leaves_padding_out():
    assert blank_share(outputs([[0, 3, 1, 3], [3, 1, 3, 3]], [4, 2]), BLANK).tolist() == [0.5, 0.5]
