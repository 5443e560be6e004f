"""What people see of packets, end to end: captures that tcpdump reads, live and from files, and packets in words."""

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.domain import events as ev
from service.packet.pcapng import Captured, Reader
from tests.e2e.harness import ROOT, Service, eventually

PEER = "10.0.0.2"
BASE = "/api/v1/interfaces/tun0"
ECHO = bytes.fromhex("0800f7fd00010001")

needs_tcpdump = pytest.mark.skipif(shutil.which("tcpdump") is None, reason="missing: tcpdump")
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="missing: curl")
needs_ping = pytest.mark.skipif(shutil.which("ping") is None, reason="missing: ping (iputils-ping)")


@pytest.fixture
def running(service: Service) -> Service:
    """A service with tun0, read by a worker."""
    service.start()
    spec = {"name": "tun0", "addresses": ["10.0.0.1/24"], "processing": {"running": True}}
    assert service.call("POST", "/api/v1/interfaces", spec)[0] == 201
    return service


def ping(count: int = 1) -> None:
    """Echo requests to an address behind the TUN; nobody answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        for _ in range(count):
            raw.sendto(ECHO, (PEER, 0))


@contextlib.contextmanager
def pinging() -> Iterator[None]:
    """One after the other: a capture is in the log before it is in the worker, and has no packets until then."""
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.02):
            ping()

    thread = threading.Thread(target=work)  # in this namespace too
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def url(service: Service, path: str) -> str:
    return f"http://127.0.0.1:{service.port}{path}"


def fetched(service: Service, path: str) -> bytes:
    done = subprocess.run(["curl", "-sfN", url(service, path)], capture_output=True, check=False)
    assert done.returncode == 0, (path, done.stderr)
    return done.stdout


def told(service: Service) -> list[Any]:
    return [event.body for event in service.events() if type(event.body).__name__.startswith("Capture")]


@needs_curl
@needs_tcpdump
def test_tcpdump_reads_the_live_stream_and_its_end_ends_the_capture(running: Service) -> None:
    with subprocess.Popen(
        ["sh", "-c", f"curl -sN {url(running, BASE)}/capture/stream | tcpdump -r - -n -c 2 -l icmp"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as pipeline:
        eventually(lambda: len(told(running)) == 1, what="the capture in the log")
        assert pipeline.stdout is not None
        with pinging():
            lines = [pipeline.stdout.readline() for _ in range(2)]
        assert all("IP 10.0.0.1 > 10.0.0.2: ICMP echo request, id 1, seq 1, length 8" in line for line in lines)

        def over() -> bool:
            ping()  # curl hears of tcpdump's end when it has something to write
            return len(told(running)) == 2

        eventually(over, what="the end of the capture")
    started, stopped = told(running)
    assert started.live
    assert (stopped.reason, stopped.capture_id) == ("client_gone", started.capture_id)
    assert stopped.packets >= 2


@needs_curl
@needs_tcpdump
def test_a_capture_rotates_is_fetched_while_it_is_written_and_stays_until_it_is_deleted(
    running: Service, tmp_path: Path
) -> None:
    status, capture = running.call("POST", f"{BASE}/captures", {"size_bytes": 4096, "files": 3})
    assert status == 201, capture
    where = f"{BASE}/captures/{capture['id']}"
    ping(5)
    eventually(lambda: running.ok("GET", where)["packets"] == 5, what="5 packets")
    path = tmp_path / "x.pcapng"
    path.write_bytes(fetched(running, f"{where}/files/0"))
    read = subprocess.run(["tcpdump", "-n", "-r", path], capture_output=True, text=True, check=True).stdout
    assert len(read.splitlines()) == 5
    for _ in range(5):  # more than 4,096 octets each
        ping(60)
        eventually(lambda: running.ok("GET", where)["packets"] % 60 == 5, what="60 packets")
    found = eventually(lambda: [f["number"] for f in running.ok("GET", where)["files"]][-3:], what="files")
    assert len(found) <= 3
    assert found[-1] >= 2, "a new file was begun"
    stopped = running.ok("POST", f"{where}/stop")
    assert (stopped["state"], stopped["reason"], stopped["dropped"]) == ("stopped", "asked", 0)
    kept = [packet for number in found for packet in read_back(fetched(running, f"{where}/files/{number}"))]
    assert {packet.packet[20:] for packet in kept} == {ECHO}
    assert running.ok("DELETE", where) == {"id": capture["id"], "deleted": True}
    assert list((Path(running.database).parent / "captures").iterdir()) == []


def read_back(octets: bytes) -> list[Captured]:
    return list(Reader().feed(octets))


@needs_curl
def test_a_killed_service_says_at_its_next_start_that_its_captures_ended(running: Service) -> None:
    _, capture = running.call("POST", f"{BASE}/captures", {})
    ping(3)
    where = f"{BASE}/captures/{capture['id']}"
    eventually(lambda: running.ok("GET", where)["packets"] == 3, what="3 packets")
    running.kill()
    running.start()
    eventually(lambda: len(told(running)) == 2, what="the end of the capture")
    assert told(running)[-1].reason == "crash"
    found = eventually(lambda: running.ok("GET", where), what="the capture")
    assert (found["state"], found["reason"]) == ("stopped", "crash")
    assert len(read_back(fetched(running, f"{where}/files/0"))) == 3


def test_a_capture_ends_with_the_processing_of_its_interface(running: Service) -> None:
    capture = running.call("POST", f"{BASE}/captures", {})[1]
    ping(2)
    eventually(lambda: running.ok("GET", f"{BASE}/captures/{capture['id']}")["packets"] == 2, what="2 packets")
    running.ok("POST", f"{BASE}/stop")
    eventually(lambda: len(told(running)) == 2, what="the end of the capture")
    assert (told(running)[-1].reason, told(running)[-1].packets) == ("interface_gone", 2)
    status, problem = running.call("POST", f"{BASE}/captures", {})
    assert (status, problem["code"]) == (409, "not_running")


def workers(service: Service) -> list[int]:
    """The worker processes that are up."""
    assert service.process is not None
    found: list[int] = []
    for task in Path(f"/proc/{service.process.pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a thread that ended meanwhile
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return [pid for pid in found if Path(f"/proc/{pid}/comm").read_text().startswith("tunledger-dp")]


def test_without_a_number_of_workers_there_is_one_for_each_processor(service: Service) -> None:
    service.start(TUNLEDGER_DATAPLANE__WORKERS="0")
    eventually(lambda: len(workers(service)) == len(os.sched_getaffinity(0)), what="a worker for each processor")
    assert service.call("GET", "/health")[0] == 200


@needs_curl
@needs_ping
def test_captures_that_a_killed_worker_takes_along_say_so_and_have_what_is_in_their_files(running: Service) -> None:
    stage = {"processor": "capture", "files": 3}
    assert running.call("PATCH", BASE, {"processing": {"chain": [stage]}})[0] == 200
    running.call("POST", f"{BASE}/captures", {})
    with subprocess.Popen(["curl", "-sN", url(running, f"{BASE}/capture/stream")], stdout=subprocess.DEVNULL) as curl:
        try:
            eventually(lambda: len(told(running)) == 3, what="three captures")
            sent = 0

            def counts() -> list[int]:
                return [each["packets"] for each in running.ok("GET", f"{BASE}/captures")["captures"]]

            while 0 in counts():  # the stream is in the log before it is in the worker
                ping()
                sent += 1
            eventually(lambda: counts()[:2] == [sent, sent], what="all packets in the first two")
            packets = counts()
            (pid,) = workers(running)
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: len(told(running)) >= 6, what="the ends of three captures")
            assert curl.wait(20) == 0, "the stream ends"
        finally:
            curl.kill()
    ends = [body for body in told(running) if isinstance(body, ev.CaptureStopped)]
    assert sorted((end.reason, end.packets) for end in ends) == [("worker_exit", each) for each in sorted(packets)]
    # Its next worker has the stage in a capture of its own; taking it out of the chain ends that with all it wrote.
    found = eventually(
        lambda: [each for each in running.ok("GET", f"{BASE}/captures")["captures"] if each["stage"] == 0], what="anew"
    )
    with subprocess.Popen(["ping", "-f", "-q", "-w", "20", PEER], stdout=subprocess.DEVNULL) as pinging:
        try:
            where = f"{BASE}/captures/{found[0]['id']}"
            eventually(lambda: running.ok("GET", where)["packets"] > 100, 20, "packets")
            assert running.call("PATCH", BASE, {"processing": {"chain": []}})[0] == 200
        finally:
            pinging.terminate()
    end = eventually(lambda: [b for b in told(running) if b.capture_id == found[0]["id"]][1:], what="its end")[0]
    assert (end.reason, end.packets) == ("asked", len(read_back(fetched(running, f"{where}/files/0"))))


def test_tail_reads_like_tcpdump(running: Service) -> None:
    tail = tunledger(running, "tail", "tun0", "-c", "3")
    eventually(lambda: len(told(running)) == 1, what="the tail in the log")
    with pinging():
        lines = tail.communicate(timeout=20)[0].splitlines()
    assert len(lines) == 3
    for line in lines:
        clock, _, rest = line.partition(" ")
        assert rest == "IP 10.0.0.1 > 10.0.0.2: ICMP echo request, id 1, seq 1, length 8"
        assert len(clock) == len("12:00:00.000000")
    assert tail.returncode == 0
    eventually(lambda: len(told(running)) == 2, what="the end of the tail")


def tunledger(service: Service, *arguments: str) -> "subprocess.Popen[str]":
    """The command line, under way."""
    return subprocess.Popen(
        [sys.executable, "-m", "service", *arguments],
        env=service.environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_orderly_stop_ends_streams_and_tells_of_captures(running: Service) -> None:
    running.call("POST", f"{BASE}/captures", {})
    with subprocess.Popen(["curl", "-sN", url(running, f"{BASE}/capture/stream")], stdout=subprocess.PIPE) as curl:
        eventually(lambda: len(told(running)) == 2, what="two captures")
        assert running.stop(signal.SIGTERM) == 0
        assert curl.stdout is not None
        head = curl.stdout.read()
    assert head[:4] == bytes.fromhex("0a0d0d0a")
    assert [body.reason for body in told(running)[2:]] == ["shutdown", "shutdown"]


@needs_curl
def test_a_file_goes_through_two_interfaces_into_another_namespace_and_comes_whole(
    service: Service, tmp_path: Path
) -> None:
    """here: tun0 10.1.0.1 -> worker -> tun1 10.1.0.2: there, and back."""
    there = f"tlfwd{service.port}{tmp_path.name[-6:]}".replace("_", "")[:30]
    subprocess.run(["ip", "netns", "add", there], check=True)
    try:
        subprocess.run(["ip", "-n", there, "link", "set", "lo", "up"], check=True)
        service.start()
        for name, to, address, netns in (("tun0", "tun1", "10.1.0.1/24", None), ("tun1", "tun0", "10.1.0.2/24", there)):
            chain = [{"processor": "inspect"}, {"processor": "forward", "to": to}]
            spec = {"name": name, "addresses": [address], "netns": netns}
            processing = {"running": True, "chain": chain}
            assert service.call("POST", "/api/v1/interfaces", {**spec, "processing": processing})[0] == 201
        folder = tmp_path / "files"
        folder.mkdir()
        octets = bytes(range(256)) * 40_000  # 10 MB
        (folder / "x").write_bytes(octets)
        command = ["ip", "netns", "exec", there, sys.executable, "-m", "http.server", "8000", "--bind", "10.1.0.2"]
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
            try:
                got = eventually(
                    lambda: (
                        subprocess.run(
                            ["curl", "-sf", "--max-time", "60", "http://10.1.0.2:8000/x"],
                            capture_output=True,
                            check=False,
                        ).stdout
                    ),
                    30,
                    "the file",
                )
            finally:
                server.terminate()
        assert hashlib.sha256(got).digest() == hashlib.sha256(octets).digest()

        def the_flow() -> list[Any]:
            found = service.ok("GET", f"{BASE}/flows")["flows"]
            return [flow for flow in found if flow["returned"]["bytes"] > len(octets)]

        (flow,) = eventually(the_flow, what="the flow")
        assert (flow["protocol"], flow["second"]) == ("tcp", {"address": "10.1.0.2", "port": 8000})
        for name in ("tun0", "tun1"):
            assert service.call("DELETE", f"/api/v1/interfaces/{name}")[0] == 200
    finally:
        subprocess.run(["ip", "netns", "delete", there], check=False)


def slice_ns(thread: int) -> int:
    """What the kernel says of a thread's slices (sched_getattr(2)); 0 where it does not know any."""
    numbers = {"x86_64": 315, "aarch64": 275}
    attr = ctypes.create_string_buffer(48)
    if platform.machine() not in numbers or ctypes.CDLL(None).syscall(numbers[platform.machine()], thread, attr, 48, 0):
        return 0
    return int.from_bytes(attr.raw[24:32], sys.byteorder)


def test_a_worker_keeps_a_processor_as_long_as_others_and_the_services_threads_are_let_in_sooner(
    running: Service,
) -> None:
    usual = slice_ns(os.getpid())
    if usual == 0:
        pytest.skip("missing: slices of the processor (Linux 6.12)")
    assert running.process is not None
    threads = [int(each.name) for each in Path(f"/proc/{running.process.pid}/task").iterdir()]
    children = [
        int(child) for thread in threads for child in Path(f"/proc/{thread}/task/{thread}/children").read_text().split()
    ]
    assert children
    assert len(threads) > 2
    assert {slice_ns(thread) for thread in threads} == {100_000} != {usual}
    assert {slice_ns(child) for child in children} == {usual}
