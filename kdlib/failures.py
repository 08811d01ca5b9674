"""Failures of the machine, in one sentence: a full disk, a folder that is read-only or gone, too little memory."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from kdlib.errors import UserError
from kdlib.io import short_path

DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file is larger than is allowed here",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "there is no permission to write",
    errno.EPERM: "there is no permission to write",
    errno.EIO: "the disk has an error",
    errno.ESTALE: "the mounted disk is gone",
    errno.ENOTCONN: "the mounted disk is gone",
    errno.ENODEV: "the mounted disk is gone",
}
# Libraries that write from C or Rust say it in words of their own.
WORDS = {
    r"os error 28|code: 28|No space left|disk full": errno.ENOSPC,
    r"os error 27|code: 27|File too large": errno.EFBIG,
    r"os error 30|code: 30|Read-only file system": errno.EROFS,
    r"os error 13|code: 13|Permission denied": errno.EACCES,
    r"failed writing file|unexpected pos \d+ vs": errno.ENOSPC,
}
MEMORY = r"can't allocate memory|out of memory|Unable to allocate|bad_alloc|Cannot allocate memory"


def explained(error: BaseException, what: str, folder: Path) -> UserError | None:
    """The sentence for a failure of the disk or of memory while a folder was written; None for any other error."""
    for one in _chain(error):
        if isinstance(one, MemoryError) or re.search(MEMORY, str(one)):
            return UserError(
                f"{what}: there is too little memory; close other programs, or write a smaller batch_size in the "
                "recipe. What was finished is kept: run it again"
            )
        if (number := _disk_error(one)) is not None:
            path = getattr(one, "filename", None)
            return UserError(
                f"{what}: {DISK[number]} while {short_path(Path(os.fsdecode(path or folder)))} was written"
                f"{_free(folder) if number in (errno.ENOSPC, errno.EDQUOT) else ''}; correct this, or name another "
                "folder in the recipe (outputs: /path/to/outputs). What was finished is kept: run it again"
            )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _disk_error(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno in DISK:
        return error.errno
    if isinstance(error, UserError | AssertionError):
        return None
    return next((number for words, number in WORDS.items() if re.search(words, str(error))), None)


def _free(folder: Path) -> str:
    """How much room there is, near a folder that may not exist."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return f" ({shutil.disk_usage(there).free / 1e6:,.0f} MB are free there)"
