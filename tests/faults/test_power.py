"""The power fails at any moment: what was acknowledged is on the disk, whatever became of the rest.

The real service is run under strace, through several lives, with all that a client may send. From the trace it is
worked out what a disk could hold at any moment (`disk_image`), many times over, and each of these disks is opened as a
start would open it: the log must verify, be a beginning of the log that was written, and hold every outcome and every
kept answer that a client had been told by then.

What SQLite does for it, in WAL with synchronous=FULL (wal.c, os_unix.c; seen here in the trace):

    commit      pwrite64 of each frame (24 bytes, then the page), fdatasync of the -wal
    new -wal    fsync of its folder before the first commit in it counts
    checkpoint  fdatasync of the -wal, pwrite64 of pages, fdatasync of the database
    start over  pwrite64 of a header with new salts at 0 of the -wal, fdatasync: old frames then fit no more

With NORMAL the fdatasync of a commit is missing, with OFF all are. Then acknowledged commands must be missing in some
image: that this is found is tested as well, by leaving the very same steps out of what was recorded.
"""

import contextlib
import hashlib
import itertools
import os
import random
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.domain import events as ev
from service.domain.errors import TunledgerError
from service.store import codec, counters, headfile, schema
from service.store.database import open_reader, open_writer, require_current
from service.store.migrate import migrate
from service.store.reader import LogReader
from service.store.snapshots import open_log
from tests.e2e.harness import ROOT
from tests.faults import strace
from tests.faults.disk_image import CALLS, Disk, History, Image, Mark, Name, Step, Sync, SyncNames, Told, Write
from tests.faults.world import Heard, World
from tests.part import part_of

pytestmark = pytest.mark.kernel

SEED = 20_260_917
DATABASE = "tunledger.db"
MIGRATED, STOPPED = "migrated", "stopped"  # marks: a program ended well
WAL_HEADER_BYTES = 32  # SQLite's file format, section 4.1
EVERY = 48  # events between two snapshots: of those, too, some must be written while the power fails
PATCHES = 45  # a commit is a dozen pages, two a command: a thousand pages later SQLite checkpoints
BOOTS = 4  # images that the real service is started on
BITE = 8  # clients at once

Answers = dict[tuple[str, str], tuple[int | None, str | None]]  # by actor and key: status, body


# -- the lives that are recorded


@dataclass(frozen=True, slots=True)
class Recording:
    """What was done, and what was the end of it."""

    history: History
    sent: tuple[Heard, ...]
    migrated: int  # the step at which the migration was done
    hashes: tuple[str, ...]  # by position, from 0, which is before the first event
    settled: Mapping[str, int]  # by command id: the position of its last outcome
    taken: Mapping[str, int]  # by command id: the position of its last intent
    answers: Answers
    key_of: Mapping[str, tuple[str, str]]  # by command id: actor and key
    stopped: int  # the position of what an orderly stop wrote last
    snapshots: int
    samples: int


def declare(world: World) -> None:
    """All kinds of commands, with and without keys, applied and refused."""
    told = [
        world.send("POST", "/api/v1/interfaces", {"name": "tun1", "mtu": 1400}, key="a"),
        world.send("POST", "/api/v1/interfaces", {"name": "tun1", "mtu": 1300}, key="b"),
        world.send("POST", "/api/interface/create", {"mtu": 1400}),
        world.send("POST", "/api/interface/start", key="c"),
        world.send("POST", "/api/interface/stop"),
        world.send("POST", "/api/v1/batch", {"commands": [{"create": {"name": f"b{n}"}} for n in range(BITE)]}),
        world.send("POST", "/api/v1/interfaces", {"name": "late"}, key="d", headers={"Prefer": "respond-async"}),
        world.send("PATCH", "/api/v1/interfaces/tun1?confirm_within_s=600", {"mtu": 1300}, key="e"),
        world.send("DELETE", "/api/v1/interfaces/none", key="f"),
        world.send("DELETE", "/api/v1/interfaces/b0", key="g"),
        world.send("PATCH", "/api/v1/interfaces/b1", {"mtu": "big"}),
    ]
    assert [heard.status for heard in told] == [201, 409, 200, 200, 200, 200, 202, 200, 404, 200, 400], told


