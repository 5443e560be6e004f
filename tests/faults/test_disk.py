"""The disk of the log fills up, goes read-only, and heals: on real file systems, small ones of their own.

What must hold while it is full: reads go on; whatever makes more of the host is refused with 507 and changes nothing;
deletes, take-backs and the outcomes of what was let in get into the log on a reserve; health says what is wrong. When
there is room again all goes on by itself, and nothing of the time before is half done.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.cli import local
from service.domain.errors import ErrorCode, TunledgerError
from service.store.database import InstanceLock, require_current
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
    return heard.status, heard.answer.get("reasons", [])


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
    assert heard.status == 507, (heard, heard.answer)
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
        assert_refused(world.send(method, path, body, key=f"full-{method}-{path}"))
    classic = world.send("POST", "/api/interface/create", {})
    assert classic.status == 507
    assert still(world) == before, "a refused command changed the host"
    assert world.get("/api/v1/log/head") == head
    assert {i["name"] for i in map(_spec, world.get("/api/v1/interfaces?limit=1000")["interfaces"])} >= {"t0", "t1"}
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
        heard = world.send("DELETE", f"/api/v1/interfaces/{name}", key=f"delete-{name}")
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
    world.assert_strangers_untouched()
    assert_heals(world, disk)


def test_clients_that_go_on_while_the_disk_fills_lose_nothing(world: World, disk: SmallDisk) -> None:
    """Whatever each of them was doing when the disk was full: done and recorded, or refused without a trace."""
    world.start()
    declare(world, 6)
    over = threading.Event()
    heard: list[Heard] = []

    def client(number: int) -> None:
        turn = 0
        while not over.is_set():
            name = f"c{number}-{turn % 3}"
            heard.append(world.send("POST", "/api/v1/interfaces", {"name": name}, key=f"make-{name}-{turn}"))
            heard.append(world.send("PATCH", f"/api/v1/interfaces/{name}", {"mtu": 1300 + turn}))
            heard.append(world.send("PATCH", f"/api/v1/interfaces/t{number}", {"description": "x" * 200 + str(turn)}))
            heard.append(world.send("DELETE", f"/api/v1/interfaces/{name}"))
            turn += 1

    clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
    for each in clients:
        each.start()
    try:
        eventually(lambda: len(heard) > 40, what="clients")
        disk.fill()
        eventually(lambda: sum(h.status == 507 for h in heard) > 20, HEALED_S, "refusals")
        after = len(heard)
        disk.fill()  # whoever fills it goes on, and takes what the reserve gives back
        eventually(lambda: len(heard) > after + 40, HEALED_S, "more of them")
    finally:
        over.set()
        for each in clients:
            each.join(60)
    odd = [str(each) for each in heard if each.status not in (200, 201, 204, 404, 409, 507)]
    assert odd == [], "neither done nor refused for a reason"
    assert world.alive()
    assert_heals(world, disk)


def test_what_was_let_in_before_the_disk_was_full_is_answered_and_recorded(world: World, disk: SmallDisk) -> None:
    """The intent is in the log and the host is changed: the outcome goes on the reserve, and the client has its 201."""
    world.start(TUNLEDGER_TEST_FAILPOINTS="wait@kernel.create.made=2")
    answers: list[Heard] = []
    create = threading.Thread(
        target=lambda: answers.append(world.send("POST", "/api/v1/interfaces", {"name": "slow"}, key="slow"))
    )
    create.start()
    intended = "SELECT 1 FROM events WHERE type = 'InterfaceDeclared'"
    eventually(lambda: world.query(intended), what="the intent")
    disk.fill()
    create.join(30)
    assert answers[0].status == 201, answers[0].answer
    assert_refused(world.send("POST", "/api/v1/interfaces", {"name": "later"}))
    assert "slow" in world.host.links()
    assert_heals(world, disk)


def test_an_orderly_stop_on_a_full_disk_is_recorded_and_the_next_start_refuses_until_there_is_room(
    world: World, disk: SmallDisk
) -> None:
    world.start()
    names = declare(world, 4)
    disk.fill()
    exhaust(world)
    assert world.stop() == 0
    assert world.query("SELECT type FROM events ORDER BY position DESC LIMIT 1") == [("ServiceStopped",)]
    world.assert_strangers_untouched()
    world.start()
    assert_refuses_without_a_trace_at_start(world, names)
    assert_heals(world, disk)


def test_a_kill_and_a_restart_on_a_full_disk(world: World, disk: SmallDisk) -> None:
    world.start()
    names = declare(world, 8)
    disk.fill()
    exhaust(world)
    before = still(world)
    world.kill()
    world.start()
    assert still(world) == before
    assert_refuses_without_a_trace_at_start(world, names)
    assert_deletes_work(world, names[4:])
    world.kill()
    world.start()
    assert_heals(world, disk)


def test_a_start_on_a_full_disk_has_the_room_that_reading_takes_from_the_reserve(world: World, disk: SmallDisk) -> None:
    """A database that was closed in order has no -shm: 32 KiB, without which SQLite reads nothing."""
    world.start()
    names = declare(world, 4)
    world.kill()
    close_cleanly(world)
    disk.fill()
    world.start()
    assert_refuses_without_a_trace_at_start(world, names)
    assert_deletes_work(world, names[2:])
    assert_heals(world, disk)


def close_cleanly(world: World) -> None:
    """Leave the database as the last of its users would: in one file."""
    with contextlib.closing(sqlite3.connect(world.service.database)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert not world.service.database.with_name(world.service.database.name + "-shm").exists()


def assert_refuses_without_a_trace_at_start(world: World, names: list[str]) -> None:
    """Started on a full disk: the log is read, and nothing is added to it or to the host."""
    before = still(world)
    shown = {_spec(i)["name"] for i in world.get("/api/v1/interfaces?limit=1000")["interfaces"]}
    assert shown == set(names)
    assert_refused(world.send("POST", "/api/v1/interfaces", {"name": "more"}))
    status, reasons = health(world)
    assert status == 503
    assert any("no space left on the disk" in reason for reason in reasons), reasons
    assert still(world) == before


def test_a_first_start_with_no_room_at_all_says_so_and_heals(world: World, disk: SmallDisk) -> None:
    """There is no reserve yet, and not even room to read: SQLite wants 32 KiB for that."""
    disk.fill()
    world.start()
    status, reasons = health(world)
    assert status == 503
    assert any("no space left on the disk" in reason for reason in reasons), reasons
    assert_refused(world.send("POST", "/api/v1/interfaces", {"name": "more"}))
    assert_heals(world, disk)


# -- read-only


@pytest.mark.parametrize("ended", ["killed", "stopped", "cleanly closed"])
def test_a_log_on_a_read_only_file_system_is_served_and_heals(world: World, disk: SmallDisk, ended: str) -> None:
    world.service.environment["TUNLEDGER_SHUTDOWN__INTERFACES"] = "keep"
    world.start()
    names = declare(world, 4)
    if ended == "killed":
        world.kill()
    else:
        world.stop()
    if ended == "cleanly closed":  # as sqlite3 leaves it: no -wal, no -shm, so that SQLite alone could not read it here
        close_cleanly(world)
    disk.remount(writable=False)
    before = still(world)
    world.start()
    head = world.get("/api/v1/log/head")
    assert {_spec(i)["name"] for i in world.get("/api/v1/interfaces")["interfaces"]} == set(names)
    assert world.get("/api/v1/events?limit=5")
    for method, path, body in (
        ("POST", "/api/v1/interfaces", {"name": "more"}),
        ("PATCH", "/api/v1/interfaces/t1", {"mtu": 1400}),
        ("DELETE", "/api/v1/interfaces/t1", None),
        ("POST", "/api/v1/reconcile", None),
    ):
        heard = world.send(method, path, body)
        assert (heard.status, heard.answer["code"], heard.answer["retry"]) == (503, "log_unavailable", True), (
            heard.answer
        )
        assert "the file system is read-only" in heard.answer["detail"]
    status, reasons = health(world)
    assert status == 503
    assert any("the file system is read-only" in reason for reason in reasons), reasons
    assert still(world) == before
    assert world.get("/api/v1/log/head") == head
    disk.remount(writable=True)
    eventually(lambda: answers_healthy(world), HEALED_S, "a healthy service")
    assert world.alive(), "it heals without anybody starting it anew"
    assert world.send("DELETE", "/api/v1/interfaces/t1").status in (200, 204)
    world.assert_holds()


def answers_healthy(world: World) -> bool:
    """Whether it answers, and well; it may be opening its log anew just now."""
    heard = world.send("GET", "/health")
    return heard.status == 200


def test_a_second_service_is_kept_out_when_a_read_only_file_system_is_writable_again(
    world: World, disk: SmallDisk
) -> None:
    world.start()
    world.stop()
    for file in disk.folder.glob("*.lock"):
        file.unlink()
    disk.remount(writable=False)
    world.start()
    disk.remount(writable=True)
    eventually(lambda: answers_healthy(world), HEALED_S, "a healthy service")
    with pytest.raises(TunledgerError, match="in use by tunledger serve"):
        InstanceLock(world.service.database, {"pid": 1, "what": "another", "since": "now"}).__enter__()
    world.assert_holds()


def test_an_ext4_that_shuts_itself_down_stops_the_writes_and_the_next_start_reads(tmp_path: Path) -> None:
    """errors=remount-ro, with files open for writing: EROFS in the middle of the service's life."""
    with (
        small_disk(tmp_path, "ext4") as disk,
        World(tmp_path / "world", case="abort", database=disk.folder / "tunledger.db") as world,
    ):
        world.start()
        names = declare(world, 4)
        before = still(world)
        disk.abort()
        heard = world.send("POST", "/api/v1/interfaces", {"name": "more"})
        assert heard.status == 503, heard.answer
        assert heard.answer["code"] in ("log_unavailable", "outcome_unknown")
        assert still(world) == before
        if not world.alive() or heard.answer["code"] == "outcome_unknown":
            assert world.wait_dead() == 74
            world.start()
        assert {_spec(i)["name"] for i in world.get("/api/v1/interfaces")["interfaces"]} == set(names)
        assert world.send("DELETE", "/api/v1/interfaces/t1").status == 503
        assert any("read-only" in reason for reason in health(world)[1])
        assert still(world) == before
        world.service.close()


