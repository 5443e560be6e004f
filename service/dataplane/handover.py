"""Hands devices and their work to workers, and moves them from one to another.

What a worker has is written into the roster here, once it has said so. Nothing is decided about which devices are
processed, and no process is started.

Letting go is certain. The only ways in which a device leaves a worker are the worker's word that it is closed and the
worker's death. So where the word does not come in time the worker is killed, once the descriptor was sent: it would
otherwise hold a device that nobody knows of.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import structlog

from service import failpoints
from service.dataplane import layout
from service.dataplane.attachment import Attachment, Busy, Ended, Held
from service.dataplane.errors import DataplaneError, NotHandedOverError, errno_text
from service.dataplane.provisions import Provisions, close_all, written
from service.dataplane.roster import Roster, there
from service.dataplane.telling import Telling
from service.dataplane.wire import Attach, Configure, Release, Reply, Request
from service.dataplane.work import Setup, StageSetup, Work, unchanged
from service.dataplane.worker_process import (
    NoAnswerError,
    NotAskedError,
    PeerGoneError,
    WorkerProcess,
    close_everywhere,
)

REQUEST_TIMEOUT_S: Final = 2.0
"""A worker's loop turns every 41 ms at worst; one that does not for this long never will."""

EXIT_TIMEOUT_S: Final = 1.0
"""From the end of its control to the end of a worker; after that it is killed."""

KILL_TIMEOUT_S: Final = 2.0
"""SIGKILL takes effect at once, but for a process stuck in the kernel."""

_TUNSETOFFLOAD: Final = 0x400454D0  # linux/if_tun.h
_TUNGETIFF: Final = 0x800454D2

Made = tuple[list[Held | None], list[int]]
"""Stages as a worker is to be told, and the descriptors to send along, to be closed afterwards."""