def change(world: World, number: int, key: str | None = None) -> None:
    """A command that the kernel has nothing to do with: what is at stake here is the log."""
    world.send("PATCH", f"/api/v1/interfaces/b{1 + number % (BITE - 1)}", {"description": f"no. {number}"}, key=key)


CODE = f"""
import sys
from service.store import snapshots
from service.cli.main import main
snapshots.EVERY = {EVERY}
sys.argv = ["tunledger", *sys.argv[1:]]
main()
"""


def record(folder: Path) -> Recording:
    """Live three lives under strace, the first ended by a kill, the second in order, the third by a kill."""
    world = World(folder / "db", settings={"TUNLEDGER_COUNTERS__INTERVAL_S": "1"}, decoys=False)
    service = world.service
    history = History(service.folder, tuple(DATABASE + suffix for suffix in ("", "-wal", "-journal", ".head")))

    @contextlib.contextmanager
    def life(name: str, *arguments: str) -> Iterator[int]:
        trace = folder / f"{name}.trace"
        # Not by `Service.spawn`: the service is started by strace, and makes snapshots far more often.
        service.process = strace.start(
            trace, CALLS, CODE, *arguments, environment=service.environment, folder=ROOT, output=service.log
        )
        try:
            yield strace.traced(service.process)
            service.process.wait(60)
        finally:
            service.close()
        history.add(strace.calls(trace))

    with life("migrate", "migrate"):
        pass
    assert service.process is not None
    assert service.process.returncode == 0
    history.mark(MIGRATED)
    with world:
        with life("first", "serve") as process:
            service.wait_ready()
            declare(world)
            for number in range(PATCHES):
                change(world, number, f"key-{number}" if number % 3 else None)
            with ThreadPoolExecutor(BITE) as pool:
                pool.map(lambda number: change(world, number), range(3 * BITE))
                threading.Event().wait(0.05)  # the kill must come while they are under way; when, does not matter
                os.kill(process, signal.SIGKILL)
        with life("second", "serve") as process:
            service.wait_ready()
            for number in range(BITE):
                change(world, number, f"second-{number}")
            os.kill(process, signal.SIGTERM)
        history.mark(STOPPED)
        with life("third", "serve") as process:
            service.wait_ready()
            for number in range(BITE):
                change(world, number)
            world.send("DELETE", "/api/v1/interfaces/b2", key="h")
            os.kill(process, signal.SIGKILL)
    return recorded(world, history)


def recorded(world: World, history: History) -> Recording:
    """The history, with what the log held in the end: all of it is there, since the power did not fail."""
    service = world.service
    events = service.events()
    assert service.verification().problems == []
    settled: dict[str, int] = {}
    taken: dict[str, int] = {}
    for event in events:
        if event.command_id is not None and isinstance(event.body, ev.Outcome):
            settled[event.command_id] = event.position
        if event.command_id is not None and isinstance(event.body, ev.Intent):
            taken[event.command_id] = event.position
    outcomes = Counter((e.command_id, e.stream) for e in events if isinstance(e.body, ev.Outcome))
    assert set(outcomes.values()) == {1}, "a command has two outcomes on one interface"
    engine = open_reader(service.database)
    with engine.connect() as connection:
        rows = connection.execute(sa.select(schema.answers)).all()
        snapshots = len(connection.execute(sa.select(schema.snapshots.c.position)).all())
        samples = len(connection.execute(sa.select(schema.counter_raw.c.at).distinct()).all())
    engine.dispose()
    return Recording(
        history,
        sent=tuple(world.sent),
        migrated=history.steps.index(Mark(MIGRATED)),
        hashes=(codec.GENESIS, *(event.hash for event in events)),
        settled=settled,
        taken=taken,
        answers={(row.actor, row.key): (row.status, row.body) for row in rows},
        key_of={row.command_id: (row.actor, row.key) for row in rows},
        stopped=next(event.position for event in events if isinstance(event.body, ev.ServiceStopped)),
        snapshots=snapshots,
        samples=samples,
    )


# -- looking at an image


@dataclass(frozen=True, slots=True)
class Found:
    """What a start finds on a disk: how far the log goes, the answers kept; no head if there is no log yet."""

    head: int | None
    answers: Answers


