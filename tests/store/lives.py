"""Long logs made up quickly: many interfaces that live, change, drift, fail and go, in any number of events.

Through the real codec and the real chain, past the writer: it would fsync a million times. What is written here is
what the writer would have written, which a test holds it to.
"""

import datetime
import ipaddress
import random
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Final

from service.domain import events as ev
from service.domain.commands import Request
from service.domain.spec import InterfaceSpec
from service.domain.values import Address, CommandId, InterfaceId, InterfaceName, Mtu, NodeId
from service.store import codec, schema

NODE: Final = NodeId("00c0ffee0001")
BEGAN: Final = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
BETWEEN: Final = datetime.timedelta(milliseconds=7)  # one event and the next
ACTORS: Final = ("uid:0", "uid:0", "uid:0", "uid:1000", "uid:1001")
_COLUMNS: Final = tuple(column.name for column in schema.events.columns)


def moment(position: int) -> str:
    """When the event at a position was recorded."""
    return (BEGAN + position * BETWEEN).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Lives:
    """An endless life of `interfaces` names. The same seed gives the same events."""

    def __init__(self, interfaces: int, seed: int = 1) -> None:
        self._chance = random.Random(seed)
        self._names = [InterfaceName(f"tun{number}") for number in range(interfaces)]
        self._alive: dict[InterfaceName, tuple[InterfaceId, InterfaceSpec]] = {}
        self._number = 0
        self._request = Request(via="v1", peer="127.0.0.1:40112", user="root", reason="made up")

    def drafts(self) -> Iterator[ev.Draft]:
        """All names are declared first; then anything happens to any of them."""
        yield self._draft(
            ev.ServiceStarted(pid=1, version="0.1.0", boot_id="boot", uid=0, address="127.0.0.1:8080"),
            ev.node_stream(NODE),
        )
        for name in self._names:
            yield from self._declare(name)
        while True:
            name = self._chance.choice(self._names)
            if name not in self._alive:
                yield from self._declare(name)
                continue
            dice = self._chance.random()
            if dice < 0.80:
                yield from self._change(name)
            elif dice < 0.90:
                yield from self._drift(name)
            elif dice < 0.94:
                yield from self._process(name)
            elif dice < 0.96:
                yield from self._retire(name)
            elif dice < 0.98:
                yield self._reject(name)
            else:
                yield self._draft(
                    ev.WorkerExited(worker=0, pid=7, status="exit 1", devices=[name]), ev.node_stream(NODE)
                )

    def _new(self, kind: str) -> str:
        self._number += 1
        return f"0192f0c1-7d3e-7{kind}-8c11-{self._number:012x}"

    def _draft(self, body: ev.Event, stream: str, actor: str = "system", command_id: str | None = None) -> ev.Draft:
        return ev.Draft(
            event_id=self._new("0ee"),
            stream=stream,
            body=body,
            actor=actor,
            command_id=None if command_id is None else CommandId(command_id),
        )

    def _spec(self, name: InterfaceName) -> InterfaceSpec:
        number = self._chance.randrange(1 << 22)
        return InterfaceSpec(
            name=name,
            addresses=(Address(ipaddress.IPv4Address((10 << 24) + number * 4 + 1), 30),),
            mtu=Mtu(self._chance.randrange(1280, 9000)),
            description=f"lab {number % 7}",
            labels={"lab": str(number % 7)},
        )

    def _command(self, name: InterfaceName, body: ev.Event, interface_id: InterfaceId) -> Iterator[ev.Draft]:
        actor, command_id, stream = self._chance.choice(ACTORS), self._new("c0d"), ev.interface_stream(interface_id)
        yield self._draft(body, stream, actor, command_id)
        if self._chance.random() < 0.05 and not isinstance(body, ev.InterfaceRetired):
            failed = ev.CommandFailed(
                interface_id=interface_id,
                name=name,
                by="command",
                took_us=900,
                code="kernel_refused",
                message="ip link set: Invalid argument (EINVAL)",
                errno="EINVAL",
                undone=self._chance.random() < 0.5,
            )
            yield self._draft(failed, stream, actor, command_id)
            if isinstance(body, ev.InterfaceDeclared):
                del self._alive[name]
            return
        applied = ev.CommandApplied(
            interface_id=interface_id, name=name, by="command", took_us=700, steps=[f"ip link set {name} mtu 1400"]
        )
        yield self._draft(applied, stream, actor, command_id)
        if isinstance(body, ev.InterfaceDeclared | ev.InterfaceReconfigured):
            self._alive[name] = (interface_id, body.spec)
        elif isinstance(body, ev.InterfaceRetired):
            del self._alive[name]

    def _declare(self, name: InterfaceName) -> Iterator[ev.Draft]:
        interface_id, spec = InterfaceId(self._new("1d0")), self._spec(name)
        self._alive[name] = (interface_id, spec)
        body = ev.InterfaceDeclared(interface_id=interface_id, name=name, spec=spec, request=self._request)
        yield from self._command(name, body, interface_id)

    def _change(self, name: InterfaceName) -> Iterator[ev.Draft]:
        interface_id, old = self._alive[name]
        spec = self._spec(name)
        body = ev.InterfaceReconfigured(
            interface_id=interface_id,
            name=name,
            spec=spec,
            changes=[{"path": "mtu", "old": old.mtu, "new": spec.mtu}],
            request=self._request,
        )
        yield from self._command(name, body, interface_id)

    def _process(self, name: InterfaceName) -> Iterator[ev.Draft]:
        interface_id, _ = self._alive[name]
        kind = self._chance.choice((ev.ProcessingEnabled, ev.ProcessingDisabled))
        body = kind(interface_id=interface_id, name=name, request=self._request)
        yield from self._command(name, body, interface_id)

    def _retire(self, name: InterfaceName) -> Iterator[ev.Draft]:
        interface_id, _ = self._alive[name]
        body = ev.InterfaceRetired(interface_id=interface_id, name=name, request=self._request)
        yield from self._command(name, body, interface_id)

    def _drift(self, name: InterfaceName) -> Iterator[ev.Draft]:
        interface_id, spec = self._alive[name]
        stream = ev.interface_stream(interface_id)
        difference = {"path": f"{name}.mtu", "desired": spec.mtu, "observed": 576}
        found = ev.DriftDetected(interface_id=interface_id, name=name, cause="unknown", differences=[difference])
        yield self._draft(found, stream)
        if self._chance.random() < 0.3:
            refused = ev.RepairFailed(
                interface_id=interface_id, name=name, code="kernel_refused", message="no (EIO)", errno="EIO"
            )
            yield self._draft(refused, stream)
        else:
            steps = [f"ip link set {name} mtu {spec.mtu}"]
            yield self._draft(ev.DriftRepaired(interface_id=interface_id, name=name, steps=steps, took_us=500), stream)

    def _reject(self, name: InterfaceName) -> ev.Draft:
        body = ev.CommandRejected(
            name=name,
            command="DeclareInterface",
            code="interface_exists",
            message=f"interface {name} already exists",
            field=None,
            request=self._request,
            suppressed=0,
        )
        return self._draft(body, ev.name_stream(name), self._chance.choice(ACTORS), self._new("c0d"))


