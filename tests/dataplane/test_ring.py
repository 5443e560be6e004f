"""Many reads, or writes, in one system call: they come to what single ones do, and the ring can do nothing else."""

import ctypes
import errno
import os
import socket
import struct
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from service.dataplane import blackbox, device_io, ring
from service.dataplane.blackbox import HEADER_BYTES, BlackBox
from service.dataplane.contract import BATCH_MAX, NO_OFFLOAD
from service.dataplane.device_io import RING_MIN, DeviceIO
from service.dataplane.ring import HALF, Reads, Ring

EVENTS_NONE = 0


@pytest.fixture
def one() -> Iterator[Ring]:
    made = ring.open_ring()
    if made is None:
        pytest.skip("missing: io_uring(7), which this kernel or container does not let us have")
    with closing(made):
        yield made


@pytest.fixture
def box() -> Iterator[BlackBox]:
    fd = blackbox.create()
    yield BlackBox(fd)
    os.close(fd)


@contextmanager
def wire() -> Iterator[tuple[socket.socket, int]]:
    """A socket, and the descriptor of a device that stands at its other end: each read is a packet."""
    far, near = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with far, near:
        for end in (far, near):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            end.setblocking(False)
        yield far, os.dup(near.fileno())


def heard(far: socket.socket) -> list[bytes]:
    found = []
    while True:
        try:
            found.append(far.recv(70_000))
        except BlockingIOError:
            return found


MANY = RING_MIN + 10
PACKETS = some.lists(some.binary(min_size=1, max_size=60), max_size=3 * BATCH_MAX)


@settings(max_examples=60, deadline=None)
@given(turns=some.lists(PACKETS, min_size=1, max_size=4), framed=some.booleans())
def test_a_ring_reads_and_writes_what_single_calls_do(turns: list[list[bytes]], framed: bool) -> None:
    many = ring.open_ring()
    if many is None:
        pytest.skip("missing: io_uring(7)")
    memory = blackbox.create()
    front = bytes(HEADER_BYTES) if framed else b""
    try:
        told = []
        for which in (many, None):
            box, said = BlackBox(memory), []
            with wire() as (far, fd):
                device = DeviceIO(fd, box, which, vnet_hdr=framed)
                with device.file:
                    for packets in turns:
                        for packet in packets:
                            far.send(front + packet)
                        for _ in range(len(packets) + 1):
                            lengths, error = device.read(EVENTS_NONE)
                            assert error == 0
                            if not lengths:
                                break
                            views = box.packets(lengths)
                            headers = box.headers(len(lengths)) if framed else None
                            said += [bytes(view) for view in views]
                            assert min(device.write(views, headers)) > 0
                        assert heard(far) == [front + packet for packet in packets]
            told.append(said)
        assert told[0] == told[1] == [packet for packets in turns for packet in packets]
    finally:
        many.close()
        os.close(memory)


