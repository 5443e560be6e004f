"""Real TUNs under many packets, through a worker's ring and one by one: the same packets, in the same order."""

import ctypes
import errno
import os
import re
import signal
import socket
import struct
import threading
from pathlib import Path

import pytest

from service.dataplane import ring
from service.dataplane.supervisor import Supervisor
from service.dataplane.work import Work
from tests.dataplane import tun
from tests.dataplane.conftest import Observed, Until
from tests.dataplane.test_chains import Start, chain, drops, start
from tests.dataplane.test_chains_tun import PEERS, attach, heard, incoming
from tests.dataplane.test_supervisor import worker_pids
from tests.dataplane.test_tun import send_udp

__all__ = ["start"]

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("netns")]

BURST = 400  # less than a queue's 500
WAYS = pytest.mark.parametrize("io_uring", [True, False], ids=["ring", "one by one"])
OFFLOADS = pytest.mark.parametrize("offloads", [None, tun.ALL_OFFLOADS], ids=["bare", "offloads"])


def asked_of_rings(pid: int) -> int | None:
    """How many requests a process made of its io_uring; None if it has none."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if "io_uring" in str(link.readlink()):
            found = re.search(r"^SqTail:\s+(\d+)$", Path(f"/proc/{pid}/fdinfo/{link.name}").read_text(), re.MULTILINE)
            assert found, "fdinfo of an io_uring"
            return int(found[1])
    return None


def skip_without_ring() -> None:
    one = ring.open_ring()
    if one is None:
        pytest.skip("missing: io_uring(7), which this kernel or container does not let us have")
    room = (ctypes.c_char * 100)()
    fd = tun.open_device("probe")
    try:
        if one.read(one.reads(fd, [ctypes.addressof(room)], 100), 1) == [-errno.EOPNOTSUPP]:
            pytest.skip("missing: TUNs that a ring can have, as from Linux 6.4 on")
    finally:
        os.close(fd)
        one.close()


def started(start: Start, *, io_uring: bool) -> tuple[Supervisor, int]:
    if io_uring:
        skip_without_ring()
    supervisor = start(io_uring=io_uring)
    (pid,) = worker_pids()
    assert (asked_of_rings(pid) is not None) == io_uring
    return supervisor, pid


def burst(pid: int, numbers: range) -> None:
    """So many datagrams, which wait for the worker together."""
    os.kill(pid, signal.SIGSTOP)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.connect((PEERS["tun0"], 9))
            for number in numbers:
                udp.send(struct.pack("!I", number) + bytes(number % 700))
    finally:
        os.kill(pid, signal.SIGCONT)


def until_carried(supervisor: Supervisor, until: Until) -> None:
    """A device that was just set up drops what comes before it has its carrier."""

    def carried() -> bool:
        send_udp(PEERS["tun0"], 1, 2)
        return "ipv4.udp" in supervisor.counters()["tun0"].from_kernel

    until(carried)


@WAYS
@OFFLOADS
def test_many_are_forwarded_whole_and_in_order(
    start: Start, until: Until, io_uring: bool, offloads: int | None
) -> None:
    supervisor, pid = started(start, io_uring=io_uring)
    vnet_hdr = offloads is not None
    attach(supervisor, "tun1", Work(vnet_hdr=vnet_hdr), offloads=offloads)
    attach(supervisor, "tun0", chain({"processor": "forward", "to": "tun1"}, vnet_hdr=vnet_hdr), offloads=offloads)
    until_carried(supervisor, until)
    with heard("tun1") as raw:
        for turn in range(3):
            numbers = range(turn * BURST, (turn + 1) * BURST)
            burst(pid, numbers)
            for number in numbers:
                packet = incoming(raw)
                while len(packet) == 28 + 2:  # what showed that there was a carrier
                    packet = incoming(raw)
                assert packet[28:] == struct.pack("!I", number) + bytes(number % 700)
    assert drops(supervisor, "tun0") == {}
    sent, got = (
        supervisor.counters()["tun0"].from_kernel["ipv4.udp"],
        supervisor.counters()["tun1"].to_kernel["ipv4.udp"],
    )
    assert sent == got
    if io_uring:
        asked = asked_of_rings(pid)
        assert asked is not None
        assert asked > 2 * BURST, "both reads and writes"


@WAYS
def test_what_a_device_that_is_down_refuses_is_counted(start: Start, until: Until, io_uring: bool) -> None:
    supervisor, pid = started(start, io_uring=io_uring)
    attach(supervisor, "tun1", Work())
    attach(supervisor, "tun0", chain({"processor": "forward", "to": "tun1"}))
    until_carried(supervisor, until)
    until(lambda: supervisor.counters()["tun1"].to_kernel)
    tun.set_down("tun1")
    burst(pid, range(BURST))

    def lost() -> int:
        return drops(supervisor, "tun0").get("output_down", 0)

    until(lambda: lost() >= BURST, what="output_down")
    came = supervisor.counters()["tun0"].from_kernel["ipv4.udp"][0]
    assert drops(supervisor, "tun0") == {"output_down": came - supervisor.counters()["tun1"].to_kernel["ipv4.udp"][0]}


@WAYS
def test_a_device_that_is_deleted_under_load_is_let_go_of(
    start: Start, until: Until, observed: Observed, io_uring: bool
) -> None:
    supervisor, pid = started(start, io_uring=io_uring)
    attach(supervisor, "tun1", Work())
    for _ in range(5):
        attach(supervisor, "tun0", chain({"processor": "forward", "to": "tun1"}))
        until_carried(supervisor, until)
        stop = threading.Event()

        def flood(stop: threading.Event = stop) -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                while not stop.is_set():
                    try:
                        udp.sendto(bytes(100), (PEERS["tun0"], 9))
                    except OSError as error:
                        if error.errno not in (errno.ENETUNREACH, errno.ENOBUFS, errno.EINVAL, errno.ENODEV):
                            raise

        flooding = _in_this_namespace(flood)
        try:
            until(lambda: supervisor.counters()["tun0"].from_kernel["ipv4.udp"][0] > 2000)
            observed.lost.clear()
            tun.delete("tun0")
            until(lambda: observed.lost, what="the supervisor is told")
        finally:
            stop.set()
            flooding.join(20)
        ((device, reason),) = observed.lost
        assert device == "tun0"
        assert reason.partition(":")[0] in ("EBADFD", "EFAULT", "ENODEV")
        last = supervisor.detach("tun0")
        assert last is not None
        assert last.from_kernel["ipv4.udp"][0] > 2000
    assert worker_pids() == [pid]
    assert observed.exits == []


def _in_this_namespace(work: "threading._Target") -> threading.Thread:  # type: ignore[name-defined]
    """A thread has the network namespace of the one that starts it (clone(2))."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@WAYS
@OFFLOADS
def test_a_burst_of_questions_is_answered_in_order(
    start: Start, until: Until, io_uring: bool, offloads: int | None
) -> None:
    supervisor, pid = started(start, io_uring=io_uring)
    work = chain({"processor": "reply", "networks": ["10.9.0.0/24"]}, vnet_hdr=offloads is not None)
    attach(supervisor, "tun0", work, offloads=offloads)
    until_carried(supervisor, until)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
        icmp.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE
        icmp.settimeout(5)
        os.kill(pid, signal.SIGSTOP)
        try:
            for number in range(BURST):
                message = struct.pack("!BBHHH", 8, 0, 0, 4711, number)
                icmp.sendto(message[:2] + _checksum(message) + message[4:], (PEERS["tun0"], 0))
        finally:
            os.kill(pid, signal.SIGCONT)
        for number in range(BURST):
            packet = icmp.recv(2000)
            assert (packet[20], struct.unpack_from("!HH", packet, 24)) == (0, (4711, number))
    if io_uring:
        assert (asked_of_rings(pid) or 0) > BURST // 2


def _checksum(message: bytes) -> bytes:
    total = sum(struct.unpack(f"!{len(message) // 2}H", message))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)
