"""Folded state at some positions of the log, so that neither start-up nor a look at the past folds all of it.

A cache and nothing else: a snapshot is used only if the log has an event with exactly its hash at its position, if it
was made by the very code that would fold today, and if its checksum is right. In doubt it is ignored and made anew;
without any, everything is as right and only slower. What is decided from the state does not belong in here.

    start-up     newest snapshot -> check and fold the tail behind it
    in the past  the snapshot before a position -> fold up to it
    Auditor      checks what start-up left out, from the first event on, in small bites; goes on behind the writer;
                 makes the snapshots on its way; says when the log is not what it should be
"""

import contextlib
import hashlib
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
import sqlalchemy as sa

from service import failpoints
from service.domain import chain, commands, events, spec, state, values
from service.domain import events as ev
from service.domain.errors import TunledgerError
from service.domain.state import Interface, State, Unconfirmed, evolve
from service.domain.values import Address, InterfaceId, InterfaceName
from service.store import codec, schema
from service.store.reader import LogReader, Verification, Walk, decode_value
from service.store.writer import Job

EVERY = 2048  # events from one snapshot to the next: folded in 20 ms
DENSE = 1024  # snapshots that far apart; older ones stand twice as far apart, then four times, and so on
BITE = 256  # events checked at once in the background: 4 ms, in which nobody else gets the interpreter
SHARE = 0.2  # of one processor, at most, for checking in the background
LAYOUT = 1  # of the blob

_ZLIB_FASTEST = 1  # a tenth of the size for a hundredth of a second; more effort saves little
_snapshots = schema.snapshots.c


class Trouble(msgspec.Struct, frozen=True):
    """Why an interface was degraded, as the log tells, and since when (UTC). A contested one is so between repairs."""

    reason: str
    since: str
    contested: bool = False


_TELLING: Final = {
    ev.CommandApplied,
    ev.CommandFailed,
    ev.DriftDetected,
    ev.DriftRepaired,
    ev.RepairFailed,
    ev.DriftEnded,
    ev.InterfaceContested,
    ev.ContestEnded,
    ev.StartupReconciled,
}


class Past:
    """Desired state at one position of the log, and what the log had told by then of how the interfaces were."""

    __slots__ = ("state", "troubles")

    def __init__(self) -> None:
        self.state = State()
        self.troubles: dict[InterfaceId, Trouble] = {}

    def take(self, event: ev.Recorded) -> None:
        """The next event. Raises TunledgerError: log_corrupt, if it cannot follow; nothing is changed then."""
        evolve(self.state, event)
        body = event.body
        if type(body) not in _TELLING:
            return
        match body:
            case ev.DriftDetected():
                found = (f"{d['path']}: desired {d['desired']}, observed {d['observed']}" for d in body.differences)
                self._note(event, body.interface_id, f"drift ({body.cause}): {'; '.join(found)}")
            case ev.RepairFailed():
                self._note(event, body.interface_id, body.message)
            case ev.CommandFailed() if not body.undone:
                self._note(event, body.interface_id, f"a failed command could not be undone: {body.message}")
            case ev.InterfaceContested():
                reason = f"contested: {body.repairs} repairs in {body.within_s} s"
                self._note(event, body.interface_id, reason, contested=True)
            case ev.DriftRepaired() if self._is_contested(body.interface_id):
                pass  # it will not hold
            case ev.CommandApplied() | ev.CommandFailed() | ev.DriftRepaired() | ev.DriftEnded() | ev.ContestEnded():
                self.troubles.pop(body.interface_id, None)
            case ev.StartupReconciled():
                for name in (*body.adopted, *body.repaired, *body.recreated):
                    interface = self.state.find(name)
                    if interface is not None:
                        self.troubles.pop(interface.id, None)
            case _:
                pass

    def status(self, interface: Interface) -> dict[str, Any]:
        """How an interface was, as far as the log tells: pending, applied, or degraded with the reason."""
        trouble = self.troubles.get(interface.id)
        if interface.pending is not None:
            return {"state": "pending", "reason": None, "since": interface.pending.recorded_at}
        if trouble is not None:
            return {"state": "degraded", "reason": trouble.reason, "since": trouble.since}
        return {"state": "applied", "reason": None, "since": None}

    def _is_contested(self, interface_id: InterfaceId) -> bool:
        trouble = self.troubles.get(interface_id)
        return trouble is not None and trouble.contested

    def _note(self, event: ev.Recorded, interface_id: InterfaceId, reason: str, *, contested: bool = False) -> None:
        if interface_id not in self.state.interfaces:  # its first command failed: it is gone
            self.troubles.pop(interface_id, None)
            return
        known = self.troubles.get(interface_id)
        since, before = (known.since, known.contested) if known is not None else (event.recorded_at, False)
        self.troubles[interface_id] = Trouble(reason, since, contested or before)


