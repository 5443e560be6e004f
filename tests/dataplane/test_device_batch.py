"""A batch's entries are what a look at its packets says, whenever they are asked for, and only looked up then."""

from collections.abc import Callable

import pytest

from service.dataplane.blackbox import BlackBox, create
from service.dataplane.contract import Packet
from service.dataplane.device_batch import DeviceBatch
from service.packet import build
from service.packet.flowkey import Entry, Meter, look_at

PINGS = [build.echo(bytes([10, 0, 0, 1]), bytes([10, 0, 0, last]), last, 1) for last in range(2, 14)]
PING = look_at(PINGS[0], "tun").kind


class FakeSource:
    """What a batch is of; it takes everything."""

    name = "t0"
    mode = "tun"

    def __init__(self) -> None:
        self.box = BlackBox(create())
        self.dropped = 0

    def drop(self, _reason: str, count: int) -> None:
        self.dropped += count

    def answer(self, packets: list[Packet], _kinds: list[int] | int | None = None) -> int:
        return len(packets)


class CountingMeter(Meter):
    """Says how often somebody asked."""

    asked = 0

    def look_alike(self, *arguments: object) -> list[Entry]:
        self.asked += 1
        return super().look_alike(*arguments)  # type: ignore[arg-type]


def a_batch(*, known: bool) -> tuple[DeviceBatch, CountingMeter, FakeSource]:
    source = FakeSource()
    meter = CountingMeter("tun", rows=source.box.rows)
    if known:
        meter.look([memoryview(packet) for packet in PINGS])
    for place, octets in zip(source.box.rows.places, PINGS, strict=False):
        place[: len(octets)] = octets
    packets = source.box.packets([len(octets) for octets in PINGS])
    alike = meter.alike()
    assert alike is not None
    return DeviceBatch(source, "from_kernel", packets, None, alike, meter), meter, source  # type: ignore[arg-type]


def facts(entries: list[Entry] | None) -> list[tuple[int, bytes | None]]:
    assert entries is not None
    return [(entry.kind, entry.flow) for entry in entries]


def take_twice(batch: DeviceBatch) -> None:
    batch.take([5, 3, 9])
    batch.take([2, 0])


STEPS: list[Callable[[DeviceBatch], None]] = [
    lambda _: None,
    lambda batch: batch.take(range(1, len(batch), 2)),
    lambda batch: batch.keep(range(len(batch) - 1, -1, -3), "filtered"),
    take_twice,
    lambda batch: batch.take(()),
]


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_entries_are_those_of_the_packets_that_are_left(
    step: Callable[[DeviceBatch], None], *, asked_before: bool, known: bool
) -> None:
    batch, meter, _ = a_batch(known=known)
    if asked_before:
        assert facts(batch.entries) == facts([look_at(octets, "tun") for octets in PINGS])
    step(batch)
    assert facts(batch.entries) == facts([look_at(packet, "tun") for packet in batch.packets])
    assert batch.entries is batch.entries
    assert meter.asked == (1 if asked_before or batch.packets else 0)


def test_who_never_asks_pays_for_no_look() -> None:
    batch, meter, source = a_batch(known=True)
    batch.take(range(2, 8))
    assert batch.kind == PING
    batch.drop("filtered")
    assert source.dropped == 6
    assert (meter.asked, batch.entries) == (0, [])


def test_a_packet_in_the_place_of_one_ends_what_was_known_of_all() -> None:
    batch, meter, _ = a_batch(known=True)
    batch.replace(1, b"\x45")
    assert (batch.kind, batch.entries, meter.asked) == (-1, None, 0)
    batch.take([0, 1])
    assert (batch.kind, batch.entries, meter.asked) == (-1, None, 0)
