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
