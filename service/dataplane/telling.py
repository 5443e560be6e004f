"""Tells the service what happened in the data plane, outside all locks, whatever its callbacks raise.

Nothing is decided here: who calls knows what is to be told, and when.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from service.dataplane.attachment import DeviceCounters, Ended
from service.dataplane.crashes import Crash
from service.dataplane.roster import Lost

POKE_S: Final = 0.1
"""Stages may ask to be looked at as often as they like; they are this often."""


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """A worker that died without being told to."""

    worker: int
    pid: int
    status: str
    """`signal SIGKILL` or `exit 1`."""
    devices: frozenset[str]
    """What it held and nobody holds now."""
    counters: Mapping[str, DeviceCounters]
    """The last figures of each of `devices`."""
    crash: Crash | None = None
    """The processor that did it, if one did."""


class Telling:
    """The service's callbacks. The caller's trouble must not leave the workers without a watcher: it is logged."""

    def __init__(
        self,
        on_exit: Callable[[WorkerExit], None],
        on_device_lost: Callable[[str, str], None] | None,
        on_stage_ended: Callable[[Ended], None] | None,
        on_poke: Callable[[], None] | None,
    ) -> None:
        self._on_exit, self._on_device_lost = on_exit, on_device_lost
        self._on_stage_ended, self._on_poke = on_stage_ended, on_poke
        self._poked = False
        self._poke_due = 0.0
        """When `on_poke` may be called again, on time.monotonic()."""
        self._log = structlog.get_logger("tunledger.dataplane")

    def exit(self, death: WorkerExit) -> None:
        """A worker died on its own."""
        try:
            self._on_exit(death)
        except Exception:  # noqa: BLE001 - whatever it is, see the class
            self._log.exception("on_exit failed", worker=death.worker)

    def ended(self, ended: Sequence[Ended]) -> None:
        """These stages and taps are over."""
        for each in ended:
            if self._on_stage_ended is None:
                continue
            try:
                self._on_stage_ended(each)
            except Exception:  # noqa: BLE001 - whatever it is, see the class
                self._log.exception("on_stage_ended failed", device=each.device)

    def lost(self, lost: Sequence[Lost]) -> None:
        """Workers let go of these devices by themselves."""
        for held, reason, ended in lost:
            self.ended(ended)
            self._log.warning("device lost", device=held.name, reason=reason)
            if self._on_device_lost is None:
                continue
            try:
                self._on_device_lost(held.device, reason)
            except Exception:  # noqa: BLE001 - whatever it is, see the class
                self._log.exception("on_device_lost failed", device=held.name)

    def note_poke(self) -> None:
        """Some stage asked to be looked at."""
        self._poked = self._on_poke is not None

    @property
    def poke_due(self) -> float | None:
        """When `poke` has something to tell, on time.monotonic()."""
        return self._poke_due if self._poked else None

    def poke(self) -> None:
        """Call `on_poke` for all pokes since it was last called, once `POKE_S` have passed since then."""
        now = time.monotonic()
        if not self._poked or self._on_poke is None or now < self._poke_due:
            return
        self._poked, self._poke_due = False, now + POKE_S
        try:
            self._on_poke()
        except Exception:  # noqa: BLE001 - whatever it is, see the class
            self._log.exception("on_poke failed")
