"""A blocking rtnetlink socket, and readers for the few messages that we read all the time.

pyroute2 encodes what we send (`link_message`, `address_message`); its sockets are not used, since they hide a retry
of up to 9 s on EBUSY and hold back sequence numbers. Its decoder needs 370 us for one link, ours 15 us, and counters
read every link every few seconds: hence the readers here. Formats: rtnetlink(7), include/uapi/linux/if_link.h,
if_addr.h, rtnetlink.h. Raises plain OSError (`NetlinkError`); `linux` puts it into words.
"""

import errno
import functools
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from service.domain.observed import LinkCounters, ObservedLink
from service.domain.token import parse_token
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
RT_TABLE_LOCAL = 255
_OPERSTATES = ("UNKNOWN", "NOTPRESENT", "DOWN", "LOWERLAYERDOWN", "TESTING", "DORMANT", "UP")

_NLMSGHDR = struct.Struct("=IHHII")
_IFINFOMSG = struct.Struct("=BxHiII")
_IFADDRMSG = struct.Struct("=BBBBI")
_RTMSG = struct.Struct("=BBBBBBBBI")
_ATTR = struct.Struct("=HH")
_U32 = struct.Struct("=I")
_STATS64 = struct.Struct("=8Q")  # the first eight of struct rtnl_link_stats64

DUMP_TRIES = 8
RECEIVE_BYTES = 1 << 18
ACK_TIMEOUT_S = 10  # the kernel answers at once; waiting longer means that something is very wrong


class NetlinkError(OSError):
    """The kernel refused a message: `errno` and, as `strerror`, its own words where it gave some (extended ack)."""


def _align(length: int) -> int:
    return (length + 3) & ~3


