"""TUN and TAP devices with offloads for these tests, and two of them with a network namespace each, to move between."""

import ctypes
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.dataplane import tun
from tests.dataplane.conftest import wait_until
from tests.namespace import CLONE_NEWNET, fresh_namespace

IFF_VNET_HDR = 0x4000  # linux/if_tun.h
TUNSETOFFLOAD = 0x400454D0
ALL_OFFLOADS = 0x01 | 0x02 | 0x04 | 0x20 | 0x40
"""TUN_F_CSUM, TSO4, TSO6, USO4, USO6."""
SIOCSIFADDR = 0x8916


def open_device(name: str, mode: str = "tun", offloads: int | None = None) -> int:
    """Create the device; its fd. With `offloads` every packet has a virtio_net_hdr in front."""
    fd = os.open(tun.TUN_PATH, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    flags = (0x0001 if mode == "tun" else 0x0002) | 0x1000 | (0 if offloads is None else IFF_VNET_HDR)
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), flags))
    if offloads is not None:
        fcntl.ioctl(fd, TUNSETOFFLOAD, offloads)
    return fd


def set_up(name: str, ipv4: str, ipv6: str) -> None:
    """Both addresses, in a /24 and a /64, and up."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
        Path(f"/proc/sys/net/ipv6/conf/{name}/accept_dad").write_text("0")
        request = struct.pack("16sIi", socket.inet_pton(socket.AF_INET6, ipv6), 64, socket.if_nametoindex(name))
        tun.set_up(name, ipv4)
        fcntl.ioctl(control, SIOCSIFADDR, request)
    # Even without duplicate address detection an address is tentative until the kernel's worker has been at it.
    wait_until(lambda: not _tentative(name))


def _tentative(name: str) -> bool:
    rows = [row.split() for row in Path("/proc/thread-self/net/if_inet6").read_text().splitlines()]
    return any(row[5] == name and int(row[4], 16) & 0x40 for row in rows)


@dataclass(frozen=True)
class Sides:
    """The two fds; the calling thread is on the far side, and goes near by `near_side`."""

    near: int
    far: int
    near_namespace: int
    far_namespace: int

    @contextmanager
    def near_side(self) -> Iterator[None]:
        _enter(self.near_namespace)
        try:
            yield
        finally:
            _enter(self.far_namespace)


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


@contextmanager
def two_sides(mode: str, near_offloads: int | None = None, far_offloads: int | None = None) -> Iterator[Sides]:
    """Two devices in namespaces of their own: 10.9.0.1 and fd00::1 near, .2 and ::2 far."""
    with ExitStack() as stack:
        made = []
        for name, address, offloads in (("near0", "1", near_offloads), ("far0", "2", far_offloads)):
            stack.enter_context(fresh_namespace())
            fd = open_device(name, mode, offloads)
            stack.callback(os.close, fd)
            set_up(name, f"10.9.0.{address}", f"fd00::{address}")
            namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            stack.callback(os.close, namespace)
            made.append((fd, namespace))
        yield Sides(made[0][0], made[1][0], made[0][1], made[1][1])


@contextmanager
def running(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """`work` in a thread until the end of the block."""
    stop = threading.Event()
    thread = threading.Thread(target=work, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(10)
        assert not thread.is_alive()
