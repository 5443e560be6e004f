"""Asks the kernel whose a TCP connection from this host is: one exact sock_diag(7) query, no dump.

Formats: include/uapi/linux/inet_diag.h, net/ipv4/inet_diag.c. Who may call with which uid is `service.api.access`'s.
"""

import contextlib
import errno
import functools
import ipaddress
import os
import socket
import struct
from typing import Final

from service.domain.errors import ErrorCode, TunledgerError

NETLINK_SOCK_DIAG: Final = 4
SOCK_DIAG_BY_FAMILY: Final = 20
NLMSG_ERROR: Final = 2
NLM_F_REQUEST: Final = 0x1
ANY_COOKIE: Final = 0xFFFFFFFF  # INET_DIAG_NOCOOKIE
ALL_STATES: Final = 0xFFFFFFFF
TCP_LISTEN: Final = 10  # include/net/tcp_states.h
SEQUENCE_MAX: Final = 0xFFFFFFFF  # struct nlmsghdr, include/uapi/linux/netlink.h

_NLMSGHDR = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI")  # family, protocol, extensions, padding, states
_ANSWER = struct.Struct("=BBBB")  # family, state, timer, retransmits
_TAIL = struct.Struct("=IIIII")  # expires, rqueue, wqueue, uid, inode
_SOCKID_BYTES = 2 + 2 + 16 + 16 + 4 + 8

Endpoint = tuple[str, int]

# The kernel's word that there is no such socket (net/ipv4/inet_hashtables.c), or that asking is not for this process or
# this kernel. Anything else says nothing of the caller, and may pass.
_DEFINITE = frozenset(
    {
        errno.ENOENT,
        errno.EPERM,
        errno.EACCES,
        errno.EAFNOSUPPORT,
        errno.EPROTONOSUPPORT,
        errno.EOPNOTSUPP,
        errno.ENOSYS,
        errno.EINVAL,
    }
)


class Asker:
    """Asks again and again on one socket, which it opens with the first question; for one thread.

    Questions and answers cannot get mixed up: the kernel answers within the sending call, each answer bears the number
    of its question, and after anything unexpected the socket is closed.
    """

    def __init__(self) -> None:
        self._diag: socket.socket | None = None
        self._asked = 0

    def owner(self, client: Endpoint, server: Endpoint) -> int:
        """The uid that opened the client's side of a TCP connection between two addresses of this host.

        Only a socket that a process still holds counts. The kernel gives uid 0 for one in TIME-WAIT (and for a
        half-open request), so that believing it would make root of anybody who closes fast enough; such have no inode.

        Raises:
            TunledgerError: unauthorized, if the kernel knows no such socket or nobody holds it any more, or if this
                process may not ask at all; overloaded, if the kernel could not be asked just now.
        """
        ip, port = _address(client[0]), client[1]
        peer, peer_port = _address(server[0]), server[1]
        family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
        body = (
            _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, ALL_STATES)
            + struct.pack("!HH", port, peer_port)
            + ip.packed.ljust(16, b"\0")
            + peer.packed.ljust(16, b"\0")
            + struct.pack("=III", 0, ANY_COOKIE, ANY_COOKIE)
        )
        try:
            answer = self._ask(body)
        except OSError as error:
            self.close()
            raise _refused(client, error.errno or errno.ETIMEDOUT) from error
        if len(answer) < _NLMSGHDR.size or _NLMSGHDR.unpack_from(answer)[3] != self._asked:
            self.close()
            raise _unknown(client, "the kernel's answer is to another question")
        return read_owner(answer, client)

    def close(self) -> None:
        """Close the socket; another question opens another."""
        if self._diag is not None:
            self._diag.close()
            self._diag = None

    def _ask(self, body: bytes) -> bytes:
        diag = self._diag
        if diag is None:
            diag = self._diag = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_SOCK_DIAG
            )
        self._asked = self._asked % SEQUENCE_MAX + 1
        header = _NLMSGHDR.pack(_NLMSGHDR.size + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, self._asked, 0)
        diag.sendto(header + body, (0, 0))
        return diag.recv(8192)


def owner(client: Endpoint, server: Endpoint) -> int:
    """The same as `Asker.owner`, asked once: for whoever changes threads or network namespaces in between."""
    with contextlib.closing(Asker()) as asker:
        return asker.owner(client, server)


@functools.lru_cache(64)  # a service has few addresses, and reading one takes longer than the kernel's answer
def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text.partition("%")[0])


def read_owner(answer: bytes, client: Endpoint) -> int:
    """The uid in the kernel's answer. Raises TunledgerError: as `owner`."""
    _length, kind, _flags, _sequence, _port = _NLMSGHDR.unpack_from(answer)
    if kind == NLMSG_ERROR:
        (code,) = struct.unpack_from("=i", answer, _NLMSGHDR.size)
        raise _refused(client, -code)
    if kind != SOCK_DIAG_BY_FAMILY or len(answer) < _NLMSGHDR.size + _ANSWER.size + _SOCKID_BYTES + _TAIL.size:
        raise _unknown(client, "the kernel's answer makes no sense")
    _family, state, _timer, _retransmits = _ANSWER.unpack_from(answer, _NLMSGHDR.size)
    if state == TCP_LISTEN:  # what the lookup falls back on when the connection is gone; its owner is anybody
        raise _unknown(client, "there is no such connection, only somebody who listens on that port")
    tail = _NLMSGHDR.size + _ANSWER.size + _SOCKID_BYTES
    _expires, _rqueue, _wqueue, uid, inode = _TAIL.unpack_from(answer, tail)
    if inode == 0:
        raise _unknown(client, "no process holds that end of the connection any more")
    return int(uid)


def _refused(client: Endpoint, number: int) -> TunledgerError:
    if number in _DEFINITE:
        return _unknown(client, os.strerror(number))
    words = os.strerror(number) if number in errno.errorcode else f"error {number}"
    return TunledgerError(
        ErrorCode.OVERLOADED,
        f"cannot ask the kernel who calls: {words}; try again",
        retry=True,
        errno_name=errno.errorcode.get(number, str(number)),
    )


def _unknown(client: Endpoint, why: str) -> TunledgerError:
    return TunledgerError(
        ErrorCode.UNAUTHORIZED, f"the kernel does not say who called from {client[0]} port {client[1]}: {why}"
    )
