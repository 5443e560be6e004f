"""A blocking rtnetlink socket, and the few messages that we send and read.

pyroute2 makes the messages that are rare (a name, a hardware address), and judges in the tests those made here: they
are the same to the byte. To encode one takes it 50 us, five times as long as the kernel needs to carry it out, and to
be imported a tenth of a second, which the recovery of everything would wait for. Its decoder needs 370 us for one link,
ours 15 us; its sockets hide a retry of up to 9 s on EBUSY and hold back sequence numbers. Many messages go out in one
datagram, which the kernel works off while it is sent: that costs a tenth of asking one at a time. Formats:
rtnetlink(7), include/uapi/linux/if_link.h, if_addr.h, rtnetlink.h. Raises plain OSError (`NetlinkError`); `linux` puts
it into words.
"""

import ctypes
import errno
import fcntl
import functools
import ipaddress
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from service.domain.observed import LinkCounters, ObservedLink
from service.domain.token import Token, parse_token
from service.domain.values import Address, Mode

NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_CREATE = 0x100, 0x400
NLM_F_CAPPED, NLM_F_ACK_TLVS, NLM_F_DUMP_INTR = 0x100, 0x200, 0x10
NLMSGERR_ATTR_MSG = 1

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_GETROUTE = 24, 26

SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK = 270, 10, 11, 12

IFF_UP, IFF_RUNNING = 0x1, 0x40
IFA_F_PERMANENT = 0x80
KERNEL_MADE = {1, 2, 3}  # IFAPROT_KERNEL_LO, _RA, _LL (if_addr.h)
RT_TABLE_LOCAL, RTN_UNICAST = 255, 1
_OPERSTATES = ("UNKNOWN", "NOTPRESENT", "DOWN", "LOWERLAYERDOWN", "TESTING", "DORMANT", "UP")

_NLMSGHDR = struct.Struct("=IHHII")
_IFINFOMSG = struct.Struct("=BxHiII")
_IFADDRMSG = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")
_ATTR = struct.Struct("=HH")
_U32 = struct.Struct("=I")
_IFREQ_INDEX = struct.Struct("16si20x")  # struct ifreq: name, then ifr_ifindex
_STATS64 = struct.Struct("=8Q")  # the first eight of struct rtnl_link_stats64

DUMP_TRIES = 12
DUMP_PAUSE_S, DUMP_PAUSE_MAX_S = 0.001, 0.05  # between tries, doubling: 0.3 s in all, as long as 1,000 links take to go
RECEIVE_BYTES = 1 << 18
# What one answer may take up in the socket's receive buffer, which counts struct sk_buff and slab rounding as well: an
# error with its words, and a link (if_nlmsg_size is 1.3 to 2.5 kB).
ERROR_TAKES_BYTES, LINK_TAKES_BYTES = 1 << 11, 1 << 13
PIPELINED_MAX = 256  # messages in one datagram
REMEMBERED_MAX = 1 << 14  # links that were read one by one
LAYOUTS_MAX = 256  # lengths of messages about links, each with where its attributes stand
SO_RCVBUFFORCE = 33  # asm-generic/socket.h; past net.core.rmem_max, with CAP_NET_ADMIN
SIOCGIFINDEX = 0x8933  # linux/sockios.h
RTEXT_FILTER_SKIP_STATS = 1 << 3  # linux/rtnetlink.h
SEQUENCE_MAX = (1 << 32) - 1
ACK_TIMEOUT_S = 10  # the kernel answers at once; waiting longer means that something is very wrong


class NetlinkError(OSError):
    """The kernel refused a message: `errno` and, as `strerror`, its own words where it gave some (extended ack)."""


def _align(length: int) -> int:
    return (length + 3) & ~3


