"""The system calls that a worker may still make, as a seccomp filter (seccomp(2), Documentation/userspace-api).

All that is not named is refused with EPERM: a processor cannot open a file or a socket, start a process, send a signal,
or change anything it has no descriptor of. Named is what the loop, Python's memory and threads need, and what can be
done with descriptors that the service handed over.

Calls that do many things are allowed by their arguments. `fcntl` and `ioctl` would otherwise have the kernel send
signals to the service (F_SETOWN, F_SETSIG, F_SETFL with O_ASYNC), have it wait for descriptors that are shared with it
(F_SETFL without O_NONBLOCK, FIONBIO), or keep and give away a device (TUNSETPERSIST, TUNSETOWNER). Flags of a
descriptor are not the worker's to set: what comes to it does not block already.

What is left open: paths are in memory, where no filter looks, and `newfstatat` with an empty one is how glibc does
fstat, which each set-up, mmap and FileIO need. Whoever makes it by hand, with AT_EMPTY_PATH and a path all the same,
learns size, mode and times of a file that its user may look up, not what is in it. `io_uring_enter` has its requests
in memory, too: the ring's own rules keep them to reading and writing (`ring`). Those do not look at RWF_ flags, so that
a file that was opened to append can be written elsewhere, as it could be cut short by `ftruncate`.
"""

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from typing import Final

_ALLOWED: Final[dict[str, tuple[int | None, int | None]]] = {
    # name: (x86_64: asm/unistd_64.h, aarch64: asm-generic/unistd.h)
    "brk": (12, 214),
    "clock_getres": (229, 114),
    "clock_gettime": (228, 113),
    "clock_nanosleep": (230, 115),
    "close": (3, 57),
    "copy_file_range": (326, 285),
    "dup": (32, 23),
    "dup3": (292, 24),
    "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441),
    "epoll_wait": (232, None),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "fallocate": (285, 47),
    "fdatasync": (75, 83),
    "fstat": (5, 80),
    "fsync": (74, 82),
    "ftruncate": (77, 46),
    "futex": (202, 98),
    "getcpu": (309, 168),
    "geteuid": (107, 175),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "gettid": (186, 178),
    "gettimeofday": (96, 169),
    "getuid": (102, 174),
    "io_uring_enter": (426, 426),  # for a ring that can only read and write (`ring`)
    "lseek": (8, 62),
    "madvise": (28, 233),
    "membarrier": (324, 283),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "msync": (26, 227),
    "munmap": (11, 215),
    "nanosleep": (35, 101),
    "poll": (7, None),
    "ppoll": (271, 73),
    "pread64": (17, 67),
    "preadv": (295, 69),
    "pwrite64": (18, 68),
    "pwritev": (296, 70),
    "read": (0, 63),
    "readv": (19, 65),
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "restart_syscall": (219, 128),
    "rseq": (334, 293),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sched_getaffinity": (204, 123),
    "sched_yield": (24, 124),
    "sendmsg": (46, 211),
    "sendto": (44, 206),
    "set_robust_list": (273, 99),
    "shutdown": (48, 210),
    "sigaltstack": (131, 132),
    "sync_file_range": (277, 84),
    "sysinfo": (99, 179),
    "times": (100, 153),
    "uname": (63, 160),
    "write": (1, 64),
    "writev": (20, 66),
}
_FCNTL: Final = (72, 25)
_IOCTL: Final = (16, 29)
_NEWFSTATAT: Final = (262, 79)  # how glibc 2.33 and later does fstat, which mmap and FileIO need
_CLONE: Final = (56, 220)
_CLONE3: Final = (435, 435)
_TGKILL: Final = (234, 131)
_CLONE_THREAD: Final = 0x10000  # linux/sched.h
_AT_EMPTY_PATH: Final = 0x1000  # linux/fcntl.h
_TUNSETOFFLOAD: Final = 0x400454D0  # linux/if_tun.h

_MACHINES: Final = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_ (linux/audit.h)

_FCNTL_COMMANDS: Final = (fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL)  # os.dup, mmap
_PR_SET_SECCOMP: Final = 22  # linux/prctl.h
_SECCOMP_MODE_FILTER: Final = 2  # linux/seccomp.h
_RET_ALLOW: Final = 0x7FFF0000
_RET_ERRNO: Final = 0x00050000
_RET_KILL_PROCESS: Final = 0x80000000

