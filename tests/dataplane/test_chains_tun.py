"""Chains on real TUNs: what the kernel hands over and takes, with offloads and without, while chains change."""

import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.dataplane.errors import DataplaneError
from service.dataplane.supervisor import Supervisor
from service.dataplane.work import Work
from service.packet.checksum import ones_complement_sum
from tests.dataplane import tun
from tests.dataplane.conftest import Observed, Until
from tests.dataplane.test_chains import COUNT, Start, chain, drops, start
from tests.dataplane.test_supervisor import worker_pids
from tests.dataplane.test_tun import send_udp

__all__ = ["start"]

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("netns")]

PEERS = {"tun0": "10.9.0.2", "tun1": "10.9.1.2"}


def attach(supervisor: Supervisor, name: str, work: Work, *, offloads: int | None = None, mtu: int = 1500) -> None:
    fd = tun.open_device(name, offloads=offloads)
    tun.set_mtu(name, mtu)
    address = PEERS.get(name, "10.9.9.2")
    tun.set_up(name, address[:-1] + "1")
    supervisor.attach(name, fd, mode="tun", work=work)


@contextmanager
def heard(name: str) -> Iterator[socket.socket]:
    """What comes out of a device towards the host, as a packet socket sees it."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as raw:
        raw.bind((name, 0x0800))
        raw.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE (asm-generic/socket.h)
        raw.settimeout(5)
        yield raw


def incoming(raw: socket.socket) -> bytes:
    while True:
        data, (_, _, kind, *_) = raw.recvfrom(70_000)
        if kind == socket.PACKET_HOST:
            return data


def send_segmented(address: str, octets: bytes, size: int) -> None:
    """One send that the kernel makes UDP datagrams of `size` from: a segment where offloads allow."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.setsockopt(socket.SOL_UDP, 103, size)  # UDP_SEGMENT (linux/udp.h)
        udp.sendto(octets, (address, 9))


def segment_sizes(bare: int) -> set[int]:
    """The lengths in which three datagrams that are sent as one segment reach who reads tun0."""
    poll = select.poll()
    poll.register(bare, select.POLLIN)
    sizes: set[int] = set()
    for _ in range(100):  # the device has just got its carrier: what comes too soon is dropped
        send_segmented(PEERS["tun0"], bytes(3000), 1000)
        while not sizes and poll.poll(100):
            sizes |= {len(os.read(bare, 70_000))} & {1028, 3028}
        if sizes:
            break
    return sizes


def udp_payload(packet: bytes) -> bytes:
    """The payload, once the checksum is shown to be right."""
    pseudo = packet[12:20] + struct.pack("!HH", 17, len(packet) - 20)
    assert ones_complement_sum(pseudo + packet[20:], 0) == 0xFFFF
    return packet[28:]


@pytest.mark.parametrize("processor", ["forward", "send"], ids=["takes segments", "has them cut"])
@pytest.mark.parametrize("target_offloads", [tun.ALL_OFFLOADS, None], ids=["to offloads", "to none"])
def test_segments_arrive_whole_wherever_they_are_sent(
    start: Start, until: Until, processor: str, target_offloads: int | None
) -> None:
    supervisor = start()
    to = chain({"processor": processor, "to": "tun1"}, vnet_hdr=True)
    attach(supervisor, "tun1", Work(vnet_hdr=target_offloads is not None), offloads=target_offloads)
    octets = os.urandom(30 * 1000)
    with heard("tun1") as raw:
        attach(supervisor, "tun0", to, offloads=tun.ALL_OFFLOADS)
        send_segmented(PEERS["tun0"], octets, 1000)
        until(lambda: "ipv4.udp" in supervisor.counters()["tun0"].from_kernel)
        assert supervisor.counters()["tun0"].from_kernel["ipv4.udp"] == (1, 30_028), "the kernel made one segment"
        got = b""
        while len(got) < len(octets):
            packet = incoming(raw)
            if processor == "forward" and target_offloads is not None:
                got += packet[28:]
                assert len(packet) == 30_028, "and took it as one"
            else:
                got += udp_payload(packet)
        assert got == octets
    assert drops(supervisor, "tun0") == {}


