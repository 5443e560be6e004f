"""Lives of a service, each a few steps, which together reach every failpoint: what the cases cut short.

A scenario prepares a world, then lives in it while the service runs armed. It goes on as long as the service does, and
says nothing of what must hold: that is the oracle's. `strict` runs, where nothing is armed to break, also check that
every answer is the expected one, so that no scenario rots into a list of refusals.
"""

import http.client
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from service.domain import events as ev
from service.domain.values import Mode, NodeId, parse_cidr
from service.store.writer import LogWriter
from tests.e2e.harness import eventually
from tests.faults.world import Heard, World
from tests.kernel.outside import LinuxOutside, attached

VARIABLE: Final = "TUNLEDGER_TEST_FAILPOINTS"
SNAPSHOT_EVERY: Final = 2048  # service.store.snapshots.EVERY


class GoneError(Exception):
    """The service died, or does not answer any more."""


class Life:
    """One run of a scenario. `strict`: every answer must be the expected one."""

    def __init__(self, world: World, *, strict: bool) -> None:
        self.world, self.strict = world, strict

    def say(self, expected: int, method: str, path: str, body: Any = None, **options: Any) -> Heard:
        """Send a command. Raises GoneError if nothing comes back."""
        heard = self.world.send(method, path, body, **options)
        if heard.status is None:
            raise GoneError(str(heard))
        assert not self.strict or heard.status == expected, f"{heard}: expected {expected}: {heard.answer}"
        return heard

    def ask(self, path: str) -> Any:
        """A read. Raises GoneError if nothing comes back."""
        heard = self.world.send("GET", path)
        if heard.status is None:
            raise GoneError(str(heard))
        return heard.answer

    def until(self, check: Callable[[], Any], what: str) -> None:
        """Wait for something that the service is to bring about; what was broken on purpose may keep it from that."""

        def come() -> bool:
            if not self.world.alive():
                raise GoneError(what)
            try:
                return bool(check())
            except (KeyError, TypeError):  # an answer without the interface
                return False

        try:
            eventually(come, 10.0 if self.strict else 3.0, what)
        except AssertionError:
            if self.strict:
                raise

    def stop(self) -> None:
        """An orderly stop, if there still is something to stop."""
        assert self.world.service.process is not None
        self.world.service.process.send_signal(signal.SIGTERM)
        status = self.world.wait_dead()
        assert not self.strict or status == 0, f"the stop ended with {status}"


@dataclass(frozen=True)
class Scenario:
    """A life, and what it begins with."""

    name: str
    live: Callable[[Life], None]
    prepare: Callable[[World], None] | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    def world(self, folder: Path, case: str) -> World:
        """The world of one run; enter it."""
        return World(folder, case=case, settings=self.settings)

    def run(self, world: World, orders: str, *, strict: bool = False) -> None:
        """Live in a world under these orders, until the end or until the service dies. It is dead afterwards."""
        if self.prepare is not None:
            self.prepare(world)
        life = Life(world, strict=strict)
        try:
            if not world.try_start(**{VARIABLE: orders}):
                raise GoneError("at start-up")
            self.live(life)
            life.stop()
        except (GoneError, OSError, http.client.HTTPException) as error:
            log = world.service.log
            told = log.read_text()[-3000:] if log.exists() else ""
            if strict:
                raise AssertionError(f"{self.name}: the service died: {error!r}\n{told}") from error
            if world.alive():
                life.stop()
        world.wait_dead()


# -- the lives


def _classic(life: Life) -> None:
    body = {"name": "tun7", "address": "10.7.0.1", "netmask": "255.255.255.0", "mtu": 1400}
    life.say(200, "POST", "/api/interface/create", body)
    life.say(200, "POST", "/api/interface/configure", {"address": "10.7.1.1", "mtu": 1300})
    life.say(200, "POST", "/api/interface/start")
    life.ask("/api/interface/status")
    life.say(200, "POST", "/api/interface/stop")
    life.say(200, "DELETE", "/api/interface/delete")
    life.say(200, "POST", "/api/interface/create", {"address": "10.7.2.1"})


