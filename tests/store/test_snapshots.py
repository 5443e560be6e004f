"""Snapshots are a cache: what is folded with them is what is folded without, and any doubt makes them ignored.

And what start-up leaves out because of them is checked all the same, in the background, and told if it is not sound.
"""

import hashlib
import itertools
import random
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final, Self

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.domain import events as ev
from service.domain import state as domain_state
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.state import State, fold
from service.domain.values import CommandId, InterfaceId
from service.store import reader as reading
from service.store import snapshots
from service.store.migrate import migrate
from service.store.reader import LogReader
from service.store.snapshots import Auditor, Opened, Past
from service.store.writer import Job
from tests.domain.builders import Log as Lines
from tests.domain.builders import applied, failed, interface_id, name, reconfigured
from tests.domain.builders import declared as declaration
from tests.store import lives
from tests.store.log import DEADLINE_S, NOW, Log, draft, note, rows, tamper
from tests.store.samples import REQUEST, SPEC

LENGTH: Final = 1000
EVERY: Final = 64


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots close enough together that a short log has many."""
    monkeypatch.setattr(snapshots, "EVERY", EVERY)
    monkeypatch.setattr(snapshots, "BITE", 25)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of some lives, without a snapshot."""
    path = tmp_path_factory.mktemp("bare") / "log.db"
    migrate(path, now=lambda: NOW)
    lives.fill(path, LENGTH, 9)
    return path


@pytest.fixture
def path(bare: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copy(bare, tmp_path / "log.db"))


