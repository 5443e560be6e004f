"""System calls fail, or are the last that the process does: what was acknowledged holds, and nothing is left half made.

strace(1) makes them fail in the real service, one at a time: SIGKILL at the n-th call, or an errno instead of it. A
dry run counts the calls; then each case is a call, a way to fail, and an n. strace counts for each thread by itself:

    running     it is attached to one thread of a service that is up, while commands are carried out
    starting    it is attached to all of the process, from its beginning on, while a start recovers from a crash; the
                n-th call of any thread fails then

What must come, besides all that `World.assert_holds` asserts: a failing log ends the service with EX_IOERR (74) and
nothing is acknowledged any more; a full disk is a refusal, and passes; a kernel that refuses fails that one command,
and the errno is named. A service that ends otherwise, or tells of an internal error, has met what nobody thought of.

Left out: the bytes with which Python's threads wake the event loop, which cannot fail: one process has both ends.
"""

import http.client
import json
import os
import random
import re
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Literal

import pytest

from tests.e2e.harness import eventually
from tests.faults import strace
from tests.faults.scenarios import crashed
from tests.faults.strace import Call
from tests.faults.world import Heard, World
from tests.part import part_of

pytestmark = pytest.mark.kernel

SEED = 20_260_917
FILE_CALLS = ("fdatasync", "pwrite64", "ioctl", "openat", "ftruncate")
SOCKET_CALLS = ("sendmsg", "sendto", "recvmsg")
CALLS = FILE_CALLS + SOCKET_CALLS
ERRORS = ("EIO", "ENOSPC", "ENOMEM", "EINTR", "EPERM", "EBUSY")
WAYS = ("SIGKILL", *ERRORS)
EX_IOERR = 74  # sysexits.h
STARTING = {"TUNLEDGER_RECONCILE__INTERVAL_S": "2"}  # what a start could not remove, the next look does
MORE = 12  # cases of a kernel that refuses a step
CASES_A_WORLD = 8  # then a new one: looking at a world costs as much as happened in it

# What cannot fail in earnest: waking the loop, making a socket non-blocking, asking whether a file is a terminal.
NEVER = {"ioctl": {"client", "worker", "wake", "netlink", "other"}}

DATABASE = "tunledger.db"
LOG = re.compile(rf"{re.escape(DATABASE)}(?:-wal|-journal)?[>\"]")  # as strace shows it: a path, or behind a descriptor

Phase = Literal["running", "starting"]


@dataclass(frozen=True, slots=True)
class Point:
    """The n-th call. `thread` counts from the first of the process; for a start it is 0, and all are meant."""

    phase: Phase
    call: str
    thread: int
    number: int
    kinds: frozenset[str]


@dataclass(frozen=True, slots=True)
class Case:
    """A point, and how it fails."""

    point: Point
    way: str

    def __str__(self) -> str:
        p = self.point
        return f"{self.way} at {p.call} {p.number} of thread {p.thread} ({'/'.join(sorted(p.kinds))}), {p.phase}"

    def options(self) -> list[str]:
        """As strace wants it."""
        how = "signal=SIGKILL" if self.way == "SIGKILL" else f"error={self.way}"
        return ["-e", f"inject={self.point.call}:{how}:when={self.point.number}"]


def kind(call: Call) -> str:
    """What a call is about."""
    text = call.arguments
    if "NETLINK:" in text:
        return "netlink"
    if "/dev/net/tun" in text:
        return "tun"
    if "TCP:" in text or "TCPv6:" in text:
        return "client"
    if "UNIX" in text:
        return "wake" if '"\\0", 1' in text else "worker"
    return "log" if LOG.search(text) else "other" if DATABASE not in text else "beside"


# -- what is done meanwhile


_serial = count()


def work(world: World) -> list[Heard]:
    """Commands of all kinds on interfaces of their own, then their removal; goes on whatever comes back."""
    n = next(_serial)
    a, b = f"a{n}", f"b{n}"
    net = f"10.{n % 250}.{n // 250}.1/24"
    batch = {"commands": [{"create": {"name": b}}, {"change": {"name": a, "patch": {"txqueuelen": 100}}}]}
    heard = [
        world.send("POST", "/api/v1/interfaces", {"name": a, "addresses": [net], "mtu": 1400}, key=f"make-{n}"),
        world.send("PATCH", f"/api/v1/interfaces/{a}", {"mtu": 1300, "owner": 1}),
        world.send("POST", f"/api/v1/interfaces/{a}/start"),
        world.send("POST", "/api/v1/batch", batch),
        world.send("DELETE", f"/api/v1/interfaces/{b}"),
    ]
    for each in heard:
        if each.code == "unauthorized":  # the kernel did not say who called: then a key is nobody's
            each.key = None
    return heard


