"""A host that does not cooperate: clocks that jump, capabilities that go away, workers that die, clients that hang up,
others who change what is ours. After each case all that must always hold is asserted, and the service is as before.

The cases wait most of their time, so they run beside each other, each in a world of its own.
"""

import contextlib
import http.client
import json
import os
import random
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from service.domain import events as ev
from tests.faults.forked import nursery
from tests.faults.outsiders import (
    Beside,
    Repeated,
    beside,
    call,
    elsewhere,
    events,
    health,
    ip,
    is_quiet,
    make,
    mute,
    note,
    number_of,
    odd_world,
    open_files,
    open_folder,
    position,
    request_bytes,
    run_beside,
    said,
    soon,
    status,
    there,
    throng,
)
from tests.faults.world import World
from tests.kernel.outside import LinuxOutside, set_sysctl
from tests.namespace import fresh_namespace

EVERY_SECOND = {"TUNLEDGER_RECONCILE__INTERVAL_S": "1", "TUNLEDGER_COUNTERS__INTERVAL_S": "1"}
HOUR_S = 3600.0

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def others(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    """The cases of this module, under way."""
    yield from run_beside(request, tmp_path_factory)


# -- time


def stamp(off_s: float = 0.0) -> str:
    """A time in the form of the log."""
    return (datetime.now(UTC) + timedelta(seconds=off_s)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@beside
def test_a_clock_that_jumps_neither_breaks_the_log_nor_disturbs_what_comes_again_and_again(folder: Path) -> None:
    world, service = odd_world(folder, "clock jumps", settings=EVERY_SECOND)
    with world:
        world.start()
        make(world, {"name": "c0", "addresses": ["10.20.0.1/24"], "processing": {"running": True}})
        world.traffic("c0", packets=50)
        for number, off_s in enumerate((HOUR_S, -HOUR_S, 0.0)):
            before = world.get("/api/v1/counters")["counters"]["c0"]
            service.clock(off_s)
            stored = _stored(world)
            world.traffic("c0", packets=10)
            heard = world.send("PATCH", "/api/v1/interfaces/c0", {"mtu": 1400 + number}, key=f"jump-{number}")
            assert heard.kind == "acknowledged", heard.answer
            again = world.send("PATCH", "/api/v1/interfaces/c0", {"mtu": 1400 + number}, key=f"jump-{number}")
            assert again.answer == heard.answer
            ip("link set c0 mtu 1290")
            soon(lambda n=number: world.host.links()["c0"].mtu == 1400 + n, "a repair")  # type: ignore[misc]
            soon(lambda s=stored: _stored(world) != s, "another sample")  # type: ignore[misc]
            after = world.get("/api/v1/counters")["counters"]["c0"]
            assert after["kernel"]["tx_packets"] >= before["kernel"]["tx_packets"] + 10
        times = [each.recorded_at for each in world.service.events()]
        assert times != sorted(times), "no clock was set back"
        assert world.service.verification().problems == []
        world.assert_holds()


def _stored(world: World) -> list[tuple[str, ...]]:
    """The totals as they are in the database."""
    return world.query("SELECT source, key, raw FROM counter_incarnations ORDER BY id")


@beside
def test_the_present_is_what_state_shows_of_a_time_after_all_others_also_where_the_clock_was_ahead(
    folder: Path,
) -> None:
    world, service = odd_world(folder, "a clock that was ahead")
    with world:
        world.start()
        make(world, {"name": "c0", "mtu": 1400})
        service.clock(HOUR_S)
        assert world.send("PATCH", "/api/v1/interfaces/c0", {"mtu": 1401}).kind == "acknowledged"
        service.clock(0.0)
        assert world.send("PATCH", "/api/v1/interfaces/c0", {"mtu": 1402}).kind == "acknowledged"
        seen = []
        for off_s in (-60.0, 0.0, 60.0, 2 * HOUR_S):
            then = world.get(f"/api/v1/state?at={stamp(off_s)}")
            seen.append((then["position"], then["interfaces"].get("c0", {}).get("spec", {}).get("mtu")))
        assert seen[0] == (0, None)
        assert seen[1][1] == seen[2][1] == 1402
        assert seen[3][1] == 1402, f"in two hours, the present will be shown as {seen[3]}"
        assert [at for at, _ in seen] == sorted(at for at, _ in seen)
        world.assert_holds()


@beside
def test_an_unconfirmed_change_is_taken_back_in_time_and_once_whatever_is_done_to_the_clock_on_the_wall(
    folder: Path,
) -> None:
    """Who locked himself out waits as long as was said; a service that was away goes by the time that was told."""
    world, service = odd_world(folder, "clock jumps over a deadline", settings=EVERY_SECOND)
    with world:
        world.start()
        make(world, {"name": "c0", "mtu": 1400}, {"name": "c1", "mtu": 1400})
        changed = time.monotonic()
        for name, within_s in (("c0", 3), ("c1", 1800)):
            path = f"/api/v1/interfaces/{name}?confirm_within_s={within_s}"
            assert world.send("PATCH", path, {"mtu": 1300}).kind == "acknowledged"
        world.clock_was_set = True
        service.clock(-HOUR_S)
        soon(lambda: world.host.links()["c0"].mtu == 1400, "the way back of c0")
        assert time.monotonic() - changed >= 3, "taken back before its time"
        service.clock(HOUR_S)
        assert world.send("PATCH", "/api/v1/interfaces/c0?confirm_within_s=1", {"mtu": 1310}).kind == "acknowledged"
        soon(lambda: world.host.links()["c0"].mtu == 1400, "the way back of c0 again")
        assert world.host.links()["c1"].mtu == 1300
        world.kill()
        world.start()
        soon(lambda: world.host.links()["c1"].mtu == 1400, "the way back of c1")
        service.clock(0.0)
        for name, times in (("c0", 2), ("c1", 1)):
            back = [e for e in events(world, ev.InterfaceReconfigured, name=name) if e.actor == "system"]
            assert len(back) == times
        world.assert_holds()


@beside
def test_failed_repairs_are_tried_again_whatever_the_clock_on_the_wall_says(folder: Path) -> None:
    world, service = odd_world(folder, "clock jumps between retries")
    with world:
        world.start()
        make(world, {"name": "c0"})
        assert service.process is not None
        service.process.send_signal(signal.SIGSTOP)
        ip("link delete c0", "tuntap add dev c0 mode tap")
        service.process.send_signal(signal.SIGCONT)
        soon(lambda: status(world, "c0")["state"] == "degraded", "the trouble")
        service.clock(-HOUR_S)
        tried = status(world, "c0")["attempts"]
        soon(lambda: status(world, "c0")["attempts"] > tried + 1, "two more tries")
        ip("tuntap del dev c0 mode tap")
        soon(lambda: status(world, "c0")["state"] == "applied", "the repair")
        service.clock(0.0)
        world.assert_holds()


# -- boots and instances


@beside
def test_a_reboot_brings_everything_back_and_counts_nothing_twice(folder: Path) -> None:
    """A new network namespace is what a reboot leaves: no links, and ifindexes that begin anew."""
    world, service = odd_world(folder, "a reboot", decoys=False)
    with world:
        set_sysctl("net/ipv6/conf/default/disable_ipv6", "1")  # whose own packets would be counted
        service.boot = "11111111-1111-4111-8111-111111111111"
        world.start()
        make(
            world,
            {"name": "r0", "addresses": ["10.21.0.1/24"], "processing": {"running": True}},
            {"name": "r1", "mode": "tap", "drift": "report"},
        )
        world.traffic("r0", packets=100)
        before = soon(lambda: _counted(world, "r0", 100), "the counters")
        first = {link.name: link.ifindex for link in world.host.links().values()}
        world.kill()
        with fresh_namespace():
            set_sysctl("net/ipv6/conf/default/disable_ipv6", "1")
            world.host.close()
            world.host = type(world.host)()  # closed with the namespace
            service.boot = "22222222-2222-4222-8222-222222222222"
            since = len(world.service.events())
            world.start()
            now = {link.name: link.ifindex for link in world.host.links().values()}
            assert now == first, "the ifindexes are others, so this shows less than it should"
            causes = {str(e.body.name): e.body.cause for e in events(world, ev.DriftDetected, since=since)}  # type: ignore[union-attr]
            assert causes == {"r0": "reboot", "r1": "reboot"}
            assert world.get("/api/v1/counters")["counters"]["r0"]["kernel"]["tx_packets"] == before
            world.traffic("r0", packets=10)
            soon(lambda: _counted(world, "r0", before + 10), "the counters after the boot")
            world.assert_holds()
            assert _counted(world, "r0", before + 10) == before + 10
            world.service.kill()
            world.host.close()


def _counted(world: World, name: str, least: int) -> int:
    """The packets that the host sent into it, once there are so many; else 0."""
    found = world.get("/api/v1/counters")["counters"][name].get("kernel", {}).get("tx_packets", 0)
    return int(found) if found >= least else 0


@beside
def test_a_second_instance_is_refused_by_name_and_the_first_does_not_notice(folder: Path) -> None:
    with World(folder, case="a second instance") as world:
        world.start()
        make(world, {"name": "s0"})
        before = position(world)
        for port in ("8080", "8081"):
            log = folder / f"second-{port}.log"
            second = nursery().start("serve", environment=_settings(world, port), log=log)
            assert second.wait(30) != 0
            told = log.read_text()
            assert "in use by tunledger" in told
            assert str(world.service.process.pid) in told, told  # type: ignore[union-attr]
        assert position(world) == before
        assert health(world)[0] == 200
        world.assert_holds()


def _settings(world: World, port: str) -> dict[str, str]:
    return world.service.environment | {"TUNLEDGER_SERVER__PORT": port}


@beside
def test_instances_that_start_while_the_first_is_killed_never_run_together(folder: Path) -> None:
    with World(folder, case="instances beside a kill") as world:
        world.start()
        make(world, {"name": "s0", "processing": {"running": True}})
        for turn in range(4):
            heirs = []
            killer = threading.Timer(0.02 * turn, world.service.process.kill)  # type: ignore[union-attr]
            killer.start()
            for number in range(3):
                settings = _settings(world, str(8090 + number))
                heirs.append(nursery().start("serve", environment=settings, log=folder / f"heir-{turn}-{number}.log"))
            killer.join()
            world.service.process.wait(30)  # type: ignore[union-attr]

            def running() -> list[int]:
                return [number for number, heir in enumerate(heirs) if heir.poll() is None]  # noqa: B023

            soon(lambda: len(running()) <= 1, "all but one to give up")
            for heir in heirs:
                heir.kill()
                heir.wait(30)
            world.assert_dead_is_sound()
            world.start()
        assert world.service.verification().problems == []
        world.assert_holds()


# -- privileges and descriptors


@beside
def test_a_service_that_lacks_the_capability_says_so_and_does_nothing_by_halves(folder: Path) -> None:
    world, service = odd_world(folder, "no CAP_NET_ADMIN from the start")
    with world:
        world.start()
        make(world, {"name": "p0", "mtu": 1400}, {"name": "p1"})
        world.kill()
        ip("link set p0 mtu 1300", "link delete p1")
        service.prefix = ["setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin"]
        world.start()
        _refuses_everything(world)
        assert world.host.links()["p0"].mtu == 1300
        world.service.stop()
        service.prefix = []
        world.start()
        world.assert_holds()
        assert world.send("PATCH", "/api/v1/interfaces/p0", {"mtu": 1290}).kind == "acknowledged"
        world.assert_holds()


@beside
def test_a_service_without_the_device_node_says_so_and_does_what_it_can(folder: Path) -> None:
    world, service = odd_world(folder, "no /dev/net/tun from the start")
    with world:
        world.start()
        make(world, {"name": "p0", "mtu": 1400}, {"name": "p1"})
        assert health(world)[0] == 200
        world.kill()
        hidden = 'mount -t tmpfs none /dev/net && exec "$@"'
        service.prefix = ["unshare", "--mount", "sh", "-c", hidden, "-"]
        world.start()
        code, words = health(world)
        assert code == 503
        assert "/dev/net/tun is missing" in words
        heard = world.send("POST", "/api/v1/interfaces", {"name": "p9"})
        assert (heard.kind, heard.code) == ("refused", "tun_missing"), heard.answer
        assert world.send("PATCH", "/api/v1/interfaces/p0", {"mtu": 1290}).kind == "acknowledged"
        assert world.send("DELETE", "/api/v1/interfaces/p1").kind == "acknowledged"
        assert world.service.stop() == 0
        service.prefix = []
        world.start()
        assert health(world)[0] == 200
        world.assert_holds()


def _refuses_everything(world: World) -> None:
    """Every kind of write fails with the kernel's reason, reads go on, health says it."""
    before = {name: link.still for name, link in world.host.links().items()}
    for method, path, body in (
        ("POST", "/api/v1/interfaces", {"name": "p9", "addresses": ["10.22.0.1/24"]}),
        ("PUT", "/api/v1/interfaces/p8", {"mode": "tap"}),
        ("PATCH", "/api/v1/interfaces/p0", {"mtu": 1350}),
        ("POST", "/api/v1/batch", {"commands": [{"create": {"name": "p7"}}, {"delete": {"name": "p0"}}]}),
        ("DELETE", "/api/v1/interfaces/p0", None),
    ):
        heard = world.send(method, path, body, key=f"{method}-{path}")
        assert heard.status is not None
        assert heard.status >= 500, f"{heard}: {heard.answer}"
        assert heard.code == "permission_denied", f"{heard}: {heard.answer}"
        # The device node may be root's alone (EACCES); whoever has it open needs the capability all the same.
        assert heard.answer["errno"] == "EPERM" or "/dev/net/tun" in heard.answer["detail"], heard.answer
        assert "CAP_NET_ADMIN" in heard.answer["detail"]
    assert {name: link.still for name, link in world.host.links().items()} == before
    assert {i["spec"]["name"] for i in world.get("/api/v1/interfaces")["interfaces"]} == {"p0", "p1"}
    assert status(world, "p1")["state"] == "degraded"
    code, words = health(world)
    assert code == 503
    assert "CAP_NET_ADMIN" in words


@beside
def test_a_capability_that_goes_away_and_comes_back_while_the_service_runs(folder: Path) -> None:
    with open_folder() as wide:
        world, _ = odd_world(wide, "CAP_NET_ADMIN goes away")
        with world:
            world.start()
            make(world, {"name": "p0", "mtu": 1400}, {"name": "p1"})
            open_files(world)
            process = world.service.process
            assert process is not None
            process.send_signal(signal.SIGUSR1)
            soon(lambda: _effective(process.pid) == 0, "the capabilities to be gone")
            ip("link set p0 mtu 1300", "link delete p1")
            soon(lambda: status(world, "p1")["state"] == "degraded", "the trouble")
            _refuses_everything(world)
            process.send_signal(signal.SIGUSR2)
            soon(lambda: _effective(process.pid) != 0, "the capabilities to be back")
            soon(lambda: health(world)[0] == 200, "health")
            assert world.send("POST", "/api/v1/reconcile").kind == "acknowledged"
            world.assert_holds()


def _effective(pid: int) -> int:
    """The capabilities of all threads, or'ed."""
    found = 0
    for each in Path(f"/proc/{pid}/task").glob("*/status"):
        with contextlib.suppress(OSError):
            found |= int(re.search(r"CapEff:\t(\w+)", each.read_text())[1], 16)  # type: ignore[index]
    return found


@beside
def test_used_up_descriptors_are_clear_refusals_and_it_heals(folder: Path) -> None:
    with World(folder, case="used up descriptors") as world:
        world.start()
        names = [f"f{n}" for n in range(6)]
        make(world, *({"name": name, "processing": {"running": n % 2 == 0}} for n, name in enumerate(names)))
        assert world.service.process is not None
        pid = world.service.process.pid
        usual = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        for left, name in enumerate(names):
            connection = http.client.HTTPConnection("127.0.0.1", world.service.port, timeout=30)
            connection.request("GET", "/health")  # accepted before the limit: later ones may not be
            connection.getresponse().read()
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (_limit(pid, left), usual[1]))
            try:
                ip(f"link set {name} mtu 1300" if left % 2 else f"link delete {name}")
                for number in range(3):
                    body = {"name": f"g{left}-{number}", "processing": {"running": number == 2}}
                    heard = note(world, "POST", "/api/v1/interfaces", body, f"{left}-{number}")
                    _ask(connection, heard)
                    assert heard.status is not None, heard.why
                    assert heard.status < 300 or heard.code is not None, heard.answer
                    if heard.code == "unauthorized":  # nobody could be asked who called; the kernel may be next time
                        heard.answer["code"] = "overloaded"
                mute(world, note(world, "POST", "/api/v1/interfaces", {"name": f"h{left}"}), reset=left % 2 == 0)
            finally:
                resource.prlimit(pid, resource.RLIMIT_NOFILE, usual)
                connection.close()
            assert world.send("POST", "/api/v1/reconcile").kind == "acknowledged"
        for heard in [each for each in world.sent if each.key and each.kind != "acknowledged"]:
            world.send(heard.method, heard.path, heard.body, key=heard.key)
        world.assert_holds(mistakes=True)
        told = said(world)
        assert told.count("Traceback") == told.count("socket.accept() out of system resource"), (
            "asyncio's own, no other"
        )
        refused = [each for each in world.sent if each.kind in ("refused", "unknown") and each.key]
        assert refused, "there were descriptors enough for everything"


def _limit(pid: int, left: int) -> int:
    """The limit under which a process can open so many files more."""
    taken = {int(each.name) for each in Path(f"/proc/{pid}/fd").iterdir()}
    number = 0
    while left or number in taken:
        left -= number not in taken
        number += 1
    return number


def _ask(connection: http.client.HTTPConnection, heard: Any) -> None:
    """As World.send, over a connection that is there."""
    headers = {"Tunledger-Reason": heard.mark, "Idempotency-Key": heard.key}
    try:
        connection.request(heard.method, heard.path, json.dumps(heard.body), headers)
        response = connection.getresponse()
        heard.status, heard.answer = response.status, json.loads(response.read())
        heard.headers = {name.lower(): value for name, value in response.getheaders()}
    except (OSError, http.client.HTTPException) as error:
        heard.why = repr(error)
    heard.ended = time.monotonic()


# -- processes that are stopped or die


@beside
def test_a_worker_that_is_stopped_is_told_of_and_goes_on_or_is_replaced(folder: Path) -> None:
    with World(folder, case="a stopped worker") as world:
        world.start()
        make(
            world,
            {"name": "w0", "addresses": ["10.23.0.1/24"], "processing": {"running": True}},
            {"name": "w1", "addresses": ["10.23.1.1/24"]},
        )
        (worker,) = world.workers()
        os.kill(worker, signal.SIGSTOP)
        try:
            soon(lambda: "has not answered" in health(world)[1], "health to say it")
            changed = world.send("PATCH", "/api/v1/interfaces/w1", {"mtu": 1400})  # which needs no worker
            assert changed.kind == "acknowledged", changed.answer
            started = world.send("POST", "/api/v1/interfaces/w1/start")  # which does
            stopped = world.send("POST", "/api/v1/interfaces/w0/stop")
            assert started.status is not None
            assert stopped.status is not None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGCONT)
        world.assert_holds()