class HandOver:
    """For any thread. Raises DataplaneError; after an error of `hand_over` no worker has the device.

    Args:
        poke: have the watcher look at the loops again: there may be more of them to look at.
    """

    def __init__(self, roster: Roster, provisions: Provisions, telling: Telling, poke: Callable[[], None]) -> None:
        self._roster, self._provisions, self._tell, self._poke = roster, provisions, telling, poke
        self._log = structlog.get_logger("tunledger.dataplane")

    def gather(self, attachment: Attachment, worker: WorkerProcess, sends_to: frozenset[str]) -> None:
        """Bring everything that a device exchanges packets with to its worker."""
        with self._roster.lock:
            keys = self._roster.neighbours.of({attachment.name, *sends_to})
            elsewhere = [
                held
                for key in keys
                if (held := self._roster.attachments.get(key)) is not None
                and held is not attachment
                and held.confirmed
                and held.worker is not worker
            ]
        for each in elsewhere:
            try:
                with self._roster.claimed(each.device, attachment) as held:
                    if held.worker is not worker:
                        self.move(held, worker)
            except DataplaneError as error:
                if error.code != "not_attached":  # it went while others were at work on it
                    raise

    def move(self, held: Attachment, worker: WorkerProcess) -> None:
        """Hand a device from its worker to another. What the kernel queues for it waits meanwhile.

        Everything that can be had before the one lets go is had before: up to there an error changes nothing. If the
        other does not take it then, it is lost as if its worker had died, and told of; what was not the workers' doing
        is raised as well.
        """

        def request(sequence: int) -> Request:
            return Release(sequence, held.slot, held.serial)

        self.see_up(held, worker, time.monotonic() + REQUEST_TIMEOUT_S)
        with self._roster.lock:
            if self._roster.posts[worker.index].live is not worker:
                raise DataplaneError("worker_gone", f"{where(held, worker)} died", retry=True)
            if not worker.free_slots:
                raise DataplaneError("worker_full", f"{held.name}: worker {worker.index} is full", retry=True)
            slot = worker.free_slots.pop()
        made: Made = [], []
        fd: int | None = None
        try:
            made = self.stages(held, held.work, (), anew=True)
            deadline = time.monotonic() + REQUEST_TIMEOUT_S  # that may have taken its time
            with self.told_unless_taken(held, made[0]):
                reply, fd = self.ask(held, request, deadline, ())
                if reply.error:
                    raise DataplaneError("worker_gone", f"{held.name}: {errno_text(reply.error)}", retry=True)
            with self._roster.lock:
                gone = self._roster.attachments.get(held.device) is not held
                if gone:  # its worker died right after, and the watcher has told of it
                    ended = self._roster.ended(held, there(made[0]), "worker_exit")
                else:
                    held.leave()
                    ended = self._roster.ended(held, held.held(), "moved")
                    held.confirmed = False
                    held.worker.free_slots.append(held.slot)
                    held.stages, held.taps = [], []
                    self._roster.serial += 1
                    held.worker, held.serial = worker, self._roster.serial
                    held.slot, slot = slot, -1
            self._tell.ended(ended)
            if gone:
                return
            try:
                if fd is None:  # no descriptor of ours was free for it
                    raise DataplaneError("worker_gone", f"{held.name}: {errno_text(errno.EMFILE)}", retry=True)
                self.hand_over(held, fd, made, deadline, then="changing")
            except BaseException as error:
                with self._roster.lock:
                    ended = self._roster.ended(held, there(made[0]), "worker_exit")
                    self._roster.keep(held)
                    self._roster.devices_lost += 1
                if fd is not None and held.work.vnet_hdr:
                    take_back_offloads(fd)
                self._tell.lost([(held, str(error) or type(error).__name__, ended)])
                if not isinstance(error, DataplaneError):
                    raise
        finally:
            close_all(made[1])
            if fd is not None:
                with contextlib.suppress(OSError):  # it is closed whatever close(2) says, and the slot is still to give
                    close_everywhere(fd)
            if slot >= 0:
                with self._roster.lock:
                    worker.free_slots.append(slot)

    def see_up(self, attachment: Attachment, worker: WorkerProcess, deadline: float) -> None:
        """Return once a worker has ever answered: it may just be slow to start, which is no reason to kill it."""
        if worker.answered:
            return
        try:
            worker.ping(deadline)
        except (NoAnswerError, NotAskedError):
            raise self._timeout(attachment, worker) from None
        except PeerGoneError:
            self.see_dead(worker, attachment.name, EXIT_TIMEOUT_S)
            raise DataplaneError("worker_gone", f"{where(attachment, worker)} died", retry=True) from None

    def hand_over(self, attachment: Attachment, fd: int, made: Made, deadline: float, then: Busy | None = None) -> None:
        """Give `fd` and the work to the attachment's worker. Raises DataplaneError; no worker has it then.

        The descriptors in `made` are closed, and gone from it.
        """

        def request(sequence: int) -> Request:
            return Attach(sequence, attachment.slot, attachment.serial)

        stages, files = made
        try:
            os.set_blocking(fd, False)  # as `kernel` opened a TUN; a worker may not change it
            setup = _setup(attachment, attachment.work, stages, [])
            failpoints.reach("dataplane.hand_over.before", fails=True)
            with self._roster.lock:
                attachment.coming = attachment.work, there(stages)
            body = written(setup)
            files.append(body)
            reply, _ = self.ask(attachment, request, deadline, [fd, body, *files[:-1]])
            failpoints.reach("dataplane.hand_over.after")
        except OSError as failure:
            raise DataplaneError(
                "attach_refused", f"{attachment.name}: {errno_text(failure.errno or 0)}", retry=False
            ) from failure
        finally:
            close_all(files)
            files.clear()
        _raise_refusal(attachment, reply)
        with self._roster.lock:
            if self._roster.attachments.get(attachment.device) is not attachment:
                raise DataplaneError("worker_gone", f"{where(attachment)} died", retry=True)
            attachment.stages, attachment.coming = stages, None
            attachment.name_figures(json.loads(reply.text))
            attachment.confirmed = True
            attachment.busy = then
            self._roster.lock.notify_all()
            self._roster.last.pop(attachment.device, None)
            if stages:
                self._poke()  # from now on the loop is looked at

    def reconfigure(
        self,
        attachment: Attachment,
        work: Work,
        taps: Sequence[Held],
        files_of_tap: Sequence[int] = (),
    ) -> list[Ended]:
        """Have the worker change the stages; return those that it let go of, with their last figures.

        `files_of_tap` are those of a tap that is new, the first of `taps`.
        """

        def request(sequence: int) -> Request:
            return Configure(sequence, attachment.slot, attachment.serial)

        with self._roster.lock:
            before = attachment.held()
            old = there(attachment.stages)
        stages, files = self.stages(attachment, work, old)
        deadline = time.monotonic() + REQUEST_TIMEOUT_S  # that may have taken its time
        kept = {held.id for held in old}
        new = [stage for stage in stages if stage is not None and stage.id not in kept]
        with self.told_unless_taken(attachment, new):
            try:
                with self._roster.lock:
                    attachment.coming = work, [*taps, *there(stages)]
                body = written(_setup(attachment, work, stages, taps))
                files.append(body)
                reply, _ = self.ask(attachment, request, deadline, [body, *files_of_tap, *files[:-1]])
            except OSError as failure:
                raise DataplaneError(
                    "attach_refused", f"{attachment.name}: {errno_text(failure.errno or 0)}", retry=True
                ) from failure
            finally:
                close_all(files)
            _raise_refusal(attachment, reply)
            with self._roster.lock:
                if self._roster.attachments.get(attachment.device) is not attachment:
                    raise DataplaneError("worker_gone", f"{where(attachment)} died", retry=True)
                if work.chain != attachment.work.chain:
                    self._roster.crashes.forget(attachment.device)
                attachment.stages, attachment.taps, attachment.work, attachment.coming = stages, list(taps), work, None
                attachment.name_figures(json.loads(reply.text))
                self._roster.to_be_told.update(tap.id for tap in taps)
                self._poke()
                # Nobody writes their figures any more, and their areas are free from here on.
                staying = {held.id for held in attachment.held()}
                return self._roster.ended(attachment, [held for held in before if held.id not in staying], "removed")

    def stages(self, attachment: Attachment, work: Work, old: Sequence[Held], *, anew: bool = False) -> Made:
        """A chain's stages as a worker is to be told, with the descriptors of the new ones, in order.

        `anew`: the worker is one that has none of the device's stages yet.
        """
        with self._roster.lock:
            bypassed = self._roster.crashes.bypassed(attachment.device, work.chain)
            areas = list(range(layout.AREAS)) if anew else attachment.free_areas()
        by_area = {held.setup.area: held for held in old}
        same = unchanged([held.setup for held in old], work.chain)
        stages: list[Held | None] = []
        new: list[Held] = []
        files: list[int] = []
        try:
            for place, (stage, kept) in enumerate(zip(work.chain, same, strict=True)):
                if place in bypassed:
                    stages.append(None)
                elif kept is not None:
                    held = by_area[kept.area]
                    setup = StageSetup(kept.area, place, stage, 0)
                    stages.append(Held(held.id, setup, held.figures, held.memory))
                else:
                    made, own = self._made(attachment, StageSetup(areas.pop(0), place, stage))
                    new.append(made)
                    stages.append(made)
                    files += own
        except BaseException:
            close_all(files)
            with self._roster.lock:
                ended = self._roster.ended(attachment, new, "refused")
            self._tell.ended(ended)
            raise
        return stages, files

    def _made(self, attachment: Attachment, setup: StageSetup) -> tuple[Held, list[int]]:
        """A new stage and its descriptors. Raises as `Provisions.stage`."""
        with self._roster.lock:
            stage_id = self._roster.new_stage_id()
        made = self._provisions.stage(attachment.device, attachment.name, stage_id, setup)
        if made[0].told:
            with self._roster.lock:
                self._roster.to_be_told.add(stage_id)
        return made

    @contextmanager
    def told_unless_taken(self, attachment: Attachment, new: Sequence[Held | None]) -> Iterator[None]:
        """Tell of the end of new stages if what is done with them in here fails."""
        try:
            yield
        except BaseException as error:
            died = isinstance(error, DataplaneError) and error.code in ("worker_gone", "worker_timeout")
            died = died and not isinstance(error, NotHandedOverError)
            with self._roster.lock:
                ended = self._roster.ended(attachment, there(new), "worker_exit" if died else "refused")
            self._tell.ended(ended)
            raise

    def ask(
        self, attachment: Attachment, request: Callable[[int], Request], deadline: float, fds: Sequence[int]
    ) -> tuple[Reply, int | None]:
        """Ask an attachment's worker. One that has the request and does not answer is killed: nobody could say what
        it holds. Raises DataplaneError `worker_timeout`, `worker_gone`; OSError if `fds` cannot be sent.
        """
        worker = attachment.worker
        try:
            return worker.ask_back(request, deadline, fds)
        except NotAskedError:
            asked = self._timeout(attachment)
            raise NotHandedOverError(asked.code, asked.message, retry=asked.retry) from None
        except NoAnswerError:
            self._log.error("worker killed: it does not answer", worker=worker.index, device=attachment.name)
            self.see_dead(worker, attachment.name, 0.0)
            raise self._timeout(attachment) from None
        except PeerGoneError:
            self.see_dead(worker, attachment.name, EXIT_TIMEOUT_S)
            raise DataplaneError("worker_gone", f"{where(attachment)} died", retry=True) from None

    def see_dead(self, worker: WorkerProcess, device: str, patience_s: float) -> None:
        """Wait for a worker that is about to die, then kill it; return when it is dead, so has no file open."""
        if worker.wait_dead(time.monotonic() + patience_s):
            return
        worker.kill()
        if not worker.wait_dead(time.monotonic() + KILL_TIMEOUT_S):
            with self._roster.lock:
                held = self._roster.attachments.get(device)
                if held is not None and held.confirmed:
                    held.busy = None
                    self._roster.lock.notify_all()
            raise DataplaneError(
                "worker_stuck", f"{device}: worker {worker.index} (pid {worker.pid}) survives SIGKILL", retry=True
            )

    @staticmethod
    def _timeout(attachment: Attachment, worker: WorkerProcess | None = None) -> DataplaneError:
        message = f"{where(attachment, worker)} has not answered for {REQUEST_TIMEOUT_S:g} s"
        return DataplaneError("worker_timeout", message, retry=True)


def take_back_offloads(fd: int) -> None:
    """Have a device that no worker took ask for no offloads: they are the device's, and stay when it is closed.

    A worker that lets go does that itself (`Device.close`). One that is killed cannot; but the service tries to hand
    its devices to the next one at once, and either that takes them, with offloads of its own, or this is reached. For
    the one that it does not let go of there is `take_back_offloads_of`.
    """
    with contextlib.suppress(OSError):  # it is gone, or no TUN
        fcntl.ioctl(fd, _TUNSETOFFLOAD, 0)


def take_back_offloads_of(held: Attachment) -> None:
    """The same for a device whose worker is about to be killed for it. Where the kernel does not let us they stay."""
    with contextlib.suppress(OSError):
        for fd in held.worker.open_devices():
            name, _, _ = fcntl.ioctl(fd, _TUNGETIFF, bytes(40)).partition(b"\0")
            if name == held.name.encode():
                take_back_offloads(fd)


def where(held: Attachment, worker: WorkerProcess | None = None) -> str:
    """An interface and its worker, or another one, in words."""
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
        raise DataplaneError("attach_refused", f"{where(held)}: {errno_text(reply.error)}", retry=retry)
