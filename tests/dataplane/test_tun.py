"""Workers on real TUN and TAP devices, each test in a network namespace of its own."""

import errno
import os
import random
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from service.dataplane.supervisor import Supervisor
from tests.dataplane import tun
from tests.dataplane.conftest import Observed, StartSupervisor, Until
from tests.dataplane.test_supervisor import children, only_worker, packets, worker_pids

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("netns")]

ECHO_REQUEST = struct.pack("!BBHHH", 8, 0, 0xF7FF - 1, 0, 1)


def attach_new(supervisor: Supervisor, name: str, address: str, *, mode: str = "tun", persist: bool = False) -> str:
    fd = tun.open_device(name, mode=mode, persist=persist)
    tun.set_up(name, address)
    return supervisor.attach(name, fd, mode="tun" if mode == "tun" else "tap")


def figures(supervisor: Supervisor, device: str, name: str) -> tuple[int, int]:
    return supervisor.counters()[device].from_kernel.get(name, (0, 0))


def free(name: str) -> Callable[[], bool]:
    """Return whether the persistent TUN `name` can be opened; one fd at a time can be."""

    def check() -> bool:
        try:
            os.close(tun.open_device(name))
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    return check


def send_udp(address: str, count: int = 1, size_bytes: int = 100) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        for _ in range(count):
            udp.sendto(bytes(size_bytes), (address, 9))


def test_counts_what_the_kernel_sends(start_supervisor: StartSupervisor, until: Until) -> None:
    supervisor = start_supervisor()
    attach_new(supervisor, "tun0", "10.9.0.1")
    send_udp("10.9.0.2", 200)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
        icmp.sendto(ECHO_REQUEST, ("10.9.0.2", 0))
    until(lambda: figures(supervisor, "tun0", "ipv4.icmp") == (1, 28))
    until(lambda: figures(supervisor, "tun0", "ipv4.udp") == (200, 200 * 128))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tcp:
        tcp.setblocking(False)
        assert tcp.connect_ex(("10.9.0.2", 80)) == errno.EINPROGRESS
        until(lambda: figures(supervisor, "tun0", "ipv4.tcp")[0] == 1)


def test_a_tap_gives_frames(start_supervisor: StartSupervisor, until: Until) -> None:
    supervisor = start_supervisor()
    attach_new(supervisor, "tap0", "10.9.0.1", mode="tap")
    send_udp("10.9.0.2")  # asks for the address first, and nobody answers
    until(lambda: figures(supervisor, "tap0", "arp")[0] >= 1)


def test_garbage_from_a_packet_socket(start_supervisor: StartSupervisor, until: Until, observed: Observed) -> None:
    supervisor = start_supervisor(packet_log=observed.line, packets_per_s=1000)
    attach_new(supervisor, "tun0", "10.9.0.1")
    before = packets(supervisor, "tun0")  # the kernel sends some IPv6 of its own
    random_bytes = random.Random(1)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as raw:
        raw.bind(("tun0", 0x0800))
        for number in range(400):
            raw.send(random_bytes.choice([b"\x45", b"\x60", b""]) + random_bytes.randbytes(1 + number))
    until(lambda: packets(supervisor, "tun0") >= before + 400)
    assert any(name.startswith("malformed.") for name in supervisor.counters()["tun0"].from_kernel)
    assert observed.exits == []
    assert observed.lost == []


def test_detach_frees_the_device(start_supervisor: StartSupervisor, until: Until) -> None:
    supervisor = start_supervisor()
    attach_new(supervisor, "tun0", "10.9.0.1", persist=True)
    assert not free("tun0")()
    send_udp("10.9.0.2", 3)
    until(lambda: figures(supervisor, "tun0", "ipv4.udp")[0] == 3)
    final = supervisor.detach("tun0")
    assert free("tun0")()
    assert final is not None
    assert final.from_kernel["ipv4.udp"] == (3, 3 * 128)