def _lab(life: Life) -> None:
    spec = {"name": "a0", "addresses": ["10.1.0.1/24", "fd00:1::1/64"], "mtu": 1400}
    life.say(201, "POST", "/api/v1/interfaces", spec, key="make")
    life.say(201, "POST", "/api/v1/interfaces", spec, key="make")
    life.say(409, "POST", "/api/v1/interfaces", spec, key="refused")
    patch = {"mtu": 1300, "txqueuelen": 100, "addresses": ["10.1.0.1/24", "10.2.0.1/16"], "owner": 1, "up": False}
    life.say(200, "PATCH", "/api/v1/interfaces/a0", patch, key="change")
    life.say(
        200, "PATCH", "/api/v1/interfaces/a0?recreate=true", {"mode": "tap", "mac": "02:00:00:00:00:01", "up": True}
    )
    life.say(200, "PATCH", "/api/v1/interfaces/a0", {"mac": "02:00:00:00:00:02"})
    many: list[Any] = [{"create": {"name": f"b{n}", "addresses": [f"10.9.{n}.1/24"]}} for n in range(3)]
    life.say(200, "POST", "/api/v1/batch", {"commands": [*many, {"start": {"name": "a0"}}]}, key="batch")
    changed = life.say(200, "PATCH", "/api/v1/interfaces/b0?confirm_within_s=60", {"mtu": 1350})
    life.say(200, "POST", f"/api/v1/commands/{changed.command_id}/confirm", key="confirm")
    life.say(200, "POST", "/api/v1/batch", {"commands": [{"delete": {"name": "b1"}}, {"delete": {"name": "b2"}}]})
    life.say(200, "POST", "/api/v1/interfaces/a0/stop")
    life.say(202, "POST", "/api/v1/interfaces", {"name": "c0"}, headers={"Prefer": "respond-async"})
    life.say(404, "PATCH", "/api/v1/interfaces/none", {"mtu": 1300}, key="nothing")
    life.say(400, "POST", "/api/v1/interfaces", {"name": "c1", "mtu": 1}, key="wrong")
    life.ask("/api/v1/counters")
    life.say(200, "POST", "/api/v1/reconcile", key="reconcile")


def _deadline(life: Life) -> None:
    life.say(201, "POST", "/api/v1/interfaces", {"name": "d0", "addresses": ["10.4.0.1/24"]})
    life.say(200, "PATCH", "/api/v1/interfaces/d0?confirm_within_s=1", {"mtu": 1300, "addresses": ["10.5.0.1/24"]})
    awaiting = "/api/v1/interfaces/d0"
    life.until(lambda: not life.ask(awaiting)["status"]["awaiting_confirmation"], "the way back")


def _worker_dies(life: Life) -> None:
    spec = {"name": "w0", "addresses": ["10.6.0.1/24"], "processing": {"running": True}}
    life.say(201, "POST", "/api/v1/interfaces", spec)
    workers = life.world.workers()
    if workers and "w0" in life.world.host.links():
        life.world.traffic("w0", packets=20)
        os.kill(workers[0], signal.SIGKILL)
    life.until(lambda: "WorkerExited" in str(life.ask("/api/v1/events?type=WorkerExited")), "the death to be noticed")
    life.until(lambda: life.ask("/api/v1/interfaces/w0")["status"]["observed"]["processing"]["running"], "a successor")


def _chain(life: Life) -> None:
    """What is done with packets is changed while they are read."""
    spec = {"name": "p0", "addresses": ["10.7.0.1/24"], "processing": {"running": True}}
    life.say(201, "POST", "/api/v1/interfaces", spec)
    for chain in (
        [{"processor": "inspect"}],
        [{"processor": "filter", "default": "drop"}, {"processor": "inspect"}],
        [],
    ):
        life.say(200, "PATCH", "/api/v1/interfaces/p0", {"processing": {"chain": chain}})


def _undone(life: Life) -> None:
    """A batch that the kernel refuses in its second half: the device is held by somebody."""
    life.say(200, "POST", "/api/v1/batch", {"commands": [{"create": {"name": "u0"}}, {"create": {"name": "u1"}}]})
    with attached("u1"):
        life.say(409, "POST", "/api/v1/batch", {"commands": [{"start": {"name": "u0"}}, {"start": {"name": "u1"}}]})


def _drifts(life: Life) -> None:
    """Somebody else changes what is ours while the service runs."""
    made: list[Any] = [{"create": {"name": f"f{n}", "addresses": [f"10.12.{n}.1/24"]}} for n in range(4)]
    life.say(200, "POST", "/api/v1/batch", {"commands": made})
    outside = LinuxOutside()
    try:
        outside.delete("f0")
        outside.set_mtu("f1", 1280)
        outside.set_txqueuelen("f1", 5)
        outside.set_up("f2", up=False)
        outside.rename("f3", "g3")
    except OSError:
        raise GoneError("the links") from None
    finally:
        outside.close()
    life.say(200, "POST", "/api/v1/reconcile")
    life.until(lambda: not life.ask("/api/v1/drift")["drift"], "repairs")


def _snapshot(life: Life) -> None:
    life.say(201, "POST", "/api/v1/interfaces", {"name": "s0"})
    life.until(lambda: life.world.query("SELECT 1 FROM snapshots"), "a snapshot")
    life.say(200, "DELETE", "/api/v1/interfaces/s0")


def _rests(life: Life) -> None:
    life.until(lambda: not life.ask("/api/v1/drift")["drift"], "recovery")


# -- what they begin with


@dataclass(frozen=True)
class _Past:
    """A database that was lived with already, and what was sent to it."""

    folder: Path
    sent: Sequence[Heard]