def clean(world: World) -> None:
    """Remove what is left of all work: the next case begins with an empty host."""
    for each in world.get("/api/v1/interfaces?limit=1000")["interfaces"]:
        world.send("DELETE", f"/api/v1/interfaces/{each['spec']['name']}")


@contextmanager
def starting(world: World, trace: Path, *options: str) -> Iterator[None]:
    """A start after a crash, with strace attached to all of the process from its beginning on."""
    crashed(world)
    world.service.spawn()
    assert world.service.process is not None
    process = world.service.process.pid
    os.kill(process, signal.SIGSTOP)
    with strace.attached(process, trace, "-f", *options):
        os.kill(process, signal.SIGCONT)
        yield


def paths(world: World, call: str) -> list[str]:
    """Options that keep a start's thousand other files out of it: only the database's, and the device node."""
    if call in SOCKET_CALLS:
        return []
    database = world.service.database
    names = [str(database) + suffix for suffix in ("", "-wal", "-shm", "-journal", ".lock", ".head", ".reserve")]
    return [option for name in [*names, "/dev/net/tun"] for option in ("-P", name)]


# -- counting


def points(folder: Path) -> list[Point]:
    """Every point of both phases, by dry runs."""
    found: list[Point] = []
    with World(folder / "running", case="a dry run") as world:
        world.start()
        assert world.service.process is not None
        process = world.service.process.pid
        threads, trace = strace.threads(process), folder / "running.trace"
        work(world)  # what is only done once is done before
        clean(world)
        with strace.attached(process, trace, "-f", "-e", f"trace={','.join(CALLS)}"):
            heard = work(world)
        assert {each.status for each in heard} <= {200, 201}, heard
        numbers: Counter[tuple[str, int]] = Counter()
        for call in strace.calls(trace):
            if call.thread in threads:
                place = (call.name, threads.index(call.thread))
                numbers[place] += 1
                found.append(Point("running", *place, numbers[place], frozenset({kind(call)})))
    for names in (FILE_CALLS, SOCKET_CALLS):
        trace = folder / f"starting-{names[0]}.trace"
        with World(folder / names[0], case="a dry run", settings=STARTING) as world:
            with starting(world, trace, "-e", f"trace={','.join(names)}", *paths(world, names[0])):
                world.service.wait_ready()
            world.assert_holds()
        each_thread: Counter[tuple[str, int]] = Counter()
        hit: dict[tuple[str, int], set[str]] = defaultdict(set)
        for call in strace.calls(trace):
            each_thread[call.name, call.thread] += 1
            hit[call.name, each_thread[call.name, call.thread]].add(kind(call))
        found += [Point("starting", name, 0, number, frozenset(kinds)) for (name, number), kinds in hit.items()]
    return [point for point in found if not point.kinds & NEVER.get(point.call, {"wake"})]


# -- one case


@dataclass(frozen=True, slots=True)
class Result:
    """What came of a case: whether the call was reached, and what is wrong."""

    case: Case
    hit: bool
    end: str = ""
    violation: str = ""


def carry_out(folder: Path, cases: Sequence[Case]) -> list[Result]:
    """Cases one after the other, those of a running service in worlds that several of them share."""
    results: list[Result] = []
    running = [case for case in cases if case.point.phase == "running"]
    for first in range(0, len(running), CASES_A_WORLD):
        with World(folder / f"running-{first}") as world:
            for case in running[first : first + CASES_A_WORLD]:
                try:
                    results.append(fail_running(world, case, folder))
                except AssertionError as error:
                    results.append(violated(case, error))
                    break  # what follows in a broken world proves nothing
    for number, case in enumerate(case for case in cases if case.point.phase == "starting"):
        with World(folder / f"starting-{number}", case=str(case), settings=STARTING) as world:
            try:
                results.append(fail_starting(world, case, folder))
            except AssertionError as error:
                results.append(violated(case, error))
    return results


def violated(case: Case, error: AssertionError) -> Result:
    """What a failed assertion makes of a case. Said at once: a whole sweep takes long."""
    print(f"VIOLATION: {error}", flush=True)
    return Result(case, hit=True, violation=str(error))


def fail_running(world: World, case: Case, folder: Path) -> Result:
    """Let one call of a running service fail, and see that everything holds."""
    world.case = str(case)
    if not world.alive():
        world.start()
    assert world.service.process is not None
    threads = strace.threads(world.service.process.pid)
    if case.point.thread >= len(threads):
        return Result(case, hit=False)
    trace = folder / "case.trace"
    with strace.attached(threads[case.point.thread], trace, "-e", f"trace={case.point.call}", *case.options()):
        heard = work(world)
        if case.way == "SIGKILL" and any(each.status is None for each in heard):
            world.wait_dead()
    if case.way != "SIGKILL":
        world.assert_dead_is_sound()  # at once: what is said to be undone is undone, not mended later
    result = settle(world, case, heard, trace)
    clean(world)
    return result


