"""Reads the log: all of it for folding, parts of it for history, and every byte of it for verification."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.state import State, evolve
from service.domain.values import InterfaceId, NodeId
from service.store import codec, schema
from service.store.database import UNREADABLE, node_id, open_reader, unreadable

PAGE = 2000  # rows fetched at a time
PROBLEMS_MAX = 20  # a broken chain is told by its first breaks; the rest follows from them

_events = schema.events.c


@dataclass(slots=True)
class Verification:
    """What reading the whole log found. Sound if there are no problems."""

    events: int = 0
    head_position: int = 0
    head_hash: str = codec.GENESIS
    problems: list[str] = field(default_factory=list)
    state: State = field(default_factory=State)


class LogReader:
    """Read-only access; may be used from several threads. Every method raises TunledgerError: log_corrupt."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine = open_reader(path)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def node(self) -> NodeId:
        """The id of the node whose log this is."""
        try:
            return node_id(self._engine)
        except UNREADABLE as error:
            raise unreadable(self._path, error) from error

    def events(self, *, after: int = 0, upto: int | None = None) -> Iterator[ev.Recorded]:
        """Events in order of position."""
        query = sa.select(schema.events).where(_events.position > after).order_by(_events.position)
        if upto is not None:
            query = query.where(_events.position <= upto)
        for row in self._rows(query):
            yield codec.recorded(row)

    def head(self) -> tuple[int, str]:
        """Position and hash of the last event."""
        query = sa.select(_events.position, _events.hash).order_by(_events.position.desc()).limit(1)
        for row in self._rows(query):
            return row.position, row.hash
        return 0, codec.GENESIS

    def interfaces_named(self, name: str) -> list[InterfaceId]:
        """The ids of all interfaces that ever had a name, oldest first."""
        names = schema.interface_names.c
        query = sa.select(names.interface_id).where(names.name == name).order_by(names.position)
        return [InterfaceId(row.interface_id) for row in self._rows(query)]

    def history(
        self, name: str | None, *, limit: int, interface_id: str | None = None, before: int | None = None
    ) -> list[ev.Recorded]:
        """The latest events before a position, newest first: about a name with all interfaces that ever had it,
        about one interface, or about everything.
        """
        query = sa.select(schema.events).order_by(_events.position.desc()).limit(limit)
        if before is not None:
            query = query.where(_events.position < before)
        if interface_id is not None:
            query = query.where(_events.stream == ev.interface_stream(InterfaceId(interface_id)))
        elif name is not None:
            # A query in the query: a list of ids would grow beyond the variables SQLite takes.
            names = schema.interface_names.c
            streams = sa.select(sa.literal(ev.interface_stream(InterfaceId(""))) + names.interface_id)
            refused = sa.select(sa.literal(ev.name_stream(name)))
            query = query.where(_events.stream.in_(streams.where(names.name == name).union_all(refused)))
        return [codec.recorded(row) for row in self._rows(query)]

    def command(self, command_id: str) -> list[ev.Recorded]:
        """The events of one command: its intent and, once there is one, its outcome."""
        query = sa.select(schema.events).where(_events.command_id == command_id).order_by(_events.position)
        return [codec.recorded(row) for row in self._rows(query)]

    def verify(self, *, upto: int | None = None) -> Verification:
        """Read every event; check positions, versions, chain and sense; and fold what is sound.

        Problems are collected, not raised: up to 20, the first ones telling most.
        """
        found = Verification()
        versions: dict[str, int] = {}
        folding = True
        query = sa.select(schema.events).order_by(_events.position)
        if upto is not None:
            query = query.where(_events.position <= upto)
        try:
            for row in self._rows(query):
                found.events += 1
                problems = list(_problems(row, found, versions))
                found.head_position, found.head_hash = row.position, str(row.hash)
                if isinstance(row.version, int):  # a damaged page can hold anything in any column
                    versions[row.stream] = row.version
                if folding:
                    try:
                        evolve(found.state, codec.recorded(row))
                    except TunledgerError as error:
                        folding = False
                        problems.append(error.message)
                found.problems += problems
                if len(found.problems) >= PROBLEMS_MAX:
                    found.problems.append("more problems follow; these are the first")
                    return found
            if upto is None:
                found.problems += self._misnamed()
        except TunledgerError as error:
            found.problems.append(error.message)
        return found

    def _misnamed(self) -> Iterator[str]:
        """Differences between the index of names and the declarations that it is made from."""
        names = schema.interface_names.c
        index = sa.select(names.interface_id, names.position, names.name)
        indexed = {(row.interface_id, row.position, row.name) for row in self._rows(index)}
        stream = sa.func.substr(_events.stream, len(ev.interface_stream(InterfaceId(""))) + 1).label("interface_id")
        name = sa.func.json_extract(_events.payload, "$.name").label("name")
        query = sa.select(stream, _events.position, name).where(_events.type == "InterfaceDeclared")
        declared = {(row.interface_id, row.position, row.name) for row in self._rows(query)}
        differing = {(position, interface_id) for interface_id, position, _ in indexed ^ declared}
        for position, interface_id in sorted(differing, key=str):  # a damaged page can hold anything in any column
            yield f"position {position}: the index of names and the log disagree on interface {interface_id}"

    def _rows(self, query: sa.Select[Any]) -> Iterator[Any]:
        try:
            with self._engine.connect() as connection:
                yield from connection.execution_options(yield_per=PAGE).execute(query)
        except UNREADABLE as error:
            raise unreadable(self._path, error) from error


def _problems(row: Any, found: Verification, versions: dict[str, int]) -> Iterator[str]:
    where = f"position {row.position}"
    if row.position != found.head_position + 1:
        yield f"{where}: follows position {found.head_position}; events are missing"
    if row.previous_hash != found.head_hash:
        yield f"{where}: names {str(row.previous_hash)[:12]} as the hash before it, which is {found.head_hash[:12]}"
    if row.version != versions.get(row.stream, 0) + 1:
        yield f"{where}: version {row.version} of {row.stream} follows version {versions.get(row.stream, 0)}"
    expected = codec.chain_hash(
        row.previous_hash,
        row.position,
        row.event_id,
        row.stream,
        row.version,
        row.type,
        row.schema_version,
        row.actor,
        row.command_id,
        row.node,
        row.recorded_at,
        row.payload,
    )
    if row.command_id == "":  # hashes like none at all, and the writer never writes it
        yield f"{where}: {row.type} has an empty command id; it was changed after it was written"
    if row.hash != expected:
        said = str(row.hash)[:12]
        yield f"{where}: {row.type} was changed after it was written (hash {said}, content {expected[:12]})"


def corrupt(verification: Verification) -> TunledgerError:
    """The refusal that a failed verification stands for."""
    return TunledgerError(ErrorCode.LOG_CORRUPT, "the log does not verify: " + "; ".join(verification.problems[:3]))
