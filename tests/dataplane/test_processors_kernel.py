"""Our processors in real workers, on real devices, with the kernel's own traffic."""

import hashlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from service.dataplane.contract import Mode
from service.dataplane.flowtable import FlowTableReader
from service.dataplane.supervisor import Supervisor
from service.dataplane.work import Work
from tests.dataplane.conftest import Observed, StartSupervisor, Until
from tests.dataplane.offloads import ALL_OFFLOADS, open_device, running, set_up, two_sides
from tests.namespace import fresh_namespace

pytestmark = pytest.mark.kernel


def work(*stages: dict[str, Any], offloads: bool = False) -> Work:
    chain = tuple({"on_crash": "restart", **stage} for stage in stages)
    return Work(chain=chain, mtu=1500, vnet_hdr=offloads, offloads="auto" if offloads else "off")


@contextmanager
def device(supervisor: Supervisor, mode: str, doing: Work) -> Iterator[None]:
    with fresh_namespace():
        fd = open_device("dev0", mode)
        set_up("dev0", "10.7.0.1", "fd00::1")
        supervisor.attach("dev0", fd, mode="tun" if mode == "tun" else "tap", name="dev0", work=doing)
        yield
        supervisor.detach("dev0")


REPLY = {"processor": "reply", "networks": ["10.7.0.0/16", "10.64.0.0/20", "fd00::/64"]}


def ask(raw: socket.socket, addresses: list[str]) -> set[str]:
    """Ping all of them, a hundred at a time; who answered."""
    request = struct.pack("!BBHHH", 8, 0, 0xF7FF - 7, 7, 0)
    if raw.family == socket.AF_INET6:
        request = struct.pack("!BBHHH", 128, 0, 0, 7, 0)  # the kernel fills in the checksum (RFC 3542, 3.1)
    raw.settimeout(5)
    answered = set()
    for start in range(0, len(addresses), 100):
        part = addresses[start : start + 100]
        for address in part:
            raw.sendto(request, (address, 0))
        wanted = set(part)
        while wanted:
            message, (sender, *_) = raw.recvfrom(2048)
            if raw.family == socket.AF_INET:
                message = message[20:]
            if message[0] in (0, 129) and message[4:6] == b"\0\7":
                answered.add(sender)
                wanted.discard(sender)
    return answered


def route(network: str) -> None:
    """`ip route add NETWORK/20 dev dev0`, by SIOCADDRT: struct rtentry (linux/route.h)."""
    import ctypes
    import fcntl

    name = ctypes.create_string_buffer(b"dev0")
    to, mask = (struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(text)) for text in (network, "255.255.240.0"))
    entry = struct.pack("L16s16s16sHhLPhPLLH6x", 0, to, bytes(16), mask, 1, 0, 0, 0, 0, ctypes.addressof(name), 0, 0, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x890B, entry)


def test_a_lab_of_4096_hosts_answers(start_supervisor: StartSupervisor) -> None:
    with device(start_supervisor(), "tun", work(REPLY)):
        route("10.64.0.0")
        addresses = [f"10.64.{number >> 8}.{number & 255}" for number in range(4096)]
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
            assert ask(raw, addresses) == set(addresses)


@pytest.mark.parametrize("mode", ["tun", "tap"])
def test_hosts_that_are_not_there_answer_in_both_families(
    mode: str, start_supervisor: StartSupervisor, until: Until
) -> None:
    supervisor = start_supervisor()
    with device(supervisor, mode, work(REPLY)):
        for family, protocol, form in (
            (socket.AF_INET, socket.IPPROTO_ICMP, "10.7.0.{}"),
            (socket.AF_INET6, socket.IPPROTO_ICMPV6, "fd00::{}"),
        ):
            addresses = [form.format(number) for number in range(10, 40)]
            with socket.socket(family, socket.SOCK_RAW, protocol) as raw:
                assert ask(raw, addresses) == set(addresses)
        wanted = ["answered_icmp", "answered_icmpv6", *(["answered_arp", "answered_ndp"] if mode == "tap" else [])]

        def counted() -> dict[str, int]:
            (status,) = supervisor.stages("dev0")
            return {figure: count for figure, count in status.figures.items() if count}

        until(lambda: counted() == dict.fromkeys(wanted, 30))


def test_what_inspect_counts_is_read_while_the_worker_goes_on(start_supervisor: StartSupervisor, until: Until) -> None:
    supervisor = start_supervisor()
    with device(supervisor, "tun", work({"processor": "inspect", "flows": 64, "packets": 16}, REPLY)):
        reader = FlowTableReader(supervisor.stage_memory("dev0")[0])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.bind(("10.7.0.1", 5000))
            for number in range(100):
                udp.sendto(bytes(100), (f"10.7.0.{100 + number % 4}", 9))
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
            ask(raw, ["10.7.0.9"])
        until(lambda: reader.totals().from_kernel.get("ipv4.udp") == (100, 100 * 128))
        until(lambda: reader.totals().to_kernel.get("ipv4.icmp") == (1, 28))
        rows = {(row.ends.protocol, row.ends.second): row for row in reader.rows()}
        assert [rows[17, bytes([10, 7, 0, 100 + host])].packets_there for host in range(4)] == [25] * 4
        ping = rows[1, bytes([10, 7, 0, 9])]
        assert (ping.packets_there, ping.packets_back) == (1, 1)
        assert {head.direction for head in reader.packets()} == {"from_kernel", "to_kernel"}
        reader.release()


@pytest.mark.parametrize("stage", ["forward", "balance"])
@pytest.mark.parametrize("offloads", [False, True], ids=["plain", "offloads"])
@pytest.mark.parametrize("mode", ["tun", "tap"])
def test_tcp_arrives_as_it_was_sent(
    mode: str, offloads: bool, stage: str, start_supervisor: StartSupervisor, observed: Observed
) -> None:
    data = os.urandom(2_000_000)
    digest = hashlib.sha256()
    supervisor = start_supervisor()
    asked = ALL_OFFLOADS if offloads else None
    known: Mode = "tun" if mode == "tun" else "tap"

    def to(name: str) -> Work:
        send = {"to": name} if stage == "forward" else {"to": [{"to": name, "weight": 1}], "symmetric": True}
        return work({"processor": stage, **send}, offloads=offloads)

    with two_sides(mode, asked, asked) as sides, socket.create_server(("10.9.0.2", 80)) as server:
        supervisor.attach("near0", os.dup(sides.near), mode=known, name="near0", work=to("far0"))
        supervisor.attach("far0", os.dup(sides.far), mode=known, name="far0", work=to("near0"))
        with sides.near_side():
            near = socket.socket()
        with near:
            near.settimeout(20)
            near.connect(("10.9.0.2", 80))
            far, _ = server.accept()

            def send(_stop: threading.Event) -> None:
                near.sendall(data)
                near.shutdown(socket.SHUT_WR)

            with far, running(send):
                far.settimeout(20)
                while piece := far.recv(1 << 16):
                    digest.update(piece)
        supervisor.detach("near0")
        supervisor.detach("far0")
    assert digest.digest() == hashlib.sha256(data).digest()
    assert observed.exits == []
