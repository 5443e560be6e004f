"""One device in a worker: its packets in and out, counted, and through its chain.

The hot path. What is asked of the worker, and which devices there are, is `worker`'s; what a stage is, `stages`'.

Theory of operation. A batch is read into the black box's buffers, which all devices share: it is through the chain
before the next device has its turn. Writes never wait: what the kernel does not take is counted and gone. A packet is
written by one stage's call at a time, and runs through the target's to_kernel stages first; those may send again, which
is followed `NESTED_MAX` deep and no deeper.
"""

import contextlib
import errno
import fcntl
import io
import os
import select
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Final

from service.dataplane.blackbox import AREA, COUNT, INDEX, OFFSET, SERIAL, BlackBox
from service.dataplane.contract import BATCH_MAX, DROP_REASONS, NO_OFFLOAD, Batch, Direction, DropReason, Mode, Packet
from service.dataplane.layout import DIRECTION_WORDS, DROPS_AT, CounterWriter
from service.dataplane.stages import Chain, run
from service.dataplane.work import Setup
from service.packet.classify import classify, classify_frame

if TYPE_CHECKING:
    from service.dataplane.packet_lines import PacketLines

_TUNSETOFFLOAD: Final = 0x400454D0  # linux/if_tun.h

HEADER_BYTES: Final = 10
"""struct virtio_net_hdr (linux/virtio_net.h), as TUNSETVNETHDRSZ is left."""

BATCH_BYTES: Final = 256 * 1024
"""With large segments a batch ends here: what is read has to be in the processor's cache still when it is written."""

NESTED_MAX: Final = 8
"""Devices that one packet may be sent through before it is taken to go round."""

_REASON: Final = {reason: index for index, reason in enumerate(DROP_REASONS)}
_CUSTOM: Final = _REASON[DropReason.CUSTOM]
_END_OF_CHAIN: Final = _REASON[DropReason.END_OF_CHAIN]

_FOR_ALL: Final = frozenset({DropReason.OUTPUT_DOWN, DropReason.NO_OUTPUT})
"""Where one packet was refused for these, so would be the next."""

Drop = Callable[[str, int], None]
Wire = bytes | bytearray | memoryview


class DeviceBatch(Batch):
    """A batch that knows which buffer each packet came in, so that a crash can be told with the packet."""

    __slots__ = ("_box", "_places")

    def __init__(
        self, device: "Device", direction: Direction, packets: list[Packet], headers: list[Packet] | None, time_ns: int
    ) -> None:
        self.interface = device.name
        self.mode = device.mode
        self.direction = direction
        self.packets = packets
        self.headers = headers
        self.time_ns = time_ns
        self.at = 0
        self._drop = device.drop
        self._answer = device.answer
        self._box = device.box.words
        self._places: list[int] | None = None

    def __iter__(self) -> Iterator[Packet]:
        """The packets one by one, the black box knowing which."""
        box, places = self._box, self._places
        for at, packet in enumerate(self.packets):
            self.at = at
            box[INDEX] = at if places is None else places[at]
            yield packet

    def take(self, indexes: Sequence[int]) -> None:
        """See `Batch.take`."""
        places = self._places
        self._places = list(indexes) if places is None else [places[index] for index in indexes]
        super().take(indexes)


class Port:
    """An interface's name as others' output (`contract.Output`): the device behind it comes and goes."""

    __slots__ = ("__weakref__", "device", "name")

    def __init__(self, name: str, device: "Device | None") -> None:
        self.name: str = name
        self.device = device

    @property
    def ready(self) -> bool:
        """See `contract.Output.ready`."""
        return self.device is not None and self.device.up

    def send(self, batch: Batch, indexes: Sequence[int] | None = None) -> int:
        """See `contract.Output.send`."""
        packets, headers = batch.packets, batch.headers
        if indexes is not None:
            packets = [packets[index] for index in indexes]
            headers = None if headers is None else [headers[index] for index in indexes]
        device = self.device
        if device is None:
            batch._drop(DropReason.NO_OUTPUT, len(packets))  # the batch's other half
            return 0
        if device.mode != batch.mode:
            batch._drop(DropReason.MODE, len(packets))
            return 0
        return device.send(packets, headers, batch._drop)


