"""Captures at a device's wire side: put there, given their next files, looked at and taken away, by the data plane.

When one is to end, and that this is told, is not decided here. Stages of chains are in `capture_stages`, but for their
next files, which come the same way.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, Protocol

import structlog

from service.domain.errors import ErrorCode, TunledgerError
from service.reconcile.capture_files import CaptureFiles
from service.reconcile.capture_register import Register
from service.reconcile.capture_stages import Stage
from service.reconcile.captured import Capture

STOP_RETRY_S: Final = 0.1

_OVER: Final = (ErrorCode.NOT_RUNNING, ErrorCode.NOT_FOUND)
"""The device is not attached, or has no such tap; whatever else is said of a tap, it may be there still."""

log = structlog.get_logger("tunledger.captures")


class Taps(Protocol):
    """What captures need of the data plane. Descriptors given to it stay the caller's. Devices are interface ids.

    Every method blocks for a bounded time and raises TunledgerError.
    """

    def attached(self) -> Collection[str]:
        """The devices that workers hold now."""
        ...

    def tap(self, device: str, stage: Mapping[str, Any], files: Sequence[int]) -> int:
        """Put a processor at the device's wire side; its id."""
        ...

    def untap(self, device: str, tap_id: int) -> Mapping[str, int]:
        """Take it away again; its last figures. not_running and not_found: it is not there (any more)."""
        ...

    def feed(self, device: str, stage_id: int, fd: int) -> None:
        """Hand one more file to a tap or stage."""
        ...

    def tap_figures(self, device: str, tap_id: int) -> Mapping[str, int]:
        """A tap's figures as they are."""
        ...

    def stages(self, device: str) -> Sequence[Stage]:
        """The chain's stages; none if the device is not attached."""
        ...


class WireCaptures:
    """For the event loop's thread, but for `give_next`."""

    def __init__(self, register: Register, files: CaptureFiles, taps: Taps) -> None:
        self._register, self._files, self._taps = register, files, taps
        self._early: dict[int, tuple[Mapping[str, int], str]] = {}
        """Ends that were heard of while a tap was being made, whose id is not known yet."""

    async def attach(self, capture: Capture, fd: int, *, live: bool = False) -> tuple[Mapping[str, int], str] | None:
        """Hand a descriptor, which is closed, to the data plane; its end, if that was heard of already.

        Who wants to end the capture waits for that. If this is cancelled and there is a tap, the next look ends it.

        Raises TunledgerError: it does not take it, and the capture is over and forgotten.
        """
        limits = {"max_packets": capture.settings.max_packets, "max_bytes": capture.settings.max_bytes}
        stage = {
            "processor": "capture",
            "on_crash": "bypass",
            "snaplen": capture.settings.snaplen,
            "size_bytes": capture.settings.size_bytes,
            "interval_s": capture.settings.interval_s,
            "files": capture.settings.files,
            "capture_id": capture.id,
            **limits,
            **({"live": True} if live else {}),
        }
        made: list[int] = []
        async with capture.ending:
            try:
                try:
                    await to_the_end(lambda: made.append(self._taps.tap(capture.interface_id, stage, (fd,))))
                finally:
                    os.close(fd)
            except BaseException:
                if made:  # cancelled
                    capture.worker_id, capture.due = made[0], "client_gone"
                    raise
                await self._register.end(capture, "refused")
                await asyncio.to_thread(self._files.unlink, capture)
                self._register.forget(capture)
                raise
            capture.worker_id = made[0]
        return self._early.pop(capture.worker_id, None)

    def heard(self, stage_id: int, figures: Mapping[str, int], reason: str) -> None:
        """The end of one that is no capture's: perhaps of the one that is being attached."""
        if self._register.starting:
            self._early[stage_id] = figures, reason

    def settled(self) -> None:
        """Nothing is being attached any more."""
        if not self._register.starting:
            self._early.clear()

    async def untap(self, capture: Capture, patience_s: float) -> None:
        """Take a tap away, if it is there still. Raises TunledgerError: it may be."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_s
        while capture.worker_id is not None:
            try:
                found = await asyncio.to_thread(self._taps.untap, capture.interface_id, capture.worker_id)
            except TunledgerError as error:
                if error.code in _OVER or capture.lost:  # its device was let go of meanwhile
                    log.info("a capture was over already", capture_id=capture.id, error=error.message)
                    return
                if not error.retry or loop.time() >= deadline:
                    raise
            else:
                capture.figures.update(found)
                return
            await asyncio.sleep(STOP_RETRY_S)

    async def look(self, capture: Capture) -> None:
        """Bring its figures up to date, and end it if it is not there. Raises TunledgerError."""
        if capture.worker_id is None or not goes_on(capture):
            return
        try:
            found = await asyncio.to_thread(self._taps.tap_figures, capture.interface_id, capture.worker_id)
        except TunledgerError as error:
            if error.code is not ErrorCode.NOT_FOUND:
                raise
            if goes_on(capture):  # taken away by somebody who did not wait to hear of it
                await self._register.end(capture, capture.due or "interface_gone")
            return
        if goes_on(capture):  # else these are not the last
            capture.figures.update(found)

    def give_next(self, capture: Capture) -> None:
        """Hand the next file over. Blocking. Raises TunledgerError: the old one goes on, to be tried again."""
        assert capture.worker_id is not None  # it has figures
        number = capture.next_file
        fd = self._files.open_next(capture)
        try:
            self._taps.feed(capture.interface_id, capture.worker_id, fd)
        except BaseException:
            self._files.undo_next(capture, number)
            raise
        finally:
            os.close(fd)
        capture.given += 1
        self._files.keep_latest(capture)


async def to_the_end(work: Callable[[], None]) -> None:
    """Run `work`, which blocks for a bounded time, in a thread; back when it is done, also if cancelled meanwhile."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait((running,))
        raise


def goes_on(capture: Capture) -> bool:
    """Whether it is under way, and nobody is ending it."""
    return capture.running and not capture.stopping