@beside
def test_workers_that_die_again_and_again_cost_no_interface_and_no_count(folder: Path) -> None:
    with World(folder, case="a worker's crash loop", settings={"TUNLEDGER_COUNTERS__INTERVAL_S": "1"}) as world:
        world.start()
        make(world, {"name": "w0", "addresses": ["10.24.0.1/24"], "processing": {"running": True}}, {"name": "w1"})
        index = world.host.links()["w0"].ifindex
        killed: set[int] = set()
        end = time.monotonic() + 4
        while time.monotonic() < end:
            for pid in set(world.workers()) - killed:
                with contextlib.suppress(ProcessLookupError):
                    world.traffic("w0", packets=5)
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            time.sleep(0.02)
        assert len(killed) > 4
        assert world.send("PATCH", "/api/v1/interfaces/w1", {"mtu": 1400}).kind == "acknowledged"
        soon(lambda: status(world, "w0")["observed"]["processing"]["running"], "a worker that lives")
        assert world.host.links()["w0"].ifindex == index, "the device was made anew"
        assert not events(world, ev.InterfaceContested), "nobody fought"
        world.assert_holds()


@beside
def test_a_service_that_was_stopped_for_a_while_makes_up_for_all_of_it(folder: Path) -> None:
    with World(folder, case="the service is stopped") as world:
        world.start()
        make(world, {"name": "z0", "mtu": 1400}, {"name": "z1", "mtu": 1400}, {"name": "z2"}, {"name": "z3"})
        changed = world.send("PATCH", "/api/v1/interfaces/z0?confirm_within_s=1", {"mtu": 1300})
        assert changed.kind == "acknowledged", changed.answer
        process = world.service.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        late = note(world, "PATCH", "/api/v1/interfaces/z3", {"mtu": 1310})
        asking = threading.Thread(target=throng, args=(world, [late]))  # stops it, which it is, and lets it go on
        ip("link set z1 mtu 1290", "link delete z2")
        time.sleep(2.0)
        asking.start()
        asking.join()
        assert late.status == 200, late.answer
        soon(lambda: world.host.links()["z0"].mtu == 1400, "the way back")
        soon(lambda: is_quiet(world), "repairs")
        world.assert_holds()


