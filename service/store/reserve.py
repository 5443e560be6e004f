"""Room on the disk that is kept for what must still get into the log when there is none left.

A file beside the database whose blocks are really there. When the disk is full it is given back a slice at a time, for
what tells of work that was done on the host (outcomes) and for what makes it less (deletes); everything else waits
until the whole of it can be had again, with a margin, so that writing does not flap at the edge.

Why a file, and no WAL that was grown beforehand: a WAL is used again only after a checkpoint, and that needs room in
the database file. What the file gives back serves both. Why slices: whoever filled the disk may be writing still, and
takes what is given back at once. Nothing in here knows the log, or SQLite; no method raises.
"""

import contextlib
import errno
import os
from pathlib import Path
from typing import Final

SLICE_BYTES: Final = 256 * 1024  # 25 commits of a dozen pages, when not even a checkpoint finds room
RESERVE_BYTES: Final = 16 * SLICE_BYTES  # 1,000 deletes and more, at some 2 KB in the database for each
OUTCOMES_BYTES: Final = RESERVE_BYTES // 4  # of it, kept for the outcomes of what was let in
MARGIN_BYTES: Final = SLICE_BYTES  # beyond the reserve, before the disk counts as having room again

# A full disk, and a used-up quota (errno(3)).
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class Reserve:
    """`<database>.reserve`. For one thread at a time."""

    def __init__(self, database: Path) -> None:
        self._path = database.with_name(database.name + ".reserve")

    @property
    def left(self) -> int:
        """How many bytes of it are still there."""
        try:
            found = self._path.stat(follow_symlinks=False)
        except OSError:
            return 0
        return min(found.st_size, found.st_blocks * 512)  # a copy may have holes: those are no reserve

    def fill(self) -> OSError | None:
        """Have all of it again, and see that there is a margin beside it; why not, or None."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            return error
        before = 0
        try:
            before = min(os.fstat(fd).st_size, RESERVE_BYTES)
            os.posix_fallocate(fd, 0, RESERVE_BYTES + MARGIN_BYTES)
            os.ftruncate(fd, RESERVE_BYTES)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, before)
            return error
        finally:
            os.close(fd)
        return None

    def release(self, *, down_to: int = 0) -> bool:
        """Give a slice back to the disk, if more than `down_to` bytes are left; whether there was one."""
        left = self.left
        if left <= down_to:
            return False
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            os.ftruncate(fd, max(down_to, left - SLICE_BYTES))
            os.fsync(fd)  # ext4 hands blocks out again only when its journal has them as free
        except OSError:
            return False
        finally:
            os.close(fd)
        return True


def refusal(database: Path) -> OSError | None:
    """What the file system says to a little more beside the database: its error, or None if it takes it."""
    path = database.with_name(database.name + ".probe")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        return error
    try:
        os.posix_fallocate(fd, 0, MARGIN_BYTES)
    except OSError as error:
        return error
    finally:
        os.close(fd)
        with contextlib.suppress(OSError):
            path.unlink()
    return None
