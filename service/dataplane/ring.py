"""Many reads, or writes, of packets in one system call: io_uring(7), by ctypes.

A TUN gives one packet a read(2) and takes one a write(2). What Python and the way into the kernel cost for each of
them is a third of what a packet costs at all; a ring has that once a batch. Not every kernel lets one have it
(kernel.io_uring_disabled, a container's seccomp filter, before 5.18): then `open_ring` gives None, and packets are
read and written one by one. A TUN can be had by a ring from Linux 6.4 on (FMODE_NOWAIT in drivers/net/tun.c).

Theory of operation. Nothing ever waits: each request says RWF_NOWAIT, so that all are done, in their order, when the
system call returns, and a device with nothing to read says EAGAIN. Places of packets do not change, so requests are
written down once; to submit them again is to name them again. Requests stand in two halves: what is read, and what is
written.

What it may do is fixed before it is enabled: to read and to write descriptors, nothing else
(IORING_REGISTER_RESTRICTIONS), so that it is no way round the filter of `syscalls`. What a packet is does not matter.

Sources: io_uring_setup(2), io_uring_enter(2), io_uring_register(2), linux/io_uring.h; io_uring/rw.c for RWF_NOWAIT.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from typing import Final

from service.dataplane.contract import BATCH_MAX

HALF: Final = BATCH_MAX
"""Requests of one kind that there is room for."""

_SETUP: Final = 425  # the same on all machines (asm-generic/unistd.h)
_ENTER: Final = 426
_REGISTER: Final = 427

_SETUP_R_DISABLED: Final = 1 << 6
_SETUP_SUBMIT_ALL: Final = 1 << 7  # one that is refused does not keep back those behind it
_FEAT_SINGLE_MMAP: Final = 1
_OFF_SQES: Final = 0x10000000
_ENTER_GETEVENTS: Final = 1
_REGISTER_RESTRICTIONS: Final = 11
_REGISTER_ENABLE_RINGS: Final = 12
_RESTRICTION_SQE_OP: Final = 1
_OP_READ: Final = 22
_OP_WRITE: Final = 23
_RWF_NOWAIT: Final = 8  # linux/fs.h

_PARAMS: Final = struct.Struct("=7I12x10I10I")
"""struct io_uring_params: entries (2), flags, cpu, idle, features, wq_fd; offsets of the two queues (the last of each
are reserved, as `user_addr` is)."""
_REQUEST: Final = struct.Struct("=BBHiQQIIQ24x")
"""struct io_uring_sqe: opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data."""
_RESTRICTION: Final = struct.Struct("=HBx12x")
NOT_TAKEN: Final = -errno.ECANCELED
"""What comes of a request that the kernel did not take."""

_REQUEST_BYTES: Final = 64
_RESULT_BYTES: Final = 16  # struct io_uring_cqe: user_data, res, flags


class Reads:
    """What `Ring.read` does for one descriptor, made once."""

    __slots__ = ("requests",)

    def __init__(self, requests: bytes) -> None:
        """Made by `Ring.reads`."""
        self.requests: Final = requests


class Ring:
    """For one thread. The memory that is read into and written from is the caller's to keep in place."""

    def __init__(self) -> None:
        """Raises OSError where this kernel does not let us have one."""
        self._syscall: Final = ctypes.CDLL(None, use_errno=True).syscall
        self._syscall.restype = ctypes.c_long
        self._syscall.argtypes = (ctypes.c_long,) * 7
        params = ctypes.create_string_buffer(_PARAMS.size)
        struct.pack_into("=3I", params, 0, 0, 0, _SETUP_R_DISABLED | _SETUP_SUBMIT_ALL)
        self._fd: Final = self._call(_SETUP, 2 * HALF, ctypes.addressof(params))
        try:
            self._restrict()
            self._map(_PARAMS.unpack(params))
        except BaseException:
            os.close(self._fd)
            raise

    def _call(self, *arguments: int) -> int:
        found: int = self._syscall(*arguments, *(0,) * (7 - len(arguments)))
        if found < 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
        return found

    def _restrict(self) -> None:
        rules = b"".join(_RESTRICTION.pack(_RESTRICTION_SQE_OP, op) for op in (_OP_READ, _OP_WRITE))
        kept = ctypes.create_string_buffer(rules, len(rules))
        self._call(_REGISTER, self._fd, _REGISTER_RESTRICTIONS, ctypes.addressof(kept), 2)
        self._call(_REGISTER, self._fd, _REGISTER_ENABLE_RINGS)

    def _map(self, params: tuple[int, ...]) -> None:
        entries, results, features = params[0], params[1], params[5]
        if not features & _FEAT_SINGLE_MMAP:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        of_requests, of_results = params[7:17], params[17:27]
        names_at, results_at = of_requests[6], of_results[5]
        size = max(names_at + 4 * entries, results_at + _RESULT_BYTES * results)
        shared = mmap.MAP_SHARED | mmap.MAP_POPULATE
        queues = memoryview(mmap.mmap(self._fd, size, shared))
        self._requests = memoryview(mmap.mmap(self._fd, _REQUEST_BYTES * entries, shared, offset=_OFF_SQES))
        self._words = queues[: size // 4 * 4].cast("I")
        self._taken_at = of_requests[0] // 4  # the kernel's, as is `_done_at`
        self._named_at = of_requests[1] // 4
        self._heard_at = of_results[0] // 4
        self._done_at = of_results[1] // 4
        self._names = self._words[names_at // 4 : names_at // 4 + entries]
        found = queues[results_at : results_at + _RESULT_BYTES * results]
        self._results = found.cast("i")[2::4]
        self._whose = found.cast("Q")[::2]
        self._entries_mask = entries - 1
        self._results_mask = results - 1
        self._numbers = memoryview(array("I", range(entries)))
        # Of the half that writes: where, and how much.
        writes = self._requests[HALF * _REQUEST_BYTES :]
        self._write_fds = writes.cast("i")[1::16]
        self._write_from = writes.cast("Q")[2::8]
        self._write_sizes = writes.cast("I")[6::16]
        for number in range(HALF):
            _REQUEST.pack_into(
                writes, number * _REQUEST_BYTES, _OP_WRITE, 0, 0, -1, 0, 0, 0, _RWF_NOWAIT, HALF + number
            )
        self._reading: Reads | None = None
        self._heard: tuple[int, int] | None = None  # where the last results began, and the first request of theirs

    def close(self) -> None:
        """Close its descriptor: nothing can be asked of it any more. The kernel has it back with this object's end."""
        os.close(self._fd)

    def reads(self, fd: int, addresses: Sequence[int], size: int) -> Reads:
        """Prepare reads from `fd`, each of up to `size` octets, to these addresses, `HALF` at most."""
        return Reads(
            b"".join(
                _REQUEST.pack(_OP_READ, 0, 0, fd, 0, address, size, _RWF_NOWAIT, number)
                for number, address in enumerate(addresses)
            )
        )

    def read(self, reads: Reads, count: int) -> list[int]:
        """Do the first `count` of these reads, in order; what each came to, octets or a negative errno.

        `NOT_TAKEN` is what came of those that the kernel did not even take. What came to nothing may stand before what
        was done ahead of it: `placed` puts that right. Raises OSError if the kernel neither does requests nor says so.
        """
        if reads is not self._reading:
            self._requests[: len(reads.requests)] = reads.requests
            self._reading = reads
        return self._submit(0, count)

    def write(self, fd: int, addresses: "array[int]", sizes: "array[int]") -> list[int]:
        """Write to `fd` from each of these addresses (format "Q") so many octets (format "I"), in order, `HALF` at
        most; as `read`.
        """
        count = len(sizes)
        self._write_fds[:count] = array("i", [fd]) * count
        self._write_from[:count] = addresses
        self._write_sizes[:count] = sizes
        return self._submit(HALF, count)

    def _submit(self, first: int, count: int) -> list[int]:
        words, names = self._words, self._names
        named = words[self._named_at]
        at = named & self._entries_mask
        room = min(count, len(names) - at)
        names[at : at + room] = self._numbers[first : first + room]
        if room < count:
            names[: count - room] = self._numbers[first + room : first + count]
        words[self._named_at] = named + count & 0xFFFFFFFF
        taken: int = self._syscall(_ENTER, self._fd, count, 0, 0, 0, 0)
        heard = words[self._heard_at]
        if taken != count or words[self._done_at] - heard & 0xFFFFFFFF != count:
            return self._hear_late(first, count)
        at = heard & self._results_mask
        found = self._results[at : at + count].tolist()
        if len(found) < count:
            found += self._results[: count - len(found)].tolist()
        words[self._heard_at] = heard + count & 0xFFFFFFFF
        self._heard = heard, first
        return found

    def placed(self, found: list[int]) -> list[int]:
        """What `read` or `write` gave just now, by request: before Linux 6.2 what was done is told behind all else."""
        if self._heard is None:
            return found
        heard, first = self._heard
        at = heard & self._results_mask
        if self._whose[at : at + len(found)].tolist() == self._numbers[first : first + len(found)].tolist():
            return found
        by_request = found[:]
        for number, result in enumerate(found):
            by_request[self._whose[heard + number & self._results_mask] - first] = result
        return by_request

    def _hear_late(self, first: int, count: int) -> list[int]:
        """What came of requests that were not all taken, or not all done at once, in whatever order."""
        words = self._words
        taken = count - (words[self._named_at] - words[self._taken_at] & 0xFFFFFFFF)
        words[self._named_at] = words[self._taken_at]  # the rest is taken back
        found = [NOT_TAKEN] * count
        self._heard = None  # these are told by request
        for _ in range(taken):
            while words[self._heard_at] == words[self._done_at]:  # their memory is not ours before they are done
                with contextlib.suppress(InterruptedError):
                    self._call(_ENTER, self._fd, 0, 1, _ENTER_GETEVENTS)
            at = words[self._heard_at] & self._results_mask
            found[self._whose[at] - first] = self._results[at]
            words[self._heard_at] = words[self._heard_at] + 1 & 0xFFFFFFFF
        return found


def open_ring() -> Ring | None:
    """A ring, or None where this kernel does not let us have one."""
    try:
        return Ring()
    except OSError:
        return None
