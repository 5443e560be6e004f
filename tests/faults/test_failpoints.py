"""Kill, fail or hold up the service at every named point of the code, start it again, and ask the oracle.

The points are read out of the code, and enumerated by a dry run of every scenario; a point in the code that no run
reached fails the suite. In a bounded run each name is killed at once, at a place that the seed chooses among all the
times that it was reached; the whole enumeration is marked `full`. TUNLEDGER_TEST_SEED repeats a choice.
"""

import ast
import errno
import os
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config

from service import failpoints
from service.store import schema
from service.store.database import open_writer, revision
from service.store.migrate import scripts
from tests.faults.cases import SEED, Traces, at_once, comes_surely, folder_of, holds_and_works, parts
from tests.faults.counts import count
from tests.faults.forked import nursery
from tests.faults.scenarios import KEEP, VARIABLE
from tests.faults.world import Heard, World
from tests.part import part_of

REPOSITORY = Path(__file__).parents[2]
ERRORS = ("EIO", "ENOSPC", "ENOMEM", "EPERM", "EBUSY")


# -- the points in the code


@dataclass(frozen=True)
class Point:
    """A point as the code has it: a name, or a pattern for several where the name is put together."""

    where: str
    pattern: str
    fails: bool


@cache
def _points() -> tuple[Point, ...]:
    return tuple(_found())


