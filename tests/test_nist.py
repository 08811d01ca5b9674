"""STM and CTM files, written and read."""

import pytest

from kdlib.errors import UserError
from kdlib.evaluate import nist

ROWS = [("a1", "S01", 2.0, "REGEN WIND"), ("a2", "S02", 1.5, "SONNE")]


def test_a_round_trip(tmp_path):
    nist.write_stm(tmp_path / "r.stm", ROWS)
    nist.write_ctm(tmp_path / "h.ctm", [("a1", 2.0, "REGEN"), ("a2", 1.5, "")])
    assert (tmp_path / "r.stm").read_text().splitlines()[0] == "a1 1 S01 0.00 2.00 REGEN WIND"
    references, hypotheses = nist.read_stm(tmp_path / "r.stm"), nist.read_ctm(tmp_path / "h.ctm")
    assert references == {"a1": ("S01", "REGEN WIND"), "a2": ("S02", "SONNE")}
    assert hypotheses == {"a1": "REGEN"}
    rows = nist.pair(references, hypotheses, "theirs")
    assert [row["hypothesis"] for row in rows] == ["REGEN", ""]


def test_files_of_others_have_labels_comments_and_several_parts(tmp_path):
    (tmp_path / "r.stm").write_text(";; comment\nf 1 S 3.0 4.0 <o,f0,male> TWO\nf 1 S 0.0 1.0 <o,f0,male> ONE\n")
    (tmp_path / "h.ctm").write_text("f 1 0.9 0.1 TWO 0.99\nf 1 0.1 0.1 ONE 0.5\n")
    assert nist.read_stm(tmp_path / "r.stm") == {"f": ("S", "ONE TWO")}
    assert nist.read_ctm(tmp_path / "h.ctm") == {"f": "ONE TWO"}


def test_mistakes_are_one_sentence(tmp_path):
    (tmp_path / "h.ctm").write_text("f 1 0.1 ONE\n")
    with pytest.raises(UserError, match=r"h.ctm, line 1: 4 fields; expected file channel begin duration word"):
        nist.read_ctm(tmp_path / "h.ctm")
    (tmp_path / "h.ctm").write_text("f 1 x 0.1 ONE\n")
    with pytest.raises(UserError, match=r"line 1: 'x' is not a number of seconds"):
        nist.read_ctm(tmp_path / "h.ctm")
    with pytest.raises(UserError, match=r"1 utterances have no reference, first f"):
        nist.pair({}, {"f": "ONE"}, "theirs")
