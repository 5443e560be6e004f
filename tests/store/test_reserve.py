"""The disk under the log is full: what is refused, what goes on the reserve, and how it heals. On real file systems."""

import os
import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.values import InterfaceId, InterfaceName
from service.store import answers, database, reserve, writer
from service.store.answers import Reply
from service.store.migrate import migrate
from service.store.reader import LogReader, Walk
from service.store.reserve import Reserve
from service.store.writer import Claim, claim_of
from tests.e2e.harness import eventually
from tests.faults.small_disk import KINDS, SmallDisk, small_disk
from tests.store.log import DEADLINE_S, NOW, Log, draft, idle, note
from tests.store.samples import SAMPLES

ENOUGH = 3000  # commits; a disk that is not full by then never will be
DELETES = 500  # that the reserve carries at least, one by one, with their answers


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallDisk]:
    """A small disk of each kind."""
    with small_disk(tmp_path, request.param) as one:
        yield one


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[SmallDisk]:
    """A small disk in memory."""
    with small_disk(tmp_path, "tmpfs") as one:
        yield one


@contextmanager
def log_on(disk: SmallDisk) -> Iterator[Log]:
    path = disk.folder / "log.db"
    migrate(path, now=lambda: NOW)
    log = Log(path)
    try:
        yield log
    finally:
        log.close()


def refusal_of(log: Log, *drafts: ev.Draft) -> TunledgerError | None:
    try:
        log.append(*drafts)
    except TunledgerError as error:
        return error
    return None


def exhaust(log: Log) -> None:
    """Write what must wait for room, until it has to."""
    for number in range(ENOUGH):
        refused = refusal_of(log, draft(idle(number), "idle"))
        if refused is not None:
            assert (refused.code, refused.retry) == (ErrorCode.LOG_FULL, True), refused.message
            assert "no space left on the disk; free some, writes then go on" in refused.message
            return
    raise AssertionError("the disk is full, and everything went through")


def identity(number: int) -> InterfaceId:
    return InterfaceId(f"0192f0c0-0000-7000-8000-{number:012x}")


def of(sample: str, number: int) -> ev.Draft:
    """An event about one interface."""
    body: Any = msgspec.structs.replace(
        SAMPLES[sample], interface_id=identity(number), name=InterfaceName(f"tun{number}")
    )
    return draft(body, ev.interface_stream(identity(number)), command_id=f"command-{sample}-{number:08}")


def declare(log: Log, count: int) -> None:
    with log.held():
        futures = [log.queue(of("InterfaceDeclared", n), of("CommandApplied", n)) for n in range(count)]
    for future in futures:
        future.result(DEADLINE_S)


def opened(number: int) -> writer.Job:
    return answers.opened("uid:0", f"key-{number}", "f" * 64, f"command-{number}", NOW)


def closed(number: int) -> writer.Job:
    reply = Reply(200, b'{"command_id":"%d"}' % number, {"etag": '"x"'})
    return answers.closed("uid:0", f"key-{number}", "f" * 64, f"command-{number}", NOW, reply)


def sound(path: Path, events: int) -> None:
    """The chain is whole and so long; what the events mean together does not matter here."""
    walk = Walk(lambda _event: None)
    with closing(LogReader(path)) as reader:
        for rows in reader.batches():
            walk.take(rows)
        assert list(reader.misnamed()) == []
    assert (walk.problems, walk.events) == ([], events)


def test_five_hundred_deletes_and_their_outcomes_go_on_the_reserve(disk: SmallDisk) -> None:
    with log_on(disk) as log:
        declare(log, DELETES)
        disk.fill()
        exhaust(log)
        for number in range(DELETES):
            log.writer.append([of("InterfaceRetired", number)], opened(number)).result(DEADLINE_S)
            log.writer.append([of("CommandApplied", number)], closed(number)).result(DEADLINE_S)
        assert Reserve(log.path).left < reserve.RESERVE_BYTES, "then the disk was not full"
        assert refusal_of(log, draft(idle(), "idle")) is not None
        assert log.broken == []
        sound(log.path, len(log.recorded))


def test_when_the_deletes_have_used_their_part_up_outcomes_still_have_theirs(tmpfs: SmallDisk) -> None:
    with log_on(tmpfs) as log:
        declare(log, 1)
        tmpfs.fill()
        exhaust(log)
        refused = None
        for _ in range(ENOUGH):
            refused = refusal_of(log, *(of("InterfaceRetired", 0) for _ in range(20)))
            if refused is not None:
                break
        assert refused is not None
        assert refused.code is ErrorCode.LOG_FULL
        assert 0 < Reserve(log.path).left <= reserve.OUTCOMES_BYTES
        for _ in range(256):  # as many commands as there can be under way
            log.append(of("CommandApplied", 0))
        log.append(draft(SAMPLES["ServiceStopped"]))
        assert log.broken == []
        sound(log.path, len(log.recorded))


