"""The kernel's one applier: a thread that does blocking work on the host, one job after the other.

One thread, so that no two converge at the same link at once, and the event loop never waits on netlink.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from service.domain.errors import ErrorCode, TunledgerError

QUEUE_MAX = 1024  # jobs waiting; more are refused as overloaded

T = TypeVar("T")


class Applier:
    """Start it with `start`; `run` may be called from any thread."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[Callable[[], Any], Future[Any]] | None] = queue.Queue(QUEUE_MAX)
        self._thread = threading.Thread(target=self._work, name="kernel-applier", daemon=True)
        self._closed = False

    def start(self) -> None:
        """Start the thread, in the network namespace of the caller's."""
        self._thread.start()

    def run(self, job: Callable[[], T]) -> "Future[T]":
        """Queue a job; the future has its result or what it raised.

        Raises:
            TunledgerError: overloaded, when the queue is full; shutting_down.
        """
        if self._closed:
            raise TunledgerError(ErrorCode.SHUTTING_DOWN, "the service is stopping", retry=True)
        done: Future[T] = Future()
        try:
            self._queue.put_nowait((job, done))
        except queue.Full:
            raise TunledgerError(
                ErrorCode.OVERLOADED, f"{QUEUE_MAX} jobs are waiting for the kernel; try again", retry=True
            ) from None
        return done

    def close(self) -> None:
        """Do what is queued, then stop."""
        if self._closed:
            return
        self._closed = True
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            job, done = item
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(job())
            except BaseException as error:  # noqa: BLE001  # it belongs to whoever waits for the job
                done.set_exception(error)
