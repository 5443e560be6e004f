"""The program that a worker process runs: read packets off the devices it was handed, count them, drop them.

One thread, one loop, nothing that waits but the loop's own poll. It opens nothing, logs nothing, decides
nothing about interfaces, and must stay light to import: a replaced worker's start-up time is time in which
nobody reads.

Theory of operation. The supervisor starts it as a fresh interpreter with the numbers of four inherited fds:
control (requests and their answers, see `wire`), memory (the counters, see `layout`), notice (an eventfd to
poke when a device was lost) and lines (packets in words, -1 if nobody wants them). It sheds what it does not
need and turns its loop:

    poll -> a device is readable   read a batch, count it by class, go to the next device
         -> control is readable    one request: attach, detach or ping, and its answer
         -> control has ended      exit; the kernel closes every device

How it ends. The service's death ends control, which ends the loop; and if the loop does not turn (stopped,
stuck), PR_SET_PDEATHSIG kills it all the same. Either way a TUN is free at once for the next opener. Signals that
a terminal or a service manager sends to whole groups (INT, QUIT, HUP) are ignored: the service decides.

Fairness. A device gets `BATCH_PACKETS` reads a turn, and epoll hands out ready fds round robin, so a busy one
starves neither the others nor control.
"""

import ctypes
import errno
import io
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, assert_never

from service.dataplane.layout import CounterWriter
from service.dataplane.wire import (
    MESSAGE_MAX_BYTES,
    Attach,
    Detach,
    Mode,
    Ping,
    Reply,
    Request,
    decode_request,
    encode_reply,
)
from service.packet.classify import classify, classify_frame

if TYPE_CHECKING:
    from service.dataplane.packet_lines import PacketLines

BATCH_PACKETS: Final = 64
"""Reads of one device in a turn: 64 x 2.5 us = 0.16 ms until the next one has its turn."""

TURN_DEVICES: Final = 256
"""Ready fds taken in one poll: 256 x 0.16 ms = 41 ms at worst until control is looked at again."""

BUFFER_BYTES: Final = 65_536 + 22
"""The largest packet with an Ethernet header and two VLAN tags."""

LINES_TURN_S: Final = 1.0

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_PR_SET_NAME: Final = 15
_PR_SET_NO_NEW_PRIVS: Final = 38
_CAPABILITY_VERSION_3: Final = 0x20080522  # linux/capability.h


