"""Hosts to test on: the fake kernel, and the real one in a network namespace of the test's own."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service.kernel.fake import FakeKernel
from service.kernel.linux import LinuxKernel
from service.reconcile.hands import Kernel
from tests.kernel.outside import TUN_PATH, LinuxOutside, Outside
from tests.namespace import fresh_namespace


@dataclass(frozen=True)
class Host:
    """A kernel under test, and the hand of everybody else on its host.

    Attributes:
        vouched: the ifindexes that the kernel is vouched for.
    """

    kernel: Kernel
    outside: Outside
    vouched: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class LinuxHost(Host):
    """The real one."""

    kernel: LinuxKernel
    outside: LinuxOutside


def wait_until(condition: Callable[[], bool], within_s: float = 5.0) -> None:
    """Return as soon as it is true; fail the test if it is not in time."""
    deadline, pause = time.monotonic() + within_s, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s"
        pause.wait(0.002)


def needs_other_uids(host: Host | None = None) -> None:
    """Skip where only root's uid means anything to the kernel, as in an unprivileged user namespace."""
    if (host is None or isinstance(host, LinuxHost)) and "4294967295" not in Path("/proc/self/uid_map").read_text():
        pytest.skip("missing: uids besides root's (this is an unprivileged user namespace)")


@pytest.fixture
def netns() -> Iterator[None]:
    """A fresh network namespace for the main thread, with lo up."""
    if not Path(TUN_PATH).exists():
        pytest.skip(f"missing: {TUN_PATH} (modprobe tun)")
    with fresh_namespace():
        yield


@pytest.fixture
def linux(netns: None) -> Iterator[LinuxHost]:
    vouched: set[int] = set()
    kernel, outside = LinuxKernel(vouched=lambda ifindex, _token: ifindex in vouched), LinuxOutside()
    yield LinuxHost(kernel, outside, vouched)
    outside.close()
    kernel.close()


@pytest.fixture(params=["fake", pytest.param("linux", marks=pytest.mark.kernel)])
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    """Each test of the contract runs on both."""
    if request.param == "linux":
        real: LinuxHost = request.getfixturevalue("linux")
        yield real
    else:
        vouched: set[int] = set()
        kernel = FakeKernel(vouched=lambda ifindex, _token: ifindex in vouched)
        yield Host(kernel, kernel.outside, vouched)
        kernel.close()
