"""Whose a connection is: what lets a caller in, so believing too much is the bug to find."""

import contextlib
import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from service.domain.errors import ErrorCode, TunledgerError
from service.kernel import peer
from tests.kernel.conftest import needs_other_uids, wait_until

NOBODY = 65534


@pytest.fixture(params=["127.0.0.1", "::1"])
def server(request: pytest.FixtureRequest, netns: None) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.create_server((request.param, 0), family=family) as listening:
        listening.settimeout(10)
        yield listening


def endpoint(name: tuple[str, int] | tuple[str, int, int, int]) -> peer.Endpoint:
    return name[0], name[1]


def owner_of(accepted: socket.socket) -> int:
    return peer.owner(endpoint(accepted.getpeername()), endpoint(accepted.getsockname()))


def refusal(accepted: socket.socket) -> TunledgerError:
    with pytest.raises(TunledgerError) as caught:
        owner_of(accepted)
    assert caught.value.code is ErrorCode.UNAUTHORIZED
    return caught.value


def state(of: socket.socket) -> int:
    """The TCP state of this end (tcp_info's first byte)."""
    return of.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


@contextlib.contextmanager
def connected(server: socket.socket) -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_connection(server.getsockname()[:2]) as client:
        accepted, _ = server.accept()
        with accepted:
            yield client, accepted


@pytest.mark.kernel
def test_own_connection_is_our_own_uid(server: socket.socket) -> None:
    with connected(server) as (_client, accepted):
        assert owner_of(accepted) == os.getuid()


CONNECT_AS_NOBODY = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET) as client:
    client.connect((sys.argv[1], int(sys.argv[2])))
    sys.stdin.read()