@dataclass(slots=True)
class Judge:
    """Looks at images, at each content once, and holds it against what clients were told."""

    recording: Recording
    folder: Path
    images: int = 0
    _images: dict[bytes, Found | str] = field(default_factory=dict)
    _databases: dict[bytes, Found | str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.images} images, {len(self._images)} different, {len(self._databases)} after recovery"

    def complaint(self, image: Image, promises: "Promises") -> str | None:
        """What is wrong with a disk after which a client heard that; None if nothing is."""
        self.images += 1
        digest = image.digest()
        found = self._images.get(digest)
        if found is None:
            image.put(self.folder)
            self._images[digest] = found = self._look(migrated=promises.migrated)
        if isinstance(found, str):
            return found
        if found.head is None:
            return "there is no log, and the migration had succeeded" if promises.migrated else None
        if found.head < promises.head:
            return f"the log ends at {found.head}, and what is at {promises.head} had been acknowledged"
        for key in promises.keys:
            if found.answers.get(key) != self.recording.answers[key]:
                return f"the answer to key {key} had been given, and is not kept: {found.answers.get(key)}"
        return None

    def _look(self, *, migrated: bool) -> Found | str:
        """Open the database as a start does, which reads before it writes; then see what it recovered to."""
        path = self.folder / DATABASE
        try:
            if migrated:
                require_current(path)
            else:  # whoever ran `migrate` runs it again
                migrate(path, now=lambda: "2026-01-01T00:00:00.000000Z")
            engine = open_writer(path)
            try:
                with engine.connect() as connection:
                    connection.exec_driver_sql("SELECT count(*) FROM sqlite_schema").all()
            finally:
                engine.dispose()  # the last connection: it checkpoints, and removes the -wal
            digest = hashlib.sha256(path.read_bytes()).digest()
            if digest not in self._databases:
                self._databases[digest] = examined(path, self.recording.hashes)
            found = self._databases[digest]
            lost = None
            if isinstance(found, Found):
                lost = headfile.problem(path, lambda at: self._mark(at, found), found.head or 0)
        except (TunledgerError, sa.exc.SQLAlchemyError) as error:
            return f"{type(error).__name__}: {error}"
        return lost or found

    def _mark(self, position: int, found: Found) -> tuple[str, None] | None:
        """Hash of an event that a recovered log has, as `LogReader.mark`."""
        return (self.recording.hashes[position], None) if position <= (found.head or 0) else None


def examined(path: Path, hashes: Sequence[str]) -> Found | str:
    """What a recovered database holds; or what is wrong with it, whatever was acknowledged."""
    reader = LogReader(path)
    try:
        opened, found = open_log(reader), reader.verify()
    finally:
        reader.close()
    if opened.found.problems or found.problems:
        return f"it does not verify: {[*opened.found.problems, *found.problems]}"
    head = found.head_position
    if opened.found.head_position != head:
        return f"with the snapshot, the log ends at {opened.found.head_position}; without, at {head}"
    if head >= len(hashes) or (head and found.head_hash != hashes[head]):
        return f"position {head} is not what was written there"
    counters.load(path)
    engine = open_writer(path)
    try:
        with engine.connect() as connection:
            told = connection.exec_driver_sql("PRAGMA integrity_check").scalars().all()
            rows = connection.execute(sa.select(schema.answers)).all()
            named = connection.execute(sa.select(schema.node.c.id)).first() is not None
    finally:
        engine.dispose()
    if told != ["ok"]:
        return f"integrity_check: {told}"
    return Found(head if named else None, {(row.actor, row.key): (row.status, row.body) for row in rows})


@dataclass(slots=True)
class Promises:
    """What clients, and whoever ran the programs, were told until now."""

    recording: Recording
    migrated: bool = False
    head: int = 0
    keys: set[tuple[str, str]] = field(default_factory=set)

    def take(self, step: Step) -> None:
        """Another step; fails on an acknowledgement that nothing in the whole log stands behind."""
        if isinstance(step, Mark):
            self.migrated = self.migrated or step.what == MIGRATED
            if step.what == STOPPED:
                self.head = max(self.head, self.recording.stopped)
        if not isinstance(step, Told):
            return
        known = self.recording.taken if step.status == 202 else self.recording.settled
        position = known.get(step.command_id)
        assert position is not None or step.status >= 400, f"{step}, and it is not in the log"
        self.head = max(self.head, position or 0)
        if step.command_id in self.recording.key_of and step.status != 202:
            self.keys.add(self.recording.key_of[step.command_id])


