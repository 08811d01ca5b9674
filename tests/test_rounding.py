"""One rounding of shares, wherever they are shown."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kdlib.evaluate.rounding import percent, span

ROOT = Path(__file__).parents[1]


def test_51_of_80_are_63_8_per_cent_in_numbers_tables_and_texts():
    """In binary, 100 x .6375 is a little less than 63.75: 63.7 or 63.8, by the order of the operations."""
    assert (round(100 * (51 / 80), 1), round(100 * 51 / 80, 1)) == (63.7, 63.8)
    assert percent(51 / 80) == 63.8
    assert percent(pd.Series([51 / 80])).tolist() == percent(pd.DataFrame({"a": [51 / 80]})).a.tolist() == [63.8]
    assert span(-51 / 80, 51 / 80) == "-63.8 to +63.8"


@pytest.mark.parametrize("total", [16, 80, 96, 160, 400, 1000])
def test_every_share_of_a_test_set_is_rounded_half_away_from_zero(total):
    """Exact by whole numbers: the tenths of a per cent are (2000 right + total) // (2 total)."""
    for right in range(total + 1):
        tenths = (2000 * right + total) // (2 * total)
        assert percent(right / total) == tenths / 10
        assert percent(-right / total) == -tenths / 10
        assert percent(np.mean([1.0] * right + [0.0] * (total - right))) == tenths / 10


def test_zero_has_no_sign_and_unknown_stays_unknown():
    assert f"{percent(-0.0001):+.1f}" == "+0.0"
    assert np.isnan(percent(np.nan))
    assert span(np.nan, np.nan) == "-"
    assert percent(0.455, 0) == 46


def test_nothing_else_rounds_shares_for_display():
    rounding = re.compile(r"round\(100 \*|\(100 \*[^\n]*\)\.round\(1\)|\{100 \*[^}\n]*:\+?\.1f\}")
    shown = [*(ROOT / "kdlib").glob("evaluate/*.py"), *(ROOT / "kdlib").glob("diagnose/*.py")]
    shown += [*(ROOT / "kdlib").glob("show/*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    assert len(shown) > 30
    found = {path.name: rounding.findall(path.read_text(encoding="utf-8")) for path in shown}
    assert {name: lines for name, lines in found.items() if lines} == {}
