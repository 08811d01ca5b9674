"""Locks between processes and machines: each stage is made once, and a dead holder's lock is taken over."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from kdlib import lock
from kdlib.errors import UserError
from kdlib.lock import Holder, Lock
from kdlib.stage import Stage, produce

STAGES = """
import random, sys, time
from pathlib import Path
from kdlib.stage import Stage, produce
root, name = Path(sys.argv[1]), sys.argv[2]
numbers = list(range(30))
random.Random(name).shuffle(numbers)
for number in numbers:
    def build(partial, number=number):
        (partial / "value").write_text(str(number))
        with (root / "made.txt").open("a") as file:
            file.write(f"{number} {name}\\n")
        time.sleep(0.02)
    produce(Stage(root / "stages" / str(number), f"stage {number}", build=build))
"""
COUNT = """
import sys, time
from pathlib import Path
from kdlib import lock
root = Path(sys.argv[1])
for _ in range(10):
    with lock.held(root / "folder", "count"):
        value = int((root / "count").read_text())
        time.sleep(0.005)
        (root / "count").write_text(str(value + 1))
"""


def start(code: str, *arguments: object, host: str, stale_s: float = 120.0) -> subprocess.Popen:
    """A process as one of another machine."""
    env = os.environ | {"KDLIB_HOST": host, "KDLIB_LOCK_STALE_S": str(stale_s)}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=env, stdout=subprocess.DEVNULL)


def holder(**changed: object) -> Holder:
    return Holder(**{"host": "elsewhere", "pid": 1, "started": 1, "since": "noon", "token": "abc"} | changed)


def lock_of(folder: Path, other: Holder, age_s: float = 0.0) -> Path:
    """A folder's lock as another process left it."""
    path = folder.with_name(f".{folder.name}.lock")
    path.write_text(json.dumps(asdict(other)))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_a_file_without_a_name_may_be_one_that_is_being_written(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "NAMELESS_S", 0.3)
    path = tmp_path / ".folder.lock"
    path.write_text("")
    mine = lock.Lock(path)
    assert not mine._try()
    time.sleep(0.4)
    assert mine._try()
    mine.release()


def test_a_right_that_was_made_although_the_answer_was_lost_is_had(tmp_path, monkeypatch):
    """As on NFS: the link is there, and the call says that it was there before."""
    path, link = tmp_path / ".folder.lock", lock.Lock._link
    lock_of(tmp_path / "folder", holder(host=lock.this_host(), pid=1, started=1))
    monkeypatch.setattr(lock.Lock, "_link", staticmethod(lambda mine, to: link(mine, to) and to == path))
    mine = lock.Lock(path)
    assert mine._try()
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    mine.release()


def test_two_hosts_make_each_of_thirty_stages_once(tmp_path):
    running = [start(STAGES, tmp_path, host, host=host) for host in ("one", "two")]
    assert [process.wait(120) for process in running] == [0, 0]
    made = [line.split() for line in (tmp_path / "made.txt").read_text().splitlines()]
    assert sorted(int(number) for number, _ in made) == list(range(30))
    assert {host for _, host in made} == {"one", "two"}
    assert all((tmp_path / "stages" / str(number) / "value").read_text() == str(number) for number in range(30))
    assert not list((tmp_path / "stages").glob(".*.lock*"))


def test_after_a_dead_host_one_of_many_takes_over_and_none_counts_twice(tmp_path):
    (tmp_path / "count").write_text("0")
    path = lock_of(tmp_path / "folder", holder())
    running = [start(COUNT, tmp_path, host=f"host{number}", stale_s=2) for number in range(5)]
    assert [process.wait(120) for process in running] == [0] * 5
    assert (tmp_path / "count").read_text() == "50"
    assert not path.exists()


def test_a_dead_hosts_lock_is_taken_over_when_its_heartbeat_has_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    lock_of(tmp_path / "folder", holder(), age_s=3600)  # its time alone says nothing: clocks differ
    started = time.monotonic()
    with lock.held(tmp_path / "folder", "it"):
        assert 0.5 < time.monotonic() - started < 10