def attributes(data: bytes | memoryview, offset: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Walk nlattrs: (type, start, stop) of each value in `data`; stops at the first that does not fit."""
    while offset + 4 <= end:
        length, kind = _ATTR.unpack_from(data, offset)
        if length < 4 or offset + length > end:
            return
        yield kind & 0x3FFF, offset + 4, offset + length
        offset += _align(length)


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
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * RECEIVE_BYTES)
        except OSError:
            self._socket.close()
            raise
        self._sequence = 0

    def close(self) -> None:
        """Close the socket; closing twice is no error."""
        self._socket.close()

    def change(self, message: bytearray) -> None:
        """Send one message, under a new sequence number, and wait for its acknowledgement. Raises NetlinkError."""
        self._sequence += 1
        _U32.pack_into(message, _SEQUENCE_AT, self._sequence)
        self._socket.send(message)
        for _ in self._replies(self._sequence):
            pass

    def get(self, kind: int, body: bytes) -> tuple[bytes, int, int] | None:
        """One object, as (buffer, start, stop) of its message body; None if there is no such. Raises NetlinkError."""
        self._sequence += 1
        length = _NLMSGHDR.size + len(body)
        self._socket.send(_NLMSGHDR.pack(length, kind, NLM_F_REQUEST, self._sequence, 0) + body)
        try:
            for found in self._replies(self._sequence, single=True):
                return found
        except NetlinkError as error:
            if error.errno in {errno.ENODEV, errno.ENOENT}:
                return None
            raise
        return None

    def dump(self, kind: int, body: bytes) -> list[tuple[bytes, int, int]]:
        """All objects of a kind. A dump that the kernel says was interrupted is taken again.

        Raises:
            NetlinkError: also with EAGAIN when it was interrupted every time.
        """
        for _ in range(DUMP_TRIES):
            self._sequence += 1
            length = _NLMSGHDR.size + len(body)
            self._socket.send(_NLMSGHDR.pack(length, kind, NLM_F_REQUEST | NLM_F_DUMP, self._sequence, 0) + body)
            self._interrupted = False
            try:
                found = list(self._replies(self._sequence))
            except NetlinkError as error:
                if error.errno in {errno.ENOBUFS, errno.EINTR}:
                    continue
                raise
            if not self._interrupted:
                return found
        raise NetlinkError(errno.EAGAIN, "the kernel's tables changed too fast to be read")

    def _replies(self, sequence: int, *, single: bool = False) -> Iterator[tuple[bytes, int, int]]:
        """Message bodies that answer `sequence`, until acknowledged or done."""
        while True:
            try:
                data, _ancillary, flags, _sender = self._socket.recvmsg(RECEIVE_BYTES)
            except TimeoutError:
                raise NetlinkError(errno.ETIMEDOUT, f"no answer from the kernel in {ACK_TIMEOUT_S} s") from None
            except OSError as error:
                raise NetlinkError(error.errno or errno.EIO, os.strerror(error.errno or errno.EIO)) from error
            if flags & socket.MSG_TRUNC:
                raise NetlinkError(errno.EMSGSIZE, f"a message over {RECEIVE_BYTES} bytes")
            offset = 0
            while offset + _NLMSGHDR.size <= len(data):
                length, kind, message_flags, number, _port = _NLMSGHDR.unpack_from(data, offset)
                if length < _NLMSGHDR.size or offset + length > len(data):
                    raise NetlinkError(errno.EBADMSG, f"a message of {length} bytes that does not fit its datagram")
                start, stop = offset + _NLMSGHDR.size, offset + length
                offset += _align(length)
                if number != sequence:
                    continue  # the rest of an answer that an earlier error left behind
                if message_flags & NLM_F_DUMP_INTR:
                    self._interrupted = True
                if kind == NLMSG_ERROR:
                    _raise_if_refused(data, start, stop, message_flags)
                    return
                if kind == NLMSG_DONE:
                    code = struct.unpack_from("=i", data, start)[0] if stop - start >= 4 else 0
                    if code < 0:
                        raise NetlinkError(-code, os.strerror(-code))
                    return
                yield data, start, stop
                if single:
                    return


def _raise_if_refused(data: bytes, start: int, stop: int, flags: int) -> None:
    (code,) = struct.unpack_from("=i", data, start)
    if code == 0:
        return
    words = os.strerror(-code)
    if flags & NLM_F_ACK_TLVS:
        offset = start + 4 + _NLMSGHDR.size
        if not flags & NLM_F_CAPPED:
            (echoed,) = _U32.unpack_from(data, start + 4)
            offset = start + 4 + _align(echoed)
        for kind, first, last in attributes(data, offset, stop):
            if kind == NLMSGERR_ATTR_MSG:
                words = data[first:last].split(b"\0", 1)[0].decode("utf-8", "replace")
    raise NetlinkError(-code, words)


def link_message(
    kind: int, ifindex: int, attrs: Sequence[tuple[str, Any]] = (), *, up: bool | None = None
) -> bytearray:
    """A link message with NLM_F_ACK; `up` sets or clears IFF_UP and touches no other flag."""
    message = bytearray(_encoded_link(kind, tuple(attrs), up))
    _U32.pack_into(message, _LINK_INDEX_AT, ifindex)
    return message


def alias_message(ifindex: int, alias: str) -> bytearray:
    """A link message that sets the ifalias, which differs from link to link: encoded once for each length."""
    placeholder = "?" * len(alias)
    message = bytearray(_encoded_link(RTM_SETLINK, (("IFLA_IFALIAS", placeholder),), None))
    at = message.index(placeholder.encode())
    message[at : at + len(alias)] = alias.encode("ascii")
    _U32.pack_into(message, _LINK_INDEX_AT, ifindex)
    return message


def address_message(kind: int, ifindex: int, address: Address) -> bytearray:
    """An address message with NLM_F_ACK; a new one replaces an equal one instead of failing."""
    message = bytearray(_encoded_address(kind, address))
    _U32.pack_into(message, _ADDRESS_INDEX_AT, ifindex)
    return message


# pyroute2 needs some 50 us to encode a message, as long as the kernel to carry it out. What recurs is encoded once;
# only ifindex and sequence number are put in anew, at the offsets that rtnetlink(7) gives.
ENCODED_KEPT = 4096
_SEQUENCE_AT = 8  # in struct nlmsghdr
_LINK_INDEX_AT = 16 + 4  # struct nlmsghdr, then ifi_index in struct ifinfomsg
_ADDRESS_INDEX_AT = 16 + 4  # struct nlmsghdr, then ifa_index in struct ifaddrmsg


@functools.lru_cache(ENCODED_KEPT)
def _encoded_link(kind: int, attrs: tuple[tuple[str, Any], ...], up: bool | None) -> bytes:
    message = ifinfmsg()
    if up is not None:
        message["flags"] = IFF_UP if up else 0
        message["change"] = IFF_UP
    message["attrs"] = list(attrs)
    message["header"]["type"] = kind
    message["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK
    message.encode()
    return bytes(message.data)


@functools.lru_cache(ENCODED_KEPT)
def _encoded_address(kind: int, address: Address) -> bytes:
    message = ifaddrmsg()
    message["family"] = socket.AF_INET if address.version == 4 else socket.AF_INET6
    message["prefixlen"] = address.prefixlen
    message["attrs"] = [("IFA_LOCAL", str(address.ip)), ("IFA_ADDRESS", str(address.ip))]
    message["header"]["type"] = kind
    create = NLM_F_CREATE | NLM_F_REPLACE if kind == RTM_NEWADDR else 0
    message["header"]["flags"] = NLM_F_REQUEST | NLM_F_ACK | create
    message.encode()
    return bytes(message.data)


def link_request(name: str | None = None, ifindex: int = 0) -> bytes:
    """The body of an RTM_GETLINK: for one link by name or by index, or for all."""
    body = _IFINFOMSG.pack(socket.AF_UNSPEC, 0, ifindex, 0, 0)
    if name is not None:
        text = name.encode("ascii") + b"\0"
        body += (_ATTR.pack(4 + len(text), 3) + text).ljust(_align(4 + len(text)), b"\0")  # IFLA_IFNAME
    return body


def address_request(ifindex: int = 0) -> bytes:
    """The body of an RTM_GETADDR dump: of one link, or of all."""
    return _IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, ifindex)


def route_request() -> bytes:
    """The body of an RTM_GETROUTE dump of all tables and families."""
    return _RTMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0, 0, 0, 0, 0)


def read_link(data: bytes, start: int, stop: int) -> ObservedLink:
    """An RTM_NEWLINK body, without addresses (those come in messages of their own)."""
    _family, _type, ifindex, flags, _change = _IFINFOMSG.unpack_from(data, start)
    name, alias, mac, operstate = "", "", "", "UNKNOWN"
    mtu = txqueuelen = 0
    carrier = False
    mode: Mode | None = None
    tun: dict[int, int] = {}
    counters = LinkCounters()
    for attr, first, last in attributes(data, start + _IFINFOMSG.size, stop):
        match attr:
            case 3:  # IFLA_IFNAME
                name = data[first : last - 1].decode("ascii", "replace")
            case 1:  # IFLA_ADDRESS
                mac = data[first:last].hex(":")
            case 4:  # IFLA_MTU
                (mtu,) = _U32.unpack_from(data, first)
            case 13:  # IFLA_TXQLEN
                (txqueuelen,) = _U32.unpack_from(data, first)
            case 16:  # IFLA_OPERSTATE
                operstate = _OPERSTATES[data[first]] if data[first] < len(_OPERSTATES) else "UNKNOWN"
            case 20:  # IFLA_IFALIAS
                alias = data[first:last].rstrip(b"\0").decode("utf-8", "replace")
            case 33:  # IFLA_CARRIER
                carrier = data[first] == 1
            case 23:  # IFLA_STATS64
                rxp, txp, rxb, txb, rxe, txe, rxd, txd = _STATS64.unpack_from(data, first)
                counters = LinkCounters(rxp, txp, rxb, txb, rxe, txe, rxd, txd)
            case 18:  # IFLA_LINKINFO
                mode, tun = _read_tun_info(data, first, last)
            case _:
                pass
    return ObservedLink(
        name=name,
        ifindex=ifindex,
        mode=mode,
        token=parse_token(alias) if mode is not None else None,
        alias=alias,
        mtu=mtu,
        up=bool(flags & IFF_UP),
        running=bool(flags & IFF_RUNNING),
        carrier=carrier,
        operstate=operstate,
        flags=flags,
        txqueuelen=txqueuelen,
        mac=mac,
        owner=tun.get(1),  # IFLA_TUN_OWNER
        group=tun.get(2),  # IFLA_TUN_GROUP
        packet_information=bool(tun.get(4)),  # IFLA_TUN_PI
        vnet_hdr=bool(tun.get(5)),  # IFLA_TUN_VNET_HDR
        persist=bool(tun.get(6)),  # IFLA_TUN_PERSIST
        multi_queue=bool(tun.get(7)),  # IFLA_TUN_MULTI_QUEUE
        counters=counters,
    )


def _read_tun_info(data: bytes, start: int, stop: int) -> tuple[Mode | None, dict[int, int]]:
    kind, values = b"", dict[int, int]()
    for attr, first, last in attributes(data, start, stop):
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
    data: bytes, start: int, stop: int
) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, list[int]] | None:
    """An RTM_NEWROUTE body: (destination, ifindexes it leaves by); None for what is no unicast route over a link.

    The local table, multicast and default routes are left out: they say nothing of which subnets are in use.
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
    unicast = kind == 1  # RTN_UNICAST
    if not unicast or table == RT_TABLE_LOCAL or prefixlen == 0 or not leaves:
        return None
    if family == socket.AF_INET:
        return ipaddress.IPv4Network((destination.ljust(4, b"\0"), prefixlen)), leaves
    if family == socket.AF_INET6:
        found = ipaddress.IPv6Network((destination.ljust(16, b"\0"), prefixlen))
        return None if found.is_multicast or found.is_link_local else (found, leaves)
    return None
