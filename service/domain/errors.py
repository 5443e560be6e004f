"""The one error type of tunledger: a stable code, a text a person can act on, and whether trying again may help.

Codes are part of the API and never change. HTTP statuses do not live here (one table in `service.api.problems`), nor
does errno translation (only in `service.kernel.errnos`).
"""

import difflib
import json
from collections.abc import Collection, Iterable
from enum import StrEnum
from itertools import islice
from typing import Final

SHOWN_MAX: Final = 64  # characters of what was given, in an error
_JSON: Final = json.JSONEncoder(ensure_ascii=False, default=str)
COMPARED_MAX: Final = 8  # keys of what was given that are compared with those that would do


class ErrorCode(StrEnum):
    """Stable, snake_case names of what can go wrong; documented in docs/errors.md."""

    INVALID_JSON = "invalid_json"
    INVALID_FIELD = "invalid_field"
    BODY_TOO_LARGE = "body_too_large"
    SUBNET_OVERLAP = "subnet_overlap"
    INTERFACE_EXISTS = "interface_exists"
    NAME_TAKEN = "name_taken"
    NO_INTERFACE = "no_interface"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    ALREADY_RUNNING = "already_running"
    NOT_RUNNING = "not_running"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN_HOST = "forbidden_host"
    VERSION_CONFLICT = "version_conflict"
    PRECONDITION_FAILED = "precondition_failed"
    KEY_REUSED = "key_reused"
    NEEDS_RECREATE = "needs_recreate"
    AWAITING_CONFIRMATION = "awaiting_confirmation"
    NOT_AWAITING = "not_awaiting"
    PERMISSION_DENIED = "permission_denied"
    TUN_MISSING = "tun_missing"
    NETNS_MISSING = "netns_missing"
    DEVICE_BUSY = "device_busy"
    DEVICE_GONE = "device_gone"
    KERNEL_REFUSED = "kernel_refused"
    VERIFY_FAILED = "verify_failed"
    WORKER_FAILED = "worker_failed"
    CAPTURE_FAILED = "capture_failed"
    TOO_MANY_CAPTURES = "too_many_captures"
    NOT_INSPECTED = "not_inspected"
    PART_OF_CHAIN = "part_of_chain"
    TARGET_MODE = "target_mode"
    LOG_UNAVAILABLE = "log_unavailable"
    LOG_FULL = "log_full"
    LOG_CORRUPT = "log_corrupt"
    SCHEMA_MISMATCH = "schema_mismatch"
    ALREADY_SERVING = "already_serving"
    OVERLOADED = "overloaded"
    SHUTTING_DOWN = "shutting_down"
    OUTCOME_UNKNOWN = "outcome_unknown"
    INTERNAL = "internal"


class TunledgerError(Exception):
    """Something was refused or failed, said in a way the caller can act on.

    Attributes:
        code: what kind of failure, stable.
        message: one sentence for people: what was found and what would do.
        retry: True if the same request may succeed later without anything being changed by the caller.
        field: dotted path of the offending field ("mtu", "addresses.0"), or None.
        errno_name: the kernel's name for its refusal ("EBUSY"), or None.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        retry: bool = False,
        field: str | None = None,
        errno_name: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry = retry
        self.field = field
        self.errno_name = errno_name


def invalid(field: str, given: object, expected: str) -> TunledgerError:
    """An `invalid_field` error that names the field, what was given and what would do."""
    return TunledgerError(ErrorCode.INVALID_FIELD, f"{field}: {shown(given)} {expected}", field=field)


def unknown(path: str, key: str, known: Collection[str], what: str = "field") -> TunledgerError:
    """An `invalid_field` error for a key that nobody knows there; it names those that are known, and the closest.

    Args:
        path: what is in front of the key, with its last dot; "" for none.
    """
    named = f"{path}{shown_key(key)}"
    text = f"{named}: unknown {what}; known here: {', '.join(known) or 'none'}{close_to(key, known)}"
    return TunledgerError(ErrorCode.INVALID_FIELD, text, field=named)


def close_to(given: object, known: Iterable[str]) -> str:
    """What to say of a word that is close to one that is known: "; did you mean inspect?", or nothing."""
    near = difflib.get_close_matches(given[:SHOWN_MAX].lower(), known, n=1) if isinstance(given, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def first_close(given: Iterable[object], known: Collection[str]) -> str:
    """The same of the first of some keys that is close to one; few are looked at, since comparing takes long."""
    return next((found for each in islice(given, COMPARED_MAX) if (found := close_to(each, known))), "")


def shown(value: object) -> str:
    """A value as JSON people would recognise it, cut at 64 characters so that errors stay readable."""
    match value:
        case None:
            text = "null"
        case bool():
            text = "true" if value else "false"
        case str():
            end = '"' if len(value) <= SHOWN_MAX else ""  # cut before, so that a long one costs nothing
            return _cut('"' + "".join(c if c.isprintable() else repr(c)[1:-1] for c in value[:SHOWN_MAX]) + end)
        case dict() | list():
            text = ""
            for part in _JSON.iterencode(value):  # piece by piece: most of a large one is not shown
                text += part
                if len(text) > SHOWN_MAX:
                    break
        case _:
            text = str(value)
    return _cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: SHOWN_MAX + 1]))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_MAX else text[: SHOWN_MAX - 3] + "..."


def shown_key(key: str) -> str:
    """A field's name as it was given, cut at 64 characters: it goes into errors and the log."""
    return _cut("".join(char if char.isprintable() else "?" for char in key[: SHOWN_MAX + 1]))
