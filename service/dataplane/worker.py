"""The program that a worker process runs: its loop, and what the supervisor asks of it.

One thread, one loop, nothing that waits but the loop's own poll. It opens nothing, logs nothing, decides
nothing about interfaces, and must stay light to import: a replaced worker's start-up time is time in which
nobody reads. What happens to packets is `device`'s and `stages`' business.

Theory of operation. The supervisor starts it as a fresh interpreter with the numbers of five inherited fds:
control (requests and their answers, see `wire`), memory (the counters, see `layout`), box (the packets' buffers, see
`blackbox`), notice (an eventfd to poke when the service should look) and lines (packets in words, -1 if nobody wants
them). It imports every processor, sheds what it does not need and turns its loop:

    poll -> a device is readable   read a batch, count it, through its chain; go to the next device
         -> control is readable    one request, and its answer
         -> control has ended      exit; the kernel closes every device
         -> a second has passed    processors' `tick`

How it ends. The service's death ends control, which ends the loop; and if the loop does not turn (stopped,
stuck), PR_SET_PDEATHSIG kills it all the same. Either way a TUN is free at once for the next opener. Signals that
a terminal or a service manager sends to whole groups (INT, QUIT, HUP) are ignored: the service decides.
What a processor raises ends it, too, and is left in the black box.

Fairness. A device gets `BATCH_MAX` reads a turn, and epoll hands out ready fds round robin, so a busy one
starves neither the others nor control.
"""

import contextlib
import errno
import json
import os
import select
import socket
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, assert_never

from service.dataplane import stages, work
from service.dataplane.blackbox import AREA, BUSY, SERIAL, TURN, BlackBox
from service.dataplane.confinement import confine
from service.dataplane.device import Device, Ports
from service.dataplane.layout import CounterWriter
from service.dataplane.registry import Registry
from service.dataplane.ring import Ring, open_ring
from service.dataplane.wire import (
    FDS_MAX,
    MESSAGE_MAX_BYTES,
    Attach,
    Configure,
    Detach,
    Feed,
    Ping,
    Release,
    Reply,
    Request,
    decode_request,
    encode_reply,
)

if TYPE_CHECKING:
    from service.dataplane.packet_lines import PacketLines

TURN_DEVICES: Final = 256
"""Ready fds taken in one poll: 256 x 64 x 2.5 us = 41 ms, and the chains' time, until control is looked at again."""

TICK_S: Final = 1.0


class RefusedError(Exception):
    """Why a request is not done: an errno, and words if it does not say enough."""

    def __init__(self, error: int, text: str = "") -> None:
        super().__init__(text)
        self.error: Final = error
        self.text: Final = text