# Offsets in struct seccomp_data: nr, arch, instruction pointer, six arguments of 64 bits, little-endian here.
_NR_AT, _ARCH_AT = 0, 4
_LOW_AT: Final = (16, 24, 32, 40, 48, 56)
_HIGH_AT: Final = (20, 28, 36, 44, 52, 60)

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS (linux/bpf_common.h)
_JUMP_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_SET: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06
_INSTRUCTION: Final = struct.Struct("=HBBI")


def available() -> bool:
    """Whether this machine's system calls are known here, and its kernel filters them."""
    if os.uname().machine not in _MACHINES:
        return False
    return os.path.exists("/proc/sys/kernel/seccomp/actions_avail")  # noqa: PTH110  # pathlib: 3 ms of a worker's start


def refuse_others(libc: ctypes.CDLL) -> None:
    """From here on this process can make the calls above and no others. Needs no_new_privs. Raises OSError."""
    program = _program(*_MACHINES[os.uname().machine], os.getpid())
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))

    argument = Program(len(program) // _INSTRUCTION.size, ctypes.addressof(code))
    zero = ctypes.c_ulong(0)
    if libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.byref(argument), zero, zero) != 0:
        raise OSError(ctypes.get_errno(), "seccomp")


def _program(column: int, architecture: int, pid: int) -> bytes:
    """The filter: each test jumps over one instruction, or falls through to it."""

    def returns(value: int) -> bytes:
        return _INSTRUCTION.pack(_RETURN, 0, 0, value)

    def load(at: int) -> bytes:
        return _INSTRUCTION.pack(_LOAD, 0, 0, at)

    def allow_with(numbers: tuple[int, int], *cases: Sequence[tuple[int, int]]) -> list[bytes]:
        """This call if the words of any of the cases stand where they should. What the kernel takes as an int is its
        low word alone: what the high one holds is not defined, and not looked at there either."""
        body = []
        for words in cases:
            for after, (at, value) in zip(range(2 * len(words) - 1, 0, -2), words, strict=True):
                body += [load(at), _INSTRUCTION.pack(_JUMP_EQUAL, 0, after, value)]
            body.append(returns(_RET_ALLOW))
        body.append(refuse)
        return [_INSTRUCTION.pack(_JUMP_EQUAL, 0, len(body), numbers[column]), *body]

    refuse = returns(_RET_ERRNO | errno.EPERM)
    found = [
        load(_ARCH_AT),
        _INSTRUCTION.pack(_JUMP_EQUAL, 1, 0, architecture),
        returns(_RET_KILL_PROCESS),  # another architecture's numbers mean something else
        load(_NR_AT),
    ]
    for numbers in _ALLOWED.values():
        number = numbers[column]
        if number is not None:
            found += [_INSTRUCTION.pack(_JUMP_EQUAL, 0, 1, number), returns(_RET_ALLOW)]
    # clone3 has its flags in memory, where no filter looks: glibc takes clone where there is no clone3.
    found += [_INSTRUCTION.pack(_JUMP_EQUAL, 0, 1, _CLONE3[column]), returns(_RET_ERRNO | errno.ENOSYS)]
    # A thread of this process is no other process.
    found += [
        _INSTRUCTION.pack(_JUMP_EQUAL, 0, 4, _CLONE[column]),
        load(_LOW_AT[0]),
        _INSTRUCTION.pack(_JUMP_SET, 0, 1, _CLONE_THREAD),
        returns(_RET_ALLOW),
        refuse,
    ]
    # abort(3) sends itself a signal.
    found += allow_with(_TGKILL, [(_LOW_AT[0], pid)])
    found += allow_with(_FCNTL, *([(_LOW_AT[1], command)] for command in _FCNTL_COMMANDS))
    # Offloads can be taken back (`Device.close`), not asked for.
    found += allow_with(_IOCTL, [(_LOW_AT[1], _TUNSETOFFLOAD), (_LOW_AT[2], 0), (_HIGH_AT[2], 0)])
    found += allow_with(_NEWFSTATAT, [(_LOW_AT[3], _AT_EMPTY_PATH)])
    found.append(refuse)
    return b"".join(found)
