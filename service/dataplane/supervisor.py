"""Keeps the worker processes running and says which device is with which: the data plane as the service sees it.

Which interface should be processed, and what a lost one means, is the caller's business: after a worker died
this module starts another, but attaches nothing by itself. No packet is ever read here.

Theory of operation. Three kinds of threads:

- callers, in `attach`, `detach`, `counters`, `healthy`: each talks to a worker itself, one at a time, with a
  deadline (`WorkerProcess.ask`);
- the watcher: starts the workers, waits on their pidfds and on the eventfds by which they tell of lost devices,
  reaps, replaces, and calls `on_exit` and `on_device_lost`. It lives as long as any worker, which PDEATHSIG
  demands of the thread that starts them;
- the line reader, if somebody wants packets in words.

`_lock` guards the tables and is held for no I/O. A device is in one of these states:

    (nothing)   --attach--> pending --worker acknowledged--> attached --detach--> (nothing)
    pending     --refused, timed out, worker died----------> (nothing)
    attached    --worker died, device deleted--------------> last figures kept, until attach or detach

Letting go is certain. The only ways in which a device leaves a worker are the worker's word that it is closed
and the worker's death. So where the word does not come in time the worker is killed: always in `detach`, and in
`attach` once the fd was sent, since it would otherwise hold a device that nobody knows of.
"""

import contextlib
import errno
import json
import os
import select
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import structlog

from service import failpoints
from service.dataplane import layout, syscalls
from service.dataplane.attachment import Attachment, Busy, DeviceCounters, Held, StageStatus
from service.dataplane.contract import Mode
from service.dataplane.crashes import Crash, Crashes
from service.dataplane.line_reader import LineReader
from service.dataplane.placement import Neighbours
from service.dataplane.provisions import FilesFor, Provisions, close_all, written
from service.dataplane.wire import NAME_MAX_BYTES, Attach, Configure, Detach, Feed, Release, Reply, Request
from service.dataplane.work import COUNT_ONLY, Setup, StageSetup, Work, targets, unchanged
from service.dataplane.worker_process import NoAnswerError, NotAskedError, PeerGoneError, WorkerProcess

START_TIMEOUT_S: Final = 10.0
REQUEST_TIMEOUT_S: Final = 2.0
"""A worker's loop turns every 41 ms at worst; one that does not for this long never will."""

PING_TIMEOUT_S: Final = 0.5
EXIT_TIMEOUT_S: Final = 1.0
"""From the end of its control to the end of a worker; after that it is killed."""

STOP_TIMEOUT_S: Final = 2.0
KILL_TIMEOUT_S: Final = 2.0
"""SIGKILL takes effect at once, but for a process stuck in the kernel."""

RESPAWN_STEP_S: Final = 0.1
RESPAWN_MAX_S: Final = 5.0
STEADY_S: Final = 10.0
"""A worker that lived this long starts its deaths anew."""

DEVICES_PER_WORKER: Final = 4096
"""4,096 slots of 1.1 kB, touched only when used."""

STUCK_S: Final = 2.0
LOOK_S: Final = 0.5
"""How often the loops of workers with processors are looked at: an endless one is killed within 2.5 s."""

POKE_S: Final = 0.1
"""Stages may ask to be looked at as often as they like; they are this often."""

TAPS_MAX: Final = 8

LAST_FIGURES_MAX: Final = 4 * DEVICES_PER_WORKER
"""Figures of devices that were lost and neither attached again nor detached; the oldest go first."""


class DataplaneError(Exception):
    """What the data plane could not do: a stable code, a message for people, and whether to try again."""

    def __init__(self, code: str, message: str, *, retry: bool) -> None:
        super().__init__(message)
        self.code: Final = code
        self.message: Final = message
        self.retry: Final = retry


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """A worker that died without being told to."""

    worker: int
    pid: int
    status: str
    """`signal SIGKILL` or `exit 1`."""
    devices: frozenset[str]
    """What it held and nobody holds now."""
    counters: Mapping[str, DeviceCounters]
    """The last figures of each of `devices`."""
    crash: Crash | None = None
    """The processor that did it, if one did."""


@dataclass(slots=True, eq=False)
class _Post:
    """A worker's place, which processes come and go in."""

    index: int
    live: WorkerProcess | None = None
    deaths: int = 0
    """In a row, each soon after its start."""
    due: float | None = 0.0
    """When to start the next process, on time.monotonic(); None while one lives."""
    reason: str = "not started"
    """Why there is none."""


def respawn_delay_s(deaths: int) -> float:
    """Return how long to wait after the `deaths`-th death in a row: 0, then 0.1 s doubled each time, up to 5 s."""
    if deaths <= 1:
        return 0.0
    # The exponent has a bound, too: 0.1 x 2^6 is over the limit already.
    return min(RESPAWN_MAX_S, RESPAWN_STEP_S * 2.0 ** min(deaths - 2, 6))


_EndedTap = tuple[int, Mapping[str, int]]

_Made = tuple[list[Held | None], list[int]]
"""Stages as a worker is to be told, and the descriptors to send along, to be closed afterwards."""


