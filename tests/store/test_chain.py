"""Whoever edits, swaps, removes or adds an event behind our back is found out, and told where.

What the chain cannot find by itself is a log that was cut off or rewritten as a whole: for that, its head is kept
elsewhere (`/api/v1/log/head`) and a later log is read up to that position and compared.
"""

# ruff: noqa: S608 -- the SQL is put together from this file's own words

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from service.domain import events as ev
from service.domain.spec import InterfaceSpec
from service.domain.values import InterfaceId, InterfaceName, Mtu
from service.store import codec, reader, schema
from service.store.reader import LogReader, Verification
from tests.store.log import Log, draft, note, rows, tamper
from tests.store.samples import REQUEST

ID: Final = InterfaceId("0192f0c1-7d3e-7cc2-9c11-0242ac120002")
NAME: Final = InterfaceName("tun0")
SPEC: Final = InterfaceSpec(name=NAME)
LENGTH: Final = 10


def _life() -> Iterator[ev.Draft]:
    """One interface from declaration to retirement, between a start and a stop of the service."""
    stream = ev.interface_stream(ID)

    def applied(command_id: str) -> ev.Draft:
        body = ev.CommandApplied(interface_id=ID, name=NAME, by="command", took_us=1, steps=[])
        return draft(body, stream, command_id=command_id)

    yield draft(ev.ServiceStarted(pid=1, version="0.1.0", boot_id="b", uid=0, address="127.0.0.1:1"))
    yield draft(
        ev.InterfaceDeclared(interface_id=ID, name=NAME, spec=SPEC, request=REQUEST), stream, command_id="command-1"
    )
    yield applied("command-1")
    yield draft(ev.ProcessingEnabled(interface_id=ID, name=NAME, request=REQUEST), stream, command_id="command-2")
    yield applied("command-2")
    changed = InterfaceSpec(name=NAME, mtu=Mtu(1400))
    yield draft(
        ev.InterfaceReconfigured(interface_id=ID, name=NAME, spec=changed, changes=[], request=REQUEST),
        stream,
        command_id="command-3",
    )
    yield applied("command-3")
    yield draft(ev.InterfaceRetired(interface_id=ID, name=NAME, request=REQUEST), stream, command_id="command-4")
    yield applied("command-4")
    yield draft(note())


