"""Packets in words for the service's debug log: the supervisor's end, a thread that hands lines on.

It has a thread of its own so that a slow log delays no news of a dead worker. What is shown and how often is
decided in the worker (`packet_lines`).
"""

import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Final

import structlog

from service.dataplane.wire import MESSAGE_MAX_BYTES, WireError, decode_line

_LINES_A_TURN: Final = 64


class LineReader:
    """Reads the sockets it is given to their end and calls `packet_log` for every line."""

    def __init__(self, packet_log: Callable[[str, str, int], None]) -> None:
        """`packet_log` gets the device's name, the line (empty: a number alone) and how many were left out."""
        self._packet_log = packet_log
        self._log = structlog.get_logger("tunledger.dataplane")
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._sockets: dict[int, socket.socket] = {}
        self._complained = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="dataplane-lines", daemon=True)
        self._thread.start()

    def add(self, lines: socket.socket) -> None:
        """Read `lines`, a SOCK_SEQPACKET, until its other end is closed; then close it."""
        lines.setblocking(False)
        self._sockets[lines.fileno()] = lines
        self._epoll.register(lines.fileno(), select.EPOLLIN)

    def close(self, timeout_s: float) -> None:
        """Stop: what is already there is still read, then everything is closed. Call it after the last `add`."""
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._closing:
            for fd, _ in self._epoll.poll():
                if fd != self._wake:
                    self._read(fd)
        for fd in list(self._sockets):
            while self._read(fd):
                pass
        for lines in self._sockets.values():
            lines.close()
        self._epoll.close()
        os.close(self._wake)

    def _read(self, fd: int) -> bool:
        """Hand on some lines; return whether there may be more."""
        lines = self._sockets[fd]
        for _ in range(_LINES_A_TURN):
            try:
                data = lines.recv(MESSAGE_MAX_BYTES)
            except BlockingIOError:
                return False
            except ConnectionError:
                data = b""
            if not data:
                self._epoll.unregister(fd)
                del self._sockets[fd]
                lines.close()
                return False
            self._hand_on(data)
        return True

    def _hand_on(self, data: bytes) -> None:
        try:
            line = decode_line(data)
        except WireError:
            return  # from a worker gone wild; nothing to show
        try:
            self._packet_log(line.device, line.line, line.suppressed)
        except Exception:  # noqa: BLE001 - whatever it is, see below
            # The log of packets must not end because one line could not be written; once is enough to say so.
            if not self._complained:
                self._complained = True
                self._log.exception("packet lines cannot be logged")
