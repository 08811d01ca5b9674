"""What `make unchanged` tells of two runs; the runs themselves take minutes, and are for those who change the code."""

from unchanged.__main__ import differences


def test_every_value_that_differs_is_named():
    before = {"scores.json": {"wra": 0.5, "n": 4}, "old.csv": {"loss": [1.0]}, "same.json": {"a": [1.0, None]}}
    after = {"scores.json": {"wra": 0.5000001, "cer": 1}, "new.csv": {"loss": [1.0]}, "same.json": {"a": [1.0, None]}}
    assert differences(before, after) == [
        "new.csv: new",
        "old.csv: no longer made",
        "scores.json: cer: new",
        "scores.json: n: no longer there",
        "scores.json: wra: 0.5 -> 0.5000001",
    ]
    assert differences(before, before) == []
