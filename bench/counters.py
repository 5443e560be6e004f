"""Counters: one sample of 1,000 interfaces, and the bites that roll up and thin, next to the bare netlink dump.

The log is on the disk of the temporary folder, so that every figure that writes has its fsync. Growth is measured:
bytes of the tables for each row there is, times the rows of a day.
"""

import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from bench.figures import Figure, Row, show, timed
from service.domain.counters import Book, Reading, Source, kernel_reading, worker_reading
from service.domain.plan import Sight, plan
from service.domain.series import HOUR_MS, MINUTE_MS
from service.domain.spec import parse_spec
from service.domain.token import Token
from service.domain.values import InterfaceId, InterfaceName, NodeId
from service.kernel.linux import LinuxKernel
from service.packet.classify import CLASSES
from service.store.counters import CounterKeeper, CounterReader, stamp_of
from service.store.migrate import migrate
from service.store.writer import LogWriter
from tests.namespace import fresh_namespace

INTERFACES = 1000
SAMPLES = 30
INTERVAL_MS = 10_000
FILLED_MS = 2 * HOUR_MS  # of samples before measuring: then an hour is to be rolled up, and the one before to go
BITES = ("minutes", "hours", "thin")
NODE = NodeId("0123456789ab")
START = 1_790_000_000_000 // HOUR_MS * HOUR_MS
PER_DAY = {"counter_raw": 24 * HOUR_MS // INTERVAL_MS, "counter_minutes": 24 * 60, "counter_hours": 24}


def run() -> None:
    """Measure and print."""
    with fresh_namespace(), tempfile.TemporaryDirectory() as folder:
        kernel = LinuxKernel()
        try:
            ids = _make(kernel)
            for workers in (False, True):
                _measure(kernel, ids, Path(folder) / f"{workers}.db", workers=workers)
        finally:
            kernel.close()


def _make(kernel: LinuxKernel) -> list[InterfaceId]:
    ids = [InterfaceId(f"01900000-0000-7000-8000-{number:012x}") for number in range(INTERFACES)]
    for number, one in enumerate(ids):
        name = InterfaceName(f"bench{number}")
        token = Token(NODE, one)
        kernel.execute(token, plan(token, name, parse_spec({"name": name}), Sight()))
    return ids


class _Host:
    """A service that samples on a clock of its own, so that a day takes minutes."""

    def __init__(self, kernel: LinuxKernel, ids: Sequence[InterfaceId], path: Path, *, workers: bool) -> None:
        self.kernel, self.ids, self.workers = kernel, ids, workers
        migrate(path, now=lambda: stamp_of(START))
        self.book, self.now, self.counted = Book(), START, 0
        self.keeper = CounterKeeper(raw_s=3600)
        self.writer = LogWriter(
            path, NODE, now=lambda: stamp_of(self.now), on_recorded=lambda _e: None, on_broken=lambda _r: None
        )
        self.writer.start()
        self.readings: list[Reading] = []
        self.times: dict[str, list[float]] = defaultdict(list)

    def tick(self) -> None:
        self.now += INTERVAL_MS
        self.counted += 1000

    def read(self) -> None:
        """The engine's part: one netlink request, the workers' memory, and the book."""
        links = self.kernel.sample()
        self.readings = [
            self.book.take(kernel_reading(link.token.interface_id, "boot", link.ifindex, link.counters))
            for link in links
            if link.token is not None
        ]
        self.count()

    def count(self) -> None:
        """Four classes of packets each way, as a busy interface has; all of them counting."""
        if self.workers:
            seen = dict.fromkeys(CLASSES[:4], (self.counted, 700 * self.counted))
            self.readings += [self.book.take(worker_reading(one, "session", seen, seen)) for one in self.ids]

    def store(self) -> None:
        """`Engine._keep`, until it is durable."""
        totals = {one: {source.value: self.book.totals(one, source) for source in Source} for one in self.ids}
        self.done(self.keeper.store(self.readings, totals, stamp_of(self.now)))

    def fill(self) -> None:
        """A sample that nobody measures: kernel counters as of a busy interface, without asking the kernel."""
        raw = {"rx_packets": self.counted, "tx_packets": self.counted, "rx_bytes": 700 * self.counted}
        self.readings = [self.book.take(Reading(one, Source.KERNEL, "fill", raw)) for one in self.ids]
        self.count()
        self.store()

    def done(self, job: Callable[[sa.Connection], None]) -> None:
        self.writer.run(job).result(60)

    def timed(self, what: str, work: Callable[[], object]) -> None:
        self.times[what].append(timed(work))

    def tend(self) -> None:
        for name, bite in zip(BITES, self.keeper.tend(stamp_of(self.now)), strict=True):
            self.timed(name, partial(self.done, bite))


def _measure(kernel: LinuxKernel, ids: Sequence[InterfaceId], path: Path, *, workers: bool) -> None:
    host = _Host(kernel, ids, path, workers=workers)
    reader = CounterReader(path)
    try:
        while host.now < START + FILLED_MS:
            host.tick()
            host.fill()
            host.tend()
        for number in range(SAMPLES + 3):
            if number == 3:  # warm
                host.times.clear()
            host.tick()
            host.timed("bare", lambda: list(kernel._dump_links()))  # the request and nothing else
            host.timed("read", host.read)
            host.timed("store", host.store)
            host.timed("nothing", lambda: host.done(_one_row))
            host.tend()
            host.timed("hour", lambda: reader.series(ids[500], host.now - HOUR_MS, host.now, None))
            host.timed("two hours", lambda: reader.series(ids[500], START, host.now, MINUTE_MS))
        _tables(host.times, workers=workers)
        _growth(path, workers=workers)
    finally:
        reader.close()
        host.writer.close()


def _one_row(connection: sa.Connection) -> None:
    connection.exec_driver_sql("UPDATE node SET created_at = created_at")


def _tables(times: Mapping[str, Sequence[float]], *, workers: bool) -> None:
    def named(key: str, what: str) -> Figure:
        return Figure(what, tuple(times[key]))

    bare = named("bare", "the bare netlink dump")
    nothing = named("nothing", "a commit of one row")
    show(
        f"Counters of {INTERFACES:,} interfaces" + (", each with a worker that counts 8 classes" if workers else ""),
        [
            Row(named("read", "one sample: read the kernel"), [bare]),
            Row(named("store", "one sample: store it, durable"), [bare, nothing]),
            Row(named("minutes", "a bite of samples into minutes"), [nothing]),
            Row(named("hours", "a bite of minutes into hours"), [nothing]),
            Row(named("thin", "a bite of thinning"), [nothing]),
            Row(named("hour", "series: an hour, every sample"), []),
            Row(named("two hours", "series: two hours, by the minute"), []),
        ],
    )
    worst = {name: max(times[name]) for name in BITES}
    print("worst bite, ms: " + ", ".join(f"{name} {ms:.1f}" for name, ms in worst.items()))


def _growth(path: Path, *, workers: bool) -> None:
    print("\nBytes a row, and growth a day" + (", all eight classes counting" if workers else ""))
    for table, rows in PER_DAY.items():
        size = _row_bytes(path, table)
        print(f"  {table:16} {size:5.0f} B {size * rows * INTERFACES / 1e6:8.1f} MB")


def _row_bytes(path: Path, table: str) -> float:
    """Bytes of a database that has these rows and nothing else, for each of them: pages that are free do not count."""
    copy = path.with_suffix(f".{table}.db")
    with closing(sqlite3.connect(copy)) as connection:
        connection.execute("ATTACH ? AS source", (str(path),))
        (definition,) = connection.execute("SELECT sql FROM source.sqlite_master WHERE name = ?", (table,)).fetchone()
        connection.execute(definition)
        connection.execute(f"INSERT INTO main.{table} SELECT * FROM source.{table}")  # noqa: S608  # our own table
        connection.commit()
        (rows,) = connection.execute(f"SELECT count(*) FROM main.{table}").fetchone()  # noqa: S608
        return copy.stat().st_size / int(rows)
