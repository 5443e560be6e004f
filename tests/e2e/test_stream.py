"""A stream of the real service: resumed over kill -9 it has every event once, and it ends with the service."""

import contextlib
import http.client
import json
import random
import threading
from typing import Any, Self

import pytest

from tests.e2e.harness import Service, eventually

KILLS = 4


class Follower:
    """Follows the stream in a thread of its own, over every break, as an EventSource does."""

    def __init__(self, service: Service, query: str = "") -> None:
        self._service, self._query = service, query
        self.seen: list[dict[str, Any]] = []
        self.ids: list[int] = []
        self.last: str | None = None
        self.breaks = 0
        self.comments: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _follow(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._read()
            self.breaks += 1
            self._stop.wait(0.01)

    def _read(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._service.port, timeout=2)
        try:
            headers = {} if self.last is None else {"Last-Event-ID": self.last}
            connection.request("GET", f"/api/v1/events/stream{self._query}", headers=headers)
            response = connection.getresponse()
            assert response.status in {200, 503}, response.read()
            frame: dict[str, str] = {}
            while not self._stop.is_set() and (line := response.readline().decode()):
                if line.startswith(":"):
                    self.comments.append(line[1:].strip())
                elif line.strip():
                    name, _, value = line.strip().partition(": ")
                    frame[name] = value
                else:  # only a frame that came whole counts
                    self._take(frame)
                    frame = {}
        finally:
            connection.close()

    def _take(self, frame: dict[str, str]) -> None:
        if "data" in frame:
            told = json.loads(frame["data"])
            assert (int(frame["id"]), frame["event"]) == (told["position"], told["type"])
            self.ids.append(told["position"])
            self.seen.append(told)
        self.last = frame.get("id", self.last)


@pytest.fixture
def busy(service: Service) -> Service:
    """A running service."""
    return service.start()


def test_a_stream_resumed_over_kills_has_every_event_once(busy: Service) -> None:
    chance = random.Random(1)
    with Follower(busy, "?after=0") as follower:
        for _ in range(KILLS):
            for number in range(chance.randrange(1, 6)):
                name = f"lab{number}"
                body = {"name": name, "addresses": [f"10.{chance.randrange(200)}.{number}.1/24"]}
                busy.call("PUT", f"/api/v1/interfaces/{name}", body)
            if chance.random() < 0.5:  # while the follower reads, or before it has heard of anything
                eventually(lambda: follower.ids, 30, "the first event")
            busy.kill()
            busy.start()
        head = busy.ok("GET", "/api/v1/log/head")["position"]
        eventually(lambda: follower.ids and follower.ids[-1] >= head, 30, "the last event")
        assert follower.breaks >= KILLS
    stored = [event for event in busy.events() if event.position <= follower.ids[-1]]
    assert follower.ids == [event.position for event in stored]
    assert [event["hash"] for event in follower.seen] == [event.hash for event in stored]
    assert [event["event_id"] for event in follower.seen] == [event.event_id for event in stored]


def test_an_orderly_stop_ends_the_streams_at_once_and_a_start_takes_them_up(busy: Service) -> None:
    with Follower(busy, "?type=ServiceStarted,ServiceStopped") as follower:
        eventually(lambda: follower.last is not None, 30, "the stream")
        assert busy.stop() == 0
        assert any("stopping" in comment for comment in follower.comments), "and was told why"
        busy.start()
        eventually(lambda: [e["type"] for e in follower.seen] == ["ServiceStopped", "ServiceStarted"], 30, "both")


def test_state_and_diff_of_the_real_service_are_those_of_its_log(busy: Service) -> None:
    busy.call("PUT", "/api/v1/interfaces/lab0", {"name": "lab0", "addresses": ["10.9.0.1/24"], "mtu": 1400})
    before = busy.ok("GET", "/api/v1/log/head")
    busy.call("PATCH", "/api/v1/interfaces/lab0", {"mtu": 1300})
    assert busy.ok("GET", f"/api/v1/state?at={before['position']}")["interfaces"]["lab0"]["spec"]["mtu"] == 1400
    (changed,) = busy.ok("GET", f"/api/v1/diff?from={before['position']}")["interfaces"]
    assert changed["changes"] == [{"path": "mtu", "old": 1400, "new": 1300}]
    assert busy.ok("GET", f"/api/v1/log/verify?head={before['position']}:{before['hash']}")["sound"] is True
    known = f"{before['position']}:{before['hash']}"
    verified = busy.command("verify", "--head", known)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    wrong = busy.command("verify", "--head", f"{before['position']}:{'f' * 64}")
    assert wrong.returncode == 1
    assert "this is another log, or it was rewritten" in wrong.stdout
    assert busy.command("verify", "--head", "nonsense").returncode == 2