# -- migrating


def test_a_migration_without_room_says_so_and_leaves_nothing_that_is_in_its_own_way(disk: SmallDisk) -> None:
    path = disk.folder / "new.db"
    disk.fill()
    with pytest.raises(TunledgerError, match="no space left on the disk; free some") as refused:
        local.migrate(path)
    assert (refused.value.code, refused.value.retry) == (ErrorCode.LOG_FULL, True)
    disk.free()
    assert local.migrate(path)[0] is None
    require_current(path)


@pytest.mark.parametrize("but_kib", [24, 96, 300])
def test_a_migration_that_runs_out_of_room_leaves_what_was(disk: SmallDisk, but_kib: int) -> None:
    path = disk.folder / "new.db"
    disk.fill(but=but_kib * 1024)
    with pytest.raises(TunledgerError, match="no space left on the disk") as refused:
        local.migrate(path)
    assert refused.value.code is ErrorCode.LOG_FULL
    disk.free()
    local.migrate(path)  # the step that there was room for is done
    require_current(path)


def test_a_migration_on_a_read_only_file_system_says_so(disk: SmallDisk) -> None:
    disk.remount(writable=False)
    with pytest.raises(TunledgerError, match="the file system is read-only") as refused:
        local.migrate(disk.folder / "new.db")
    assert refused.value.code is ErrorCode.LOG_UNAVAILABLE
