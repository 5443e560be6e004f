"""Which device is with which worker, what it was told to do, and who is at work on it: the tables, under one lock.

No request to a worker is made in here, no process started, and nobody told of anything: callers do that, outside the
lock. It is held for no I/O.

A device is in one of these states:

    (nothing)   --reserve--> pending --worker acknowledged--> attached --detach--> (nothing)
    pending     --refused, timed out, worker died----------> (nothing)
    attached    --worker died, device deleted--------------> last figures kept, until attach or detach
"""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from service.dataplane.attachment import Attachment, Busy, DeviceCounters, Ended, Ending, Held
from service.dataplane.contract import Mode
from service.dataplane.crashes import Crash, Crashes
from service.dataplane.errors import DataplaneError, errno_text
from service.dataplane.placement import Neighbours
from service.dataplane.posts import Post
from service.dataplane.wire import NAME_MAX_BYTES
from service.dataplane.work import Work, targets
from service.dataplane.worker_process import WorkerProcess

BUSY_TIMEOUT_S: Final = 2.0
"""For which a caller waits for others that are at work on the same device."""

STUCK_S: Final = 2.0
"""A loop that has not turned for so long, though there was something to do, never will."""

DEVICES_PER_WORKER: Final = 4096
"""4,096 slots of 1.1 kB, touched only when used."""

LAST_FIGURES_MAX: Final = 4 * DEVICES_PER_WORKER
"""Figures of devices that were lost and neither attached again nor detached; the oldest go first."""

Lost = tuple[Attachment, str, Sequence[Ended]]
"""A device that its worker let go of, why, and what ended with it."""