@pytest.fixture(scope="module")
def lived(migrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound log of ten events."""
    path = Path(shutil.copy(migrated, tmp_path_factory.mktemp("lived") / "log.db"))
    log = Log(path)
    for one in _life():
        log.append(one)
    log.close()
    assert _verify(path).problems == []
    assert _verify(path).events == LENGTH
    return path


@pytest.fixture
def path(lived: Path, tmp_path: Path) -> Path:
    """A copy of it to tamper with."""
    return Path(shutil.copy(lived, tmp_path / "log.db"))


def _verify(path: Path, *, upto: int | None = None) -> Verification:
    one = LogReader(path)
    try:
        return one.verify(upto=upto)
    finally:
        one.close()


@contextmanager
def _edited(path: Path, column: str, value: object, position: int) -> Iterator[None]:
    """With one column of one event changed, and changed back afterwards."""
    ((old,),) = rows(path, f"SELECT {column} FROM events WHERE position = ?", (position,))
    tamper(path, (f"UPDATE events SET {column} = ? WHERE position = ?", (value, position)))
    yield
    where = value if column == "position" else position
    tamper(path, (f"UPDATE events SET {column} = ? WHERE position = ?", (old, where)))


_OTHER_HASH: Final = "f" * 64
_EDITS: Final[list[tuple[str, object]]] = [
    ("position", 77),
    ("event_id", "event-0"),
    ("event_id", ""),
    ("stream", "interface/another"),
    ("stream", ""),
    ("version", 99),
    ("version", 0),
    ("type", "ServiceStarted"),
    ("type", "NeverHeardOf"),
    ("type", ""),
    ("schema_version", 2),
    ("schema_version", 0),
    ("payload", "{}"),
    ("payload", ""),
    ("payload", "no JSON"),
    ("payload", '{"pid":0,"reason":"other","interfaces":"keep"}'),
    ("actor", "uid:1000"),
    ("actor", ""),
    ("command_id", "another"),
    ("command_id", ""),
    ("command_id", None),
    ("node", "ffffffffffff"),
    ("recorded_at", "2026-01-02T03:04:05.000007Z"),
    ("recorded_at", ""),
    ("previous_hash", _OTHER_HASH),
    ("previous_hash", ""),
    ("hash", _OTHER_HASH),
    ("hash", ""),
]


def test_the_edits_below_cover_every_column() -> None:
    assert {column for column, _ in _EDITS} == {column.name for column in schema.events.columns}


@pytest.mark.parametrize(("column", "value"), _EDITS)
def test_an_edit_of_a_single_column_is_found(path: Path, column: str, value: object) -> None:
    checked = 0
    for position in range(1, LENGTH + 1):
        if rows(path, f"SELECT {column} IS ? FROM events WHERE position = ?", (value, position)) == [(1,)]:
            continue  # that would be no edit
        with _edited(path, column, value, position):
            found = _verify(path)
            told = "\n".join(found.problems)
            assert found.problems, f"{column} = {value!r} at position {position} passes"
            assert f"position {value if column == 'position' else position}:" in told, told
        checked += 1
    assert checked >= LENGTH // 2
    assert _verify(path).problems == []


@pytest.mark.parametrize("position", range(1, LENGTH + 1))
def test_a_payload_edited_by_one_character_is_found_where_it_is(path: Path, position: int) -> None:
    ((payload,),) = rows(path, "SELECT payload FROM events WHERE position = ?", (position,))
    assert isinstance(payload, str)
    with _edited(path, "payload", payload.replace("tun0", "tun1").replace("pid", "piD"), position):
        assert any(f"position {position}: " in problem for problem in _verify(path).problems)
    with _edited(path, "payload", payload + " ", position):  # which parses just the same
        assert f"position {position}: " in _verify(path).problems[0]
        assert "was changed after it was written" in _verify(path).problems[0]


@pytest.mark.parametrize(("one", "other"), [(1, 2), (4, 5), (2, 9), (9, 10)])
def test_two_events_that_changed_places_are_found(path: Path, one: int, other: int) -> None:
    aside = 1000
    move = "UPDATE events SET position = ? WHERE position = ?"
    tamper(path, (move, (aside, one)), (move, (one, other)), (move, (other, aside)))
    assert f"position {one}: " in _verify(path).problems[0]


@pytest.mark.parametrize("one", [4, 6, 8])
def test_contents_that_changed_places_are_found(path: Path, one: int) -> None:
    """Each keeps its place in the chain, and only what it says is exchanged."""
    said = dict(enumerate(rows(path, "SELECT type, payload, actor FROM events ORDER BY position"), start=1))
    swap = "UPDATE events SET type = ?, payload = ?, actor = ? WHERE position = ?"
    tamper(path, (swap, (*said[one + 1], one)), (swap, (*said[one], one + 1)))
    assert f"position {one}: " in _verify(path).problems[0]


@pytest.mark.parametrize("position", range(1, LENGTH))
def test_an_event_that_was_removed_is_missed(path: Path, position: int) -> None:
    tamper(path, ("DELETE FROM events WHERE position = ?", (position,)))
    told = _verify(path).problems[0]
    assert told == f"position {position + 1}: follows position {position - 1}; events are missing"


@pytest.mark.parametrize("position", range(1, LENGTH))
def test_a_removal_that_closes_the_gap_is_found(path: Path, position: int) -> None:
    shift = [
        ("UPDATE events SET position = ? WHERE position = ?", (later - 1, later))
        for later in range(position + 1, LENGTH + 1)
    ]
    tamper(path, ("DELETE FROM events WHERE position = ?", (position,)), *shift)
    assert any(f"position {position}: names" in problem for problem in _verify(path).problems)


def test_an_event_that_was_put_in_between_is_found(path: Path) -> None:
    shift = [
        ("UPDATE events SET position = ? WHERE position = ?", (later + 1, later)) for later in range(LENGTH, 3, -1)
    ]
    copy = (
        "INSERT INTO events SELECT 4, 'forged', 'forged', 1, type, schema_version, payload, actor, command_id, node, "
        "recorded_at, previous_hash, hash FROM events WHERE position = 1"
    )
    tamper(path, *shift, (copy, ()))
    assert "position 4: " in _verify(path).problems[0]


def _rehash(path: Path, first: int) -> None:
    """Make the chain sound again from a position on, as somebody could who reads our code."""
    previous = codec.GENESIS
    if first > 1:
        ((found,),) = rows(path, "SELECT hash FROM events WHERE position = ?", (first - 1,))
        assert isinstance(found, str)
        previous = found
    for position, *columns in rows(
        path,
        "SELECT position, event_id, stream, version, type, schema_version, actor, command_id, node, recorded_at, "
        "payload FROM events WHERE position >= ? ORDER BY position",
        (first,),
    ):
        digest = codec.chain_hash(previous, position, *columns)  # type: ignore[arg-type]  # as the database has them
        update = "UPDATE events SET previous_hash = ?, hash = ? WHERE position = ?"
        tamper(path, (update, (previous, digest, position)))
        previous = digest


def test_an_edit_with_its_own_hash_made_anew_breaks_the_chain_behind_it(path: Path) -> None:
    tamper(path, ("UPDATE events SET actor = 'nobody' WHERE position = 5", ()))
    ((before,),) = rows(path, "SELECT previous_hash FROM events WHERE position = 6")
    _rehash(path, 5)
    tamper(path, ("UPDATE events SET previous_hash = ? WHERE position = 6", (before,)))
    assert "position 6: " in _verify(path).problems[0]


@pytest.mark.parametrize("left", [0, 1, 5, LENGTH - 1])
def test_a_tail_that_was_cut_off_is_missed_by_who_knows_the_head(path: Path, left: int) -> None:
    exported = _verify(path)
    # Where the cut leaves names without their declarations, that is told too; so take those along.
    tamper(
        path,
        ("DELETE FROM events WHERE position > ?", (left,)),
        ("DELETE FROM interface_names WHERE position > ?", (left,)),
    )
    assert _verify(path).problems == [], "by itself, a log that was cut off is a log"
    found = _verify(path, upto=exported.head_position)
    assert (found.head_position, found.head_hash) != (exported.head_position, exported.head_hash)


def test_a_log_that_was_rewritten_as_a_whole_is_told_from_the_one_whose_head_is_known(path: Path) -> None:
    exported = _verify(path, upto=8)
    tamper(path, ("UPDATE events SET actor = 'nobody' WHERE position = 2", ()))
    _rehash(path, 1)
    assert _verify(path).problems == []
    found = _verify(path, upto=8)
    assert found.head_position == exported.head_position
    assert found.head_hash != exported.head_hash


def test_a_log_that_only_grew_still_has_the_head_that_was_exported(path: Path) -> None:
    exported = _verify(path)
    log = Log(path)
    log.fill(5)
    log.close()
    found = _verify(path, upto=exported.head_position)
    assert (found.head_position, found.head_hash) == (exported.head_position, exported.head_hash)


@pytest.mark.parametrize(
    ("position", "words"),
    [(3, "changes an interface that was never applied"), (2, "is about interface")],
)
def test_a_log_that_makes_no_sense_is_not_sound_however_well_it_is_hashed(
    path: Path, position: int, words: str
) -> None:
    """An outcome, or a declaration, left out with everything made to fit."""
    tamper(
        path,
        ("DELETE FROM events WHERE position = ?", (position,)),
        *(
            (
                f"UPDATE events SET position = position - 1, version = version - {later < LENGTH:d} WHERE position = ?",
                (later,),
            )
            for later in range(position + 1, LENGTH + 1)
        ),
    )
    _rehash(path, 1)
    assert any("makes no sense" in problem and words in problem for problem in _verify(path).problems)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM interface_names",
        "UPDATE interface_names SET name = 'tun1'",
        "UPDATE interface_names SET position = 3",
        "UPDATE interface_names SET interface_id = 'x'",
        "INSERT INTO interface_names VALUES ('x', 'tun0', 3)",
    ],
)
def test_an_index_of_names_that_disagrees_with_the_log_is_found(path: Path, statement: str) -> None:
    """History is found by it: an event that is not indexed is as good as gone."""
    tamper(path, (statement, ()))
    assert "the index of names and the log disagree" in _verify(path).problems[0]


def test_a_wrecked_log_is_told_by_its_first_problems(path: Path) -> None:
    log = Log(path)
    log.fill(200)
    log.close()
    tamper(path, ("UPDATE events SET actor = 'nobody'", ()))
    found = _verify(path)
    assert len(found.problems) <= reader.PROBLEMS_MAX + 5
    assert found.problems[0].startswith("position 1: ")
    assert "more problems follow" in found.problems[-1]


def test_verification_folds_what_it_read(path: Path) -> None:
    found = _verify(path, upto=7)
    interface = found.state.find("tun0")
    assert interface is not None
    assert interface.spec is not None
    assert (interface.spec.mtu, interface.spec.processing.running, interface.generation) == (1400, False, 3)
    assert _verify(path).state.interfaces == {}
