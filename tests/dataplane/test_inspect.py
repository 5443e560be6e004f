"""What inspect says must be what a slow count of the same packets says."""

import mmap
import random
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.dataplane.contract import Mode
from service.dataplane.flowtable import HEAD_BYTES, FlowTableReader, FlowTableWriter, table_bytes
from service.dataplane.processors.inspect import WINDOW_NS, Inspect
from service.packet.classify import CLASSES
from service.packet.flowkey import flow_ends, flow_key, look_at
from service.packet.vnet import F_NEEDS_CSUM, GSO_TCPV4, VnetHeader, build_vnet
from tests.dataplane.chains import FakeContext, plain_headers, run
from tests.packet import strategies


@contextmanager
def inspecting(
    flows: int = 16, packets: int = 64, mode: Mode = "tun"
) -> Iterator[tuple[Inspect, FlowTableReader, FakeContext]]:
    options = {"flows": flows, "packets": packets}
    context = FakeContext(mode)
    context.give_memory(Inspect.memory_bytes(options))
    stage = Inspect(options, context)
    memory = mmap.mmap(context.files[0], 0, prot=mmap.PROT_READ)
    view = memoryview(memory)
    reader = FlowTableReader(view)
    try:
        yield stage, reader, context
    finally:
        stage.close()
        reader.release()
        view.release()
        memory.close()
        context.close()


def udp(source: int, to: int, size: int = 40) -> bytes:
    head = struct.pack("!BBHHHBBHII", 0x45, 0, 28 + size, 0, 0, 64, 17, 0, 0x0A000000 + source, 0x0A000000 + to)
    return head + struct.pack("!HHHH", 1000 + source, 1000 + to, 8 + size, 0) + bytes(size)


def tcp(flags: int, size: int = 0) -> bytes:
    head = struct.pack("!BBHHHBBHII", 0x45, 0, 40 + size, 0, 0, 64, 6, 0, 0x0A000001, 0x0A000002)
    return head + struct.pack("!HHIIBBHHH", 4000, 80, 1, 2, 0x50, flags, 512, 0, 0) + bytes(size)


few = st.sampled_from((udp(1, 2), udp(2, 1), udp(1, 2, 50), tcp(0x02), tcp(0x10, 5)))
batches = st.lists(
    st.tuples(st.lists(few | strategies.octets, max_size=8), st.sampled_from(("from_kernel", "to_kernel"))), max_size=6
)
frame_batches = st.lists(
    st.tuples(st.lists(strategies.frames, max_size=8), st.sampled_from(("from_kernel", "to_kernel"))), max_size=6
)


def counted_right(given_batches: list[tuple[list[bytes], str]], mode: Mode) -> None:
    with inspecting(flows=64, mode=mode) as (stage, reader, _):
        classes: dict[str, Counter[str]] = {"from_kernel": Counter(), "to_kernel": Counter()}
        sizes: Counter[int] = Counter()
        flows: dict[bytes, list[int]] = {}
        seen = []
        now = 1
        for packets, direction in given_batches:
            now += WINDOW_NS // 3
            batch = run(stage, packets, mode=mode, direction=direction, time_ns=now)
            assert batch.left() == packets
            for packet in packets:
                seen.append((now, direction, len(packet), packet[:HEAD_BYTES]))
                entry = look_at(packet, mode)
                classes[direction][CLASSES[entry.kind]] += 1
                sizes[max(2 ** len(packet).bit_length() - 1, 0)] += 1
                if entry.flow is not None:
                    row = flows.setdefault(entry.flow, [0, 0, 0, 0, now, now, 0, 0])
                    row[2 * entry.swapped] += 1
                    row[2 * entry.swapped + 1] += len(packet)
                    row[5] = now
                    row[6 + entry.swapped] |= entry.tcp_flags
        stage.tick(now + 1)
        totals = reader.totals()
        for direction, found in (("from_kernel", totals.from_kernel), ("to_kernel", totals.to_kernel)):
            assert {name: packets for name, (packets, _) in found.items()} == classes[direction]
        assert totals.sizes == sizes
        assert totals.packets == totals.wire_packets == len(seen)
        rows = {row.ends: row for row in reader.rows()}
        assert rows.keys() == {flow_ends(flow) for flow in flows}
        for flow, (there, there_bytes, back, back_bytes, first, last, *flags) in flows.items():
            shown = rows[flow_ends(flow)]
            assert (shown.packets_there, shown.bytes_there) == (there, there_bytes)
            assert (shown.packets_back, shown.bytes_back) == (back, back_bytes)
            assert [shown.tcp_flags_there, shown.tcp_flags_back] == flags
            assert first - WINDOW_NS <= shown.first_seen_ns <= first, "as exact as a window is long"
            assert last <= shown.last_seen_ns <= last + WINDOW_NS
        heads = reader.packets()
        assert [(head.time_ns, head.direction, head.length, head.data) for head in heads] == seen[-64:]
        assert [head.number for head in heads] == list(range(1, len(seen) + 1))[-64:]


