"""Broken connections: a write is sent again under the same key, and a stream goes on where it was."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from service.cli import client as module
from service.cli import events as following
from service.cli.client import BrokenConnectionError, CallError, Client
from service.cli.main import cli

Reply = bytes | None  # None hangs up without an answer


def _answer(status: str, body: Any, kind: str = "application/json", **headers: str) -> bytes:
    content = json.dumps(body).encode()
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n{more}\r\n"
    return head.encode() + content


def _stream(*frames: str) -> bytes:
    """Server-sent events on a connection that is closed behind them."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + "".join(frames).encode()


def _event(position: int, **payload: Any) -> str:
    event = {
        "position": position,
        "recorded_at": "2026-11-22T14:00:00.000000Z",
        "actor": "uid:0",
        "type": "InterfaceRetired",
        "payload": {"name": "tun0", **payload},
    }
    return f"id: {position}\nevent: InterfaceRetired\ndata: {json.dumps(event)}\n\n"


class Server:
    """Answers one connection after the other from a list, then listens no more."""

    def __init__(self, replies: list[Reply]) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self._replies = replies
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        with self._socket:
            for reply in self._replies:
                connection, _ = self._socket.accept()
                with connection:
                    self._read(connection)
                    if reply is not None:
                        connection.sendall(reply)

    def _read(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        with connection.makefile("rb") as stream:
            first = stream.readline().decode().strip()
            headers = {}
            while line := stream.readline().strip():
                name, _, value = line.decode().partition(": ")
                headers[name.lower()] = value
            self.requests.append((first, headers, stream.read(int(headers.get("content-length", "0")))))


@contextmanager
def _serving(*replies: Reply) -> Iterator[Server]:
    server = Server(list(replies))
    server.thread.start()
    try:
        yield server
    finally:
        server.thread.join(10)
        assert not server.thread.is_alive(), "fewer connections came than there were replies"


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, prog_name="tunledger")


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody comes back in these tests who is not there at once."""
    monkeypatch.setattr(module, "RECONNECT_S", 0.0)
    monkeypatch.setattr(following, "AGAIN_FIRST_S", 0.0)


RETIRED = {"id": "1", "name": "tun0", "deleted": True}


def test_a_write_whose_connection_breaks_is_sent_once_more_under_the_same_key() -> None:
    with _serving(None, _answer("200 OK", RETIRED, Tunledger_Command_Id="c1")) as server:
        done = _run("delete", "tun0", "--reason", "für alle", "--url", server.url)
    assert (done.exit_code, done.stdout) == (0, "tun0 deleted\ncommand c1\n")
    first, again = server.requests
    assert first == again
    assert first[0] == "DELETE /api/v1/interfaces/tun0 HTTP/1.1"
    assert len(first[1]["idempotency-key"]) == 36
    assert first[1]["tunledger-reason"] == "für alle"


def test_every_command_has_a_key_of_its_own() -> None:
    reply = _answer("200 OK", RETIRED, Tunledger_Command_Id="c1")
    with _serving(reply, reply) as server:
        for _ in range(2):
            assert _run("delete", "tun0", "--url", server.url).exit_code == 0
    first, second = (headers["idempotency-key"] for _, headers, _ in server.requests)
    assert first != second


@pytest.mark.parametrize("replies", [[None], [None, None], [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{", None]])
def test_a_write_that_is_never_answered_says_where_to_ask_and_exits_3(replies: list[Reply]) -> None:
    with _serving(*replies) as server:
        done = _run("delete", "tun0", "--url", server.url)
    assert (done.exit_code, done.stdout) == (3, "")
    assert "broke before the answer" in done.stderr
    assert "whether it was carried out, tunledger history says" in done.stderr
    assert len(server.requests) == len(replies)


def test_a_write_that_takes_too_long_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE_TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(10)
        client = Client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.05)
        with pytest.raises(CallError, match=r"no answer .* within 0.1 s; whether it was carried out") as caught:
            client.write("DELETE", "/api/v1/interfaces/tun0")
        assert not caught.value.reachable
        silent.accept()[0].close()
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.accept()


def test_a_refusal_is_not_sent_again() -> None:
    problem = {"status": 409, "detail": "tun0 is busy", "code": "device_busy", "errno": "EBUSY", "retry": True}
    with _serving(_answer("409 Conflict", problem, "application/problem+json")) as server:
        done = _run("delete", "tun0", "--url", server.url)
    assert done.exit_code == 1
    assert done.stderr == "tunledger: tun0 is busy\n  (device_busy; EBUSY; trying again may help)\n"


def test_a_read_is_not_sent_again() -> None:
    with _serving(None) as server, pytest.raises(BrokenConnectionError) as caught:
        Client(server.url).get("/api/v1/interfaces")
    assert not caught.value.reachable


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"220 mail.example.org ESMTP\r\n", "does not speak HTTP"),
        (_answer("401 Unauthorized", {"error": "mallory (uid 1000) may not call tunledger"}), "mallory"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "answered 200 and no JSON; is it tunledger?"),
        (_answer("502 Bad Gateway", []), "answered 502"),
    ],
)
def test_an_answer_of_something_else_is_told_as_such(reply: bytes, words: str) -> None:
    with _serving(reply) as server, pytest.raises(CallError, match=words) as caught:
        Client(server.url).get("/api/v1/interfaces")
    assert caught.value.reachable


@pytest.mark.parametrize("url", ["localhost:8080", "ftp://localhost", "http://", "http://x:y", ""])
def test_what_is_no_url_is_told_as_such(url: str) -> None:
    with pytest.raises(CallError, match="is not a URL such as http://"):
        Client(url).get("/health")


def _following(server: Server, *arguments: str) -> tuple[Result, list[Any]]:
    done = _run("events", "--follow", "-o", "json", "--url", server.url, *arguments)
    return done, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_stream_that_breaks_goes_on_after_the_last_event() -> None:
    broken = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nid: 9\r\n"
    with _serving(
        _stream("retry: 1000\nid: 6\n\n", _event(7), ": heartbeat\n\n", _event(8)),
        broken,
        None,
        _stream(_event(9), _event(10), _event(11)),
    ) as server:
        done, events = _following(server, "--limit", "4", "--type", "InterfaceRetired")
    assert done.exit_code == 0
    assert [event["position"] for event in events] == [7, 8, 9, 10]
    assert [headers.get("last-event-id") for _, headers, _ in server.requests] == [None, "8", "8", "8"]
    assert {line for line, _, _ in server.requests} == {"GET /api/v1/events/stream?type=InterfaceRetired HTTP/1.1"}
    assert done.stderr.count("trying again") + done.stderr.count("taking it up again") == 3


def test_a_stream_that_told_nothing_yet_goes_on_where_it_began() -> None:
    with _serving(_stream("id: 6\n\n"), _stream(_event(7))) as server:
        _, events = _following(server, "--limit", "1")
    assert [event["position"] for event in events] == [7]
    assert server.requests[1][1]["last-event-id"] == "6"


def test_a_reader_that_was_dropped_says_so_and_comes_back() -> None:
    dropped = 'event: dropped\ndata: {"code": "too_slow", "reason": "4096 events were waiting"}\n\n'
    with _serving(_stream(_event(7), dropped), _stream(_event(8))) as server:
        done, events = _following(server, "--limit", "2")
    assert [event["position"] for event in events] == [7, 8]
    assert "4096 events were waiting" in done.stderr


def test_a_stream_that_is_refused_or_never_was_is_not_tried_again() -> None:
    problem = {"detail": "after: 9 is beyond the log", "code": "invalid_field", "pointer": "/after", "retry": False}
    with _serving(_answer("400 Bad Request", problem)) as server:
        done, _ = _following(server, "--after", "9")
    assert (done.exit_code, done.stderr) == (
        1,
        "tunledger: after: 9 is beyond the log\n  (invalid_field; at /after)\n",
    )
    assert _run("events", "--follow", "--url", "http://127.0.0.1:1").exit_code == 3


def test_an_event_over_several_lines_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    frames: Callable[..., Any] = module._events
    lines = ["data: a", "data:b", "", ": x", "", "event: k", "id: 4", "data", "", "data: unfinished"]
    assert [(e.id, e.kind, e.data) for e in frames(iter(lines))] == [("", "message", "a\nb"), ("4", "k", "")]


def test_a_write_that_is_applied_but_not_on_the_host_yet_says_what_it_waits_for() -> None:
    told = {"spec": {"name": "tun0"}, "status": {"state": "degraded", "reason": "netns blue does not exist"}}
    with _serving(_answer("200 OK", told, Tunledger_Command_Id="c1")) as server:
        done = _run("stop", "tun0", "--url", server.url)
    assert (done.exit_code, done.stdout) == (0, "tun0: processing stopped\ncommand c1\n")
    assert done.stderr == "tunledger: tun0 is degraded: netns blue does not exist\n"


# -- packets


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
NO_WORDS = ": packets follow\n\n"


def _chunks(*frames: str, whole: bool) -> bytes:
    """A stream in chunks; one that is not whole ends where the connection does, as when the service is killed."""
    parts = [f"{len(frame):x}\r\n{frame}\r\n".encode() for frame in frames]
    return CHUNKED + b"".join(parts) + (b"0\r\n\r\n" if whole else b"")


def _packet(line: str) -> str:
    told = {"at": "2026-11-22T14:00:00.000000Z", "ethernet": None, "length": 28, "line": line}
    return f"event: packet\ndata: {json.dumps(told)}\n\n"


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("command", [("tail", "tun0"), ("tail", "tun0", "-c", "2")])
def test_a_tail_that_the_service_does_not_end_says_so_and_exits_3(command: tuple[str, ...], whole: bool) -> None:
    with _serving(_chunks(NO_WORDS, _packet("IP one"), whole=whole)) as server:
        done = _run(*command, "--url", server.url)
    assert (done.exit_code, done.stderr) == (3, "tunledger: the service closed the stream\n")
    assert done.stdout.endswith(" IP one\n")


def test_a_tail_ends_with_0_after_its_packets_and_with_1_where_processing_ends_first() -> None:
    ended = 'event: end\ndata: {"reason": "nothing more comes"}\n\n'
    with _serving(
        _chunks(NO_WORDS, _packet("IP one"), whole=True), _chunks(NO_WORDS, _packet("IP one"), ended, whole=True)
    ) as server:
        enough = _run("tail", "tun0", "-c", "1", "--url", server.url)
        short = _run("tail", "tun0", "-c", "2", "--url", server.url)
    assert (enough.exit_code, enough.stderr) == (0, "")
    assert (short.exit_code, short.stderr) == (1, "tunledger: nothing more comes\n")


def test_a_live_capture_says_why_there_is_no_more_of_it() -> None:
    with _serving(_chunks("octets", whole=False), _chunks("octets", whole=True)) as server:
        cut = _run("capture", "stream", "tun0", "--url", server.url)
        ended = _run("capture", "stream", "tun0", "--url", server.url)
    assert (cut.exit_code, cut.stdout, cut.stderr) == (3, "octets", "tunledger: the service closed the stream\n")
    assert (ended.exit_code, ended.stdout) == (1, "octets")
    assert ended.stderr == "tunledger: nothing more comes: processing ended, or the service stops\n"


def test_a_file_of_a_capture_that_does_not_come_whole_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    capture = _answer("200 OK", {"name": "tun0", "files": [{"number": 0, "size_bytes": 6}]})
    with _serving(capture, _chunks("oct", whole=False), capture, _chunks("octets", whole=True)) as server:
        arguments = ("capture", "get", "tun0", "c1", "-w", str(path), "--url", server.url)
        cut = _run(*arguments)
        assert (cut.exit_code, path.exists()) == (3, False)
        assert _run(*arguments).exit_code == 0
    assert path.read_bytes() == b"octets"


def test_a_capture_is_found_by_its_id_and_only_under_its_name() -> None:
    capture = _answer("200 OK", {"name": "gone0", "files": [{"number": 0, "size_bytes": 6}]})
    with _serving(capture, _chunks("octets", whole=True), capture) as server:
        fetched = _run("capture", "get", "gone0", "c1", "--url", server.url)
        other = _run("capture", "delete", "tun0", "c1", "--url", server.url)
    assert (fetched.exit_code, fetched.stdout) == (0, "octets")
    assert (other.exit_code, other.stderr) == (1, "tunledger: capture c1 is of gone0, not of tun0\n")
    assert [line.split()[1] for line, _, _ in server.requests] == [
        "/api/v1/captures/c1", "/api/v1/captures/c1/files/0", "/api/v1/captures/c1",
    ]  # fmt: skip
