"""A lock on a folder that names its holder, and holds across machines on a shared file system (NFS).

The lock is a file beside the folder: host, process, since when. It is made by a hard link, which is atomic on NFS too,
and its holder renews its time (the heartbeat). A lock whose process is gone on this machine is taken over at once; one
of another machine, when whoever waits for it has seen no heartbeat for `STALE_S`. Of several that want to take over,
one gets the right, by another link whose name has the lock's token; a right whose holder is gone is taken over, too.
"""

import contextlib
import errno
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
NAMELESS_S = 3.0  # a file without a name: one that is being written, or of an earlier version, which locked otherwise
POLL_S = (0.2, 3.0)  # between tries, at first and at last
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # of a file system without hard links
_held: dict[Path, str] = {}  # this process's locks and their tokens, which its heartbeat renews
_start_beating = threading.Lock()
os.register_at_fork(after_in_child=_held.clear)  # they are the parent's


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
    def is_here(self) -> bool:
        """True if it is a process of this machine."""
        return self.host == this_host()

    @property
    def is_gone(self) -> bool:
        """True if its process was one of this machine, and is not there any more."""
        if not self.is_here:
            return False
        if self.pid == os.getpid():
            return self.token not in _held.values()  # left by an interrupt
        found = _started(self.pid)
        return found == -1 or (found > 0 and self.started > 0 and found != self.started)


@contextlib.contextmanager
def held(folder: Path, what: str) -> Iterator["Lock"]:
    """Hold the lock of a folder; wait for a holder that is alive."""
    lock = Lock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(what, folder)
        yield lock
    finally:
        lock.release()


class Lock:
    """A lock file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.own = Holder(this_host(), os.getpid(), _started(os.getpid()), since, uuid.uuid4().hex[:12])
        self._seen: dict[Path, tuple[int, float]] = {}  # file -> its time, and when this process saw it first

    def acquire(self, what: str, folder: Path) -> None:
        """Wait until the lock is this process's."""
        said, wait = "", POLL_S[0]
        _held[self.path.with_name(f"{self.path.name}.{self.own.token}")] = self.own.token  # alive from now on
        while not self._try():
            if (other := _holder_of(self.path)) and str(other) != said:
                said = str(other)
                report(f"{what}: {other} is making {short_path(folder)}; waiting for it")
            time.sleep(wait)
            wait = min(POLL_S[1], 1.3 * wait)
        _beat(self.path, self.own.token)

    def release(self) -> None:
        """Give the lock back, unless it was taken over."""
        for path in [path for path, token in _held.items() if token == self.own.token]:
            _held.pop(path, None)
        if self.is_own:
            self.path.unlink(missing_ok=True)

    @property
    def is_own(self) -> bool:
        """True while nobody has taken it over."""
        found = _holder_of(self.path)
        return found is not None and found.token == self.own.token

    def check(self, what: str) -> None:
        """Stop a process that was away for so long that another has taken over."""
        if not self.is_own:
            raise UserError(
                f"{what}: another process ({_holder_of(self.path) or 'that is done'}) has taken over, since this one "
                f"gave no sign of life for {STALE_S:.0f} s; what it has made counts: run the same command again"
            )

    def _try(self) -> bool:
        """Take the lock if it is free, or its holder is gone."""
        mine = self.path.with_name(f"{self.path.name}.{self.own.token}.new")
        try:
            mine.write_text(json.dumps(asdict(self.own)), encoding="utf-8")
            return self._link(mine, self.path) or self.is_own or self._take_over(mine)
        finally:
            mine.unlink(missing_ok=True)

    def _take_over(self, mine: Path) -> bool:
        """Replace the lock of a holder that is gone: one process alone may, who has the right to it."""
        lost = _holder_of(self.path)
        if lost is None or not self._is_lost(self.path, lost):
            return False
        right, rights, other = self.path, [], lost
        while True:  # the right to the lock, or to the right of one that died having it
            right = right.with_name(f"{right.name}.{other.token}")
            rights.append(right)
            made, other = self._link(mine, right), _holder_of(right)
            if made or (other and other.token == self.own.token):  # NFS may make a link and answer that it was there
                break
            if other is None or not self._is_lost(right, other):
                return False
        try:
            again = _holder_of(self.path)
            if again is None or again.token != lost.token:
                return False  # it was released, or taken over, meanwhile
            mine.replace(self.path)
            return self.is_own
        finally:
            for one in rights:
                one.unlink(missing_ok=True)

    def _is_lost(self, path: Path, other: Holder) -> bool:
        """True if the holder of a file is gone: by its process, or seen without heartbeat for `STALE_S`."""
        named, after_s = bool(other.host), STALE_S if other.host else NAMELESS_S
        if named and (other.is_gone or other.is_here):
            return other.is_gone
        try:
            changed = path.stat().st_mtime_ns
        except OSError:
            return False
        known = self._seen.get(path)
        if known is None or known[0] != changed:
            self._seen[path] = (changed, time.monotonic())
            return False
        return time.monotonic() - known[1] > after_s

    @staticmethod
    def _link(mine: Path, path: Path) -> bool:
        """Make a file that was not there, with this process's name, as one step; False if it was there."""
        try:
            os.link(mine, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            try:  # no hard links here: as good on one machine, and on most file systems of several
                with path.open("x", encoding="utf-8") as file:
                    file.write(mine.read_text(encoding="utf-8"))
            except FileExistsError:
                return False
        return True


def _holder_of(path: Path) -> Holder | None:
    """Who holds a lock or a right; none if it is free."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:  # it is not there, or on NFS not any more
        return None
    try:
        return Holder(**json.loads(text))
    except (ValueError, TypeError):
        return Holder("", 0, 0, "", "unnamed")


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
    """When a process of this machine was started; 0 if that cannot be known, -1 if it is not there."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return -1 if fields[0] == "Z" else int(fields[19])
    except (OSError, ValueError, IndexError):  # no /proc, or not of all users
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except OSError:
        return 0
    return 0


def _beat(path: Path, token: str) -> None:
    """Renew a lock from now on, in a thread of this process."""
    with _start_beating:
        _held[path] = token
        if not any(thread.name == "kdlib-heartbeat" for thread in threading.enumerate()):
            threading.Thread(target=_beating, name="kdlib-heartbeat", daemon=True).start()


def _beating() -> None:
    while True:
        time.sleep(min(BEAT_S, STALE_S / 4))
        for path, token in list(_held.items()):
            other = _holder_of(path)
            if other and other.token == token:
                with contextlib.suppress(OSError):
                    os.utime(path)