def test_a_partial_checksum_is_finished_for_who_takes_none(start: Start, until: Until) -> None:
    supervisor = start()
    attach(supervisor, "tun1", Work())
    with heard("tun1") as raw:
        attach(
            supervisor, "tun0", chain({"processor": "forward", "to": "tun1"}, vnet_hdr=True), offloads=tun.ALL_OFFLOADS
        )
        send_udp(PEERS["tun0"], 1, 101)
        assert udp_payload(incoming(raw)) == bytes(101)


@pytest.mark.parametrize("before", [(), (COUNT,)], ids=["as they were read", "made plain"])
def test_headers_that_a_processor_releases_are_its_own(
    start: Start, until: Until, observed: Observed, before: tuple[dict[str, Any], ...]
) -> None:
    supervisor = start()
    for name, last in (("tun0", "tidy"), ("tun1", "inspect")):
        work = chain(*before, {"processor": last}, vnet_hdr=True)
        attach(supervisor, name, work, offloads=tun.ALL_OFFLOADS)

    def taken(name: str) -> int:
        return supervisor.counters()[name].from_kernel.get("ipv4.udp", (0, 0))[0]

    for number in (1, 2):
        for name in ("tun0", "tun1"):
            send_udp(PEERS[name])
            until(lambda name=name, number=number: observed.exits or taken(name) == number)
    until(lambda: observed.exits or supervisor.stages("tun1")[-1].packets_out >= 2)
    assert observed.exits == []


def test_offloads_are_taken_back_when_a_worker_lets_go(start: Start, until: Until) -> None:
    supervisor = start()
    for _ in range(2):
        fd = tun.open_device("tun0", persist=True, offloads=tun.ALL_OFFLOADS)
        tun.set_up("tun0", "10.9.0.1")
        supervisor.attach("tun0", fd, mode="tun", work=Work(vnet_hdr=True))
        assert supervisor.detach("tun0") is not None
        bare = tun.open_device("tun0")
        assert segment_sizes(bare) == {1028}, "the next reader gets no segments"
        os.close(bare)


def test_offloads_that_a_killed_worker_left_are_taken_back_where_no_other_one_takes_the_device(
    start: Start, until: Until, observed: Observed
) -> None:
    supervisor = start()
    fd = tun.open_device("tun0", persist=True, offloads=tun.ALL_OFFLOADS)
    tun.set_up("tun0", "10.9.0.1")
    supervisor.attach("tun0", fd, mode="tun", work=chain(COUNT, vnet_hdr=True))
    os.kill(worker_pids()[0], signal.SIGKILL)
    until(lambda: observed.exits)
    again = tun.open_device("tun0", offloads=tun.ALL_OFFLOADS)
    with pytest.raises(DataplaneError, match="picky"):
        supervisor.attach("tun0", again, mode="tun", work=chain({"processor": "picky"}, vnet_hdr=True))
    bare = tun.open_device("tun0")
    assert segment_sizes(bare) == {1028}, "the next reader gets no segments"
    os.close(bare)


def test_offloads_are_taken_back_from_a_worker_that_is_killed_for_not_letting_go(start: Start) -> None:
    supervisor = start()
    for name in ("tun1", "tun0"):
        fd = tun.open_device(name, persist=True, offloads=tun.ALL_OFFLOADS)
        tun.set_up(name, PEERS[name][:-1] + "1")
        supervisor.attach(name, fd, mode="tun", work=Work(vnet_hdr=True))
    os.kill(worker_pids()[0], signal.SIGSTOP)
    assert supervisor.detach("tun0") is not None
    bare = tun.open_device("tun0")
    assert segment_sizes(bare) == {1028}, "the next reader gets no segments"
    os.close(bare)


def test_no_packet_is_lost_while_chains_change(start: Start, until: Until, observed: Observed) -> None:
    supervisor = start(workers=2)
    attach(supervisor, "tun1", Work())
    attach(supervisor, "tun0", chain(COUNT))
    total = 20_000
    done = threading.Event()

    def send() -> None:
        # As many at a time as the queue takes, so that whatever is lost is ours.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            for number in range(total):
                if number % 400 == 0:
                    until(lambda number=number: read() >= number, within_s=20)
                udp.sendto(struct.pack("!I", number), (PEERS["tun0"], 9))
        done.set()

    def read() -> int:
        counters = supervisor.counters().get("tun0")
        return 0 if counters is None else counters.from_kernel.get("ipv4.udp", (0, 0))[0]

    forward = {"processor": "forward", "to": "tun1"}
    chains = [chain(COUNT, forward), chain(forward), chain({"processor": "drop", "first": 0x45}, COUNT, forward)]
    with heard("tun1") as raw:
        supervisor.configure("tun0", chains[0])  # brings the two together
        sender = threading.Thread(target=send)
        sender.start()
        changes = 0
        while not done.is_set():
            supervisor.configure("tun0", chains[changes % 3])
            changes += 1
        sender.join()
        until(lambda: read() == total)
        seen = 0
        while seen < total:
            (number,) = struct.unpack("!I", incoming(raw)[28:])
            assert number == seen, "each one, once, in order"
            seen += 1
    assert changes > 10
    assert observed.exits == []