def fail_starting(world: World, case: Case, folder: Path) -> Result:
    """Let one call of a start fail, and see that everything holds once it is up, or started again."""
    trace = folder / "case.trace"
    options = [f"trace={case.point.call}", *case.options(), *paths(world, case.point.call)]
    why: AssertionError | None = None
    with starting(world, trace, "-e", *options):
        try:
            world.service.wait_ready()
        except AssertionError as error:
            why = error
    # Which byte wakes the loop is another with every start; one that is lost is lost for good, and `settle` knows it.
    if why is not None and world.alive() and "wake" not in injected(strace.calls(trace)):
        raise AssertionError(f"{case}: it does not come up: {why}") from why
    return settle(world, case, [], trace)


def injected(calls: Sequence[Call]) -> set[str]:
    """What the calls that were made to fail are about."""
    return {kind(call) for call in calls if call.injected}


def settle(world: World, case: Case, heard: Sequence[Heard], trace: Path) -> Result:
    """Wait until the service has dealt with it, start it again if it must be, and assert what must hold."""
    calls = strace.calls(trace)
    fatal = case.way == "SIGKILL"
    kinds = {kind(call) for call in calls[-1:]} if fatal else injected(calls)
    hit = world.service.process is not None and (strace.killed(trace) or not world.alive()) if fatal else bool(kinds)
    if not hit or "wake" in kinds:
        end = "elsewhere" if hit else "not reached"
        if "wake" in kinds:
            world.service.kill()
            world.start()
        world.assert_holds()
        return Result(case, hit=False, end=end)
    end = eventually(lambda: ended(world), 30, f"{case}: an end of it")
    internal = [f"{each} {each.answer}" for each in heard if each.code == "internal"]
    lines = [*world.service.log.read_text().splitlines(), ""]
    tracebacks = [f"{line}: {following}"[:500] for line, following in pairwise(lines) if "Traceback" in line]
    mistakes = [
        each for each in tracebacks if "<string>" not in each
    ]  # a worker runs by -c: it may die, and is replaced
    assert not internal + mistakes, f"{case}: met what nobody thought of: {internal} {mistakes}"
    if end == "healthy":  # what could not be removed or undone is removed a little later
        eventually(lambda: not strays(world), 10, f"{case}: the removal of what is not declared")
    expect(case, kinds, end, heard)
    if end != "healthy":
        if end == "read-only":
            world.service.kill()
        if case.point.phase == "running":
            world.assert_dead_is_sound()
        world.start()
    world.assert_holds(mistakes=bool(tracebacks))
    return Result(case, hit=True, end=end)


def strays(world: World) -> set[str]:
    """Ids of links that are ours, and of no interface."""
    return set(world.ours()) - {each["id"] for each in world.get("/api/v1/interfaces?limit=1000")["interfaces"]}


def ended(world: World) -> str:
    """How the service took it: "healthy", "read-only", or the exit status; empty while that is not clear."""
    if not world.alive():
        return f"exit {world.wait_dead()}"
    try:
        status, health = world.service.call("GET", "/health")
    except (OSError, http.client.HTTPException):
        return ""
    if status == 200:
        return "healthy"
    return "read-only" if "read-only" in str(health) else ""


