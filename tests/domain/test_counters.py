"""Lifetime totals: never down, never twice, whatever restarts, and whatever is lost in between."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from service.domain.counters import Book, Reading, Source, kernel_reading, worker_reading
from service.domain.observed import LinkCounters
from tests.domain.builders import interface_id

ONE, TWO = interface_id(1), interface_id(2)


def reading(key: str, source: Source = Source.KERNEL, **raw: int) -> Reading:
    return Reading(ONE, source, key, raw)


class Table:
    """The stored incarnations: one row for each key, in order of opening, the last values kept."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, Source, str], Reading] = {}

    def store(self, taken: Reading) -> None:
        self.rows[taken.interface_id, taken.source, taken.key] = taken

    def load(self) -> Book:
        book = Book()
        for row in self.rows.values():
            book.resume(row)
        return book


def test_total_is_what_ended_and_what_goes_on() -> None:
    book = Book()
    assert book.totals(ONE, Source.KERNEL) == {}
    book.take(reading("b1/7", packets=10, bytes=1000))
    book.take(reading("b1/7", packets=15, bytes=1500))
    assert book.totals(ONE, Source.KERNEL) == {"bytes": 1500, "packets": 15}
    book.take(reading("b1/8", packets=2, bytes=20))
    assert book.totals(ONE, Source.KERNEL) == {"bytes": 1520, "packets": 17}
    assert book.totals(ONE, Source.WORKER) == book.totals(TWO, Source.KERNEL) == {}


def test_the_same_reading_twice_counts_once() -> None:
    book = Book()
    for _ in range(3):
        book.take(reading("k", packets=10))
    assert book.totals(ONE, Source.KERNEL) == {"packets": 10}


def test_a_value_that_falls_is_a_life_nobody_saw_begin() -> None:
    book, table = Book(), Table()
    assert [book.take(reading("k", packets=p)).key for p in (10, 3, 4, 1)] == ["k", "k#1", "k#1", "k#2"]
    assert book.totals(ONE, Source.KERNEL) == {"packets": 15}
    for taken in (reading("k", packets=10), reading("k#1", packets=4), reading("k#2", packets=1)):
        table.store(taken)
    again = table.load()
    assert again.totals(ONE, Source.KERNEL) == {"packets": 15}
    assert again.take(reading("k", packets=2)).key == "k#2"
    assert again.take(reading("k", packets=0)).key == "k#3"


def test_one_counter_that_falls_is_enough_and_a_new_name_is_no_fall() -> None:
    book = Book()
    book.take(reading("k", a=5, b=5))
    assert book.take(reading("k", a=6, b=5, c=1)).key == "k"
    assert book.take(reading("k", a=7, b=4, c=1)).key == "k#1"
    assert book.totals(ONE, Source.KERNEL) == {"a": 13, "b": 9, "c": 2}


def test_a_counter_that_disappears_keeps_its_total() -> None:
    book = Book()
    book.take(reading("k", a=5, b=5))
    book.take(reading("k", a=6))
    assert book.totals(ONE, Source.KERNEL) == {"a": 11, "b": 5}


def test_a_last_reading_that_is_older_than_what_was_taken_counts_nothing_twice() -> None:
    book = Book()
    book.take(reading("k", a=5, b=50))
    book.take(reading("k", a=9, b=90, c=1))
    last = book.take_last(reading("k", a=7, b=91))
    assert (last.key, last.raw) == ("k", {"a": 9, "b": 91, "c": 1})
    book.take(reading("l", a=2))
    assert book.totals(ONE, Source.KERNEL) == {"a": 11, "b": 91, "c": 1}


def test_the_last_of_a_worker_may_come_when_its_next_life_was_heard_of() -> None:
    book, table = Book(), Table()
    table.store(book.take(reading("s1", Source.WORKER, a=100, b=1)))
    table.store(book.take(reading("s2", Source.WORKER, a=5)))
    table.store(book.take_last(reading("s1", Source.WORKER, a=103, b=1, c=7)))
    table.store(book.take(reading("s2", Source.WORKER, a=9)))
    assert book.totals(ONE, Source.WORKER) == table.load().totals(ONE, Source.WORKER) == {"a": 112, "b": 1, "c": 7}


