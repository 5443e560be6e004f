"""The rate of packet lines, on a clock of the test's own."""

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.dataplane.packet_lines import PacketLines, TokenBucket
from service.dataplane.wire import PacketLine, decode_line
from tests.dataplane.test_supervisor import IPV4_UDP

PACKET = bytearray(IPV4_UDP)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with left, right:
        left.setblocking(False)
        right.setblocking(False)
        yield left, right


def received(end: socket.socket) -> list[PacketLine]:
    lines = []
    try:
        while data := end.recv(4096):
            lines.append(decode_line(data))
    except BlockingIOError:
        pass
    return lines


@given(
    st.integers(min_value=1, max_value=1000),
    st.lists(st.floats(min_value=0, max_value=5, allow_nan=False), min_size=1, max_size=300),
)
def test_never_more_than_the_rate_and_one_burst(rate_per_s: int, gaps_s: list[float]) -> None:
    bucket = TokenBucket(rate_per_s, 0.0)
    now = 0.0
    taken = 0
    for gap_s in gaps_s:
        now += gap_s
        taken += bucket.take(now)
        assert taken <= rate_per_s + now * rate_per_s + 1e-6


def test_a_pause_fills_the_bucket_but_no_more() -> None:
    bucket = TokenBucket(3, 0.0)
    assert [bucket.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert [bucket.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert not bucket.take(100.2)
    assert bucket.take(100.4)


def test_the_next_line_carries_the_number_left_out(ends: tuple[socket.socket, socket.socket]) -> None:
    clock = Clock()
    lines = PacketLines(ends[0], 2, clock)
    for _ in range(10):
        lines.packet("tun0", "tun", PACKET, len(PACKET))
    assert [line.suppressed for line in received(ends[1])] == [0, 0]
    clock.now += 0.5
    lines.packet("tun0", "tun", PACKET, len(PACKET))
    (line,) = received(ends[1])
    assert (line.suppressed, line.line != "") == (8, True)
    assert not lines.waiting


def test_the_number_is_told_after_a_second_without_a_line(ends: tuple[socket.socket, socket.socket]) -> None:
    clock = Clock()
    lines = PacketLines(ends[0], 1, clock)
    for device in ("tun0", "tun1", "tun1"):
        lines.packet(device, "tun", PACKET, len(PACKET))
    received(ends[1])
    clock.now += 0.9
    lines.flush()
    assert received(ends[1]) == []
    lines.packet("tun1", "tun", PACKET, len(PACKET))  # traffic that goes on does not put it off
    clock.now += 0.1
    lines.flush()
    assert received(ends[1]) == [PacketLine("tun1", "", 3)]
    assert not lines.waiting


def test_a_full_socket_counts_as_left_out(ends: tuple[socket.socket, socket.socket]) -> None:
    clock = Clock()
    lines = PacketLines(ends[0], 100_000, clock)
    for _ in range(5000):
        lines.packet("tun0", "tun", PACKET, len(PACKET))
    shown = received(ends[1])
    assert 0 < len(shown) < 5000
    clock.now += 1
    lines.flush()
    assert received(ends[1]) == [PacketLine("tun0", "", 5000 - len(shown))]


def test_a_device_that_goes_away_tells_its_number_first(ends: tuple[socket.socket, socket.socket]) -> None:
    lines = PacketLines(ends[0], 1, Clock())
    for _ in range(3):
        lines.packet("tun0", "tun", PACKET, len(PACKET))
    received(ends[1])
    lines.forget("tun0")
    assert received(ends[1]) == [PacketLine("tun0", "", 2)]
    assert not lines.waiting


def test_a_reader_that_is_gone_raises_nothing(ends: tuple[socket.socket, socket.socket]) -> None:
    lines = PacketLines(ends[0], 10, Clock())
    ends[1].close()
    lines.packet("tun0", "tun", PACKET, len(PACKET))
    lines.forget("tun0")
    assert not lines.waiting