class Supervisor:
    """The workers. Methods are thread-safe, block for a bounded time, and raise DataplaneError.

    Callbacks run on threads of the supervisor, one at a time for each thread. They may call every method but
    `close`, and should be quick: `on_exit` and `on_device_lost` hold up news of the next death.
    """

    def __init__(
        self,
        *,
        workers: int,
        on_exit: Callable[[WorkerExit], None],
        on_device_lost: Callable[[str, str], None] | None = None,
        packet_log: Callable[[str, str, int], None] | None = None,
        packets_per_s: int = 100,
        python: str = sys.executable,
        devices_per_worker: int = DEVICES_PER_WORKER,
        new_session: Callable[[], str] = lambda: str(uuid.uuid4()),
        processors: Mapping[str, str] | None = None,
        files_for: FilesFor | None = None,
        on_poke: Callable[[], None] | None = None,
        on_tap_ended: Callable[[str, int, Mapping[str, int], str], None] | None = None,
    ) -> None:
        """Take the settings; `start` starts.

        `on_exit` is told of every worker that died on its own; its devices are then no longer attached.
        `on_device_lost` gets a device and why its worker let go of it (it was deleted, most likely); `detach`
        then returns its last figures.
        `packet_log` gets the device's name, a line, and how many of the device's packets before it were not
        shown, because of `packets_per_s` (for each worker) or because nobody read in time; an empty line
        carries the number alone. None: packets are not put in words.
        `processors` are those of other packages (`registry.discover`). `files_for` is asked for the descriptors of
        stages that want some. `on_poke`: stages asked to be looked at, told at most once in `POKE_S`. `on_tap_ended`
        gets device, tap, its last figures and why, where `untap` was not called.
        Raises ValueError on a number below 1, and DataplaneError `unsupported` on a 32-bit machine.
        """
        if min(workers, packets_per_s, devices_per_worker) < 1:
            raise ValueError("workers, packets_per_s and devices_per_worker: at least 1 each")
        if sys.maxsize < 2**32:
            raise DataplaneError("unsupported", "the data plane needs a 64-bit machine", retry=False)
        self._on_exit = on_exit
        self._on_device_lost = on_device_lost
        self._packet_log = packet_log
        self._packets_per_s = packets_per_s
        self._python = python
        self._devices_per_worker = devices_per_worker
        self._new_session = new_session
        self._processors = dict(processors or {})
        self._provisions = Provisions(files_for)
        self._on_poke = on_poke
        self._on_tap_ended = on_tap_ended
        self._log = structlog.get_logger("tunledger.dataplane")

        self._lock = threading.Condition()
        self._posts = [_Post(index) for index in range(workers)]
        self._attachments: dict[str, Attachment] = {}
        self._last: dict[str, DeviceCounters] = {}
        self._neighbours = Neighbours()
        self._crashes = Crashes()
        self._serial = 0
        self._taps = 0
        self._devices_lost = 0
        self._started = False
        self._running = False
        self._closing = False

        self._watcher: threading.Thread | None = None
        self._line_reader: LineReader | None = None
        # The watcher's own; closed by it.
        self._epoll: select.epoll | None = None
        self._wake = -1
        self._watched: dict[int, WorkerProcess] = {}
        self._poked = False
        self._poke_due = 0.0
        """When `on_poke` may be called again, on time.monotonic()."""

    # -- for everyone

    def start(self) -> None:
        """Start the workers and return once each has answered.

        Raises DataplaneError `worker_start` if one does not within `START_TIMEOUT_S`; everything is then
        stopped again. A supervisor starts once.
        """
        with self._lock:
            if self._started:
                raise DataplaneError("already_started", "the data plane was started before", retry=False)
            self._started = True
            self._epoll = select.epoll()
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._epoll.register(self._wake, select.EPOLLIN)
        if not syscalls.available():
            self._log.warning("workers are not kept from opening files: this machine's system calls are not filtered")
        if self._packet_log is not None:
            self._line_reader = LineReader(self._packet_log)
        self._watcher = threading.Thread(target=self._watch, name="dataplane-watcher", daemon=True)
        self._watcher.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            for post in self._posts:
                self._await_up(post, deadline)
        except BaseException:
            self.close()
            raise
        with self._lock:
            self._running = True
            # One that died after its answer was left alone so far.
            self._poke()

    def attach(self, device: str, fd: int, *, mode: Mode, name: str | None = None, work: Work = COUNT_ONLY) -> str:
        """Hand a TUN or TAP to a worker, which reads it from now on; return the new session.

        `device` is the caller's key, `name` what other chains and packet lines call it (by default the key). `fd` is
        this method's: it is closed in every case before this returns or raises. Packets must come without `IFF_PI`
        headers, and with `IFF_VNET_HDR` ones if `work` says so.

        Raises DataplaneError: `already_attached`; `device_busy` while another call changes it, or if one has changed
        a device that it exchanges packets with for `REQUEST_TIMEOUT_S`; `worker_full`; `attach_refused` with the
        kernel's reason; `stage_refused` with the processor's; `processor_crashed` while one that crashed again and
        again has to wait; and, worth another try, `no_worker`, `worker_gone` or `worker_timeout`, the last after
        `REQUEST_TIMEOUT_S`. After an error no worker holds the device. Source: unix(7), SCM_RIGHTS.
        """
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        try:
            attachment = self._reserve(device, device if name is None else name, mode, work, deadline)
            try:
                self._gather(attachment, attachment.worker, targets(work.chain))
                self._see_up(attachment, attachment.worker, time.monotonic() + REQUEST_TIMEOUT_S)
                made = self._stages(attachment, work, ())
                self._hand_over(attachment, fd, made, time.monotonic() + REQUEST_TIMEOUT_S)
            except BaseException:
                with self._lock:
                    self._release(attachment)
                raise
        finally:
            # An fd that was none has been reported as such already.
            with contextlib.suppress(OSError):
                os.close(fd)
        return attachment.session

    def configure(self, device: str, work: Work) -> None:
        """Do something else with a device's packets from the next batch on; none is lost.

        Stages that the old chain and the new one have in common keep what they know. Of `work`, `vnet_hdr` must be
        as it was. Raises DataplaneError as `attach`, `not_attached`, and `device_busy` if others have changed it for
        `REQUEST_TIMEOUT_S`; after an error the old chain is at work, unless `on_device_lost` was told otherwise.
        """
        with self._claimed(device) as attachment:
            if work.vnet_hdr != attachment.work.vnet_hdr:
                raise DataplaneError(
                    "attach_refused", f"{attachment.name}: vnet_hdr changes only with a new attach", retry=False
                )
            sends_to = targets(work.chain)
            with self._lock:
                worker = self._meeting_place(attachment, sends_to)
            if worker is not attachment.worker:
                self._move(attachment, worker)
                with self._lock:
                    if self._attachments.get(device) is not attachment:
                        raise DataplaneError("worker_gone", f"{attachment.name}: lost on its way", retry=True)
            self._gather(attachment, worker, sends_to)
            self._reconfigure(attachment, work, attachment.taps)
            with self._lock:
                self._neighbours.put(device, {attachment.name, *sends_to})

    def detach(self, device: str) -> DeviceCounters | None:
        """Take a device away from its worker and return its final figures; None if there are none.

        When this returns no worker holds the device: its worker has said so, or has died, if need be by
        SIGKILL after `REQUEST_TIMEOUT_S`, which then costs its other devices their worker, too (`on_exit`).
        A device that was lost before gives its last figures, once.

        Raises DataplaneError: `device_busy` while another call attaches or detaches it, or if others have changed it
        for `REQUEST_TIMEOUT_S`; `worker_stuck` if the worker survives SIGKILL.
        """
        with self._lock:
            self._crashes.forget(device)
            attachment = self._claim(device, "detaching", None)
            if attachment is None:
                return self._last.pop(device, None)
        worker = attachment.worker
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        try:
            worker.ask(lambda sequence: Detach(sequence, attachment.slot, attachment.serial), deadline)
        except PeerGoneError:
            self._see_dead(worker, attachment.name, EXIT_TIMEOUT_S)
        except (NotAskedError, NoAnswerError):
            self._log.error(
                "worker killed: it does not let go of a device", worker=worker.index, device=attachment.name
            )
            self._see_dead(worker, attachment.name, 0.0)
        with self._lock:
            if self._attachments.get(device) is not attachment:
                return self._last.pop(device, None)  # the watcher was faster
            final = attachment.figures()
            ended = self._taken_taps(attachment)
            self._release(attachment)
        self._tell_taps(attachment, ended, "the interface is no longer processed")
        return final

    def attached(self) -> Mapping[str, Work]:
        """Return the devices that a live worker holds now, and what it was told to do."""
        with self._lock:
            return {device: held.work for device, held in self._attachments.items() if held.confirmed}

    def stages(self, device: str) -> list[StageStatus]:
        """Return how each stage of a device's chain is doing; nothing if it is not attached."""
        with self._lock:
            attachment = self._attachments.get(device)
            return attachment.statuses() if attachment is not None and attachment.confirmed else []

    def stage_memory(self, device: str) -> Mapping[int, memoryview]:
        """Return what the stages of a device share with the service, read-only, by place in the chain."""
        with self._lock:
            attachment = self._attachments.get(device)
            held = [] if attachment is None else attachment.stages
            return {place: each.memory for place, each in enumerate(held) if each is not None and each.memory}

    # -- taps

    def tap(self, device: str, stage: Mapping[str, Any], files: Sequence[int] = ()) -> int:
        """Put a stage in front of a device's chain that is not in its spec; return its id.

        It sees what the wire would. `files` are descriptors for it; they stay the caller's. It ends with `untap`, or
        with the attach (`on_tap_ended`). Raises DataplaneError as `configure`, and `worker_full` beyond `TAPS_MAX`.
        """
        with self._claimed(device) as attachment:
            if len(attachment.taps) >= TAPS_MAX:
                raise DataplaneError("worker_full", f"{attachment.name}: {TAPS_MAX} taps, its limit", retry=False)
            with self._lock:
                self._taps += 1
                tap = self._taps
                area = attachment.free_areas()[-1]
            held, fds = self._provisions.stage(device, attachment.name, -1, area, stage, files)
            held.tap = tap
            try:
                self._reconfigure(attachment, attachment.work, [held, *attachment.taps], fds)
            finally:
                close_all(fds)
            return tap

    def untap(self, device: str, tap: int) -> Mapping[str, int]:
        """Take a tap away, and return its final figures. Raises DataplaneError as `configure`, and `no_tap`."""
        with self._claimed(device) as attachment:
            held = self._tap_of(attachment, tap)
            self._reconfigure(attachment, attachment.work, [each for each in attachment.taps if each is not held])
            with self._lock:
                return attachment.own_figures(held)

    def tap_figures(self, device: str, tap: int) -> Mapping[str, int]:
        """Return a tap's figures as they are now. Raises DataplaneError `no_tap`, `not_attached`."""
        with self._lock:
            attachment = self._attachments.get(device)
            if attachment is None or not attachment.confirmed:
                raise DataplaneError("not_attached", f"{device}: no worker has it", retry=True)
            return attachment.own_figures(self._tap_of(attachment, tap))

    def feed(self, device: str, stage: int, fd: int) -> None:
        """Give one more file to a tap (its id), or to a stage: -1 for the chain's first, -2 for the second.

        `fd` stays the caller's. Raises DataplaneError as `configure`, `no_tap` if it is not there or takes none.
        """
        with self._claimed(device) as attachment:
            deadline = time.monotonic() + REQUEST_TIMEOUT_S
            if stage >= 0:
                held: Held | None = self._tap_of(attachment, stage)
            else:
                held = attachment.stages[-1 - stage] if -1 - stage < len(attachment.stages) else None
            if held is None:
                raise DataplaneError("no_tap", f"{attachment.name}: no stage {-1 - stage} is at work", retry=False)
            area = held.setup.area

            def request(sequence: int) -> Request:
                return Feed(sequence, attachment.slot, attachment.serial, area)

            reply, _ = self._ask(attachment, request, deadline, [fd])
            if reply.error:
                raise DataplaneError("no_tap", f"{attachment.name}: {_errno_text(reply.error)}", retry=False)

    @staticmethod
    def _tap_of(attachment: Attachment, tap: int) -> Held:
        for held in attachment.taps:
            if held.tap == tap:
                return held
        raise DataplaneError("no_tap", f"{attachment.name}: has no tap {tap}", retry=False)

    # -- figures and health

    def counters(self) -> Mapping[str, DeviceCounters]:
        """Return the figures of every device that is attached, and the last ones of those that were lost.

        Read from shared memory: the workers do not notice. Works after `close`, too.
        """
        with self._lock:
            now = {device: held.figures() for device, held in self._attachments.items() if held.confirmed}
            return {**self._last, **now}

    @property
    def devices_lost(self) -> int:
        """How many devices workers had to let go of because reading failed, since the start."""
        with self._lock:
            return self._devices_lost

    def healthy(self) -> list[str]:
        """Return one reason for each worker that is gone or does not answer within `PING_TIMEOUT_S`."""
        with self._lock:
            if not self._running or self._closing:
                return ["the data plane is not running"]
        return [reason for post in self._posts if (reason := self._complaint(post)) is not None]

    def close(self) -> None:
        """Stop the workers, killing those that do not exit within `STOP_TIMEOUT_S`, and all threads.

        When this returns no worker holds a device, unless one survived SIGKILL, which is logged. The last
        figures stay in `counters`. Calling it again, or without `start`, does nothing.
        """
        with self._lock:
            self._closing = True
            self._lock.notify_all()
            self._poke()
        if self._watcher is not None:
            self._watcher.join(STOP_TIMEOUT_S + 2 * KILL_TIMEOUT_S)
        if self._line_reader is not None:
            self._line_reader.close(KILL_TIMEOUT_S)

    # -- callers' side

    def _await_up(self, post: _Post, deadline: float) -> None:
        with self._lock:
            self._lock.wait_for(lambda: post.due is None or post.deaths > 0, deadline - time.monotonic())
            worker, reason = post.live, post.reason
        if worker is not None:
            try:
                worker.ping(deadline)
            except PeerGoneError:
                with self._lock:
                    self._lock.wait_for(lambda: post.live is not worker, EXIT_TIMEOUT_S)
                    reason = post.reason
            except (NotAskedError, NoAnswerError):
                reason = f"no answer for {START_TIMEOUT_S:g} s"
            else:
                return
        raise DataplaneError("worker_start", f"worker {post.index} does not come up: {reason}", retry=False)

    def _reserve(self, device: str, name: str, mode: Mode, work: Work, deadline: float) -> Attachment:
        """Make a pending attachment with the worker that has those it exchanges packets with, or has the fewest."""
        if len(name.encode()) > NAME_MAX_BYTES:
            raise DataplaneError("attach_refused", f"name: over {NAME_MAX_BYTES} bytes", retry=False)
        with self._lock:
            # The watcher itself is the one that would bring a worker: it must not wait for it.
            if threading.current_thread() is not self._watcher:
                self._lock.wait_for(
                    lambda: self._closing or not self._running or any(post.live for post in self._posts),
                    deadline - time.monotonic(),
                )
            if self._closing or not self._running:
                raise DataplaneError("not_running", "the data plane is not running", retry=False)
            held = self._attachments.get(device)
            if held is not None:
                if held.busy:
                    raise _busy(held)
                raise DataplaneError(
                    "already_attached", f"{held.name}: already with worker {held.worker.index}", retry=False
                )
            waits_s = self._crashes.waits_s(device, work.chain, time.monotonic())
            if waits_s:
                raise DataplaneError(
                    "processor_crashed",
                    f"{name}: a processor of its chain crashes again and again (its history says which); it is read "
                    "again after a while, longer each time",
                    retry=True,
                )
            live = [post.live for post in self._posts if post.live is not None]
            if not live:
                reasons = "; ".join(f"worker {post.index}: {post.reason}" for post in self._posts)
                raise DataplaneError("no_worker", f"{name}: no worker is running ({reasons})", retry=True)
            sends_to = targets(work.chain)
            worker = self._of_most(self._neighbours.of({name, *sends_to})) or max(
                live, key=lambda candidate: len(candidate.free_slots)
            )
            if not worker.free_slots:
                limit = len(live) * self._devices_per_worker
                raise DataplaneError(
                    "worker_full", f"{name}: the workers hold {limit} devices, their limit", retry=False
                )
            self._serial += 1
            attachment = Attachment(
                device, name, mode, self._new_session(), worker, worker.free_slots.pop(), self._serial, work
            )
            self._attachments[device] = attachment
            self._neighbours.put(device, {name, *sends_to})
            return attachment

    def _meeting_place(self, attachment: Attachment, sends_to: frozenset[str]) -> WorkerProcess:
        """Under the lock: the worker where a device meets all that it will exchange packets with."""
        keys = self._neighbours.of({attachment.name, *sends_to})
        return self._of_most(keys) or attachment.worker

    def _of_most(self, keys: Collection[str]) -> WorkerProcess | None:
        """Under the lock: the live worker with most of these devices, those with more stages counting more."""
        weights: dict[WorkerProcess, int] = {}
        for key in keys:
            held = self._attachments.get(key)
            if held is not None and held.confirmed:
                # A tap ends when its device is moved.
                weight = 1 + len(held.stages) + 1000 * len(held.taps)
                weights[held.worker] = weights.get(held.worker, 0) + weight
        return max(weights, key=lambda worker: weights[worker]) if weights else None

    def _gather(self, attachment: Attachment, worker: WorkerProcess, sends_to: frozenset[str]) -> None:
        """Bring everything that a device exchanges packets with to its worker."""
        with self._lock:
            keys = self._neighbours.of({attachment.name, *sends_to})
            elsewhere = [
                held
                for key in keys
                if (held := self._attachments.get(key)) is not None
                and held is not attachment
                and held.confirmed
                and held.worker is not worker
            ]
        for each in elsewhere:
            try:
                with self._claimed(each.device, attachment) as held:
                    if held.worker is not worker:
                        self._move(held, worker)
            except DataplaneError as error:
                if error.code != "not_attached":  # it went while others were at work on it
                    raise

    def _move(self, held: Attachment, worker: WorkerProcess) -> None:
        """Hand a device from its worker to another. What the kernel queues for it waits meanwhile.

        Everything that can be had before the one lets go is had before: up to there an error changes nothing. If the
        other does not take it then, it is lost as if its worker had died, and told of; what was not the workers' doing
        is raised as well.
        """

        def request(sequence: int) -> Request:
            return Release(sequence, held.slot, held.serial)

        self._see_up(held, worker, time.monotonic() + REQUEST_TIMEOUT_S)
        with self._lock:
            if self._posts[worker.index].live is not worker:
                raise DataplaneError("worker_gone", f"{_where(held, worker)} died", retry=True)
            if not worker.free_slots:
                raise DataplaneError("worker_full", f"{held.name}: worker {worker.index} is full", retry=True)
            slot = worker.free_slots.pop()
        made: _Made = [], []
        fd: int | None = None
        try:
            made = self._stages(held, held.work, (), anew=True)
            deadline = time.monotonic() + REQUEST_TIMEOUT_S  # that may have taken its time
            reply, fd = self._ask(held, request, deadline, ())
            if reply.error:
                raise DataplaneError("worker_gone", f"{held.name}: {_errno_text(reply.error)}", retry=True)
            with self._lock:
                if self._attachments.get(held.device) is not held:
                    return  # its worker died right after, and the watcher has told of it
                held.leave()
                ended = self._taken_taps(held)
                held.confirmed = False
                held.worker.free_slots.append(held.slot)
                held.stages = []
                self._serial += 1
                held.worker, held.serial = worker, self._serial
                held.slot, slot = slot, -1
            try:
                self._tell_taps(held, ended, "the interface went to another worker")
                if fd is None:  # no descriptor of ours was free for it
                    raise DataplaneError("worker_gone", f"{held.name}: {_errno_text(errno.EMFILE)}", retry=True)
                self._hand_over(held, fd, made, deadline, then="changing")
            except BaseException as error:
                with self._lock:
                    self._keep(held)
                    self._devices_lost += 1
                self._tell_lost([(held, str(error) or type(error).__name__)])
                if not isinstance(error, DataplaneError):
                    raise
        finally:
            close_all([*made[1], *([] if fd is None else [fd])])
            if slot >= 0:
                with self._lock:
                    worker.free_slots.append(slot)

    def _see_up(self, attachment: Attachment, worker: WorkerProcess, deadline: float) -> None:
        """Return once a worker has ever answered: it may just be slow to start, which is no reason to kill it."""
        if worker.answered:
            return
        try:
            worker.ping(deadline)
        except (NoAnswerError, NotAskedError):
            raise self._timeout(attachment, worker) from None
        except PeerGoneError:
            self._see_dead(worker, attachment.name, EXIT_TIMEOUT_S)
            raise DataplaneError("worker_gone", f"{_where(attachment, worker)} died", retry=True) from None

    def _hand_over(
        self, attachment: Attachment, fd: int, made: _Made, deadline: float, then: Busy | None = None
    ) -> None:
        """Give `fd` and the work to the attachment's worker. Raises DataplaneError; no worker has it then.

        The descriptors in `made` are closed, and gone from it.
        """

        def request(sequence: int) -> Request:
            return Attach(sequence, attachment.slot, attachment.serial)

        stages, files = made
        try:
            setup = _setup(attachment, attachment.work, stages, [])
            failpoints.reach("dataplane.hand_over.before", fails=True)
            with self._lock:
                attachment.coming = attachment.work, [stage for stage in stages if stage is not None]
            body = written(setup)
            files.append(body)
            reply, _ = self._ask(attachment, request, deadline, [fd, body, *files[:-1]])
            failpoints.reach("dataplane.hand_over.after")
        except OSError as failure:
            raise DataplaneError(
                "attach_refused", f"{attachment.name}: {_errno_text(failure.errno or 0)}", retry=False
            ) from failure
        finally:
            close_all(files)
            files.clear()
        _raise_refusal(attachment, reply)
        with self._lock:
            if self._attachments.get(attachment.device) is not attachment:
                raise DataplaneError("worker_gone", f"{_where(attachment)} died", retry=True)
            attachment.stages, attachment.coming = stages, None
            attachment.name_figures(json.loads(reply.text))
            attachment.confirmed = True
            attachment.busy = then
            self._lock.notify_all()
            self._last.pop(attachment.device, None)
            if stages:
                self._poke()  # from now on the loop is looked at

    def _reconfigure(
        self,
        attachment: Attachment,
        work: Work,
        taps: Sequence[Held],
        files_of_tap: Sequence[int] = (),
    ) -> None:
        """Have the worker change the stages. `files_of_tap` are those of a tap that is new, the first of `taps`."""

        def request(sequence: int) -> Request:
            return Configure(sequence, attachment.slot, attachment.serial)

        with self._lock:
            old = [held for held in attachment.stages if held is not None]
        stages, files = self._stages(attachment, work, old)
        deadline = time.monotonic() + REQUEST_TIMEOUT_S  # that may have taken its time
        try:
            with self._lock:
                attachment.coming = work, [stage for stage in (*taps, *stages) if stage is not None]
            body = written(_setup(attachment, work, stages, taps))
            files.append(body)
            reply, _ = self._ask(attachment, request, deadline, [body, *files_of_tap, *files[:-1]])
        except OSError as failure:
            raise DataplaneError(
                "attach_refused", f"{attachment.name}: {_errno_text(failure.errno or 0)}", retry=True
            ) from failure
        finally:
            close_all(files)
        _raise_refusal(attachment, reply)
        with self._lock:
            if self._attachments.get(attachment.device) is not attachment:
                raise DataplaneError("worker_gone", f"{_where(attachment)} died", retry=True)
            if work.chain != attachment.work.chain:
                self._crashes.forget(attachment.device)
            attachment.stages, attachment.taps, attachment.work, attachment.coming = stages, list(taps), work, None
            attachment.name_figures(json.loads(reply.text))
            self._poke()

    def _stages(self, attachment: Attachment, work: Work, old: Sequence[Held], *, anew: bool = False) -> _Made:
        """A chain's stages as a worker is to be told, with the descriptors of the new ones, in order.

        `anew`: the worker is one that has none of the device's stages yet.
        """
        with self._lock:
            bypassed = self._crashes.bypassed(attachment.device, work.chain)
            areas = list(range(layout.AREAS)) if anew else attachment.free_areas()
        by_area = {held.setup.area: held for held in old}
        same = unchanged([held.setup for held in old], work.chain)
        stages: list[Held | None] = []
        files: list[int] = []
        try:
            for place, (stage, kept) in enumerate(zip(work.chain, same, strict=True)):
                if place in bypassed:
                    stages.append(None)
                elif kept is not None:
                    held = by_area[kept.area]
                    setup = StageSetup(kept.area, place, stage, 0)
                    stages.append(Held(setup, held.figures, held.memory))
                else:
                    made, own = self._provisions.stage(attachment.device, attachment.name, place, areas.pop(0), stage)
                    stages.append(made)
                    files += own
        except BaseException:
            close_all(files)
            raise
        return stages, files

    def _ask(
        self, attachment: Attachment, request: Callable[[int], Request], deadline: float, fds: Sequence[int]
    ) -> tuple[Reply, int | None]:
        """Ask an attachment's worker. One that has the request and does not answer is killed: nobody could say what
        it holds. Raises DataplaneError `worker_timeout`, `worker_gone`; OSError if `fds` cannot be sent.
        """
        worker = attachment.worker
        try:
            return worker.ask_back(request, deadline, fds)
        except NotAskedError:
            raise self._timeout(attachment) from None
        except NoAnswerError:
            self._log.error("worker killed: it does not answer", worker=worker.index, device=attachment.name)
            self._see_dead(worker, attachment.name, 0.0)
            raise self._timeout(attachment) from None
        except PeerGoneError:
            self._see_dead(worker, attachment.name, EXIT_TIMEOUT_S)
            raise DataplaneError("worker_gone", f"{_where(attachment)} died", retry=True) from None

    @staticmethod
    def _timeout(attachment: Attachment, worker: WorkerProcess | None = None) -> DataplaneError:
        message = f"{_where(attachment, worker)} has not answered for {REQUEST_TIMEOUT_S:g} s"
        return DataplaneError("worker_timeout", message, retry=True)

    @contextmanager
    def _claimed(self, device: str, beside: Attachment | None = None) -> Iterator[Attachment]:
        """An attachment that nobody else changes meanwhile, `beside` one that the caller has claimed already.

        Raises DataplaneError `not_attached`, `device_busy`.
        """
        with self._lock:
            attachment = self._claim(device, "changing", beside)
            if attachment is None:
                raise DataplaneError("not_attached", f"{device}: no worker has it", retry=True)
        try:
            yield attachment
        finally:
            with self._lock:
                attachment.busy = None
                self._lock.notify_all()

    def _claim(self, device: str, busy: Busy, beside: Attachment | None) -> Attachment | None:
        """Under the lock: wait until nobody else changes a device, and claim it; None if it is not there any more.

        Raises DataplaneError `device_busy` after `REQUEST_TIMEOUT_S`, at once where it comes or goes. What is asked of
        a worker afterwards has its own deadline: one is killed for not answering, and must have had the time to.
        """
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        try:
            while (held := self._attachments.get(device)) is not None and held.busy:
                # Who waits for another holds its own meanwhile: waiting for such a one could go in a circle.
                in_circle = beside is not None and held.waits
                # And the watcher's thread brings the workers that others wait for.
                if held.busy != "changing" or in_circle or threading.current_thread() is self._watcher:
                    raise _busy(held)
                if beside is not None:
                    beside.waits = True
                if not self._lock.wait(max(0.0, deadline - time.monotonic())):
                    raise _busy(held)
        finally:
            if beside is not None:
                beside.waits = False
        if held is not None:
            held.busy = busy
        return held

    def _see_dead(self, worker: WorkerProcess, device: str, patience_s: float) -> None:
        """Wait for a worker that is about to die, then kill it; return when it is dead, so has no file open."""
        if worker.wait_dead(time.monotonic() + patience_s):
            return
        worker.kill()
        if not worker.wait_dead(time.monotonic() + KILL_TIMEOUT_S):
            with self._lock:
                held = self._attachments.get(device)
                if held is not None and held.confirmed:
                    held.busy = None
                    self._lock.notify_all()
            raise DataplaneError(
                "worker_stuck", f"{device}: worker {worker.index} (pid {worker.pid}) survives SIGKILL", retry=True
            )

    def _complaint(self, post: _Post) -> str | None:
        with self._lock:
            worker = post.live
            if worker is None:
                in_s = max(0.0, (post.due or 0.0) - time.monotonic())
                return f"worker {post.index} is gone ({post.reason}); the next one starts in {in_s:.1f} s"
        try:
            worker.ping(time.monotonic() + PING_TIMEOUT_S)
        except (NotAskedError, NoAnswerError):
            return f"worker {post.index} (pid {worker.pid}) has not answered for {PING_TIMEOUT_S:g} s"
        except PeerGoneError:
            return f"worker {post.index} (pid {worker.pid}) is gone"
        except OSError as error:  # no memory to ask with, say
            return f"worker {post.index} (pid {worker.pid}) cannot be asked: {error.strerror}"
        return None

    # -- under the lock

    def _release(self, attachment: Attachment) -> None:
        """Forget an attachment whose device no live worker holds, if it is still known."""
        if self._attachments.get(attachment.device) is attachment:
            del self._attachments[attachment.device]
            self._neighbours.remove(attachment.device)
            attachment.worker.free_slots.append(attachment.slot)
            self._lock.notify_all()  # who waits for it need not any more

    def _keep(self, attachment: Attachment) -> DeviceCounters:
        """Forget an attachment, but keep its last figures."""
        final = attachment.figures()
        self._release(attachment)
        self._last.pop(attachment.device, None)
        self._last[attachment.device] = final
        while len(self._last) > LAST_FIGURES_MAX:
            del self._last[next(iter(self._last))]
        return final

    def _poke(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    # -- the watcher

    def _watch(self) -> None:
        assert self._epoll is not None  # made by `start`, before this thread
        while True:
            with self._lock:
                if self._closing:
                    break
            self._start_due()
            self._kill_stuck()
            # Fixed before anything is done: a worker started in this turn may have the fd numbers of one that
            # was buried in it, and must not be taken for it.
            ready = [(fd, self._watched.get(fd)) for fd, _ in self._epoll.poll(self._until_due_s())]
            for fd, worker in ready:
                if worker is None:
                    os.eventfd_read(self._wake)
                elif self._watched.get(fd) is worker:
                    self._look(fd, worker)
            self._tell_poked()
        self._stop_all()
        with self._lock:
            wake, self._wake = self._wake, -1
        self._epoll.close()
        os.close(wake)

    def _look(self, fd: int, worker: WorkerProcess) -> None:
        if fd == worker.pidfd:
            self._bury(worker)
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        with self._lock:
            lost = self._take_lost(worker)
        self._tell_lost(lost)
        self._poked = self._on_poke is not None

    def _tell_poked(self) -> None:
        """Call `on_poke` for all pokes since it was last called, once `POKE_S` have passed since then."""
        now = time.monotonic()
        if not self._poked or self._on_poke is None or now < self._poke_due:
            return
        self._poked, self._poke_due = False, now + POKE_S
        try:
            self._on_poke()
        except Exception:  # noqa: BLE001 - whatever it is, see on_exit
            self._log.exception("on_poke failed")

    def _kill_stuck(self) -> None:
        """Kill workers whose loop has not turned for `STUCK_S`, though there was something to do."""
        now = time.monotonic()
        for post in self._posts:
            worker = post.live
            if worker is None:
                continue
            turn = worker.box.turn()
            if turn is None or turn != worker.turn:
                worker.turn, worker.turned = turn, now
            elif now - worker.turned >= STUCK_S and not worker.stuck:
                worker.stuck = True
                self._log.error("worker killed: it is stuck", worker=worker.index, pid=worker.pid)
                worker.kill()

    def _start_due(self) -> None:
        for post in self._posts:
            with self._lock:
                # While `start` has not returned, a worker that fails is not tried again.
                if post.due is None or post.due > time.monotonic() or (post.deaths and not self._running):
                    continue
            self._spawn(post)

    def _until_due_s(self) -> float | None:
        with self._lock:
            due = [post.due for post in self._posts if post.due is not None and (self._running or not post.deaths)]
            if any(held.work.chain or held.taps for held in self._attachments.values()):
                due.append(time.monotonic() + LOOK_S)
        if self._poked:
            due.append(self._poke_due)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _spawn(self, post: _Post) -> None:
        packets_per_s = None if self._line_reader is None else self._packets_per_s
        try:
            failpoints.reach("dataplane.spawn.before", fails=True)
            worker = WorkerProcess(
                post.index,
                python=self._python,
                slots=self._devices_per_worker,
                packets_per_s=packets_per_s,
                custom=self._processors,
            )
        except OSError as failure:
            with self._lock:
                self._vacate(post, f"cannot be started: {failure}", time.monotonic())
                self._lock.notify_all()
            self._log.error("worker cannot be started", worker=post.index, error=str(failure))
            return
        assert self._epoll is not None  # open as long as this thread runs
        for fd in (worker.pidfd, worker.notice):
            self._watched[fd] = worker
            self._epoll.register(fd, select.EPOLLIN)
        if self._line_reader is not None and worker.lines is not None:
            self._line_reader.add(worker.lines)
        failpoints.reach("dataplane.spawn.after")
        with self._lock:
            post.live = worker
            post.due = None
            self._lock.notify_all()

    def _vacate(self, post: _Post, reason: str, started: float, *, blamed: bool = False) -> None:
        now = time.monotonic()
        post.live = None
        post.reason = reason
        post.deaths = 1 if blamed or now - started >= STEADY_S else post.deaths + 1
        post.due = now + respawn_delay_s(post.deaths)

    def _bury(self, worker: WorkerProcess) -> None:
        """Take a dead worker out of the tables, start the next one if it is due, tell the caller."""
        assert self._epoll is not None  # open as long as this thread runs
        for fd in (worker.pidfd, worker.notice):
            self._epoll.unregister(fd)
            del self._watched[fd]
        status = worker.reap()
        failpoints.reach("dataplane.buried")
        with self._lock:
            lost = self._take_lost(worker)
            last: dict[str, DeviceCounters] = {}
            crash = self._blame(worker, status)
            taps: list[tuple[Attachment, list[_EndedTap]]] = []
            for held in [held for held in self._attachments.values() if held.worker is worker]:
                if not held.confirmed:
                    self._release(held)
                    continue
                taps.append((held, self._taken_taps(held)))
                final = self._keep(held)
                if held.busy != "detaching":  # else who does gets the figures
                    last[held.device] = final
            # A crash that has its own back-off must not keep the other devices waiting.
            self._vacate(self._posts[worker.index], status, worker.started, blamed=crash is not None)
            report = self._running and not self._closing
            self._lock.notify_all()
        self._tell_lost(lost)
        for held, ended in taps:
            self._tell_taps(held, ended, f"its worker died: {status}")
        if not report:
            return
        self._start_due()
        self._log.warning("worker died", worker=worker.index, pid=worker.pid, status=status, devices=sorted(last))
        exit_ = WorkerExit(worker.index, worker.pid, status, frozenset(last), last, crash)
        try:
            self._on_exit(exit_)
        except Exception:  # noqa: BLE001 - whatever it is, see below
            # The caller's trouble must not leave the workers without a watcher.
            self._log.exception("on_exit failed", worker=worker.index)

    def _blame(self, worker: WorkerProcess, status: str) -> Crash | None:
        """Under the lock, with the worker's attachments in place: the processor that a worker died of, if one is."""
        remains = worker.box.read()
        if remains is None or (status == "signal SIGKILL" and not worker.stuck):
            return None
        held = next(
            (held for held in self._attachments.values() if held.worker is worker and held.serial == remains.serial),
            None,
        )
        found = held.by_area(remains.area) if held is not None else None
        if held is None or found is None:
            return None
        work, stage = found
        place = stage.setup.place
        then = self._crashes.crashed(held.device, work.chain, place, time.monotonic())
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

    def _taken_taps(self, held: Attachment) -> list["_EndedTap"]:
        """Under the lock: take its taps off an attachment that ends; their ids and last figures."""
        taps, held.taps = held.taps, []
        return [(tap.tap, held.own_figures(tap)) for tap in taps if tap.tap is not None]

    def _tell_taps(self, held: Attachment, ended: list["_EndedTap"], reason: str) -> None:
        for tap, figures in ended:
            if self._on_tap_ended is None:
                continue
            try:
                self._on_tap_ended(held.device, tap, figures, reason)
            except Exception:  # noqa: BLE001 - whatever it is, see on_exit
                self._log.exception("on_tap_ended failed", device=held.name)

    def _take_lost(self, worker: WorkerProcess) -> list[tuple[Attachment, str]]:
        """Under the lock: forget the devices that `worker` has let go of by itself; return them and why."""
        lost: list[tuple[Attachment, str]] = []
        for held in [held for held in self._attachments.values() if held.worker is worker and held.confirmed]:
            error = worker.counters.lost(held.slot)
            if error:
                self._keep(held)
                self._devices_lost += 1
                lost.append((held, _errno_text(error)))
        return lost

    def _tell_lost(self, lost: list[tuple[Attachment, str]]) -> None:
        for held, reason in lost:
            with self._lock:
                ended = self._taken_taps(held)
            self._tell_taps(held, ended, reason)
            self._log.warning("device lost", device=held.name, reason=reason)
            if self._on_device_lost is None:
                continue
            try:
                self._on_device_lost(held.device, reason)
            except Exception:  # noqa: BLE001 - whatever it is, see below
                # As for on_exit.
                self._log.exception("on_device_lost failed", device=held.name)

    def _stop_all(self) -> None:
        living = list({worker.pid: worker for worker in self._watched.values()}.values())
        for worker in living:
            worker.end_control()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for worker in living:
            if not worker.wait_dead(deadline):
                self._log.warning("worker killed: it does not exit", worker=worker.index, pid=worker.pid)
                worker.kill()
        deadline = time.monotonic() + KILL_TIMEOUT_S
        for worker in living:
            if worker.wait_dead(deadline):
                self._bury(worker)
            else:
                self._log.error("worker survives SIGKILL", worker=worker.index, pid=worker.pid)


def _errno_text(error: int) -> str:
    return f"{errno.errorcode.get(error, error)}: {os.strerror(error)}"


def _busy(held: Attachment) -> DataplaneError:
    doing = "changed by another call" if held.busy == "changing" else "attached or detached"
    return DataplaneError("device_busy", f"{held.name}: being {doing}", retry=True)


def _where(held: Attachment, worker: WorkerProcess | None = None) -> str:
    worker = worker or held.worker
    return f"{held.name}: worker {worker.index} (pid {worker.pid})"


def _setup(held: Attachment, work: Work, stages: Sequence[Held | None], taps: Sequence[Held]) -> Setup:
    """What a worker is told; taps see packets as the wire would, so they are before all stages."""
    told = [each.setup for each in (*taps, *stages) if each is not None]
    return Setup(held.name, held.mode, work.mtu, work.vnet_hdr, tuple(told))


def _raise_refusal(held: Attachment, reply: Reply) -> None:
    if reply.error == errno.EBADRQC:
        raise DataplaneError("stage_refused", f"{held.name}: {reply.text}", retry=False)
    if reply.error:
        retry = reply.error in (errno.EMFILE, errno.ENOMEM)
        raise DataplaneError("attach_refused", f"{_where(held)}: {_errno_text(reply.error)}", retry=retry)
