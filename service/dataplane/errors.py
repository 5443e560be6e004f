"""What the data plane could not do, as its callers are told: one error type, and its common messages.

No state and no I/O.
"""

import errno
import os
from typing import Final


class DataplaneError(Exception):
    """What the data plane could not do: a stable code, a message for people, and whether to try again."""

    def __init__(self, code: str, message: str, *, retry: bool) -> None:
        super().__init__(message)
        self.code: Final = code
        self.message: Final = message
        self.retry: Final = retry


class NotHandedOverError(DataplaneError):
    """The worker had too much to do to be told in time: it lives, knows of nothing, and has what it had."""


def errno_text(error: int) -> str:
    """An errno with its name."""
    return f"{errno.errorcode.get(error, error)}: {os.strerror(error)}"