@given(batches)
def test_any_packets_are_counted_as_a_slow_count_has_them(given_batches: list[tuple[list[bytes], str]]) -> None:
    counted_right(given_batches, "tun")


@given(frame_batches)
def test_any_frames_are_counted_as_a_slow_count_has_them(given_batches: list[tuple[list[bytes], str]]) -> None:
    counted_right(given_batches, "tap")


def test_a_flow_is_one_row_with_both_directions() -> None:
    with inspecting() as (stage, reader, _):
        run(stage, [udp(1, 2, 10), udp(1, 2, 10)], time_ns=5)
        run(stage, [udp(2, 1, 30), tcp(0x02), tcp(0x11)], direction="to_kernel", time_ns=9)
        stage.tick(10)
        by_protocol = {row.ends.protocol: row for row in reader.rows()}
        row = by_protocol[17]
        assert row.ends == (4, 17, b"\x0a\0\0\1", 1001, b"\x0a\0\0\2", 1002)
        assert (row.packets_there, row.bytes_there, row.packets_back, row.bytes_back) == (2, 76, 1, 58)
        assert (row.first_seen_ns, row.last_seen_ns) == (5, 9)
        assert by_protocol[6].tcp_flags_there == 0x13
        totals = reader.totals()
        assert totals.tcp_flags == {"fin": 1, "syn": 1, "ack": 1}
        assert totals.protocols == {6: (2, 80), 17: (3, 134)}
        assert totals.from_kernel == {"ipv4.udp": (2, 76)}
        assert [row.ends.protocol for row in reader.top(1)] == [17]
        assert [row.ends.protocol for row in reader.top(9, "packets")] == [17, 6]


def test_a_flow_begins_with_its_first_packet_in_either_direction() -> None:
    with inspecting() as (stage, reader, _):
        run(stage, [udp(8, 9)], time_ns=1)
        run(stage, [udp(2, 1)], direction="to_kernel", time_ns=2)
        run(stage, [udp(1, 2)], time_ns=3)
        stage.tick(4)
        times = {row.ends.first_port: (row.first_seen_ns, row.last_seen_ns) for row in reader.rows()}
        assert times == {1008: (1, 1), 1001: (2, 3)}


def test_the_least_recently_seen_flow_makes_room_and_is_counted() -> None:
    with inspecting(flows=16) as (stage, reader, context):
        for number in range(1, 17):
            run(stage, [udp(number, 99)], time_ns=number * WINDOW_NS)
        run(stage, [udp(1, 99)], time_ns=17 * WINDOW_NS)
        for number in (20, 21, 22):
            run(stage, [udp(number, 99)], time_ns=number * WINDOW_NS)
        stage.tick(30 * WINDOW_NS)
        left = {row.ends.first_port - 1000 for row in reader.rows()}
        assert left == {1, *range(5, 17), 20, 21, 22}
        assert reader.totals().flows == 16
        assert reader.totals().flows_evicted == context.counted["flows_evicted"] == 3


