"""The files of captures: one directory of ours, made when the first one is; who may read them, and what is deleted.

Which capture gets a file and when is not decided here, nor what is written into it.
"""

import errno
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog

from service.domain.errors import ErrorCode, TunledgerError
from service.reconcile.captured import Capture, file_name, parsed_file

log = structlog.get_logger("tunledger.captures")


class CaptureFiles:
    """Blocking, for any thread. Files are 0600, in a directory of 0700, and stay until somebody removes them.

    A capture's mapping of files is replaced as a whole, so that anybody may read it at any time; of those who change
    it there is one at a time (`Capture.ending`).
    """

    def __init__(self, directory: Path) -> None:
        self._directory: Final = directory
        self._opening = threading.Lock()
        self._ours: set[str] = set()
        """Ids of the captures of this run that may have files."""

    def open_next(self, capture: Capture) -> int:
        """Make a capture's next file; a descriptor to write to. Raises TunledgerError: capture_failed."""
        path = self._directory / file_name(capture, capture.next_file)
        try:
            with self._opening:
                self._ours.add(capture.id)
                self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            fd = os.open(path, flags, 0o600)
        except OSError as error:
            if not capture.files:
                with self._opening:
                    self._ours.discard(capture.id)
            raise TunledgerError(
                ErrorCode.CAPTURE_FAILED,
                f"{path} cannot be made: {os.strerror(error.errno or 0)}",
                errno_name=errno.errorcode.get(error.errno or 0),
            ) from error
        capture.files = {**capture.files, capture.next_file: path}
        capture.next_file += 1
        return fd

    @staticmethod
    def undo_next(capture: Capture, number: int) -> None:
        """Delete the file that was made last, with this number: nobody took it. Raises OSError."""
        _drop(capture, number)
        capture.next_file = number

    @staticmethod
    def keep_latest(capture: Capture) -> None:
        """Delete the oldest files beyond those that are to be kept. Raises OSError."""
        while len(capture.files) > capture.settings.files:
            _drop(capture, min(capture.files))

    def unlink(self, capture: Capture) -> None:
        """Delete all of a capture's. Raises OSError."""
        for number in tuple(capture.files):
            _drop(capture, number)
        with self._opening:
            self._ours.discard(capture.id)

    @staticmethod
    def drop_unheard_of(files: Mapping[str, Mapping[int, Path]]) -> None:
        """Delete those of captures that the log does not have, if nothing was written into them.

        A crash leaves such a file if it comes before the capture's start is durable; nobody had it to write to yet. One
        with something in it is another log's.
        """
        for path in (path for of_capture in files.values() for path in of_capture.values()):
            try:
                if path.stat().st_size:
                    log.warning("a file of a capture that the log does not have is left alone", path=str(path))
                    continue
                path.unlink()
                log.warning("an empty file of a capture that never began is deleted", path=str(path))
            except FileNotFoundError:
                pass
            except OSError as error:
                log.warning("a file of a capture that never began stays", path=str(path), error=str(error))

    def found(self) -> dict[str, dict[int, Path]]:
        """The files of earlier runs that there are, by capture id and number."""
        found: dict[str, dict[int, Path]] = {}
        try:
            for path in sorted(self._directory.iterdir()):
                parsed = parsed_file(path.name)
                if parsed is not None:
                    found.setdefault(parsed[0], {})[parsed[1]] = path
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("the captures of earlier runs cannot be listed", error=str(error))
        with self._opening:  # who makes a file is in there before it
            return {capture_id: files for capture_id, files in found.items() if capture_id not in self._ours}


def _drop(capture: Capture, number: int) -> None:
    path = capture.files.get(number)
    if path is not None:
        path.unlink(missing_ok=True)
        capture.files = {each: kept for each, kept in capture.files.items() if each != number}