def test_an_output_that_is_down_is_seen_and_taken_up_again(start: Start, until: Until) -> None:
    supervisor = start()
    attach(supervisor, "tun1", Work())
    attach(supervisor, "tun0", chain({"processor": "send", "to": "tun1"}))
    send_udp(PEERS["tun0"])
    until(lambda: "ipv4.udp" in supervisor.counters()["tun1"].to_kernel)
    tun.set_down("tun1")
    send_udp(PEERS["tun0"], 3)
    until(lambda: drops(supervisor, "tun0").get("output_down") == 3)
    tun.set_up("tun1")
    send_udp(PEERS["tun0"])
    until(lambda: supervisor.counters()["tun1"].to_kernel["ipv4.udp"][0] == 2)


def test_packets_as_large_as_a_tun_can_have(start: Start, until: Until) -> None:
    supervisor = start()
    attach(supervisor, "tun1", Work(mtu=65_535), mtu=65_535)
    attach(supervisor, "tun0", chain({"processor": "echo"}, mtu=65_535), mtu=65_535)
    send_udp(PEERS["tun0"], 2, 65_507)
    until(lambda: supervisor.counters()["tun0"].to_kernel.get("ipv4.udp") == (2, 2 * 65_535))
    assert supervisor.counters()["tun0"].from_kernel["ipv4.udp"] == (2, 2 * 65_535)


def test_attaching_changing_and_letting_go_leaks_no_descriptor(start: Start, until: Until) -> None:
    supervisor = start(workers=2)

    def held() -> list[int]:
        return [len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in (os.getpid(), *sorted(worker_pids()))]

    def round_trip() -> None:
        attach(supervisor, "tun0", chain(COUNT))
        attach(supervisor, "tun1", Work())
        supervisor.configure("tun0", chain(COUNT, {"processor": "forward", "to": "tun1"}))
        supervisor.configure("tun0", chain({"processor": "inspect", "flows": 64, "packets": 4}))
        with pytest.raises(DataplaneError):
            supervisor.configure("tun0", chain({"processor": "inspect", "flows": 65}, {"processor": "picky"}))
        pipe = os.pipe()
        tap = supervisor.tap("tun0", {"processor": "sink"}, [pipe[1]])
        supervisor.feed("tun0", tap, pipe[1])
        supervisor.untap("tun0", tap)
        with pytest.raises(DataplaneError):
            supervisor.tap("tun0", {"processor": "picky"}, [pipe[1]])
        for fd in pipe:
            os.close(fd)
        for name in ("tun0", "tun1"):
            supervisor.detach(name)

    round_trip()
    before = held()
    for _ in range(5):
        round_trip()
    assert held() == before


@pytest.mark.full
def test_a_thousand_devices_with_a_trickle_each(start: Start, until: Until, observed: Observed) -> None:
    supervisor = start(workers=2)
    names = [f"tun{number}" for number in range(1000)]
    for number, name in enumerate(names):
        fd = tun.open_device(name, offloads=tun.ALL_OFFLOADS, persist=True)  # else each takes 20 ms to go
        tun.set_up(name, f"10.{10 + number // 250}.{number % 250}.1")
        supervisor.attach(name, fd, mode="tun", work=chain(COUNT, vnet_hdr=True))
    for _ in range(5):
        for number in range(1000):
            send_udp(f"10.{10 + number // 250}.{number % 250}.2")
    counters: dict[str, Any] = {}

    def all_counted() -> bool:
        counters.update(supervisor.counters())
        return all(counters[name].from_kernel.get("ipv4.udp", (0, 0))[0] == 5 for name in names)

    until(all_counted, within_s=20)
    assert supervisor.healthy() == []
    assert observed.exits == []
