"""Figures and the table they are shown in. How anything is measured does not belong here."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter_ns


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured thing: the times of all its runs, in milliseconds."""

    what: str
    times_ms: tuple[float, ...]

    @property
    def p50(self) -> float:
        """The median, in milliseconds."""
        return statistics.median(self.times_ms)

    @property
    def p95(self) -> float:
        """The 95th percentile, in milliseconds."""
        return sorted(self.times_ms)[min(len(self.times_ms) - 1, int(len(self.times_ms) * 0.95))]


def timed(work: Callable[[], object]) -> float:
    """How long `work` takes, in milliseconds."""
    begun = perf_counter_ns()
    work()
    return (perf_counter_ns() - begun) / 1e6


@dataclass(frozen=True, slots=True)
class Row:
    """Ours, and what it stands next to."""

    ours: Figure
    peers: Sequence[Figure]


def show(title: str, rows: Sequence[Row]) -> None:
    """Print a table: ours, then each peer with ours / peer."""
    print(f"\n{title}\n")
    print(f"| {'what':44} | {'p50 ms':>8} | {'p95 ms':>8} | {'ours / it':>9} |")
    print(f"| {'-' * 44} | {'-' * 7}: | {'-' * 7}: | {'-' * 8}: |")
    for row in rows:
        print(f"| {row.ours.what:44} | {row.ours.p50:8.2f} | {row.ours.p95:8.2f} | {'':>9} |")
        for peer in row.peers:
            ratio = row.ours.p50 / peer.p50 if peer.p50 else float("nan")
            print(f"|   next to: {peer.what:33} | {peer.p50:8.2f} | {peer.p95:8.2f} | {ratio:8.2f}x |")


@dataclass(frozen=True, slots=True)
class Rate:
    """One measured thing of which more is better: its rate in each round."""

    what: str
    values: tuple[float, ...]
    limit: str = ""
    """What held it back, in words."""

    @property
    def median(self) -> float:
        """The median of all rounds."""
        return statistics.median(self.values)


@dataclass(frozen=True, slots=True)
class RateRow:
    """Ours, what it stands next to, and the part of the first of those that we aim at."""

    ours: Rate
    peers: Sequence[Rate]
    aim: float | None = None


def show_rates(title: str, unit: str, rows: Sequence[RateRow], *, scale: float = 1.0, digits: int = 0) -> None:
    """Print a table: ours, then each peer with ours / peer; `unit` is of the values over `scale`."""

    def line(rate: Rate, indent: str, ratio: str) -> str:
        low, high = min(rate.values) / scale, max(rate.values) / scale
        spread = f"{low:,.{digits}f} to {high:,.{digits}f}"
        return (
            f"| {indent + rate.what:48} | {rate.median / scale:>12,.{digits}f} | {spread:>22} | {ratio:>16} "
            f"| {rate.limit:44} |"
        )

    print(f"\n{title}\n")
    print(f"| {'what':48} | {unit:>12} | {'least to most':>22} | {'ours / it':>16} | {'reader, limit':44} |")
    print(f"| {'-' * 48} | {'-' * 11}: | {'-' * 21}: | {'-' * 15}: | {'-' * 44} |")
    for row in rows:
        print(line(row.ours, "", ""))
        for place, peer in enumerate(row.peers):
            ratio = f"{row.ours.median / peer.median:.2f}x" if peer.median else "nan"
            if place == 0 and row.aim is not None:
                ratio += f" (aim {row.aim})"
            print(line(peer, "  next to: ", ratio))