def test_a_killed_worker_frees_the_device(start_supervisor: StartSupervisor, until: Until, observed: Observed) -> None:
    supervisor = start_supervisor()
    first = attach_new(supervisor, "tun0", "10.9.0.1", persist=True)
    os.kill(only_worker(), signal.SIGKILL)
    until(lambda: observed.exits, within_s=1.0)
    assert observed.exits[0].devices == {"tun0"}
    assert free("tun0")()
    assert supervisor.attach("tun0", tun.open_device("tun0"), mode="tun") != first
    send_udp("10.9.0.2", 3)
    until(lambda: figures(supervisor, "tun0", "ipv4.udp")[0] == 3)


def test_a_stopped_worker_cannot_keep_a_device(start_supervisor: StartSupervisor, until: Until) -> None:
    supervisor = start_supervisor()
    attach_new(supervisor, "tun0", "10.9.0.1", persist=True)
    os.kill(only_worker(), signal.SIGSTOP)
    assert supervisor.detach("tun0") is not None
    assert free("tun0")()


def test_a_device_deleted_under_the_worker(start_supervisor: StartSupervisor, until: Until, observed: Observed) -> None:
    supervisor = start_supervisor()
    attach_new(supervisor, "tun0", "10.9.0.1", persist=True)
    attach_new(supervisor, "tun1", "10.9.1.1", persist=True)
    tun.delete("tun0")
    until(lambda: observed.lost)
    assert observed.lost[0][0] == "tun0"
    assert observed.lost[0][1].split(":")[0] in {"EBADFD", "ENODEV", "EFAULT"}
    assert set(supervisor.attached()) == {"tun1"}
    send_udp("10.9.1.2", 5)
    until(lambda: figures(supervisor, "tun1", "ipv4.udp")[0] == 5)
    attach_new(supervisor, "tun0", "10.9.0.1")
    send_udp("10.9.0.2", 5)
    until(lambda: figures(supervisor, "tun0", "ipv4.udp")[0] == 5)
    assert observed.exits == []


def test_a_device_that_is_down_is_not_lost(start_supervisor: StartSupervisor, until: Until, observed: Observed) -> None:
    supervisor = start_supervisor()
    supervisor.attach("tun0", tun.open_device("tun0"), mode="tun")
    supervisor.healthy()  # the loop has turned since
    tun.set_up("tun0", "10.9.0.1")
    send_udp("10.9.0.2")
    until(lambda: figures(supervisor, "tun0", "ipv4.udp")[0] == 1)
    assert observed.lost == []


def test_a_hundred_devices(start_supervisor: StartSupervisor, until: Until, observed: Observed) -> None:
    supervisor = start_supervisor(workers=2)
    names = [f"tun{number}" for number in range(100)]
    for number, name in enumerate(names):
        attach_new(supervisor, name, f"10.8.{number}.1", persist=True)
    for number in range(100):
        send_udp(f"10.8.{number}.2", 1 + number % 7)
    for number, name in enumerate(names):
        until(lambda number=number, name=name: figures(supervisor, name, "ipv4.udp")[0] == 1 + number % 7)
    os.kill(worker_pids()[0], signal.SIGKILL)
    until(lambda: observed.exits, within_s=1.0)
    assert len(observed.exits[0].devices) == 50
    for name in observed.exits[0].devices:
        supervisor.attach(name, tun.open_device(name), mode="tun")
    assert set(supervisor.attached()) == set(names)
    for name in names:
        assert supervisor.detach(name) is not None
    assert all(free(name)() for name in names)


PARENT = """
import os, sys
from service.dataplane.supervisor import Supervisor
from tests.dataplane import tun
supervisor = Supervisor(workers=1, on_exit=print)
supervisor.start()
supervisor.attach("tun0", tun.open_device("tun0", persist=True), mode="tun")
print("attached", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_the_services_death_ends_its_workers(until: Until, stopped: bool) -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root
    ) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"attached\n"
            (worker,) = children(parent.pid)
            if stopped:  # it cannot see the end of control: only PDEATHSIG helps
                os.kill(worker, signal.SIGSTOP)
            assert not free("tun0")()
        finally:
            parent.kill()
        parent.wait(5)
        until(free("tun0"), within_s=1.0)
        until(lambda: not Path(f"/proc/{worker}/exe").exists(), within_s=1.0)