def write(path: Path, drafts: Iterable[ev.Draft]) -> None:
    """Put events into an empty, migrated log at once: without fsync, and with indexes made afterwards."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        aside = connection.execute(
            "SELECT type, name, sql FROM sqlite_master WHERE type = 'trigger' OR (type = 'index' AND sql IS NOT NULL)"
        ).fetchall()
        connection.execute("PRAGMA synchronous=OFF")
        connection.execute("BEGIN IMMEDIATE")
        for kind, name, _ in aside:
            connection.execute(f"DROP {kind} {name}")
        names: list[tuple[str, str, int]] = []
        marks = ", ".join("?" * len(_COLUMNS))
        connection.executemany(f"INSERT INTO events VALUES ({marks})", _rows(drafts, names))  # noqa: S608 -- only marks
        connection.executemany("INSERT INTO interface_names VALUES (?, ?, ?)", names)
        for _, _, sql in aside:
            connection.execute(sql)
        connection.execute("COMMIT")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _rows(drafts: Iterable[ev.Draft], names: list[tuple[str, str, int]]) -> Iterator[tuple[object, ...]]:
    head, versions = codec.GENESIS, dict[str, int]()
    for position, draft in enumerate(drafts, start=1):
        kind, schema_version, payload = codec.encode(draft.body)
        version = versions.get(draft.stream, 0) + 1
        versions[draft.stream] = version
        recorded_at = moment(position)
        digest = codec.chain_hash(
            head,
            position,
            draft.event_id,
            draft.stream,
            version,
            kind,
            schema_version,
            draft.actor,
            draft.command_id,
            NODE,
            recorded_at,
            payload,
        )
        if isinstance(draft.body, ev.InterfaceDeclared):
            names.append((draft.body.interface_id, draft.body.name, position))
        yield (
            position,
            draft.event_id,
            draft.stream,
            version,
            kind,
            schema_version,
            payload,
            draft.actor,
            draft.command_id,
            NODE,
            recorded_at,
            head,
            digest,
        )
        head = digest


def fill(path: Path, events: int, interfaces: int, seed: int = 1) -> None:
    """Write so many events about so many names."""
    write(path, islice(Lives(interfaces, seed).drafts(), events))
