"""Counters in time, on disk: what is read back is what was sampled, in every resolution, after anything."""

# ruff: noqa: S608 -- the SQL is put together from this file's own words

import shutil
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.domain.counters import Book, Reading, Source
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.series import HOUR_MS, MINUTE_MS, Row, figures_of, points, sample_row, totals_of
from service.domain.values import InterfaceId
from service.store import counters
from service.store.counters import CounterKeeper, CounterReader, milliseconds, stamp_of
from service.store.writer import Job
from tests.store.log import DEADLINE_S, Log, draft, note, rows, tamper

ONE, TWO, THREE = InterfaceId("one"), InterfaceId("two"), InterfaceId("three")
START = 1_790_000_000_000 // HOUR_MS * HOUR_MS
INTERVAL_MS = 10_000
DAY_MS = 24 * HOUR_MS
QUEUED_MAX = 500  # less than the writer's queue holds
RAW_S, MINUTES_S, HOURS_S = 3600.0, 3 * 3600.0, 48 * 3600.0
TIERS = ("counter_raw", "counter_minutes", "counter_hours")


@dataclass
class Host:
    """A service that samples, on a clock of its own; and every row that its samples come to, kept beside."""

    path: Path
    log: Log
    now: int = START
    counted: dict[InterfaceId, int] = field(default_factory=dict)
    link: int = 0
    all: dict[InterfaceId, list[Row]] = field(default_factory=dict)
    book: Book = field(default_factory=Book)
    keeper: CounterKeeper = field(default_factory=CounterKeeper)
    last: dict[InterfaceId, Row] = field(default_factory=dict)
    batched: bool = False
    queued: "list[Future[None]]" = field(default_factory=list)

    def restart(self, **settings: float) -> None:
        """As after kill -9."""
        self.settle()
        self.book = counters.load(self.path)
        self.keeper = CounterKeeper(**({"raw_s": RAW_S, "minutes_s": MINUTES_S, "hours_s": HOURS_S} | settings))

    def job(self, *interfaces: InterfaceId) -> Job:
        """The job of a sample of these interfaces."""
        readings, totals = [], {}
        for one in interfaces:
            count = self.counted.get(one, 0)
            raw = {"rx_packets": count, "rx_bytes": 1000 * count}
            readings.append(self.book.take(Reading(one, Source.KERNEL, f"boot/{self.link}", raw)))
            worker = {"from_kernel.ipv4.tcp.packets": count // 2, "from_kernel.ipv4.tcp.bytes": 7 * count}
            if count > 2:
                worker |= {"to_kernel.ipv6.udp.packets": count, "to_kernel.ipv6.udp.bytes": count}
            readings.append(self.book.take(Reading(one, Source.WORKER, f"session/{self.link}", worker)))
            totals[one] = {source.value: self.book.totals(one, source) for source in Source}
        return self.keeper.store(readings, totals, stamp_of(self.now))

    def sample(self, *interfaces: InterfaceId, tend: bool = True) -> None:
        """Sample, as the engine does."""
        self.run(self.job(*interfaces))
        for one in interfaces:
            figures, classes = figures_of({s.value: self.book.totals(one, s) for s in Source})
            row = sample_row(self.last.get(one), self.now, figures, classes, interval_ms=INTERVAL_MS)
            self.all.setdefault(one, []).append(row)
            self.last[one] = Row(self.now, self.now, figures, classes=classes)
        if tend:
            self.tend()
        if not self.batched:
            self.settle()

    def tend(self) -> None:
        for bite in self.keeper.tend(stamp_of(self.now)):
            self.run(bite)

    def run(self, job: Job) -> None:
        """Have a job written, before or with the next `settle`."""
        self.queued.append(self.log.writer.run(job))
        if len(self.queued) > QUEUED_MAX:
            self.settle()

    def write(self, job: Job) -> None:
        """Have a job written, now."""
        self.run(job)
        self.settle()

    def settle(self) -> None:
        """Wait until everything is written."""
        while self.queued:
            self.queued.pop().result(DEADLINE_S)

    def tend_all(self) -> None:
        """Until nothing changes any more."""
        self.settle()
        before = None
        while (state := (progress(self.path), [count(self.path, tier) for tier in TIERS])) != before:
            before = state
            self.tend()
            self.settle()


def progress(path: Path) -> tuple[object, ...]:
    return rows(path, "SELECT * FROM counter_progress")[0]


def count(path: Path, table: str) -> int:
    found = rows(path, f"SELECT count(*) FROM {table}")[0][0]
    assert isinstance(found, int)
    return found


@pytest.fixture
def host(path: Path, log: Log) -> Host:
    one = Host(path, log)
    one.restart()
    return one


@pytest.fixture
def series(path: Path) -> Iterator[CounterReader]:
    reader = CounterReader(path)
    yield reader
    reader.close()


# -- samples


def test_a_time_and_its_text_are_the_same() -> None:
    assert stamp_of(START + 7) == "2026-09-21T14:00:00.007Z"
    assert milliseconds("2026-09-21T14:00:00.007999Z") == START + 7
    assert milliseconds(stamp_of(START)) == START


def test_samples_come_back_with_rates_since_the_one_before(host: Host, series: CounterReader) -> None:
    for packets in (10, 25, 25):
        host.counted[ONE] = packets
        host.sample(ONE, TWO)
        host.now += INTERVAL_MS
    first, second, third = series.series(ONE, START - 1, host.now, None)
    assert [p.at for p in (first, second, third)] == [START, START + INTERVAL_MS, START + 2 * INTERVAL_MS]
    assert (first.rates, first.gap_ms) == (None, 0)
    assert totals_of(second.figures, second.classes) == {
        "kernel": {
            **dict.fromkeys(("tx_packets", "tx_bytes", "rx_errors", "tx_errors", "rx_dropped", "tx_dropped"), 0),
            "rx_packets": 25,
            "rx_bytes": 25_000,
        },
        "worker": {
            "from_kernel.packets": 12,
            "from_kernel.bytes": 175,
            "to_kernel.packets": 25,
            "to_kernel.bytes": 25,
            "from_kernel.ipv4.tcp.packets": 12,
            "from_kernel.ipv4.tcp.bytes": 175,
            "to_kernel.ipv6.udp.packets": 25,
            "to_kernel.ipv6.udp.bytes": 25,
        },
    }
    assert second.rates is not None
    assert second.rates[0] == 1.5
    assert third.rates == (0.0,) * 12
    assert third.classes == second.classes, "told where they changed, known all the same"
    assert [p.at for p in series.series(ONE, START, START + INTERVAL_MS, None)] == [START + INTERVAL_MS]
    assert series.series(ONE, START, START + INTERVAL_MS, None)[0].rates == second.rates, "the one before is looked for"


def test_classes_are_stored_only_where_they_changed(host: Host, path: Path) -> None:
    for packets in (3, 3, 5):
        host.counted[ONE] = packets
        host.now += INTERVAL_MS
        host.sample(ONE)
    stored = [text for (text,) in rows(path, "SELECT classes FROM counter_raw ORDER BY at")]
    assert stored == [
        '{"from_kernel.ipv4.tcp":[1,21],"to_kernel.ipv6.udp":[3,3]}',
        None,
        '{"from_kernel.ipv4.tcp":[2,35],"to_kernel.ipv6.udp":[5,5]}',
    ]


def test_a_gap_is_a_gap_in_every_resolution_and_what_was_counted_in_it_is_no_rate(
    host: Host, series: CounterReader
) -> None:
    host.now += 1
    for _ in range(360):
        host.counted[ONE] = host.counted.get(ONE, 0) + 10
        host.sample(ONE)
        host.now += INTERVAL_MS
    host.now += 3 * HOUR_MS + HOUR_MS // 2
    host.counted[ONE] += 1_000_000
    host.restart()
    for _ in range(360):
        host.sample(ONE)
        host.counted[ONE] += 20
        host.now += INTERVAL_MS
    host.tend_all()
    for step_ms in (None, MINUTE_MS, HOUR_MS, DAY_MS):
        found = series.series(ONE, START - DAY_MS, START + 2 * DAY_MS, step_ms)
        assert len([p for p in found if p.gap_ms]) == 1
        assert all(max(p.rates) <= 2000 for p in found if p.rates is not None), "20 packets of 1000 bytes in 10 s"
    hours = series.series(ONE, START, START + 6 * HOUR_MS, HOUR_MS)
    assert [(p.at - START) // HOUR_MS for p in hours] == [1, 5, 6]
    # The gap's own time is not in the rate; the hour after it still knows its own half.
    assert hours[1].gap_ms == 3 * HOUR_MS + HOUR_MS // 2 + INTERVAL_MS
    assert hours[1].rates is not None
    assert hours[1].rates[0] == pytest.approx(2)


def test_the_sample_before_a_long_gap_is_found(host: Host, series: CounterReader) -> None:
    """Else a day that begins within a night of silence would have no rate."""
    silence = 20 * HOUR_MS + HOUR_MS // 2
    host.sample(ONE)
    host.now += silence
    host.sample(ONE)
    for _ in range(3):
        host.now += INTERVAL_MS
        host.counted[ONE] = host.counted.get(ONE, 0) + 10
        host.sample(ONE)
    host.now += HOUR_MS
    host.tend_all()
    for after in (15, 20):
        (hour,) = series.series(ONE, START + after * HOUR_MS, START + 21 * HOUR_MS, HOUR_MS)
        assert (hour.gap_ms, hour.observed_ms) == (silence, 3 * INTERVAL_MS)
        assert hour.rates is not None
        assert hour.rates[0] == pytest.approx(1)
    first = series.series(ONE, START + 15 * HOUR_MS, START + 21 * HOUR_MS, None)[0]
    assert (first.gap_ms, first.rates) == (silence, None)


def test_two_samples_at_the_same_moment_are_both_kept_in_order(host: Host, series: CounterReader) -> None:
    for packets in (1, 2):
        host.counted[ONE] = packets
        host.write(host.job(ONE))
    found = series.series(ONE, START - 1, START + 10, None)
    assert [(p.at, p.figures[0], p.gap_ms) for p in found] == [(START, 1, 0), (START + 1, 2, 0)]


def test_a_clock_that_went_back_a_little_gives_a_gap_and_no_rate(host: Host, series: CounterReader) -> None:
    host.sample(ONE)
    host.now -= 500
    host.counted[ONE] = 100
    host.write(host.job(ONE))
    found = series.series(ONE, START - DAY_MS, START + DAY_MS, None)
    assert [(p.at, p.figures[0], p.gap_ms, p.rates) for p in found] == [(START, 0, 0, None), (START + 1, 100, 1, None)]


def test_a_clock_that_went_back_far_stores_totals_only_until_it_catches_up(host: Host, series: CounterReader) -> None:
    host.sample(ONE)
    for minutes_ago in (30, 20, 10):
        host.now = START - minutes_ago * MINUTE_MS
        host.counted[ONE] = host.counted.get(ONE, 0) + 100
        host.write(host.job(ONE))
        host.tend_all()
    assert counters.load(host.path).totals(ONE, Source.KERNEL)["rx_packets"] == 300
    host.now = START + INTERVAL_MS
    host.write(host.job(ONE))
    found = series.series(ONE, START - DAY_MS, START + DAY_MS, None)
    assert [(p.at, p.gap_ms, p.rates) for p in found] == [(START, 0, None), (host.now, INTERVAL_MS, None)]
    assert found[-1].figures[0] == 300


def test_a_total_beyond_sqlites_integers_stops_there_and_hurts_nobody(host: Host, series: CounterReader) -> None:
    totals = {ONE: {"kernel": {"rx_packets": 2**64}, "worker": {}}, TWO: {"kernel": {"rx_packets": 1}, "worker": {}}}
    host.write(host.keeper.store([], totals, stamp_of(START)))
    assert series.series(ONE, START - 1, START, None)[0].figures[0] == 2**63 - 1
    assert series.series(TWO, START - 1, START, None)[0].figures[0] == 1


def test_a_sample_of_nothing_is_nothing(host: Host, path: Path) -> None:
    before = progress(path)[2:]
    host.sample()
    assert progress(path)[2:3] == before[:1]
    assert count(path, "counter_raw") == 0


def test_what_was_remembered_of_a_sample_that_was_not_written_is_forgotten(host: Host, series: CounterReader) -> None:
    host.now += 1
    host.sample(ONE, tend=False)

    def fails(_connection: sa.Connection) -> None:
        raise TunledgerError(ErrorCode.LOG_FULL, "full", retry=True)

    host.now += INTERVAL_MS
    host.counted[ONE] = 5
    with host.log.held():
        lost = host.log.writer.run(host.job(ONE))
        failing = host.log.writer.run(fails)
    for future in (lost, failing):
        with pytest.raises(TunledgerError):
            future.result(DEADLINE_S)
    host.now += 2 * INTERVAL_MS
    host.write(host.job(ONE))
    host.log.append(draft(note()))
    _, found = series.series(ONE, START, host.now, None)
    assert found.at == START + 1 + 3 * INTERVAL_MS
    assert found.gap_ms == 3 * INTERVAL_MS, "since the last one that was written"
    assert found.rates is None
    assert found.classes == {"from_kernel.ipv4.tcp": (2, 35), "to_kernel.ipv6.udp": (5, 5)}


def test_a_retired_interface_is_still_told_of(host: Host, series: CounterReader) -> None:
    host.counted[ONE] = 7
    host.sample(ONE)
    host.book.forget(ONE)
    host.restart()
    present = series.present(ONE)
    assert present is not None
    assert (present.sampled_at, present.totals["kernel"]["rx_packets"]) == (stamp_of(START), 7)
    assert series.present(InterfaceId("nobody")) is None
    assert series.series(InterfaceId("nobody"), 0, START, None) == []
    assert series.name_of("nobody") is None


# -- bites


def _fill(host: Host, samples: int, *interfaces: InterfaceId, tend: bool = True) -> None:
    host.batched = True
    for _ in range(samples):
        for number, one in enumerate(interfaces):
            host.counted[one] = host.counted.get(one, 0) + 1 + number
        host.now += INTERVAL_MS
        host.sample(*interfaces, tend=tend)
    host.batched = False
    host.settle()


def test_a_bite_is_bounded_and_all_of_them_are_everything(
    host: Host, path: Path, series: CounterReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "BITE_ROWS", 20)
    crowd = [InterfaceId(f"i{number}") for number in range(10)]
    _fill(host, 40, *crowd, tend=False)
    changes: list[int] = []

    def counting(job: Job) -> Job:
        def run(connection: sa.Connection) -> None:
            before = connection.exec_driver_sql("SELECT total_changes()").scalar_one()
            job(connection)
            changes.append(connection.exec_driver_sql("SELECT total_changes()").scalar_one() - before)

        return run

    before = None
    while before != (before := progress(path)):
        for bite in host.keeper.tend(stamp_of(host.now)):
            host.write(counting(bite))
        for one in crowd:  # a minute that is half taken over is read from the samples
            assert series.series(one, START, host.now, MINUTE_MS) == list(points(None, host.all[one], MINUTE_MS))[:6]
    assert count(path, "counter_minutes") == 6 * len(crowd)
    assert len(changes) > 15
    assert max(changes) <= 20 + 1, "a bite, and the note of how far it came"
    host.now += 3 * DAY_MS
    while count(path, "counter_raw") or count(path, "counter_minutes"):
        for bite in host.keeper.tend(stamp_of(host.now)):
            host.write(counting(bite))
    assert max(changes) <= 2 * 20 + 20 + 1, "one for each tier"


def test_bites_keep_up_with_any_number_of_interfaces(host: Host, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counters, "BITE_ROWS", 1)
    crowd = [InterfaceId(f"i{number}") for number in range(50)]
    _fill(host, 450, *crowd)
    minutes_at = rows(path, "SELECT minutes_at, hours_at FROM counter_progress")[0]
    assert minutes_at == (host.now // MINUTE_MS * MINUTE_MS - MINUTE_MS, START + HOUR_MS), "a minute late at most"
    _fill(host, 60, *crowd)
    assert count(path, "counter_raw") <= 50 * 2 * 360, "an hour, and up to another until the hour is over"


def test_samples_are_not_thinned_before_their_minute_and_hour_are_taken_over(host: Host, path: Path) -> None:
    _fill(host, 400, ONE, tend=False)
    host.now += 100 * HOUR_MS
    minutes, hours, thin = host.keeper.tend(stamp_of(host.now))
    host.write(thin)
    assert count(path, "counter_raw") == 400
    host.write(minutes)
    host.write(thin)
    assert count(path, "counter_raw") == 0
    assert count(path, "counter_minutes") == 67
    host.write(hours)
    host.write(thin)
    assert count(path, "counter_minutes") == 0
    assert count(path, "counter_hours") == 0, "100 hours are more than 48"


def test_tiers_are_kept_at_least_as_long_as_finer_ones(host: Host, path: Path) -> None:
    host.keeper = CounterKeeper(raw_s=100 * 3600, minutes_s=3600, hours_s=3600)
    _fill(host, 400, ONE)
    host.now += 50 * HOUR_MS
    host.tend_all()
    assert [count(path, tier) for tier in TIERS] == [400, 67, 2]


def test_incarnations_are_never_thinned(host: Host, path: Path) -> None:
    host.counted[ONE] = 5
    host.sample(ONE)
    host.now += 1000 * DAY_MS
    host.tend_all()
    assert [count(path, tier) for tier in TIERS] == [0, 0, 0]
    assert counters.load(path).totals(ONE, Source.KERNEL)["rx_packets"] == 5


# -- bounds and damage


def test_too_many_points_are_refused_naming_the_step(host: Host, series: CounterReader) -> None:
    host.sample(ONE)
    with pytest.raises(TunledgerError, match=r"^step: too fine for this range; at most 5,000 points") as refusal:
        series.series(ONE, START, START + 5001 * 1000, 1000)
    assert (refusal.value.code, refusal.value.field) == (ErrorCode.INVALID_FIELD, "step")
    assert series.series(ONE, START, START + 5000 * 1000, 1000) == []


def test_too_many_samples_are_refused_too(host: Host, series: CounterReader, monkeypatch: pytest.MonkeyPatch) -> None:
    _fill(host, 20, ONE)
    monkeypatch.setattr(counters, "POINTS_MAX", 19)
    with pytest.raises(TunledgerError, match="step"):
        series.series(ONE, START, host.now, None)
    monkeypatch.setattr(counters, "ROWS_MAX", 19)
    with pytest.raises(TunledgerError, match="step"):
        series.series(ONE, START, START + HOUR_MS, HOUR_MS - 1000)


@pytest.mark.parametrize("column", ["missed", "classes"])
def test_a_row_that_does_not_read_is_log_corrupt(host: Host, series: CounterReader, path: Path, column: str) -> None:
    host.sample(ONE)
    tamper(path, (f"UPDATE counter_raw SET {column} = '{{'", ()))
    with pytest.raises(TunledgerError) as refusal:
        series.series(ONE, START - 1, START, None)
    assert refusal.value.code is ErrorCode.LOG_CORRUPT


def test_an_incarnation_that_does_not_read_does_not_stop_the_log(host: Host, path: Path) -> None:
    host.sample(ONE)
    tamper(path, ("UPDATE counter_incarnations SET raw = '{', sampled_at = 'x'", ()))
    host.keeper = CounterKeeper()
    host.now += INTERVAL_MS
    host.sample(ONE)
    host.log.append(draft(note()))
    assert host.log.broken == []


# -- any history

_STEPS = (None, 30_000, MINUTE_MS, 7 * MINUTE_MS, HOUR_MS, 3 * HOUR_MS)
_MOVE = st.one_of(
    st.tuples(st.just("run"), st.integers(1, 12)),
    st.tuples(st.just("run"), st.integers(300, 420)),
    st.tuples(st.just("one"), st.integers(1, 5)),
    st.tuples(st.just("away"), st.integers(1, 5 * HOUR_MS)),
    st.tuples(st.just("restart"), st.just(0)),
    st.tuples(st.just("recreate"), st.just(0)),
    st.tuples(st.just("tend"), st.integers(1, 40)),
)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_MOVE, max_size=10), st.sampled_from([1, 7, 40]))
def test_what_is_read_is_what_was_sampled_whatever_happens(
    migrated: Path, tmp_path: Path, moves: list[tuple[str, int]], bite: int
) -> None:
    path = Path(shutil.copy(migrated, tmp_path / "any.db"))
    log, reader = Log(path), CounterReader(path)
    host = Host(path, log, now=START + 1)
    host.restart()
    everybody = (ONE, TWO, THREE)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(counters, "BITE_ROWS", bite)
            for what, amount in moves:
                match what:
                    case "run":
                        _fill(host, amount, *everybody)
                    case "one":
                        _fill(host, amount, TWO)
                    case "away":
                        host.now += amount
                    case "restart":
                        host.restart()
                    case "recreate":
                        host.link, host.counted = host.link + 1, {}
                    case _:
                        for _ in range(amount):
                            host.tend()
                        host.settle()
                _compare(host, reader)
            host.tend_all()
            _compare(host, reader)
    finally:
        reader.close()
        log.close()
        for left in tmp_path.glob("any.db*"):
            left.unlink()


def _compare(host: Host, reader: CounterReader) -> None:
    """Series against what pure functions make of all samples there ever were, for the time that a tier is kept."""
    raw_thinned, minutes_thinned = rows(host.path, "SELECT raw_thinned, minutes_thinned FROM counter_progress")[0]
    assert isinstance(raw_thinned, int)
    assert isinstance(minutes_thinned, int)
    for one, sampled in host.all.items():
        for step_ms in _STEPS:
            width = step_ms or 1
            fine = step_ms is None or step_ms % MINUTE_MS != 0
            kept = raw_thinned if fine else minutes_thinned if width % HOUR_MS else host.now - int(HOURS_S * 1000)
            after = max(START, -(-kept // width) * width, (host.now - 4000 * width) // width * width)
            expected = [p for p in points(None, sampled, step_ms) if after < p.at <= host.now // width * width]
            found = reader.series(one, after, host.now, step_ms)
            assert [p.at for p in found] == [p.at for p in expected]
            assert found[1:] == expected[1:]
            if found and found[0] != expected[0]:  # its own sample before was in a tier that is thinned, or late
                assert found[0].rates is None
                assert found[0].figures == expected[0].figures
                assert after > START
