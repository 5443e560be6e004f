"""Brings what the writer and the applier finished over to the event loop, all that is there in one go.

Both answer many callers at once. To wake the loop for each of them costs a system call each, in which the thread gives
the interpreter away and may wait milliseconds to have it again; here one wake-up stands for all until the loop comes.
What the work is does not concern this module. What waits is bounded by the queues of the two threads.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class Crossing:
    """One per event loop, which `open` tells it. `call` is for any thread, the rest for the loop's."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: deque[Callable[[], None]] = deque()
        self._announced = False

    def open(self) -> None:
        """What comes over goes to the running loop from now on."""
        self._loop = asyncio.get_running_loop()

    def call(self, work: Callable[[], None]) -> None:
        """Have the loop do this, after all that was given before; nothing once the loop is closed."""
        self._waiting.append(work)
        # `_deliver` withdraws the announcement before it counts what waits, so that nothing can be left behind. Two
        # threads at once may announce twice; then the second finds nothing.
        if self._announced:
            return
        loop = self._loop
        assert loop is not None
        if not loop.is_closed():
            self._announced = True
            loop.call_soon_threadsafe(self._deliver)

    async def result(self, done: "Future[T]") -> T:
        """Wait for what another thread is to finish. Who is cancelled takes back what was not begun."""
        if self._loop is None:
            self.open()
        waiter: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        done.add_done_callback(lambda finished: self.call(lambda: _settle(waiter, finished)))
        try:
            return await waiter
        except asyncio.CancelledError:
            done.cancel()
            raise

    def _deliver(self) -> None:
        self._announced = False
        try:
            for _ in range(len(self._waiting)):
                self._waiting.popleft()()
        finally:
            if self._waiting and not self._announced:  # a mistake in one must not keep the others
                self._announced = True
                asyncio.get_running_loop().call_soon(self._deliver)


def _settle(waiter: "asyncio.Future[Any]", finished: "Future[Any]") -> None:
    if waiter.done():
        return
    if finished.cancelled():
        waiter.cancel()
    elif (error := finished.exception()) is not None:
        waiter.set_exception(error)
    else:
        waiter.set_result(finished.result())
