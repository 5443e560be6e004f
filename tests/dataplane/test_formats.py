"""The two formats that processes share: messages on sockets, figures in memory."""

import fcntl
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.dataplane import layout, wire
from service.packet.classify import CLASSES

U64 = st.integers(min_value=0, max_value=2**64 - 1)
U32 = st.integers(min_value=0, max_value=2**32 - 1)
NAMES = st.text(max_size=60)
REQUESTS = st.one_of(
    *(st.builds(kind, U64, U32, U64) for kind in (wire.Attach, wire.Configure, wire.Release)),
    st.builds(wire.Feed, U64, U32, U64, st.integers(0, layout.AREAS - 1)),
    st.builds(wire.Detach, U64, U32, U64),
    st.builds(wire.Ping, U64),
)


@given(REQUESTS)
def test_a_request_survives_the_wire(request: wire.Request) -> None:
    assert wire.decode_request(wire.encode_request(request)) == request


@given(st.builds(wire.Reply, U64, U32, NAMES), st.builds(wire.PacketLine, NAMES, st.text(), U64))
def test_answers_survive_the_wire(reply: wire.Reply, line: wire.PacketLine) -> None:
    assert wire.decode_reply(wire.encode_reply(reply)) == reply
    encoded = wire.encode_line(line)
    if len(encoded) < wire.MESSAGE_MAX_BYTES:
        assert wire.decode_line(encoded) == line


@given(st.binary(max_size=64))
def test_any_bytes_are_a_message_or_a_wire_error(data: bytes) -> None:
    for decode in (wire.decode_request, wire.decode_reply, wire.decode_line):
        try:
            decode(data)
        except wire.WireError:
            pass


def test_what_is_too_long_is_cut() -> None:
    cut = wire.encode_line(wire.PacketLine("tun0", "x" * 100_000, 1))
    assert len(cut) == wire.MESSAGE_MAX_BYTES
    assert wire.decode_line(cut).suppressed == 1
    reply = wire.encode_reply(wire.Reply(1, 2, "x" * 100_000))
    assert len(reply) <= wire.MESSAGE_MAX_BYTES
    assert wire.decode_reply(reply).text == "x" * wire.TEXT_MAX_BYTES


@pytest.fixture
def memory() -> Iterator[int]:
    fd = layout.create(3)
    yield fd
    os.close(fd)


def test_slots_are_apart_and_figures_read_back(memory: int) -> None:
    writer, reader = layout.CounterWriter(memory), layout.CounterReader(memory)
    starts = [writer.clear(slot) for slot in range(3)]
    assert all(start % 8 == 0 for start in starts), "a slot starts on a cache line"
    for index in range(len(CLASSES)):
        writer.words[starts[1] + 2 * index] = index + 1
        writer.words[starts[1] + 2 * index + 1] = 2**64 - 1 - index
        writer.words[starts[1] + layout.DIRECTION_WORDS + 2 * index] = 7
    figures = reader.read(1)
    assert figures.from_kernel == {name: (index + 1, 2**64 - 1 - index) for index, name in enumerate(CLASSES)}
    assert figures.to_kernel == dict.fromkeys(CLASSES, (7, 0))
    for slot in (0, 2):
        assert reader.read(slot) == layout.SlotFigures({}, {}, {})
        assert reader.lost(slot) == 0
    writer.mark_lost(1, 77)
    assert reader.lost(1) == 77
    assert reader.read(1) == figures
    writer.clear(1)
    assert reader.lost(1) == 0
    assert reader.read(1) == layout.SlotFigures({}, {}, {})


def test_the_memory_keeps_its_size(memory: int) -> None:
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(memory, size)
    assert fcntl.fcntl(memory, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL


def test_the_service_cannot_write(memory: int) -> None:
    reader = layout.CounterReader(memory)
    assert reader._words.readonly


def test_a_worker_of_another_version_refuses(memory: int) -> None:
    os.pwrite(memory, bytes(8), 0)
    with pytest.raises(layout.LayoutError, match="the service runs other code"):
        layout.CounterWriter(memory)
