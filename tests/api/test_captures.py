"""Packets over HTTP: what is refused and how it looks; the octets themselves are tests/e2e/test_dataplane.py's."""

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.api.captures import READ_BYTES, _octets
from service.api.traffic import End, Flow, Inspected, Kept
from service.domain import events as ev
from service.packet import pcapng
from service.reconcile.captures import PIPE_BYTES
from tests.api.running import Running, until

BASE = "/api/v1/interfaces/tun0"
PING = bytes.fromhex("4500001c000100004001f6dd0a0000010a0000020800f7fd00010001")
ARP = bytes.fromhex("ffffffffffff02000000000108060001080006040001" + "0200000000010a0000010000000000000a000002")
S = 1_000_000_000


@pytest.fixture
def running(api: Running) -> Iterator[Running]:
    """An API with tun0, whose packets somebody reads."""
    made = api.call("POST", "/api/v1/interfaces", {"name": "tun0", "processing": {"running": True}})
    assert made.status_code == 201, made.text
    yield api
    api.run(api.captures.close())


def refused(api: Running, method: str, path: str, body: Any = None) -> tuple[int, str]:
    answer = api.call(method, f"{BASE}{path}", body)
    return answer.status_code, answer.json()["code"]


def told(api: Running) -> list[Any]:
    kinds = (ev.CaptureStarted, ev.CaptureStopped)
    return [event.body for event in api.reader.events() if isinstance(event.body, kinds)]


@pytest.mark.parametrize(
    ("method", "place"),
    [("GET", "/flows"), ("GET", "/packets"), ("GET", "/tail"), ("GET", "/capture/stream"), ("POST", "/captures")],
)
def test_without_processing_there_are_no_packets_and_the_answer_says_what_would_do(
    running: Running, method: str, place: str
) -> None:
    running.call("POST", f"{BASE}/stop")
    answer = running.call(method, f"{BASE}{place}")
    assert (answer.status_code, answer.json()["code"]) == (409, "not_running")
    assert "start its processing" in answer.json()["detail"]
    assert refused(running, method, "x" + place)[0] == 404
    assert told(running) == []


def test_without_an_inspecting_stage_flows_are_refused_with_what_would_do(running: Running) -> None:
    for path in ("/flows", "/packets"):
        answer = running.call("GET", BASE + path)
        assert (answer.status_code, answer.json()["code"]) == (409, "not_inspected")
        assert '{"processor": "inspect"}' in answer.json()["detail"]


@pytest.mark.parametrize(
    ("place", "field"),
    [
        ("/flows?top=0", "top"),
        ("/flows?x=1", "x"),
        ("/packets?limit=9999", "limit"),
        ("/tail?rate_pps=1001", "rate_pps"),
        ("/tail?limit=x", "limit"),
        ("/capture/stream?snaplen=15", "snaplen"),
        ("/processing?x=1", "x"),
    ],
)
def test_a_parameter_that_does_not_fit_is_refused_by_name(running: Running, place: str, field: str) -> None:
    answer = running.call("GET", BASE + place)
    assert (answer.status_code, answer.json()["pointer"]) == (400, f"/{field}")


def test_flows_come_by_bytes_and_packets_decoded(running: Running) -> None:
    def flow(port: int, octets: int) -> Flow:
        return Flow("tcp", End("10.0.0.1", port), End("10.0.0.2", 80), 1, octets, 1, 1, S, 2 * S, "S.")

    latest = [Kept(S, False, len(PING), PING), Kept(2 * S, True, 1400, PING[:20])]
    running.traffic.seen = Inspected([flow(1001, 5), flow(1002, 50), flow(1003, 20)], {"ipv4.tcp": (6, 75)}, latest)
    found = running.call("GET", f"{BASE}/flows?top=2").json()
    assert [each["first"]["port"] for each in found["flows"]] == [1002, 1003]
    assert (found["known"], found["protocols"]) == (3, {"ipv4.tcp": {"packets": 6, "bytes": 75}})
    assert found["flows"][0]["last_seen"] == "1970-01-01T00:00:02.000000Z"
    (packet,) = running.call("GET", f"{BASE}/packets?limit=1").json()["packets"]
    assert (packet["direction"], packet["length"]) == ("in", 1400)
    packet = running.call("GET", f"{BASE}/packets").json()["packets"][0]
    assert packet["line"] == "IP 10.0.0.1 > 10.0.0.2: ICMP echo request, id 1, seq 1, length 8"
    assert (packet["source"], packet["source_port"], packet["class"]) == ("10.0.0.1", None, "ipv4.icmp")


