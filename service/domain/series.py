"""Counters over time: what a row of any resolution says, how rows become coarser ones, and which rates follow.

Theory of operation. A row holds lifetime totals at the moment of a sample, never differences, so that a rate is a
difference of totals over the time between two samples and stays exact whatever was recreated or restarted between.
Three tiers hold the same kind of row: every sample, the last one at or before each minute, and each hour. A bucket of
a tier is (end - width, end]; one without a sample has no row, and nothing is ever interpolated.

    gap     two neighbouring samples of an interface more than `GAP_INTERVALS` sampling intervals apart, or with a
            clock between them that went back. The later row says how long it was (`gap_ms`) and what was counted in
            it all the same (`missed`).
    merge   of a bucket's rows: the last one's totals, the sums of gaps and of what was missed. Associative, so that
            minutes merged into hours are what samples merged into hours would be.
    rate    between two rows: (totals' difference - missed) / (time - gap_ms), over the observed time only. The sum of
            rates times observed times, and of what was missed, is the difference of the totals.
    classes the worker's many classes are in a row only where they changed since the row before; the first row of an
            interface in each hour has all of them, so that reading from an hour's start finds everything.

Times are integers, milliseconds since the epoch, UTC. Pure: no clock, no database, no HTTP.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import lru_cache
from itertools import groupby
from operator import sub

from service.domain.counters import Source
from service.domain.observed import LinkCounters

MINUTE_MS, HOUR_MS = 60_000, 3_600_000
GAP_INTERVALS = 2.5  # one sample may fail and the next one be late, without that being a gap

KERNEL: tuple[str, ...] = tuple(f.name for f in fields(LinkCounters))
DIRECTIONS = ("from_kernel", "to_kernel")
WORKER: tuple[str, ...] = tuple(f"{direction}.{unit}" for direction in DIRECTIONS for unit in ("packets", "bytes"))

Figures = tuple[int, ...]  # lifetime totals: KERNEL, then WORKER
Classes = Mapping[str, tuple[int, int]]  # "from_kernel.ipv4.tcp" -> lifetime packets, bytes
NONE: Figures = (0,) * (len(KERNEL) + len(WORKER))
NO_CLASSES: Classes = {}  # one for all rows: a thousand empty ones a sample keep the garbage collector busy


class Tier(Enum):
    """A resolution; the value is the width of its buckets in ms. Samples have none."""

    RAW = 0
    MINUTES = MINUTE_MS
    HOURS = HOUR_MS


@dataclass(frozen=True, slots=True)
class Row:
    """One interface at one time, in any tier.

    Attributes:
        at: the end of the bucket; in the raw tier the moment of the sample.
        sampled_at: when the totals were read; `at` or before it.
        gap_ms: how much of the time since the row before lies in gaps.
        missed: what was counted within these gaps, or None for nothing.
        classes: those that changed since the row before, or all.
    """

    at: int
    sampled_at: int
    figures: Figures
    gap_ms: int = 0
    missed: Figures | None = None
    classes: Classes = field(default_factory=lambda: NO_CLASSES)


@dataclass(frozen=True, slots=True)
class Point:
    """What is shown of one bucket, or of one sample.

    Attributes:
        observed_ms: the time that `rates` were measured over: since the point before, without gaps.
        rates: packets or bytes a second, in the order of `Figures`; None where nothing was observed.
    """

    at: int
    sampled_at: int
    figures: Figures
    classes: Classes
    gap_ms: int
    observed_ms: int
    rates: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Progress:
    """How far each tier is complete, and up to where the finer ones are gone. All are ends of buckets."""

    minutes_at: int = 0
    hours_at: int = 0
    raw_thinned: int = 0
    minutes_thinned: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """Rows with `after` < at <= `upto` are to be read from `tier`."""

    tier: Tier
    after: int
    upto: int


def bucket_end(at: int, width_ms: int) -> int:
    """The end of the bucket (end - width, end] that a moment is in."""
    return -(-at // width_ms) * width_ms


def bucket_start(at: int, width_ms: int) -> int:
    """The last end of a bucket at or before a moment."""
    return at // width_ms * width_ms


def figures_of(totals: Mapping[str, Mapping[str, int]]) -> tuple[Figures, Classes]:
    """Lifetime totals by source and name, as a book has them: the figures of a row, and all classes."""
    kernel, worker = totals.get(Source.KERNEL, {}), totals.get(Source.WORKER, {})
    own = tuple(kernel.get(name, 0) for name in KERNEL)
    if not worker:
        return own + (0,) * len(WORKER), NO_CLASSES
    classes: dict[str, list[int]] = {}
    sums = [0] * len(WORKER)
    for name, value in worker.items():
        which, unit, place = _place(name)
        pair = classes.get(which)
        if pair is None:
            pair = classes[which] = [0, 0]
        pair[unit] = value
        if place is not None:
            sums[place] += value
    return (*own, *sums), {which: (packets, size) for which, (packets, size) in classes.items()}


@lru_cache(maxsize=1024)
def _place(name: str) -> tuple[str, int, int | None]:
    """Of "from_kernel.ipv4.tcp.bytes": the class, whether it is bytes, and which of `WORKER` it adds to."""
    which, _, unit = name.rpartition(".")
    summed = f"{which.partition('.')[0]}.{unit}"
    return which, int(unit == "bytes"), WORKER.index(summed) if summed in WORKER else None


def totals_of(figures: Figures, classes: Classes) -> dict[str, dict[str, int]]:
    """Totals by source and name: the kernel's eight, the worker's by direction, and by direction and class."""
    worker = dict(zip(WORKER, figures[len(KERNEL) :], strict=True))
    for which, (packets, size) in sorted(classes.items()):
        worker[f"{which}.packets"], worker[f"{which}.bytes"] = packets, size
    return {Source.KERNEL.value: dict(zip(KERNEL, figures, strict=False)), Source.WORKER.value: worker}


def rates_of(rates: Sequence[float]) -> dict[str, dict[str, float]]:
    """Rates by source and name, as `totals_of` has totals."""
    return {
        Source.KERNEL.value: dict(zip(KERNEL, rates, strict=False)),
        Source.WORKER.value: dict(zip(WORKER, rates[len(KERNEL) :], strict=True)),
    }


def sample_row(
    previous: Row | None, at: int, figures: Figures, classes: Classes, *, interval_ms: int, whole: bool = False
) -> Row:
    """The raw row of a sample.

    Args:
        previous: the interface's last sample with all its classes, or None for the first one ever.
        interval_ms: the sampling interval that was meant.
        whole: the clock or the memory of the last classes failed: what lies between is a gap, all classes are told.
    """
    if previous is None or at <= previous.sampled_at:
        return Row(at, at, figures, classes=classes)
    apart = at - previous.sampled_at
    gap = whole or apart > GAP_INTERVALS * interval_ms
    missed = tuple(map(sub, figures, previous.figures)) if gap else None
    if not whole and bucket_end(at, HOUR_MS) == bucket_end(previous.sampled_at, HOUR_MS):
        classes = {which: pair for which, pair in classes.items() if previous.classes.get(which) != pair}
    return Row(at, at, figures, apart if gap else 0, missed if missed and any(missed) else None, classes)


def merge(rows: Sequence[Row], at: int) -> Row:
    """One row at `at` for neighbouring rows, oldest first, never none."""
    last = rows[-1]
    missed: Figures | None = None
    classes: dict[str, tuple[int, int]] = {}
    gap_ms = 0
    for row in rows:
        gap_ms += row.gap_ms
        classes.update(row.classes)
        if row.missed is not None:
            missed = row.missed if missed is None else tuple(map(int.__add__, missed, row.missed))
    return Row(at, last.sampled_at, last.figures, gap_ms, missed, classes)


def roll_up(rows: Iterable[Row], width_ms: int) -> Iterator[Row]:
    """Rows of one interface, oldest first, as rows of a coarser tier: one for each bucket that has any."""
    for end, members in groupby(rows, lambda row: bucket_end(row.at, width_ms)):
        yield merge(list(members), end)


def points(previous: Row | None, rows: Iterable[Row], step_ms: int | None) -> Iterator[Point]:
    """What to show: a point for each bucket of `step_ms` that has a row, or for each row.

    Args:
        previous: the row before the first one, with all its classes; without it the first point has no rates.
    """
    before, classes = previous, dict(previous.classes) if previous is not None else {}
    for row in rows if step_ms is None else roll_up(rows, step_ms):
        classes.update(row.classes)
        observed, rates = rates_between(before, row)
        yield Point(row.at, row.sampled_at, row.figures, dict(classes), row.gap_ms, observed, rates)
        before = row


def rates_between(before: Row | None, row: Row) -> tuple[int, tuple[float, ...] | None]:
    """The time observed between two neighbouring rows, in ms, and the rates over it, a second."""
    observed = row.sampled_at - before.sampled_at - row.gap_ms if before is not None else 0
    if before is None or observed <= 0:
        return 0, None
    missed = row.missed or NONE
    grown = zip(row.figures, before.figures, missed, strict=True)
    return observed, tuple((now - then - lost) * 1000 / observed for now, then, lost in grown)


def spans(after: int, upto: int, step_ms: int | None, progress: Progress) -> list[Span]:
    """Where to read the rows with `after` < at <= `upto` for points of `step_ms`, oldest first.

    The coarsest tier that the step is a multiple of, as far as that is complete; where a finer one is gone already,
    what is left. The tiers agree at the ends of their buckets, so that rows of two follow each other without a seam.
    """
    hours_end = progress.minutes_thinned
    if step_ms is not None and step_ms % HOUR_MS == 0:
        hours_end = max(hours_end, progress.hours_at)
    minutes_end = max(hours_end, progress.raw_thinned)
    if step_ms is not None and step_ms % MINUTE_MS == 0:
        minutes_end = max(minutes_end, progress.minutes_at)
    found = (
        Span(Tier.HOURS, after, min(upto, hours_end)),
        Span(Tier.MINUTES, max(after, hours_end), min(upto, minutes_end)),
        Span(Tier.RAW, max(after, minutes_end), upto),
    )
    return [span for span in found if span.after < span.upto]


def thin_upto(now: int, kept_ms: int, taken_over: int) -> int:
    """Up to where a tier may be thinned: whole hours, and only what the coarser tier has taken over."""
    return bucket_start(min(now - kept_ms, taken_over), HOUR_MS)
