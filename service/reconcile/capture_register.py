"""The register of captures: which there are, how many there may be, and their beginning and end in the log.

A capture is in it once its start is durable. What packets do, and whose files are handed to whom, is not known here.
For the event loop's thread.
"""

import asyncio
import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Final, Protocol

from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.values import InterfaceId, InterfaceName
from service.reconcile.captured import SYSTEM, Asker, Capture, former, started, stopped
from service.store.reader import LogReader, Selection

CAPTURES_MAX: Final = 16
"""Under way at once, live ones among them; each costs a worker a write for every batch."""

INTERFACE_MAX: Final = 8
"""Under way at once on one interface; as many taps as a device can have."""

KEPT_MAX: Final = 256
"""Captures whose files are kept; then somebody has to remove some. Stages of chains have a bound of their own."""

PAGE: Final = 500  # events read at once when the log is searched


class Record(Protocol):
    """Adds an event about an interface to the log; durable when it returns. Raises TunledgerError."""

    async def __call__(self, interface_id: InterfaceId, body: ev.Event, *, actor: str = SYSTEM) -> None: ...


class Register:
    """All captures that are known: under way, and over with files."""

    def __init__(self, record: Record, *, now: Callable[[], str], captures_max: int = CAPTURES_MAX) -> None:
        self._record, self._now, self._captures_max = record, now, captures_max
        self._captures: dict[str, Capture] = {}
        self._starting: list[InterfaceId] = []

    def all(self) -> list[Capture]:
        """All of them, the latest last."""
        return list(self._captures.values())

    def of(self, interface_id: InterfaceId) -> list[Capture]:
        """Those of an interface."""
        return [each for each in self._captures.values() if each.interface_id == interface_id]

    def running(self) -> list[Capture]:
        """Those under way."""
        return [each for each in self._captures.values() if each.running]

    def find(self, capture_id: str) -> Capture:
        """One of them. Raises TunledgerError: not_found."""
        found = self._captures.get(capture_id)
        if found is None:
            raise TunledgerError(ErrorCode.NOT_FOUND, f"there is no capture {capture_id}")
        return found

    @property
    def starting(self) -> bool:
        """Whether somebody has room that no capture is in yet, or one that the data plane does not have yet."""
        return bool(self._starting)

    @contextlib.contextmanager
    def room(self, interface_id: InterfaceId, name: InterfaceName) -> Iterator[None]:
        """Room for one more capture that is asked for. Raises TunledgerError: too_many_captures."""
        asked = [each for each in self._captures.values() if each.kind != "stage"]
        # One that the data plane does not have yet has its room still.
        at_work = [each.interface_id for each in asked if each.running and each.worker_id is not None]
        running = at_work + self._starting
        if len(running) >= self._captures_max or running.count(interface_id) >= INTERFACE_MAX:
            raise TunledgerError(
                ErrorCode.TOO_MANY_CAPTURES,
                f"{len(running)} captures are under way, {running.count(interface_id)} of them on {name}; "
                f"at most {self._captures_max} and {INTERFACE_MAX}: stop one, or try again",
                retry=True,
            )
        if len(asked) >= KEPT_MAX:
            raise TunledgerError(
                ErrorCode.TOO_MANY_CAPTURES,
                f"the files of {KEPT_MAX} captures are kept; delete some of them",
                retry=True,
            )
        self._starting.append(interface_id)
        try:
            yield
        finally:
            self._starting.remove(interface_id)

    async def begin(self, capture: Capture, asker: Asker) -> None:
        """Have its start in the log, and then here. Raises TunledgerError: it has not begun."""
        await self._record(capture.interface_id, started(capture, asker.request), actor=asker.actor)
        self._captures[capture.id] = capture

    async def end(self, capture: Capture, reason: str) -> None:
        """It is over, with the figures that it has. Raises TunledgerError: that is not in the log."""
        capture.stopping = True
        capture.reason, capture.stopped_at = reason, self._now()
        if capture.kind == "live":
            self.forget(capture)
        await self._record(capture.interface_id, stopped(capture, reason, capture.figures))

    def forget(self, capture: Capture) -> None:
        """It has no files any more."""
        self._captures.pop(capture.id, None)

    async def recover(self, reader: LogReader, files: Mapping[str, Mapping[int, Path]]) -> Collection[str]:
        """Tell of captures that a crash left open, and take up those of earlier runs that there are files of.

        Returns:
            Those with files that the log has never heard of.

        Raises:
            TunledgerError: the log's.
        """
        wanted = files.keys() - self._captures.keys()
        found, unheard_of = await asyncio.to_thread(_history, reader, wanted)
        for event, begun, told, told_at in found:
            if begun.capture_id in self._captures:  # begun since
                continue
            end, ended_at = told or stopped(begun, "crash", {}), told_at or self._now()
            if told is None:
                await self._record(begun.interface_id, end)
            if begun.capture_id in files:
                capture = former(event, begun, end, ended_at)
                capture.files = dict(files[begun.capture_id])
                capture.next_file = max(capture.files) + 1
                self._captures[capture.id] = capture
        return unheard_of


def _history(
    reader: LogReader, wanted: Collection[str]
) -> tuple[list[tuple[ev.Recorded, ev.CaptureStarted, ev.CaptureStopped | None, str | None]], Collection[str]]:
    """Captures of earlier runs that matter still: those that were not told as stopped, and those that have files.

    Beside them, the wanted ones that the log does not have.
    An orderly stop ends all captures before it is recorded: beyond it only the wanted ones are looked for.
    """
    kinds = (ev.CaptureStarted.__name__, ev.CaptureStopped.__name__, ev.ServiceStopped.__name__)
    ends: dict[str, tuple[ev.CaptureStopped, str]] = {}
    found = []
    left, orderly, before = set(wanted), False, None
    while left or not orderly:
        page = reader.page(Selection(types=kinds, before=before), limit=PAGE, newest_first=True)
        for event in page:
            match event.body:
                case ev.ServiceStopped():
                    orderly = True
                case ev.CaptureStopped(capture_id=capture_id):
                    ends[capture_id] = (event.body, event.recorded_at)
                case ev.CaptureStarted(capture_id=capture_id):
                    end, ended_at = ends.pop(capture_id, (None, None))
                    if capture_id in left or (end is None and not orderly):
                        found.append((event, event.body, end, ended_at))
                    left.discard(capture_id)
        if len(page) < PAGE:
            break
        before = page[-1].position
    return found[::-1], left
