"""The thread that starts the workers, looks after them, and buries them: restarts with back-off, ends of endless loops.

It waits on their pidfds and on the eventfds by which they tell of lost devices and of stages that want to be looked at.
It lives as long as any worker, which PDEATHSIG demands of the thread that starts them. What a death means for the
interfaces is not its business.
"""

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Final

import structlog

from service import failpoints
from service.dataplane.attachment import DeviceCounters, Ended
from service.dataplane.handover import KILL_TIMEOUT_S
from service.dataplane.line_reader import LineReader
from service.dataplane.posts import Post
from service.dataplane.roster import STUCK_S, Roster
from service.dataplane.telling import Telling, WorkerExit
from service.dataplane.worker_process import WorkerProcess

STOP_TIMEOUT_S: Final = 2.0

LOOK_S: Final = 0.5
"""How often the loops of workers with processors are looked at: an endless one is killed within 2.5 s."""


class Watcher:
    """The thread. `start`, then `poke` when there is something new, and `join` when the roster is closing.

    Args:
        new_worker: start a process in the place with this index. Raises OSError.
        lines: reads packets in words, if somebody wants them.
    """

    def __init__(
        self,
        roster: Roster,
        telling: Telling,
        new_worker: Callable[[int], WorkerProcess],
        lines: LineReader | None,
    ) -> None:
        self._roster, self._tell, self._new_worker, self._line_reader = roster, telling, new_worker, lines
        self._log = structlog.get_logger("tunledger.dataplane")
        self._epoll: Final = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._watched: dict[int, WorkerProcess] = {}
        self._thread: Final = threading.Thread(target=self._watch, name="dataplane-watcher", daemon=True)
        roster.watcher = self._thread

    def start(self) -> None:
        """Start the thread, which starts the workers."""
        self._thread.start()

    def poke(self) -> None:
        """Under the roster's lock: look at everything again."""
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def join(self, timeout_s: float) -> None:
        """Wait for the end of the thread, and of all workers."""
        self._thread.join(timeout_s)

    def _watch(self) -> None:
        while True:
            with self._roster.lock:
                if self._roster.closing:
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
            self._tell.poke()
        self._stop_all()
        with self._roster.lock:
            wake, self._wake = self._wake, -1
        self._epoll.close()
        os.close(wake)

    def _look(self, fd: int, worker: WorkerProcess) -> None:
        if fd == worker.pidfd:
            self._bury(worker)
            return
        if fd == worker.words:
            if not self._hear(worker):
                self._forget(fd)  # it has closed its end, which would go on being ready
            return
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        with self._roster.lock:
            lost = self._roster.take_lost(worker)
        self._tell.lost(lost)
        self._tell.note_poke()

    def _hear(self, worker: WorkerProcess) -> bool:
        """Log what a worker says, as its own words; return whether it may say more. Raises BlockingIOError."""
        lines = worker.hear()
        for line in lines or ():
            self._log.debug("a packet worker says", worker=worker.index, pid=worker.pid, line=line)
        return lines is not None

    def _forget(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def _kill_stuck(self) -> None:
        """Kill workers whose loop has not turned for `STUCK_S`, though there was something to do."""
        now = time.monotonic()
        for post in self._roster.posts:
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
        for post in self._roster.posts:
            with self._roster.lock:
                due = post.waits(running=self._roster.running)
                if due is None or due > time.monotonic():
                    continue
            self._spawn(post)

    def _until_due_s(self) -> float | None:
        with self._roster.lock:
            waits = [post.waits(running=self._roster.running) for post in self._roster.posts]
            due = [each for each in (*waits, self._tell.poke_due) if each is not None]
            if any(held.work.chain or held.taps for held in self._roster.attachments.values()):
                due.append(time.monotonic() + LOOK_S)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def _spawn(self, post: Post) -> None:
        try:
            failpoints.reach("dataplane.spawn.before", fails=True)
            worker = self._new_worker(post.index)
        except OSError as failure:
            now = time.monotonic()
            with self._roster.lock:
                post.vacate(f"cannot be started: {failure}", now, now)
                self._roster.lock.notify_all()
            self._log.error("worker cannot be started", worker=post.index, error=str(failure))
            return
        for fd in (worker.pidfd, worker.notice, worker.words):
            self._watched[fd] = worker
            self._epoll.register(fd, select.EPOLLIN)
        if self._line_reader is not None and worker.lines is not None:
            self._line_reader.add(worker.lines)
        failpoints.reach("dataplane.spawn.after")
        with self._roster.lock:
            post.live = worker
            post.due = None
            self._roster.lock.notify_all()

    def _bury(self, worker: WorkerProcess) -> None:
        """Take a dead worker out of the tables, start the next one if it is due, tell the caller."""
        with contextlib.suppress(BlockingIOError):
            while worker.words in self._watched and self._hear(worker):
                pass
        for fd in (worker.pidfd, worker.notice, worker.words):
            self._forget(fd)
        status = worker.reap()
        failpoints.reach("dataplane.buried")
        with self._roster.lock:
            lost = self._roster.take_lost(worker)
            last: dict[str, DeviceCounters] = {}
            names: list[str] = []
            crash = self._roster.blame(worker, status)
            ended: list[Ended] = []
            for held in [held for held in self._roster.attachments.values() if held.worker is worker]:
                if not held.confirmed:
                    self._roster.release(held)
                    continue
                ended += self._roster.ended(held, held.held(), "worker_exit")
                final = self._roster.keep(held)
                if held.busy != "detaching":  # else who does gets the figures
                    last[held.device] = final
                    names.append(held.name)
            # A crash that has its own back-off must not keep the other devices waiting.
            post = self._roster.posts[worker.index]
            cause = f"{status}: {worker.last_line}" if worker.last_line else status
            post.vacate(cause, worker.started, time.monotonic(), blamed=crash is not None)
            closing, running = self._roster.closing, self._roster.running
            self._roster.lock.notify_all()
        self._tell.lost(lost)
        self._tell.ended(ended)
        if closing:
            return
        self._start_due()
        self._log.error(
            "a packet worker died",
            worker=worker.index,
            pid=worker.pid,
            status=status,
            error=worker.last_line,
            devices=sorted(names),
        )
        if running:
            self._tell.exit(WorkerExit(worker.index, worker.pid, status, frozenset(last), last, crash))

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
