"""Counters over time: exact over restarts, recreations and gaps, and the same in every resolution."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from operator import sub

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from service.domain.counters import Book, Reading, Source
from service.domain.series import (
    HOUR_MS,
    KERNEL,
    MINUTE_MS,
    NONE,
    WORKER,
    Figures,
    Point,
    Progress,
    Row,
    Span,
    Tier,
    bucket_end,
    bucket_start,
    figures_of,
    merge,
    points,
    rates_of,
    roll_up,
    sample_row,
    spans,
    thin_upto,
    totals_of,
)
from tests.domain.builders import interface_id

ONE = interface_id(1)
INTERVAL_MS = 10_000
START = 1_790_000_000_000 // HOUR_MS * HOUR_MS
CLASSES = ("from_kernel.ipv4.tcp", "to_kernel.ipv6.udp", "from_kernel.malformed.empty")


def figures(value: int) -> Figures:
    return (value, *NONE[1:])


def row(at: int, value: int, **more: object) -> Row:
    return Row(at, at, figures(value), **more)  # type: ignore[arg-type]


# -- one sample


def test_figures_are_the_kernels_eight_and_the_workers_by_direction() -> None:
    kernel = {name: number for number, name in enumerate(KERNEL)}
    worker = {
        "from_kernel.ipv4.tcp.packets": 3,
        "from_kernel.ipv4.tcp.bytes": 300,
        "from_kernel.malformed.empty.packets": 1,
        "from_kernel.malformed.empty.bytes": 0,
        "to_kernel.ipv6.udp.packets": 5,
        "to_kernel.ipv6.udp.bytes": 500,
    }
    found, classes = figures_of({"kernel": kernel, "worker": worker})
    assert found == (*range(8), 4, 300, 5, 500)
    assert classes["from_kernel.malformed.empty"] == (1, 0)
    assert totals_of(found, classes) == {
        "kernel": kernel,
        "worker": dict(zip(WORKER, (4, 300, 5, 500), strict=True)) | worker,
    }
    assert figures_of({"kernel": kernel, "worker": {}}) == ((*range(8), 0, 0, 0, 0), {})
    assert figures_of({}) == (NONE, {})
    assert rates_of(tuple(range(12)))["worker"]["to_kernel.bytes"] == 11


def test_the_first_sample_is_no_gap_and_tells_all() -> None:
    assert sample_row(None, START, figures(5), {"a": (1, 2)}, interval_ms=10) == row(START, 5, classes={"a": (1, 2)})


@pytest.mark.parametrize(("apart_ms", "gap_ms"), [(1, 0), (25_000, 0), (25_001, 25_001), (3_600_000, 3_600_000)])
def test_more_than_two_and_a_half_intervals_are_a_gap(apart_ms: int, gap_ms: int) -> None:
    found = sample_row(row(START, 5), START + apart_ms, figures(9), {}, interval_ms=INTERVAL_MS)
    assert found.gap_ms == gap_ms
    assert found.missed == (figures(4) if gap_ms else None)


def test_nothing_missed_in_a_gap_is_not_written() -> None:
    assert sample_row(row(START, 5), START + HOUR_MS, figures(5), {}, interval_ms=INTERVAL_MS).missed is None


def test_a_clock_that_went_back_is_a_gap_however_short() -> None:
    found = sample_row(row(START, 5), START + 1, figures(9), {"a": (1, 1)}, interval_ms=INTERVAL_MS, whole=True)
    assert (found.gap_ms, found.missed, dict(found.classes)) == (1, figures(4), {"a": (1, 1)})


def test_classes_are_told_where_they_changed_and_all_of_them_in_each_hours_first_sample() -> None:
    before = row(START + 10, 0, classes={"a": (1, 1), "b": (2, 2)})
    now = {"a": (1, 1), "b": (3, 2), "c": (1, 0)}
    later = sample_row(before, START + 20, NONE, now, interval_ms=INTERVAL_MS)
    assert later.classes == {"b": (3, 2), "c": (1, 0)}
    # The bucket of an hour ends with its end, so that START itself still belongs to the one before.
    old = row(START - 10, 0, classes={"a": (1, 1), "b": (2, 2)})
    assert "a" not in sample_row(old, START, NONE, now, interval_ms=INTERVAL_MS).classes
    assert sample_row(old, START + 1, NONE, now, interval_ms=INTERVAL_MS).classes == now


# -- rows into coarser rows


@pytest.mark.parametrize(
    ("at", "start", "end"), [(0, 0, 0), (1, 0, 60), (59, 0, 60), (60, 60, 60), (61, 60, 120), (120, 120, 120)]
)
def test_a_bucket_has_its_end_and_not_its_start(at: int, start: int, end: int) -> None:
    assert (bucket_start(at, 60), bucket_end(at, 60)) == (start, end)


def test_a_minute_is_its_last_sample_with_the_gaps_of_all() -> None:
    rows = [
        row(START + 10, 5, classes={"a": (1, 1), "b": (1, 1)}),
        row(START + 20, 7, gap_ms=9, missed=figures(2), classes={"a": (2, 2)}),
        row(START + MINUTE_MS, 9, gap_ms=1, missed=figures(1)),
        row(START + MINUTE_MS + 1, 11),
    ]
    first, second = roll_up(rows, MINUTE_MS)
    assert first == Row(START + MINUTE_MS, START + MINUTE_MS, figures(9), 10, figures(3), {"a": (2, 2), "b": (1, 1)})
    assert (second.at, second.sampled_at) == (START + 2 * MINUTE_MS, START + MINUTE_MS + 1)


def test_a_minute_without_a_sample_has_no_row() -> None:
    rows = [row(START + 1, 1), row(START + 5 * MINUTE_MS, 2, gap_ms=5 * MINUTE_MS - 1)]
    assert [r.at for r in roll_up(rows, MINUTE_MS)] == [START + MINUTE_MS, START + 5 * MINUTE_MS]


# -- any history


@dataclass
class History:
    """Samples of one interface as the engine takes them, with restarts of all kinds between."""

    at: int = START
    kernel: int = 0
    worker: dict[str, int] = field(default_factory=dict)
    life: int = 0
    rows: list[Row] = field(default_factory=list)
    totals: list[dict[str, dict[str, int]]] = field(default_factory=list)
    last: Row | None = None
    book: Book = field(default_factory=Book)
    table: dict[tuple[Source, str], Reading] = field(default_factory=dict)

    def sample(self, *, whole: bool = False) -> None:
        for source, raw in (
            (Source.KERNEL, {"rx_packets": self.kernel, "rx_bytes": 100 * self.kernel}),
            (Source.WORKER, {f"{c}.{u}": n for c, n in self.worker.items() for u in ("packets", "bytes")}),
        ):
            taken = self.book.take(Reading(ONE, source, f"life/{self.life}", raw))
            self.table[taken.source, taken.key] = taken
        totals = {source.value: self.book.totals(ONE, source) for source in Source}
        now, classes = figures_of(totals)
        self.rows.append(sample_row(self.last, self.at, now, classes, interval_ms=INTERVAL_MS, whole=whole))
        self.last = Row(self.at, self.at, now, classes=classes)
        self.totals.append(totals)

    def restart(self) -> None:
        """As after kill -9: everything from what was stored, without the last classes."""
        self.book = Book()
        for reading in self.table.values():
            self.book.resume(reading)
        if self.last is not None:
            self.last = Row(self.last.at, self.last.at, self.last.figures)


EVENTS = some.one_of(
    some.tuples(some.just("count"), some.integers(1, 10_000)),
    some.tuples(some.just("class"), some.integers(0, len(CLASSES) - 1)),
    some.tuples(some.just("wait"), some.sampled_from([1, 9_000, 10_000, 11_000, 20_000])),
    some.tuples(some.just("gap"), some.integers(25_001, 3 * HOUR_MS)),
    some.tuples(some.just("recreate"), some.just(0)),
    some.tuples(some.just("reset"), some.just(0)),
    some.tuples(some.just("restart"), some.just(0)),
    some.tuples(some.just("clock"), some.just(0)),
)


def history(events: Sequence[tuple[str, int]]) -> History:
    made = History()
    for what, amount in events:
        match what:
            case "count":
                made.kernel += amount
                continue
            case "class":
                made.worker[CLASSES[amount]] = made.worker.get(CLASSES[amount], 0) + 1 + made.kernel % 7
                continue
            case "recreate":
                made.life, made.kernel, made.worker = made.life + 1, 0, {}
                continue
            case "reset":
                made.kernel = 0
                continue
            case "restart":
                made.restart()
                continue
            case "clock":
                made.at += 1
            case _:
                made.at += amount
        made.sample(whole=what == "clock")
    return made


HISTORIES = some.lists(EVENTS, max_size=60).map(history)
STEPS = some.sampled_from([None, 1_000, 10_000, 45_000, MINUTE_MS, 5 * MINUTE_MS, HOUR_MS, 2 * HOUR_MS])


@settings(max_examples=300)
@given(HISTORIES, STEPS)
def test_rates_over_the_observed_time_and_what_gaps_missed_are_the_difference_of_totals(
    made: History, step_ms: int | None
) -> None:
    shown = list(points(None, made.rows, step_ms))
    rolled = made.rows if step_ms is None else list(roll_up(made.rows, step_ms))
    assert [p.figures for p in shown] == [r.figures for r in rolled]
    for before, point, coarse in zip(shown, shown[1:], rolled[1:], strict=False):
        grown = tuple(map(sub, point.figures, before.figures))
        assert min(grown) >= 0, "a total went down"
        assert point.observed_ms == point.sampled_at - before.sampled_at - point.gap_ms
        missed = coarse.missed or NONE
        if point.rates is None:
            assert point.observed_ms == 0
            assert grown == missed, "counted in no time"
        else:
            for rate, now, lost in zip(point.rates, grown, missed, strict=True):
                assert rate >= 0
                exact = Fraction(now - lost) * 1000 / point.observed_ms
                assert rate == pytest.approx(float(exact), rel=1e-12)
    assert all(p.observed_ms == 0 and p.rates is None for p in shown[:1]), "nothing is known before the first"


@settings(max_examples=300)
@given(HISTORIES, STEPS)
def test_totals_are_those_of_the_last_sample_of_each_bucket_classes_too(made: History, step_ms: int | None) -> None:
    for point in points(None, made.rows, step_ms):
        last = max(n for n, r in enumerate(made.rows) if r.at <= point.at)
        assert made.rows[last].at == point.sampled_at
        expected = made.totals[last]
        found = totals_of(point.figures, point.classes)
        for source, each in expected.items():
            assert {name: found[source][name] for name in each} == each


@settings(max_examples=300)
@given(HISTORIES)
def test_minutes_and_hours_say_at_their_ends_what_samples_say(made: History) -> None:
    minutes = list(roll_up(made.rows, MINUTE_MS))
    hours = list(roll_up(minutes, HOUR_MS))
    assert hours == list(roll_up(made.rows, HOUR_MS)), "rolled up twice is rolled up once"
    for step_ms in (MINUTE_MS, 5 * MINUTE_MS, HOUR_MS):
        assert list(points(None, minutes, step_ms)) == list(points(None, made.rows, step_ms))
    for step_ms in (HOUR_MS, 3 * HOUR_MS):
        assert list(points(None, hours, step_ms)) == list(points(None, made.rows, step_ms))


@given(HISTORIES, some.integers(0, 60))
def test_merging_is_associative(made: History, cut: int) -> None:
    if len(made.rows) < 2:
        return
    at, cut = made.rows[-1].at, 1 + cut % (len(made.rows) - 1)
    left, right = made.rows[:cut], made.rows[cut:]
    assert merge([merge(left, at), merge(right, at)], at) == merge(made.rows, at)


@settings(max_examples=300)
@given(HISTORIES, some.integers(0, 4 * HOUR_MS))
def test_reading_from_any_hours_start_finds_all_classes(made: History, offset: int) -> None:
    """What a reader does: from the start of an hour on, whatever is before."""
    start = bucket_start(START + offset, HOUR_MS)
    rows = [r for r in made.rows if r.at > start]
    known = {r.at: t for r, t in zip(made.rows, made.totals, strict=True)}
    for point in points(None, rows, None):
        worker = {k: v for k, v in known[point.at]["worker"].items() if v}
        found = totals_of(point.figures, point.classes)["worker"]
        assert {k: found[k] for k in worker} == worker


# -- from which tier


def test_spans_take_the_coarsest_tier_that_fits_and_the_finer_one_where_that_is_not_complete() -> None:
    day = 24 * HOUR_MS
    now, minute = START + HOUR_MS // 2 + 7_000, START + HOUR_MS // 2
    progress = Progress(
        minutes_at=minute,
        hours_at=START,
        raw_thinned=START - day,
        minutes_thinned=START - 14 * day,
    )
    long_ago = START - 30 * day
    assert spans(long_ago, now, HOUR_MS, progress) == [
        Span(Tier.HOURS, long_ago, START),
        Span(Tier.MINUTES, START, minute),
        Span(Tier.RAW, minute, now),
    ]
    assert spans(long_ago, now, 5 * MINUTE_MS, progress) == [
        Span(Tier.HOURS, long_ago, START - 14 * day),
        Span(Tier.MINUTES, START - 14 * day, minute),
        Span(Tier.RAW, minute, now),
    ]
    assert spans(long_ago, now, None, progress) == [
        Span(Tier.HOURS, long_ago, START - 14 * day),
        Span(Tier.MINUTES, START - 14 * day, START - day),
        Span(Tier.RAW, START - day, now),
    ]
    assert spans(now - 1000, now, 10_000, progress) == [Span(Tier.RAW, now - 1000, now)]
    assert spans(now, now, None, progress) == []


@dataclass
class Tiers:
    """The three tiers as the store keeps them, and which rows are still there."""

    rows: dict[Tier, list[Row]]
    progress: Progress

    def read(self, after: int, upto: int, step_ms: int | None) -> list[Row]:
        return [
            r
            for span in spans(after, upto, step_ms, self.progress)
            for r in self.rows[span.tier]
            if span.after < r.at <= span.upto
        ]


def tiers(made: History, now: int, raw_ms: int, minutes_ms: int, *, late_ms: int) -> Tiers:
    """As after rolling up to `late_ms` before now, and thinning."""
    minutes_at, hours_at = bucket_start(now - late_ms, MINUTE_MS), bucket_start(now - 2 * late_ms, HOUR_MS)
    raw_thinned = thin_upto(now, raw_ms, minutes_at)
    minutes_thinned = thin_upto(now, max(raw_ms, minutes_ms), hours_at)
    minutes = [r for r in roll_up(made.rows, MINUTE_MS) if r.at <= minutes_at]
    hours = [r for r in roll_up(minutes, HOUR_MS) if r.at <= hours_at]
    kept = {
        Tier.RAW: [r for r in made.rows if r.at > raw_thinned],
        Tier.MINUTES: [r for r in minutes if r.at > minutes_thinned],
        Tier.HOURS: hours,
    }
    return Tiers(kept, Progress(minutes_at, hours_at, raw_thinned, minutes_thinned))


@settings(max_examples=400)
@given(HISTORIES, some.integers(0, 12 * HOUR_MS), some.integers(0, 12 * HOUR_MS), some.integers(1, 3 * HOUR_MS))
def test_thinning_never_takes_what_a_coarser_tier_has_not_yet(
    made: History, raw_ms: int, minutes_ms: int, late_ms: int
) -> None:
    """At every hour's end the last sample before it is found, whatever was thinned; and so are all gaps."""
    now = made.at + 1
    kept = tiers(made, now, raw_ms, minutes_ms, late_ms=late_ms)
    expected: list[Point] = list(points(None, made.rows, HOUR_MS))
    assert list(points(None, kept.read(0, now, HOUR_MS), HOUR_MS)) == expected
    everything = kept.read(0, now, None)
    assert list(points(None, everything, HOUR_MS)) == expected, "mixed tiers have no seam"
    assert [r.at for r in everything] == sorted({r.at for r in everything}), "nothing twice"
    assert sum(r.gap_ms for r in everything) == sum(r.gap_ms for r in made.rows)
    if made.rows:
        assert everything[-1].figures == made.rows[-1].figures


@given(some.integers(0, 10**13), some.integers(0, 10**12), some.integers(0, 10**13))
def test_thinning_ends_at_an_hour_and_not_after_what_was_taken_over(now: int, kept_ms: int, taken_over: int) -> None:
    cut = thin_upto(now, kept_ms, taken_over)
    assert cut % HOUR_MS == 0
    assert cut <= taken_over
    assert cut <= now - kept_ms
