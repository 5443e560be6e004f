"""What other threads finish reaches the event loop: all of it, in order, with few wake-ups."""

import asyncio
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pytest

from service.reconcile.crossing import Crossing

pytestmark = pytest.mark.anyio


def from_another_thread(work: Callable[[], Any]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def finish(futures: Sequence["Future[int]"]) -> None:
    for number, future in enumerate(futures):
        future.set_result(number)


async def wake_ups(finish: Callable[[], None]) -> int:
    """How often the loop is woken by another thread that does this."""
    loop, woken = asyncio.get_running_loop(), 0
    wake = loop.call_soon_threadsafe

    def counted(*args: Any, **named: Any) -> Any:
        nonlocal woken
        woken += 1
        return wake(*args, **named)

    loop.call_soon_threadsafe = counted  # type: ignore[method-assign,assignment]
    from_another_thread(finish)  # the loop waits meanwhile, so that it takes nothing in between
    del loop.call_soon_threadsafe
    return woken


async def begun(crossing: Crossing, count: int) -> tuple[list["Future[int]"], list["asyncio.Task[int]"]]:
    futures: list[Future[int]] = [Future() for _ in range(count)]
    tasks = [asyncio.create_task(crossing.result(future)) for future in futures]
    await asyncio.sleep(0)
    return futures, tasks


async def test_many_results_that_come_together_wake_the_loop_once_and_each_gets_its_own() -> None:
    futures, tasks = await begun(Crossing(), 64)
    assert await wake_ups(lambda: finish(futures)) == 1
    assert await asyncio.gather(*tasks) == list(range(64))


async def test_what_comes_after_a_delivery_is_announced_anew() -> None:
    crossing = Crossing()
    for _ in range(3):
        futures, tasks = await begun(crossing, 1)
        from_another_thread(functools.partial(finish, futures))
        assert await asyncio.wait_for(tasks[0], 10) == 0


async def test_nothing_is_lost_between_two_threads_and_the_loop() -> None:
    crossing = Crossing()
    futures, tasks = await begun(crossing, 2000)
    halves = [threading.Thread(target=finish, args=(part,)) for part in (futures[::2], futures[1::2])]
    for half in halves:
        half.start()
    assert sum(await asyncio.wait_for(asyncio.gather(*tasks), 30)) == 2 * sum(range(1000))
    for half in halves:
        half.join()


async def test_a_waiter_goes_on_only_when_what_was_called_before_is_done() -> None:
    crossing = Crossing()
    heard: list[str] = []
    futures, tasks = await begun(crossing, 1)

    def commit() -> None:
        crossing.call(lambda: heard.append("recorded"))
        futures[0].set_result(1)

    tasks[0].add_done_callback(lambda _task: heard.append("answered"))
    from_another_thread(commit)
    await tasks[0]
    await asyncio.sleep(0)
    assert heard == ["recorded", "answered"]


async def test_a_mistake_in_one_keeps_no_other() -> None:
    crossing = Crossing()
    told: list[BaseException] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context["exception"]))
    futures, tasks = await begun(crossing, 1)

    def fail() -> None:
        raise ZeroDivisionError

    def work() -> None:
        crossing.call(fail)
        futures[0].set_result(5)

    from_another_thread(work)
    assert await asyncio.wait_for(tasks[0], 10) == 5
    assert [type(error) for error in told] == [ZeroDivisionError]


async def test_a_failure_and_a_cancelled_job_are_heard() -> None:
    futures, tasks = await begun(Crossing(), 2)
    from_another_thread(lambda: futures[0].set_exception(OSError("full")))
    from_another_thread(futures[1].cancel)
    with pytest.raises(OSError, match="full"):
        await tasks[0]
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]


async def test_who_stops_waiting_takes_back_what_was_not_begun() -> None:
    futures, tasks = await begun(Crossing(), 1)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    assert futures[0].cancelled()