class Ports:
    """The outputs of a worker's devices by name, as long as somebody holds them."""

    def __init__(self) -> None:
        self._ports: weakref.WeakValueDictionary[str, Port] = weakref.WeakValueDictionary()
        self._devices: dict[str, Device] = {}

    def port(self, name: str) -> Port:
        """The output of that name, its device there or not."""
        found = self._ports.get(name)
        if found is None:
            found = self._ports[name] = Port(name, self._devices.get(name))
        return found

    def add(self, device: "Device") -> None:
        """From now on this is the device of its name."""
        self._devices[device.name] = device
        port = self._ports.get(device.name)
        if port is not None:
            port.device = device

    def remove(self, device: "Device") -> None:
        """It is no longer there."""
        if self._devices.get(device.name) is device:
            del self._devices[device.name]
            port = self._ports.get(device.name)
            if port is not None:
                port.device = None

    def look(self) -> None:
        """See whether those that were down are up again."""
        for port in list(self._ports.values()):
            if port.device is not None and not port.device.up:
                port.device.look()


class Device:
    """An attached device. Closing `file` closes the fd."""

    def __init__(
        self,
        fd: int,
        slot: int,
        serial: int,
        setup: Setup,
        *,
        counters: CounterWriter,
        box: BlackBox,
        ports: Ports,
        lines: "PacketLines | None",
        poke: Callable[[], None],
    ) -> None:
        """Take over `fd` and zero its figures. `poke` has the service look at the worker."""
        self.fd: Final = fd
        self.file: Final = io.FileIO(fd, "r+b")
        self.slot: Final = slot
        self.serial: Final = serial
        self.name: Final = setup.name
        self.mode: Final[Mode] = setup.mode
        self.vnet_hdr: Final = setup.vnet_hdr
        self.box: Final = box
        self.output: Final = ports.port
        self.poke: Final = poke
        self._lines: Final = lines
        self.chain = Chain()
        self.up = True
        """Whether it took the last packet that was written to it, or has come up since."""
        self._classify: Final[Callable[[Any, int], int]] = classify if setup.mode == "tun" else classify_frame
        self._counters: Final = counters
        self._start: Final = counters.clear(slot)
        self._words: Final = counters.words
        self._drops_at: Final = self._start + DROPS_AT
        self._nested = 0
        if setup.vnet_hdr:
            self._headers: Final = [buffer[:HEADER_BYTES] for buffer in box.buffers]
            self._bodies: Final = [buffer[HEADER_BYTES:] for buffer in box.buffers]

    def close(self) -> None:
        """Close the descriptor. What offloads were asked for are taken back first: the device would keep them, and hand
        segments to a next reader that does not expect any.
        """
        if self.vnet_hdr:
            with contextlib.suppress(OSError):  # it is gone, or no TUN
                fcntl.ioctl(self.fd, _TUNSETOFFLOAD, 0)
        self.file.close()

    def clear_area(self, area: int) -> int:
        """Zero the figures of a stage that is about to begin; return its first word."""
        return self._counters.clear_area(self._start, area)

    # -- in

    def drain(self, events: int) -> int:
        """Read up to a batch, count it, and hand it through the chain. Return the errno that it is lost with, or 0.

        EBADFD: deleted (drivers/net/tun.c, tun_chr_read_iter). EFAULT: while it was being deleted. Raises what a
        processor raises.
        """
        lengths: list[int] = []
        error = 0
        read = self.file.readinto
        buffers = self.box.buffers
        try:
            # readinto is one read(2), and says None instead of raising when there is nothing to read.
            if self.vnet_hdr:
                room = BATCH_BYTES
                for buffer in buffers:
                    length = read(buffer)
                    if not length:
                        break
                    lengths.append(length)
                    room -= length
                    if room < 0:
                        break
                else:
                    length = 1
            elif self.chain.from_kernel or self._lines is not None:
                lengths.extend(takewhile(bool, map(read, buffers)))
            else:
                return self._count(events)
        except OSError as failure:
            error = failure.errno or errno.EIO
        else:
            if len(lengths) < BATCH_MAX and events & (select.EPOLLERR | select.EPOLLHUP):
                error = self._ended()
        if lengths:
            self._hand_through(lengths)
        return error

    def _ended(self) -> int:
        """Why it says that it has an end, if everything is read."""
        try:
            length = self.file.readinto(self.box.buffers[-1])
        except OSError as failure:
            return failure.errno or errno.EIO
        if length is None:
            return errno.ENODEV  # being unregistered (tun.c, tun_chr_poll)
        return errno.EPIPE if length == 0 else 0  # the end of a socket; a TUN has none

    def _count(self, events: int) -> int:
        """As `drain`, where there is nothing to do but to count."""
        read = self.file.readinto
        kind_of = self._classify
        buffer = self.box.buffers[0]
        words = self._words
        start = self._start
        error = total = 0
        # Packets of one class come in runs: add a run at once, not each packet.
        run_class = run_packets = run_bytes = 0
        for _ in range(BATCH_MAX):
            try:
                length = read(buffer)
            except OSError as failure:
                error = failure.errno or errno.EIO
                break
            if not length:
                if length is not None:
                    error = errno.EPIPE
                elif events & (select.EPOLLERR | select.EPOLLHUP):
                    error = errno.ENODEV
                break
            kind = kind_of(buffer, length)
            if kind != run_class:
                at = start + 2 * run_class
                words[at] += run_packets
                words[at + 1] += run_bytes
                total += run_packets
                run_class = kind
                run_packets = run_bytes = 0
            run_packets += 1
            run_bytes += length
        if run_packets:
            at = start + 2 * run_class
            words[at] += run_packets
            words[at + 1] += run_bytes
            words[self._drops_at + _END_OF_CHAIN] += total + run_packets
        return error

    def _hand_through(self, lengths: list[int]) -> None:
        box = self.box
        count = len(lengths)
        if self.vnet_hdr:
            lengths = [max(0, length - HEADER_BYTES) for length in lengths]
            packets = [body[:length] for body, length in zip(self._bodies, lengths, strict=False)]
            headers: list[Packet] | None = self._headers[:count]
        else:
            packets = [buffer[:length] for buffer, length in zip(box.buffers, lengths, strict=False)]
            headers = None
        self._add(self._start, packets)
        if self._lines is not None:
            for packet in packets:
                self._lines.packet(self.name, self.mode, packet, len(packet))
        chain = self.chain.from_kernel
        if not chain:
            self._words[self._drops_at + _END_OF_CHAIN] += count
            return
        for index, length in enumerate(lengths):
            box.lengths[index] = length
        box_words = box.words
        box_words[SERIAL] = self.serial
        box_words[INDEX] = 0
        box_words[OFFSET] = HEADER_BYTES if self.vnet_hdr else 0
        box_words[COUNT] = count
        batch = DeviceBatch(self, "from_kernel", packets, headers, time.time_ns())
        try:
            run(chain, batch, self._words, box_words)
        except BaseException as error:
            box.note(error, batch.packets[batch.at] if batch.at < len(batch.packets) else None)
            raise
        box_words[COUNT] = 0
        left = len(batch.packets)
        if left:
            self._words[self._drops_at + _END_OF_CHAIN] += left

    # -- out

    def answer(self, packet: Wire) -> bool:
        """See `Batch.answer`."""
        return self.send([memoryview(packet)], None, self.drop) == 1

    def drop(self, reason: str, count: int) -> None:
        """Count packets that end here."""
        self._words[self._drops_at + _REASON.get(reason, _CUSTOM)] += count

    def send(self, packets: list[Packet], headers: list[Packet] | None, drop: Drop) -> int:
        """Write packets into the device, through the to_kernel stages; return how many it took.

        What the kernel refuses is counted by `drop`, what a stage drops at this device. Raises what a processor
        raises.
        """
        if self.chain.to_kernel:
            if self._nested == NESTED_MAX:
                drop(DropReason.OUTPUT_REFUSED, len(packets))
                return 0
            batch = DeviceBatch(self, "to_kernel", packets, headers, time.time_ns())
            self._run_nested(batch)
            packets, headers = batch.packets, batch.headers
        if not packets:
            return 0
        return self._emit(packets, headers, drop)

    def _run_nested(self, batch: DeviceBatch) -> None:
        """The to_kernel stages, in the middle of another device's stage."""
        box = self.box.words
        serial, area, count = box[SERIAL], box[AREA], box[COUNT]
        box[SERIAL] = self.serial
        box[COUNT] = 0  # the packets may be no buffers' of ours
        self._nested += 1
        try:
            run(self.chain.to_kernel, batch, self._words, box)
        except BaseException as error:
            self.box.note(error, batch.packets[batch.at] if batch.at < len(batch.packets) else None)
            raise
        self._nested -= 1
        box[SERIAL], box[AREA], box[COUNT] = serial, area, count

    def _emit(self, packets: list[Packet], headers: list[Packet] | None, drop: Drop) -> int:
        write: Callable[[Any], int | None]
        wires: Sequence[Any]
        if self.vnet_hdr:
            fd, writev = self.fd, os.writev
            wires = list(zip(headers or [NO_OFFLOAD] * len(packets), packets, strict=True))

            def write(parts: Any) -> int | None:
                return writev(fd, parts)

        else:
            write = self.file.write
            wires = packets
        done: list[int | None] = []
        refused: list[int] = []
        while len(done) < len(wires):
            try:
                done.extend(map(write, wires[len(done) :] if done else wires))
            except OSError as failure:
                reason = self._why(failure)
                first = len(done)
                last = len(wires) if reason in _FOR_ALL else first + 1
                drop(reason, last - first)
                refused.extend(range(first, last))
                done.extend([0] * (last - first))
        if None in done:
            full = [index for index, written in enumerate(done) if written is None]
            drop(DropReason.OUTPUT_FULL, len(full))
            refused += full
        if refused:
            out = set(refused)
            packets = [packet for index, packet in enumerate(packets) if index not in out]
        if packets:
            self.up = True
        self._add(self._start + DIRECTION_WORDS, packets)
        return len(packets)

    def _why(self, failure: OSError) -> str:
        """The reason that a write that failed is counted with (drivers/net/tun.c, tun_get_user)."""
        match failure.errno:
            case errno.EIO:
                self.up = False
                return DropReason.OUTPUT_DOWN
            case errno.EBADFD | errno.ENODEV | errno.EPIPE | errno.ECONNRESET:
                self.up = False
                return DropReason.NO_OUTPUT
            case errno.EAGAIN | errno.ENOBUFS | errno.ENOMEM:
                return DropReason.OUTPUT_FULL
            case _:
                return DropReason.OUTPUT_REFUSED

    def look(self) -> None:
        """See whether it is up: a TUN that is down is never writable (tun.c, tun_sock_writeable)."""
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        self.up = any(events & select.POLLOUT for _, events in poll.poll(0))

    def _add(self, start: int, packets: list[Packet]) -> None:
        """Count packets by class, runs at once."""
        words = self._words
        kind_of = self._classify
        run_class = run_packets = run_bytes = 0
        for packet in packets:
            length = len(packet)
            kind = kind_of(packet, length)
            if kind != run_class:
                at = start + 2 * run_class
                words[at] += run_packets
                words[at + 1] += run_bytes
                run_class = kind
                run_packets = run_bytes = 0
            run_packets += 1
            run_bytes += length
        at = start + 2 * run_class
        words[at] += run_packets
        words[at + 1] += run_bytes