# -- to bytes and back


class _Carried(msgspec.Struct, kw_only=True):
    """All of a `Past`. A field that State grows goes in here; a test fails until it does.

    `by_name` is left out: it follows from the interfaces. These are a list, since their order matters.
    """

    position: int
    head: str
    boot_id: str | None
    stopped: str | None
    interfaces: list[Interface]
    unconfirmed: dict[InterfaceName, Unconfirmed]
    troubles: dict[InterfaceId, Trouble]


def _encode_value(value: object) -> object:
    if isinstance(value, Address):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in a snapshot yet")


_ENCODER: Final = msgspec.msgpack.Encoder(enc_hook=_encode_value, order="deterministic")
_DECODER: Final = msgspec.msgpack.Decoder(_Carried, dec_hook=decode_value)


def encode(past: Past) -> bytes:
    """The same bytes for the same state."""
    plain = {name: getattr(past.state, name) for name in _Carried.__struct_fields__ if name != "troubles"}
    plain |= {"interfaces": list(past.state.interfaces.values()), "troubles": past.troubles}
    return _ENCODER.encode(_Carried(**plain))


def decode(content: bytes) -> Past:
    """What `encode` made bytes of. Raises ValueError (msgspec's are that too) for what is nothing of the kind."""
    carried = _DECODER.decode(content)
    past = Past()
    past.troubles = carried.troubles
    for name in _Carried.__struct_fields__:
        if name not in ("interfaces", "troubles"):
            setattr(past.state, name, getattr(carried, name))
    past.state.interfaces = {interface.id: interface for interface in carried.interfaces}
    past.state.by_name = {interface.name: interface.id for interface in carried.interfaces}
    return past


@cache
def form() -> str:
    """By what code a snapshot was made: another layout, event, spec or way of folding gives another state.

    From the sources themselves, so that nobody has to remember to raise a number.
    """
    digest = hashlib.sha256(str(LAYOUT).encode())
    for module in (chain, commands, events, spec, state, values, codec):
        assert module.__file__ is not None
        digest.update(Path(module.__file__).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:16]


def checksum(position: int, head: str, content: bytes) -> str:
    """SHA-256, in hex, over all that a snapshot says, before its state is compressed."""
    return hashlib.sha256(f"{position}\n{head}\n{form()}\n".encode() + content).hexdigest()


# -- which to keep