# -- clients


WRITES: tuple[tuple[str, str, Any], ...] = (
    ("POST", "/api/v1/interfaces", {"name": "x0", "addresses": ["10.25.0.1/24"]}),
    ("PUT", "/api/v1/interfaces/x1", {"mtu": 1400}),
    ("PATCH", "/api/v1/interfaces/x0", {"mtu": 1350}),
    ("POST", "/api/v1/interfaces/x0/start", None),
    ("POST", "/api/v1/interfaces/x0/stop", None),
    (
        "POST",
        "/api/v1/batch",
        {"commands": [{"create": {"name": "x2"}}, {"change": {"name": "x1", "patch": {"up": False}}}]},
    ),
    ("PATCH", "/api/v1/interfaces/x0?recreate=true", {"mode": "tap"}),
    ("POST", "/api/interface/create", {"name": "x3", "address": "10.26.0.1"}),
    ("POST", "/api/interface/configure", {"mtu": 1300}),
    ("POST", "/api/interface/start", None),
    ("POST", "/api/interface/stop", None),
    ("DELETE", "/api/interface/delete", None),
    ("DELETE", "/api/v1/interfaces/x0", None),
)


@beside
def test_clients_that_hang_up_leave_commands_that_go_to_their_outcome(folder: Path) -> None:
    """Half a request is none; a whole one is carried out, also when nobody waits for what comes of it."""
    rng = random.Random(4)
    # Long enough to hang up in between, before each look at what was changed.
    slow = ";".join(f"wait@converge.verify.before#{n + 1}=0.2" for n in range(len(WRITES)))
    with World(folder, case="clients hang up") as world:
        world.start(TUNLEDGER_TEST_FAILPOINTS=slow)
        for method, path, body in WRITES:
            heard = note(world, method, path, body)
            data = request_bytes(heard)
            for cut in (1, len(data) // 2, len(data) - 1):
                if body is not None or cut < len(data) // 2:
                    mute(world, note(world, method, path, body), cut=cut, reset=rng.random() < 0.5)
            before = position(world)
            with call(world) as connection:
                connection.sendall(data)
                soon(lambda p=before: position(world) > p, f"{heard} in the log")  # type: ignore[misc]
            heard.why, heard.ended = "hung up", time.monotonic()
            soon(lambda: is_quiet(world), f"the outcome of {heard}")
        world.assert_holds()
        asked = [e.body.request.reason for e in events(world, *_INTENTS)]  # type: ignore[union-attr]
        whole = [each for each in world.sent if each.mark in asked]
        assert len(whole) == len(WRITES), "each whole request, and no half one, is an intent"
        assert len(events(world, ev.CommandApplied)) == len(asked)


@beside
def test_clients_that_hang_up_at_once_may_or_may_not_have_their_way_but_wholly(folder: Path) -> None:
    rng = random.Random(5)
    with World(folder, case="clients hang up at once") as world:
        world.start()
        make(world, *({"name": f"x{n}"} for n in range(10)))
        for number in range(100):
            body = {"mtu": 1300 + number, "up": number % 2 == 0, "addresses": [f"10.27.{number}.1/24"]}
            heard = note(world, "PATCH", f"/api/v1/interfaces/x{number % 10}", body)
            mute(world, heard, reset=rng.random() < 0.5, after_s=rng.random() * 0.01)
        world.assert_holds()


_INTENTS = (
    ev.InterfaceDeclared,
    ev.InterfaceReconfigured,
    ev.ProcessingEnabled,
    ev.ProcessingDisabled,
    ev.InterfaceRetired,
)


@beside
def test_idle_and_slow_connections_and_readers_who_do_not_read_stop_nobody(folder: Path) -> None:
    with World(folder, case="slow clients") as world, contextlib.ExitStack() as stack:
        world.start()
        deaf = stack.enter_context(call(world))
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(b"GET /api/v1/events/stream?after=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        idle = [stack.enter_context(call(world)) for _ in range(500)]
        for number, connection in enumerate(idle):
            if number % 2:
                connection.sendall(b"POST /api/v1/interfaces HTTP/1.1\r\nHost: localhost\r\nContent-Len")
        for number in range(100):  # more than the reader's buffers take
            made = [f"i{number}-{n}" for n in range(4)]
            make(world, *({"name": name, "up": False, "description": "x" * 250} for name in made))
            if number % 10 < 9:
                delete = [{"delete": {"name": name}} for name in made]
                assert world.send("POST", "/api/v1/batch", {"commands": delete}).kind == "acknowledged"
            for connection in idle[number::200]:
                with contextlib.suppress(OSError):
                    connection.sendall(b"g")
        world.assert_holds()
        assert world.stop() == 0


@beside
def test_too_many_at_once_are_refused_with_a_time_and_none_is_lost_or_done_twice(folder: Path) -> None:
    with World(folder, case="a throng") as world:
        world.start()
        wanted = {f"t{n}": f"key-{n}" for n in range(400)}
        left = dict(wanted)
        turns = 0
        while left:
            turns += 1
            assert turns < 30, f"{len(left)} of {len(wanted)} are never taken"
            requests = [note(world, "POST", "/api/v1/interfaces", {"name": n, "up": False}, k) for n, k in left.items()]
            throng(world, requests)
            for heard in requests:
                if heard.status == 503:
                    assert heard.code == "overloaded", heard.answer
                    assert int(heard.headers["retry-after"]) >= 1
                else:
                    assert heard.status == 201, f"{heard}: {heard.answer}"
                    del left[heard.body["name"]]
        assert any(each.status == 503 for each in world.sent), "there was room for all of them"
        declared = number_of(events(world, ev.InterfaceDeclared))
        assert declared == dict.fromkeys(wanted, 1)
        world.assert_holds()


# -- drift


def _change(number: int, name: str, pid: int) -> list[str]:
    """One of the ways in which others change a link."""
    return [
        [f"link set {name} down"],
        [f"link set {name} mtu 1333"],
        [f"address del 10.30.{number}.1/24 dev {name}"],
        [f"link set {name} name q{number}"],
        [f"link delete {name}"],
        [f"link set {name} alias mine"],
        [f"link set {name} txqueuelen 7"],
        [f"link set {name} netns {pid}"],
    ][number % 8]


def _storm(folder: Path, size: int, settings: dict[str, str] | None = None) -> None:
    with World(folder, case=f"a storm over {size}", settings=settings) as world, elsewhere() as pid:
        world.start()
        names = [f"s{n}" for n in range(size)]
        make(world, *({"name": name, "addresses": [f"10.30.{n}.1/24"]} for n, name in enumerate(names)))
        since = position(world)
        ip(*(line for n, name in enumerate(names) for line in _change(n, name, pid)))
        soon(lambda: is_quiet(world), "repairs", 60)
        found, mended = events(world, ev.DriftDetected, since=since), events(world, ev.DriftRepaired, since=since)
        assert number_of(found) == dict.fromkeys(names, 1), [str(e.body) for e in found][:5]
        assert number_of(mended) == dict.fromkeys(names, 1)
        moved = {name: each["ifalias"] for name, each in there(pid).items() if name != "lo" and "ifalias" in each}
        assert set(moved) == {name for n, name in enumerate(names) if n % 8 == 7}
        world.assert_holds()
        assert not {name: None for name in moved if name not in there(pid)}, "they are somebody else's now"


@beside
def test_a_storm_of_drift_is_mended_once_each(folder: Path) -> None:
    _storm(folder, 200)


@beside
def test_lost_messages_of_the_kernel_lead_to_a_look_at_everything(folder: Path) -> None:
    # The interval is long: only the monitor's own finding that it lost messages can lead to the repairs.
    settings = {"TUNLEDGER_RECONCILE__INTERVAL_S": "600"}
    with World(folder, case="a flood of messages", settings=settings) as world:
        world.start()
        names = [f"s{n}" for n in range(16)]
        make(world, *({"name": name, "addresses": [f"10.30.{n}.1/24"]} for n, name in enumerate(names)))
        ip("tuntap add dev noisy mode tun", "link set noisy up")
        world.adopt_strangers()
        process = world.service.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        try:
            flood = [f"link set noisy mtu {1400 + n % 2}" for n in range(20_000)]
            ip(*flood, "link set noisy mtu 1500")
            # After the flood, so that it is lost.
            ip(*(line for n, name in enumerate(names) if n % 8 != 7 for line in _change(n, name, 1)))
        finally:
            process.send_signal(signal.SIGCONT)
        # Whose alias was overwritten while nobody listened is a stranger's now: it is told of, and left alone.
        strangers = {name for n, name in enumerate(names) if n % 8 == 5}
        assert all(world.host.links()[name].alias == "mine" for name in strangers)
        world.adopt_strangers()
        world.assert_holds(degraded=strangers)
        assert "messages of the kernel were lost" in said(world), "none were"


@beside
def test_somebody_who_fights_back_is_not_fought_for_ever(folder: Path) -> None:
    with World(folder, case="a fight") as world:
        world.start()
        make(world, {"name": "k0", "mtu": 1400}, {"name": "k1", "mtu": 1400})
        outside = LinuxOutside()

        def strike() -> None:
            outside.set_mtu("k0", 1300)
            outside.set_up("k0", up=False)

        since = position(world)
        with Repeated(strike, 0.05) as fight:
            soon(lambda: events(world, ev.InterfaceContested, since=since), "the contest to be noticed")
            contested = position(world)
            ip("link set k1 mtu 1290")
            soon(lambda: world.host.links()["k1"].mtu == 1400, "the repair of the other")
            time.sleep(5)
            assert fight.times > 20
        outside.close()
        assert status(world, "k0")["state"] == "degraded"
        assert "contested" in status(world, "k0")["reason"]
        assert len(events(world, ev.InterfaceContested)) == 1
        assert len(events(world, ev.DriftRepaired, since=contested, name="k0")) <= 2
        assert number_of(events(world, ev.DriftRepaired, since=since))["k0"] <= 8
        # A blow between a repair and the look that verifies it makes the repair a failed one: told once for each way.
        assert len(events(world, ev.RepairFailed, since=contested, name="k0")) <= 2
        assert world.send("POST", "/api/v1/reconcile").kind == "acknowledged"
        soon(lambda: not world.get("/api/v1/drift")["drift"], "peace")
        assert world.host.links()["k0"].mtu == 1400
        assert world.host.links()["k0"].up
        world.assert_holds(degraded={"k0"})
        # A restart forgets the grudge, not the interface.
        world.service.stop()
        world.start()
        world.assert_holds()


@beside
def test_drift_that_is_only_to_be_reported_is_told_once_and_left(folder: Path) -> None:
    with World(folder, case="drift is reported", settings=EVERY_SECOND) as world, elsewhere() as pid:
        world.start()
        names = [f"s{n}" for n in range(8)]  # one for each kind of change
        make(
            world,
            *({"name": name, "addresses": [f"10.30.{n}.1/24"], "drift": "report"} for n, name in enumerate(names)),
            {"name": "mended", "mtu": 1400},
        )
        since = position(world)
        ip(*(line for n, name in enumerate(names) for line in _change(n, name, pid)), "link set mended mtu 1300")
        soon(lambda: len(number_of(events(world, ev.DriftDetected, since=since))) == len(names) + 1, "the reports")
        soon(lambda: world.host.links()["mended"].mtu == 1400, "the one that is mended")
        time.sleep(2.5)  # two more looks at everything
        assert number_of(events(world, ev.DriftDetected, since=since)) == dict.fromkeys([*names, "mended"], 1)
        assert number_of(events(world, ev.DriftRepaired, since=since)) == {"mended": 1}
        links = world.host.links()
        assert not links["s0"].up
        assert links["s1"].mtu == 1333
        assert "q3" in links
        assert not {"s3", "s4", "s7"} & links.keys()
        assert links["s5"].alias == "mine"
        for name in names:
            assert status(world, name)["state"] == "degraded", name
        ip("link set s0 up", "link set s1 mtu 1500", "link set q3 name s3", "link set s6 txqueuelen 1000")
        over = {"s0", "s1", "s3", "s6"}
        soon(lambda: set(number_of(events(world, ev.DriftEnded, since=since))) == over, "the end of what others mended")
        left = set(names) - over
        world.adopt_strangers()
        world._strangers.pop("s5")  # reported, then mended because somebody asks
        assert world.send("POST", "/api/v1/reconcile").kind == "acknowledged"
        soon(lambda: is_quiet(world), "the repairs that somebody asked for")
        assert set(number_of(events(world, ev.DriftRepaired, since=since))) == left | {"mended"}
        world.assert_holds()
