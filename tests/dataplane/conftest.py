"""What the data plane's tests share: a network namespace of their own, a supervisor that is always closed."""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from service.dataplane.supervisor import Supervisor
from service.dataplane.telling import WorkerExit
from tests.dataplane import tun

_CLONE_NEWNET = 0x40000000

Until = Callable[..., None]


def wait_until(condition: Callable[[], object], within_s: float = 5.0, what: str = "") -> None:
    """Return as soon as `condition()` is true; fail the test if it is not in time."""
    deadline = time.monotonic() + within_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what or condition}"
        pause.wait(0.002)


@pytest.fixture
def until() -> Until:
    return wait_until


@pytest.fixture
def netns() -> Iterator[None]:
    """A fresh network namespace for this thread and everything it starts, with lo up."""
    if not Path(tun.TUN_PATH).exists():
        pytest.skip("needs /dev/net/tun (modprobe tun)")
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Entering home proves that the way back is open: it is not if another user namespace owns it.
        if libc.setns(home, _CLONE_NEWNET) != 0 or libc.unshare(_CLONE_NEWNET) != 0:
            reason = os.strerror(ctypes.get_errno())
            pytest.skip(f"needs CAP_SYS_ADMIN to make a network namespace and to come back: {reason}")
        try:
            tun.set_up("lo")
            yield
        finally:
            assert libc.setns(home, _CLONE_NEWNET) == 0
    finally:
        os.close(home)


class Observed:
    """What the supervisor's callbacks said."""

    def __init__(self) -> None:
        self.exits: list[WorkerExit] = []
        self.lost: list[tuple[str, str]] = []
        self.lines: list[tuple[str, str, int]] = []

    def line(self, device: str, line: str, suppressed: int) -> None:
        self.lines.append((device, line, suppressed))


@pytest.fixture
def observed() -> Observed:
    return Observed()


StartSupervisor = Callable[..., Supervisor]


@pytest.fixture
def start_supervisor(observed: Observed) -> Iterator[StartSupervisor]:
    """Start a supervisor (arguments as for Supervisor) whose callbacks end up in `observed`."""
    started: list[Supervisor] = []

    def start(**arguments: Any) -> Supervisor:
        settings: dict[str, Any] = {
            "workers": 1,
            "on_exit": observed.exits.append,
            "on_device_lost": lambda device, reason: observed.lost.append((device, reason)),
            **arguments,
        }
        supervisor = Supervisor(**settings)
        started.append(supervisor)
        supervisor.start()
        return supervisor

    yield start
    for supervisor in started:
        supervisor.close()
