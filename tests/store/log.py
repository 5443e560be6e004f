"""A log under test: the real writer on a real file, and everything that it said."""

import itertools
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from pathlib import Path

import sqlalchemy as sa

from service.domain import events as ev
from service.domain.values import CommandId, NodeId
from service.store.writer import LogWriter

NOW = "2026-01-02T03:04:05.000006Z"
NODE = NodeId("00c0ffee0001")
DEADLINE_S = 20.0

_ids = itertools.count(1)


def draft(
    body: ev.Event,
    stream: str = ev.node_stream(NODE),
    *,
    expected_version: int | None = None,
    command_id: str | None = None,
    actor: str = "uid:0",
) -> ev.Draft:
    """An event on its way, with an id of its own."""
    return ev.Draft(
        event_id=f"event-{next(_ids)}",
        stream=stream,
        body=body,
        actor=actor,
        command_id=None if command_id is None else CommandId(command_id),
        expected_version=expected_version,
    )


def note(number: int = 0) -> ev.Event:
    """An event that may come at any place in the log."""
    return ev.ServiceStopped(pid=number, reason="test", interfaces="keep")


def idle(number: int = 0) -> ev.Event:
    """An event that may come at any place in the log, and that waits when the disk is full."""
    return ev.WorkerExited(worker=number, pid=number, status="test", devices=[])


class Log:
    """Starts a writer; close it.

    Attributes:
        batches: what `on_recorded` was called with, call by call.
        broken: what `on_broken` was called with.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batches: list[list[ev.Recorded]] = []
        self.broken: list[str] = []
        self.writer = LogWriter(
            path,
            NODE,
            now=lambda: NOW,
            on_recorded=self.batches.append,
            on_broken=self.broken.append,
        )
        try:
            self.writer.start()
        except BaseException:
            self.writer.close()
            raise

    @property
    def recorded(self) -> list[ev.Recorded]:
        """All that `on_recorded` told."""
        return [event for batch in self.batches for event in batch]

    def queue(self, *drafts: ev.Draft) -> "Future[list[ev.Recorded]]":
        """Have drafts appended together, and do not wait."""
        return self.writer.append(drafts)

    def append(self, *drafts: ev.Draft) -> list[ev.Recorded]:
        """Append drafts together, and wait until they are durable."""
        return self.queue(*drafts).result(DEADLINE_S)

    def fill(self, count: int) -> None:
        """Append so many events that mean nothing."""
        self.append(*(draft(note(number)) for number in range(count)))

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the writer's thread busy, so that what is queued meanwhile is taken at once afterwards."""
        reached, release = threading.Event(), threading.Event()

        def wait(_connection: sa.Connection) -> None:
            reached.set()
            assert release.wait(DEADLINE_S)

        done = self.writer.run(wait)
        try:
            assert reached.wait(DEADLINE_S)
            yield
        finally:
            release.set()
        done.result(DEADLINE_S)

    def statements(self) -> list[str]:
        """All SQL that the writer's connection carries out from now on."""
        seen: list[str] = []

        def trace(connection: sa.Connection) -> None:
            driver = connection.connection.driver_connection
            assert isinstance(driver, sqlite3.Connection)
            driver.set_trace_callback(seen.append)

        self.writer.run(trace).result(DEADLINE_S)
        seen.clear()  # the tracing job's own COMMIT
        return seen

    def pragma(self, name: str) -> object:
        """A pragma as the writer's own connection answers it, `name=value` to set it."""
        answers: list[object] = []
        self.writer.run(lambda c: answers.append(c.exec_driver_sql(f"PRAGMA {name}").scalar_one())).result(DEADLINE_S)
        return answers[0]

    def close(self) -> None:
        """Stop the writer."""
        self.writer.close()


def rows(path: Path, sql: str, parameters: Sequence[object] = ()) -> list[tuple[object, ...]]:
    """What the database itself says, past our reader."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(sql, parameters).fetchall()


def tamper(path: Path, *statements: tuple[str, Sequence[object]]) -> None:
    """Change the database as somebody could who may write to the file: without its triggers and checks."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints=ON")
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        connection.execute("BEGIN IMMEDIATE")
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        for sql, parameters in statements:
            connection.execute(sql, parameters)
        for _, sql in triggers:
            connection.execute(sql)
        connection.execute("COMMIT")


def dump(path: Path) -> list[str]:
    """Everything in the database as SQL."""
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())