def test_a_capture_is_told_with_who_asked_and_why(running: Running) -> None:
    answer = running.call("POST", f"{BASE}/captures", {"files": 2}, headers={"Tunledger-Reason": "who?"})
    capture = answer.json()
    assert answer.headers["location"] == f"{BASE}/captures/{capture['id']}"
    (started,) = told(running)
    assert (started.request.user, started.request.reason, started.settings["files"]) == ("root", "who?", 2)
    assert refused(running, "GET", "/captures/none") == (404, "not_found")
    assert refused(running, "GET", f"/captures/{capture['id']}/files/x") == (404, "not_found")
    assert refused(running, "POST", f"/captures/{capture['id']}/stop", {"x": 1}) == (400, "invalid_field")
    assert running.call("DELETE", f"{BASE}/captures/{capture['id']}").json()["deleted"] is True
    assert running.call("GET", f"{BASE}/captures").json() == {"captures": []}
    assert [body.reason for body in told(running)[1:]] == ["asked"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"snaplen": 1}, "snaplen"),
        ({"x": 1}, "x"),
        ({"size_bytes": None}, "files"),
        ({"max_packets": 0}, "max_packets"),
    ],
)
def test_settings_that_do_not_fit_are_refused_and_nothing_is_told(
    running: Running, body: dict[str, Any], field: str
) -> None:
    answer = running.call("POST", f"{BASE}/captures", body)
    assert (answer.status_code, answer.json()["pointer"]) == (400, f"/{field}")
    assert told(running) == []


def test_too_many_captures_are_429_and_one_that_ends_makes_room(running: Running) -> None:
    first = running.call("POST", f"{BASE}/captures").json()
    for _ in range(7):
        assert running.call("POST", f"{BASE}/captures").status_code == 201
    assert refused(running, "POST", "/captures") == (429, "too_many_captures")
    running.call("POST", f"{BASE}/captures/{first['id']}/stop")
    assert running.call("POST", f"{BASE}/captures").status_code == 201


def test_a_file_that_is_being_written_comes_in_whole_blocks(running: Running) -> None:
    capture = running.call("POST", f"{BASE}/captures").json()
    ((_, (fd,)),) = running.traffic.taps.values()
    head = pcapng.section("x") + pcapng.interface("tun0", "tun", 100)
    block = pcapng.packets([PING], time_ns=S, flags=pcapng.INBOUND, snaplen=100)
    os.write(fd, head + block + block[:20])
    answer = running.call("GET", f"{BASE}/captures/{capture['id']}/files/0")
    assert answer.content == head + block
    assert answer.headers["content-type"] == "application/x-pcapng"
    assert answer.headers["content-disposition"] == f'attachment; filename="tun0-{capture["id"]}-0.pcapng"'


def test_a_file_that_nobody_reads_in_the_end_is_not_open(tmp_path: Path) -> None:
    path = tmp_path / "tun0.pcapng"
    path.write_bytes(b"x")

    def opened() -> list[str]:
        return [os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()]

    async def gone() -> None:
        octets = _octets(path, growing=False)  # and its client goes away before the first turn
        assert str(path) not in opened()
        async for _ in octets:
            assert str(path) in opened()
        assert str(path) not in opened()

    asyncio.run(gone())


def test_a_file_that_somebody_deleted_is_not_found(running: Running) -> None:
    capture = running.call("POST", f"{BASE}/captures").json()
    for path in (running.path.parent / "captures").iterdir():
        path.unlink()
    assert refused(running, "GET", f"/captures/{capture['id']}/files/0") == (404, "not_found")


def test_captures_of_an_interface_that_is_no_more_are_listed_fetched_and_deleted(running: Running) -> None:
    capture = running.call("POST", f"{BASE}/captures").json()
    ((_, (fd,)),) = running.traffic.taps.values()
    os.write(fd, b"octets")
    assert running.call("DELETE", BASE).status_code == 200
    assert refused(running, "GET", "/captures") == (404, "no_interface")
    assert running.call("POST", "/api/v1/interfaces", {"name": "tun0"}).status_code == 201
    assert running.call("GET", f"{BASE}/captures").json() == {"captures": []}, "another one of that name"
    assert refused(running, "GET", f"/captures/{capture['id']}") == (404, "not_found")
    running.run(running.captures.stop(running.captures.find(capture["id"])))  # its worker let go of it
    where = f"/api/v1/captures/{capture['id']}"
    (found,) = running.call("GET", "/api/v1/captures").json()["captures"]
    assert (found["id"], found["name"], found["state"]) == (capture["id"], "tun0", "stopped")
    assert running.call("GET", "/api/v1/captures?name=tun0").json() == {"captures": [found]}
    assert running.call("GET", "/api/v1/captures?name=tun1").json() == {"captures": []}
    assert running.call("GET", "/api/v1/captures?name=a/b").status_code == 400
    assert running.call("GET", where).json() == found
    assert running.call("GET", f"{where}/files/0").content == b"octets"
    assert running.call("DELETE", where).json() == {"id": capture["id"], "deleted": True}
    assert running.call("GET", where).status_code == 404
    assert list((running.path.parent / "captures").iterdir()) == []


