"""Lifetime totals out of counters that start again: the sum of every life that ended, plus the present one.

A counter belongs to an incarnation, named by a key: for the kernel's counters the boot and the ifindex, for a
worker's the session in which it holds the device. A value that falls within a key is a life we did not see begin.
Pure; where totals are kept is `service.store.counters`' business.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from service.domain.observed import LinkCounters
from service.domain.values import InterfaceId

Figures = Mapping[str, int]  # name of a counter -> packets or bytes


class Source(StrEnum):
    """Who counted."""

    KERNEL = "kernel"
    WORKER = "worker"


@dataclass(frozen=True, slots=True)
class Reading:
    """Raw values of one incarnation at one moment. `key` names the incarnation."""

    interface_id: InterfaceId
    source: Source
    key: str
    raw: Figures


@dataclass(slots=True)
class _Life:
    closed: Counter[str] = field(default_factory=Counter)
    key: str = ""
    epoch: int = 0
    raw: Figures = field(default_factory=dict)
    epochs: dict[str, int] = field(default_factory=dict)  # the last epoch of every key there was
    ended_key: str = ""  # of the life before this one
    ended_raw: Figures = field(default_factory=dict)

    def open(self, key: str, epoch: int) -> None:
        """End the present life, and begin one under another key or epoch."""
        self.closed.update(self.raw)
        self.ended_key, self.ended_raw = self.full_key, self.raw
        self.key, self.epoch = key, epoch
        self.epochs[key] = max(epoch, self.epochs.get(key, 0))

    @property
    def full_key(self) -> str:
        return f"{self.key}#{self.epoch}" if self.epoch else self.key


class Book:
    """The lifetime totals of all interfaces. Changed by `take`, `take_last` and `resume` only."""

    def __init__(self) -> None:
        self._lives: dict[tuple[InterfaceId, Source], _Life] = {}

    def resume(self, reading: Reading) -> None:
        """Take in an incarnation as it was stored, in order of opening; the last one may go on."""
        key, _, epoch = reading.key.partition("#")
        life = self._lives.setdefault((reading.interface_id, reading.source), _Life())
        life.open(key, int(epoch or 0))
        life.raw = dict(reading.raw)

    def take(self, reading: Reading) -> Reading:
        """Take a new reading; gives it back under the key it is to be stored by.

        A key that was there before, with other keys in between, is another life: the same boot and ifindex in
        another network namespace, as after a container's restart.
        """
        life = self._lives.setdefault((reading.interface_id, reading.source), _Life())
        fell = any(reading.raw.get(name, 0) < value for name, value in life.raw.items())
        if life.key != reading.key or fell:
            life.open(reading.key, life.epochs.get(reading.key, -1) + 1)
        life.raw = dict(reading.raw)
        return Reading(reading.interface_id, reading.source, life.full_key, life.raw)

    def take_last(self, reading: Reading) -> Reading:
        """Take the last reading of a life that was ended by us; as `take`.

        It may be older than what was taken of that life already, so a value that falls is no other life: it would
        count twice. A worker's may come when its next life was heard of already; keys of workers are given out once.
        """
        life = self._lives.get((reading.interface_id, reading.source))
        if life is None:
            return self.take(reading)
        if life.key == reading.key:
            return self.take(replace(reading, raw=_most(reading.raw, life.raw)))
        if reading.source is Source.WORKER and life.ended_key == reading.key:
            last = _most(reading.raw, life.ended_raw)
            life.closed.update({name: value - life.ended_raw.get(name, 0) for name, value in last.items()})
            life.ended_raw = last
            return replace(reading, raw=last)
        return self.take(reading)

    def totals(self, interface_id: InterfaceId, source: Source) -> dict[str, int]:
        """Lifetime totals; they never go down."""
        life = self._lives.get((interface_id, source))
        if life is None:
            return {}
        return {name: life.closed[name] + life.raw.get(name, 0) for name in sorted({*life.closed, *life.raw})}

    def forget(self, interface_id: InterfaceId) -> None:
        """Let go of an interface that was retired; what was stored stays stored."""
        for source in Source:
            self._lives.pop((interface_id, source), None)


def _most(one: Figures, other: Figures) -> Figures:
    """The larger of each figure."""
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in {**other, **one}}


def kernel_reading(
    interface_id: InterfaceId, boot_id: str, ifindex: int, counters: LinkCounters, netns: str | None = None
) -> Reading:
    """The kernel's counters of a link, keyed by its incarnation."""
    raw = {name: getattr(counters, name) for name in LinkCounters.__slots__}
    inside = "" if netns is None else f"/{netns}"
    return Reading(interface_id, Source.KERNEL, f"{boot_id}{inside}/{ifindex}", raw)


def worker_reading(
    interface_id: InterfaceId,
    session: str,
    from_kernel: Mapping[str, tuple[int, int]],
    to_kernel: Mapping[str, tuple[int, int]],
) -> Reading:
    """A worker's counters, by direction and packet class, as "from_kernel.ipv4.tcp.packets"."""
    raw: dict[str, int] = {}
    for direction, classes in (("from_kernel", from_kernel), ("to_kernel", to_kernel)):
        for name, (packets, size) in classes.items():
            raw[f"{direction}.{name}.packets"] = packets
            raw[f"{direction}.{name}.bytes"] = size
    return Reading(interface_id, Source.WORKER, session, raw)
