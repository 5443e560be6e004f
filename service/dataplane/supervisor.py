"""The data plane as the service sees it: workers that run, devices handed to them and taken back, their figures.

Which interface should be processed, and what a lost one means, is the caller's business: after a worker died another
one is started, but nothing attached by itself. No packet is ever read here.

Theory of operation. The tables are the `roster`'s, under one lock. Three kinds of threads:

- callers, in the methods of `Supervisor`: each talks to a worker itself, one at a time, with a deadline
  (`WorkerProcess.ask`, by `handover`);
- the `watcher`, which starts workers, reaps and replaces them, and tells of their ends (`telling`);
- the line reader, if somebody wants packets in words.
"""

import contextlib
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import structlog

from service.dataplane import syscalls
from service.dataplane.attachment import Attachment, DeviceCounters, Ended, Held, StageStatus
from service.dataplane.contract import Mode
from service.dataplane.errors import DataplaneError, errno_text
from service.dataplane.handover import (
    EXIT_TIMEOUT_S,
    KILL_TIMEOUT_S,
    REQUEST_TIMEOUT_S,
    HandOver,
    take_back_offloads,
    take_back_offloads_of,
)
from service.dataplane.line_reader import LineReader
from service.dataplane.posts import Post
from service.dataplane.provisions import FilesFor, Provisions, close_all
from service.dataplane.ring import Ring
from service.dataplane.roster import DEVICES_PER_WORKER, Roster
from service.dataplane.telling import Telling, WorkerExit
from service.dataplane.watcher import STOP_TIMEOUT_S, Watcher
from service.dataplane.wire import Detach, Feed, Request
from service.dataplane.work import COUNT_ONLY, StageSetup, Work, targets
from service.dataplane.worker_process import (
    NoAnswerError,
    NotAskedError,
    PeerGoneError,
    WorkerProcess,
    close_everywhere,
)

START_TIMEOUT_S: Final = 10.0
PING_TIMEOUT_S: Final = 0.5