class Roster:
    """The tables. `lock` guards all of it; methods say whether it has to be held."""

    def __init__(self, *, workers: int, devices_per_worker: int, new_session: Callable[[], str]) -> None:
        self.lock: Final = threading.Condition()
        self.posts: Final = [Post(index) for index in range(workers)]
        self.attachments: dict[str, Attachment] = {}
        self.last: dict[str, DeviceCounters] = {}
        self.neighbours: Final = Neighbours()
        self.crashes: Final = Crashes()
        self.serial = 0
        self.to_be_told: set[int] = set()
        """Stages whose end somebody is to hear of."""
        self.devices_lost = 0
        self.running = False
        self.closing = False
        self.watcher: threading.Thread | None = None
        """The thread that brings workers: it must not wait for one, nor for who does."""
        self._devices_per_worker: Final = devices_per_worker
        self._new_session: Final = new_session
        self._stage_ids = 0

    def reserve(self, device: str, name: str, mode: Mode, work: Work, deadline: float) -> Attachment:
        """Make a pending attachment with the worker that has those it exchanges packets with, or has the fewest."""
        if len(name.encode()) > NAME_MAX_BYTES:
            raise DataplaneError("attach_refused", f"name: over {NAME_MAX_BYTES} bytes", retry=False)
        with self.lock:
            # The watcher itself is the one that would bring a worker: it must not wait for it.
            if threading.current_thread() is not self.watcher:
                self.lock.wait_for(
                    lambda: self.closing or not self.running or any(post.live for post in self.posts),
                    deadline - time.monotonic(),
                )
            if self.closing or not self.running:
                raise DataplaneError("not_running", "the data plane is not running", retry=False)
            held = self.attachments.get(device)
            if held is not None:
                if held.busy:
                    raise busy_error(held)
                raise DataplaneError(
                    "already_attached", f"{held.name}: already with worker {held.worker.index}", retry=False
                )
            waits_s = self.crashes.waits_s(device, work.chain, time.monotonic())
            if waits_s:
                raise DataplaneError(
                    "processor_crashed",
                    f"{name}: a processor of its chain crashes again and again (its history says which); it is read "
                    "again after a while, longer each time",
                    retry=True,
                )
            live = [post.live for post in self.posts if post.live is not None]
            if not live:
                reasons = "; ".join(f"worker {post.index}: {post.reason}" for post in self.posts)
                raise DataplaneError("no_worker", f"{name}: no worker is running ({reasons})", retry=True)
            sends_to = targets(work.chain)
            worker = self.of_most(self.neighbours.of({name, *sends_to})) or max(
                live, key=lambda candidate: len(candidate.free_slots)
            )
            if not worker.free_slots:
                limit = len(live) * self._devices_per_worker
                raise DataplaneError(
                    "worker_full", f"{name}: the workers hold {limit} devices, their limit", retry=False
                )
            self.serial += 1
            attachment = Attachment(
                device, name, mode, self._new_session(), worker, worker.free_slots.pop(), self.serial, work
            )
            self.attachments[device] = attachment
            self.neighbours.put(device, {name, *sends_to})
            return attachment

    def meeting_place(self, attachment: Attachment, sends_to: frozenset[str]) -> WorkerProcess:
        """Under the lock: the worker where a device meets all that it will exchange packets with."""
        keys = self.neighbours.of({attachment.name, *sends_to})
        return self.of_most(keys) or attachment.worker

    def of_most(self, keys: Collection[str]) -> WorkerProcess | None:
        """Under the lock: the live worker with most of these devices, those with more stages counting more."""
        weights: dict[WorkerProcess, int] = {}
        for key in keys:
            held = self.attachments.get(key)
            if held is not None and held.confirmed:
                # A tap ends when its device is moved.
                weight = 1 + len(held.stages) + 1000 * len(held.taps)
                weights[held.worker] = weights.get(held.worker, 0) + weight
        return max(weights, key=lambda worker: weights[worker]) if weights else None

    @contextmanager
    def claimed(self, device: str, beside: Attachment | None = None) -> Iterator[Attachment]:
        """An attachment that nobody else changes meanwhile, `beside` one that the caller has claimed already.

        Raises DataplaneError `not_attached`, `device_busy`.
        """
        with self.lock:
            attachment = self.claim(device, "changing", beside)
            if attachment is None:
                raise DataplaneError("not_attached", f"{device}: no worker has it", retry=True)
        try:
            yield attachment
        finally:
            with self.lock:
                attachment.busy = None
                self.lock.notify_all()

    def claim(self, device: str, busy: Busy, beside: Attachment | None) -> Attachment | None:
        """Under the lock: wait until nobody else changes a device, and claim it; None if it is not there any more, or
        going while another is `beside`.

        Raises DataplaneError `device_busy` after `BUSY_TIMEOUT_S`, at once where it comes or goes. What is asked of
        a worker afterwards has its own deadline: one is killed for not answering, and must have had the time to.
        """
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        try:
            while (held := self.attachments.get(device)) is not None and held.busy:
                # Who waits for another holds its own meanwhile: waiting for such a one could go in a circle.
                in_circle = beside is not None and held.waits
                if beside is not None and held.busy == "detaching":
                    return None  # it is on its way out, whoever wants to meet it
                # And the watcher's thread brings the workers that others wait for.
                if held.busy != "changing" or in_circle or threading.current_thread() is self.watcher:
                    raise busy_error(held)
                if beside is not None:
                    beside.waits = True
                if not self.lock.wait(max(0.0, deadline - time.monotonic())):
                    raise busy_error(held)
        finally:
            if beside is not None:
                beside.waits = False
        if held is not None:
            held.busy = busy
        return held

    def new_stage_id(self) -> int:
        """Under the lock: an id that no stage had."""
        self._stage_ids += 1
        return self._stage_ids

    def release(self, attachment: Attachment) -> None:
        """Under the lock: forget an attachment whose device no live worker holds, if it is still known."""
        if self.attachments.get(attachment.device) is attachment:
            del self.attachments[attachment.device]
            self.neighbours.remove(attachment.device)
            attachment.worker.free_slots.append(attachment.slot)
            self.lock.notify_all()  # who waits for it need not any more

    def keep(self, attachment: Attachment) -> DeviceCounters:
        """Under the lock: forget an attachment, but keep its last figures."""
        final = attachment.figures()
        self.release(attachment)
        self.last.pop(attachment.device, None)
        self.last[attachment.device] = final
        while len(self.last) > LAST_FIGURES_MAX:
            del self.last[next(iter(self.last))]
        return final

    def ended(self, attachment: Attachment, stages: Sequence[Held], reason: Ending) -> list[Ended]:
        """Under the lock: those of these stages whose end is to be told, which it is once, with their figures.

        Their worker is done with them, and their areas are nobody else's yet.
        """
        ended = [held for held in stages if held.id in self.to_be_told]
        self.to_be_told.difference_update(held.id for held in ended)
        return [Ended(attachment.device, held.id, attachment.own_figures(held), reason) for held in ended]

    def take_lost(self, worker: WorkerProcess) -> list[Lost]:
        """Under the lock: forget the devices that `worker` has let go of by itself; return them and why."""
        lost: list[Lost] = []
        for held in [held for held in self.attachments.values() if held.worker is worker and held.confirmed]:
            error = worker.counters.lost(held.slot)
            if error:
                ended = self.ended(held, held.held(), "interface_gone")
                self.keep(held)
                self.devices_lost += 1
                lost.append((held, errno_text(error), ended))
        return lost

    def blame(self, worker: WorkerProcess, status: str) -> Crash | None:
        """Under the lock, with the worker's attachments in place: the processor that a worker died of, if one is."""
        remains = worker.box.read()
        if remains is None or (status == "signal SIGKILL" and not worker.stuck):
            return None
        held = next(
            (held for held in self.attachments.values() if held.worker is worker and held.serial == remains.serial),
            None,
        )
        found = held.by_area(remains.area) if held is not None else None
        if held is None or found is None:
            return None
        work, stage = found
        place = stage.setup.place
        then = self.crashes.crashed(held.device, work.chain, place, time.monotonic())
        error = f"it did not come to an end for {STUCK_S:g} s" if worker.stuck else remains.error
        return Crash(
            held.device,
            held.name,
            place,
            str(stage.setup.spec["processor"]),
            error,
            remains.packet,
            remains.packet_bytes,
            then,
        )


def busy_error(held: Attachment) -> DataplaneError:
    """Others are at work on it."""
    doing = "changed by another call" if held.busy == "changing" else "attached or detached"
    return DataplaneError("device_busy", f"{held.name}: being {doing}", retry=True)


def there(stages: Sequence[Held | None]) -> list[Held]:
    """Those that are not bypassed."""
    return [held for held in stages if held is not None]