def confine(index: int, parent_pid: int) -> None:
    """Give up what a reader of packets does not need, and tie this process's life to its parent's.

    No capability and no way to get one (reading an open TUN needs none), no signals meant for the service (systemd
    sends SIGTERM to the whole group, and the service still needs its workers to stop in order), as
    many open files as allowed. Exits at once if the parent has already died, since PDEATHSIG would then never
    come. Raises OSError if the kernel refuses. Sources: prctl(2), capset(2); credentials come first, because
    changing them may clear PDEATHSIG (kernel/cred.c, commit_creds).
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
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


def _prctl(libc: ctypes.CDLL, option: int, argument: int | bytes) -> None:
    value = argument if isinstance(argument, bytes) else ctypes.c_ulong(argument)
    if libc.prctl(option, value, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}")


class _Device:
    """An attached device. Closing `file` closes the fd."""

    __slots__ = ("classify", "counted_from", "fd", "file", "mode", "name", "serial", "slot")

    def __init__(self, request: Attach, fd: int, counted_from: int) -> None:
        self.fd: Final = fd
        self.file: Final = io.FileIO(fd, "rb")
        self.slot: Final = request.slot
        self.serial: Final = request.serial
        self.name: Final = request.name
        self.mode: Final[Mode] = request.mode
        self.classify: Final[Callable[[bytearray, int], int]] = classify if request.mode == "tun" else classify_frame
        self.counted_from: Final = counted_from
        """The word in the counters where its from_kernel figures start."""


class Worker:
    """The loop and what it holds. `run` returns when control has ended."""

    def __init__(
        self, control: socket.socket, counters: CounterWriter, notice: int, lines: "PacketLines | None"
    ) -> None:
        """`control` is a SOCK_SEQPACKET, `notice` an eventfd; both stay the caller's to close."""
        self._control = control
        self._counters = counters
        self._notice = notice
        self._lines = lines
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)
        self._by_fd: dict[int, _Device] = {}
        self._by_slot: dict[int, _Device] = {}
        self._buffer: Final = bytearray(BUFFER_BYTES)

    def run(self) -> None:
        """Turn until control ends. Raises nothing that a packet or a device could cause."""
        control = self._control.fileno()
        lines = self._lines
        serving = True
        while serving:
            timeout_s = LINES_TURN_S if lines is not None and lines.waiting else None
            for fd, events in self._epoll.poll(timeout_s, TURN_DEVICES):
                # One request a turn, so that an fd number closed in this turn has at most one new owner in it,
                # and that one is only read once too often.
                if fd == control:
                    serving = self._serve()
                elif (device := self._by_fd.get(fd)) is not None:
                    self._drain(device, events)
            if lines is not None and lines.waiting:
                lines.flush()

    def _drain(self, device: _Device, events: int) -> None:
        """Read up to a batch from `device` and count it; let go of the device if it is gone."""
        # FileIO.readinto is one read(2) into the same buffer again and again, like os.readv, but says None
        # instead of raising when there is nothing to read: 15 % less per packet, 30 % less for the last turn.
        read = device.file.readinto
        classify_packet = device.classify
        buffer = self._buffer
        lines = self._lines
        words = self._counters.words
        error = 0
        # Packets of one class come in runs: add a run at once, not each packet.
        run_class = run_packets = run_bytes = 0
        for _ in range(BATCH_PACKETS):
            try:
                length = read(buffer)
            except OSError as failure:
                # EBADFD: deleted (drivers/net/tun.c, tun_chr_read_iter). EFAULT: while it was being deleted.
                error = failure.errno or errno.EIO
                break
            if not length:
                if length is not None:
                    error = errno.EPIPE  # the end of a socket; a TUN has none
                elif events & (select.EPOLLERR | select.EPOLLHUP):
                    error = errno.ENODEV  # being unregistered (tun.c, tun_chr_poll)
                break
            kind = classify_packet(buffer, length)
            if kind != run_class:
                at = device.counted_from + 2 * run_class
                words[at] += run_packets
                words[at + 1] += run_bytes
                run_class = kind
                run_packets = run_bytes = 0
            run_packets += 1
            run_bytes += length
            if lines is not None:
                lines.packet(device.name, device.mode, buffer, length)
            # The chain of processors belongs here, between counting and the next read into `buffer`. Until
            # there is one, a packet ends here.
        if run_packets:
            at = device.counted_from + 2 * run_class
            words[at] += run_packets
            words[at + 1] += run_bytes
        if error:
            self._close(device)
            self._counters.mark_lost(device.slot, error)
            os.eventfd_write(self._notice, 1)

    def _serve(self) -> bool:
        """Do one request and answer it. Return False once control has ended."""
        try:
            data, fds, _, _ = socket.recv_fds(self._control, MESSAGE_MAX_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        if not data:
            return False
        request = decode_request(data)
        reply = Reply(request.sequence, self._do(request, fds))
        try:
            self._control.send(encode_reply(reply))
        except (BlockingIOError, ConnectionError):
            # Nobody reads answers: the supervisor has given up on them, or is gone, which the next turn sees.
            pass
        return True

    def _do(self, request: Request, fds: list[int]) -> int:
        """Do as asked; return 0 or the errno of why not."""
        match request:
            case Attach():
                return self._attach(request, fds)
            case Detach(_, slot, serial):
                device = self._by_slot.get(slot)
                if device is not None and device.serial == serial:
                    self._close(device)
                return 0
            case Ping():
                return 0
            case _ as unreachable:
                assert_never(unreachable)

    def _attach(self, request: Attach, fds: list[int]) -> int:
        """Take the device; return 0 or the errno of why not, with the fd closed."""
        if not fds:
            return errno.EMFILE  # the kernel drops fds beyond RLIMIT_NOFILE (net/core/scm.c)
        fd = fds[0]
        if request.slot >= self._counters.slots or request.slot in self._by_slot:
            os.close(fd)
            return errno.EINVAL
        try:
            os.set_blocking(fd, False)
            self._epoll.register(fd, select.EPOLLIN)
            device = _Device(request, fd, self._counters.clear(request.slot))
        except OSError as failure:
            os.close(fd)  # takes it out of the epoll set, too
            return failure.errno or errno.EIO
        self._by_fd[fd] = self._by_slot[request.slot] = device
        return 0

    def _close(self, device: _Device) -> None:
        # The fd must leave the epoll set by hand: a copy in flight or in the supervisor would keep it there.
        self._epoll.unregister(device.fd)
        del self._by_fd[device.fd], self._by_slot[device.slot]
        if self._lines is not None:
            self._lines.forget(device.name)
        device.file.close()


def main(arguments: list[str]) -> int:
    """Run a worker: parent's pid, index, control, memory, notice, lines or -1, packets a second. Exit status."""
    parent_pid, index, control_fd, memory_fd, notice_fd, lines_fd, packets_per_s = map(int, arguments)
    counters = CounterWriter(memory_fd)
    os.close(memory_fd)
    lines = _open_lines(lines_fd, packets_per_s) if lines_fd >= 0 else None
    # Everything is imported by now: without capabilities, other people's files may be out of reach.
    confine(index, parent_pid)
    with socket.socket(fileno=control_fd) as control:
        control.setblocking(False)
        Worker(control, counters, notice_fd, lines).run()
    return 0


def _open_lines(fd: int, packets_per_s: int) -> "PacketLines":
    # Parsing and wording cost 20 ms of start-up: only for those who want them.
    from service.dataplane.packet_lines import PacketLines

    lines = socket.socket(fileno=fd)
    lines.setblocking(False)
    return PacketLines(lines, packets_per_s, time.monotonic)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
