"""Network namespaces for tests: each gets a fresh one, with lo up, and the host's own is never touched.

unshare(2) and setns(2) work on the calling thread; processes and sockets made afterwards live in there.
"""

import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

CLONE_NEWNET = 0x40000000  # linux/sched.h
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1  # linux/sockios.h, linux/if.h

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def link_up(name: str) -> None:
    """`ip link set NAME up` in the present namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16s24x", name.encode()))
        flags = struct.unpack("16sH22x", request)[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags | IFF_UP))


@contextmanager
def fresh_namespace() -> Iterator[None]:
    """Run in a new network namespace; back in the old one afterwards. Skips where the kernel does not allow it."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            _checked(_libc.unshare(CLONE_NEWNET), "unshare")
        except OSError as error:
            if error.errno == errno.EPERM:
                pytest.skip("missing: CAP_SYS_ADMIN, to make a network namespace")
            raise
        try:
            link_up("lo")
            yield
        finally:
            _checked(_libc.setns(home, CLONE_NEWNET), "setns")
    finally:
        os.close(home)