def attributes(data: bytes | memoryview, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Walk nlattrs: (type, start, stop) of each value in `data`; stops at the first that does not fit."""
    unpack = _ATTR.unpack_from
    while offset + 4 <= end:
        length, kind = unpack(data, offset)
        if length < 4 or offset + length > end:
            return
        yield kind & 0x3FFF, offset + 4, offset + length
        offset += (length + 3) & ~3


class IoVec(ctypes.Structure):
    """struct iovec, recvmsg(2)."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class MsgHdr(ctypes.Structure):
    """struct msghdr, recvmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("vectors", ctypes.c_void_p),
        ("vectors_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Desk:
    """Where answers are received that are there already."""

    def __init__(self) -> None:
        self._data = ctypes.create_string_buffer(RECEIVE_BYTES)
        self._vector = IoVec(ctypes.addressof(self._data), RECEIVE_BYTES)
        self._header = MsgHdr(vectors=ctypes.addressof(self._vector), vectors_count=1)
        self._pointer = ctypes.addressof(self._header)
        self._view = memoryview(self._data)
        self._receive = ctypes.PyDLL(None, use_errno=True).recvmsg
        self._receive.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
        self._receive.restype = ctypes.c_ssize_t

    def receive(self, fd: int) -> bytes | None:
        """One datagram; None if none is there. Raises NetlinkError."""
        count: int = self._receive(fd, self._pointer, socket.MSG_DONTWAIT)
        if count < 0:
            number = ctypes.get_errno()
            if number in {errno.EAGAIN, errno.EINTR}:
                return None
            raise NetlinkError(number, os.strerror(number))
        if self._header.flags & socket.MSG_TRUNC:
            raise NetlinkError(errno.EMSGSIZE, f"a message over {RECEIVE_BYTES} bytes")
        return bytes(self._view[:count])


class RouteSocket:
    """One NETLINK_ROUTE socket in the network namespace of the thread that opened it. For one thread only."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            self._socket.bind((0, 0))
            self._socket.settimeout(ACK_TIMEOUT_S)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 * RECEIVE_BYTES)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * RECEIVE_BYTES)
            self._room = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        except OSError:
            self._socket.close()
            raise
        self._desk = _Desk()
        self._sequence = 0
        self._interrupted = False

    def close(self) -> None:
        """Close the socket; closing twice is no error."""
        self._socket.close()

    def index_of(self, name: str) -> int:
        """The ifindex behind a name, in the socket's namespace. Raises OSError (ENODEV)."""
        request = _IFREQ_INDEX.pack(name.encode("ascii"), 0)
        return int(_IFREQ_INDEX.unpack(fcntl.ioctl(self._socket, SIOCGIFINDEX, request))[1])

    def change(self, message: bytearray) -> None:
        """Send one message and wait for its acknowledgement. Raises NetlinkError."""
        (refusal,) = self.change_many([message])
        if refusal is not None:
            raise refusal

    def change_many(self, messages: Sequence[bytearray]) -> list[NetlinkError | None]:
        """Have the kernel carry out messages in their order. Result i is its refusal of message i, None if it was done.

        One that is refused keeps no other from being carried out. Where an answer was lost (ENOBUFS), all whose fate is
        not known are said to have failed with that.
        """
        refusals: list[NetlinkError | None] = []
        size = max(1, min(PIPELINED_MAX, self._room // ERROR_TAKES_BYTES))
        for at in range(0, len(messages), size):
            refusals += self._change_some(messages[at : at + size])
        return refusals

    def _change_some(self, messages: Sequence[bytearray]) -> list[NetlinkError | None]:
        """One datagram. Only its last message asks to be acknowledged: refusals come unasked, in order."""
        first = self._numbered(len(messages))
        for number, message in enumerate(messages, first):
            _U32.pack_into(message, _SEQUENCE_AT, number)
        messages[-1][_FLAGS_AT] |= NLM_F_ACK
        answers: dict[int, NetlinkError | None] = {}
        trouble = self._exchange(b"".join(messages), first, first + len(messages) - 1, answers)
        return [answers.get(number, trouble) for number in range(first, first + len(messages))]

    def _exchange(
        self, datagram: bytes, first: int, last: int, answers: dict[int, NetlinkError | None]
    ) -> NetlinkError | None:
        """Send, and take down the answers until the last; gives what stands for those that did not come."""
        lost: NetlinkError | None = None
        try:
            self._send(datagram)
            while last not in answers:
                try:
                    data = self._answer()
                except NetlinkError as error:
                    if lost is not None:
                        return lost
                    if error.errno != errno.ENOBUFS:
                        self._drain()
                        return error
                    lost = error
                    self._socket.settimeout(0)  # the kernel has done its work: what is not here does not come any more
                    continue
                for kind, flags, number, start, stop in _messages(data):
                    if kind == NLMSG_ERROR and first <= number <= last:
                        answers[number] = _refusal(data, start, stop, flags)
        except NetlinkError as error:
            return error
        finally:
            if lost is not None:
                self._socket.settimeout(ACK_TIMEOUT_S)
        return lost

    def get_many(self, kind: int, bodies: Sequence[bytes]) -> list[bytes | NetlinkError | None]:
        """What the kernel has under each request, as the body of its answer; None for what does not exist."""
        found: list[bytes | NetlinkError | None] = []
        size = max(1, min(PIPELINED_MAX, self._room // LINK_TAKES_BYTES))
        for at in range(0, len(bodies), size):
            found += self._get_some(kind, bodies[at : at + size])
        return found

    def _get_some(self, kind: int, bodies: Sequence[bytes]) -> list[bytes | NetlinkError | None]:
        first = self._numbered(len(bodies))
        requests = [
            _NLMSGHDR.pack(_NLMSGHDR.size + len(body), kind, NLM_F_REQUEST, number, 0) + body
            for number, body in enumerate(bodies, first)
        ]
        answers: dict[int, bytes | NetlinkError | None] = {}
        trouble: NetlinkError | None = None
        try:
            self._send(b"".join(requests))
            while len(answers) < len(bodies):
                data = self._answer()
                for found, flags, number, start, stop in _messages(data):
                    if first <= number < first + len(bodies):
                        answers[number] = (
                            _absent(_refusal(data, start, stop, flags)) if found == NLMSG_ERROR else data[start:stop]
                        )
        except NetlinkError as error:
            trouble = error
            self._drain()
        return [answers.get(number, trouble) for number in range(first, first + len(bodies))]

    def get(self, kind: int, body: bytes) -> bytes | None:
        """One object, as the body of its message; None if there is no such. Raises NetlinkError."""
        (found,) = self.get_many(kind, [body])
        if isinstance(found, NetlinkError):
            raise found
        return found

    def dump(self, kind: int, body: bytes) -> list[tuple[bytes, int, int]]:
        """All objects of a kind, as (buffer, start, stop) of each body. A dump that the kernel says was interrupted is
        taken again.

        Raises:
            NetlinkError: also with EAGAIN when it was interrupted every time.
        """
        for tried in range(DUMP_TRIES):
            if tried > 1:
                time.sleep(min(DUMP_PAUSE_S * 2.0 ** (tried - 2), DUMP_PAUSE_MAX_S))
            number = self._numbered(1)
            length = _NLMSGHDR.size + len(body)
            self._send(_NLMSGHDR.pack(length, kind, NLM_F_REQUEST | NLM_F_DUMP, number, 0) + body)
            self._interrupted = False
            try:
                found = list(self._replies(number))
            except NetlinkError as error:
                self._drain()
                if error.errno in {errno.ENOBUFS, errno.EINTR, errno.EBUSY}:  # EBUSY: an earlier dump had not ended
                    continue
                raise
            if not self._interrupted:
                return found
        raise NetlinkError(errno.EAGAIN, "the kernel's tables changed too fast to be read")

    def _replies(self, sequence: int) -> Iterator[tuple[bytes, int, int]]:
        """Message bodies that answer `sequence`, until it is done."""
        while True:
            data = self._receive()
            for kind, flags, number, start, stop in _messages(data):
                if number != sequence:
                    continue  # the rest of an answer that an earlier error left behind
                if flags & NLM_F_DUMP_INTR:
                    self._interrupted = True
                if kind == NLMSG_ERROR:
                    refusal = _refusal(data, start, stop, flags)
                    if refusal is not None:
                        raise refusal
                    return
                if kind == NLMSG_DONE:
                    code = struct.unpack_from("=i", data, start)[0] if stop - start >= 4 else 0
                    if code < 0:
                        raise NetlinkError(-code, os.strerror(-code))
                    return
                yield data, start, stop

    def _drain(self) -> None:
        """Read away all that the kernel still has for us.

        After an error that is a must: the rest of a dump keeps the next one from beginning, and once the kernel has
        said ENOBUFS, it drops whatever comes, without a word, until the queue is empty (netlink_overrun in
        net/netlink/af_netlink.c).
        """
        self._socket.settimeout(0)
        try:
            while True:
                self._receive()
        except NetlinkError:
            pass  # EAGAIN: there is nothing more
        finally:
            self._socket.settimeout(ACK_TIMEOUT_S)

    def _numbered(self, count: int) -> int:
        """The first of so many fresh sequence numbers in a row."""
        if self._sequence + count > SEQUENCE_MAX:
            self._sequence = 0
        self._sequence += count
        return self._sequence - count + 1

    def _send(self, datagram: bytes) -> None:
        try:
            self._socket.send(datagram)
        except OSError as error:
            raise NetlinkError(error.errno or errno.EIO, os.strerror(error.errno or errno.EIO)) from error

    def _answer(self) -> bytes:
        """One datagram of those that the kernel queued while it was asked: nearly always there.

        Taking it without giving the interpreter away (PyDLL) spares the wait to have it again, beside a busy thread a
        millisecond for each. Not so for a dump, which the kernel goes on with as it is read.
        """
        if (data := self._desk.receive(self._socket.fileno())) is not None:
            return data
        return self._receive()

    def _receive(self) -> bytes:
        """One datagram. Raises NetlinkError."""
        try:
            data, _ancillary, flags, _sender = self._socket.recvmsg(RECEIVE_BYTES)
        except TimeoutError:
            raise NetlinkError(errno.ETIMEDOUT, f"no answer from the kernel in {ACK_TIMEOUT_S} s") from None
        except OSError as error:
            raise NetlinkError(error.errno or errno.EIO, os.strerror(error.errno or errno.EIO)) from error
        if flags & socket.MSG_TRUNC:
            raise NetlinkError(errno.EMSGSIZE, f"a message over {RECEIVE_BYTES} bytes")
        return data


def _messages(data: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """The messages of a datagram: type, flags, sequence number, and where the body starts and stops.

    Raises NetlinkError (EBADMSG).
    """
    offset = 0
    while offset + _NLMSGHDR.size <= len(data):
        length, kind, flags, number, _port = _NLMSGHDR.unpack_from(data, offset)
        if length < _NLMSGHDR.size or offset + length > len(data):
            raise NetlinkError(errno.EBADMSG, f"a message of {length} bytes that does not fit its datagram")
        yield kind, flags, number, offset + _NLMSGHDR.size, offset + length
        offset += _align(length)


def _refusal(data: bytes, start: int, stop: int, flags: int) -> NetlinkError | None:
    """What an NLMSG_ERROR says; None if it is an acknowledgement. Raises NetlinkError (EBADMSG)."""
    if stop - start < 4:
        raise NetlinkError(errno.EBADMSG, f"an error message of {stop - start} bytes")
    (code,) = struct.unpack_from("=i", data, start)
    if code == 0:
        return None
    words = os.strerror(-code)
    if flags & NLM_F_ACK_TLVS:
        offset = start + 4 + _NLMSGHDR.size
        if not flags & NLM_F_CAPPED and stop - start >= 8:
            (echoed,) = _U32.unpack_from(data, start + 4)
            offset = start + 4 + _align(echoed)
        for kind, first, last in attributes(data, offset, stop):
            if kind == NLMSGERR_ATTR_MSG:
                words = data[first:last].split(b"\0", 1)[0].decode("utf-8", "replace")
    return NetlinkError(-code, words)


def _absent(refusal: NetlinkError | None) -> NetlinkError | None:
    """That there is no such object is an answer, not a failure."""
    return None if refusal is None or refusal.errno in {errno.ENODEV, errno.ENOENT} else refusal


# Messages to the kernel, for `change`. What is put into them has been judged by `service.domain.values`.
_FLAGS_AT = 6 if sys.byteorder == "little" else 7  # the low byte of nlmsg_flags in struct nlmsghdr
_SEQUENCE_AT = 8
IFLA_IFNAME, IFLA_MTU, IFLA_TXQLEN, IFLA_IFALIAS, IFLA_GROUP = 3, 4, 13, 20, 27
IFA_ADDRESS, IFA_LOCAL = 1, 2


def link_message(
    kind: int, ifindex: int, attrs: Sequence[tuple[int, int | str]] = (), *, up: bool | None = None
) -> bytearray:
    """A link message: attributes that are a u32, or text. `up` sets or clears IFF_UP and touches no other flag."""
    values = (_U32.pack(value) if isinstance(value, int) else value.encode("ascii") + b"\0" for _, value in attrs)
    found = [_attribute(attr, value) for (attr, _), value in zip(attrs, values, strict=True)]
    flags, change = (0, 0) if up is None else (IFF_UP if up else 0, IFF_UP)
    return _message(kind, 0, _IFINFOMSG.pack(socket.AF_UNSPEC, 0, ifindex, flags, change), *found)


def alias_message(ifindex: int, alias: str) -> bytearray:
    """A link message that sets the ifalias."""
    return link_message(RTM_SETLINK, ifindex, [(IFLA_IFALIAS, alias)])


def mac_message(ifindex: int, mac: str) -> bytearray:
    """A link message that sets the hardware address, "02:00:00:00:12:34"."""
    return _by_pyroute2(ifindex, "IFLA_ADDRESS", mac)


def name_message(ifindex: int, name: str) -> bytearray:
    """A link message that sets the name."""
    return _by_pyroute2(ifindex, "IFLA_IFNAME", name)


def _by_pyroute2(ifindex: int, attribute: str, value: str) -> bytearray:
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg  # 0.1 s, for what is rare

    message = ifinfmsg()
    message["index"] = ifindex
    message["attrs"] = [(attribute, value)]
    message["header"]["type"], message["header"]["flags"] = RTM_SETLINK, NLM_F_REQUEST
    message.encode()
    return bytearray(message.data)


def address_message(kind: int, ifindex: int, address: Address) -> bytearray:
    """An address message; a new address replaces an equal one instead of failing."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    packed = address.ip.packed
    create = NLM_F_CREATE | NLM_F_REPLACE if kind == RTM_NEWADDR else 0
    header = _IFADDRMSG.pack(family, address.prefixlen, 0, 0, ifindex)
    return _message(kind, create, header, _attribute(IFA_LOCAL, packed), _attribute(IFA_ADDRESS, packed))


def _message(kind: int, flags: int, *parts: bytes) -> bytearray:
    body = b"".join(parts)
    return bytearray(_NLMSGHDR.pack(_NLMSGHDR.size + len(body), kind, NLM_F_REQUEST | flags, 0, 0) + body)


def _attribute(kind: int, value: bytes) -> bytes:
    """A struct nlattr with its value; its length does not count the padding."""
    return (_ATTR.pack(4 + len(value), kind) + value).ljust(_align(4 + len(value)), b"\0")


def link_request(name: str | None = None, ifindex: int = 0) -> bytes:
    """The body of an RTM_GETLINK: for one link by name or by index, or for all. It spares us the counters of IPv6, a
    fifth of the answer; those of the link come with it all the same."""
    body = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, ifindex, 0, 0)
    if name is not None:
        body += _attribute(IFLA_IFNAME, name.encode("ascii") + b"\0")
    return body + _ATTR.pack(8, 29) + _U32.pack(RTEXT_FILTER_SKIP_STATS)  # IFLA_EXT_MASK


def address_request(ifindex: int = 0) -> bytes:
    """The body of an RTM_GETADDR dump: of one link, or of all."""
    return _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, ifindex)


def route_request() -> bytes:
    """The body of an RTM_GETROUTE dump of the unicast routes of all tables and families."""
    return _RTMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0, 0, RTN_UNICAST, 0)


def read_link(data: bytes, start: int, stop: int, addresses: tuple[Address, ...] = ()) -> ObservedLink:
    """An RTM_NEWLINK body; addresses come in messages of their own."""
    return link_of(data, start, _values(data, start + _IFINFOMSG.size, stop, _LINK_VALUES), addresses)


def link_of(data: bytes, start: int, found: Mapping[int, bytes], addresses: tuple[Address, ...]) -> ObservedLink:
    """The link of a body whose attributes have been found."""
    _family, _type, ifindex, flags, _change = _IFINFOMSG.unpack_from(data, start)
    state = found[16][0] if 16 in found else 0
    alias = found[20].rstrip(b"\0").decode("utf-8", "replace") if 20 in found else ""
    mode, tun = _read_tun_info(found[18]) if 18 in found else (None, {})
    return ObservedLink(
        name=found[3][:-1].decode("ascii", "replace") if 3 in found else "",
        ifindex=ifindex,
        mode=mode,
        token=parse_token(alias) if mode is not None else None,
        alias=alias,
        mtu=_U32.unpack_from(found[4])[0] if 4 in found else 0,
        up=bool(flags & IFF_UP),
        running=bool(flags & IFF_RUNNING),
        carrier=33 in found and found[33][0] == 1,
        operstate=_OPERSTATES[state] if state < len(_OPERSTATES) else "UNKNOWN",
        flags=flags,
        txqueuelen=_U32.unpack_from(found[13])[0] if 13 in found else 0,
        mac=found[1].hex(":") if 1 in found else "",
        owner=tun.get(1),  # IFLA_TUN_OWNER
        group=tun.get(2),  # IFLA_TUN_GROUP
        link_group=_U32.unpack_from(found[27])[0] if 27 in found else 0,
        packet_information=bool(tun.get(4)),  # IFLA_TUN_PI
        vnet_hdr=bool(tun.get(5)),  # IFLA_TUN_VNET_HDR
        persist=bool(tun.get(6)),  # IFLA_TUN_PERSIST
        multi_queue=bool(tun.get(7)),  # IFLA_TUN_MULTI_QUEUE
        addresses=addresses,
        counters=_read_counters(found.get(23, b"")),
    )


def _read_counters(stats64: bytes) -> LinkCounters:
    if not stats64:
        return LinkCounters()
    rxp, txp, rxb, txb, rxe, txe, rxd, txd = _STATS64.unpack_from(stats64)
    return LinkCounters(rxp, txp, rxb, txb, rxe, txe, rxd, txd)


@dataclass(frozen=True, slots=True)
class Mark:
    """What has to be seen of a link before it is touched.

    Attributes:
        token: of a TUN or TAP that bears one.
        is_tun: a TUN or TAP.
    """

    name: str
    ifindex: int
    token: Token | None
    link_group: int
    is_tun: bool


def read_mark(data: bytes, start: int, stop: int) -> Mark:
    """An RTM_NEWLINK body, as far as `Mark` goes; a third of the work of `read_link`, and one with it."""
    found = _values(data, start + _IFINFOMSG.size, stop, _MARK_VALUES)
    is_tun = 18 in found and _read_kind(found[18]) == b"tun"
    alias = found[20].rstrip(b"\0").decode("utf-8", "replace") if is_tun and 20 in found else ""
    return Mark(
        name=found[3][:-1].decode("ascii", "replace") if 3 in found else "",
        ifindex=ifindex_of(data, start),
        token=parse_token(alias),
        link_group=_U32.unpack_from(found[27])[0] if 27 in found else 0,
        is_tun=is_tun,
    )


_GROUP_IS = _ATTR.pack(8, IFLA_GROUP)


def possible_groups(data: bytes, start: int, stop: int) -> set[int]:
    """Numbers among which the link group of an RTM_NEWLINK body is. Finds what looks like the attribute, in a tenth of
    the time that it takes to read all of them.
    """
    found = set[int]()
    at = data.find(_GROUP_IS, start, stop)
    while at >= 0:
        if at + 8 <= stop:
            found.add(_U32.unpack_from(data, at + 4)[0])
        at = data.find(_GROUP_IS, at + 4, stop)
    return found


def _read_kind(data: bytes) -> bytes:
    for attr, first, last in attributes(data, 0, len(data)):
        if attr == 1:  # IFLA_INFO_KIND
            return data[first:last].rstrip(b"\0")
    return b""


# IFLA_ADDRESS, IFNAME, MTU, TXQLEN, OPERSTATE, LINKINFO, IFALIAS, STATS64, GROUP, CARRIER: 10 of the 38 that come
_LINK_VALUES = frozenset({1, 3, 4, 13, 16, 18, 20, 23, 27, 33})
_MARK_VALUES = frozenset({3, 18, 20, 27})


def _values(data: bytes, offset: int, end: int, wanted: frozenset[int]) -> dict[int, bytes]:
    """The values of these attributes. Walks as `attributes` does, at half the cost: nearly all are passed over."""
    found: dict[int, bytes] = {}
    unpack = _ATTR.unpack_from
    while offset + 4 <= end:
        length, kind = unpack(data, offset)
        if length < 4 or offset + length > end:
            break
        if kind in wanted:
            found[kind] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


@functools.lru_cache(256)  # it is the same for all TUNs that were made alike
def _read_tun_info(data: bytes) -> tuple[Mode | None, Mapping[int, int]]:
    kind, values = b"", dict[int, int]()
    for attr, first, last in attributes(data, 0, len(data)):
        if attr == 1:  # IFLA_INFO_KIND
            kind = data[first:last].rstrip(b"\0")
        elif attr == 2:  # IFLA_INFO_DATA
            for key, low, high in attributes(data, first, last):
                values[key] = data[low] if high - low == 1 else int.from_bytes(data[low:high], "little")
    if kind != b"tun":
        return None, {}
    return (Mode.TUN if values.get(3) == 1 else Mode.TAP), values  # IFLA_TUN_TYPE is IFF_TUN or IFF_TAP


def read_address(data: bytes, start: int, stop: int, *, tells_origin: bool) -> tuple[int, Address, bool]:
    """An RTM_NEWADDR body: (ifindex, address, whether the kernel made it by itself).

    Args:
        tells_origin: whether this kernel sends IFA_PROTO (5.18 and newer); an older one's link-local addresses
            are taken for its own.
    """
    family, prefixlen, flags, _scope, ifindex = _IFADDRMSG.unpack_from(data, start)
    local = remote = b""
    origin = 0
    for attr, first, last in attributes(data, start + _IFADDRMSG.size, stop):
        if attr == 2:  # IFA_LOCAL: ours; IFA_ADDRESS is the peer's then
            local = data[first:last]
        elif attr == 1:  # IFA_ADDRESS
            remote = data[first:last]
        elif attr == 8:  # IFA_FLAGS
            (flags,) = _U32.unpack_from(data, first)
        elif attr == 11:  # IFA_PROTO
            origin = data[first]
    raw = local or remote
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address
    ip = ipaddress.IPv4Address(raw) if family == socket.AF_INET else ipaddress.IPv6Address(raw)
    kernel_made = origin in KERNEL_MADE or not flags & IFA_F_PERMANENT
    if not tells_origin and ip.version == 6 and ip.is_link_local:
        kernel_made = True
    return ifindex, Address(ip, prefixlen), kernel_made


def read_route(
    data: bytes, start: int, stop: int, over: Collection[int] | None = None
) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, list[int]] | None:
    """An RTM_NEWROUTE body: (destination, ifindexes it leaves by); None for what is no unicast route over a link.

    The local table, multicast and default routes are left out: they say nothing of which subnets are in use.

    Args:
        over: tell only of routes over one of these links.
    """
    family, prefixlen, _src, _tos, table, _proto, _scope, kind, _flags = _RTMSG.unpack_from(data, start)
    destination, leaves = b"", list[int]()
    for attr, first, last in attributes(data, start + _RTMSG.size, stop):
        if attr == 1:  # RTA_DST
            destination = data[first:last]
        elif attr == 4:  # RTA_OIF
            leaves.append(_U32.unpack_from(data, first)[0])
        elif attr == 15:  # RTA_TABLE
            (table,) = _U32.unpack_from(data, first)
        elif attr == 9:  # RTA_MULTIPATH: struct rtnexthop {u16 len, u8 flags, u8 hops, int ifindex}
            offset = first
            while offset + 8 <= last:
                length, _bits, _hops, index = struct.unpack_from("=HBBi", data, offset)
                leaves.append(index)
                offset += max(_align(length), 8)
    if kind != RTN_UNICAST or table == RT_TABLE_LOCAL or prefixlen == 0 or not leaves:
        return None
    if over is not None and not any(index in over for index in leaves):
        return None
    if family == socket.AF_INET:
        return ipaddress.IPv4Network((destination.ljust(4, b"\0"), prefixlen)), leaves
    if family == socket.AF_INET6:
        found = ipaddress.IPv6Network((destination.ljust(16, b"\0"), prefixlen))
        return None if found.is_multicast or found.is_link_local else (found, leaves)
    return None


@dataclass(frozen=True, slots=True)
class _Seen:
    """A link as it was read.

    Attributes:
        body: its RTM_NEWLINK.
        addresses: its RTM_NEWADDRs.
        lasting: the parts of `body` that are not the values of counters.
        counted: where in it the counters are.
    """

    body: bytes
    addresses: Sequence[bytes]
    lasting: tuple[slice, ...]
    counted: slice
    link: ObservedLink

    def counts_only(self, body: bytes, addresses: Sequence[bytes]) -> bool:
        """Whether these messages say the same but for the counters. The lengths and types of all attributes are
        compared with the rest, so that equal messages have their counters in equal places."""
        return (
            len(body) == len(self.body)
            and addresses == self.addresses
            and all(body[part] == self.body[part] for part in self.lasting)
        )


class LinkReader:
    """Reads links with their addresses, and decodes those only that the last full look did not find the same.

    Decoding is what a look costs: 30 us a link, against 1 us to see that its messages say what they said, or 10 us
    where packets passed.

    Args:
        tells_origin: see `read_address`.
    """

    def __init__(self, *, tells_origin: bool) -> None:
        self._tells_origin = tells_origin
        self._seen: dict[int, _Seen] = {}
        self._layouts: dict[int, _Layout] = {}

    def read(self, bodies: Iterable[bytes], addresses: Mapping[int, Sequence[bytes]]) -> list[ObservedLink]:
        """The links of these bodies of RTM_NEWLINK, each once, with addresses from those of RTM_NEWADDR by ifindex.

        They are remembered until all there are have been read, and as long as they are not many.
        """
        found = self._read(bodies, addresses)
        if len(self._seen) < REMEMBERED_MAX:
            self._seen |= found
        return [seen.link for seen in found.values()]

    def read_all(self, bodies: Iterable[bytes], addresses: Mapping[int, Sequence[bytes]]) -> list[ObservedLink]:
        """The same for all links there are; remembers these, and only these."""
        self._seen = self._read(bodies, addresses)
        return [seen.link for seen in self._seen.values()]

    def _read(self, bodies: Iterable[bytes], addresses: Mapping[int, Sequence[bytes]]) -> dict[int, _Seen]:
        found: dict[int, _Seen] = {}
        for body in bodies:
            ifindex = ifindex_of(body)
            theirs, seen = addresses.get(ifindex, ()), self._seen.get(ifindex)
            if seen is None or not seen.counts_only(body, theirs):
                seen = self._first_seen(body, theirs)
            elif body != seen.body:
                seen = replace(seen, body=body, link=replace(seen.link, counters=_read_counters(body[seen.counted])))
            found[ifindex] = seen
        return found

    def _first_seen(self, body: bytes, addresses: Sequence[bytes]) -> _Seen:
        layout = self._layouts.get(len(body))
        if layout is None or layout.headers_in(body) != layout.headers:
            layout = _layout(body)
            if layout.whole and len(self._layouts) < LAYOUTS_MAX:
                self._layouts[len(body)] = layout
        values = {kind: body[part] for kind, part in layout.values}
        read = [read_address(a, 0, len(a), tells_origin=self._tells_origin) for a in addresses]
        set_by_somebody = tuple(address for _index, address, kernel_made in read if not kernel_made)
        return _Seen(body, addresses, layout.lasting, layout.counted, link_of(body, 0, values, set_by_somebody))


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the attributes of an RTM_NEWLINK stand.

    Attributes:
        headers, headers_in: the lengths and types of all attributes, and what finds them in another body. Where they
            are equal in one as long, they all stand where they do here: each begins where the one before it ends.
        whole: whether they fill the body.
        values: those that are wanted, by type.
        lasting, counted: see `_Seen`.
    """

    headers: tuple[int, ...]
    headers_in: Callable[[bytes], tuple[Any, ...]]
    whole: bool
    values: tuple[tuple[int, slice], ...]
    lasting: tuple[slice, ...]
    counted: slice


def _layout(body: bytes) -> _Layout:
    lasting, counted, start = list[slice](), slice(0, 0), 0
    headers, form, values = list[int](), [f"={_IFINFOMSG.size}x"], dict[int, slice]()
    offset, end = _IFINFOMSG.size, len(body)
    while offset + 4 <= end:
        length, kind = _ATTR.unpack_from(body, offset)
        if length < 4 or offset + length > end:
            break
        following = offset + _align(length)
        headers += (length, kind)
        form.append(f"HH{min(following, end) - offset - 4}x")
        if kind in _LINK_VALUES:
            values[kind] = slice(offset + 4, offset + length)
        if kind in {7, 23}:  # IFLA_STATS, and IFLA_STATS64 with the same in 64 bits
            lasting.append(slice(start, offset + 4))
            start = offset + length
            if kind == 23:
                counted = slice(offset + 4, start)
        offset = following
    lasting.append(slice(start, len(body)))
    found = struct.Struct("".join(form)).unpack_from
    return _Layout(tuple(headers), found, offset >= end, tuple(values.items()), tuple(lasting), counted)


def ifindex_of(body: bytes, start: int = 0) -> int:
    """Of an RTM_NEWLINK or RTM_NEWADDR body, both of which have it in bytes 4 to 8."""
    return int(_U32.unpack_from(body, start + 4)[0])
