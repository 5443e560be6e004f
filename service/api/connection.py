"""uvicorn's HTTP/1.1 connection, with head and body of an answer in one system call, and room for what is known of it.

uvicorn writes them one after the other, and asyncio sends each write at once. On the event loop's thread a system call
costs more than itself: other threads take the interpreter meanwhile. Nothing of HTTP is decided here.
"""

import asyncio
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HELD_BYTES_MAX = 64 * 1024  # more is sent at once, so that the transport tells when the client is slow


class Connection(HttpToolsProtocol):
    """Give it to `uvicorn.Config` as `http`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """A client is there. Its requests share `scope["state"]["connection"]`."""
        self.app_state = {**self.app_state, "connection": {}}
        super().connection_made(cast("asyncio.Transport", _Joined(transport, self.loop)))

    def on_response_complete(self) -> None:
        """An answer is written: out with it."""
        cast("_Joined", self.transport).flush()
        super().on_response_complete()


class _Joined:
    """A transport that holds writes back until the answer is complete, the loop comes round, or it is to be closed."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport, self._loop = transport, loop
        self._held: list[bytes] = []
        self._size_bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send this soon."""
        if not self._held:
            self._loop.call_soon(self.flush)
        self._held.append(data)
        self._size_bytes += len(data)
        if self._size_bytes > HELD_BYTES_MAX:
            self.flush()

    def flush(self) -> None:
        """Send what is held back."""
        if self._held:
            data = b"".join(self._held)
            self._held.clear()
            self._size_bytes = 0
            self._transport.write(data)

    def close(self) -> None:
        """Send what is held back, then close."""
        self.flush()
        self._transport.close()
