"""How answers get onto the wire: whole ones in one piece, streams as they come."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

from service.api.connection import HELD_BYTES_MAX, Connection

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
Send = Callable[[Any], Awaitable[None]]


class Wire(asyncio.Transport):
    """Remembers each write, and whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.sent.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


async def answered(send: Callable[[Send], Awaitable[None]], request: bytes = GET, wire: Wire | None = None) -> Wire:
    async def app(_scope: Any, _receive: Any, to: Send) -> None:
        await send(to)

    config = uvicorn.Config(app, lifespan="off", log_config=None)
    config.load()
    state = uvicorn.server.ServerState()
    connection, wire = Connection(config, state, {}), wire or Wire()
    connection.connection_made(wire)
    connection.data_received(request)
    await asyncio.gather(*state.tasks)
    connection._unset_keepalive_if_required()
    return wire


def head(*headers: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def body(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def test_head_and_body_of_an_answer_are_one_write() -> None:
    async def send(to: Send) -> None:
        await to(head((b"content-length", b"5")))
        await to(body(b"hello"))

    wire = asyncio.run(answered(send))
    (whole,) = wire.sent
    assert whole.startswith(b"HTTP/1.1 200 OK\r\n")
    assert whole.endswith(b"\r\n\r\nhello")
    assert not wire.closed


def test_an_answer_before_closing_is_sent_whole() -> None:
    async def send(to: Send) -> None:
        await to(head((b"content-length", b"5")))
        await to(body(b"hello"))

    wire = asyncio.run(answered(send, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")))
    assert (len(wire.sent), wire.sent[0][-5:], wire.closed) == (1, b"hello", True)


def test_a_part_of_a_stream_goes_out_before_the_next_is_there() -> None:
    wire, seen = Wire(), []

    async def send(to: Send) -> None:
        await to(head())
        await to(body(b"one", more=True))
        await asyncio.sleep(0)
        seen.append(b"".join(wire.sent))
        await to(body(b"two"))

    asyncio.run(answered(send, wire=wire))
    assert seen[0].endswith(b"3\r\none\r\n")
    assert b"".join(wire.sent).endswith(b"3\r\ntwo\r\n0\r\n\r\n")


def test_no_more_than_a_little_is_held_back() -> None:
    part = bytes(HELD_BYTES_MAX // 4)

    async def send(to: Send) -> None:
        await to(head((b"content-length", str(len(part) * 100).encode())))
        for number in range(100):  # without ever giving the loop a turn
            await to(body(part, more=number < 99))

    wire = asyncio.run(answered(send))
    assert max(len(each) for each in wire.sent) <= HELD_BYTES_MAX + len(part)
    assert sum(len(each) for each in wire.sent) > 100 * len(part)


def test_what_is_known_of_a_connection_is_known_to_its_requests_and_to_no_other() -> None:
    seen: list[dict[str, int]] = []

    async def app(scope: Any, _receive: Any, to: Send) -> None:
        seen.append(scope["state"]["connection"])
        await to(head((b"content-length", b"0")))
        await to(body(b""))

    async def call() -> None:
        config = uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        shared: dict[str, Any] = {}
        for _ in range(2):
            state = uvicorn.server.ServerState()
            connection = Connection(config, state, shared)
            connection.connection_made(Wire())
            for _ in range(2):
                connection.data_received(GET)
                await asyncio.gather(*state.tasks)
            connection._unset_keepalive_if_required()

    asyncio.run(call())
    assert seen[0] is seen[1]
    assert seen[2] is seen[3]
    assert seen[0] is not seen[2]
