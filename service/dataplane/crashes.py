"""Whose fault a worker's death was, and what that means for the next start: without the stage, or later.

Pure: times are given. A stage with `on_crash: bypass` is left out until its chain changes or processing is started
anew. With `restart` it comes back: at once after the first crash, then after 1 s, doubled with each crash up to a
minute. So the devices that shared its worker are let go and taken up again at most once a minute, however often a
packet comes that kills.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

RESTART_STEP_S: Final = 1.0
RESTART_MAX_S: Final = 60.0
STEADY_S: Final = 120.0
"""A device that went without a crash for this long starts anew."""

RECORDS_MAX: Final = 16_384

Then = Literal["restart", "bypass"]
Chain = tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Crash:
    """A processor that took its worker down.

    Attributes:
        device: the caller's key.
        name: the interface's name.
        stage: its place in the chain; below 0 for a tap.
        processor: its name.
        error: what Python said; empty if it did not come to that.
        packet: the start of the packet that it had in hand, of `packet_bytes`.
        then: what becomes of it.
    """

    device: str
    name: str
    stage: int
    processor: str
    error: str
    packet: bytes
    packet_bytes: int
    then: Then


@dataclass(slots=True)
class _Record:
    chain: Chain
    bypassed: set[int] = field(default_factory=set)
    crashes: int = 0
    last: float = 0.0
    due: float = 0.0


def restart_delay_s(crashes: int) -> float:
    """How long a device waits after the crash with this number in a row."""
    return 0.0 if crashes <= 1 else min(RESTART_MAX_S, RESTART_STEP_S * 2.0 ** min(crashes - 2, 6))


class Crashes:
    """What is remembered of devices whose chains crashed. Not thread-safe."""

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def crashed(self, device: str, chain: Chain, place: int, now: float) -> Then:
        """Note a crash of the stage at `place`; return what becomes of it. A tap (below 0) is never brought back."""
        if place < 0:
            return "bypass"
        record = self._records.pop(device, None)
        if record is None or record.chain != chain:
            record = _Record(chain)
        self._records[device] = record
        while len(self._records) > RECORDS_MAX:
            del self._records[next(iter(self._records))]
        if chain[place].get("on_crash") == "bypass":
            record.bypassed.add(place)
            return "bypass"
        record.crashes = 1 if now - record.last > STEADY_S else record.crashes + 1
        record.last = now
        record.due = now + restart_delay_s(record.crashes)
        return "restart"

    def bypassed(self, device: str, chain: Chain) -> frozenset[int]:
        """The stages of this chain that are to be left out."""
        record = self._records.get(device)
        return frozenset(record.bypassed) if record is not None and record.chain == chain else frozenset()

    def waits_s(self, device: str, chain: Chain, now: float) -> float:
        """How long a device with this chain is not to be read yet."""
        record = self._records.get(device)
        return max(0.0, record.due - now) if record is not None and record.chain == chain else 0.0

    def forget(self, device: str) -> None:
        """Processing was ended, or its chain changed: what comes next starts anew."""
        self._records.pop(device, None)