def test_more_new_flows_in_a_window_than_there_are_rows() -> None:
    with inspecting(flows=16) as (stage, reader, _):
        run(stage, [udp(number, 9000) for number in range(100)], time_ns=7)
        stage.tick(8)
        assert {row.ends.first_port - 1000 for row in reader.rows()} == set(range(84, 100))
        assert reader.totals().flows_evicted == 84
        assert reader.totals().packets == 100


def test_a_segment_counts_as_its_packets_on_the_wire() -> None:
    gso = build_vnet(VnetHeader(F_NEEDS_CSUM, GSO_TCPV4, 0, 1000, 20, 16))
    with inspecting() as (stage, reader, _):
        run(stage, [tcp(0x10, 4001), tcp(0x10, 4000), tcp(0x10, 10)], headers=[gso, gso, *plain_headers(1)])
        stage.tick(8)
        assert reader.totals().packets == 3
        assert reader.totals().wire_packets == 5 + 4 + 1
        (row,) = reader.rows()
        assert (row.packets, row.wire_packets_there) == (3, 10)


def test_under_load_the_ring_holds_the_latest_and_says_what_is_missing() -> None:
    with inspecting(packets=4) as (stage, reader, _):
        for number in range(0, 60, 10):
            run(stage, [udp(1, 2, size) for size in range(number, number + 10)], time_ns=WINDOW_NS + number)
        stage.tick(WINDOW_NS + 60)
        assert [head.length - 28 for head in reader.packets()] == [48, 49, 58, 59]
        assert [head.number for head in reader.packets()] == [49, 50, 59, 60]
        run(stage, [udp(1, 2, size) for size in range(10)], time_ns=3 * WINDOW_NS)
        assert [head.length - 28 for head in reader.packets()] == [0, 1, 2, 3]


def test_a_table_without_packets_keeps_none() -> None:
    with inspecting(packets=0) as (stage, reader, _):
        run(stage, [udp(1, 2)])
        assert reader.packets() == []


def test_a_torn_row_is_never_shown() -> None:
    memory = bytearray(table_bytes(16, 4))
    reader = FlowTableReader(memoryview(memory))
    writer = FlowTableWriter(memoryview(memory), 16, 4)
    writer.publish(1, 0, 0, 1)
    writer.write_row(0, flow_key(4, 17, b"\1" * 4, 1, b"\2" * 4, 2), [7] * 9)
    assert reader.rows()[0].packets_there == 7
    row = memory.index(b"\1\1\1\1") - (8 + 6)
    memory[row] += 1  # a write has begun
    assert reader.rows() == []


def test_a_reader_beside_a_writer_sees_rows_of_one_moment() -> None:
    memory = bytearray(table_bytes(16, 4))
    writer = FlowTableWriter(memoryview(memory), 16, 4)
    reader = FlowTableReader(memoryview(memory))
    flow = flow_key(4, 17, b"\1" * 4, 1, b"\2" * 4, 2)
    writer.write_row(0, flow, [0] * 9)
    writer.publish(1, 0, 0, 1)
    stop = threading.Event()

    def write() -> None:
        count = 0
        while not stop.is_set():
            count += 1
            writer.write_row(0, flow, [count] * 9)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(2000):
            for row in reader.rows():
                assert row.packets_there == row.wire_packets_back == row.first_seen_ns
    finally:
        stop.set()
        thread.join()


def test_memory_of_other_code_is_refused() -> None:
    memory = bytearray(table_bytes(16, 0))
    memory[0] = 1
    with pytest.raises(ValueError, match="other code"):
        FlowTableReader(memoryview(memory))
    with pytest.raises(ValueError, match="needed"):
        FlowTableWriter(memoryview(memory), 17, 0)


def test_memory_of_an_earlier_stage_is_cleared() -> None:
    memory = bytearray(random.Random(1).randbytes(table_bytes(16, 4)))
    FlowTableWriter(memoryview(memory), 16, 4)
    reader = FlowTableReader(memoryview(memory))
    assert reader.rows() == []
    assert reader.packets() == []
    assert reader.totals().packets == 0
