"""What a worker gives up once everything is imported: rights, ways to get them, and the means to open anything.

Linux only, by prctl(2) and capset(2). Nothing here knows a device or a packet.
"""

import ctypes
import os
import resource
import signal
from typing import Final

from service.dataplane import slices, syscalls

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_PR_SET_NAME: Final = 15
_PR_SET_NO_NEW_PRIVS: Final = 38
_CAPABILITY_VERSION_3: Final = 0x20080522  # linux/capability.h


def confine(index: int, parent_pid: int) -> None:
    """Give up what a reader of packets does not need, and tie this process's life to its parent's.

    No capability and no way to get one (reading an open TUN needs none), no signals meant for the service (systemd
    sends SIGTERM to the whole group, and the service still needs its workers to stop in order), as many open files as
    allowed, slices of the processor as usual where the service has short ones, and last, where this machine has the
    means, no system call that could open anything (`syscalls`). Exits at once if the parent has already died, since
    PDEATHSIG would then never come. Raises OSError if the kernel refuses.
    Sources: prctl(2), capset(2); credentials come first, because changing them may clear PDEATHSIG (kernel/cred.c,
    commit_creds).
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    slices.usual()
    libc = ctypes.CDLL(None, use_errno=True)
    _prctl(libc, _PR_SET_NAME, f"tunledger-dp{index}".encode())
    _prctl(libc, _PR_SET_NO_NEW_PRIVS, 1)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits each
    if libc.capset(header, nothing) != 0:
        raise OSError(ctypes.get_errno(), "capset")
    _prctl(libc, _PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent_pid:
        os._exit(0)
    if syscalls.available():
        syscalls.refuse_others(libc)


def _prctl(libc: ctypes.CDLL, option: int, argument: int | bytes) -> None:
    value = argument if isinstance(argument, bytes) else ctypes.c_ulong(argument)
    if libc.prctl(option, value, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")
