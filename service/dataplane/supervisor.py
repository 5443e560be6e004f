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
import os
import select
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import structlog

from service import failpoints
from service.dataplane.line_reader import LineReader
from service.dataplane.wire import NAME_MAX_BYTES, Attach, Detach, Mode
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
class DeviceCounters:
    """What a device's worker has read and written since it was attached, by class of `packet.classify.CLASSES`.

    Each figure is (packets, bytes); classes without a packet are left out.
    """

    session: str
    """Unique to the attach. All figures start at zero with it and only grow."""
    from_kernel: Mapping[str, tuple[int, int]]
    to_kernel: Mapping[str, tuple[int, int]]


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


@dataclass(slots=True, eq=False)
class _Attachment:
    device: str
    name: str
    session: str
    worker: WorkerProcess
    slot: int
    serial: int
    confirmed: bool = False
    busy: bool = True
    """A caller is attaching or detaching it."""

    def figures(self) -> DeviceCounters:
        slot = self.worker.counters.read(self.slot)
        return DeviceCounters(self.session, slot.from_kernel, slot.to_kernel)


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
    ) -> None:
        """Take the settings; `start` starts.

        `on_exit` is told of every worker that died on its own; its devices are then no longer attached.
        `on_device_lost` gets a device and why its worker let go of it (it was deleted, most likely); `detach`
        then returns its last figures.
        `packet_log` gets the device's name, a line, and how many of the device's packets before it were not
        shown, because of `packets_per_s` (for each worker) or because nobody read in time; an empty line
        carries the number alone. None: packets are not put in words.
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
        self._log = structlog.get_logger("tunledger.dataplane")

        self._lock = threading.Condition()
        self._posts = [_Post(index) for index in range(workers)]
        self._attachments: dict[str, _Attachment] = {}
        self._last: dict[str, DeviceCounters] = {}
        self._serial = 0
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

    def attach(self, device: str, fd: int, *, mode: Mode, name: str | None = None) -> str:
        """Hand a TUN or TAP to a worker, which reads it from now on; return the new session.

        `device` is the caller's key, `name` what packet lines call it (by default the key). `fd` is this
        method's: it is closed in every case before this returns or raises. Packets must come without
        `IFF_PI` and `IFF_VNET_HDR` headers.

        Raises DataplaneError: `already_attached`; `device_busy` while another call attaches or detaches it;
        `worker_full`; `attach_refused` with the kernel's reason; and, worth another try, `no_worker`,
        `worker_gone` or `worker_timeout`, the last after `REQUEST_TIMEOUT_S`. After an error no worker holds
        the device. Source: unix(7), SCM_RIGHTS.
        """
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        try:
            attachment = self._reserve(device, device if name is None else name, deadline)
            try:
                self._hand_over(attachment, fd, mode, deadline)
            except BaseException:
                with self._lock:
                    self._release(attachment)
                raise
        finally:
            # An fd that was none has been reported as such already.
            with contextlib.suppress(OSError):
                os.close(fd)
        return attachment.session

    def detach(self, device: str) -> DeviceCounters | None:
        """Take a device away from its worker and return its final figures; None if there are none.

        When this returns no worker holds the device: its worker has said so, or has died, if need be by
        SIGKILL after `REQUEST_TIMEOUT_S`, which then costs its other devices their worker, too (`on_exit`).
        A device that was lost before gives its last figures, once.

        Raises DataplaneError: `device_busy` while another call attaches or detaches it, `worker_stuck` if
        the worker survives SIGKILL.
        """
        with self._lock:
            attachment = self._attachments.get(device)
            if attachment is None:
                return self._last.pop(device, None)
            if attachment.busy:
                raise DataplaneError("device_busy", f"{attachment.name}: being attached or detached", retry=True)
            attachment.busy = True
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
            self._release(attachment)
            return final

    def attached(self) -> frozenset[str]:
        """Return the devices that a live worker holds now."""
        with self._lock:
            return frozenset(device for device, held in self._attachments.items() if held.confirmed)

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

    def _reserve(self, device: str, name: str, deadline: float) -> _Attachment:
        """Make a pending attachment with the live worker that has the fewest devices."""
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
                    raise DataplaneError("device_busy", f"{held.name}: being attached or detached", retry=True)
                raise DataplaneError(
                    "already_attached", f"{held.name}: already with worker {held.worker.index}", retry=False
                )
            live = [post.live for post in self._posts if post.live is not None]
            if not live:
                reasons = "; ".join(f"worker {post.index}: {post.reason}" for post in self._posts)
                raise DataplaneError("no_worker", f"{name}: no worker is running ({reasons})", retry=True)
            worker = max(live, key=lambda candidate: len(candidate.free_slots))
            if not worker.free_slots:
                limit = len(live) * self._devices_per_worker
                raise DataplaneError(
                    "worker_full", f"{name}: the workers hold {limit} devices, their limit", retry=False
                )
            self._serial += 1
            attachment = _Attachment(device, name, self._new_session(), worker, worker.free_slots.pop(), self._serial)
            self._attachments[device] = attachment
            return attachment

    def _hand_over(self, attachment: _Attachment, fd: int, mode: Mode, deadline: float) -> None:
        worker = attachment.worker
        where = f"{attachment.name}: worker {worker.index} (pid {worker.pid})"
        timeout = DataplaneError("worker_timeout", f"{where} has not answered for {REQUEST_TIMEOUT_S:g} s", retry=True)

        def request(sequence: int) -> Attach:
            return Attach(sequence, attachment.slot, attachment.serial, mode, attachment.name)

        try:
            if not worker.answered:
                # It may just be slow to start, which is no reason to kill it: see first, send then.
                try:
                    worker.ping(deadline)
                except NoAnswerError:
                    raise timeout from None
            failpoints.reach("dataplane.hand_over.before", fails=True)
            error = worker.ask(request, deadline, fd)
            failpoints.reach("dataplane.hand_over.after")
        except NotAskedError:
            raise timeout from None
        except NoAnswerError:
            # The fd is on its way or already there. It must not stay with a worker that nobody can ask back.
            self._log.error("worker killed: it does not answer", worker=worker.index, device=attachment.name)
            self._see_dead(worker, attachment.name, 0.0)
            raise timeout from None
        except PeerGoneError:
            self._see_dead(worker, attachment.name, EXIT_TIMEOUT_S)
            raise DataplaneError("worker_gone", f"{where} died", retry=True) from None
        except OSError as failure:
            raise DataplaneError(
                "attach_refused", f"{attachment.name}: {_errno_text(failure.errno or 0)}", retry=False
            ) from failure
        if error:
            retry = error in (errno.EMFILE, errno.ENOMEM)
            raise DataplaneError("attach_refused", f"{where}: {_errno_text(error)}", retry=retry)
        with self._lock:
            if self._attachments.get(attachment.device) is not attachment:
                raise DataplaneError("worker_gone", f"{where} died", retry=True)
            attachment.confirmed = True
            attachment.busy = False
            self._last.pop(attachment.device, None)

    def _see_dead(self, worker: WorkerProcess, device: str, patience_s: float) -> None:
        """Wait for a worker that is about to die, then kill it; return when it is dead, so has no file open."""
        if worker.wait_dead(time.monotonic() + patience_s):
            return
        worker.kill()
        if not worker.wait_dead(time.monotonic() + KILL_TIMEOUT_S):
            with self._lock:
                held = self._attachments.get(device)
                if held is not None and held.confirmed:
                    held.busy = False
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

    def _release(self, attachment: _Attachment) -> None:
        """Forget an attachment whose device no live worker holds, if it is still known."""
        if self._attachments.get(attachment.device) is attachment:
            del self._attachments[attachment.device]
            attachment.worker.free_slots.append(attachment.slot)

    def _keep(self, attachment: _Attachment) -> DeviceCounters:
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
            # Fixed before anything is done: a worker started in this turn may have the fd numbers of one that
            # was buried in it, and must not be taken for it.
            ready = [(fd, self._watched.get(fd)) for fd, _ in self._epoll.poll(self._until_due_s())]
            for fd, worker in ready:
                if worker is None:
                    os.eventfd_read(self._wake)
                elif self._watched.get(fd) is worker:
                    self._look(fd, worker)
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
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _spawn(self, post: _Post) -> None:
        packets_per_s = None if self._line_reader is None else self._packets_per_s
        try:
            failpoints.reach("dataplane.spawn.before", fails=True)
            worker = WorkerProcess(
                post.index, python=self._python, slots=self._devices_per_worker, packets_per_s=packets_per_s
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

    def _vacate(self, post: _Post, reason: str, started: float) -> None:
        now = time.monotonic()
        post.live = None
        post.reason = reason
        post.deaths = 1 if now - started >= STEADY_S else post.deaths + 1
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
            for held in [held for held in self._attachments.values() if held.worker is worker]:
                if not held.confirmed:
                    self._release(held)
                    continue
                final = self._keep(held)
                if not held.busy:  # else somebody is detaching it and gets the figures
                    last[held.device] = final
            self._vacate(self._posts[worker.index], status, worker.started)
            report = self._running and not self._closing
            self._lock.notify_all()
        self._tell_lost(lost)
        if not report:
            return
        self._start_due()
        self._log.warning("worker died", worker=worker.index, pid=worker.pid, status=status, devices=sorted(last))
        exit_ = WorkerExit(worker.index, worker.pid, status, frozenset(last), last)
        try:
            self._on_exit(exit_)
        except Exception:  # noqa: BLE001 - whatever it is, see below
            # The caller's trouble must not leave the workers without a watcher.
            self._log.exception("on_exit failed", worker=worker.index)

    def _take_lost(self, worker: WorkerProcess) -> list[tuple[_Attachment, str]]:
        """Under the lock: forget the devices that `worker` has let go of by itself; return them and why."""
        lost: list[tuple[_Attachment, str]] = []
        for held in [held for held in self._attachments.values() if held.worker is worker and held.confirmed]:
            error = worker.counters.lost(held.slot)
            if error:
                self._keep(held)
                self._devices_lost += 1
                lost.append((held, _errno_text(error)))
        return lost

    def _tell_lost(self, lost: list[tuple[_Attachment, str]]) -> None:
        for held, reason in lost:
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