def spacing(age: int) -> int:
    """How many events apart snapshots stand that are this many events old."""
    return EVERY << (age // (EVERY * DENSE)).bit_length()


def kept(position: int, head: int) -> bool:
    """Whether a snapshot at a position is worth its room when the log has come to `head`. Once false, always false."""
    return 0 < position <= head and position % spacing(head - position) == 0


# -- using them


def nearest(reader: LogReader, position: int) -> tuple[int, Past] | None:
    """The newest snapshot at or before a position that can be believed, with its position.

    Raises:
        TunledgerError: log_corrupt.
    """
    for place in _stored(reader, position):
        row = _row(reader, place)
        if row is None:
            continue
        head, content, said = row
        try:
            plain = zlib.decompress(content)
            if checksum(place, head, plain) == said:
                return place, decode(plain)
        except (zlib.error, ValueError, TypeError):
            pass  # whatever it is, it is no snapshot
    return None


def _stored(reader: LogReader, position: int) -> Iterator[int]:
    """Positions of snapshots of today's form, newest first. One query each: nearly always the first will do."""
    while position > 0:
        query = (
            sa.select(_snapshots.position)
            .where(_snapshots.position <= position, _snapshots.format == form())
            .order_by(_snapshots.position.desc())
            .limit(1)
        )
        found = next((int(row[0]) for row in reader.tuples(query)), None)
        if found is None:
            return
        yield found
        position = found - 1


def _row(reader: LogReader, position: int) -> tuple[str, bytes, str] | None:
    """A snapshot whose event is in the log with its hash, as (hash, compressed state, checksum)."""
    event = schema.events.c
    query = (
        sa.select(_snapshots.hash, _snapshots.state, _snapshots.checksum)
        .join(schema.events, sa.and_(event.position == _snapshots.position, event.hash == _snapshots.hash))
        .where(_snapshots.position == position, _snapshots.format == form())
    )
    return next(((row[0], row[1], row[2]) for row in reader.tuples(query)), None)


def past(reader: LogReader, position: int) -> Past:
    """The state at a position that the log has reached: the snapshot before it, and the events since.

    Raises:
        TunledgerError: log_corrupt.
    """
    found = nearest(reader, position)
    start, then = found if found is not None else (0, Past())
    for event in reader.events(after=start, upto=position):
        then.take(event)
    return then


@dataclass(slots=True)
class Opened:
    """A log that was read for serving.

    Attributes:
        past: the state at its head, as far as it is sound.
        found: what checking gave; its state is that of `past`.
        checked_from: the events behind this position were checked. Those before are the Auditor's to check.
    """

    past: Past
    found: Verification
    checked_from: int = 0


def open_log(reader: LogReader) -> Opened:
    """Read the log for serving: the newest snapshot, and every event behind it checked and folded.

    Problems are collected as `LogReader.verify` does. Without a snapshot, all of the log is checked.
    """
    opened = Opened(Past(), Verification())
    try:
        found = nearest(reader, reader.head()[0])
        if found is not None:
            opened.checked_from, opened.past = found
        walk = _walk(reader, opened.past)
        for rows in reader.batches(after=opened.checked_from or None):
            walk.take(rows)
            if walk.broken:
                break
        else:
            walk.problems += reader.misnamed(after=opened.checked_from or None)
        opened.found.events, opened.found.problems = walk.events, walk.problems
        opened.found.head_position, opened.found.head_hash = walk.position, walk.head
    except TunledgerError as error:
        opened.found.problems.append(error.message)
    opened.found.state = opened.past.state
    return opened


def _walk(reader: LogReader, then: Past) -> Walk:
    """A walk that goes on where a state ends."""
    position = then.state.position
    if position == 0:
        return Walk(then.take)
    return Walk(then.take, position=position, head=then.state.head, last_version=reader.last_version)


# -- making them


def storing(position: int, head: str, content: bytes, doomed: Sequence[int]) -> Job:
    """The job that stores a snapshot and removes others. Nothing in it can fail but the disk: it shares its
    transaction with commands.
    """
    row = {
        "position": position,
        "hash": head,
        "format": form(),
        "state": zlib.compress(content, _ZLIB_FASTEST),
        "checksum": checksum(position, head, content),
    }
    gone = [{"place": place} for place in {*doomed, position}]

    def write(connection: sa.Connection) -> None:
        failpoints.reach("store.snapshot.before", fails=True)
        connection.execute(sa.delete(schema.snapshots).where(_snapshots.position == sa.bindparam("place")), gone)
        connection.execute(schema.snapshots.insert(), [row])
        failpoints.reach("store.snapshot.after", fails=True)

    return write


def superfluous(reader: LogReader, head: int) -> list[int]:
    """Positions of stored snapshots that are not worth their room, or that no code of today made."""
    query = sa.select(_snapshots.position, _snapshots.format)
    return [row[0] for row in reader.tuples(query) if row[1] != form() or not kept(row[0], head)]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the log was checked since the service started.

    Attributes:
        checked: every event up to this position was checked from the first one on ...
        target: ... and when it comes to this one, all that start-up left out has been.
        problems: what was found; nothing more is checked then.
    """

    checked: int
    target: int
    problems: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether all of the log has been checked, and found sound."""
        return not self.problems and self.checked >= self.target


@dataclass(slots=True)
class _Way:
    """A walk through the log with the state that it folds."""

    past: Past
    walk: Walk


class Auditor:
    """Checks the log in the background, in a thread of its own, and makes the snapshots. Start it with `start`.

    What start-up did not check comes first, from the first event on, and must fold to the very state that start-up
    came to. Behind the writer it follows a snapshot's length at a time, so that what is on the disk is checked as
    it is on the disk.

    Args:
        opened: what start-up found; its state is copied now, before anything else is folded into it.
        run: the writer's `run`; None makes no snapshots.
        on_problem: called once, in the auditor's thread, with the first problems in words.
    """

    def __init__(
        self,
        path: Path,
        opened: Opened,
        *,
        run: "Callable[[Job], Future[None]] | None",
        on_problem: Callable[[str], None],
        share: float = SHARE,
    ) -> None:
        self._reader = LogReader(path)
        self._run, self._on_problem, self._share = run, on_problem, share
        begun = encode(opened.past)
        self._began_with = hashlib.sha256(begun).digest()
        self._target = opened.found.head_position
        copy = decode(begun)
        self._behind = _Way(copy, _walk(self._reader, copy))
        first = Past()
        self._before: _Way | None = _Way(first, _walk(self._reader, first))
        if opened.checked_from == 0 and not self._lacking():
            self._before = None
        self._noticed = self._target
        self._checked = 0 if opened.checked_from > 0 else self._target
        self._problems: tuple[str, ...] = ()
        self._woken, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="log-auditor", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Stop, in the middle if need be; wait for it. A snapshot under way is given up, so close the writer later."""
        self._closing.set()
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()
        self._reader.close()

    def noticed(self, position: int) -> None:
        """From any thread: the log has come to this position, durably."""
        self._noticed = position
        if self._due():
            self._woken.set()

    def progress(self) -> Progress:
        """From any thread: how far it has come."""
        return Progress(self._checked, self._target, self._problems)

    def step(self) -> bool:
        """One bite; whether there is more to do now. For the thread, and for who has nothing else to do.

        Raises:
            TunledgerError: log_corrupt, if the log cannot be read.
        """
        if self._problems:
            return False
        if self._due():
            self._bite(self._behind, self._noticed)
        elif (way := self._before) is not None:
            self._bite(way, self._target)
            if way.walk.position >= self._target and not self._problems:
                self._arrive(way)
        return not self._problems and (self._due() or self._before is not None)

    def _due(self) -> bool:
        return self._noticed >= self._behind.walk.position + EVERY - self._behind.walk.position % EVERY

    def _work(self) -> None:
        while not self._closing.is_set():
            self._woken.clear()
            begun, more = time.monotonic(), False
            try:
                more = self.step()
            except TunledgerError as error:
                if not error.retry:  # what passes is found again by the next turn
                    self._complain([error.message])
            if not more:
                self._woken.wait()
            else:
                self._closing.wait((time.monotonic() - begun) * (1 / self._share - 1))

    def _bite(self, way: _Way, upto: int) -> None:
        """Check the next events, no further than the next place for a snapshot."""
        walk = way.walk
        stop = min(walk.position + BITE, walk.position + EVERY - walk.position % EVERY, upto)
        before = walk.position
        walk.take(list(self._reader.rows(after=before or None, upto=stop)))
        walk.problems += self._reader.misnamed(after=before or None, upto=stop)
        if walk.position < stop:
            walk.problems.append(f"position {stop}: the log ends at position {walk.position}; events are missing")
        if walk.problems:
            self._complain(walk.problems)
            return
        if way is self._before:
            self._checked = max(self._checked, walk.position)
        if walk.position % EVERY == 0:
            self._snapshot(way.past)

    def _arrive(self, way: _Way) -> None:
        """All that start-up left out is checked: is what it folds to what the service began with?"""
        self._before = None
        if hashlib.sha256(encode(way.past)).digest() != self._began_with:
            self._complain(
                [f"position {self._target}: the log folds to another state than the snapshot that start-up began with"]
            )

    def _snapshot(self, then: Past) -> None:
        position, head = then.state.position, then.state.head
        if self._run is None or not kept(position, self._noticed):
            return
        content = encode(then)
        stored = _row(self._reader, position)
        if stored is not None and stored[2] == checksum(position, head, content):
            return
        job = storing(position, head, content, superfluous(self._reader, self._noticed))
        # Not stored is no harm, whatever the reason: the next one may be.
        with contextlib.suppress(TunledgerError):
            done = self._run(job)
            while not self._closing.is_set():
                with contextlib.suppress(TimeoutError):
                    done.result(timeout=0.1)
                    return

    def _lacking(self) -> bool:
        """Whether a place for a snapshot is empty; or there is no telling, which is then found out on the way."""
        query = sa.select(_snapshots.position).where(_snapshots.format == form())
        try:
            there = {row[0] for row in self._reader.tuples(query)}
        except TunledgerError:
            return True
        return any(kept(place, self._target) and place not in there for place in range(EVERY, self._target + 1, EVERY))

    def _complain(self, problems: Sequence[str]) -> None:
        if self._problems:
            return
        self._problems = tuple(problems)
        self._before = None
        self._on_problem("; ".join(problems[:3]))
