"""The log at size: start-up, a page of history, the past, and replay, next to plain sqlite3 on the same rows.

The log is made up for each run, through the real codec and the real chain, and its snapshots by the real auditor;
nothing is kept from one run to the next. It is read from the page cache, as a log in use is.
"""

import gc
import hashlib
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from time import perf_counter

from bench.figures import Figure, Row, show, timed
from service.domain.state import State, fold
from service.store import snapshots
from service.store.migrate import migrate
from service.store.reader import LogReader, Selection
from service.store.writer import LogWriter
from tests.store import lives

EVENTS, INTERFACES = 1_000_000, 1_000
PAGE = 100
ROUNDS = 100  # of what takes milliseconds
STARTS = 5
FROM_ZERO = 1  # states folded from the beginning, for comparison

# What serving imports, and what it does before it looks at the host.
_START = """
import sys
from pathlib import Path
import service.app
from service.store.reader import LogReader
from service.store.snapshots import open_log
opened = open_log(LogReader(Path(sys.argv[1])))
assert not opened.found.problems
assert opened.past.state.position == int(sys.argv[2])
"""
_IMPORTS = "import service.app, service.store.snapshots"


def run() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.db"
        begun = perf_counter()
        migrate(path, now=lambda: lives.moment(0))
        lives.fill(path, EVENTS, INTERFACES)
        print(
            f"\n{EVENTS:,} events of {INTERFACES:,} interfaces, {path.stat().st_size / 1e6:,.0f} MB, "
            f"made up in {perf_counter() - begun:.0f} s"
        )
        reader = LogReader(path)
        try:
            replayed = _replay(path, reader)
            _make_snapshots(path)
            show(
                "In milliseconds (aims: start 2,000, page 10, past 100)",
                [*_start(path, reader), *_page(path, reader), *_past(path, reader)],
            )
            _rates(replayed)
        finally:
            reader.close()


def _make_snapshots(path: Path) -> None:
    """As the service makes them in the background, but without its pauses."""
    reader = LogReader(path)
    begun = perf_counter()
    opened = snapshots.open_log(reader)
    whole_s = perf_counter() - begun
    writer = LogWriter(
        path, lives.NODE, now=lambda: lives.moment(0), on_recorded=lambda _: None, on_broken=lambda _: None
    )
    writer.start()
    auditor = snapshots.Auditor(path, opened, run=writer.run, on_problem=print)
    try:
        begun = perf_counter()
        while auditor.step():
            pass
        took_s = perf_counter() - begun
    finally:
        auditor.close()
        writer.close()
        reader.close()
    with closing(sqlite3.connect(path)) as connection:
        ((count, size),) = connection.execute("SELECT count(*), sum(length(state)) FROM snapshots")
    print(
        f"without a snapshot, start-up checks all of it: {whole_s:.1f} s, once; the auditor then takes {took_s:.1f} s "
        f"of processor time, spread over {took_s / snapshots.SHARE:.0f} s, for {count} snapshots of "
        f"{size / 1e6:.1f} MB in all"
    )


def _measured(what: str, work: Callable[[], object], rounds: int = ROUNDS) -> Figure:
    work()  # warm
    return Figure(what, tuple(timed(work) for _ in range(rounds)))


def _start(path: Path, reader: LogReader) -> list[Row]:
    def process(*arguments: str) -> None:
        subprocess.run(
            [sys.executable, "-c", *arguments],
            check=True,
            cwd=Path(__file__).parents[1],
            env={"PATH": os.environ["PATH"]},
        )

    last = snapshots.open_log(reader).checked_from
    bare = sqlite3.connect(path)

    def tail() -> None:
        for row in bare.execute("SELECT * FROM events WHERE position > ? ORDER BY position", (last,)):
            hashlib.sha256(row[6].encode()).digest()

    ours = _measured("start: log opened, checked, folded", lambda: snapshots.open_log(reader), STARTS)
    whole = _measured("start: a new process up to there", lambda: process(_START, str(path), str(EVENTS)), STARTS)
    rows = [
        Row(ours, [_measured("sqlite3 + sha256, the same tail", tail, STARTS)]),
        Row(whole, [_measured("python that only imports it", lambda: process(_IMPORTS), STARTS)]),
    ]
    bare.close()
    return rows


