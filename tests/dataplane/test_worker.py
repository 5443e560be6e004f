"""The worker's loop in this process, where one turn of it can be looked at."""

import errno
import os
import select
import socket
from collections.abc import Iterator

import pytest

from service.dataplane import blackbox, layout, work
from service.dataplane.contract import BATCH_MAX
from service.dataplane.provisions import written
from service.dataplane.registry import Registry
from service.dataplane.wire import Attach, decode_reply, encode_request
from service.dataplane.worker import Worker
from tests.dataplane.test_supervisor import IPV4_UDP


class Bench:
    """A worker between the sockets that a supervisor would hold."""

    def __init__(self) -> None:
        self.control, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._theirs.setblocking(False)
        self._memory = layout.create(2)
        self.counters = layout.CounterReader(self._memory)
        self._notice = os.eventfd(0, os.EFD_NONBLOCK)
        self._box = blackbox.create()
        self.worker = Worker(
            self._theirs,
            layout.CounterWriter(self._memory),
            blackbox.BlackBox(self._box),
            self._notice,
            None,
            Registry({}),
        )

    def attach(self, slot: int, fds: list[int]) -> int:
        """Ask for it, let the worker do that one thing, and return the errno it answers."""
        setup = written(work.Setup("tun0", "tun", 1500, False, ()))
        socket.send_fds(self.control, [encode_request(Attach(1, slot, slot))], [*fds, setup])
        os.close(setup)
        assert self.worker._serve()
        reply = decode_reply(self.control.recv(100))
        assert reply.sequence == 1
        return reply.error

    def close(self) -> None:
        for device in list(self.worker._by_fd.values()):
            self.worker._let_go(device)
            device.close()
        self.worker._epoll.close()
        self.control.close()
        self._theirs.close()
        os.close(self._memory)
        os.close(self._box)
        os.close(self._notice)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def test_a_turn_reads_no_more_than_a_batch_of_a_device(bench: Bench) -> None:
    feed, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with feed, device:
        assert bench.attach(0, [os.dup(device.fileno())]) == errno.EINVAL, "one that blocks would stop the loop"
        device.setblocking(False)
        assert bench.attach(0, [os.dup(device.fileno())]) == 0
        for _ in range(BATCH_MAX + 10):
            feed.send(IPV4_UDP)
        for counted in (BATCH_MAX, BATCH_MAX + 10):
            for held in list(bench.worker._by_fd.values()):
                held.drain(select.EPOLLIN)
            assert bench.counters.read(0).from_kernel == {"ipv4.udp": (counted, 28 * counted)}


def test_a_slot_that_is_taken_or_not_there_is_refused_and_the_fd_closed(bench: Bench) -> None:
    for slot, error in ((0, 0), (0, 22), (2, 22)):
        read_end, write_end = os.pipe2(os.O_NONBLOCK)
        assert bench.attach(slot, [read_end]) == error
        os.close(read_end)
        if error:
            with pytest.raises(BrokenPipeError):
                os.write(write_end, b"x")
        os.close(write_end)


def test_a_request_without_its_fd_means_too_many_open_files(bench: Bench) -> None:
    assert bench.attach(0, []) == 24


def test_the_end_of_control_ends_the_loop(bench: Bench) -> None:
    bench.control.close()
    bench.worker.run()
