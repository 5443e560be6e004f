"""kill -9 between every two steps of a life: create, configure, start, stop, delete. Then start again and look.

The points are enumerated by a run that traces them; each then kills a run of its own. What is asserted afterwards
are the promises of the log: an acknowledged command holds, every intent has one outcome, the chain verifies, the
kernel is what the log says, a stranger is what it was, and a second start finds nothing to do.
"""

import contextlib
import http.client
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from service.domain import events as ev
from service.domain.plan import Sight, differences
from service.domain.token import Token
from tests.e2e.harness import Service, links
from tests.namespace import fresh_namespace
from tests.stranger import Stranger

LIFE: list[tuple[str, str, Any]] = [
    ("POST", "/api/interface/create", {"name": "tun7", "address": "10.7.0.1", "netmask": "255.255.255.0", "mtu": 1400}),
    ("POST", "/api/interface/configure", {"address": "10.7.1.1", "mtu": 1300}),
    ("POST", "/api/interface/start", None),
    ("POST", "/api/interface/stop", None),
    ("DELETE", "/api/interface/delete", None),
]


def live(service: Service) -> list[int]:
    """Send the commands of a life until the service dies; the statuses that were heard."""
    heard: list[int] = []
    for method, path, body in LIFE:
        try:
            status, _answer = service.call(method, path, body)
        except (OSError, http.client.HTTPException):
            break
        heard.append(status)
    return heard


def trace(folder: Path) -> list[str]:
    """The names of all points that a whole life reaches, in order."""
    service = Service(folder)
    try:
        service.start(TUNLEDGER_TEST_FAILPOINTS=f"trace:{folder / 'trace'}")
        assert live(service) == [200] * len(LIFE)
        assert service.stop() == 0
    finally:
        service.close()
    return (folder / "trace").read_text().split()


def assert_promises(service: Service, heard: list[int], stranger: Stranger) -> None:
    """What must hold once the service is up again."""
    found = service.verification()
    assert found.problems == []
    events = service.events()
    intents = [e for e in events if isinstance(e.body, ev.Intent)]
    outcomes = Counter(e.command_id for e in events if isinstance(e.body, ev.Outcome))
    assert outcomes == Counter(e.command_id for e in intents), "an intent has not exactly one outcome"
    applied = [e for e in events if isinstance(e.body, ev.CommandApplied)]
    assert len(applied) >= len(heard), "an acknowledged command was lost"
    assert len(intents) <= len(heard) + 1, "a command had more than one effect"
    kernel = links()
    for interface in found.state.interfaces.values():
        assert interface.pending is None
        link = kernel.get(interface.name)
        token = Token(events[0].node, interface.id)
        assert link is not None
        assert link.token == token
        assert interface.spec is not None
        sight = Sight(link=link, attached=interface.spec.processing.running)
        assert differences(token, interface.name, interface.spec, sight) == ()
        assert service.status()["running"] == interface.spec.processing.running
    declared = {interface.name for interface in found.state.interfaces.values()}
    assert set(kernel) == {"lo", stranger.name} | declared, "a link that nothing declares was left behind"
    stranger.assert_untouched()


@pytest.mark.timeout(540)
def test_a_kill_between_any_two_steps_loses_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    """One case for each point that the trace names."""
    with fresh_namespace():
        points = trace(tmp_path / "trace")
    assert {"kernel.CreateLink.before", "kernel.AddAddress.after", "kernel.DeleteLink.after"} <= set(points)
    # Namespaces belong to threads: as many cases at once as there are processors, each in its own.
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda number: crash_at(tmp_path, points, number), range(1, len(points) + 1)))


def crash_at(folder: Path, points: list[str], number: int) -> None:
    """Kill a run at one point, start again, and look."""
    with fresh_namespace(), contextlib.ExitStack() as stack:
        stranger = stack.enter_context(Stranger("tun0"))
        service = Service(folder / str(number))
        stack.callback(service.close)
        service.spawn(TUNLEDGER_TEST_FAILPOINTS=f"kill:{number}")
        heard: list[int] = []
        try:
            service.wait_ready()
        except AssertionError:
            assert service.process is not None
            assert service.process.poll() == -9, f"{points[number - 1]}: it ended, but not by the kill"
        else:
            heard = live(service)
            if len(heard) == len(LIFE):
                service.stop()
        assert service.process is not None
        assert service.process.wait(30) in {-9, 0}, points[number - 1]
        assert set(heard) <= {200}, (points[number - 1], heard)
        service.start()
        try:
            assert_promises(service, heard, stranger)
            if number % 4:
                return  # the second start is shown for every fourth point; each costs a second
            before = service.verification().head_position
            service.kill()
            service.start()
            again = service.events()[before:]
            repairs = [e.body for e in again if isinstance(e.body, ev.DriftRepaired | ev.Outcome)]
            resumed = [r for r in repairs if isinstance(r, ev.DriftRepaired) and "processing" in " ".join(r.steps)]
            assert repairs == resumed, "the second start found something to do"
        except AssertionError as error:
            raise AssertionError(f"killed at point {number}, {points[number - 1]}: {error}") from error
