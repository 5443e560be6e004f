"""What waits together is done together, each caller gets its own result, and nobody's mistake is another's."""

import threading
from collections.abc import Iterator, Sequence

import pytest

from service.domain.errors import ErrorCode, TunledgerError
from service.reconcile import applier as module
from service.reconcile.applier import Applier


@pytest.fixture
def applier() -> Iterator[Applier]:
    started = Applier()
    started.start()
    yield started
    started.close()


class Doubler:
    """Remembers its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def each(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        return [2 * item for item in items]

    def refuse(self, items: Sequence[int]) -> list[int]:
        raise TunledgerError(ErrorCode.KERNEL_REFUSED, f"{len(items)} at once")


def held(applier: Applier) -> threading.Event:
    """Keep the thread busy until the event is set, so that what follows has to wait."""
    begun, release = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert release.wait(10)

    applier.run(hold)
    assert begun.wait(10)
    return release


def test_what_waits_is_handed_over_at_once_and_each_gets_its_own(applier: Applier) -> None:
    doubler = Doubler()
    release = held(applier)
    waiting = [applier.join(doubler.each, number) for number in range(5)]
    own = applier.run(lambda: "own")
    waiting += [applier.join(doubler.each, number) for number in range(5, 10)]
    release.set()
    assert [future.result(10) for future in waiting] == [2 * number for number in range(10)]
    assert own.result(10) == "own"
    assert doubler.batches == [list(range(10))]


def test_a_batch_is_bounded(applier: Applier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_MAX", 3)
    doubler = Doubler()
    release = held(applier)
    waiting = [applier.join(doubler.each, number) for number in range(7)]
    release.set()
    assert [future.result(10) for future in waiting] == [2 * number for number in range(7)]
    assert doubler.batches == [[0, 1, 2], [3, 4, 5], [6]]


def test_the_failure_of_one_kind_of_work_is_not_that_of_another(applier: Applier) -> None:
    doubler = Doubler()
    release = held(applier)
    fine, refused = applier.join(doubler.each, 1), [applier.join(doubler.refuse, number) for number in range(2)]
    release.set()
    assert fine.result(10) == 2
    for each in refused:
        with pytest.raises(TunledgerError, match="2 at once"):
            each.result(10)


def test_a_number_of_results_that_does_not_fit_is_an_error_of_all(applier: Applier) -> None:
    with pytest.raises(TunledgerError, match="0 results for 1 items"):
        applier.join(lambda _items: [], 1).result(10)


def test_what_is_queued_is_done_before_the_end_and_nothing_after_it(applier: Applier) -> None:
    release = held(applier)
    last = applier.run(lambda: "last")
    threading.Timer(0.05, release.set).start()
    applier.close()
    assert last.result(10) == "last"
    with pytest.raises(TunledgerError, match="stopping"):
        applier.run(lambda: "too late")
