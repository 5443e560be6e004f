"""Packets of the real kernel: parsed and counted by a worker, seen in the log, kept over restarts."""

import json
import os
import signal
import socket
import subprocess
from typing import Any

import pytest
from pyroute2.iproute.linux import IPRoute

from service.domain import events as ev
from service.domain.values import Mode
from service.kernel import tundev
from tests.e2e.harness import Service, eventually, links
from tests.e2e.test_restart import children

PEER = "10.0.0.2"


def send_udp(count: int, size: int = 100) -> None:
    """Datagrams to an address behind the TUN."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for _ in range(count):
            sender.sendto(b"x" * size, (PEER, 9))


def counters(service: Service) -> Any:
    """What `tunledger counters tun0` shows."""
    done = service.command("counters", "tun0", "--output", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["totals"]


def worker(service: Service, name: str) -> int:
    return int(counters(service)["worker"].get(name, 0))


def processing(service: Service) -> Service:
    service.ok("POST", "/api/interface/create")
    service.ok("POST", "/api/interface/start")
    return service


def test_ping_udp_and_tcp_are_counted_by_protocol(service: Service) -> None:
    processing(service.start())
    send_udp(7, 100)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as client:
        client.connect_ex((PEER, 80))
        eventually(lambda: worker(service, "from_kernel.ipv4.tcp.packets") >= 1, what="a SYN")
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.sendto(bytes.fromhex("0800f7fd00010001") + b"", (PEER, 0))
    eventually(lambda: worker(service, "from_kernel.ipv4.icmp.packets") == 1, what="a ping")
    assert worker(service, "from_kernel.ipv4.udp.packets") == 7
    assert worker(service, "from_kernel.ipv4.udp.bytes") == 7 * (20 + 8 + 100)


def test_the_real_ping_goes_through(service: Service) -> None:
    processing(service.start())
    try:
        subprocess.run(["ping", "-c", "3", "-i", "0.2", "-W", "1", PEER], capture_output=True, timeout=30, check=False)
    except FileNotFoundError:
        pytest.skip("missing: the program ping (iputils-ping)")
    eventually(lambda: worker(service, "from_kernel.ipv4.icmp.packets") == 3, what="three pings")


def test_packets_are_lines_at_debug_level(service: Service) -> None:
    service.environment |= {"TUNLEDGER_LOGGING__LEVEL": "debug", "TUNLEDGER_LOGGING__PACKETS_PER_S": "5"}
    processing(service.start())
    send_udp(50, 31)
    eventually(lambda: f"> {PEER}.9: UDP, length 31" in service.log.read_text(), what="a line for a packet")
    eventually(lambda: "suppressed" in service.log.read_text(), what="the number of packets not shown")
    assert service.log.read_text().count(f"> {PEER}.9: UDP") < 50


def test_totals_survive_recreation_restart_and_never_go_down(service: Service) -> None:
    processing(service.start())
    send_udp(10)
    eventually(lambda: worker(service, "from_kernel.ipv4.udp.packets") == 10, what="ten packets")
    first = counters(service)
    assert service.stop() == 0  # removes the interface: the kernel's counters start again
    service.start()
    second = counters(service)
    assert second["kernel"]["tx_packets"] >= first["kernel"]["tx_packets"]
    assert second["worker"]["from_kernel.ipv4.udp.packets"] == 10
    send_udp(5)
    eventually(lambda: worker(service, "from_kernel.ipv4.udp.packets") == 15, what="five more")
    shown = counters(service)
    service.kill()
    service.start()
    after = counters(service)
    for source in ("kernel", "worker"):
        for name, value in shown[source].items():
            assert after[source][name] >= value, f"{source} {name} went down"


def test_a_dead_worker_is_recorded_and_replaced(service: Service) -> None:
    processing(service.start())
    send_udp(4)
    eventually(lambda: worker(service, "from_kernel.ipv4.udp.packets") == 4, what="four packets")
    assert service.process is not None
    (victim,) = children(service.process.pid)
    os.kill(victim, signal.SIGKILL)
    eventually(
        lambda: (
            any(isinstance(e.body, ev.WorkerExited) for e in service.events())
            and service.status()["running"]
            and service.call("GET", "/health")[0] == 200
            and children(service.process.pid if service.process else 0) not in ([victim], [])
        ),
        5,
        "a new worker on the device",
    )
    (died,) = [e.body for e in service.events() if isinstance(e.body, ev.WorkerExited)]
    assert (died.pid, died.status, died.devices) == (victim, "signal SIGKILL", ["tun0"])
    send_udp(3)
    eventually(lambda: worker(service, "from_kernel.ipv4.udp.packets") == 7, what="three more")


def test_stop_lets_go_of_the_device_before_it_answers(service: Service) -> None:
    processing(service.start())
    service.ok("POST", "/api/interface/stop")
    fd = tundev.open_node()
    try:
        tundev.attach(fd, "tun0", Mode.TUN, multi_queue=False, exclusive=False)  # EBUSY if anyone held it
    finally:
        os.close(fd)


def test_an_interface_pulled_away_is_noticed_and_made_again(service: Service) -> None:
    service.environment["TUNLEDGER_RECONCILE__INTERVAL_S"] = "1"
    processing(service.start())
    index = links()["tun0"].ifindex
    with IPRoute() as host:  # type: ignore[no-untyped-call]  # pyroute2 has no types
        host.link("del", index=index)
    eventually(lambda: service.status()["index"] not in {0, index} and service.status()["running"], what="a new one")
    assert service.verification().problems == []