def _found() -> Iterator[Point]:
    for path in sorted([*(REPOSITORY / "service").rglob("*.py"), *(REPOSITORY / "migrations").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "failpoints.reach":
                where = f"{path.relative_to(REPOSITORY)}:{node.lineno}"
                fails = any(k.arg == "fails" and ast.unparse(k.value) == "True" for k in node.keywords)
                match node.args[0]:
                    case ast.Constant(value=str() as name):
                        yield Point(where, re.escape(name), fails)
                    case ast.JoinedStr(values=parts):
                        texts = (re.escape(str(p.value)) if isinstance(p, ast.Constant) else r"[^.]+" for p in parts)
                        yield Point(where, "".join(texts), fails)
                    case other:
                        pytest.fail(f"{where}: {ast.unparse(other)} is no name that can be read")


def orders(places: Iterable[tuple[str, str, int]], *actions: str) -> list[str]:
    """Cases in words: "SCENARIO: kill@POINT#TIME"."""
    return [
        f"{scenario}: {action.partition('=')[0]}@{point}#{time}{'=' if '=' in action else ''}{action.partition('=')[2]}"
        for scenario, point, time in places
        for action in actions
    ]


@cache
def fallible() -> re.Pattern[str]:
    """The names of all points that can fail."""
    return re.compile("|".join(point.pattern for point in _points() if point.fails))


# -- the cases


def test_every_point_in_the_code_is_reached_by_a_case(traces: Traces, tmp_path: Path) -> None:
    reached = {point for trace in traces.reached.values() for point in trace} | set(migration_points(tmp_path))
    missed = [f"{p.where} {p.pattern}" for p in _points() if not any(re.fullmatch(p.pattern, name) for name in reached)]
    assert missed == []
    unread = [name for name in reached if not any(re.fullmatch(p.pattern, name) for p in _points())]
    assert unread == [], "reached, but not found in the code: is the search for points right?"
    count("points in the code", len(_points()))
    count("points by name", len(reached))


def kill_at(folder: Path, case: str) -> None:
    """Kill at one place, look at the dead host, start again, and look at everything."""
    scenario, order = parts(case)
    with scenario.world(folder, case) as world:
        scenario.run(world, order)
        killed = world.wait_dead() == -signal.SIGKILL
        # The first time comes in every run; later ones may not, where threads race.
        point = order.partition("@")[2].partition("#")[0]
        sure = order.endswith("#1") and comes_surely(scenario.name, point)
        assert killed or not sure, f"{case}: was never reached"
        world.assert_dead_is_sound()
        world.start()
        holds_and_works(world)


@pytest.mark.timeout(540)
def test_a_kill_at_any_point_loses_nothing_and_leaves_nothing(traces: Traces, tmp_path: Path) -> None:
    cases = orders(traces.chosen(), "kill")
    count("kills", len(cases))
    at_once(lambda case: kill_at(tmp_path / folder_of(case), case), cases)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_a_kill_every_time_that_any_point_is_reached_loses_nothing(traces: Traces, tmp_path: Path) -> None:
    cases = part_of(orders(traces.places(), "kill"))
    count("kills, whole", len(cases))
    at_once(lambda case: kill_at(tmp_path / folder_of(case), case), cases)


def fail_at(folder: Path, case: str) -> None:
    """Have one step fail: what is said of it is clear, and afterwards everything holds."""
    scenario, order = parts(case)
    with scenario.world(folder, case) as world:
        scenario.run(world, order)
        status = world.wait_dead()
        assert status in {0, 1, 74}, f"{case}: the service ended with {status}"
        for heard in world.sent:
            assert_clear(case, heard)
        world.assert_dead_is_sound()
        world.start()
        holds_and_works(world)


def assert_clear(case: str, heard: Heard) -> None:
    """An answer is a success, or an error that says what happened."""
    if heard.status is None or heard.status < 400:
        return
    message = heard.answer.get("error") or heard.answer.get("detail") or ""
    assert message, f"{case}: {heard}: no word of what happened: {heard.answer}"
    assert heard.code != "internal", f"{case}: {heard}: {heard.answer}"
    assert heard.status != 500 or "mistake" not in message, f"{case}: {heard}: {heard.answer}"


@pytest.mark.timeout(540)
def test_an_error_at_any_point_that_can_fail_is_told_and_mended(traces: Traces, tmp_path: Path) -> None:
    places = traces.chosen(lambda name: bool(fallible().fullmatch(name)))
    cases = [
        case for place in places for case in orders([place], f"fail={random.Random(f'{SEED} {place}').choice(ERRORS)}")
    ]
    count("errors", len(cases))
    at_once(lambda case: fail_at(tmp_path / folder_of(case), case), cases)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_any_error_any_time_that_a_point_can_fail_is_told_and_mended(traces: Traces, tmp_path: Path) -> None:
    """Every errno once for each name, and one of them at every other place."""
    can_fail = fallible().fullmatch
    everywhere = [
        case
        for place in traces.places(lambda name: bool(can_fail(name)))
        for case in orders([place], f"fail={random.Random(f'{SEED} {place}').choice(ERRORS)}")
    ]
    every_error = orders(traces.chosen(lambda name: bool(can_fail(name))), *(f"fail={error}" for error in ERRORS))
    cases = part_of(sorted({*everywhere, *every_error}))
    count("errors, whole", len(cases))
    at_once(lambda case: fail_at(tmp_path / folder_of(case), case), cases)


# -- held up


def clients(
    world: World, requests: Sequence[tuple[str, str, object, str | None]], timeout_s: float = 30.0
) -> list[Heard]:
    """Send requests from a thread each, all at once."""
    heard: list[Heard] = []

    def send(method: str, path: str, body: object, key: str | None) -> None:
        heard.append(world.send(method, path, body, key=key, timeout_s=timeout_s))

    threads = [threading.Thread(target=send, args=request) for request in requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return heard


def _hang_up(world: World) -> None:
    """Clients give up in the middle of their commands, and ask again."""
    create = ("POST", "/api/v1/interfaces", {"name": "h0", "processing": {"running": True}}, "hung-up")
    clients(world, [create, ("PUT", "/api/v1/interfaces/h1", {"mtu": 1300}, None)], timeout_s=0.05)
    (again,) = clients(world, [create])
    assert again.kind == "acknowledged", again


def _race(world: World) -> None:
    """Several change the same interface at once, while one of them is held up."""
    assert world.send("PUT", "/api/v1/interfaces/h0", {}).kind == "acknowledged"
    requests: list[tuple[str, str, object, str | None]] = [
        ("PATCH", "/api/v1/interfaces/h0", {"mtu": 1300}, "race"),
        ("PATCH", "/api/v1/interfaces/h0", {"mtu": 1300}, "race"),
        ("PATCH", "/api/v1/interfaces/h0", {"addresses": ["10.8.0.1/24"]}, None),
        ("POST", "/api/v1/interfaces/h0/start", None, None),
        ("DELETE", "/api/v1/interfaces/h0", None, None),
        ("POST", "/api/v1/interfaces", {"name": "h0", "mtu": 1400}, None),
    ]
    clients(world, requests)


def _stop(world: World) -> None:
    """The service is told to stop in the middle of a command."""
    assert world.service.process is not None
    stopping = threading.Timer(0.05, world.service.process.send_signal, [signal.SIGTERM])
    stopping.start()
    clients(
        world,
        [("POST", "/api/v1/interfaces", {"name": "h0"}, "stopped"), ("DELETE", "/api/v1/interfaces/x", None, None)],
    )
    stopping.join()
    assert world.wait_dead() == 0
    world.start()


HELD_UP = {"hang up": _hang_up, "race": _race, "stop": _stop}
HELD_AT = ("api.request", "store.commit.before", "store.commit.after", "dataplane.attach.before", "api.answer.before")


def hold_up(folder: Path, case: str) -> None:
    """Clients do something while one step takes its time."""
    what, _, order = case.partition(": ")
    with World(folder, case=case, settings=KEEP) as world:
        world.start(**{VARIABLE: order})
        HELD_UP[what](world)
        holds_and_works(world)


@pytest.mark.timeout(540)
def test_while_a_step_takes_its_time_clients_may_do_what_they_like(tmp_path: Path) -> None:
    cases = [
        f"{what}: wait@{point}#{time}=0.2"
        for what in HELD_UP
        for point, time in zip(HELD_AT, (2, 3, 3, 1, 1), strict=True)
    ]
    chosen = random.Random(SEED).sample(cases, 8)
    count("held up", len(chosen))
    at_once(lambda case: hold_up(tmp_path / folder_of(case), case), chosen)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_while_any_step_takes_its_time_clients_may_do_what_they_like(traces: Traces, tmp_path: Path) -> None:
    points = sorted({point for trace in traces.reached.values() for point in trace})
    cases = part_of(f"{what}: wait@{point}#{time}=0.2" for what in HELD_UP for point in points for time in (1, 2, 4))
    count("held up, whole", len(cases))
    at_once(lambda case: hold_up(tmp_path / folder_of(case), case), cases)


# -- migrations


OLD = "0001"  # the first schema that was released


def old_world(folder: Path, case: str) -> World:
    """A world whose database is of the first release; nothing else is in it."""
    path = folder / "old.db"
    folder.mkdir(parents=True, exist_ok=True)
    config = Config()
    config.set_main_option("script_location", str(scripts()))
    engine = open_writer(path)
    try:
        with _alembic, engine.connect() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, OLD)
        with engine.begin() as connection:
            connection.exec_driver_sql("INSERT INTO node VALUES ('0123456789ab', '2026-01-02T03:04:05.000006Z')")
    finally:
        engine.dispose()
    return World(folder, case=case, database=path)


_alembic = threading.Lock()  # its context is one for the process


def migrate(world: World, orders: str = "") -> int:
    """Run `tunledger migrate`; the exit status."""
    environment = {**world.service.environment, VARIABLE: orders}
    return nursery().start("migrate", environment=environment, log=world.service.log).wait(30)


def migration_points(folder: Path) -> list[str]:
    """What migrating a database of the first release reaches, in order."""
    with old_world(folder / "migration", "the dry run of migrating") as world:
        assert migrate(world, f"trace:{folder / 'migration.trace'}") == 0
        return (folder / "migration.trace").read_text().split()


def cut_short(folder: Path, case: str) -> None:
    """A migration that breaks off leaves the database as it was; the next one brings it up; then all is well."""
    order, error = case.partition("=")[::2]
    with old_world(folder, case) as world:
        status = migrate(world, case)
        unnamed = bool(error) and order.startswith("fail@store.lock.name#")  # the lock is held, its holder goes unnamed
        expected = -signal.SIGKILL if not error else 0 if unnamed else 1
        assert status == expected, f"{case}: {status}: {world.service.log.read_text()}"
        if error and not unnamed:
            said = world.service.log.read_text()
            words = "no space left" if error == "ENOSPC" else os.strerror(getattr(errno, error))
            assert words in said, f"{order}: {said}"
            assert "Traceback" not in said, said
        assert revision(world.service.database) in schema.REVISIONS
        assert migrate(world) == 0, f"{case}: {world.service.log.read_text()}"
        world.start()
        holds_and_works(world)


def migration_cases(folder: Path) -> list[str]:
    """A kill at every place, and an error at every one that can fail."""
    times = Counter(migration_points(folder))
    kills = [f"kill@{point}#{n}" for point, most in times.items() for n in range(1, most + 1)]
    errors = [
        f"fail@{point}#{n}={error}"
        for point, most in times.items()
        if fallible().fullmatch(point)
        for n in range(1, most + 1)
        for error in ("EIO", "ENOSPC")
    ]
    return kills + errors


@pytest.mark.timeout(300)
def test_a_migration_that_is_cut_short_is_finished_by_the_next(tmp_path: Path) -> None:
    cases = random.Random(SEED).sample(migration_cases(tmp_path), 12)
    count("migrations cut short", len(cases))
    at_once(lambda case: cut_short(tmp_path / folder_of(case), case), cases)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_migration_may_be_cut_short_anywhere(tmp_path: Path) -> None:
    cases = part_of(migration_cases(tmp_path))
    count("migrations cut short, whole", len(cases))
    at_once(lambda case: cut_short(tmp_path / folder_of(case), case), cases)


# -- the orders themselves


@pytest.mark.parametrize(
    "order",
    [
        "kill",
        "kill:0",
        "kill:x",
        "trace:",
        "kill@",
        "kill@a=EIO",
        "fail@a",
        "fail@a=ENOTHING",
        "wait@a=x",
        "fail@a#0=EIO",
    ],
)
def test_an_order_that_cannot_be_read_is_refused(order: str) -> None:
    with pytest.raises(ValueError, match=VARIABLE):
        failpoints.arm({VARIABLE: order})
    failpoints.arm({})


def test_an_error_comes_at_its_time_and_only_where_one_can(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    failpoints.arm({VARIABLE: f"trace:{trace};fail@here#2=ENOSPC;wait@there=0"})
    try:
        failpoints.reach("here", fails=True)
        failpoints.reach("there")
        with pytest.raises(OSError, match="No space left"):
            failpoints.reach("here", fails=True)
        failpoints.reach("here", fails=True)
    finally:
        failpoints.arm({})
    assert trace.read_text().split() == ["here", "there", "here", "here"]
    failpoints.reach("here", fails=True)
    assert len(trace.read_text().split()) == 4, "unarmed, but still tracing"