def test_a_host_that_is_alive_keeps_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    code = "import sys, time\nfrom pathlib import Path\nfrom kdlib import lock\n"
    code += "with lock.held(Path(sys.argv[1]) / 'folder', 'it'):\n    print('held', flush=True)\n    time.sleep(4)\n"
    env = os.environ | {"KDLIB_HOST": "other", "KDLIB_LOCK_STALE_S": "1"}
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with lock.held(tmp_path / "folder", "it"):
        assert other.poll() is not None or other.wait(1) == 0  # it was waited for, three times as long as a silence


def test_a_killed_process_of_this_machine_holds_nothing(tmp_path):
    code = "import sys, time\nfrom pathlib import Path\nfrom kdlib import lock\n"
    code += "with lock.held(Path(sys.argv[1]) / 'folder', 'it'):\n    print('held', flush=True)\n    time.sleep(60)\n"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    other.kill()
    other.wait()
    started = time.monotonic()
    with lock.held(tmp_path / "folder", "it"):
        assert time.monotonic() - started < 5


def test_a_process_number_that_is_used_again_is_another_process(tmp_path):
    other = os.getppid()
    assert holder(host=lock.this_host(), pid=other, started=1).is_gone
    assert not holder(host=lock.this_host(), pid=other, started=lock._started(other)).is_gone
    assert not holder(pid=10**8).is_gone  # of another machine: only its heartbeat can say


def test_whoever_was_taken_over_does_not_replace_what_the_other_has_made(tmp_path):
    folder = tmp_path / "stage"

    def build(partial: Path) -> None:
        (partial / "value").write_text("late")
        lock_of(folder, holder())  # another has taken over meanwhile, and replaced the folder
        partial.rename(tmp_path / "elsewhere")

    with pytest.raises(
        UserError, match=r"stage: another process \(process 1 on elsewhere, since noon\) has taken over"
    ):
        produce(Stage(folder, "stage", build=build))
    assert not folder.exists()


def test_the_right_to_take_over_goes_with_one_that_died_having_it(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    path = lock_of(tmp_path / "folder", holder())
    path.with_name(f"{path.name}.abc").write_text(json.dumps(asdict(holder(host="third", token="def"))))
    with lock.held(tmp_path / "folder", "it") as mine:
        assert mine.is_own
    assert not list(tmp_path.glob(".folder.lock*"))


def test_a_lock_of_an_earlier_version_is_free(tmp_path):
    (tmp_path / ".folder.lock").touch()
    mine = Lock(tmp_path / ".folder.lock")
    mine.acquire("it", tmp_path / "folder")
    assert mine.is_own
    mine.release()
    assert not mine.path.exists()


def test_a_process_that_was_stopped_for_long_keeps_its_lock_on_its_own_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "STALE_S", 0.5)
    code = "import sys, time\nfrom pathlib import Path\nfrom kdlib import lock\n"
    code += "with lock.held(Path(sys.argv[1]) / 'folder', 'it'):\n    print('held', flush=True)\n    time.sleep(1)\n"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    other.stdout.readline()
    other.send_signal(signal.SIGSTOP)
    mine = Lock(tmp_path / ".folder.lock")
    for _ in range(20):
        assert not mine._try()
        time.sleep(0.1)
    other.send_signal(signal.SIGCONT)
    assert other.wait(10) == 0
    assert mine._try()
    mine.release()


def test_a_lock_that_an_interrupt_left_is_free_for_its_own_process(tmp_path):
    with lock.held(tmp_path / "folder", "it"):
        mine = Lock(tmp_path / ".folder.lock")
        assert not mine._try()  # held by this process
    lock_of(tmp_path / "folder", holder(host=lock.this_host(), pid=os.getpid(), started=lock._started(os.getpid())))
    assert mine._try()
    mine.release()


def test_a_file_system_without_hard_links_has_locks_too(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(lock.os, "link", refuse)
    with lock.held(tmp_path / "folder", "it") as mine:
        assert mine.is_own
        assert not Lock(tmp_path / ".folder.lock")._try()
    assert not list(tmp_path.glob(".folder.lock*"))