@pytest.mark.parametrize(("method", "place"), [("POST", "/stop"), ("DELETE", "")])
def test_a_stage_of_a_chain_is_ended_by_changing_the_chain_and_the_answer_says_so(
    running: Running, method: str, place: str
) -> None:
    (device,) = running.traffic.attached()
    options = {"snaplen": 64, "size_bytes": None, "interval_s": None, "files": 1}
    for fd in running.captures.files_for(device, "tun0", 7, options):
        os.close(fd)
    (capture,) = running.call("GET", f"{BASE}/captures").json()["captures"]
    answer = running.call(method, f"{BASE}/captures/{capture['id']}{place}")
    assert (answer.status_code, answer.json()["code"]) == (409, "part_of_chain")
    assert "take it out of processing.chain" in answer.json()["detail"]
    assert running.call("GET", f"{BASE}/captures/{capture['id']}").json()["state"] == "running"


def test_a_tail_says_what_it_left_out_and_its_readers_end_ends_it(running: Running) -> None:
    host, port = running.listen()
    with socket.create_connection((host, port), timeout=20) as client:
        client.sendall(f"GET {BASE}/tail?rate_pps=20 HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        until(lambda: running.traffic.taps)
        ((stage, (fd,)),) = running.traffic.taps.values()
        assert stage["live"] is True
        head = pcapng.section("x") + pcapng.interface("tun0", "tun", 100)
        os.write(fd, head + pcapng.packets([PING] * 10, time_ns=S, flags=pcapng.INBOUND, snaplen=100))
        text = b""
        while b"event: left_out" not in text:
            text += client.recv(4096)
        assert text.count(b"event: packet") == 2
        while b'"packets":' not in text:
            text += client.recv(4096)
        assert b'data: {"packets":8}' in text
        (line,) = {
            json.loads(part.split(b"data: ")[1].split(b"\n")[0])["line"] for part in text.split(b"event: packet")[1:]
        }
        assert line == "IP 10.0.0.1 > 10.0.0.2: ICMP echo request, id 1, seq 1, length 8"
    until(lambda: len(told(running)) == 2)
    assert told(running)[1].reason == "client_gone"
    assert running.traffic.taps == {}


def test_a_stop_gives_the_reader_of_a_stream_all_that_was_captured(running: Running) -> None:
    host, port = running.listen()
    with socket.create_connection((host, port), timeout=20) as client:
        client.sendall(f"GET {BASE}/capture/stream HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
        text = b""
        while b"\r\n\r\n" not in text:
            text += client.recv(4096)
        ((_, (fd,)),) = running.traffic.taps.values()
        octets = pcapng.section("x") + pcapng.interface("tun0", "tun", 100)
        octets += pcapng.packets([PING] * 6000, time_ns=S, flags=pcapng.INBOUND, snaplen=100)
        assert READ_BYTES < len(octets) < PIPE_BYTES, "more than is read at once"

        async def write_and_stop() -> None:
            assert os.write(fd, octets) == len(octets)
            running.captures.refuse()

        running.run(write_and_stop())
        while not text.endswith(b"\r\n0\r\n\r\n"):
            text += client.recv(1 << 20)
    body, chunks = b"", text.split(b"\r\n\r\n", 1)[1]
    while chunks:
        size, chunks = chunks.split(b"\r\n", 1)
        body, chunks = body + chunks[: int(size, 16)], chunks[int(size, 16) + 2 :]
    assert body == octets
    assert told(running)[1].reason == "shutdown"


def test_a_frame_is_decoded_with_its_ethernet_header_apart() -> None:
    from service.api.traffic import packet_json

    found = packet_json("tap", time_ns=S, inbound=True, length=len(ARP), packet=ARP)
    assert found["line"] == "ARP, length 28"
    assert found["ethernet"]["source"] == "02:00:00:00:00:01"


def test_a_chain_that_sends_to_nobody_says_so_and_one_that_cannot_be_is_refused(running: Running) -> None:
    chain = [{"processor": "forward", "to": "tun1"}]
    assert running.call("PATCH", BASE, {"processing": {"chain": chain}}).status_code == 200
    (note,) = running.call("GET", BASE).json()["status"]["notes"]
    assert note == "processing.chain.0.to: tun1 is not declared; what is sent there is dropped (no_output)"
    assert running.call("POST", "/api/v1/interfaces", {"name": "tun1"}).status_code == 201
    assert "notes" not in running.call("GET", BASE).json()["status"]
    tap = {"name": "tap0", "mode": "tap", "processing": {"chain": chain}}
    answer = running.call("POST", "/api/v1/interfaces", tap)
    assert (answer.status_code, answer.json()["code"]) == (409, "target_mode")
    assert answer.json()["pointer"] == "/processing/chain/0/to"
