"""The disk of the log fills up, goes read-only, and heals: on real file systems, small ones of their own.

What must hold while it is full: reads go on; whatever makes more of the host is refused with 507 and changes nothing;
deletes, take-backs and the outcomes of what was let in get into the log on a reserve; health says what is wrong. When
there is room again all goes on by itself, and nothing of the time before is half done.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import eventually
from tests.faults.small_disk import KINDS, SmallDisk, small_disk
from tests.faults.world import Heard, World

pytestmark = pytest.mark.kernel

HEALED_S = 30.0  # generous: it looks every second or two
INTERFACES = 24


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    """A small disk of each kind."""
    with small_disk(tmp_path, request.param) as one:
        yield one


@pytest.fixture
def world(request: pytest.FixtureRequest, tmp_path: Path, disk: SmallDisk) -> Iterator[World]:
    """A service whose log lies on the small disk; it is not started yet."""
    with World(tmp_path / "world", case=request.node.name, database=disk.folder / "tunledger.db") as one:
        yield one


def declare(world: World, count: int = INTERFACES) -> list[str]:
    """Some interfaces, with addresses; their names."""
    names = [f"t{number}" for number in range(count)]
    commands = [{"create": {"name": name, "addresses": [f"10.9.{n}.1/24"]}} for n, name in enumerate(names)]
    assert world.send("POST", "/api/v1/batch", {"commands": commands}).status == 200
    return names


def still(world: World) -> dict[str, Any]:
    """All links, bit for bit."""
    return {name: link.still for name, link in world.host.links().items()}


def health(world: World) -> tuple[int, list[str]]:
    """Status and reasons."""
    heard = world.send("GET", "/health")
    assert heard.status is not None, heard.why
    return heard.status, heard.answer["reasons"]


def exhaust(world: World) -> None:
    """Send small changes until they are refused: what the -wal has room for may still be written on a full disk."""
    for number in range(2000):
        heard = world.send("PATCH", "/api/v1/interfaces/t0", {"description": f"no. {number}"})
        if heard.status == 507:
            return
        assert heard.status == 200, heard
    raise AssertionError("the disk is full, and two thousand changes went through")


def assert_refused(heard: Heard) -> None:
    """507, in words, and worth trying again."""
    assert heard.status == 507, heard
    assert heard.answer["code"] == "log_full"
    assert heard.answer["retry"] is True
    assert "no space left on the disk" in heard.answer["detail"]


def assert_refuses_without_a_trace(world: World) -> None:
    """Whatever would make more of the host is refused; links, log and answers stay as they are; reads go on."""
    before, head = still(world), world.get("/api/v1/log/head")
    for method, path, body in (
        ("POST", "/api/v1/interfaces", {"name": "more"}),
        ("PATCH", "/api/v1/interfaces/t1", {"mtu": 1400}),
        ("PUT", "/api/v1/interfaces/t1", {"mtu": 1400}),
        ("POST", "/api/v1/interfaces/t1/start", None),
        ("POST", "/api/v1/batch", {"commands": [{"delete": {"name": "t1"}}, {"create": {"name": "more"}}]}),
    ):
        assert_refused(world.send(method, path, body, key=f"full {method} {path}"))
    classic = world.send("POST", "/api/interface/create", {})
    assert classic.status == 507
    assert still(world) == before, "a refused command changed the host"
    assert world.get("/api/v1/log/head") == head
    assert {i["name"] for i in map(_spec, world.get("/api/v1/interfaces?limit=1000")["interfaces"])} >= {"t0", "t1"}
    assert world.get("/api/v1/interfaces/t1/counters")
    assert world.get("/api/v1/events?limit=5")
    status, reasons = health(world)
    assert status == 503
    assert any("no space left on the disk" in reason for reason in reasons), reasons


def _spec(interface: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = interface["spec"]
    return spec


def assert_deletes_work(world: World, names: list[str]) -> None:
    """Deletes are carried out and recorded."""
    for name in names:
        heard = world.send("DELETE", f"/api/v1/interfaces/{name}", key=f"delete {name}")
        assert heard.status in (200, 204), heard
        assert name not in world.host.links()


def assert_heals(world: World, disk: SmallDisk) -> None:
    """There is room again: health, then writes, then everything that must hold."""
    disk.free()
    eventually(lambda: health(world)[0] == 200, HEALED_S, "a healthy service")
    assert world.send("POST", "/api/v1/interfaces", {"name": "after"}).status == 201
    world.assert_holds()


def test_a_full_disk_refuses_writes_with_no_effect_and_heals(world: World, disk: SmallDisk) -> None:
    world.start()
    names = declare(world)
    disk.fill()
    exhaust(world)
    assert_refuses_without_a_trace(world)
    assert_deletes_work(world, names[10:20])
    assert_refuses_without_a_trace(world)
    assert_heals(world, disk)
