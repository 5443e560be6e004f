"""Packets in words for the service's debug log: the worker's end, where the rate is limited.

Loaded by a worker only if somebody wants the lines. Must never wait and never cost packets: what cannot be
sent at once is counted instead. What a line says is `packet.summary`'s business.
"""

import socket
from collections.abc import Callable
from typing import Final

from service.dataplane.contract import Mode
from service.dataplane.wire import PacketLine, encode_line
from service.packet.parse import parse, parse_frame
from service.packet.summary import summary

FLUSH_S: Final = 1.0
"""A number of suppressed packets waits this long for a line to go with."""


class TokenBucket:
    """Lets through `rate_per_s` a second in the long run, and one second's worth at once after a pause."""

    def __init__(self, rate_per_s: int, now: float) -> None:
        self._rate_per_s = rate_per_s
        self._tokens = float(rate_per_s)
        self._filled = now

    def take(self, now: float) -> bool:
        """Take one if there is one. `now` is in seconds and never goes back."""
        self._tokens = min(self._rate_per_s, self._tokens + (now - self._filled) * self._rate_per_s)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class PacketLines:
    """Sends a line for each packet while the rate allows, and tells of each device how many it left out."""

    def __init__(self, lines: socket.socket, packets_per_s: int, clock: Callable[[], float]) -> None:
        """`lines` is a connected, non-blocking SOCK_SEQPACKET; `clock` is monotonic, in seconds."""
        self._lines = lines
        self._clock = clock
        self._bucket = TokenBucket(packets_per_s, clock())
        self._suppressed: dict[str, int] = {}
        self._waiting_since: dict[str, float] = {}

    @property
    def waiting(self) -> bool:
        """Whether `flush` has something to tell soon."""
        return bool(self._suppressed)

    def packet(self, device: str, mode: Mode, data: bytes | bytearray | memoryview, length: int) -> None:
        """Show or count the packet in `data[:length]`. Never waits, never raises."""
        now = self._clock()
        if self._bucket.take(now):
            parsed = parse(data, length) if mode == "tun" else parse_frame(data, length)
            if self._send(PacketLine(device, summary(parsed), self._suppressed.get(device, 0))):
                return
        self._waiting_since.setdefault(device, now)
        self._suppressed[device] = self._suppressed.get(device, 0) + 1

    def flush(self) -> None:
        """Tell the numbers that have waited for `FLUSH_S` and found no line to go with."""
        now = self._clock()
        for device in [name for name, since in self._waiting_since.items() if now - since >= FLUSH_S]:
            if not self._send(PacketLine(device, "", self._suppressed[device])):
                self._waiting_since[device] = now

    def forget(self, device: str) -> None:
        """Tell the number of a device that goes away, if it can be told at once, and drop it."""
        count = self._suppressed.get(device, 0)
        if count:
            self._send(PacketLine(device, "", count))
        self._drop(device)

    def _send(self, line: PacketLine) -> bool:
        try:
            self._lines.send(encode_line(line))
        except OSError:
            # EAGAIN: the service is slow. EPIPE, ECONNRESET: it is about to go; control will say so.
            return False
        self._drop(line.device)
        return True

    def _drop(self, device: str) -> None:
        self._suppressed.pop(device, None)
        self._waiting_since.pop(device, None)