def test_a_last_reading_may_be_the_first_of_its_life() -> None:
    book = Book()
    assert book.take_last(reading("k", a=5)).key == "k"
    assert book.take_last(reading("l", a=3)).key == "l"
    assert book.totals(ONE, Source.KERNEL) == {"a": 8}


def test_forgetting_one_interface_leaves_the_others() -> None:
    book = Book()
    book.take(reading("k", a=5))
    book.take(Reading(TWO, Source.KERNEL, "k", {"a": 7}))
    book.forget(ONE)
    book.forget(ONE)
    assert (book.totals(ONE, Source.KERNEL), book.totals(TWO, Source.KERNEL)) == ({}, {"a": 7})


def test_kernel_readings_are_kept_by_boot_and_ifindex() -> None:
    counters = LinkCounters(rx_packets=1, tx_bytes=2)
    taken = kernel_reading(ONE, "boot", 7, counters)
    assert (taken.key, taken.source, taken.raw["rx_packets"], taken.raw["tx_bytes"]) == ("boot/7", Source.KERNEL, 1, 2)
    assert len(taken.raw) == 8


def test_worker_readings_are_kept_by_session_direction_and_class() -> None:
    taken = worker_reading(ONE, "s", {"ipv4.tcp": (3, 180)}, {"ipv6.udp": (1, 60)})
    assert (taken.key, taken.source) == ("s", Source.WORKER)
    assert taken.raw == {
        "from_kernel.ipv4.tcp.packets": 3,
        "from_kernel.ipv4.tcp.bytes": 180,
        "to_kernel.ipv6.udp.packets": 1,
        "to_kernel.ipv6.udp.bytes": 60,
    }


@dataclass
class Truth:
    """Two counters of one interface as they really go: what each ended life had at its last sample, and the present."""

    ended: int = 0
    key: int = 0
    sampled: int = 0
    now: int = 0
    lowest: int = field(default=0)


MOVES = some.one_of(
    some.tuples(some.just("count"), some.integers(1, 1000)),
    some.tuples(some.just("sample"), some.just(0)),
    some.tuples(some.just("recreate"), some.just(0)),  # with a last sample, as converge takes one
    some.tuples(some.just("lost"), some.just(0)),  # deleted behind our back: what it counted since is lost
    some.tuples(some.just("reset"), some.just(0)),  # the counter falls within one incarnation
    some.tuples(some.just("container"), some.just(0)),  # a fresh network namespace gives out old ifindexes again
    some.tuples(some.just("crash"), some.just(0)),  # kill -9: a new book from the table
)


@settings(max_examples=400)
@given(some.lists(MOVES, max_size=40))
def test_totals_never_go_down_and_never_count_twice(moves: list[tuple[str, int]]) -> None:
    book, table, truth = Book(), Table(), Truth()

    def sample() -> None:
        table.store(book.take(reading(f"boot/{truth.key}", packets=truth.now, errors=truth.now // 2)))
        truth.sampled = truth.now

    for move, amount in moves:
        match move:
            case "count":
                truth.now += amount
            case "sample":
                sample()
            case "recreate" | "lost":
                if move == "recreate":
                    sample()
                truth.ended += truth.sampled
                truth.key, truth.sampled, truth.now = truth.key + 1, 0, 0
            case "container":
                truth.ended += truth.sampled
                truth.key = truth.sampled = truth.now = 0
                sample()
            case "reset":
                if truth.sampled:  # a fall that can be seen: the next sample is lower than the last
                    truth.ended += truth.sampled
                    truth.now = truth.sampled = 0
                    sample()
            case _:
                book = table.load()
        total = book.totals(ONE, Source.KERNEL).get("packets", 0)
        assert total >= truth.lowest, "a total went down"
        assert total == truth.ended + truth.sampled, "counted twice, or not at all"
        truth.lowest = total
        assert table.load().totals(ONE, Source.KERNEL) == book.totals(ONE, Source.KERNEL), "a restart changes a total"


@pytest.mark.parametrize("source", Source)
def test_sources_do_not_mix(source: Source) -> None:
    book = Book()
    for each in Source:
        book.take(reading("k", each, packets=1 if each is source else 100))
    assert book.totals(ONE, source) == {"packets": 1}
