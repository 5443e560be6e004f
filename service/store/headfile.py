"""Remembers, beside the database, how far the log had come, so that a log that lost its end is noticed.

SQLite takes a database without its -wal, or one that was cut or brought back from a copy, for a whole one, only older;
its chain verifies. Acting on it would bring the host to what was wanted then. The file is written after each commit and
never synced: a crash of the process loses nothing of it, a power failure may leave it behind the log, but never ahead.
What a start finds in the log may never have been synced, if a kill came in the middle of its commit: it is no reason to
write the file.
So a log that does not hold the event it names has lost it; and a file that says nothing proves nothing. No method
raises: without the file, everything goes on as if it were new.
"""

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

_LINE = re.compile(rb"(\d{20}) ([0-9a-f]{64})\n")


def path_of(database: Path) -> Path:
    """Where it is: `<database>.head`."""
    return database.with_name(database.name + ".head")


def read(database: Path) -> tuple[int, str] | None:
    """Position and hash of an event that the log must hold; None if there is no telling."""
    try:
        found = _LINE.fullmatch(path_of(database).read_bytes()[:200])
    except OSError:
        return None
    return (int(found[1]), found[2].decode()) if found is not None else None


def cut_off(database: Path, known: int, position: int) -> str:
    """What is wrong with a log that ends before the event it was known to hold, and what to do about it."""
    return (
        f"position {position}: the log ends here, and had come to position {known} ({path_of(database).name}): its end "
        "was lost, or this is an older copy. Restore the whole log, its -wal too; or, if this one is to count from "
        f"now on, remove {path_of(database)}"
    )


def problem(database: Path, mark: Callable[[int], tuple[str, str | None] | None], head: int) -> str | None:
    """What is wrong with a log that does not hold the event it is known to hold.

    Args:
        mark: hash and time of the event at a position, None if there is none.
        head: the position of the last event.
    """
    known = read(database)
    if known is None:
        return None
    found = mark(known[0])
    if found is None:
        return cut_off(database, known[0], head)
    if found[0] != known[1]:
        name = path_of(database).name
        return (
            f"position {known[0]}: hash {str(found[0])[:12]}, but {name} has {known[1][:12]}: this is another log, or "
            "it was rewritten. Restore the right one; or, if this one is to count from now on, remove "
            f"{path_of(database)}"
        )
    return None


class HeadFile:
    """The file as the writer keeps it. For one thread at a time."""

    def __init__(self, database: Path) -> None:
        self._path = path_of(database)
        self._fd: int | None = None

    def write(self, position: int, digest: str) -> None:
        """The log has come to this event, durably. Always the same length: a full disk has room for it."""
        with contextlib.suppress(OSError):
            if self._fd is None:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            os.pwrite(self._fd, b"%020d %s\n" % (position, digest.encode()), 0)

    def close(self) -> None:
        """Let go of it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