def _page(path: Path, reader: LogReader) -> list[Row]:
    bare = sqlite3.connect(path)
    chance = random.Random(1)
    names = [f"tun{chance.randrange(INTERFACES)}" for _ in range(ROUNDS + 1)]
    ids = [str(reader.interfaces_named(name)[-1]) for name in names]
    streams = [[*(f"interface/{each}" for each in reader.interfaces_named(name)), f"name/{name}"] for name in names]

    def each(work: Callable[[int], object]) -> Callable[[], object]:
        turn = iter(range(ROUNDS + 1))
        return lambda: work(next(turn))

    def plain(turn: int) -> None:
        marks = ", ".join("?" * len(streams[turn]))
        query = f"SELECT * FROM events WHERE stream IN ({marks}) ORDER BY position DESC LIMIT ?"  # noqa: S608 -- marks
        bare.execute(query, (*streams[turn], PAGE)).fetchall()

    def plain_one(turn: int) -> None:
        query = "SELECT * FROM events WHERE stream = ? ORDER BY position DESC LIMIT ?"
        bare.execute(query, (f"interface/{ids[turn]}", PAGE)).fetchall()

    rare = Selection(actor="uid:1001", types=("CommandRejected",))
    rows = [
        Row(
            _measured(f"page of {PAGE}: a name's history", each(lambda n: reader.history(names[n], limit=PAGE))),
            [_measured("sqlite3, the same rows", each(plain))],
        ),
        Row(
            _measured(
                f"page of {PAGE}: one interface's history",
                each(lambda n: reader.history(None, limit=PAGE, interface_id=ids[n])),
            ),
            [_measured("sqlite3, the same rows", each(plain_one))],
        ),
        Row(
            _measured(f"page of {PAGE}: events by actor and type", lambda: reader.page(rare, limit=PAGE)),
            [
                _measured(
                    "sqlite3 without our indexes",
                    lambda: bare.execute(
                        "SELECT * FROM events WHERE +actor = 'uid:1001' AND +type = 'CommandRejected' "
                        "ORDER BY position LIMIT ?",
                        (PAGE,),
                    ).fetchall(),
                )
            ],
        ),
    ]
    bare.close()
    return rows


def _past(path: Path, reader: LogReader) -> list[Row]:
    bare = sqlite3.connect(path)
    chance = random.Random(2)
    positions = [chance.randrange(INTERFACES * 3, EVENTS) for _ in range(ROUNDS + 1)]
    turn = iter(positions)
    ours = _measured("state at any past position", lambda: snapshots.past(reader, next(turn)))
    turn = iter(positions)

    def rows() -> None:
        position = next(turn)
        start = position - position % snapshots.EVERY
        bare.execute("SELECT * FROM events WHERE position > ? AND position <= ?", (start, position)).fetchall()

    peer = _measured("sqlite3, the rows behind its snapshot", rows)
    turn = iter(positions)
    whole = Figure(
        "folding from the first event on",
        tuple(timed(lambda: fold(reader.events(upto=next(turn)), State())) for _ in range(FROM_ZERO)),
    )
    bare.close()
    return [Row(ours, [peer, whole])]


def _replay(path: Path, reader: LogReader) -> dict[str, float]:
    """Seconds for all of the log, by what is done with it. One after the other, so that all meet the same machine."""

    def scan() -> None:
        with closing(sqlite3.connect(path)) as bare:
            deque(bare.execute("SELECT * FROM events ORDER BY position"), maxlen=0)

    def hashed() -> None:
        with closing(sqlite3.connect(path)) as bare:
            for row in bare.execute("SELECT * FROM events ORDER BY position"):
                hashlib.sha256("\n".join(map(str, row)).encode()).hexdigest()

    def verified() -> None:
        assert reader.verify().problems == []

    taken = {}
    for what, work in (
        ("plain sqlite3: scan", scan),
        ("replay: scan, decode, fold", lambda: fold(reader.events(), State())),
        ("plain sqlite3: scan, sha256", hashed),
        ("replay with the chain verified", verified),
    ):
        gc.collect()
        taken[what] = timed(work) / 1000
    return taken


def _rates(taken: dict[str, float]) -> None:
    print("\nAll of the log (aims: replay 100,000 a second, with verification 50,000)\n")
    print(f"| {'what':44} | {'seconds':>8} | {'events/s':>9} |")
    print(f"| {'-' * 44} | {'-' * 7}: | {'-' * 8}: |")
    for what, seconds in taken.items():
        print(f"| {what:44} | {seconds:8.2f} | {EVENTS / seconds:9,.0f} |")
