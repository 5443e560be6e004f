"""The packet workers as the service has them, begun before the rest of it is imported.

Part of the composition root (`service.app`). Workers come up on other processors, and take as long as it takes to
import what reads the log: so that need not wait for them, nor they for it. Nothing may be imported here that their
start does not need.
"""

import os
import threading
from collections.abc import Sequence
from typing import Any, Final, Protocol, Self

import structlog

from service import failpoints
from service.config import WORKERS_MAX, Config
from service.dataplane import registry, slices
from service.dataplane.attachment import Ended
from service.dataplane.supervisor import Supervisor
from service.dataplane.telling import WorkerExit

log = structlog.get_logger("tunledger")


class Listener(Protocol):
    """Who wants to know of the workers; see `Supervisor` for when each is called, and on which threads."""

    def exited(self, death: WorkerExit) -> None:
        """One died on its own."""
        ...

    def device_lost(self, device: str, reason: str) -> None:
        """A worker let go of a device."""
        ...

    def stage_ended(self, ended: Ended) -> None:
        """A stage with files has ended."""
        ...

    def files_for(self, device: str, name: str, stage_id: int, options: dict[str, Any]) -> Sequence[int]:
        """The files of a stage that wants some."""
        ...

    def poked(self) -> None:
        """A stage wants to be looked at."""
        ...


class Workforce:
    """A supervisor whose workers come up while something else is done.

    Attributes:
        processors: those of other packages, as `registry.discover` found them.
        listener: who is told, from now on; None until there is somebody.
    """

    def __init__(self, config: Config) -> None:
        """Take the settings; `begin` begins."""
        self.processors: Final = registry.discover()
        self.listener: Listener | None = None
        shows_packets = config.logging.level == "debug" and config.logging.packets_per_s > 0
        self.supervisor: Final = Supervisor(
            workers=_workers(config.dataplane.workers),
            processors=self.processors,
            on_exit=self._exited,
            on_device_lost=self._device_lost,
            packet_log=_packet_log if shows_packets else None,
            packets_per_s=max(1, config.logging.packets_per_s),
            io_uring=config.dataplane.io_uring == "auto",
            files_for=self._files_for,
            on_poke=self._poked,
            on_stage_ended=self._stage_ended,
        )
        # A daemon: an interrupt before anybody waits for it ends the process, and with it the workers.
        self._thread = threading.Thread(target=self._start, name="dataplane-start", daemon=True)
        self._error: Exception | None = None

    def begin(self) -> Self:
        """Start them, without waiting; once."""
        self._thread.start()
        return self

    def wait(self) -> None:
        """Return when all have answered. Raises DataplaneError or OSError if they cannot start."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop them and all threads, if they were begun; calling it again does nothing."""
        if self._thread.ident is not None:
            self._thread.join()
        self.supervisor.close()

    def _start(self) -> None:
        try:
            self.supervisor.start()
        except Exception as error:  # noqa: BLE001  # for whoever waits
            self._error = error

    def _exited(self, death: WorkerExit) -> None:
        if self.listener is not None:
            self.listener.exited(death)

    def _device_lost(self, device: str, reason: str) -> None:
        log.warning("a device was lost", interface_id=device, reason=reason)
        if self.listener is not None:
            self.listener.device_lost(device, reason)

    def _stage_ended(self, ended: Ended) -> None:
        if self.listener is not None:
            self.listener.stage_ended(ended)

    def _files_for(self, device: str, name: str, stage_id: int, options: dict[str, Any]) -> Sequence[int]:
        return () if self.listener is None else self.listener.files_for(device, name, stage_id, options)

    def _poked(self) -> None:
        if self.listener is not None:
            self.listener.poked()


def begin(config: Config) -> Workforce:
    """The workers of a service that is about to start."""
    failpoints.arm(os.environ)
    slices.short()  # before there are threads
    return Workforce(config).begin()


def _workers(configured: int) -> int:
    """How many worker processes: as configured, or one for each processor that this service may run on."""
    return configured or min(len(os.sched_getaffinity(0)), WORKERS_MAX)


def _packet_log(device: str, line: str, suppressed: int) -> None:
    extra: dict[str, Any] = {"suppressed": suppressed} if suppressed else {}
    log.debug("packet", dev=device, packet=line, **extra)
