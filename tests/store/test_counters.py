"""Counters on disk: lifetime totals survive a reload, whatever became of the links that were counted."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.domain.counters import Book, Reading, Source
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.values import InterfaceId
from service.store import counters
from service.store.writer import Job
from tests.store.log import DEADLINE_S, NOW, Log, draft, note, rows, tamper

ONE, TWO = InterfaceId("one"), InterfaceId("two")
LONG_AGO = "2000-01-01T00:00:00.000000Z"


def _store(log: Log, *readings: Reading, now: str = NOW) -> None:
    log.writer.run(counters.CounterKeeper().store(readings, {}, now)).result(DEADLINE_S)


def _kernel(key: str, packets: int, interface: InterfaceId = ONE) -> Reading:
    return Reading(interface, Source.KERNEL, key, {"rx_packets": packets})


def test_an_empty_database_has_no_totals(path: Path) -> None:
    assert counters.load(path).totals(ONE, Source.KERNEL) == {}


def test_totals_survive_a_reload(path: Path, log: Log) -> None:
    book = Book()
    for reading in (
        _kernel("boot/3", 10),
        _kernel("boot/3", 25),
        _kernel("boot/4", 5),  # recreated
        _kernel("boot/4", 2),  # started again behind our back
        _kernel("boot2/3", 1),  # rebooted
        Reading(ONE, Source.WORKER, "session", {"from_kernel.ipv4.tcp.packets": 7}),
        _kernel("boot/9", 1000, TWO),
    ):
        _store(log, book.take(reading))
    assert book.totals(ONE, Source.KERNEL) == {"rx_packets": 25 + 5 + 2 + 1}
    again = counters.load(path)
    assert again.totals(ONE, Source.KERNEL) == book.totals(ONE, Source.KERNEL)
    assert again.totals(ONE, Source.WORKER) == {"from_kernel.ipv4.tcp.packets": 7}
    assert again.totals(TWO, Source.KERNEL) == {"rx_packets": 1000}


def test_an_incarnation_goes_on_after_a_reload(path: Path, log: Log) -> None:
    _store(log, Book().take(_kernel("boot/3", 10)))
    book = counters.load(path)
    _store(log, book.take(_kernel("boot/3", 12)))
    assert counters.load(path).totals(ONE, Source.KERNEL) == {"rx_packets": 12}, "not counted twice"
    assert len(rows(path, "SELECT * FROM counter_incarnations")) == 1


_STEP = st.tuples(st.sampled_from(["sample", "recreate", "fall", "come back", "reload"]), st.integers(0, 1000))


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(_STEP, max_size=12))
def test_totals_never_go_down_whatever_happens(migrated: Path, tmp_path: Path, steps: list[tuple[str, int]]) -> None:
    path = Path(shutil.copy(migrated, tmp_path / "any.db"))
    log = Log(path)
    book, link, raw, total = Book(), 0, 0, 0
    try:
        for what, packets in steps:
            match what:
                case "reload":
                    book = counters.load(path)
                    continue
                case "recreate":
                    link, raw = link + 1, packets
                case "come back":
                    link, raw = max(0, link - 1), packets
                case "fall":
                    raw = min(raw, packets)
                case _:
                    raw += packets
            _store(log, book.take(_kernel(f"boot/{link}", raw)))
            after = book.totals(ONE, Source.KERNEL)["rx_packets"]
            assert after >= max(total, raw)
            assert counters.load(path).totals(ONE, Source.KERNEL) == {"rx_packets": after}
            total = after
    finally:
        log.close()
        for left in tmp_path.glob("any.db*"):
            left.unlink()


def test_a_key_that_comes_back_is_a_life_of_its_own(path: Path, log: Log) -> None:
    book = Book()
    for reading in (_kernel("boot/3", 100), _kernel("boot/4", 10), _kernel("boot/3", 1)):
        _store(log, book.take(reading))
    assert book.totals(ONE, Source.KERNEL) == {"rx_packets": 111}
    assert counters.load(path).totals(ONE, Source.KERNEL) == {"rx_packets": 111}


def test_thinning_leaves_incarnations_alone(path: Path, log: Log) -> None:
    """They are what lifetime totals are made of, however old."""
    _store(log, Book().take(_kernel("boot/3", 10)), now=LONG_AGO)
    for bite in counters.CounterKeeper().tend(NOW):
        log.writer.run(bite).result(DEADLINE_S)
    assert counters.load(path).totals(ONE, Source.KERNEL) == {"rx_packets": 10}


@pytest.mark.parametrize("column", ["key", "source", "raw"])
@pytest.mark.parametrize("value", ["", "boot#x", "[1]", '{"rx_packets":"x"}', "7", "{"])
def test_a_row_that_says_nothing_is_log_corrupt_or_passes(path: Path, log: Log, column: str, value: str) -> None:
    _store(log, Book().take(_kernel("boot/3", 10)), Book().take(_kernel("boot/4", 10)))
    tamper(path, (f"UPDATE counter_incarnations SET {column} = ? WHERE id = 1", (value,)))  # noqa: S608
    try:
        counters.load(path)
    except TunledgerError as refusal:
        assert refusal.code is ErrorCode.LOG_CORRUPT  # noqa: PT017  # some values are as good as another
    else:
        assert column == "key"


def test_a_database_that_does_not_read_has_no_totals_either(tmp_path: Path) -> None:
    (tmp_path / "log.db").write_bytes(b"no database" * 1000)
    with pytest.raises(TunledgerError) as refusal:
        counters.load(tmp_path / "log.db")
    assert refusal.value.code is ErrorCode.LOG_CORRUPT


def test_samples_that_come_with_the_events_of_one_transaction_are_written_as_one(path: Path, log: Log) -> None:
    keeper, book = counters.CounterKeeper(), Book()

    def job(packets: int, interface: InterfaceId) -> Job:
        reading = book.take(_kernel("boot/3", packets, interface))
        return keeper.store([reading], {interface: {"kernel": book.totals(interface, Source.KERNEL)}}, NOW)

    def sequence() -> int:
        ((found,),) = rows(path, "SELECT sequence FROM counter_progress")
        assert isinstance(found, int)
        return found

    log.writer.append([draft(note())], job(7, TWO)).result(DEADLINE_S)
    before, others = sequence(), list[str]()
    with log.held():  # all of these are taken together
        waiting = [
            log.writer.append([draft(note())], job(10, ONE)),
            log.writer.append([draft(note())], lambda _connection: others.append("first")),
            log.writer.append([draft(note())], job(9, TWO)),
            log.writer.append([draft(note())], lambda _connection: others.append("second")),
        ]
    for each in waiting:
        each.result(DEADLINE_S)
    assert (sequence() - before, others) == (1, ["first", "second"])
    assert counters.load(path).totals(ONE, Source.KERNEL) == {"rx_packets": 10}
    assert counters.load(path).totals(TWO, Source.KERNEL) == {"rx_packets": 9}
    shown = "SELECT rx_packets FROM counter_raw JOIN counter_interfaces ON number = interface ORDER BY at, interface_id"
    assert rows(path, shown) == [(7,), (10,), (9,)]


def test_more_interfaces_than_are_remembered_are_counted_all_the_same(
    path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counters, "REMEMBERED_MAX", 3)
    keeper, book = counters.CounterKeeper(), Book()

    def store(packets: int, interfaces: list[InterfaceId]) -> None:
        readings = [book.take(_kernel("boot/3", packets, each)) for each in interfaces]
        totals = {each: {"kernel": book.totals(each, Source.KERNEL)} for each in interfaces}
        log.writer.run(keeper.store(readings, totals, NOW)).result(DEADLINE_S)

    many = [InterfaceId(f"i{number}") for number in range(7)]
    for each in many:  # as deletes come, one by one
        store(1, [each])
    for packets in (2, 3):  # and as samples do
        store(packets, many)
    assert {counters.load(path).totals(each, Source.KERNEL)["rx_packets"] for each in many} == {3}
