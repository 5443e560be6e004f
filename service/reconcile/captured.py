"""What a capture is: its settings, who asked for it, what is known of it, and the events that tell of it.

Values, and what follows from them alone. Nothing here waits, opens a file, or asks the data plane.
"""

import asyncio
import errno
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.values import InterfaceId, InterfaceName

SYSTEM: Final = "system"
FIGURES: Final = ("packets", "bytes", "dropped")
FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Kind = Literal["tap", "live", "stage"]

# What the data plane says of the end of a tap or stage, in the words of the log. `removed`: the chain was changed.
REASONS: Final[Mapping[str, str]] = {
    "removed": "asked",
    "refused": "refused",
    "moved": "moved",
    "interface_gone": "interface_gone",
    "worker_exit": "worker_exit",
}

_TOLD_EARLY: Final = ("crash", "shutdown")
"""Ends that are told before the worker is done, or without it: packets may have come that their figures do not have."""

_FILE: Final = re.compile(r"(?P<name>.+)-(?P<id>[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})-(?P<n>[0-9]+)\.pcapng")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is captured and how much of it. None: no limit.

    Attributes:
        snaplen: octets kept of each packet.
        size_bytes, interval_s: when the next file is begun.
        files: how many are kept.
        max_packets, max_bytes, max_seconds: when the capture ends by itself.
    """

    snaplen: int
    size_bytes: int | None = None
    interval_s: int | None = None
    files: int = 1
    max_packets: int | None = None
    max_bytes: int | None = None
    max_seconds: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As the API and the log have them."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asked, for the log."""

    actor: str
    request: cmd.Request


@dataclass(slots=True, kw_only=True)
class Capture:
    """One capture. `reason` is why it is over, None while it is not.

    Attributes:
        worker_id: what the data plane calls its tap or stage; None before it is one.
        stage: its place in the chain, once it was seen there.
        given: files handed over that were wanted.
        stopping: somebody is ending it.
        ending: held by who puts it to work, ends it, or changes its files.
        due: why it is to end, if that failed once; each look tries again.
        lost: its tap went while somebody was ending it.
    """

    id: str
    interface_id: InterfaceId
    name: InterfaceName
    settings: Settings
    kind: Kind
    started_at: str
    worker_id: int | None = None
    stage: int | None = None
    stopped_at: str | None = None
    reason: str | None = None
    files: Mapping[int, Path] = field(default_factory=dict)
    next_file: int = 0
    figures: dict[str, int] = field(default_factory=dict)
    given: int = 0
    stopping: bool = False
    ending: asyncio.Lock = field(default_factory=asyncio.Lock)
    due: str | None = None
    lost: bool = False

    @property
    def running(self) -> bool:
        """Whether packets may still come."""
        return self.reason is None


@dataclass(slots=True)
class Live:
    """A live capture and where it is read: a pipe that does not block, closed by `Captures.hang_up`."""

    capture: Capture
    fd: int


def own_end(kind: Kind, figures: Mapping[str, int]) -> str | None:
    """Why a capture is over by its own figures: a limit, or a write that failed; None if it is not."""
    if figures.get("finished"):
        return "finished"
    stopped = figures.get("stopped", 0)
    if not stopped:
        return None
    if stopped in FULL:
        return "disk_full"
    return "client_gone" if kind == "live" else "write_failed"


def superfluous(stages: Sequence[Capture]) -> list[Capture]:
    """Of the captures that are stages of one interface, those to remove: over, and beyond what is to be kept.

    Each new set-up, as after a worker's death, is a capture of its own, and nobody is there to remove them: together
    they keep `files` files, the latest; those without a packet go first, so that workers that die one after the other
    take nobody's packets away. Of several stages the one that keeps the most decides.
    """
    files_max = max((each.settings.files for each in stages), default=0)
    files, found = 0, []
    latest = sorted((each for each in stages if not each.running), key=lambda each: each.started_at)[::-1]
    for each in sorted(latest, key=_is_without_packets):
        files += len(each.files)
        if files > files_max or not each.files:
            found.append(each)
    return found


def _is_without_packets(capture: Capture) -> bool:
    return not capture.figures.get("packets") and capture.reason not in _TOLD_EARLY


def file_name(capture: Capture, number: int) -> str:
    """What a capture's file is called."""
    return f"{capture.name}-{capture.id}-{number}.pcapng"


def parsed_file(name: str) -> tuple[str, int] | None:
    """The capture id and the number in a name that `file_name` made; None of any other."""
    parts = _FILE.fullmatch(name)
    return None if parts is None else (parts["id"], int(parts["n"]))


def started(capture: Capture, request: cmd.Request) -> ev.CaptureStarted:
    """What is told before its first packet."""
    return ev.CaptureStarted(
        interface_id=capture.interface_id,
        name=capture.name,
        capture_id=capture.id,
        live=capture.kind == "live",
        settings=capture.settings.to_json(),
        request=request,
    )


def stopped(of: Capture | ev.CaptureStarted, reason: str, figures: Mapping[str, int]) -> ev.CaptureStopped:
    """What is told when it is over."""
    return ev.CaptureStopped(
        interface_id=of.interface_id,
        name=of.name,
        capture_id=of.id if isinstance(of, Capture) else of.capture_id,
        reason=reason,
        packets=figures.get("packets", 0),
        bytes=figures.get("bytes", 0),
        dropped=figures.get("dropped", 0),
    )


def former(event: ev.Recorded, told: ev.CaptureStarted, end: ev.CaptureStopped, ended_at: str) -> Capture:
    """A capture of an earlier run, as the log tells of it; its files are to be added."""
    settings = {name: told.settings[name] for name in Settings.__slots__ if name in told.settings}
    return Capture(
        id=told.capture_id,
        interface_id=told.interface_id,
        name=told.name,
        settings=Settings(**settings),
        kind="stage" if told.request.via == "system" else "tap",
        started_at=event.recorded_at,
        stopped_at=ended_at,
        reason=end.reason,
        figures={figure: getattr(end, figure) for figure in FIGURES},
    )
