"""The kernel as judge: what it hands over in segments, cut by us, is what the socket on the other side gets."""

import hashlib
import os
import select
import socket
import threading
from collections.abc import Callable

import pytest

from service.packet.segment import cut
from service.packet.vnet import VNET_HDR_BYTES, parse_vnet
from tests.dataplane.offloads import ALL_OFFLOADS, Sides, running, two_sides

pytestmark = pytest.mark.kernel

UDP_SEGMENT = 103  # linux/udp.h
ADDRESSES = {socket.AF_INET: "10.9.0.2", socket.AF_INET6: "fd00::2"}


def pump(sides: Sides, mode: str, seen: list[int]) -> Callable[[threading.Event], None]:
    """Near's segments cut and written far, far's packets written near with an empty header."""

    def work(stop: threading.Event) -> None:
        while not stop.is_set():
            readable, _, _ = select.select([sides.near, sides.far], [], [], 0.05)
            if sides.near in readable:
                read = os.read(sides.near, 70_000)
                header, packet = read[:VNET_HDR_BYTES], read[VNET_HDR_BYTES:]
                parts = cut(packet, header, "tun" if mode == "tun" else "tap")
                seen.append(parse_vnet(header).gso_type)
                for part in parts:
                    os.write(sides.far, part)
            if sides.far in readable:
                os.write(sides.near, bytes(VNET_HDR_BYTES) + os.read(sides.far, 70_000))

    return work


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("mode", ["tun", "tap"])
def test_tcp_segments_arrive_as_they_were_sent(mode: str, family: socket.AddressFamily) -> None:
    data = os.urandom(3_000_000)
    seen: list[int] = []
    digest = hashlib.sha256()
    with (
        two_sides(mode, ALL_OFFLOADS) as sides,
        socket.create_server((ADDRESSES[family], 80), family=family) as server,
        running(pump(sides, mode, seen)),
    ):
        with sides.near_side():
            near = socket.socket(family, socket.SOCK_STREAM)
        with near:
            near.settimeout(20)
            near.connect((ADDRESSES[family], 80))
            far, _ = server.accept()

            def send(_stop: threading.Event) -> None:
                near.sendall(data)
                near.shutdown(socket.SHUT_WR)

            with far, running(send):
                far.settimeout(20)
                while piece := far.recv(1 << 16):
                    digest.update(piece)
    assert digest.digest() == hashlib.sha256(data).digest()
    assert (1 if family == socket.AF_INET else 4) in seen


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_udp_segments_arrive_as_datagrams(family: socket.AddressFamily) -> None:
    data = os.urandom(20_500)
    seen: list[int] = []
    with two_sides("tun", ALL_OFFLOADS) as sides, socket.socket(family, socket.SOCK_DGRAM) as far:
        far.bind((ADDRESSES[family], 53))
        far.settimeout(20)
        with running(pump(sides, "tun", seen)):
            with sides.near_side():
                near = socket.socket(family, socket.SOCK_DGRAM)
            with near:
                near.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)
                near.sendto(data, (ADDRESSES[family], 53))
                got = [far.recv(2000) for _ in range(21)]
    assert b"".join(got) == data
    assert [len(datagram) for datagram in got] == [1000] * 20 + [500]
    assert 5 in seen
