"""The files of captures: one directory of ours, made when the first one is; who may read them, and what is deleted.

Which capture gets a file and when is not decided here, nor what is written into it.
"""

import errno
import os
import threading
from pathlib import Path
from typing import Final

import structlog

from service.domain.errors import ErrorCode, TunledgerError
from service.reconcile.captured import Capture, file_name, parsed_file

log = structlog.get_logger("tunledger.captures")


class CaptureFiles:
    """Blocking, for any thread. Files are 0600, in a directory of 0700, and stay until somebody removes them."""

    def __init__(self, directory: Path) -> None:
        self._directory: Final = directory
        self._opening = threading.Lock()

    def open_next(self, capture: Capture) -> int:
        """Make a capture's next file; a descriptor to write to. Raises TunledgerError: capture_failed."""
        path = self._directory / file_name(capture, capture.next_file)
        try:
            with self._opening:
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise TunledgerError(
                ErrorCode.CAPTURE_FAILED,
                f"{path} cannot be made: {os.strerror(error.errno or 0)}",
                errno_name=errno.errorcode.get(error.errno or 0),
            ) from error
        capture.files[capture.next_file] = path
        capture.next_file += 1
        return fd

    @staticmethod
    def undo_next(capture: Capture) -> None:
        """Delete the file that was made last: nobody took it. Raises OSError."""
        capture.next_file -= 1
        capture.files.pop(capture.next_file).unlink(missing_ok=True)

    @staticmethod
    def keep_latest(capture: Capture) -> None:
        """Delete the oldest files beyond those that are to be kept. Raises OSError."""
        while len(capture.files) > capture.settings.files:
            capture.files.pop(min(capture.files)).unlink(missing_ok=True)

    @staticmethod
    def unlink(capture: Capture) -> None:
        """Delete all of a capture's. Raises OSError."""
        for path in capture.files.values():
            path.unlink(missing_ok=True)
        capture.files.clear()

    @staticmethod
    def all_empty(capture: Capture) -> bool:
        """Whether nothing was written into any."""
        try:
            return not any(path.stat().st_size for path in capture.files.values())
        except OSError:
            return False

    def found(self) -> dict[str, dict[int, Path]]:
        """The files that there are, by capture id and number."""
        found: dict[str, dict[int, Path]] = {}
        try:
            for path in sorted(self._directory.iterdir()):
                parsed = parsed_file(path.name)
                if parsed is not None:
                    found.setdefault(parsed[0], {})[parsed[1]] = path
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("the captures of earlier runs cannot be listed", error=str(error))
        return found
