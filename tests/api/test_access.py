"""Who may call: loopback by name, no page of the web, and only processes of root or of the service's own user."""

import asyncio
import pwd
from pathlib import Path
from typing import Any

import pytest

from service.api.access import Endpoint, Gate, loopback_host, loopback_origin
from service.domain.errors import ErrorCode, TunledgerError
from tests.api.running import CLIENT, PORT, Running

HOSTS = [
    ("localhost", True),
    ("localhost:8080", True),
    ("LOCALHOST", True),
    ("LocalHost:8080", True),
    ("127.0.0.1", True),
    ("127.0.0.1:8080", True),
    ("127.0.0.1:1", True),
    ("127.8.8.8:8080", True),
    ("[::1]", True),
    ("[::1]:8080", True),
    ("[0:0:0:0:0:0:0:1]:8080", True),
    (" localhost ", True),
    # DNS rebinding: names of the attacker's that resolve to loopback
    ("evil.com", False),
    ("evil.com:8080", False),
    ("127.0.0.1.evil.com", False),
    ("127.0.0.1.nip.io:8080", False),
    ("localhost.evil.com", False),
    ("evil.com.localhost", False),
    ("localhost@evil.com", False),
    ("localhost#evil.com", False),
    ("evil.com/localhost", False),
    ("localhost.", False),
    ("localtest.me", False),
    ("\u0131localhost", False),
    # other addresses of this host, or of none
    ("10.0.0.1", False),
    ("192.168.1.1:8080", False),
    ("0.0.0.0:8080", False),
    ("0", False),
    ("127.1", False),
    ("2130706433", False),
    ("0x7f.1", False),
    ("[::]", False),
    ("[fe80::1]:8080", False),
    ("[2001:db8::1]", False),
    ("::1:8080", False),  # without brackets, that is the address ::1:8080
    # no host at all
    ("", False),
    (" ", False),
    (":8080", False),
    ("localhost:", False),
    ("localhost:http", False),
    ("localhost:-1", False),
    ("localhost:80:80", False),
    ("[::1", False),
    ("[::1]8080", False),
    ("[::1]:", False),
    ("[::1]:x", False),
    ("[]", False),
    ("localhost, evil.com", False),
    ("localhost\t.evil.com", False),
]


@pytest.mark.parametrize(("header", "allowed"), HOSTS)
def test_a_host_header_names_loopback_or_is_refused(header: str, allowed: bool) -> None:
    assert loopback_host(header) is allowed


@pytest.mark.parametrize(
    ("header", "allowed"),
    [
        ("http://localhost:8080", True),
        ("http://127.0.0.1", True),
        ("https://[::1]:8443", True),
        ("http://evil.com", False),
        ("http://127.0.0.1.evil.com", False),
        ("https://localhost.evil.com", False),
        ("null", False),
        ("", False),
        ("localhost", False),
        ("file://", False),
        ("file://localhost", False),
        ("chrome-extension://localhost", False),
        ("http://localhost/path", False),
        ("http://localhost@evil.com", False),
        ("http://", False),
    ],
)
def test_an_origin_is_a_page_of_this_host_or_is_refused(header: str, allowed: bool) -> None:
    assert loopback_origin(header) is allowed


@pytest.mark.parametrize("host", [host for host, allowed in HOSTS if not allowed and host.isascii()])
def test_a_request_to_another_host_changes_nothing(idle: Running, host: str) -> None:
    answer = idle.call("POST", "/api/interface/create", headers={"Host": host})
    assert answer.status_code == 403
    assert answer.json() == {"error": f"Host: {host or 'missing'} is not a loopback name; use 127.0.0.1 or localhost"}
    assert idle.intents() == []


def test_reading_through_another_host_is_refused_too(api: Running) -> None:
    for path in ("/health", "/api/v1/history", "/api/interface/status", "/nowhere"):
        answer = api.call("GET", path, headers={"Host": "rebound.example:8080"})
        assert answer.status_code == 403
        said = answer.json()["detail" if path.startswith("/api/v1/") else "error"]
        assert said.startswith("Host: rebound.example:8080 is not a loopback name")