def test_it_is_used_where_many_packets_wait_and_not_where_few_do(
    one: Ring, box: BlackBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    submit = one._submit

    def told(first: int, count: int) -> list[int]:
        asked.append(count)
        return submit(first, count)

    monkeypatch.setattr(one, "_submit", told)
    with wire() as (far, fd):
        device = DeviceIO(fd, box, one, vnet_hdr=False)
        with device.file:
            for _ in range(3):
                far.send(b"alone")
                assert device.read(EVENTS_NONE) == ([5], 0)
            assert asked == []
            for sent, came, calls in ((30, 30, []), (50, 38, [38]), (20, 32, [46]), (0, 0, [40]), (1, 1, [])):
                for _ in range(sent):
                    far.send(b"many")
                assert device.read(EVENTS_NONE) == ([4] * came, 0)
                assert asked == calls
                asked.clear()


def test_packets_move_up_to_where_nothing_came(box: BlackBox) -> None:
    class Gaps:
        """A ring to which a packet came right after it had found nothing."""

        def reads(self, *_: Any) -> Reads:
            return Reads(b"")

        def placed(self, found: list[int]) -> list[int]:
            return found

        def read(self, _reads: Reads, count: int) -> list[int]:
            found = [-errno.EAGAIN] * count
            for place, packet in ((0, b"one"), (2, b"three"), (5, b"five!!")):
                box.framed[place][: HEADER_BYTES + len(packet)] = bytes([place] * HEADER_BYTES) + packet
                found[place] = HEADER_BYTES + len(packet)
            return found

    with wire() as (_far, fd):
        device = DeviceIO(fd, box, Gaps(), vnet_hdr=True)  # type: ignore[arg-type]
        device._came = RING_MIN
        with device.file:
            lengths, error = device.read(EVENTS_NONE)
            assert (lengths, error) == ([3, 5, 6], 0)
            assert [bytes(packet) for packet in box.packets(lengths)] == [b"one", b"three", b"five!!"]
            assert [bytes(header) for header in box.headers(3)] == [
                bytes([place] * HEADER_BYTES) for place in (0, 2, 5)
            ]


@pytest.mark.parametrize("reading", [True, False])
def test_a_device_that_a_ring_cannot_have_without_waiting_goes_without(box: BlackBox, reading: bool) -> None:
    class Refused:
        def reads(self, *_: Any) -> Reads:
            return Reads(b"")

        def placed(self, found: list[int]) -> list[int]:
            return found

        def read(self, _reads: Reads, count: int) -> list[int]:
            return [-errno.EOPNOTSUPP] * count

        def write(self, _fd: int, _addresses: Any, sizes: Any) -> list[int]:
            return [-errno.EOPNOTSUPP] * len(sizes)

    with wire() as (far, fd):
        device = DeviceIO(fd, box, Refused(), vnet_hdr=False)  # type: ignore[arg-type]
        device._came = RING_MIN if reading else 0
        with device.file:
            for _ in range(RING_MIN):
                far.send(b"packet")
            assert device.read(EVENTS_NONE) == ([6] * RING_MIN, 0)
            assert (device._ring is None) == reading
            assert device.write(box.packets([6] * RING_MIN), None) == [6] * RING_MIN
            assert device._ring is None
            assert heard(far) == [b"packet"] * RING_MIN


def test_what_it_says_of_a_device_that_is_gone_is_what_a_single_call_says(one: Ring, box: BlackBox) -> None:
    for which in (one, None):
        reading, writing = os.pipe2(os.O_NONBLOCK)
        os.close(reading)
        device = DeviceIO(writing, box, which, vnet_hdr=False)
        with device.file:
            box.rows.forget()
            packets = box.packets([4] * MANY)
            assert device.write(packets, None) == [-errno.EPIPE] * MANY
            device._came = RING_MIN
            assert device.read(EVENTS_NONE) == ([], errno.EBADF), "nothing can be read from this end"


def test_what_is_no_longer_in_the_rows_is_written_all_the_same(one: Ring, box: BlackBox) -> None:
    with wire() as (far, fd):
        device = DeviceIO(fd, box, one, vnet_hdr=False)
        with device.file:
            for place in range(MANY):
                box.buffers[place][:4] = b"r%03d" % place
            packets = box.packets([4] * MANY)
            packets[3] = memoryview(b"another")
            assert device.write(packets, None) == [4] * 3 + [7] + [4] * (MANY - 4)
            assert heard(far) == [b"r000", b"r001", b"r002", b"another", *(b"r%03d" % n for n in range(4, MANY))]
            fewer = box.packets([4] * MANY)[2:-1]
            assert device.write(fewer, None) == [4] * (MANY - 3)
            assert heard(far) == [b"r%03d" % n for n in range(2, MANY - 1)]


def test_headers_that_are_not_those_that_were_read_are_written_all_the_same(one: Ring, box: BlackBox) -> None:
    with wire() as (far, fd):
        device = DeviceIO(fd, box, one, vnet_hdr=True)
        with device.file:
            for place in range(MANY):
                box.framed[place][: HEADER_BYTES + 4] = bytes([place + 1] * HEADER_BYTES) + b"data"
            packets, headers = box.packets([4] * MANY), box.headers(MANY)
            as_read = [bytes([place + 1] * HEADER_BYTES) + b"data" for place in range(MANY)]
            device.write(packets, headers)
            assert heard(far) == as_read
            headers[4] = NO_OFFLOAD
            device.write(packets, headers)
            assert heard(far) == [*as_read[:4], bytes(HEADER_BYTES) + b"data", *as_read[5:]]
            device.write(packets, None)
            assert heard(far) == [bytes(HEADER_BYTES) + b"data"] * MANY


def test_a_queue_that_is_full_is_told_packet_by_packet(one: Ring, box: BlackBox) -> None:
    for which in (one, None):
        reading, writing = os.pipe2(os.O_NONBLOCK | os.O_DIRECT)
        with os.fdopen(reading, "rb"):
            device = DeviceIO(writing, box, which, vnet_hdr=False)
            with device.file:
                done = []
                for _ in range(3):
                    done += device.write(box.packets([4000] * BATCH_MAX), None)
                taken = done.count(4000)
                assert 0 < taken < len(done)
                assert done == [4000] * taken + [-errno.EAGAIN] * (len(done) - taken)


def test_many_turns_lose_count_of_nothing(one: Ring, box: BlackBox) -> None:
    """The queues go round some hundred times, in steps of every size."""
    with wire() as (far, fd):
        device = DeviceIO(fd, box, one, vnet_hdr=False)
        with device.file:
            for turn in range(1000):
                sent = [b"%d/%d" % (turn, number) for number in range(1 + turn * 7 % BATCH_MAX)]
                for packet in sent:
                    far.send(packet)
                device._came = BATCH_MAX
                lengths, error = device.read(EVENTS_NONE)
                assert error == 0
                assert [bytes(view) for view in box.packets(lengths)] == sent
                assert device.write(box.packets(lengths), None) == lengths
                assert heard(far) == sent


def test_requests_that_come_late_are_waited_for_and_told_in_order(
    one: Ring, box: BlackBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None of ours waits; should the kernel have one wait all the same, its memory is not ours until it is done."""
    pipes = [os.pipe() for _ in range(4)]
    requests = b"".join(
        # Without RWF_NOWAIT.
        ring._REQUEST.pack(ring._OP_READ, 0, 0, reading, 0, box.addresses(framed=False)[number], 100, 0, number)
        for number, (reading, _) in enumerate(pipes)
    )

    waited: list[int] = []
    call = one._call

    def feed_and_wait(*arguments: int) -> int:
        if not waited:
            for number in (2, 0, 3, 1):
                os.write(pipes[number][1], b"x" * (number + 1))
        waited.append(arguments[0])
        return call(*arguments)

    monkeypatch.setattr(one, "_call", feed_and_wait)
    try:
        found = one.read(Reads(requests), 4)
        assert one.placed(found) == found == [1, 2, 3, 4]
        assert waited
        assert [bytes(box.buffers[number][: number + 1]) for number in range(4)] == [b"x", b"xx", b"xxx", b"xxxx"]
        reads = one.reads(pipes[0][0], box.addresses(framed=False), 100)
        assert one.read(reads, 3) == [-errno.EAGAIN] * 3, "and it goes on as before"
    finally:
        for reading, writing in pipes:
            os.close(reading)
            os.close(writing)


def test_results_that_are_told_in_another_order_are_put_in_order(one: Ring, box: BlackBox) -> None:
    with wire() as (far, fd):
        device = DeviceIO(fd, box, one, vnet_hdr=False)
        with device.file:
            far.send(b"one")
            far.send(b"three")
            far.send(b"five!!")
            device._came = BATCH_MAX
            # As if the kernel had found nothing for 0, 2 and 4, and told that first.
            submit, order = one._submit, [*range(0, 6, 2), *range(1, 7, 2), *range(6, BATCH_MAX)]

            def told_late(first: int, count: int) -> list[int]:
                found = submit(first, count)
                for place, length in ((5, 6), (3, 5), (1, 3)):
                    box.buffers[place][:length] = bytes(box.buffers[place // 2][:length])
                assert one._heard is not None
                for number, request in enumerate(order):
                    one._whose[one._heard[0] + number & one._results_mask] = request
                return found[3:6] + found[:3] + found[6:]

            one._submit = told_late  # type: ignore[method-assign]
            lengths, _ = device.read(EVENTS_NONE)
            assert lengths == [3, 5, 6]
            assert [bytes(packet) for packet in box.packets(lengths)] == [b"one", b"three", b"five!!"]


def test_what_a_kernel_does_not_take_is_written_one_by_one(one: Ring, box: BlackBox) -> None:
    call = one._syscall
    with wire() as (far, fd):
        device = DeviceIO(fd, box, one, vnet_hdr=True)
        with device.file:
            for place in range(MANY):
                box.framed[place][: HEADER_BYTES + 4] = bytes(HEADER_BYTES) + b"r%03d" % place
            for taken in (0, 7):
                # It takes that many, and says that it has no memory for more.
                one._syscall = lambda number, ring, _count, *more, taken=taken: (  # type: ignore[assignment, misc]
                    call(number, ring, taken, *more) if taken else -1
                )
                packets = box.packets([4] * MANY)
                assert device.write(packets, box.headers(MANY)) == [HEADER_BYTES + 4] * MANY
                assert heard(far) == [bytes(HEADER_BYTES) + b"r%03d" % place for place in range(MANY)]


def test_a_kernel_that_takes_no_requests_is_told_as_such(one: Ring, box: BlackBox) -> None:
    reading, writing = os.pipe2(os.O_NONBLOCK)
    try:
        reads = one.reads(reading, box.addresses(framed=False), 100)
        call = one._syscall
        one._syscall = lambda *_: -1  # type: ignore[assignment, misc]
        assert one.read(reads, 20) == [ring.NOT_TAKEN] * 20
        one._syscall = call  # type: ignore[misc]
        os.write(writing, b"there")
        assert one.read(reads, 20)[:2] == [5, -errno.EAGAIN]
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("operation", [18, 19, 9, 13, 16, 28, 45])
def test_it_can_read_and_write_and_nothing_else(one: Ring, operation: int) -> None:
    """Else it were a way round the worker's filter of system calls. OPENAT, CLOSE, SENDMSG, ACCEPT, CONNECT, OPENAT2,
    SOCKET (linux/io_uring.h, enum io_uring_op).
    """
    path = ctypes.create_string_buffer(b"/etc/hostname")
    request = ring._REQUEST.pack(operation, 0, 0, -100, 0, ctypes.addressof(path), 0, os.O_RDONLY, 0)
    before = set(Path("/proc/self/fd").iterdir())
    assert one.read(Reads(request), 1) == [-errno.EACCES]
    assert set(Path("/proc/self/fd").iterdir()) == before
    rules = ctypes.create_string_buffer(struct.pack("=HBx12x", 1, operation))
    with pytest.raises(PermissionError):  # nor can it be given other rules
        one._call(ring._REGISTER, one._fd, ring._REGISTER_RESTRICTIONS, ctypes.addressof(rules), 1)


def test_there_is_room_for_a_batch() -> None:
    assert HALF >= BATCH_MAX
    assert device_io.RING_MIN <= BATCH_MAX // 2
    assert array("I").itemsize == 4
    assert array("Q").itemsize == 8
