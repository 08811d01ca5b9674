"""A lock on a folder that names its holder, and holds across machines on a shared file system (NFS).

The lock is a file beside the folder: host, process, since when. It is made by a hard link, which is atomic on NFS too,
and its holder renews its time (the heartbeat). A lock whose process is gone on this machine is taken over at once; one
of another machine, when its heartbeat has stopped for `STALE_S` by the file system's own clock. Of several that want to
take over, one gets the right by another link, whose name has the lock's own token.
"""

import contextlib
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from kdlib.console import report
from kdlib.errors import UserError
from kdlib.io import short_path

BEAT_S = 15.0
STALE_S = float(os.environ.get("KDLIB_LOCK_STALE_S", 120))  # beats that a busy file server may lose
POLL_S = (0.2, 3.0)  # between tries, at first and at last
_held: set[Path] = set()  # this process's locks, which its heartbeat renews
_start_beating = threading.Lock()


@dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    host: str
    pid: int
    started: int  # of the process, in ticks since the machine's start: numbers of processes are used again
    since: str
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host.split('/')[0]}, since {self.since}"

    @property
    def is_gone(self) -> bool:
        """True if its process was one of this machine, and is not there any more."""
        return self.host == this_host() and _started(self.pid) != self.started


@contextlib.contextmanager
def held(folder: Path, what: str) -> Iterator["Lock"]:
    """Hold the lock of a folder; wait for a holder that is alive."""
    lock = Lock(folder.parent / f".{folder.name}.lock")
    lock.acquire(what, folder)
    try:
        yield lock
    finally:
        lock.release()


class Lock:
    """A lock file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.own = Holder(this_host(), os.getpid(), _started(os.getpid()), since, uuid.uuid4().hex[:12])

    def acquire(self, what: str, folder: Path) -> None:
        """Wait until the lock is this process's."""
        said, wait = "", POLL_S[0]
        while not self._try():
            if (other := self._holder()) and str(other) != said:
                said = str(other)
                report(f"{what}: {other} is making {short_path(folder)}; waiting for it")
            time.sleep(wait)
            wait = min(POLL_S[1], 1.3 * wait)
        _beat(self.path)

    def release(self) -> None:
        """Give the lock back, unless it was taken over."""
        _held.discard(self.path)
        if self.is_own:
            self.path.unlink(missing_ok=True)

    @property
    def is_own(self) -> bool:
        """True while nobody has taken it over."""
        found = self._holder()
        return found is not None and found.token == self.own.token

    def check(self, what: str) -> None:
        """Stop a process that was away for so long that another has taken over."""
        if not self.is_own:
            raise UserError(
                f"{what}: another process ({self._holder() or 'that is done'}) has taken over, since this one gave no "
                f"sign of life for {STALE_S:.0f} s; what it has made counts: run the same command again"
            )

    def _try(self) -> bool:
        """Take the lock if it is free, or its holder is gone."""
        with self._written() as mine:
            with contextlib.suppress(FileExistsError):
                os.link(mine, self.path)
                return True
            return self._take_over(mine)

    def _take_over(self, mine: Path) -> bool:
        """Replace the lock of a holder that is gone: one process alone may, by its token."""
        other = self._holder()
        if other is None or not (other.is_gone or self._is_stale(self.path)):
            return False
        right = self.path.with_name(f"{self.path.name}.{other.token}")
        try:
            os.link(mine, right)
        except FileExistsError:
            if self._is_stale(right):  # whoever had the right is gone, too
                right.unlink(missing_ok=True)
            return False
        try:
            again = self._holder()
            if again is None or again.token != other.token:
                return False  # it was released, or taken over, meanwhile
            os.replace(mine, self.path)
            return True
        finally:
            right.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _written(self) -> Iterator[Path]:
        """A file with this process's name, to be linked."""
        mine = self.path.with_name(f"{self.path.name}.{self.own.token}.new")
        mine.write_text(json.dumps(asdict(self.own)), encoding="utf-8")
        try:
            yield mine
        finally:
            mine.unlink(missing_ok=True)

    def _holder(self) -> Holder | None:
        """Who holds it; none if it is free, or just being written by an earlier version."""
        try:
            return Holder(**json.loads(self.path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):  # of another version, which locked otherwise: free
            self.path.unlink(missing_ok=True)
            return None

    def _is_stale(self, path: Path) -> bool:
        """True if a file was not renewed for `STALE_S`, by the clock of the file system."""
        now = self.path.with_name(f"{self.path.name}.{self.own.token}.now")
        try:
            now.touch()
            return now.stat().st_mtime - path.stat().st_mtime > STALE_S
        except FileNotFoundError:
            return False
        finally:
            now.unlink(missing_ok=True)


def this_host() -> str:
    """This machine: its name, its start, and the numbering of its processes, which containers have of their own."""
    return os.environ.get("KDLIB_HOST") or _host()


@functools.cache
def _host() -> str:
    boot, space = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()[:8]
        space = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()}/{boot}/{space}"


def _started(pid: int) -> int:
    """When a process of this machine was started; -1 if it is not there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return -1 if fields[0] == "Z" else int(fields[19])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return -1
    except (OSError, ValueError, IndexError):
        return -1
    try:  # a system without /proc
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except PermissionError:
        return 0
    return 0


def _beat(path: Path) -> None:
    """Renew a lock from now on, in a thread of this process."""
    with _start_beating:
        _held.add(path)
        if not any(thread.name == "kdlib-heartbeat" for thread in threading.enumerate()):
            threading.Thread(target=_beating, name="kdlib-heartbeat", daemon=True).start()


def _beating() -> None:
    while True:
        time.sleep(min(BEAT_S, STALE_S / 4))
        for path in list(_held):
            with contextlib.suppress(OSError):
                os.utime(path)