# -- choosing moments and images


def violations(
    recording: Recording,
    judge: Judge,
    choose: Callable[[Disk, Step], Iterator[Image]],
    *,
    steps: Sequence[Step] | None = None,
    first: int = 0,
) -> list[str]:
    """Let the power fail before each step from the first on, and leave the images that are chosen.

    Returns what was wrong with them.
    """
    disk, promises, found = Disk(), Promises(recording), []
    for number, step in enumerate([*(recording.history.steps if steps is None else steps), Mark("the end")]):
        for image in choose(disk, step) if number >= first else ():
            complaint = judge.complaint(image, promises)
            if complaint is not None:
                found.append(f"before step {number} ({described(step)}), {image.how}: {complaint}")
        disk.take(step)
        promises.take(step)
    return found


def some(chance: random.Random) -> Callable[[Disk, Step], Iterator[Image]]:
    """Most where most is at stake: just before a sync, when most is pending, and after an answer."""

    def choose(disk: Disk, step: Step) -> Iterator[Image]:
        if isinstance(step, Sync | SyncNames) and disk.pending:
            if chance.random() < 0.5:
                yield chance.choice((disk.everything, disk.without_names))()
            yield disk.torn(chance)
            yield chance.choice((disk.without, disk.alone))(chance.randrange(disk.pending))
        elif isinstance(step, Name | SyncNames | Mark):
            yield from (disk.nothing(), disk.everything(), disk.without_names())
        elif isinstance(step, Told) or chance.random() < 0.03:
            yield chance.choice((disk.nothing(), disk.torn(chance)))

    return choose


def all_kinds(chance: random.Random) -> Callable[[Disk, Step], Iterator[Image]]:
    """Every kind of image at every step; before a sync, with every single write left out, and alone."""

    def choose(disk: Disk, step: Step) -> Iterator[Image]:
        yield from (disk.nothing(), disk.everything(), disk.without_names(), disk.torn(chance))
        if isinstance(step, Sync | SyncNames):
            yield from (one(number) for number in range(disk.pending) for one in (disk.without, disk.alone))
            yield from (disk.torn(chance) for _ in range(10))

    return choose


def parted(choose: Callable[[Disk, Step], Iterator[Image]]) -> Callable[[Disk, Step], Iterator[Image]]:
    """What is chosen at those steps that are this part's (`tests.part`)."""
    numbers = itertools.count()

    def chosen(disk: Disk, step: Step) -> Iterator[Image]:
        if part_of([next(numbers)]):
            yield from choose(disk, step)

    return chosen


def nothing_pending(disk: Disk, step: Step) -> Iterator[Image]:
    """Only what is durable, after every answer."""
    if isinstance(step, Mark | Told):
        yield disk.nothing()


def described(step: Step) -> str:
    """A step without its bytes."""
    return f"Write of {len(step.data)} at {step.offset} of file {step.file}" if isinstance(step, Write) else str(step)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    """The lives, recorded once for all tests here."""
    strace.require()
    return record(tmp_path_factory.mktemp("power"))