"""


@pytest.mark.kernel
def test_somebody_elses_connection_is_their_uid(server: socket.socket) -> None:
    needs_other_uids()
    command = [sys.executable, "-c", CONNECT_AS_NOBODY, *map(str, server.getsockname()[:2])]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        accepted, _ = server.accept()
        with accepted:
            assert owner_of(accepted) == NOBODY
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(10) == 0
            assert accepted.recv(1) == b""
            refusal(accepted)  # it is gone: never uid 0


@pytest.mark.kernel
def test_many_questions_on_one_socket_have_each_its_own_answer(server: socket.socket) -> None:
    with connected(server) as (_client, accepted), contextlib.closing(peer.Asker()) as asker:
        ends = endpoint(accepted.getpeername()), endpoint(accepted.getsockname())
        assert asker.owner(*ends) == os.getuid()
        opened = set(Path("/proc/self/fd").iterdir())
        with pytest.raises(TunledgerError, match="does not say who called"):
            asker.owner(("192.0.2.1", ends[0][1]), ends[1])
        for _ in range(3):
            assert asker.owner(*ends) == os.getuid()
        assert set(Path("/proc/self/fd").iterdir()) == opened


class Stale(socket.socket):
    """Gives the answer to the question before first."""

    def sendto(self, *args: Any) -> int:
        return super().sendto(*args) if hasattr(self, "late") else self.twice(*args)

    late: bool

    def twice(self, data: bytes, address: Any) -> int:
        self.late = True
        header = struct.pack("=IHHII", len(data), peer.SOCK_DIAG_BY_FAMILY, peer.NLM_F_REQUEST, 4711, 0)
        super().sendto(header + data[len(header) :], address)
        return super().sendto(data, address)


@pytest.mark.kernel
def test_the_answer_to_another_question_is_not_believed(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    with connected(server) as (_client, accepted), contextlib.closing(peer.Asker()) as asker:
        ends = endpoint(accepted.getpeername()), endpoint(accepted.getsockname())
        monkeypatch.setattr(socket, "socket", Stale)
        with pytest.raises(TunledgerError, match="to another question"):
            asker.owner(*ends)
        monkeypatch.undo()
        assert asker.owner(*ends) == os.getuid()


@pytest.mark.kernel
def test_client_that_closed_first_is_refused(server: socket.socket) -> None:
    """FIN-WAIT-2: the kernel keeps the end for a while, and nobody holds it."""
    with connected(server) as (client, accepted):
        client.close()
        assert accepted.recv(1) == b""
        assert "no process holds that end" in str(refusal(accepted))


@pytest.mark.kernel
def test_client_in_time_wait_is_refused_and_not_root(server: socket.socket) -> None:
    with connected(server) as (client, accepted):
        ends = endpoint(accepted.getpeername()), endpoint(accepted.getsockname())
        client.close()
        assert accepted.recv(1) == b""
    wait_until(lambda: time_waiting(ends[0][1]))
    with pytest.raises(TunledgerError, match="no process holds that end"):
        peer.owner(*ends)


def time_waiting(port: int) -> bool:
    """Whether some end with this local port is in TIME-WAIT (state 06 in /proc/net/tcp)."""
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(f":{port:04X}") and fields[3] == "06":
                return True
    return False


@pytest.mark.kernel
def test_client_that_only_stopped_sending_is_still_known(server: socket.socket) -> None:
    with connected(server) as (client, accepted):
        client.shutdown(socket.SHUT_WR)
        assert accepted.recv(1) == b""
        assert owner_of(accepted) == os.getuid()


@pytest.mark.kernel
def test_connection_that_was_reset_is_refused(server: socket.socket) -> None:
    with connected(server) as (client, accepted):
        ends = endpoint(accepted.getpeername()), endpoint(accepted.getsockname())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        wait_until(lambda: state(accepted) == 7)  # TCP_CLOSE
        with pytest.raises(TunledgerError, match="does not say who called"):
            peer.owner(*ends)


@pytest.mark.kernel
def test_whoever_listens_on_the_clients_port_is_not_the_caller(server: socket.socket) -> None:
    """The kernel's lookup falls back on a listener when there is no connection; here it is root's."""
    listener = endpoint(server.getsockname())
    with pytest.raises(TunledgerError, match="no such connection") as caught:
        peer.owner(listener, (listener[0], 1))
    assert caught.value.code is ErrorCode.UNAUTHORIZED


@pytest.mark.kernel
def test_each_end_has_its_own_owner(server: socket.socket) -> None:
    with connected(server) as (_client, accepted), pytest.raises(TunledgerError):
        peer.owner(("192.0.2.1", accepted.getpeername()[1]), endpoint(server.getsockname()))


def test_the_kernels_refusal_is_ours() -> None:
    answer = struct.pack("=IHHIIi", 36, peer.NLMSG_ERROR, 0, 1, 0, -errno.ENOENT) + bytes(16)
    with pytest.raises(TunledgerError, match="No such file") as caught:
        peer.read_owner(answer, ("127.0.0.1", 4711))
    assert str(caught.value).startswith("the kernel does not say who called from 127.0.0.1 port 4711: ")


SHORT = [errno.EINTR, errno.ENOMEM, errno.ENOBUFS, errno.EMFILE, errno.EAGAIN, None]


@pytest.mark.parametrize("number", SHORT)
def test_what_says_nothing_of_the_caller_is_to_be_tried_again(
    number: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not 401, which a client would take for the last word."""
    client, server = ("127.0.0.1", 4711), ("127.0.0.1", 8080)

    def fails(_asker: peer.Asker, _body: bytes) -> bytes:
        raise OSError(number, "failed") if number is not None else TimeoutError("timed out")

    monkeypatch.setattr(peer.Asker, "_ask", fails)
    with pytest.raises(TunledgerError) as asked:
        peer.owner(client, server)
    answer = struct.pack("=IHHIIi", 36, peer.NLMSG_ERROR, 0, 1, 0, -(number or errno.ETIMEDOUT)) + bytes(16)
    with pytest.raises(TunledgerError) as answered:
        peer.read_owner(answer, client)
    for caught in (asked, answered):
        assert (caught.value.code, caught.value.retry) == (ErrorCode.OVERLOADED, True)


@given(some.binary(min_size=16, max_size=120))
def test_a_garbled_answer_lets_nobody_in(answer: bytes) -> None:
    try:
        uid = peer.read_owner(answer, ("127.0.0.1", 1))
    except (TunledgerError, struct.error):
        return
    _length, kind, *_ = struct.unpack_from("=IHHII", answer)
    inode = struct.unpack_from("=I", answer, 16 + 4 + 48 + 16)[0]
    assert (kind, inode != 0) == (peer.SOCK_DIAG_BY_FAMILY, True), uid