class Worker:
    """The loop and what it holds. `run` returns when control has ended."""

    def __init__(
        self,
        control: socket.socket,
        counters: CounterWriter,
        box: BlackBox,
        notice: int,
        lines: "PacketLines | None",
        registry: Registry,
        ring: Ring | None = None,
    ) -> None:
        """`control` is a SOCK_SEQPACKET, `notice` an eventfd; both stay the caller's to close."""
        self._control = control
        self._counters = counters
        self._box = box
        self._notice = notice
        self._lines = lines
        self._registry = registry
        self._ports = Ports(box, ring)
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)
        self._by_fd: dict[int, Device] = {}
        self._by_slot: dict[int, Device] = {}
        self._next_tick = time.monotonic() + TICK_S

    def run(self) -> None:
        """Turn until control ends. Raises what a processor raises, told in the black box."""
        control = self._control.fileno()
        box = self._box.words
        try:
            while True:
                box[BUSY] = 0
                ready = self._epoll.poll(self._timeout_s(), TURN_DEVICES)
                box[TURN] += 1
                box[BUSY] = 1
                for fd, events in ready:
                    # One request a turn, so that an fd number closed in this turn has at most one new owner in it,
                    # and that one is only read once too often.
                    if fd == control:
                        if not self._serve():
                            self._end()
                            return
                    elif (device := self._by_fd.get(fd)) is not None:
                        error = device.drain(events)
                        if error:
                            self._lose(device, error)
                if time.monotonic() >= self._next_tick:
                    self._tick()
        except BaseException as error:
            if box[AREA] and not self._box.noted:
                self._box.note(error, None)
            raise

    def _end(self) -> None:
        """Close everything in good order."""
        for device in list(self._by_fd.values()):
            self._let_go(device)
            device.close()

    def _timeout_s(self) -> float | None:
        if self._lines is None and not any(device.chain.stages for device in self._by_fd.values()):
            return None
        return max(0.0, self._next_tick - time.monotonic())

    def _tick(self) -> None:
        self._next_tick = time.monotonic() + TICK_S
        if self._lines is not None and self._lines.waiting:
            self._lines.flush()
        self._ports.look()
        now_ns = time.time_ns()
        box = self._box.words
        for device in self._by_fd.values():
            for stage in device.chain.ticking:
                box[SERIAL], box[AREA] = device.serial, stage.area + 1
                stage.processor.tick(now_ns)
                box[AREA] = 0

    def _lose(self, device: Device, error: int) -> None:
        self._let_go(device)
        device.close()
        self._counters.mark_lost(device.slot, error)
        self._poke()

    def _poke(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._notice, 1)

    # -- requests

    def _serve(self) -> bool:
        """Do one request and answer it. Return False once control has ended."""
        try:
            data, fds, _, _ = socket.recv_fds(self._control, MESSAGE_MAX_BYTES, FDS_MAX, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        if not data:
            return False
        request = decode_request(data)
        returned: list[int] = []
        try:
            reply = Reply(request.sequence, 0, self._do(request, fds, returned))
        except RefusedError as refused:
            reply = Reply(request.sequence, refused.error, refused.text)
        finally:
            for fd in fds:  # what was not taken
                os.close(fd)
        try:
            socket.send_fds(self._control, [encode_reply(reply)], returned)
        except (BlockingIOError, ConnectionError):
            # Nobody reads answers: the supervisor has given up on them, or is gone, which the next turn sees.
            pass
        finally:
            for fd in returned:
                os.close(fd)
        return True

    def _do(self, request: Request, fds: list[int], returned: list[int]) -> str:
        """Do as asked, taking out of `fds` what is kept; return what to say. Raises RefusedError."""
        match request:
            case Attach():
                return self._attach(request, fds)
            case Configure(_, slot, serial):
                return self._configure(self._device(slot, serial), fds)
            case Detach(_, slot, serial):
                device = self._by_slot.get(slot)
                if device is not None and device.serial == serial:
                    self._let_go(device)
                    device.close()
            case Release(_, slot, serial):
                device = self._device(slot, serial)
                self._let_go(device)
                returned.append(os.dup(device.fd))
                device.file.close()  # with its offloads: whoever takes it over takes them
            case Feed(_, slot, serial, area):
                stage = self._device(slot, serial).chain.by_area(area)
                if stage is None:
                    raise RefusedError(errno.ENOENT)
                if not fds:
                    raise RefusedError(errno.EMFILE)
                if not stages.feed(stage, fds[0]):
                    raise RefusedError(errno.EOPNOTSUPP)
                del fds[0]
            case Ping():
                pass
            case _ as unreachable:
                assert_never(unreachable)
        return ""

    def _device(self, slot: int, serial: int) -> Device:
        device = self._by_slot.get(slot)
        if device is None or device.serial != serial:
            raise RefusedError(errno.ENODEV)
        return device

    def _attach(self, request: Attach, fds: list[int]) -> str:
        if len(fds) < 2:
            raise RefusedError(errno.EMFILE)  # the kernel drops fds beyond RLIMIT_NOFILE (net/core/scm.c)
        if request.slot >= self._counters.slots or request.slot in self._by_slot:
            raise RefusedError(errno.EINVAL)
        fd = fds[0]
        if os.get_blocking(fd):
            raise RefusedError(errno.EINVAL)  # it would stop the loop, and its flags are not ours to set (`syscalls`)
        setup = _read_setup(fds[1])
        try:
            self._epoll.register(fd, select.EPOLLIN)
        except OSError as failure:
            raise RefusedError(failure.errno or errno.EIO) from failure
        try:
            device = Device(
                fd,
                request.slot,
                request.serial,
                setup,
                counters=self._counters,
                box=self._box,
                ports=self._ports,
                lines=self._lines,
                poke=self._poke,
            )
        except BaseException:
            self._epoll.unregister(fd)
            raise
        del fds[0]
        try:
            said = self._set_up(device, setup, fds)
        except RefusedError:
            self._epoll.unregister(fd)
            device.file.close()
            raise
        self._by_fd[fd] = self._by_slot[request.slot] = device
        self._ports.add(device)
        return said

    def _configure(self, device: Device, fds: list[int]) -> str:
        if not fds:
            raise RefusedError(errno.EMFILE)
        return self._set_up(device, _read_setup(fds[0]), fds)

    def _set_up(self, device: Device, setup: work.Setup, fds: list[int]) -> str:
        """Give the device the stages of `setup`, whose memfd is the first of `fds`; the rest are files of stages."""
        old = device.chain
        kept = {stage.area for stage in setup.stages if old.by_area(stage.area) is not None}
        wanted = sum(stage.files for stage in setup.stages if stage.area not in kept)
        if len(fds) != 1 + wanted:
            raise RefusedError(errno.EMFILE)
        files = fds[1:]
        del fds[1:]
        self._box.words[SERIAL] = device.serial
        try:
            chain = stages.build(
                setup,
                old,
                device,
                registry=self._registry,
                words=self._counters.words,
                box=self._box,
                files=files,
            )
        except stages.RefusedError as refused:
            raise RefusedError(errno.EBADRQC, str(refused)) from refused
        device.chain = chain
        staying = {stage.area for stage in chain.stages}
        stages.close([stage for stage in old.stages if stage.area not in staying], self._box)
        return json.dumps(stages.figure_names(chain), separators=(",", ":"))

    def _let_go(self, device: Device) -> None:
        # The fd must leave the epoll set by hand: a copy in flight or in the supervisor would keep it there.
        self._epoll.unregister(device.fd)
        del self._by_fd[device.fd], self._by_slot[device.slot]
        self._ports.remove(device)
        if self._lines is not None:
            self._lines.forget(device.name)
        self._box.words[SERIAL] = device.serial
        stages.close(device.chain.stages, self._box)
        device.chain = stages.Chain()


def _read_setup(fd: int) -> work.Setup:
    return work.decode(os.pread(fd, os.fstat(fd).st_size, 0))


def main(arguments: Sequence[str]) -> int:
    """Run a worker; return the exit status.

    The arguments: parent's pid, index, control, memory, box, notice, lines or -1, packets a second, and, as JSON,
    folders to import other packages' processors from, their names, and whether to have a ring.
    """
    parent_pid, index, control_fd, memory_fd, box_fd, notice_fd, lines_fd, packets_per_s = map(int, arguments[:8])
    folders, custom, io_uring = json.loads(arguments[8])
    counters = CounterWriter(memory_fd)
    os.close(memory_fd)
    box = BlackBox(box_fd)
    os.close(box_fd)
    sys.path += folders
    registry = Registry(custom)
    lines = _open_lines(lines_fd, packets_per_s) if lines_fd >= 0 else None
    with socket.socket(fileno=control_fd) as control:
        control.setblocking(False)
        ring = open_ring() if io_uring else None
        worker = Worker(control, counters, box, notice_fd, lines, registry, ring)
        # Everything is imported and open by now: from here on nothing else will be.
        confine(index, parent_pid)
        worker.run()
    return 0


def _open_lines(fd: int, packets_per_s: int) -> "PacketLines":
    # Parsing and wording cost 20 ms of start-up: only for those who want them.
    from service.dataplane.packet_lines import PacketLines

    lines = socket.socket(fileno=fd)
    lines.setblocking(False)
    return PacketLines(lines, packets_per_s, time.monotonic)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