class _Audit:
    """An auditor over a log that somebody writes."""

    def __init__(self, path: Path, opened: Opened | None = None, *, writes: bool = True) -> None:
        self.problems: list[str] = []
        self._log = Log(path)
        if opened is None:
            with _read(path) as reader:
                opened = snapshots.open_log(reader)
        self.auditor = Auditor(
            path, opened, run=self._log.writer.run if writes else None, on_problem=self.problems.append
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.auditor.close()
        self._log.close()

    def append(self, count: int) -> None:
        self._log.fill(count)
        self.auditor.noticed(self._log.recorded[-1].position)

    def finish(self) -> None:
        while self.auditor.step():
            pass


class _read:  # noqa: N801  # reads like a function
    def __init__(self, path: Path) -> None:
        self._reader = LogReader(path)

    def __enter__(self) -> LogReader:
        return self._reader

    def __exit__(self, *_: object) -> None:
        self._reader.close()


def _audited(path: Path) -> None:
    """Have all snapshots made."""
    with _Audit(path) as audit:
        audit.finish()
        assert audit.problems == []


@pytest.fixture(scope="module")
def made(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log with all its snapshots."""
    path = Path(shutil.copy(bare, tmp_path_factory.mktemp("made") / "log.db"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "EVERY", EVERY)
        _audited(path)
    return path


@pytest.fixture
def snapped(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copy(made, tmp_path / "snapped.db"))


@pytest.fixture(scope="module")
def recorded(bare: Path) -> list[ev.Recorded]:
    """All of its events."""
    with _read(bare) as reader:
        return list(reader.events())


def _folded(recorded: list[ev.Recorded], position: int) -> Past:
    then = Past()
    for event in recorded[:position]:
        then.take(event)
    return then


def _positions(path: Path) -> list[int]:
    return [int(str(position)) for (position,) in rows(path, "SELECT position FROM snapshots ORDER BY position")]


# -- to bytes and back


@pytest.mark.parametrize("position", [0, 1, 5, 333, LENGTH])
def test_a_state_comes_back_from_its_bytes_whole_and_in_order(recorded: list[ev.Recorded], position: int) -> None:
    then = _folded(recorded, position)
    back = snapshots.decode(snapshots.encode(then))
    assert _parts(back.state) == _parts(then.state)
    assert back.troubles == then.troubles
    assert list(back.state.interfaces) == list(then.state.interfaces), "classic() takes the newest"
    assert snapshots.encode(back) == snapshots.encode(then)


def _parts(state: State) -> dict[str, Any]:
    return {name: getattr(state, name) for name in State.__slots__}


def test_a_snapshot_carries_every_field_that_state_has() -> None:
    """State grew a field? Put it into `_Carried`, or here if it follows from the others and `decode` restores it."""
    follows = {"by_name"}
    assert set(snapshots._Carried.__struct_fields__) == (set(State.__slots__) - follows) | {"troubles"}
    assert set(Past.__slots__) == {"state", "troubles"}


def test_every_field_of_an_unusual_state_comes_back() -> None:
    """Each with another value than a new State has, so that one left out is missed."""
    then = Past()
    pending = domain_state.Pending(
        command_id=CommandId("c"),
        position=3,
        recorded_at=NOW,
        intent="InterfaceDeclared",
        actor="uid:0",
        request=REQUEST,
        spec=SPEC,
    )
    interface = domain_state.Interface(
        id=InterfaceId("i"), name=SPEC.name, via="v1", declared_at=NOW, version=2, pending=pending
    )
    then.state.interfaces[interface.id] = interface
    then.state.by_name[interface.name] = interface.id
    then.state.unconfirmed[interface.name] = domain_state.Unconfirmed(
        command_id=CommandId("c"),
        interface_id=interface.id,
        name=interface.name,
        via="v1",
        previous=SPEC,
        confirm_by=NOW,
    )
    then.state.position, then.state.head, then.state.boot_id, then.state.stopped = 3, "h", "boot", "keep"
    then.troubles[interface.id] = snapshots.Trouble("why", NOW)
    fresh = _parts(State())
    for field, value in _parts(then.state).items():
        assert value != fresh[field], f"{field}: give it another value here"
    back = snapshots.decode(snapshots.encode(then))
    assert _parts(back.state) == _parts(then.state)
    assert back.troubles == then.troubles


@given(st.binary(max_size=200))
def test_bytes_that_are_no_state_are_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        snapshots.decode(content)


def test_a_value_without_a_form_is_no_state() -> None:
    then = Past()
    then.state.boot_id = object()  # type: ignore[assignment]
    with pytest.raises(TypeError, match="no place in a snapshot"):
        snapshots.encode(then)


# -- what the log tells of how interfaces were


def _status(*bodies: ev.Event, declared: bool = True) -> dict[str, Any]:
    lines, then = Lines(), Past()
    for body in (declaration(), *((applied(),) if declared else ()), *bodies):
        event = lines.append(body)
        then.take(event)
    return then.status(then.state.interfaces[interface_id(1)])


def test_status_is_as_the_log_tells_it() -> None:
    drift = ev.DriftDetected(
        interface_id=interface_id(1),
        name=name(),
        cause="reboot",
        differences=[{"path": "tun0", "desired": "present", "observed": None}],
    )
    refused = ev.RepairFailed(interface_id=interface_id(1), name=name(), code="c", message="no (EIO)", errno="EIO")
    repaired = ev.DriftRepaired(interface_id=interface_id(1), name=name(), steps=[], took_us=1)
    kept = msgspec.structs.replace(failed(), undone=False)
    started = ev.StartupReconciled(
        took_us=1,
        recreated=[],
        repaired=[],
        adopted=["tun0"],
        orphans_removed=[],
        finished=[],
        processing_resumed=[],
        failed=[],
    )
    assert _status(declared=False)["state"] == "pending"
    assert _status() == {"state": "applied", "reason": None, "since": None}
    found = _status(drift)
    assert (found["state"], found["reason"]) == ("degraded", "drift (reboot): tun0: desired present, observed None")
    assert _status(drift, refused) | {"reason": "no (EIO)"} == found | {"reason": "no (EIO)"}, "since the drift"
    assert _status(drift, refused)["reason"] == "no (EIO)"
    assert _status(drift, refused, repaired)["state"] == "applied"
    assert _status(drift, started)["state"] == "applied", "it was found as it should be"
    assert _status(reconfigured())["state"] == "pending"
    assert _status(reconfigured(), kept)["reason"] == "a failed command could not be undone: no"
    assert _status(drift, reconfigured(), failed())["state"] == "applied", "undone, and seen to be"
    assert _status(drift, reconfigured(), applied())["state"] == "applied"


# -- the past, with and without


@pytest.mark.parametrize("seed", range(3))
def test_the_past_is_the_fold_up_to_there(snapped: Path, recorded: list[ev.Recorded], seed: int) -> None:
    chance = random.Random(seed)
    with _read(snapped) as reader:
        for position in {0, 1, EVERY - 1, EVERY, EVERY + 1, LENGTH, *(chance.randrange(LENGTH) for _ in range(15))}:
            then = snapshots.past(reader, position)
            expected = _folded(recorded, position)
            assert then.state.position == position
            assert snapshots.encode(then) == snapshots.encode(expected)
            assert then.state == fold(recorded[:position])


def test_the_past_folds_less_than_a_snapshots_length(snapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    take = Past.take

    def counted(self: Past, event: ev.Recorded) -> None:
        taken.append(event.position)
        take(self, event)

    monkeypatch.setattr(Past, "take", counted)
    with _read(snapped) as reader:
        for position in range(1, LENGTH, 17):
            taken.clear()
            snapshots.past(reader, position)
            assert taken == list(range(position - position % EVERY + 1, position + 1))


# -- start-up


def test_start_up_checks_and_folds_only_the_tail(snapped: Path, recorded: list[ev.Recorded]) -> None:
    with _read(snapped) as reader:
        opened = snapshots.open_log(reader)
    last = LENGTH - LENGTH % EVERY
    assert (opened.checked_from, opened.found.events) == (last, LENGTH - last)
    assert opened.found.problems == []
    assert (opened.found.head_position, opened.found.head_hash) == (LENGTH, recorded[-1].hash)
    assert opened.found.state is opened.past.state
    assert snapshots.encode(opened.past) == snapshots.encode(_folded(recorded, LENGTH))


def test_start_up_without_a_snapshot_checks_all(path: Path, recorded: list[ev.Recorded]) -> None:
    with _read(path) as reader:
        opened = snapshots.open_log(reader)
    assert (opened.checked_from, opened.found.events, opened.found.problems) == (0, LENGTH, [])
    assert snapshots.encode(opened.past) == snapshots.encode(_folded(recorded, LENGTH))


def test_start_up_on_an_empty_log(tmp_path: Path) -> None:
    migrate(tmp_path / "log.db", now=lambda: NOW)
    with _read(tmp_path / "log.db") as reader:
        opened = snapshots.open_log(reader)
    assert (opened.found.events, opened.found.problems, opened.found.head_position) == (0, [], 0)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ("UPDATE events SET actor = 'nobody' WHERE position = {}", "was changed after it was written"),
        ("DELETE FROM events WHERE position = {}", "events are missing"),
        ("UPDATE events SET version = version + 1000 WHERE position = {}", "follows version"),
        ("UPDATE interface_names SET position = {} WHERE name = 'tun1'", "the index of names and the log disagree"),
    ],
)
def test_start_up_finds_what_is_wrong_in_the_tail(snapped: Path, edit: str, told: str) -> None:
    tamper(snapped, (edit.format(LENGTH - 5), ()))
    with _read(snapped) as reader:
        opened = snapshots.open_log(reader)
    assert opened.checked_from > 0
    assert any(told in problem for problem in opened.found.problems), opened.found.problems


def test_start_up_asks_for_versions_of_streams_that_began_before_the_snapshot(snapped: Path) -> None:
    """A tail whose versions do not go on from where the stream was: the chain alone would not tell."""
    log = Log(snapped)
    ((stream,),) = rows(snapped, "SELECT stream FROM events WHERE position = 2")
    event = log.append(draft(note(), str(stream)))[0]
    log.close()
    assert event.version > 1
    with _read(snapped) as reader:
        assert snapshots.open_log(reader).found.problems == []


# -- in doubt


def _spoilt(path: Path, edit: str, parameters: tuple[object, ...] = ()) -> tuple[int, list[str]]:
    """From where start-up folds once the newest snapshot was edited."""
    newest = _positions(path)[-1]
    tamper(path, (edit.replace(":newest", str(newest)), parameters))
    with _read(path) as reader:
        opened = snapshots.open_log(reader)
        expected = LogReader(path)
        everything = list(expected.events())
        expected.close()
        assert snapshots.encode(opened.past) == snapshots.encode(_folded(everything, len(everything)))
    return opened.checked_from, opened.found.problems


@pytest.mark.parametrize(
    "edit",
    [
        "UPDATE snapshots SET hash = '" + "f" * 64 + "' WHERE position = :newest",
        "UPDATE snapshots SET checksum = '" + "f" * 64 + "' WHERE position = :newest",
        "UPDATE snapshots SET format = 'older' WHERE position = :newest",
        "UPDATE snapshots SET state = x'00' WHERE position = :newest",
        "UPDATE snapshots SET state = x'' WHERE position = :newest",
        "UPDATE snapshots SET state = substr(state, 1, 50) WHERE position = :newest",
        "UPDATE snapshots SET state = (SELECT state FROM snapshots ORDER BY position LIMIT 1) WHERE position = :newest",
        "DELETE FROM snapshots WHERE position = :newest",
        "UPDATE snapshots SET position = 100000 WHERE position = :newest",
    ],
)
def test_a_snapshot_in_doubt_is_ignored_for_the_one_before(snapped: Path, edit: str) -> None:
    before = _positions(snapped)[-2]
    assert _spoilt(snapped, edit) == (before, [])


def test_a_snapshot_moved_to_another_event_is_ignored(snapped: Path, recorded: list[ev.Recorded]) -> None:
    newest = _positions(snapped)[-1]
    moved = (newest + 3, recorded[newest + 2].hash)
    assert _spoilt(snapped, "UPDATE snapshots SET position = ?, hash = ? WHERE position = :newest", moved)[0] < newest


def test_a_snapshot_whose_event_was_rewritten_is_ignored(snapped: Path) -> None:
    newest = _positions(snapped)[-1]
    tamper(snapped, ("UPDATE events SET hash = ? WHERE position = ?", ("f" * 64, newest)))
    with _read(snapped) as reader:
        opened = snapshots.open_log(reader)
    assert opened.checked_from < newest
    assert any(problem.startswith(f"position {newest}: ") for problem in opened.found.problems)


def test_with_every_snapshot_in_doubt_all_is_folded(snapped: Path) -> None:
    assert _spoilt(snapped, "UPDATE snapshots SET state = x'00'") == (0, [])


def test_snapshots_of_other_code_are_ignored(snapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "form", lambda: "of tomorrow")
    with _read(snapped) as reader:
        assert snapshots.open_log(reader).checked_from == 0
    with _Audit(snapped) as audit:
        audit.finish()
        assert audit.problems == []
    assert {form for (form,) in rows(snapped, "SELECT format FROM snapshots")} == {"of tomorrow"}


def test_the_form_follows_the_code_that_folds() -> None:
    assert len(snapshots.form()) == 16
    told = hashlib.sha256(str(snapshots.LAYOUT).encode())
    for module in ("chain", "commands", "events", "spec", "state", "values"):
        told.update((Path(domain_state.__file__).with_name(f"{module}.py")).read_bytes())
    for module in ("codec", "snapshots"):
        told.update((Path(snapshots.__file__).with_name(f"{module}.py")).read_bytes())
    assert snapshots.form() == told.hexdigest()[:16]


# -- which are kept


@given(st.integers(1, 200_000))
def test_snapshots_are_close_together_where_young_and_few_in_all(head: int) -> None:
    dense, every = 16, 64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "DENSE", dense)
        patch.setattr(snapshots, "EVERY", every)
        kept = [place for place in range(head + 1) if place % every == 0 and snapshots.kept(place, head)]
        doublings = (head // (every * dense)).bit_length()
        assert len(kept) <= dense + (dense // 2 + 1) * doublings
        for earlier, later in itertools.pairwise([0, *kept, head]):
            assert later - earlier <= 2 * snapshots.spacing(head - earlier)
            if head - earlier < every * dense:
                assert later - earlier <= every


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(0, 10**9))
def test_what_is_not_kept_is_never_kept_later(number: int, head: int, more: int) -> None:
    place = number * EVERY
    if place <= head and not snapshots.kept(place, head):
        assert not snapshots.kept(place, head + more)


def test_a_million_events_are_folded_from_no_further_than_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert snapshots.EVERY * snapshots.DENSE > 1_000_000
    assert snapshots.EVERY <= 4096


def test_what_is_not_worth_its_room_goes_when_another_is_stored(snapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "DENSE", 4)
    with _Audit(snapped) as audit:
        audit.append(EVERY)
        audit.finish()
        assert audit.problems == []
    head = LENGTH + EVERY
    assert _positions(snapped) == [place for place in range(1, head + 1) if snapshots.kept(place, head)]


# -- the auditor


def test_it_makes_all_snapshots_of_a_log_that_has_none(path: Path) -> None:
    with _Audit(path) as audit:
        assert audit.auditor.progress().whole, "start-up checked all of it"
        audit.finish()
        assert audit.problems == []
    assert _positions(path) == list(range(EVERY, LENGTH + 1, EVERY))


def test_it_leaves_snapshots_alone_that_are_as_they_should_be(snapped: Path) -> None:
    before = rows(snapped, "SELECT rowid, * FROM snapshots")
    with _Audit(snapped) as audit:
        written: list[Job] = []

        def run(job: Job) -> "Future[None]":
            written.append(job)
            return Future()

        audit.auditor._run = run
        audit.finish()
        assert written == []
    assert rows(snapped, "SELECT rowid, * FROM snapshots") == before


def test_it_follows_the_writer_a_length_at_a_time(snapped: Path) -> None:
    with _Audit(snapped) as audit:
        audit.finish()
        audit.append(10)
        assert not audit.auditor.step(), "not worth a snapshot yet"
        audit.append(3 * EVERY)
        audit.finish()
        assert audit.problems == []
    assert _positions(snapped)[-1] == (LENGTH + 10 + 3 * EVERY) // EVERY * EVERY
    with _read(snapped) as reader:
        assert snapshots.open_log(reader).found.events < EVERY


def test_it_tells_how_far_it_has_come(snapped: Path) -> None:
    with _Audit(snapped) as audit:
        seen = [audit.auditor.progress().checked]
        assert not audit.auditor.progress().whole
        while audit.auditor.step():
            seen.append(audit.auditor.progress().checked)
        assert seen == sorted(seen)
        assert len(seen) > LENGTH // snapshots.BITE // 2
        assert audit.auditor.progress() == snapshots.Progress(LENGTH, LENGTH)
        assert audit.auditor.progress().whole


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        ("UPDATE events SET actor = 'nobody' WHERE position = 100", "position 100: "),
        ("DELETE FROM events WHERE position = 100", "position 101: follows position 99"),
        ("UPDATE interface_names SET name = 'x' WHERE position < 100", "the index of names and the log disagree"),
        ("UPDATE events SET position = -5 WHERE position = 1", "position -5: follows position 0"),
    ],
)
def test_it_finds_what_start_up_left_out(snapped: Path, edit: str, told: str) -> None:
    tamper(snapped, (edit, ()))
    with _Audit(snapped) as audit:
        assert audit.problems == [], "start-up looks at the tail alone"
        audit.finish()
        (problem,) = audit.problems
        assert told in problem
        assert audit.auditor.progress().problems
        assert not audit.auditor.progress().whole
        assert not audit.auditor.step()


def test_it_finds_that_start_up_began_with_another_state_than_the_log_folds_to(snapped: Path) -> None:
    """A forged snapshot, checksum and all: what the service believes is then not what the log says."""
    newest = _positions(snapped)[-1]
    with _read(snapped) as reader:
        then = snapshots.past(reader, newest)
    forged = next(iter(then.state.interfaces.values()))
    then.state.interfaces[forged.id] = msgspec.structs.replace(forged, via="forged")
    content = snapshots.encode(then)
    tamper(
        snapped,
        (
            "UPDATE snapshots SET state = ?, checksum = ? WHERE position = ?",
            (zlib.compress(content), snapshots.checksum(newest, then.state.head, content), newest),
        ),
    )
    with _Audit(snapped) as audit:
        audit.finish()
        (problem,) = audit.problems
        assert "folds to another state than the snapshot that start-up began with" in problem


def test_it_finds_what_is_changed_behind_the_writer(snapped: Path) -> None:
    with _Audit(snapped) as audit:
        audit.finish()
        audit._log.fill(EVERY)
        tamper(snapped, ("UPDATE events SET actor = 'nobody' WHERE position = ?", (LENGTH + 7,)))
        audit.auditor.noticed(LENGTH + EVERY)
        audit.finish()
        (problem,) = audit.problems
        assert problem.startswith(f"position {LENGTH + 7}: ")


def test_it_finds_a_log_that_was_cut_off_under_it(snapped: Path) -> None:
    with _Audit(snapped) as audit:
        audit.append(EVERY)
        tamper(snapped, ("DELETE FROM events WHERE position > ?", (LENGTH + 3,)))
        audit.finish()
        (problem,) = audit.problems
        assert "events are missing" in problem


def test_without_a_writer_it_checks_and_makes_nothing(path: Path) -> None:
    with _Audit(path, writes=False) as audit:
        audit.finish()
        assert audit.problems == []
    assert _positions(path) == []


@pytest.mark.parametrize("code", [ErrorCode.LOG_FULL, ErrorCode.OVERLOADED])
def test_a_snapshot_that_cannot_be_stored_is_done_without(path: Path, code: ErrorCode) -> None:
    def full(_job: Job) -> "Future[None]":
        if code is ErrorCode.OVERLOADED:
            raise TunledgerError(code, "queue")
        failed: Future[None] = Future()
        failed.set_exception(TunledgerError(code, "disk"))
        return failed

    with _Audit(path) as audit:
        audit.auditor._run = full
        audit.finish()
        assert audit.problems == []
    assert _positions(path) == []


def _until(condition: Callable[[], object]) -> None:
    pause, left = threading.Event(), DEADLINE_S
    while not condition():
        pause.wait(0.005)
        left -= 0.005
        assert left > 0


def test_its_thread_checks_all_follows_and_stops(snapped: Path) -> None:
    with _Audit(snapped) as audit:
        audit.auditor.start()
        _until(lambda: audit.auditor.progress().whole)
        audit.append(2 * EVERY)
        _until(lambda: _positions(snapped)[-1] > LENGTH)
        assert audit.problems == []


def test_its_thread_tells_a_problem_once_and_waits(snapped: Path) -> None:
    tamper(snapped, ("UPDATE events SET actor = 'nobody' WHERE position = 100", ()))
    with _Audit(snapped) as audit:
        audit.auditor.start()
        _until(lambda: audit.problems)
        audit.append(2 * EVERY)
    assert len(audit.problems) == 1


def test_its_thread_tells_when_the_log_does_not_read_any_more(snapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_args: object, **_more: object) -> Iterator[Any]:
        raise TunledgerError(ErrorCode.LOG_CORRUPT, "does not read: disk I/O error")

    with _Audit(snapped) as audit:
        monkeypatch.setattr(LogReader, "rows", unreadable)
        audit.auditor.start()
        _until(lambda: audit.problems)
    assert audit.problems == ["does not read: disk I/O error"]


def test_it_stops_in_the_middle_of_its_way(snapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "BITE", 1)
    with _Audit(snapped) as audit:
        audit.auditor.start()
        _until(lambda: audit.auditor.progress().checked > 2)
    assert audit.auditor.progress().checked < LENGTH


def test_the_engines_state_is_not_the_auditors(snapped: Path) -> None:
    with _read(snapped) as reader:
        opened = snapshots.open_log(reader)
    with _Audit(snapped, opened) as audit:
        opened.past.state.interfaces.clear()  # as the engine goes on changing it
        audit.append(EVERY)
        audit.finish()
        assert audit.problems == []
    with _read(snapped) as reader:
        opened = snapshots.open_log(reader)
        assert opened.past.state.interfaces, "the snapshot made meanwhile has them all"
        assert snapshots.encode(opened.past) == snapshots.encode(_folded(list(reader.events()), LENGTH + EVERY))


def test_snapshots_that_cannot_be_read_are_no_reason_not_to_start(snapped: Path) -> None:
    with _read(snapped) as reader:
        opened = snapshots.open_log(reader)
    tamper(snapped, ("DROP TABLE snapshots", ()))
    with _Audit(snapped, opened) as audit:
        audit.auditor.start()
        _until(lambda: audit.problems)
    assert "no such table" in audit.problems[0]


def test_storing_puts_one_in_the_place_of_another(path: Path) -> None:
    log = Log(path)
    try:
        for content in (b"one", b"other"):
            log.writer.run(snapshots.storing(7, "f" * 64, content, [])).result(DEADLINE_S)
    finally:
        log.close()
    ((state,),) = rows(path, "SELECT state FROM snapshots WHERE position = 7")
    assert isinstance(state, bytes)
    assert zlib.decompress(state) == b"other"


def test_a_walk_that_remembers_few_versions_asks_for_the_others(snapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "VERSIONS_KEPT", 3)
    monkeypatch.setattr(reading, "PAGE", 5)
    with _read(snapped) as reader:
        assert snapshots.open_log(reader).found.problems == []
        tamper(snapped, ("UPDATE snapshots SET format = 'other' WHERE position > 70", ()))
        opened = snapshots.open_log(reader)
        assert opened.checked_from == EVERY
        assert opened.found.problems == []
