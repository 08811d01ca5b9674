import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from kdlib.corpus import utterances
from kdlib.corpus.utterances import Utterance, Utterances
from kdlib.errors import UserError


def made(count=3000):
    return [
        Utterance(f"u{index}", f"S{index % 7}", Path(f"/data/{index}.wav"), 1 + index % 5, "EINS ZWEI", offset_s=0.5)
        for index in range(count)
    ]


@pytest.fixture(params=["in memory", "on disk"])
def both(request, monkeypatch):
    """Utterances as a list, and packed: in memory, or in a file that is written in several parts."""
    monkeypatch.setattr(utterances, "IN_MEMORY", 2**20 if request.param == "in memory" else 10_000)
    return made(), Utterances.of(iter(made()))


def test_a_sequence_gives_back_the_utterances(both):
    plain, packed = both
    assert list(packed) == plain == packed
    assert len(packed) == len(plain)
    assert [packed[place] for place in (0, 1500, -1, np.int64(7))] == [plain[place] for place in (0, 1500, -1, 7)]
    assert packed[10:2000:3] == plain[10:2000:3]
    assert plain[77] in packed
    assert packed.durations.tolist() == [utt.duration_s for utt in plain]
    assert packed[0].wav == Path("/data/0.wav")
    with pytest.raises(IndexError):
        packed[3000]


def test_rows_in_any_order_are_read(both):
    plain, packed = both
    order = random.Random(1).sample(range(3000), 3000)
    far = [0, 2999, 1500, 3]
    for rows in (order, far):
        assert list(Utterances(packed._table, np.array(rows))) == [plain[row] for row in rows]


def test_parts_share_the_file_and_join_again(both):
    plain, packed = both
    first, rest = packed.where(lambda utt: utt.speaker == "S1"), packed.where(lambda utt: utt.speaker != "S1")
    assert first == [utt for utt in plain if utt.speaker == "S1"]
    assert first._table is rest._table is (first + rest)._table
    assert first + rest == list(first) + list(rest)
    assert first.where(lambda utt: utt.duration_s > 3) == [utt for utt in first if utt.duration_s > 3]
    assert not packed.where(lambda utt: False)
    other = Utterance("new", "T", "new.wav", 1.0, "")
    assert first + Utterances.of([other]) == [*first, other]


def test_a_copy_for_another_process_has_the_same_utterances(both):
    plain, packed = both
    assert pickle.loads(pickle.dumps(packed[:20])) == plain[:20]


def test_an_utterance_changes_its_fields():
    utt = made(1)[0]
    assert utt.replace(wav=Path("b.wav"), text="") == Utterance("u0", "S0", "b.wav", 1.0, "", offset_s=0.5)
    assert isinstance(Utterances.of([utt.replace(duration_s=np.float64(0.25))])[0].duration_s, float)
    with pytest.raises(TypeError, match="sound"):
        utt.replace(sound=1)


def test_speakers_have_their_utterances(both):
    plain, packed = both
    spoken = packed.by_speaker()
    assert list(spoken) == [f"S{number}" for number in range(7)]
    assert spoken["S3"] == [utt for utt in plain if utt.speaker == "S3"]


def test_repeated_ids_are_found_also_where_parts_are_joined(both):
    _, packed = both
    assert packed.repeated_ids() == packed.repeated_ids() == []
    assert (packed + packed[5:7]).repeated_ids() == ["u5", "u6"]
    assert Utterances.of([*packed, packed[3]]).repeated_ids() == ["u3"]


def test_what_would_not_come_back_as_it_was_is_refused():
    with pytest.raises(TypeError, match="fields must be str"):
        Utterances.of([made(1)[0].replace(text=np.str_("EINS"))])


def test_a_full_disk_is_one_sentence(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utterances, "IN_MEMORY", 1000)
    monkeypatch.setattr(utterances.os, "write", full)
    with pytest.raises(UserError, match=r"No space left on device.*TMPDIR"):
        Utterances.of(made(100))
