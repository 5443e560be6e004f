"""Over a real socket, with uvicorn and the real kernel's word on who is calling."""

import http.client
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.domain import events as ev
from service.kernel import peer
from tests.api.running import DEADLINE_S, Running, ours, until

NOBODY = 65534

_CALL_AS = """
import encodings.idna, http.client, os, sys  # while it may still read them
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
connection = http.client.HTTPConnection(sys.argv[2], int(sys.argv[3]), timeout=20)
connection.request("POST", "/api/interface/create")
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""


@pytest.fixture
def served(path: Path) -> Iterator[tuple[Running, str, int]]:
    with Running(path, owner_of=peer.owner, own_uid=os.geteuid()) as api:
        host, port = api.listen()
        yield api, host, port


def _raw(host: str, port: int, request: bytes) -> tuple[int, bytes]:
    """The status and body of what comes back for these bytes."""
    with socket.create_connection((host, port), timeout=DEADLINE_S) as connection:
        connection.sendall(request)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return response.status, response.read()


def test_our_own_process_may_call_and_is_the_actor(served: tuple[Running, str, int]) -> None:
    api, host, port = served
    status, body = _raw(
        host, port, f"POST /api/interface/create HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 0\r\n\r\n".encode()
    )
    assert (status, json.loads(body)["status"]) == (200, "success")
    (intent,) = api.intents()
    assert intent.actor == f"uid:{os.geteuid()}"


def test_a_process_of_another_user_is_unauthorized(served: tuple[Running, str, int]) -> None:
    if os.geteuid() != 0:
        pytest.skip("missing: root, to call as somebody else")
    api, host, port = served
    done = subprocess.run(
        [sys.executable, "-c", _CALL_AS, str(NOBODY), host, str(port)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        cwd="/",
    )
    if "OSError: [Errno 22]" in done.stderr or "PermissionError" in done.stderr:
        pytest.skip("missing: a second user in this user namespace")
    assert done.stdout.startswith("401 "), done.stderr
    assert "(uid 65534) may not call tunledger; root may" in done.stdout
    assert api.intents() == []


def test_a_chunked_body_is_64_kib_at_most(served: tuple[Running, str, int]) -> None:
    """It does not say its length first, so it has to be counted on the way."""
    api, host, port = served
    head = f"POST /api/interface/create HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    chunk = b"4000\r\n" + b" " * 0x4000 + b"\r\n"
    status, body = _raw(host, port, head + chunk * 5 + b"0\r\n\r\n")
    assert (status, json.loads(body)) == (413, {"error": "body: over 65536 bytes"})
    assert api.intents() == []
    status, _body = _raw(host, port, head + chunk * 4 + b"0\r\n\r\n")
    assert status == 200


def test_a_request_without_a_host_is_refused(served: tuple[Running, str, int]) -> None:
    api, host, port = served
    status, body = _raw(host, port, b"POST /api/interface/create HTTP/1.0\r\nContent-Length: 0\r\n\r\n")
    assert (status, json.loads(body)["error"].split(" ")[:2]) == (403, ["Host:", "missing"])
    assert api.intents() == []


def test_a_request_with_two_hosts_is_refused(served: tuple[Running, str, int]) -> None:
    """Which of them counts is not for whoever is in between to choose (RFC 9112, section 3.2)."""
    api, host, port = served
    for hosts in (b"Host: evil.com\r\nHost: localhost\r\n", b"Host: localhost\r\nHost: evil.com\r\n"):
        status, _body = _raw(
            host, port, b"POST /api/interface/create HTTP/1.1\r\n" + hosts + b"Content-Length: 0\r\n\r\n"
        )
        assert status in {400, 403}
    assert api.intents() == []


def test_what_a_client_says_of_itself_is_not_believed(served: tuple[Running, str, int]) -> None:
    api, host, port = served
    forged = b"X-Forwarded-For: 10.1.1.1\r\nForwarded: for=10.1.1.1\r\nX-Real-IP: 10.1.1.1\r\n"
    head = f"POST /api/interface/create HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n".encode()
    assert _raw(host, port, head + forged + b"\r\n")[0] == 200
    (intent,) = api.intents()
    assert isinstance(intent.body, ev.InterfaceDeclared)
    assert intent.body.request.peer.startswith("127.0.0.1:")


def test_a_client_that_hangs_up_gets_its_command_done_all_the_same(served: tuple[Running, str, int]) -> None:
    api, host, port = served
    request = f"POST /api/interface/create HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode()
    with socket.create_connection((host, port), timeout=DEADLINE_S) as connection:
        connection.sendall(request)
        until(api.intents)
    until(lambda: len(api.reader.command(str(api.intents()[0].command_id))) == 2)
    assert list(ours(api.kernel)) == ["tun0"]


def test_many_at_once_make_one_interface(served: tuple[Running, str, int]) -> None:
    api, host, port = served
    request = f"POST /api/interface/create HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n\r\n".encode()
    connections = [socket.create_connection((host, port), timeout=DEADLINE_S) for _ in range(20)]
    try:
        for connection in connections:
            connection.sendall(request)
        statuses = []
        for connection in connections:
            response = http.client.HTTPResponse(connection)
            response.begin()
            response.read()
            statuses.append(response.status)
    finally:
        for connection in connections:
            connection.close()
    assert sorted(statuses) == [200] + [409] * 19
    assert len(api.intents()) == 1
