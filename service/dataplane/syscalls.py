"""The system calls that a worker may still make, as a seccomp filter (seccomp(2), Documentation/userspace-api).

All that is not named is refused with EPERM: a processor cannot open a file or a socket, start a process, send a signal,
or change anything it has no descriptor of. Named is what the loop, Python's memory and threads need, and what can be
done with descriptors that the service handed over.
"""

import ctypes
import errno
import os
import platform
import struct
from pathlib import Path
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
    "fcntl": (72, 25),
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
    "ioctl": (16, 29),
    "lseek": (8, 62),
    "madvise": (28, 233),
    "membarrier": (324, 283),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "msync": (26, 227),
    "munmap": (11, 215),
    "nanosleep": (35, 101),
    "newfstatat": (262, 79),  # how glibc does fstat
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
_CLONE: Final = (56, 220)
_CLONE3: Final = (435, 435)
_TGKILL: Final = (234, 131)
_CLONE_THREAD: Final = 0x10000  # linux/sched.h

_MACHINES: Final = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH_ (linux/audit.h)

_PR_SET_SECCOMP: Final = 22  # linux/prctl.h
_SECCOMP_MODE_FILTER: Final = 2  # linux/seccomp.h
_RET_ALLOW: Final = 0x7FFF0000
_RET_ERRNO: Final = 0x00050000
_RET_KILL_PROCESS: Final = 0x80000000

# Offsets in struct seccomp_data: nr, arch, instruction pointer, six arguments of 64 bits, little-endian here.
_NR_AT, _ARCH_AT, _ARGUMENT_AT = 0, 4, 16

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS (linux/bpf_common.h)
_JUMP_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_SET: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06
_INSTRUCTION: Final = struct.Struct("=HBBI")


def available() -> bool:
    """Whether this machine's system calls are known here, and its kernel filters them."""
    return platform.machine() in _MACHINES and Path("/proc/sys/kernel/seccomp/actions_avail").exists()


def refuse_others(libc: ctypes.CDLL) -> None:
    """From here on this process can make the calls above and no others. Needs no_new_privs. Raises OSError."""
    program = _program(*_MACHINES[platform.machine()], os.getpid())
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
        load(_ARGUMENT_AT),
        _INSTRUCTION.pack(_JUMP_SET, 0, 1, _CLONE_THREAD),
        returns(_RET_ALLOW),
        refuse,
    ]
    # abort(3) sends itself a signal.
    found += [
        _INSTRUCTION.pack(_JUMP_EQUAL, 0, 4, _TGKILL[column]),
        load(_ARGUMENT_AT),
        _INSTRUCTION.pack(_JUMP_EQUAL, 0, 1, pid),
        returns(_RET_ALLOW),
        refuse,
    ]
    found.append(refuse)
    return b"".join(found)
