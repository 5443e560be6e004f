"""Captures that are stages of chains: the data plane asks for their files, and tells of their end.

What chains are is the spec's business, and what a capture writes its processor's. Captures that somebody asked for do
not belong in here.

Theory of operation. Each time the data plane sets such a stage up it asks for its first file (`files_for`), with an id
that the stage keeps while the chain around it changes. Its start is durable before it gets the file. The end of each is
told by the data plane once its worker is done with it, also if its set-up came to nothing, with its last figures.
"""

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final, Protocol

import structlog

from service.domain import commands as cmd
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.values import InterfaceId, InterfaceName
from service.reconcile.capture_files import CaptureFiles
from service.reconcile.capture_register import Register
from service.reconcile.captured import SYSTEM, Asker, Capture, Settings, superfluous

FILES_S: Final = 1.5
"""In which a stage has its file; less than the 2 s that the data plane gives the whole set-up."""

log = structlog.get_logger("tunledger.captures")


class Stage(Protocol):
    """A stage of a chain as the data plane tells of it. `id` is the one that it asked for files with."""

    @property
    def id(self) -> int: ...
    @property
    def figures(self) -> Mapping[str, int]: ...


class ChainCaptures:
    """For the event loop's thread, but for `files_for`.

    Args:
        new_capture: makes one that has not begun.
        stages: a device's, in the order of its chain; none if no worker has it. Blocking. Raises TunledgerError.
    """

    def __init__(
        self,
        register: Register,
        files: CaptureFiles,
        *,
        new_capture: Callable[[InterfaceId, InterfaceName, Settings], Capture],
        stages: Callable[[str], Sequence[Stage]],
    ) -> None:
        self._register, self._files = register, files
        self._new_capture, self._stages = new_capture, stages

    def files_for(
        self, loop: asyncio.AbstractEventLoop, device: str, name: str, stage_id: int, options: Mapping[str, Any]
    ) -> Sequence[int]:
        """The first file of the stage with this id; the caller's from then on. Blocking; not for the event loop.

        Raises:
            TunledgerError: capture_failed, also if it takes longer than FILES_S, or that the log does not take its
                start.
        """
        handed: Future[int] = Future()
        asyncio.run_coroutine_threadsafe(self._hand(device, name, stage_id, dict(options), handed), loop)
        try:
            return [handed.result(timeout=FILES_S)]
        except TimeoutError:
            if not handed.cancel():  # it came this very moment
                return [handed.result()]
            message = f"{name}: the file of its capture was not there within {FILES_S:g} s"
            raise TunledgerError(ErrorCode.CAPTURE_FAILED, message, retry=True) from None

    async def look(self, interface_id: InterfaceId) -> None:
        """Bring figures and places up to date. Raises TunledgerError."""
        found = {
            stage.id: (place, stage.figures)
            for place, stage in enumerate(await asyncio.to_thread(self._stages, interface_id))
        }
        for capture in self._register.of(interface_id):
            if capture.kind == "stage" and capture.running and capture.worker_id in found:
                capture.stage, figures = found[capture.worker_id]
                capture.figures.update(figures)

    async def drop_refused(self, capture: Capture) -> None:
        """Forget one whose set-up came to nothing, with its files: they have headers at most. Raises OSError."""
        await self._forget(capture)

    async def _hand(
        self, device: str, name: str, stage_id: int, options: dict[str, Any], handed: "Future[int]"
    ) -> None:
        """Begin a stage's capture. `handed` gets its file, or why there is none; once cancelled, nothing is left."""
        try:
            capture, fd = await self._begin(InterfaceId(device), InterfaceName(name), stage_id, options, handed)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the data plane's thread waits for it
            if handed.set_running_or_notify_cancel():
                handed.set_exception(error)
            return
        try:
            if handed.set_running_or_notify_cancel():
                handed.set_result(fd)
                for each in superfluous([each for each in self._register.of(capture.interface_id) if _is_stage(each)]):
                    await self._forget(each)
            else:
                os.close(fd)
                await self._register.end(capture, "refused")
                await self._forget(capture)
        except (TunledgerError, OSError) as error:
            log.warning("what a capture leaves is not removed", capture_id=capture.id, error=str(error))

    async def _begin(
        self,
        interface_id: InterfaceId,
        name: InterfaceName,
        stage_id: int,
        options: dict[str, Any],
        handed: "Future[int]",
    ) -> tuple[Capture, int]:
        settings = Settings(**{key: options[key] for key in ("snaplen", "size_bytes", "interval_s", "files")})
        capture = self._new_capture(interface_id, name, settings)
        capture.worker_id = stage_id
        fd = await asyncio.to_thread(self._files.open_next, capture)
        try:
            if handed.cancelled():
                raise TunledgerError(ErrorCode.CAPTURE_FAILED, f"{name}: nobody waits for its capture any more")
            await self._register.begin(capture, Asker(SYSTEM, cmd.Request(via="system", call="capture")))
        except BaseException:
            os.close(fd)
            self._files.unlink(capture)
            raise
        return capture, fd

    async def _forget(self, capture: Capture) -> None:
        async with capture.ending:
            await asyncio.to_thread(self._files.unlink, capture)
            self._register.forget(capture)


def _is_stage(capture: Capture) -> bool:
    return capture.kind == "stage"
