"""Starts services by forking a process that has imported everything already: a fifth of the cost of a start.

    the test process                      the nursery (one for each test process)         a service
      Nursery.start  --environment, log, netns-->  fork  ------------------------->  setns, then as `python -m service`
      Forked.wait    --pid----------------------->  waitpid  --status-->

What runs in the fork is what `python -m service` runs, from its arguments on; that the interpreter starts as well is
shown by tests/e2e. The nursery has no threads, no sockets but its own and no state of the service, so that a fork is
as good as new. It ends with the test process.
"""

import array
import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[2]
MESSAGE_MAX: Final = 1 << 16
CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
# What a service imports at its start and at its first request.
IMPORTED: Final = (
    "service.app",
    "service.serving",
    "service.cli.main",
    "service.store.migrate",
    "litestar._kwargs",
    "litestar._kwargs.cleanup",
    "litestar.exceptions.responses",
    "litestar.exceptions.responses._debug_response",
    "litestar.middleware._internal.exceptions",
    "litestar.middleware.allowed_hosts",
    "litestar.middleware.csrf",
    "litestar.middleware.response_cache",
    "uvicorn.lifespan.off",
    "uvicorn.protocols.http.httptools_impl",
)


class Forked:
    """A process of the nursery's, with as much of subprocess.Popen as a test needs."""

    def __init__(self, nursery: "Nursery", pid: int) -> None:
        self.pid, self.returncode = pid, None
        self._nursery, self._pidfd = nursery, os.pidfd_open(pid)
        self._lock = threading.Lock()

    returncode: int | None

    def poll(self) -> int | None:
        """The exit status if it has ended, negative for a signal; else None."""
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        status = self._ended(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"service {self.pid}", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing if it has ended."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self.returncode is None:
                signal.pidfd_send_signal(self._pidfd, signal.Signals(number))

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if not poll.poll(None if timeout is None else timeout * 1000):
                return None
        with self._lock:
            if self.returncode is None:
                self.returncode = os.waitstatus_to_exitcode(self._nursery.reap(self.pid))
                os.close(self._pidfd)
        return self.returncode


class Nursery:
    """The process that forks. Started with the first service, ended with the test process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from tests.faults.forked import serve; serve({theirs.fileno()})"],
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                env={"PATH": os.environ["PATH"]},
            )
        atexit.register(self.close)

    def close(self) -> None:
        """End it."""
        self._socket.close()
        self._process.wait(10)

    def start(self, *arguments: str, environment: Mapping[str, str], log: Path) -> Forked:
        """`python -m service ARGUMENTS` in the caller's network namespace, its output appended to a file."""
        namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            asked = {"arguments": arguments, "environment": dict(environment), "log": str(log)}
            return Forked(self, self._ask(asked, namespace))
        finally:
            os.close(namespace)

    def reap(self, pid: int) -> int:
        """The wait status of a process that has ended."""
        return self._ask({"reap": pid})

    def _ask(self, message: Mapping[str, Any], fd: int | None = None) -> int:
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        answer = b""
        with self._lock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendmsg([json.dumps(message).encode()], rights)
            answer = self._socket.recv(MESSAGE_MAX)
        assert answer, "the nursery has ended: does the service import?"
        return int(answer)


_only: list[Nursery] = []
_starting = threading.Lock()


def nursery() -> Nursery:
    """The one of this process."""
    with _starting:
        if not _only:
            _only.append(Nursery())
    return _only[0]


# -- in the nursery


def serve(descriptor: int) -> None:
    """Fork as asked until the other end closes; whoever lives then is killed."""
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a service collects garbage at its start: it need not look at all of this, nor have it copied
    control = socket.socket(fileno=descriptor)
    living: set[int] = set()
    while True:
        message, rights, _, _ = control.recvmsg(MESSAGE_MAX, socket.CMSG_SPACE(4))
        if not message:
            break
        asked = json.loads(message)
        if "reap" in asked:
            control.send(str(os.waitpid(asked["reap"], 0)[1]).encode())
            living.remove(asked["reap"])
            continue
        (namespace,) = array.array("i", rights[0][2])
        pid = os.fork()
        if pid == 0:
            control.close()
            _become(asked, namespace)
        os.close(namespace)
        living.add(pid)
        control.send(str(pid).encode())
    for pid in living:  # none of them is reaped, so each is still the one that was forked
        os.kill(pid, signal.SIGKILL)


def _become(asked: Mapping[str, Any], namespace: int) -> None:
    """In the fork: be `python -m service`, and end as it ends."""
    status = 1
    try:
        os.setsid()
        log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(namespace)
        os.environ.clear()
        os.environ.update(asked["environment"])
        sys.argv = ["tunledger", *asked["arguments"]]
        from service.cli.main import main

        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:  # noqa: BLE001  # as the interpreter does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