_pasts: dict[str, _Past] = {}
_past_lock = threading.Lock()
_folders: list[tempfile.TemporaryDirectory[str]] = []


def _copy(source: Path, target: Path) -> None:
    """A database with all its files, but for the room that is reserved and the lock."""
    for old in target.glob("tunledger.db*"):
        old.unlink()
    for each in source.glob("tunledger.db*"):
        if not each.name.endswith((".reserve", ".lock")):
            shutil.copy(each, target)


def _take_over(world: World, name: str, make: Callable[[Path], Sequence[Heard]]) -> None:
    """Give a world the past of this name, which is made once."""
    with _past_lock:
        if name not in _pasts:
            _folders.append(tempfile.TemporaryDirectory(prefix=f"tunledger-{name}-"))
            folder = Path(_folders[-1].name)
            sent = make(folder)
            _pasts[name] = _Past(folder, sent)
    past = _pasts[name]
    _copy(past.folder, world.service.database.parent)
    world.sent[:] = deepcopy(list(past.sent))


def _acknowledged(heard: Heard) -> None:
    assert heard.kind == "acknowledged", f"{heard}: {heard.answer}"


def _crashed_past(folder: Path) -> Sequence[Heard]:
    """A crash before an outcome is durable, with four interfaces declared and one retired."""
    with World(folder, case="the past", decoys=False) as world:
        world.start(**{VARIABLE: "kill@store.answer.close"})
        for n in range(4):
            spec = {"name": f"r{n}", "addresses": [f"10.3.{n}.1/24"], "processing": {"running": n == 0}}
            _acknowledged(world.send("POST", "/api/v1/interfaces", spec))
        _acknowledged(world.send("POST", "/api/v1/interfaces", {"name": "r4"}))
        _acknowledged(world.send("DELETE", "/api/v1/interfaces/r4"))
        batch = {"commands": [{"create": {"name": "r5"}}, {"delete": {"name": "r3"}}]}
        heard = world.send("POST", "/api/v1/batch", batch, key="cut-off")
        assert heard.kind == "unknown", heard
        assert world.wait_dead() == -signal.SIGKILL
        return world.sent


def crashed(world: World) -> None:
    """After a crash in which others changed the host: some of our links are as they were, some are gone, one has
    another mtu, one another name, and one is there again that was retired.
    """
    _take_over(world, "crashed", _crashed_past)
    ids = dict(world.query("SELECT name, interface_id FROM interface_names"))
    world.planted.add(ids["r4"])
    outside = LinuxOutside()
    try:
        for name in ("r0", "r1", "r3", "r4", "r5"):
            shown = "elsewhere" if name == "r1" else name
            outside.add_link(shown, Mode.TUN, alias=f"tunledger:{world.node}:{ids[name]}")
        outside.set_txqueuelen("r0", 1000)
        outside.add_address("r0", parse_cidr("10.3.0.1/24", "address"))
        outside.set_up("r0", up=True)
    finally:
        outside.close()


def _long_past(folder: Path) -> Sequence[Heard]:
    """A log one command short of a snapshot, and a -wal that is long enough to be checkpointed."""
    with World(folder, case="the past", decoys=False) as world:
        writer = LogWriter(
            world.service.database,
            NodeId(world.node),
            now=lambda: "2026-01-02T03:04:05.000006Z",
            on_recorded=lambda _events: None,
            on_broken=lambda _reason: None,
        )
        writer.start()
        drafts = [
            ev.Draft(
                event_id=f"past-{n}",
                stream=ev.node_stream(NodeId(world.node)),
                body=ev.ServiceStopped(pid=n, reason="past", interfaces="keep"),
                actor="system",
                command_id=None,
                expected_version=None,
            )
            for n in range(SNAPSHOT_EVERY - 3)
        ]
        for start in range(0, len(drafts), 50):
            writer.append(drafts[start : start + 50]).result(30)
        kept = folder / "kept"
        kept.mkdir()
        _copy(folder, kept)  # before the writer closes: that would take the -wal over and remove it
        writer.close()
        _copy(kept, folder)
        return []


def long_past(world: World) -> None:
    """A long log."""
    _take_over(world, "long", _long_past)


KEEP: Final = {"TUNLEDGER_SHUTDOWN__INTERFACES": "keep"}

SCENARIOS: Final = (
    Scenario("classic", _classic),
    Scenario("lab", _lab),
    Scenario("deadline", _deadline, settings=KEEP | {"TUNLEDGER_COUNTERS__INTERVAL_S": "1"}),
    Scenario("a worker dies", _worker_dies, settings=KEEP),
    Scenario("chain", _chain),
    Scenario("undone", _undone),
    Scenario("drifts", _drifts, settings=KEEP),
    Scenario("recovery", _rests, prepare=crashed, settings=KEEP),
    Scenario("snapshot", _snapshot, prepare=long_past),
)

BY_NAME: Final = {scenario.name: scenario for scenario in SCENARIOS}
