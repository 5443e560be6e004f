"""The database is damaged, cut short, replaced or brought back from an older copy: nothing on the host is changed.

Each case ends a service by kill -9, does something to the files of its log, and starts it again. It must refuse to
start, in words; or start read-only, in words, with reads answered and every write refused; or, where the damage does
not touch the log, serve as if nothing had been. Whichever it is, all links stay what they are, bit for bit, ours and
those of other owners. With the files put back, everything must hold as before.

What cannot be noticed, and is not promised: an older copy, whole in itself, without `<database>.head` beside it, and
no interface declared since. The log is then what it says, and so is the host.
"""

import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from service.cli import local
from service.domain.errors import ErrorCode, TunledgerError
from service.store import headfile, snapshots
from service.store.database import open_writer
from service.store.migrate import migrate
from service.store.reader import LogReader
from tests.faults.world import World
from tests.part import part_of
from tests.store.log import NOW, Log, draft, note, tamper
from tests.store.samples import SAMPLES

pytestmark = pytest.mark.kernel

PAGE = 4096
REFUSED, READ_ONLY, SOUND = "refused to start", "read-only", "sound"
SEEDS = 8  # flips of bits in each place, two of them always
EX_REFUSED = 2  # of `tunledger serve`
READS = ("/interfaces", "/interfaces/d0", "/events?limit=5", "/log/head", "/counters")


