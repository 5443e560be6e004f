"""Many HTTP clients, in one process: `python -m bench.clients PORT CLIENTS SECONDS` prints commands a second.

Each client creates, changes and deletes one interface, over and over, on a connection that it keeps. Bare sockets, so
that the clients cost little of the processor that the service needs.
"""

import json
import socket
import sys
import threading
import time
from typing import Any


def main() -> None:
    """Run the clients, and print what they got done together."""
    port, clients, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    done: list[int] = []
    begun = time.monotonic()
    threads = [threading.Thread(target=_work, args=(port, number, begun + seconds, done)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(done) != clients:
        sys.exit("a client failed")
    print(sum(done) / (time.monotonic() - begun))


def _work(port: int, number: int, until: float, done: list[int]) -> None:
    commands = 0
    path = f"/api/v1/interfaces/client{number}"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while time.monotonic() < until:
            _exchange(connection, "POST", "/api/v1/interfaces", {"name": f"client{number}", "mtu": 1400})
            _exchange(connection, "PATCH", path, {"mtu": 1300})
            _exchange(connection, "DELETE", path, None)
            commands += 3
    done.append(commands)


def _exchange(connection: socket.socket, method: str, path: str, body: Any) -> None:
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    received = b""
    while b"\r\n\r\n" not in received:
        received += _more(connection)
    header, _, rest = received.partition(b"\r\n\r\n")
    lengths = [int(line[15:]) for line in header.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while lengths and len(rest) < lengths[0]:
        rest += _more(connection)
    if header.split()[1] not in {b"200", b"201", b"204"}:
        raise ValueError(f"{method} {path}: {header!r} {rest!r}")


def _more(connection: socket.socket) -> bytes:
    data = connection.recv(1 << 16)
    if not data:
        raise ConnectionError("the service closed the connection")
    return data


if __name__ == "__main__":
    main()
