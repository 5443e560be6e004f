"""One worker process as its parent sees it: start it, ask it, kill it, take its status.

One object is one process, from exec to reaped; it is never reused. Which device is where, what a death means
and when a replacement is due belong to the supervisor.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from service.dataplane import blackbox, layout
from service.dataplane.wire import MESSAGE_MAX_BYTES, Ping, Reply, Request, WireError, decode_reply, encode_request

_PIDFD_GETFD: Final = 438  # on every architecture (asm-generic/unistd.h)

_ROOT: Final = Path(__file__).resolve().parents[2]
"""Where the package `service` is: the repository, or site-packages."""

_PROGRAM: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from service.dataplane import worker; sys.exit(worker.main(sys.argv[2:]))"
)
"""Not `-m`, which would need `site` and its .pth files to find us in a checkout: 5 ms, and code of others."""


_TUN_PATH: Final = Path("/dev/net/tun")

_forking: Final = threading.Lock()
"""Of the process, as its descriptors are: held from a fork until the new program has none of them but its own."""

_WORDS_BYTES: Final = 65_536
"""Read at once of what a worker says on its standard error."""

_LINE_BYTES: Final = 2000
"""Of one line that is kept."""


class NotAskedError(Exception):
    """The deadline passed before the request was handed over: the worker will never see it."""


class NoAnswerError(Exception):
    """The worker has the request, but the deadline passed before it answered."""


class PeerGoneError(Exception):
    """The worker has closed its end, or sends what no worker sends: it is dead, about to be, or beyond help."""


class WorkerProcess:
    """A running worker. Thread-safe; `reap` is for the supervisor's watcher alone."""

    def __init__(
        self,
        index: int,
        *,
        python: str,
        slots: int,
        packets_per_s: int | None,
        io_uring: bool = True,
        custom: Mapping[str, str] | None = None,
    ) -> None:
        """Start a worker and return without waiting until it is up: it answers when it is.

        Must be called from a thread that outlives the worker: the kernel counts that thread, not the process,
        as the parent whose end brings PDEATHSIG (prctl(2)). `packets_per_s` is None if nobody wants packets in
        words. `io_uring`: whether it tries to have a ring. `custom` are processors of other packages, which it finds
        where this process finds them. Raises OSError if the process cannot be started.
        """
        self.index: Final = index
        self.started: Final = time.monotonic()
        self.free_slots: Final = list(range(slots - 1, -1, -1))
        """Under the supervisor's lock."""
        self.answered = False
        """Whether it has ever answered, so is up."""
        self.turn: int | None = None
        self.turned = self.started
        self.stuck = False
        """The watcher's: the last turn of its loop that was seen, since when, and whether it was killed for it."""
        self._asking = threading.Lock()
        # A pidfd's number may belong to the next worker once it is closed: it is used only under this lock.
        self._reaping = threading.Lock()
        self._reaped = False
        self._sequence = 0
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            memory = layout.create(slots)
            theirs.callback(os.close, memory)
            self.counters: Final = layout.CounterReader(memory)
            box = blackbox.create()
            theirs.callback(os.close, box)
            self.box: Final = blackbox.Recovered(box)
            self._control, control = _pair(ours, theirs)
            self.notice: Final = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            ours.callback(os.close, self.notice)
            inherited = [control.fileno(), memory, box, self.notice]
            self.words, words = os.pipe2(os.O_CLOEXEC)
            ours.callback(os.close, self.words)
            theirs.callback(os.close, words)
            os.set_blocking(self.words, False)
            self._unfinished = b""
            self.last_line = ""
            """The last that it said: of a traceback, what was raised."""
            lines_fd = -1
            self.lines: socket.socket | None = None
            if packets_per_s is not None:
                self.lines, lines = _pair(ours, theirs)
                lines_fd = lines.fileno()
                inherited.append(lines_fd)
            numbers = (os.getpid(), index, control.fileno(), memory, box, self.notice, lines_fd, packets_per_s or 0)
            others = json.dumps([sys.path if custom else [], custom or {}, io_uring])
            with _forking:
                self._process = subprocess.Popen(
                    [python, "-I", "-S", "-c", _PROGRAM, str(_ROOT), *map(str, numbers), others],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=words,  # a traceback is for the service's log, in its form
                    close_fds=True,
                    pass_fds=inherited,
                    start_new_session=True,
                    cwd="/",
                    # The environment may hold secrets of the service; the interpreter may need its libraries.
                    env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
                )
            self.pid: Final = self._process.pid
            self.pidfd: Final = os.pidfd_open(self.pid)
            ours.pop_all()

    def ask(self, request: Callable[[int], Request], deadline: float, fds: Sequence[int] = ()) -> Reply:
        """Send what `request` makes of a sequence number, and `fds` with it; return the answer.

        `deadline` is of time.monotonic(). Raises NotAskedError, NoAnswerError, PeerGoneError; OSError if `fds`
        are none that can be sent.
        """
        return self.ask_back(request, deadline, fds)[0]

    def ask_back(
        self, request: Callable[[int], Request], deadline: float, fds: Sequence[int] = ()
    ) -> tuple[Reply, int | None]:
        """As `ask`, with the descriptor that came with the answer, the caller's to close."""
        if not self._asking.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise NotAskedError
        returned: list[int] = []
        try:
            if self._control.fileno() < 0:
                raise PeerGoneError
            self._sequence += 1
            message = encode_request(request(self._sequence))
            self._drop_late_answers()
            try:
                self._control.settimeout(max(0.001, deadline - time.monotonic()))
                socket.send_fds(self._control, [message], fds)
            except TimeoutError:
                raise NotAskedError from None
            while True:
                try:
                    self._control.settimeout(max(0.001, deadline - time.monotonic()))
                    data, returned, _, _ = socket.recv_fds(self._control, MESSAGE_MAX_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
                except ConnectionError:
                    raise
                except OSError as error:  # not in time, or no memory for it: it was asked all the same
                    raise NoAnswerError from error
                if not data:
                    raise PeerGoneError
                reply = decode_reply(data)
                if reply.sequence == self._sequence:
                    self.answered = True
                    return reply, returned.pop() if returned else None
                while returned:
                    os.close(returned.pop())
        except (ConnectionError, WireError) as error:
            raise PeerGoneError from error
        finally:
            for fd in returned:  # came with what no worker sends
                os.close(fd)
            self._asking.release()

    def ping(self, deadline: float) -> None:
        """Return once the worker's loop has turned. Raises as `ask`."""
        self.ask(Ping, deadline)

    def _drop_late_answers(self) -> None:
        # What was not waited for before must not fill the worker's way of answering.
        self._control.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self._control.recv(MESSAGE_MAX_BYTES):
                pass

    def end_control(self) -> None:
        """Tell the worker to exit. Never waits; requests on their way fail."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)

    def kill(self) -> None:
        """SIGKILL, which also ends a stopped process; nothing if it is dead already."""
        with self._reaping, contextlib.suppress(ProcessLookupError):
            if not self._reaped:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def open_devices(self) -> Iterator[int]:
        """The TUNs and TAPs that a living worker has open, one copied descriptor after the other, each closed when the
        next one is asked for. None of one that is dead.

        Raises OSError where this machine does not let them be copied. Source: pidfd_getfd(2).
        """
        with self._reaping:
            if self._reaped:
                return
            pidfd = os.dup(self.pidfd)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            folder = Path(f"/proc/{self.pid}/fd")
            for number in sorted(int(each.name) for each in folder.iterdir()):
                if (folder / str(number)).readlink() != _TUN_PATH:
                    continue
                fd = libc.syscall(
                    ctypes.c_long(_PIDFD_GETFD), ctypes.c_long(pidfd), ctypes.c_long(number), ctypes.c_long(0)
                )
                if fd < 0:
                    raise OSError(ctypes.get_errno(), "pidfd_getfd")
                try:
                    yield fd
                finally:
                    os.close(fd)
        finally:
            os.close(pidfd)

    def wait_dead(self, deadline: float) -> bool:
        """Return whether the process is dead by `deadline`: then all its files are closed, even if not reaped.

        Source: kernel/exit.c, do_exit: files and their task work come before exit_notify.
        """
        with self._reaping:
            if self._reaped:
                return True
            pidfd = os.dup(self.pidfd)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
        finally:
            os.close(pidfd)

    def hear(self) -> list[str] | None:
        """The lines that it has said on its standard error since the last time; None if it will say nothing more.

        Raises BlockingIOError if there is nothing now.
        """
        said = os.read(self.words, _WORDS_BYTES)
        *whole, rest = (self._unfinished + said).split(b"\n")
        if not said and rest:
            whole, rest = [rest], b""
        self._unfinished = rest[:_LINE_BYTES]
        lines = [line[:_LINE_BYTES].decode(errors="replace").rstrip() for line in whole if line.strip()]
        if lines:
            self.last_line = lines[-1].strip()
        return lines if said or lines else None

    def reap(self) -> str:
        """Take a dead process's status, close what belonged to it, and return the status in words.

        Call it once, when `pidfd` has become readable. The counters stay readable.
        """
        with self._reaping:
            code = self._process.wait()
            self._reaped = True
            os.close(self.pidfd)
        with self._asking:  # whoever asks meanwhile is told by the end of control
            self._control.close()
        os.close(self.notice)
        os.close(self.words)
        return f"exit {code}" if code >= 0 else f"signal {_signal_name(-code)}"


def close_everywhere(fd: int) -> None:
    """Close a descriptor so that no worker that is just being started has it either.

    Between its fork and its exec a process has a copy of all descriptors, `O_CLOEXEC` or not: for some milliseconds a
    device would go on being busy that nobody holds. Raises OSError as close(2).
    """
    with _forking:
        os.close(fd)


def _pair(ours: contextlib.ExitStack, theirs: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    mine, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.callback(mine.close)
    theirs.callback(other.close)
    return mine, other


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