@pytest.fixture
def judge(recording: Recording) -> Iterator[Judge]:
    """Looks at images in memory, where there is such a folder: nothing here depends on a real disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Judge(recording, Path(folder) / "image")


def said(found: Sequence[str]) -> str:
    """The first violations, a line each."""
    return "\n".join([f"{len(found)} violations:", *found[:20]])


def test_the_recording_holds_what_is_to_be_tested(recording: Recording) -> None:
    """Commits, a checkpoint while serving, a -wal begun anew in its place, and one that is removed and made again."""
    steps = recording.history.steps
    files = {step.name: step.file for step in steps if isinstance(step, Name) and step.file is not None}
    database = files[DATABASE]
    began = Counter(s.file for s in steps if isinstance(s, Write) and s.offset == 0 and len(s.data) == WAL_HEADER_BYTES)
    assert max(began.values()) > 1, "no -wal was begun anew"
    assert len(began) >= 3, "no -wal was removed and made again"
    stopped = steps.index(Mark(STOPPED))
    checkpointed = [
        n for n, s in enumerate(steps) if isinstance(s, Sync) and s.file == database and n > recording.migrated
    ]
    answered = [n for n, s in enumerate(steps) if isinstance(s, Told)]
    assert any(answered[0] < n < answered[-1] for n in checkpointed if n < stopped), "no checkpoint while serving"
    told = Counter(step.status for step in steps if isinstance(step, Told))
    assert {200, 201, 202, 404, 409} <= set(told)
    assert recording.snapshots > 1
    assert recording.samples > 1
    kinds = Counter(type(step).__name__ for step in steps)
    print(f"{len(recording.hashes) - 1} events, {sum(told.values())} answers; {dict(kinds)}")


def test_what_was_acknowledged_outlives_a_loss_of_power(recording: Recording, judge: Judge) -> None:
    found = violations(recording, judge, some(random.Random(SEED)), first=recording.migrated)
    print(judge)
    assert not found, said(found)


def test_a_migration_that_a_loss_of_power_cut_short_can_be_done_again(recording: Recording, judge: Judge) -> None:
    """Until `migrate` says that it is done there may be anything, but one that it can go on from."""
    steps = recording.history.steps[: recording.migrated]
    found = violations(recording, judge, some(random.Random(SEED)), steps=steps)
    print(judge)
    assert not found, said(found)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_what_was_acknowledged_outlives_a_loss_of_power_at_every_step(recording: Recording, judge: Judge) -> None:
    found = violations(recording, judge, parted(all_kinds(random.Random(SEED))), first=recording.migrated)
    print(judge)
    assert not found, said(found)


def test_the_service_starts_on_what_a_loss_of_power_left(recording: Recording, tmp_path: Path) -> None:
    """The real one, on some of the images: it brings the host to what was acknowledged, and all else holds too."""
    chance = random.Random(SEED)
    moments = chance.sample(range(recording.migrated + 1, len(recording.history.steps)), BOOTS)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # namespaces belong to threads
        list(pool.map(lambda moment: boot(recording, tmp_path / str(moment), moment), moments))


def boot(recording: Recording, folder: Path, moment: int) -> None:
    """Start on what may be left when the power fails before a step, in a namespace without links."""
    disk = Disk()
    for step in recording.history.steps[:moment]:
        disk.take(step)
    disk.torn(random.Random(moment)).put(folder)
    told = {step.command_id for step in recording.history.steps[:moment] if isinstance(step, Told)}
    with World(folder, case=f"the power failed before step {moment}") as world:
        for heard in recording.sent:
            known = heard.command_id in told
            world.sent.append(heard if known else replace(heard, status=None, answer=None, headers={}, ended=None))
        world.start()
        world.assert_holds()


@pytest.mark.parametrize("level", ["NORMAL", "OFF"])
def test_a_lower_synchronous_is_found_to_lose_what_was_acknowledged(
    recording: Recording, judge: Judge, level: str
) -> None:
    """The same steps without the syncs that SQLite does not do then: it must be noticed."""
    steps = without_syncs(recording, level)
    found = violations(recording, judge, nothing_pending, steps=steps)
    print(f"{level}: {len(found)} violations, such as: {found[0] if found else ''}")
    assert any("had been acknowledged" in each for each in found)


def without_syncs(recording: Recording, level: str) -> list[Step]:
    """What would have been done with synchronous=NORMAL, or OFF, after the migration.

    NORMAL leaves out the sync of each commit, and keeps those around a checkpoint: before and after the database is
    written, and after a new header of the -wal.
    """
    steps = list(recording.history.steps)
    database = next(step.file for step in steps if isinstance(step, Name) and step.name == DATABASE)
    for number, step in enumerate(steps):
        if isinstance(step, Sync) and number > recording.migrated:
            following = next((s for s in steps[number + 1 :] if isinstance(s, Write)), None)
            before = steps[number - 1]
            header = isinstance(before, Write) and before.offset == 0 and len(before.data) == WAL_HEADER_BYTES
            around = step.file == database or header or (following is not None and following.file == database)
            if level == "OFF" or not around:
                steps[number] = Mark("no sync")  # in its place, since steps go by their numbers
    return steps
