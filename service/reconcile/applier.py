"""The kernel's applier: a thread that does blocking work on the host.

Whoever gives it work holds the locks of the names that it is about, so that no two converge at the same link at once;
and the event loop never waits on netlink. Work of one
kind that waits together is done together: everything queued is taken, and what was queued with the same `together`
is handed over in one call, each caller getting the result of its own. So commands of many clients are one netlink
batch, without any of them knowing of the others.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from service.domain.errors import ErrorCode, TunledgerError

QUEUE_MAX = 1024  # jobs waiting; more are refused as overloaded
BATCH_MAX = 256  # jobs taken at once; bounds how long the first of them waits

T = TypeVar("T")
R = TypeVar("R")
Together = Callable[[Sequence[T]], Sequence[R]]


@dataclass(slots=True)
class _Queued:
    """`work` gets the items of all that were queued with an equal one; for a job of its own it is unlike any other."""

    work: Callable[[Sequence[Any]], Sequence[Any]]
    item: Any
    done: "Future[Any]" = field(default_factory=Future)


class Applier:
    """Start it with `start`; `run` and `join` may be called from any thread. `name` is the thread's."""

    def __init__(self, name: str = "kernel-applier") -> None:
        self._queue: queue.SimpleQueue[_Queued | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._closed = False
        # Between `close` and the last job: none may queue behind the stop. And between all that put: it is bounded.
        self._gate = threading.Lock()

    def start(self) -> None:
        """Start the thread, in the network namespace of the caller's."""
        self._thread.start()

    def run(self, job: Callable[[], T]) -> "Future[T]":
        """Queue a job; the future has its result or what it raised.

        Raises:
            TunledgerError: overloaded, when the queue is full; shutting_down.
        """
        return self.join(lambda _items: [job()], None)

    def join(self, work: Together[T, R], item: T) -> "Future[R]":
        """Queue an item of work that can be done for many at once: `work` gets all that wait, and gives as many
        results in their order. What it raises, all of them get.

        Raises:
            TunledgerError: overloaded, when the queue is full; shutting_down.
        """
        queued = _Queued(work, item)
        with self._gate:
            if self._closed:
                raise TunledgerError(ErrorCode.SHUTTING_DOWN, "the service is stopping", retry=True)
            if self._queue.qsize() >= QUEUE_MAX:
                raise TunledgerError(
                    ErrorCode.OVERLOADED, f"{QUEUE_MAX} jobs are waiting for the kernel; try again", retry=True
                )
            self._queue.put(queued)
        return queued.done

    def close(self) -> None:
        """Do what is queued, then stop."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        stopping = False
        while not stopping:
            taken = [self._queue.get()]
            while len(taken) < BATCH_MAX:
                try:
                    taken.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            stopping = None in taken
            groups: list[list[_Queued]] = []
            for each in taken:
                if each is None or not each.done.set_running_or_notify_cancel():
                    continue
                group = next((group for group in groups if group[0].work == each.work), None)
                if group is not None:
                    group.append(each)
                else:
                    groups.append([each])
            for group in groups:
                _do(group)


def _do(group: Sequence[_Queued]) -> None:
    try:
        results = group[0].work([each.item for each in group])
        if len(results) != len(group):
            raise TunledgerError(ErrorCode.INTERNAL, f"{len(results)} results for {len(group)} items")
    except BaseException as error:  # noqa: BLE001  # it belongs to whoever waits for the job
        for each in group:
            each.done.set_exception(error)
        return
    for each, result in zip(group, results, strict=True):
        each.done.set_result(result)