@dataclass(frozen=True)
class Life:
    """A world whose service was killed, and its files at the end and some time before."""

    world: World
    now: Path
    older: Path

    @property
    def database(self) -> Path:
        """The log's file."""
        return self.world.service.database

    @property
    def wal(self) -> Path:
        """Its -wal, which holds most of the log: nothing was checkpointed yet."""
        return self.beside("-wal")

    def beside(self, suffix: str) -> Path:
        """A file beside the database."""
        return self.database.with_name(self.database.name + suffix)

    def restore(self, files: Path) -> None:
        """Put the files back as they were."""
        for found in self.database.parent.iterdir():
            if found.name.startswith(self.database.name):
                shutil.rmtree(found) if found.is_dir() else found.unlink()
        for kept in files.iterdir():
            shutil.copy2(kept, self.database.parent / kept.name)

    def merge(self) -> None:
        """Have all of it in the database's own file, with no -wal beside it."""
        with closing(sqlite3.connect(self.database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """One life for all cases: each puts back what it broke."""
    folder = tmp_path_factory.mktemp("life")
    with World(folder / "world", case="damage") as world:
        database = world.service.database

        def keep(name: str) -> Path:
            (folder / name).mkdir()
            for found in database.parent.glob(f"{database.name}*"):
                shutil.copy2(found, folder / name / found.name)
            return folder / name

        world.start()
        for number in range(5):
            spec = {"name": f"d{number}", "addresses": [f"10.8.{number}.1/24"], "mtu": 1400}
            assert world.send("POST", "/api/v1/interfaces", spec, key=f"make-{number}").status == 201
        world.kill()
        older = keep("older")
        world.start()
        # What an older log would undo: a change, a delete, an interface that it does not know.
        assert world.send("PATCH", "/api/v1/interfaces/d0", {"mtu": 1300}).status == 200
        assert world.send("DELETE", "/api/v1/interfaces/d1").status in (200, 204)
        assert world.send("POST", "/api/v1/interfaces", {"name": "new"}).status == 201
        world.kill()
        yield Life(world, keep("now"), older)


@pytest.fixture
def life(ended: Life) -> Iterator[Life]:
    """The same, with its files as they were."""
    ended.restore(ended.now)
    yield ended
    if ended.world.alive():
        ended.world.service.kill()


def outcome(life: Life) -> str:
    """Start, look, try to write, and see that the host is as it was; what became of it."""
    world = life.world
    before = {name: link.still for name, link in world.host.links().items()}
    world.service.log.write_text("")
    try:
        if not world.try_start():
            said = world.service.log.read_text()
            assert world.wait_dead() == EX_REFUSED
            assert "Traceback" not in said, said
            assert str(life.database) in said, said
            return REFUSED
        status, reasons = _health(world)
        if status == 200:
            shown = {i["spec"]["name"]: i["spec"]["mtu"] for i in world.get("/api/v1/interfaces")["interfaces"]}
            assert shown == {"d0": 1300, "d2": 1400, "d3": 1400, "d4": 1400, "new": 1500}
            return SOUND
        assert any(reason.startswith("read-only: ") for reason in reasons), reasons
        _assert_read_only(world)
        return READ_ONLY
    finally:
        if world.alive():
            world.service.kill()
        assert {name: link.still for name, link in world.host.links().items()} == before, "the host was changed"
        world.assert_strangers_untouched()


def _health(world: World) -> tuple[int, list[str]]:
    heard = world.send("GET", "/health")
    assert heard.status is not None, heard.why
    return heard.status, heard.answer.get("reasons", [])


def _assert_read_only(world: World) -> None:
    for method, path, body in (
        ("POST", "/api/v1/interfaces", {"name": "more"}),
        ("PATCH", "/api/v1/interfaces/d2", {"mtu": 1280}),
        ("DELETE", "/api/v1/interfaces/d2", None),
        ("POST", "/api/v1/reconcile", None),
        ("POST", "/api/v1/batch", {"commands": [{"delete": {"name": "d3"}}]}),
    ):
        heard = world.send(method, path, body, key=f"damaged-{method}-{path}")
        assert heard.status == 503, (heard, heard.answer)
        assert heard.answer["code"] in ("log_corrupt", "log_unavailable"), heard.answer
        assert heard.answer["detail"].startswith("read-only: "), heard.answer
    assert world.send("POST", "/api/interface/create", {}).status == 503
    for path in READS:
        heard = world.send("GET", f"/api/v1{path}")
        assert heard.status in (200, 404, 503), (heard, heard.answer)


# -- what is done to the files


def _flip(path: Path, first: int, last: int, seed: int, *, bits: int = 3) -> None:
    chance = random.Random(seed)
    content = bytearray(path.read_bytes())
    for _ in range(bits):
        content[chance.randrange(first, min(last, len(content)))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def _pages_of(life: Life, name: str) -> list[int]:
    """The pages that a table or an index begins at or, being small, is."""
    life.merge()
    with closing(sqlite3.connect(life.database)) as connection:
        return [row[0] for row in connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (name,))]


def _flip_in(life: Life, name: str, seed: int) -> None:
    (root,) = _pages_of(life, name)
    _flip(life.database, (root - 1) * PAGE, root * PAGE, seed)


def _cut(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def _cut_database(life: Life, size: int) -> None:
    life.merge()
    _cut(life.database, size)


def _another(life: Life) -> Path:
    """The log of another node, with interfaces of its own."""
    path = life.now.parent / "another.db"
    if not path.exists():
        migrate(path, now=lambda: NOW)
        log = Log(path)
        for name in ("InterfaceDeclared", "CommandApplied"):
            body: Any = SAMPLES[name]
            log.append(draft(body, f"interface/{body.interface_id}", command_id="command-1"))
        log.fill(20)
        log.close()
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return path


def _replace_by_another(life: Life) -> None:
    life.merge()
    shutil.copy(_another(life), life.database)


def _wal_of_another(life: Life) -> None:
    """A -wal that is whole in itself, and was written for other pages."""
    path = Path(shutil.copy(_another(life), life.now.parent / "donor.db"))
    log = Log(path)
    log.append(draft(note(1)))
    shutil.copy(path.with_name("donor.db-wal"), life.wal)
    log.close()


def _replace(life: Life, make: Callable[[Path], object]) -> None:
    life.merge()
    life.database.unlink()
    make(life.database)


def _older(life: Life, *, with_head: bool) -> None:
    head = life.beside(".head").read_bytes()
    life.restore(life.older)
    if with_head:
        life.beside(".head").write_bytes(head)
    else:
        life.beside(".head").unlink()


def _without(life: Life, *suffixes: str) -> None:
    for suffix in suffixes:
        life.beside(suffix).unlink()


def _snapshot(life: Life) -> sa.Engine:
    """Make a snapshot of the log's state, newer than all but a few events."""
    with closing(LogReader(life.database)) as reader:
        position = reader.head()[0] - 2
        then = snapshots.past(reader, position)
    job = snapshots.storing(position, then.state.head, snapshots.encode(then), [])
    engine = open_writer(life.database)
    with engine.begin() as connection:
        job(connection)
    return engine


def _spoil_snapshot(life: Life, sql: str) -> None:
    engine = _snapshot(life)
    with engine.begin() as connection:
        assert connection.exec_driver_sql(sql).rowcount == 1
    engine.dispose()


def _swap(life: Life) -> None:
    """The payloads of two events change places, as their hashes do."""
    with closing(sqlite3.connect(life.database)) as connection:
        rows = dict(connection.execute("SELECT position, payload FROM events WHERE type = 'InterfaceDeclared' LIMIT 2"))
    (one, two) = rows
    tamper(
        life.database,
        ("UPDATE events SET payload = ? WHERE position = ?", (rows[two], one)),
        ("UPDATE events SET payload = ? WHERE position = ?", (rows[one], two)),
    )


CASES: dict[str, tuple[Callable[[Life], object], set[str]]] = {
    "nothing at all": (lambda _life: None, {SOUND}),
    "all in one file": (Life.merge, {SOUND}),
    # -- cut short
    "the database is empty": (lambda life: _cut_database(life, 0), {REFUSED}),
    "a byte is left": (lambda life: _cut_database(life, 1), {REFUSED}),
    "a page is left": (lambda life: _cut_database(life, PAGE), {READ_ONLY}),
    "half is left": (lambda life: _cut_database(life, life.database.stat().st_size // 2), {READ_ONLY}),
    "a page is missing": (lambda life: _cut_database(life, life.database.stat().st_size - PAGE), {READ_ONLY}),
    "the database is gone": (lambda life: _replace(life, lambda _path: None), {REFUSED}),
    "the database is gone, and its -wal is not": (lambda life: life.database.unlink(), {REFUSED}),
    # -- something else in its place
    "text": (lambda life: _replace(life, lambda path: path.write_text("dear diary\n" * 1000)), {READ_ONLY}),
    "a folder": (lambda life: _replace(life, Path.mkdir), {READ_ONLY}),
    "noise": (lambda life: _replace(life, lambda p: p.write_bytes(random.Random(1).randbytes(1 << 16))), {READ_ONLY}),
    "another node's log": (_replace_by_another, {READ_ONLY}),
    "a newer schema": (
        lambda life: tamper(life.database, ("UPDATE alembic_version SET version_num = '9999'", ())),
        {REFUSED},
    ),
    # -- the -wal and its index
    "the -wal is gone": (lambda life: _without(life, "-wal"), {READ_ONLY}),
    "the -wal and its index are gone": (lambda life: _without(life, "-wal", "-shm"), {READ_ONLY}),
    "the -wal is empty": (lambda life: _cut(life.wal, 0), {READ_ONLY}),
    "the -wal is cut in half": (lambda life: _cut(life.wal, life.wal.stat().st_size // 2), {READ_ONLY}),
    "the -wal's last page is torn": (lambda life: _cut(life.wal, life.wal.stat().st_size - 100), {READ_ONLY}),
    "the -wal is another log's": (_wal_of_another, {READ_ONLY}),
    "the -wal is an older one": (
        lambda life: shutil.copy(life.older / life.wal.name, life.wal),
        {READ_ONLY},
    ),
    "the index of the -wal is noise": (
        lambda life: life.beside("-shm").write_bytes(random.Random(2).randbytes(32768)),
        {SOUND},
    ),
    "the index of the -wal is gone": (lambda life: _without(life, "-shm"), {SOUND}),
    # -- an older copy of everything
    "an older copy": (lambda life: _older(life, with_head=True), {READ_ONLY}),
    "an older copy, without its head": (lambda life: _older(life, with_head=False), {READ_ONLY}),
    "the -wal and the head are gone": (lambda life: _without(life, "-wal", ".head"), {READ_ONLY}),
    # -- what may be lost
    "the head is gone": (lambda life: _without(life, ".head"), {SOUND}),
    "the head is noise": (lambda life: life.beside(".head").write_bytes(b"\x00" * 86), {SOUND}),
    "the head is torn": (lambda life: _cut(life.beside(".head"), 40), {SOUND}),
    "the reserve is gone": (lambda life: _without(life, ".reserve"), {SOUND}),
    "the lock is gone": (lambda life: _without(life, ".lock"), {SOUND}),
    "a snapshot's state is spoiled": (
        lambda life: _spoil_snapshot(life, "UPDATE snapshots SET state = zeroblob(length(state))"),
        {SOUND},
    ),
    "a snapshot says another position": (
        lambda life: _spoil_snapshot(life, "UPDATE snapshots SET position = position - 1"),
        {SOUND},
    ),
    "a snapshot belongs to another log": (
        lambda life: _spoil_snapshot(life, "UPDATE snapshots SET hash = replace(hash, '0', '1')"),
        {SOUND},
    ),
    # -- somebody's hand in it
    "a payload was edited": (
        lambda life: tamper(
            life.database,
            ("UPDATE events SET payload = replace(payload, '\"mtu\":1400', '\"mtu\":1280') WHERE position = 3", ()),
        ),
        {READ_ONLY},
    ),
    "the last event was removed": (
        lambda life: tamper(
            life.database, ("DELETE FROM events WHERE position = (SELECT max(position) FROM events)", ())
        ),
        {READ_ONLY},
    ),
    "an event was removed": (
        lambda life: tamper(life.database, ("DELETE FROM events WHERE position = 5", ())),
        {READ_ONLY},
    ),
    "two events changed places": (_swap, {READ_ONLY}),
    "all events were removed": (lambda life: tamper(life.database, ("DELETE FROM events", ())), {READ_ONLY}),
    "the node was renamed": (
        lambda life: tamper(life.database, ("UPDATE node SET id = 'abcdefabcdef'", ())),
        {READ_ONLY},
    ),
    "the node is gone": (lambda life: tamper(life.database, ("DELETE FROM node", ())), {READ_ONLY}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_log_changes_nothing_on_the_host(life: Life, case: str) -> None:
    damage, allowed = CASES[case]
    damage(life)
    assert outcome(life) in allowed


EVENTS = ("events", "sqlite_autoindex_events_1", "sqlite_autoindex_events_2", "events_by_stream", "interface_names")


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in part_of(range(2, SEEDS)))]
)
@pytest.mark.parametrize("where", ["the header", "the -wal", *EVENTS])
def test_flipped_bits_change_nothing_on_the_host(life: Life, where: str, seed: int) -> None:
    """Anything may become of it but that: bits may fall where nobody looks."""
    match where:
        case "the header":
            life.merge()
            _flip(life.database, 0, 100, seed, bits=1)
        case "the -wal":
            _flip(life.wal, 0, life.wal.stat().st_size, seed)
        case _:
            _flip_in(life, where, seed)
    assert outcome(life) in {REFUSED, READ_ONLY, SOUND}


def test_with_its_files_put_back_everything_holds(life: Life) -> None:
    """None of the above left anything behind, and what was refused had no effect."""
    life.world.start()
    life.world.assert_holds()


def test_what_a_lost_end_is_called_and_how_it_is_accepted(life: Life) -> None:
    """A person reads what to do, and having done it, gets a service that begins from what there is."""
    _older(life, with_head=True)
    world = life.world
    world.start()
    (reason,) = [r for r in _health(world)[1] if r.startswith("read-only: ")]
    assert "its end was lost, or this is an older copy" in reason
    assert f"remove {headfile.path_of(life.database)}" in reason
    world.service.kill()
    headfile.path_of(life.database).unlink()
    world.start()
    (reason,) = [r for r in _health(world)[1] if r.startswith("read-only: ")]
    assert "never heard of new (ifindex " in reason


def test_no_log_is_begun_where_one_was(life: Life) -> None:
    """`tunledger migrate` in a unit file must not make an empty log of a lost one."""
    for empty in (False, True):
        life.restore(life.now)
        if empty:
            _cut(life.database, 0)
        else:
            life.database.unlink()
        before = {found.name: found.read_bytes() for found in life.database.parent.glob(f"{life.database.name}-*")}
        with pytest.raises(TunledgerError, match="a log was here that had come to position") as refused:
            local.migrate(life.database)
        assert refused.value.code is ErrorCode.LOG_CORRUPT
        assert f"remove {headfile.path_of(life.database)}" in refused.value.message
        after = {found.name: found.read_bytes() for found in life.database.parent.glob(f"{life.database.name}-*")}
        assert after == before, "what may still be rescued was touched"
