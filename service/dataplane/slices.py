"""How long a thread keeps a processor before another has its turn: the service's a short while, workers as usual.

A worker with all it can do never gives its processor up by itself, and a command goes through several threads, each of
which has to be woken. A thread that asks for short slices is let in before one with a long slice has used it up
(EEVDF, Linux 6.12), and gets no more of the processor for it: packets lose nothing.

Linux only, by sched_setattr(2), for which no right is needed. A kernel that does not know slices leaves it at that.
"""

import contextlib
import ctypes
import os
import struct
from typing import Final

SHORT_NS: Final = 100_000
"""The least that the kernel takes (kernel/sched/syscalls.c, __setparam_fair)."""

_USUAL: Final = 0  # the kernel's own: some milliseconds

_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
_KEEP_POLICY: Final = 0x08  # linux/sched.h, SCHED_FLAG_KEEP_POLICY
_ATTR: Final = struct.Struct("=IIQiIQQQ")  # linux/sched/types.h: size, policy, flags, nice, priority, runtime, two more


def short() -> None:
    """Have short slices: the calling thread, and every thread and process that it starts."""
    _set(SHORT_NS)


def usual() -> None:
    """Have slices as usual, whatever the starter of this process had."""
    _set(_USUAL)


def _set(runtime_ns: int) -> None:
    number = _SCHED_SETATTR.get(os.uname().machine)
    if number is None:
        return
    # What fails leaves things as they were: nothing depends on it but how soon an answer comes. A filter of system
    # calls that somebody put around the service may refuse any of these.
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) not in (os.SCHED_OTHER, os.SCHED_BATCH):
            return
        nice = os.getpriority(os.PRIO_PROCESS, 0)
        attr = _ATTR.pack(_ATTR.size, 0, _KEEP_POLICY, nice, 0, runtime_ns, 0, 0)
        ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.c_long(0), attr, ctypes.c_long(0))