def test_those_that_must_wait_do_not_take_the_others_of_their_batch_along(
    disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PROBE_S", 3600.0)
    with log_on(disk) as log:
        declare(log, 1)
        disk.fill()
        exhaust(log)
        assert refusal_of(log, draft(idle(), "idle")) is not None  # the writer has done with the one before
        # As if nothing were known of the disk yet: the batch has to find out by itself.
        log.writer._full = None
        ran: list[str] = []
        with log.held():
            waiting: list[Future[Any]] = [
                log.queue(draft(idle(1), "idle")),
                log.queue(of("InterfaceRetired", 0), draft(idle(2), "idle")),
                log.writer.run(lambda _: ran.append("a job")),
            ]
            retired = log.queue(of("InterfaceRetired", 0))
            applied = log.queue(of("CommandApplied", 0))
            waiting.append(log.queue(draft(idle(3), "idle")))
        for future in waiting:
            with pytest.raises(TunledgerError, match="no space left on the disk") as refused:
                future.result(DEADLINE_S)
            assert refused.value.code is ErrorCode.LOG_FULL
        (first,), (second,) = retired.result(DEADLINE_S), applied.result(DEADLINE_S)
        assert second.position == first.position + 1
        assert log.broken == []
        sound(log.path, len(log.recorded))


def test_while_it_is_full_nothing_that_waits_touches_the_disk(
    tmpfs: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PROBE_S", 3600.0)
    with log_on(tmpfs) as log:
        declare(log, 1)
        tmpfs.fill()
        exhaust(log)
        log.append(of("InterfaceRetired", 0))
        statements: list[str] = []
        driver = log.writer._driver()
        driver.set_trace_callback(statements.append)
        for number in range(20):
            assert refusal_of(log, draft(idle(number), "idle")) is not None
        assert statements == []
        log.append(of("CommandApplied", 0))
        assert "COMMIT" in statements


def test_it_heals_without_a_write_and_the_reserve_is_whole_again(disk: SmallDisk) -> None:
    with log_on(disk) as log:
        declare(log, 200)
        disk.fill()
        exhaust(log)
        for number in range(200):
            log.append(of("InterfaceRetired", number))
        assert Reserve(log.path).left < reserve.RESERVE_BYTES
        assert "no space left" in (log.writer.trouble() or "")
        disk.free()
        eventually(lambda: log.writer.trouble() is None, DEADLINE_S, "healing")
        assert Reserve(log.path).left == reserve.RESERVE_BYTES
        log.append(draft(idle(), "idle"))
        assert log.broken == []
        sound(log.path, len(log.recorded))


def test_room_for_less_than_the_reserve_and_a_margin_is_not_enough(tmpfs: SmallDisk) -> None:
    """It would be full again at once, with a part of the reserve gone for nothing."""
    with log_on(tmpfs) as log:
        declare(log, 200)
        tmpfs.fill()
        exhaust(log)
        for number in range(200):
            log.append(of("InterfaceRetired", number))
        left = Reserve(log.path).left
        with (tmpfs.folder / "ballast").open("r+b") as file:
            file.truncate((tmpfs.folder / "ballast").stat().st_size - (reserve.RESERVE_BYTES - left) // 2)
        log.writer._probed = 0.0
        assert refusal_of(log, draft(idle(), "idle")) is not None
        assert Reserve(log.path).left == left, "what it could have is not kept from others"


def test_a_log_whose_disk_has_less_than_the_reserve_begins_by_refusing(tmpfs: SmallDisk) -> None:
    path = tmpfs.folder / "log.db"
    migrate(path, now=lambda: NOW)
    with closing(LogReader(path)) as reader:
        reader.head()  # there is a -shm now
        tmpfs.fill(but=1024 * 1024)
        log = Log(path)
        try:
            assert "no space left" in (log.writer.trouble() or "")
            assert refusal_of(log, draft(idle(), "idle")) is not None
            assert Reserve(path).left == 0
            tmpfs.free()
            eventually(lambda: log.writer.trouble() is None, DEADLINE_S, "healing")
            log.append(draft(idle(), "idle"))
        finally:
            log.close()


def test_the_index_of_the_wal_has_all_its_blocks(disk: SmallDisk) -> None:
    """A hole in what is mapped would end the process by SIGBUS once the disk is full. This ext4 has blocks of 1 KiB."""
    with log_on(disk) as log:
        found = log.path.with_name("log.db-shm").stat()
        assert found.st_size == database.INDEX_BYTES
        assert found.st_blocks * 512 >= database.INDEX_BYTES
        log.append(draft(idle()))
        sound(log.path, 1)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Somebody in the middle of reading: checkpoints stop at what he sees."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM events").fetchone()
        yield


def test_an_index_of_the_wal_that_cannot_grow_is_a_full_disk_too(
    tmpfs: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite finds out when the commit is in the -wal: what it then calls failed would be there after a crash."""
    monkeypatch.setattr(database, "INDEX_BYTES", 1)  # it would need a -wal of 80 MB
    with log_on(tmpfs) as log:
        shm = log.path.with_name("log.db-shm")
        declare(log, 1)
        with _reading(log.path):
            while log.writer._frames < 3900:  # 4,062 fit into the first piece of the index (sqlite.org/walformat.html)
                log.append(*(draft(idle(n), f"idle-{n % 7}") for n in range(400)))
            assert shm.stat().st_size == 32768
            wal = log.path.with_name("log.db-wal")
            with wal.open("r+b") as file:  # room in the -wal, so that it is the index that has none
                os.posix_fallocate(file.fileno(), 0, wal.stat().st_size + 3 * 1024 * 1024)
            tmpfs.fill()
            for _ in range(200):
                log.append(of("CommandApplied", 0))
                if shm.stat().st_size > 32768:
                    break
            assert shm.stat().st_size > 32768, "the index never had to grow"
            assert Reserve(log.path).left < reserve.RESERVE_BYTES, "then there was room"
            assert log.broken == []
        sound(log.path, len(log.recorded))
        # What a crash would leave: the files as they are, without the index.
        copy = tmpfs.folder.parent / "copy.db"
        for suffix in ("", "-wal"):
            Path(f"{copy}{suffix}").write_bytes(Path(f"{log.path}{suffix}").read_bytes())
        sound(copy, len(log.recorded))


def test_a_commit_that_may_be_in_the_wal_though_it_failed_is_unknown_and_the_end(
    tmpfs: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "INDEX_BYTES", 1)
    with log_on(tmpfs) as log:
        with _reading(log.path):
            while log.writer._frames < 3900:
                log.append(*(draft(idle(n), f"idle-{n % 7}") for n in range(400)))
            wal = log.path.with_name("log.db-wal")
            with wal.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, wal.stat().st_size + 3 * 1024 * 1024)
            tmpfs.fill()
            Reserve(log.path)._path.unlink()
            with (tmpfs.folder / "taken").open("wb", buffering=0) as file:  # and somebody else took what it was
                while True:
                    try:
                        file.write(bytes(4096))
                    except OSError:
                        break
            refused: TunledgerError | None = None
            while refused is None:
                refused = refusal_of(log, draft(note()))
            assert refused.code is ErrorCode.OUTCOME_UNKNOWN
            assert "SQLITE_IOERR_SHM" in refused.message
            assert len(log.broken) == 1
        acknowledged = len(log.recorded)
        log.close()
        copy = tmpfs.folder.parent / "copy.db"
        for suffix in ("", "-wal"):
            Path(f"{copy}{suffix}").write_bytes(Path(f"{log.path}{suffix}").read_bytes())
        sound(copy, acknowledged + 1)


def test_the_reserve_is_really_there_and_nobody_elses(path: Path, log: Log) -> None:
    file = path.with_name(path.name + ".reserve")
    found = file.stat()
    assert found.st_size == reserve.RESERVE_BYTES
    assert found.st_blocks * 512 >= reserve.RESERVE_BYTES
    assert stat.S_IMODE(found.st_mode) == 0o600
    log.close()
    assert file.stat().st_size == reserve.RESERVE_BYTES, "the next start may find the disk full"


def test_a_reserve_with_holes_is_none_until_it_is_filled(tmp_path: Path) -> None:
    one = Reserve(tmp_path / "log.db")
    with (tmp_path / "log.db.reserve").open("wb") as file:
        file.truncate(reserve.RESERVE_BYTES)
    assert one.left == 0
    assert one.fill() is None
    assert one.left == reserve.RESERVE_BYTES


def test_the_reserve_is_given_back_by_slices(tmp_path: Path) -> None:
    one = Reserve(tmp_path / "log.db")
    assert not one.release(), "there is none yet"
    assert one.fill() is None
    slices = 0
    while one.release(down_to=reserve.OUTCOMES_BYTES):
        slices += 1
    assert one.left == reserve.OUTCOMES_BYTES
    while one.release():
        slices += 1
    assert one.left == 0
    assert slices * reserve.SLICE_BYTES == reserve.RESERVE_BYTES
    assert not one.release()


def test_a_reserve_that_cannot_be_made_at_all_is_done_without(path: Path) -> None:
    path.with_name(path.name + ".reserve").mkdir()
    log = Log(path)
    try:
        assert log.writer.trouble() is None
        log.append(draft(idle(), "idle"))
    finally:
        log.close()


CLAIMS = {
    Claim.DONE: {
        *("CommandApplied", "CommandFailed", "DriftRepaired", "RepairFailed", "OrphanRemoved"),
        *("DriftEnded", "InterfaceContested", "ContestEnded"),
        *("CaptureStopped", "StartupReconciled", "ServiceStopped"),
    },
    Claim.LESS: {"InterfaceRetired", "ChangeConfirmed"},
}


@pytest.mark.parametrize("name", SAMPLES)
def test_what_may_use_the_reserve(name: str) -> None:
    expected = next((claim for claim, names in CLAIMS.items() if name in names), Claim.NONE)
    assert claim_of([draft(SAMPLES[name])]) is expected
    assert claim_of([draft(SAMPLES[name]), draft(idle())]) is Claim.NONE, "as much as the least of them"


@pytest.mark.parametrize("name", ["InterfaceReconfigured", "ProcessingDisabled", "ProcessingEnabled"])
def test_a_change_that_is_taken_back_may_use_the_reserve(name: str) -> None:
    body: Any = SAMPLES[name]
    request = cmd.Request(via="system", call="take_back", reverts="0192f0c0")
    assert claim_of([draft(msgspec.structs.replace(body, request=request))]) is Claim.LESS


# -- the -wal


def test_the_wal_is_bounded_and_a_long_reader_leaves_it_as_small_as_before(path: Path, log: Log) -> None:
    wal = path.with_name(path.name + "-wal")
    bound = 2 * writer.CHECKPOINT_FRAMES * writer.FRAME_BYTES
    for _ in range(300):
        log.append(draft(idle(), "idle"))
    assert wal.stat().st_size < bound
    with _reading(path):
        for _ in range(300):
            log.append(*(draft(idle(n), "idle") for n in range(50)))
        assert wal.stat().st_size > 8 * 1024 * 1024, "then nothing held a checkpoint up"
    for _ in range(200):
        log.append(draft(idle(), "idle"))
    assert wal.stat().st_size <= 8 * 1024 * 1024
    assert log.broken == []


def test_a_checkpoint_that_fails_for_another_reason_than_a_full_disk_ends_writing(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        """A connection whose disk fails when it checkpoints."""

        in_transaction = False

        def execute(self, sql: str) -> None:
            assert sql == "PRAGMA wal_checkpoint(PASSIVE)"
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
            raise error

    monkeypatch.setattr(writer, "CHECKPOINT_FRAMES", 1)
    log.writer._checkpoint_at = 1
    monkeypatch.setattr(log.writer, "_driver", Failing)
    log.append(draft(idle(), "idle"))  # it is durable all the same
    eventually(lambda: log.broken, DEADLINE_S, "the end of writing")
    assert "SQLITE_IOERR_FSYNC" in log.broken[0]
    assert refusal_of(log, draft(note())) is not None


# -- mistakes


def test_a_job_that_makes_a_mistake_fails_alone(log: Log) -> None:
    def mistaken(connection: sa.Connection) -> None:
        connection.exec_driver_sql("INSERT INTO node VALUES (NULL, NULL)")

    def confused(_connection: sa.Connection) -> None:
        raise ValueError("this is not what I meant")

    with log.held():
        before = log.queue(draft(note(1)))
        bad: list[Future[Any]] = [log.writer.run(mistaken), log.writer.run(confused)]
        bad.append(log.writer.append([draft(note(2))], mistaken))
        after = log.queue(draft(note(3)))
    for future in bad:
        with pytest.raises(TunledgerError, match="it cannot be written") as refused:
            future.result(DEADLINE_S)
        assert refused.value.code is ErrorCode.INTERNAL
    assert [future.result(DEADLINE_S)[0].position for future in (before, after)] == [1, 2]
    assert [event.body for event in log.recorded] == [note(1), note(3)]
    assert log.broken == []
    sound(log.path, 2)


def test_somebody_else_writing_to_the_log_is_the_end_of_writing(path: Path, log: Log) -> None:
    log.append(draft(note(1)))
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        columns = "event_id, stream, version, type, schema_version, payload, actor, command_id, node, recorded_at"
        other.execute(
            f"INSERT INTO events SELECT 2, 'x', {columns.removeprefix('event_id, ').replace('version,', '2,', 1)}, "  # noqa: S608
            "hash, hash FROM events"
        )
    refused = refusal_of(log, draft(note(2)))
    assert refused is not None
    assert refused.code is ErrorCode.LOG_UNAVAILABLE
    assert "append-only" in refused.message
    assert len(log.broken) == 1