def test_a_web_page_cannot_order_anything(api: Running) -> None:
    for origin in ("http://evil.com", "null", "", "http://localhost:3000"):
        answer = api.call("POST", "/api/interface/create", headers={"Origin": origin})
        assert answer.status_code == 403
        assert answer.json() == {"error": f"Origin: {origin} is not a page of this service"}
    for site in ("cross-site", "same-site"):
        assert api.call("POST", "/api/interface/create", headers={"Sec-Fetch-Site": site}).status_code == 403
    assert api.intents() == []
    own = {"Host": f"localhost:{PORT}", "Origin": f"http://localhost:{PORT}", "Sec-Fetch-Site": "same-origin"}
    assert api.call("POST", "/api/interface/create", headers=own).status_code == 200


def test_the_kernel_is_asked_about_exactly_this_connection(path: Path) -> None:
    asked: list[tuple[Endpoint, Endpoint]] = []

    def owner(client: Endpoint, server: Endpoint) -> int:
        asked.append((client, server))
        return 0

    with Running(path, owner_of=owner) as api:
        api.call("GET", "/health", client=("127.0.0.1", 50505))
    assert asked == [(("127.0.0.1", 50505), ("127.0.0.1", PORT))]


def test_the_kernel_is_asked_once_for_a_connection_that_stays() -> None:
    asked: list[Endpoint] = []
    actors: list[str] = []

    def owner(client: Endpoint, _server: Endpoint) -> int:
        asked.append(client)
        return len(asked) - 1

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        actors.append(scope["state"]["caller"].actor)

    async def call() -> None:
        gate = Gate(app, owner_of=owner, own_uid=1)
        for connection in (dict[str, int](), dict[str, int]()):
            for _ in range(3):
                scope: Any = {"type": "http", "headers": [(b"host", b"localhost")], "client": ("127.0.0.1", 5)}
                scope |= {"server": ("127.0.0.1", 8080), "state": {"connection": connection}}
                await gate(scope, None, None)  # type: ignore[arg-type]

    asyncio.run(call())
    assert asked == [("127.0.0.1", 5)] * 2
    assert actors == ["uid:0"] * 3 + ["uid:1"] * 3


def test_a_refused_host_is_not_worth_asking_the_kernel(path: Path) -> None:
    def owner(client: Endpoint, server: Endpoint) -> int:
        raise AssertionError(f"asked for {client} and {server}")

    with Running(path, owner_of=owner) as api:
        assert api.call("GET", "/health", headers={"Host": "evil.com"}).status_code == 403


@pytest.mark.parametrize(("uid", "own_uid"), [(0, 0), (0, 1234), (1234, 1234)])
def test_root_and_the_services_own_user_may_call_and_are_named_in_the_log(path: Path, uid: int, own_uid: int) -> None:
    with Running(path, owner_of=lambda _client, _server: uid, own_uid=own_uid) as api:
        assert api.call("POST", "/api/interface/create").status_code == 200
        (intent,) = api.intents()
        outcome = next(event for event in api.reader.events(after=intent.position))
    assert intent.actor == outcome.actor == f"uid:{uid}"
    (entry,) = [entry for entry in _history(path) if entry["event"] == "InterfaceDeclared"]
    assert entry["user"] == (pwd.getpwuid(uid).pw_name if uid == 0 else "")
    assert entry["peer"] == f"{CLIENT[0]}:{CLIENT[1]}"


def _history(path: Path) -> list[dict[str, object]]:
    with Running(path) as api:
        return api.history()


@pytest.mark.parametrize(
    ("uid", "own_uid", "words"),
    [
        (424242, 0, "uid 424242 may not call tunledger; root may"),
        (424242, 1234567, "uid 424242 may not call tunledger; root and uid 1234567 may"),
        (1, 0, "daemon (uid 1) may not call tunledger; root may"),
    ],
)
def test_another_user_is_unauthorized_with_the_reason(path: Path, uid: int, own_uid: int, words: str) -> None:
    with Running(path, owner_of=lambda _client, _server: uid, own_uid=own_uid) as api:
        for method, where in (("POST", "/api/interface/create"), ("GET", "/health"), ("GET", "/nowhere")):
            answer = api.call(method, where)
            assert answer.status_code == 401
            assert answer.json() == {"error": words}
        assert api.intents() == []


def test_a_connection_the_kernel_does_not_know_is_unauthorized(path: Path) -> None:
    def owner(client: Endpoint, server: Endpoint) -> int:
        raise TunledgerError(ErrorCode.UNAUTHORIZED, f"nobody knows {client[1]} to {server[1]}")

    with Running(path, owner_of=owner) as api:
        answer = api.call("POST", "/api/interface/create")
        assert answer.status_code == 401
        assert answer.json() == {"error": f"nobody knows {CLIENT[1]} to {PORT}"}
        assert api.intents() == []