def expect(case: Case, kinds: set[str], end: str, heard: Sequence[Heard]) -> None:
    """What this way to fail must lead to."""
    if case.way == "SIGKILL":
        assert end in ("exit -9", "healthy"), f"{case}: {end}"  # healthy: a worker was killed
        return
    if case.point.phase == "starting":
        assert end != "exit 0", f"{case}: {end}"
        return
    assert end in ("healthy", f"exit {EX_IOERR}"), f"{case}: {end}"
    writes = case.point.call in ("fdatasync", "pwrite64") and kinds == {"log"}
    if not kinds & {"log", "client"}:
        unknown = [str(each) for each in heard if each.status is None]
        assert not unknown, f"{case}: no answer to {unknown}"
    if not writes:
        assert end == "healthy", f"{case}: {end}"
    elif case.point.call == "fdatasync":
        assert end == f"exit {EX_IOERR}", f"{case}: {end}: after a failed fsync the page cache lies"
    elif case.way not in ("ENOSPC", "EINTR"):  # SQLite tries an interrupted write again (os_unix.c, seekAndWriteFd)
        assert end == f"exit {EX_IOERR}", f"{case}: {end}"
    else:
        assert end == "healthy", f"{case}: {end}"
        # What must not wait has the reserve, and is not refused at all; what waits is told that the disk is full.
        others = [f"{h}: {h.answer}" for h in heard if h.kind != "acknowledged" and h.status not in (507, 404)]
        assert not others, f"{case}: {others}"
    if end == f"exit {EX_IOERR}":
        kept = [each.kind == "acknowledged" for each in heard]
        assert not all(kept), f"{case}: what could not be written was acknowledged: {[str(each) for each in heard]}"
        assert True not in kept[kept.index(False) :], f"{case}: acknowledged after it: {[str(each) for each in heard]}"
    if kinds <= {"netlink", "tun"}:
        refused = [each for each in heard if each.status is None or each.status >= 500]
        assert all(each.status for each in refused), f"{case}: {[str(each) for each in refused]}"
        unnamed = [f"{each}: {each.answer}" for each in refused if case.way not in json.dumps(each.answer)]
        assert not unnamed, f"{case}: the errno is not named: {unnamed}"


# -- the sweeps


def sweep(folder: Path, cases: Sequence[Case]) -> list[Result]:
    """Carry cases out, as many at once as there are processors; namespaces belong to threads."""
    hands = os.cpu_count() or 1
    shares = [cases[first::hands] for first in range(hands)]
    with ThreadPoolExecutor(hands) as pool:
        done = pool.map(lambda share: carry_out(folder / str(share[0]), share[1]), enumerate(shares))
        return [result for results in done for result in results]


def told(found: Iterable[Point], results: Sequence[Result]) -> str:
    """The counts, a line for each call."""
    lines = []
    for call in CALLS:
        reached = Counter(point.phase for point in found if point.call == call)
        own = [result for result in results if result.case.point.call == call]
        if not own:
            continue
        ends = Counter(result.end for result in own)
        lines.append(
            f"{call}: {reached['running']} running, {reached['starting']} starting; {len(own)} cases, "
            f"{sum(result.hit for result in own)} hit: {dict(ends)}"
        )
    return "\n".join(lines)


@pytest.fixture(scope="module")
def every_point(tmp_path_factory: pytest.TempPathFactory) -> list[Point]:
    """All points of both phases."""
    strace.require()
    return points(tmp_path_factory.mktemp("points"))


def test_every_call_that_is_to_fail_is_made(every_point: list[Point]) -> None:
    assert {point.call for point in every_point} == set(CALLS)
    kinds = {(point.call, kind) for point in every_point for kind in point.kinds}
    assert {("fdatasync", "log"), ("pwrite64", "log"), ("ioctl", "tun"), ("openat", "tun"), ("openat", "log")} <= kinds
    assert {("sendto", "netlink"), ("recvmsg", "netlink"), ("sendto", "client"), ("sendmsg", "worker")} <= kinds


def test_a_system_call_that_fails_loses_nothing_and_leaves_nothing(every_point: list[Point], tmp_path: Path) -> None:
    """Each call in each way, at points that the seed chooses."""
    chance = random.Random(SEED)
    by_call = {call: [point for point in every_point if point.call == call] for call in CALLS}
    cases = [Case(chance.choice(by_call[call]), way) for call in CALLS for way in WAYS]
    # Where a command is cut off in its middle, it is undone: of those, which cost least, some more.
    within = [point for point in every_point if point.phase == "running" and point.kinds <= {"netlink", "tun"}]
    steps = [point for point in within if point.thread > 0 and point.call in ("ioctl", "sendto", "recvmsg")]
    cases += [Case(point, chance.choice(("ENOMEM", "EBUSY", "EPERM"))) for point in chance.sample(steps, MORE)]
    assert_holds_after(cases, every_point, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("call", CALLS)
def test_a_system_call_that_fails_loses_nothing_whichever_it_is(
    every_point: list[Point], tmp_path: Path, call: str
) -> None:
    """Every point of this call, in each way."""
    cases = part_of(Case(point, way) for point in every_point if point.call == call for way in WAYS)
    assert_holds_after(cases, every_point, tmp_path)


def assert_holds_after(cases: Sequence[Case], every_point: Sequence[Point], folder: Path) -> None:
    """Carry cases out and tell what came of them."""
    results = sweep(folder, cases)
    print(told(every_point, results))
    violations = [result.violation for result in results if result.violation]
    assert not violations, "\n\n".join([f"{len(violations)} violations:", *violations])
    reached = {result.case.point.call for result in results if result.hit}
    assert reached == {case.point.call for case in cases}, "of some call no case was reached"