TAPS_MAX: Final = 8


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
        io_uring: bool = True,
        python: str = sys.executable,
        devices_per_worker: int = DEVICES_PER_WORKER,
        new_session: Callable[[], str] = lambda: str(uuid.uuid4()),
        processors: Mapping[str, str] | None = None,
        files_for: FilesFor | None = None,
        on_poke: Callable[[], None] | None = None,
        on_stage_ended: Callable[[Ended], None] | None = None,
    ) -> None:
        """Take the settings; `start` starts.

        `on_exit` is told of every worker that died on its own; its devices are then no longer attached.
        `on_device_lost` gets a device and why its worker let go of it (it was deleted, most likely); `detach`
        then returns its last figures.
        `packet_log` gets the device's name, a line, and how many of the device's packets before it were not
        shown, because of `packets_per_s` (for each worker) or because nobody read in time; an empty line
        carries the number alone. None: packets are not put in words.
        `io_uring`: whether workers try to have a ring (`ring`).
        `processors` are those of other packages (`registry.discover`). `files_for` is asked for the descriptors of
        stages that want some. `on_poke`: stages asked to be looked at, told at most once in `POKE_S`. `on_stage_ended`
        is told once of each stage that `files_for` gave files for, and of each tap that `untap` did not take away.
        Raises ValueError on a number below 1, and DataplaneError `unsupported` on a 32-bit machine.
        """
        if min(workers, packets_per_s, devices_per_worker) < 1:
            raise ValueError("workers, packets_per_s and devices_per_worker: at least 1 each")
        if sys.maxsize < 2**32:
            raise DataplaneError("unsupported", "the data plane needs a 64-bit machine", retry=False)
        self._python, self._devices_per_worker, self._packets_per_s = python, devices_per_worker, packets_per_s
        self._io_uring = io_uring
        self._processors = dict(processors or {})
        self._packet_log = packet_log
        self._provisions = Provisions(files_for)
        self._tell = Telling(on_exit, on_device_lost, on_stage_ended, on_poke)
        self._roster = Roster(workers=workers, devices_per_worker=devices_per_worker, new_session=new_session)
        self._hands = HandOver(self._roster, self._provisions, self._tell, self._poke)
        self._watcher: Watcher | None = None
        self._line_reader: LineReader | None = None
        self._started = False
        self._log = structlog.get_logger("tunledger.dataplane")

    def start(self) -> None:
        """Start the workers and return once each has answered.

        Raises DataplaneError `worker_start` if one does not within `START_TIMEOUT_S`; everything is then
        stopped again. A supervisor starts once.
        """
        with self._roster.lock:
            if self._started:
                raise DataplaneError("already_started", "the data plane was started before", retry=False)
            self._started = True
        if not syscalls.available():
            self._log.warning("workers are not kept from opening files: this machine's system calls are not filtered")
        if self._io_uring:
            self._try_ring()
        if self._packet_log is not None:
            self._line_reader = LineReader(self._packet_log)
        self._watcher = Watcher(self._roster, self._tell, self._new_worker, self._line_reader)
        self._watcher.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            for post in self._roster.posts:
                self._await_up(post, deadline)
        except BaseException:
            self.close()
            raise
        with self._roster.lock:
            self._roster.running = True
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
        `REQUEST_TIMEOUT_S`. After an error nobody here holds the device. Source: unix(7), SCM_RIGHTS.
        """
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        try:
            attachment = self._roster.reserve(device, device if name is None else name, mode, work, deadline)
            try:
                self._hands.gather(attachment, attachment.worker, targets(work.chain))
                self._hands.see_up(attachment, attachment.worker, time.monotonic() + REQUEST_TIMEOUT_S)
                made = self._hands.stages(attachment, work, ())
                with self._hands.told_unless_taken(attachment, made[0]):
                    self._hands.hand_over(attachment, fd, made, time.monotonic() + REQUEST_TIMEOUT_S)
            except BaseException:
                with self._roster.lock:
                    self._roster.release(attachment)
                raise
        except BaseException:
            with self._roster.lock:
                taken = device in self._roster.attachments  # by an earlier call, with offloads of its own
            if work.vnet_hdr and not taken:
                take_back_offloads(fd)
            raise
        finally:
            # An fd that was none has been reported as such already.
            with contextlib.suppress(OSError):
                close_everywhere(fd)
        return attachment.session

    def configure(self, device: str, work: Work) -> None:
        """Do something else with a device's packets from the next batch on; none is lost.

        Stages that the old chain and the new one have in common keep what they know. Of `work`, `vnet_hdr` must be
        as it was. Raises DataplaneError as `attach`, `not_attached`, and `device_busy` if others have changed it for
        `REQUEST_TIMEOUT_S`; after an error the old chain is at work, unless `on_device_lost` was told otherwise.
        """
        with self._roster.claimed(device) as attachment:
            if work.vnet_hdr != attachment.work.vnet_hdr:
                raise DataplaneError(
                    "attach_refused", f"{attachment.name}: vnet_hdr changes only with a new attach", retry=False
                )
            sends_to = targets(work.chain)
            with self._roster.lock:
                worker = self._roster.meeting_place(attachment, sends_to)
            if worker is not attachment.worker:
                self._hands.move(attachment, worker)
                with self._roster.lock:
                    if self._roster.attachments.get(device) is not attachment:
                        raise DataplaneError("worker_gone", f"{attachment.name}: lost on its way", retry=True)
            self._hands.gather(attachment, worker, sends_to)
            self._tell.ended(self._hands.reconfigure(attachment, work, attachment.taps))
            with self._roster.lock:
                self._roster.neighbours.put(device, {attachment.name, *sends_to})

    def detach(self, device: str) -> DeviceCounters | None:
        """Take a device away from its worker and return its final figures; None if there are none.

        When this returns no worker holds the device: its worker has said so, or has died, if need be by
        SIGKILL after `REQUEST_TIMEOUT_S`, which then costs its other devices their worker, too (`on_exit`).
        A device that was lost before gives its last figures, once.

        Raises DataplaneError: `device_busy` while another call attaches or detaches it, or if others have changed it
        for `REQUEST_TIMEOUT_S`; `worker_stuck` if the worker survives SIGKILL.
        """
        with self._roster.lock:
            self._roster.crashes.forget(device)
            attachment = self._roster.claim(device, "detaching", None)
            if attachment is None:
                return self._roster.last.pop(device, None)
        worker = attachment.worker
        deadline = time.monotonic() + REQUEST_TIMEOUT_S
        try:
            worker.ask(lambda sequence: Detach(sequence, attachment.slot, attachment.serial), deadline)
        except PeerGoneError:
            self._hands.see_dead(worker, attachment.name, EXIT_TIMEOUT_S)
        except (NotAskedError, NoAnswerError):
            self._log.error(
                "worker killed: it does not let go of a device", worker=worker.index, device=attachment.name
            )
            if attachment.work.vnet_hdr:
                take_back_offloads_of(attachment)
            self._hands.see_dead(worker, attachment.name, 0.0)
        with self._roster.lock:
            if self._roster.attachments.get(device) is not attachment:
                return self._roster.last.pop(device, None)  # the watcher was faster
            final = attachment.figures()
            ended = self._roster.ended(attachment, attachment.held(), "interface_gone")
            self._roster.release(attachment)
        self._tell.ended(ended)
        return final

    def attached(self) -> Mapping[str, Work]:
        """Return the devices that a live worker holds now, and what it was told to do."""
        with self._roster.lock:
            return {device: held.work for device, held in self._roster.attachments.items() if held.confirmed}

    def stages(self, device: str) -> list[StageStatus]:
        """Return how each stage of a device's chain is doing; nothing if it is not attached."""
        with self._roster.lock:
            attachment = self._roster.attachments.get(device)
            return attachment.statuses() if attachment is not None and attachment.confirmed else []

    def stage_memory(self, device: str) -> Mapping[int, memoryview]:
        """Return what the stages of a device share with the service, read-only, by place in the chain."""
        with self._roster.lock:
            attachment = self._roster.attachments.get(device)
            held = [] if attachment is None else attachment.stages
            return {place: each.memory for place, each in enumerate(held) if each is not None and each.memory}

    def tap(self, device: str, stage: Mapping[str, Any], files: Sequence[int] = ()) -> int:
        """Put a stage in front of a device's chain that is not in its spec; return its id.

        It sees what the wire would. `files` are descriptors for it; they stay the caller's. It ends with `untap`, or
        with the attach (`on_stage_ended`). Raises DataplaneError as `configure`, and `worker_full` beyond `TAPS_MAX`.
        """
        with self._roster.claimed(device) as attachment:
            if len(attachment.taps) >= TAPS_MAX:
                raise DataplaneError("worker_full", f"{attachment.name}: {TAPS_MAX} taps, its limit", retry=False)
            with self._roster.lock:
                tap = self._roster.new_stage_id()
                setup = StageSetup(attachment.free_areas()[-1], -1, stage)
            held, fds = self._provisions.stage(device, attachment.name, tap, setup, files)
            try:
                self._hands.reconfigure(attachment, attachment.work, [held, *attachment.taps], fds)
            finally:
                close_all(fds)
            return tap

    def untap(self, device: str, tap: int) -> Mapping[str, int]:
        """Take a tap away, and return its final figures. Raises DataplaneError as `configure`, and `no_tap`."""
        with self._roster.claimed(device) as attachment:
            held = self._tap_of(attachment, tap)
            ended = self._hands.reconfigure(
                attachment, attachment.work, [each for each in attachment.taps if each is not held]
            )
            return next(each.figures for each in ended if each.stage == tap)

    def tap_figures(self, device: str, tap: int) -> Mapping[str, int]:
        """Return a tap's figures as they are now. Raises DataplaneError `no_tap`, `not_attached`."""
        with self._roster.lock:
            attachment = self._roster.attachments.get(device)
            if attachment is None or not attachment.confirmed:
                raise DataplaneError("not_attached", f"{device}: no worker has it", retry=True)
            return attachment.own_figures(self._tap_of(attachment, tap))

    def feed(self, device: str, stage: int, fd: int) -> None:
        """Give one more file to the tap or stage with this id.

        `fd` stays the caller's. Raises DataplaneError as `configure`, `no_tap` if it is not there or takes none.
        """
        with self._roster.claimed(device) as attachment:
            deadline = time.monotonic() + REQUEST_TIMEOUT_S
            held = next((each for each in attachment.held() if each.id == stage), None)
            if held is None:
                raise DataplaneError("no_tap", f"{attachment.name}: that stage is at work no more", retry=False)
            area = held.setup.area

            def request(sequence: int) -> Request:
                return Feed(sequence, attachment.slot, attachment.serial, area)

            reply, _ = self._hands.ask(attachment, request, deadline, [fd])
            if reply.error:
                raise DataplaneError("no_tap", f"{attachment.name}: {errno_text(reply.error)}", retry=False)

    @staticmethod
    def _tap_of(attachment: Attachment, tap: int) -> Held:
        for held in attachment.taps:
            if held.id == tap:
                return held
        raise DataplaneError("no_tap", f"{attachment.name}: has no tap {tap}", retry=False)

    def counters(self) -> Mapping[str, DeviceCounters]:
        """Return the figures of every device that is attached, and the last ones of those that were lost.

        Read from shared memory: the workers do not notice. Works after `close`, too.
        """
        with self._roster.lock:
            now = {device: held.figures() for device, held in self._roster.attachments.items() if held.confirmed}
            return {**self._roster.last, **now}

    @property
    def devices_lost(self) -> int:
        """How many devices workers had to let go of because reading failed, since the start."""
        with self._roster.lock:
            return self._roster.devices_lost

    def healthy(self) -> list[str]:
        """Return one reason for each worker that is gone or does not answer within `PING_TIMEOUT_S`."""
        with self._roster.lock:
            if not self._roster.running or self._roster.closing:
                return ["the data plane is not running"]
        return [reason for post in self._roster.posts if (reason := self._complaint(post)) is not None]

    def close(self) -> None:
        """Stop the workers, killing those that do not exit within `STOP_TIMEOUT_S`, and all threads.

        When this returns no worker holds a device, unless one survived SIGKILL, which is logged. The last
        figures stay in `counters`. Calling it again, or without `start`, does nothing.
        """
        with self._roster.lock:
            self._roster.closing = True
            self._roster.lock.notify_all()
            self._poke()
        if self._watcher is not None:
            self._watcher.join(STOP_TIMEOUT_S + 2 * KILL_TIMEOUT_S)
        if self._line_reader is not None:
            self._line_reader.close(KILL_TIMEOUT_S)

    def _try_ring(self) -> None:
        """Say so if workers will have none: they are what they are without, only slower."""
        try:
            Ring().close()
        except OSError as error:
            self._log.info("workers have no io_uring: one packet in a system call", error=error.strerror)

    def _poke(self) -> None:
        """Under the roster's lock: have the watcher look at everything again."""
        if self._watcher is not None:
            self._watcher.poke()

    def _new_worker(self, index: int) -> WorkerProcess:
        """For the watcher's thread, which outlives it."""
        return WorkerProcess(
            index,
            python=self._python,
            slots=self._devices_per_worker,
            packets_per_s=None if self._line_reader is None else self._packets_per_s,
            io_uring=self._io_uring,
            custom=self._processors,
        )

    def _await_up(self, post: Post, deadline: float) -> None:
        with self._roster.lock:
            self._roster.lock.wait_for(lambda: post.due is None or post.deaths > 0, deadline - time.monotonic())
            worker, reason = post.live, post.reason
        if worker is not None:
            try:
                worker.ping(deadline)
            except PeerGoneError:
                with self._roster.lock:
                    self._roster.lock.wait_for(lambda: post.live is not worker, EXIT_TIMEOUT_S)
                    reason = post.reason
            except (NotAskedError, NoAnswerError):
                reason = f"no answer for {START_TIMEOUT_S:g} s"
            else:
                return
        raise DataplaneError("worker_start", f"worker {post.index} does not come up: {reason}", retry=False)

    def _complaint(self, post: Post) -> str | None:
        with self._roster.lock:
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
