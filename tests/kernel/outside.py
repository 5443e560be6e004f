"""The rest of the host, for the real kernel: the same verbs as `service.kernel.fake.Outside`, done to Linux.

Encodes its own netlink messages and ioctls, so that a test's drift does not go through the code under test.
"""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from service.domain.observed import IpNetwork
from service.domain.values import Address, Mode

TUN_PATH = "/dev/net/tun"

# linux/if_tun.h
TUNSETIFF, TUNSETPERSIST, TUNSETOWNER, TUNSETGROUP = 0x400454CA, 0x400454CB, 0x400454CC, 0x400454CE
IFF_TUN, IFF_TAP, IFF_NO_PI, IFF_MULTI_QUEUE, IFF_TUN_EXCL = 0x1, 0x2, 0x1000, 0x100, 0x8000

# linux/netlink.h, linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h
NLM_F_REQUEST, NLM_F_ACK, NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x1, 0x4, 0x100, 0x200, 0x400
RTM_NEWLINK, RTM_DELLINK, RTM_SETLINK, RTM_NEWADDR, RTM_DELADDR, RTM_NEWROUTE = 16, 17, 19, 20, 21, 24
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_TXQLEN, IFLA_LINKINFO, IFLA_IFALIAS, IFLA_INFO_KIND = 1, 3, 4, 13, 18, 20, 1
IFLA_GROUP = 27
IFA_ADDRESS, IFA_LOCAL = 1, 2
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_MULTIPATH, RTA_TABLE = 1, 4, 5, 9, 15
RT_TABLE_MAIN, RT_TABLE_LOCAL = 254, 255
RTN_UNICAST, RTN_LOCAL = 1, 2
RT_SCOPE_LINK, RT_SCOPE_HOST, RTPROT_STATIC = 253, 254, 4


class Outside(Protocol):
    """What a test may do to a host, fake or real, without asking the service."""

    def add_link(self, name: str, mode: Mode | None = None, *, alias: str = "", ifindex: int = 0) -> int: ...
    def delete(self, name: str) -> None: ...
    def rename(self, name: str, new: str) -> None: ...
    def set_alias(self, name: str, alias: str) -> None: ...
    def set_link_group(self, name: str, group: int) -> None: ...
    def set_mtu(self, name: str, mtu: int) -> None: ...
    def set_txqueuelen(self, name: str, packets: int) -> None: ...
    def set_mac(self, name: str, mac: str) -> None: ...
    def set_up(self, name: str, up: bool) -> None: ...
    def set_owner(self, name: str, owner: int | None, group: int | None) -> None: ...
    def add_address(self, name: str, address: Address) -> None: ...
    def remove_address(self, name: str, address: Address) -> None: ...
    def add_route(self, name: str, network: IpNetwork) -> None: ...
    def not_persistent(self, name: str) -> None: ...


def attr(kind: int, value: bytes) -> bytes:
    """One netlink attribute, padded."""
    return (struct.pack("=HH", 4 + len(value), kind) + value).ljust((4 + len(value) + 3) & ~3, b"\0")


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


class LinuxOutside:
    """The present network namespace, changed as somebody else would. Raises OSError."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.settimeout(5)

    def close(self) -> None:
        self._socket.close()

    def _request(self, kind: int, body: bytes, flags: int = 0) -> None:
        flags |= NLM_F_REQUEST | NLM_F_ACK
        self._socket.send(struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body)
        (code,) = struct.unpack_from("=i", self._socket.recv(8192), 16)
        if code:
            raise OSError(-code, os.strerror(-code))

    def _link(self, name: str, *attrs: bytes, up: bool | None = None) -> None:
        flags, change = (int(up), 1) if up is not None else (0, 0)
        body = struct.pack("=BxHiII", 0, 0, socket.if_nametoindex(name), flags, change)
        self._request(RTM_SETLINK, body + b"".join(attrs))

    def add_link(self, name: str, mode: Mode | None = None, *, alias: str = "", ifindex: int = 0) -> int:
        """A bridge (with this ifindex, if given), or a persistent tun or tap made without any of our manners."""
        if mode is None:
            body = struct.pack("=BxHiII", 0, 0, ifindex, 0, 0) + attr(IFLA_IFNAME, name.encode() + b"\0")
            body += attr(IFLA_LINKINFO, attr(IFLA_INFO_KIND, b"bridge"))
            try:
                self._request(RTM_NEWLINK, body, NLM_F_CREATE | NLM_F_EXCL)
            except OSError as error:
                if error.errno == errno.EOPNOTSUPP:
                    pytest.skip("missing: CONFIG_BRIDGE, for a link that is no TUN")
                raise
        else:
            assert not ifindex, "TUNSETIFF cannot choose one"
            with attached(name, mode, exclusive=True) as fd:
                fcntl.ioctl(fd, TUNSETPERSIST, 1)
        if alias:
            self.set_alias(name, alias)
        return socket.if_nametoindex(name)

    def delete(self, name: str) -> None:
        self._request(RTM_DELLINK, struct.pack("=BxHiII", 0, 0, socket.if_nametoindex(name), 0, 0))

    def rename(self, name: str, new: str) -> None:
        self._link(name, attr(IFLA_IFNAME, new.encode() + b"\0"))

    def set_alias(self, name: str, alias: str) -> None:
        self._link(name, attr(IFLA_IFALIAS, alias.encode()))

    def set_link_group(self, name: str, group: int) -> None:
        self._link(name, attr(IFLA_GROUP, u32(group)))

    def set_mtu(self, name: str, mtu: int) -> None:
        self._link(name, attr(IFLA_MTU, u32(mtu)))

    def set_txqueuelen(self, name: str, packets: int) -> None:
        self._link(name, attr(IFLA_TXQLEN, u32(packets)))

    def set_mac(self, name: str, mac: str) -> None:
        self._link(name, attr(IFLA_ADDRESS, bytes.fromhex(mac.replace(":", ""))))

    def set_up(self, name: str, up: bool) -> None:
        self._link(name, up=up)

    def set_owner(self, name: str, owner: int | None, group: int | None) -> None:
        with attached(name) as fd:
            if owner is not None:
                fcntl.ioctl(fd, TUNSETOWNER, owner)
            if group is not None:
                fcntl.ioctl(fd, TUNSETGROUP, group)

    def _address(self, kind: int, name: str, address: Address, flags: int = 0) -> None:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        body = struct.pack("=BBBBi", family, address.prefixlen, 0, 0, socket.if_nametoindex(name))
        packed = address.ip.packed
        self._request(kind, body + attr(IFA_LOCAL, packed) + attr(IFA_ADDRESS, packed), flags)

    def add_address(self, name: str, address: Address) -> None:
        self._address(RTM_NEWADDR, name, address, NLM_F_CREATE | NLM_F_REPLACE)

    def remove_address(self, name: str, address: Address) -> None:
        self._address(RTM_DELADDR, name, address)

    def add_route(self, name: str, network: IpNetwork) -> None:
        self.add_route_over([name], network)

    def add_route_over(
        self, names: Sequence[str], network: IpNetwork, *, table: int = RT_TABLE_MAIN, kind: int = RTN_UNICAST
    ) -> None:
        """A route over one link, or a multipath route over several."""
        family = socket.AF_INET if network.version == 4 else socket.AF_INET6
        scope = 0 if network.version == 6 else RT_SCOPE_HOST if kind == RTN_LOCAL else RT_SCOPE_LINK
        small = table if table < 256 else 0
        body = struct.pack("=BBBBBBBBI", family, network.prefixlen, 0, 0, small, RTPROT_STATIC, scope, kind, 0)
        body += attr(RTA_TABLE, u32(table))
        if network.prefixlen:
            body += attr(RTA_DST, network.network_address.packed)
        indexes = [socket.if_nametoindex(name) for name in names]
        if len(indexes) == 1:
            body += attr(RTA_OIF, u32(indexes[0]))
        else:
            # IPv6 takes no hop without a gateway here.
            gateway = attr(RTA_GATEWAY, socket.inet_pton(socket.AF_INET6, "fe80::1")) if network.version == 6 else b""
            hops = [struct.pack("=HBBi", 8 + len(gateway), 0, 0, index) + gateway for index in indexes]
            body += attr(RTA_MULTIPATH, b"".join(hops))
        self._request(RTM_NEWROUTE, body, NLM_F_CREATE | NLM_F_EXCL)

    def not_persistent(self, name: str) -> None:
        with attached(name) as fd:
            fcntl.ioctl(fd, TUNSETPERSIST, 0)


@contextmanager
def attached(name: str, mode: Mode = Mode.TUN, *, exclusive: bool = False, multi_queue: bool = False) -> Iterator[int]:
    """The device held open, as any VPN program does."""
    fd = os.open(TUN_PATH, os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = (IFF_TUN if mode is Mode.TUN else IFF_TAP) | IFF_NO_PI
        flags |= (IFF_TUN_EXCL if exclusive else 0) | (IFF_MULTI_QUEUE if multi_queue else 0)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        yield fd
    finally:
        os.close(fd)


def set_sysctl(path: str, value: str) -> None:
    """`sysctl -w`, in the present namespace: /proc/sys/net shows the caller's own."""
    Path("/proc/sys", path).write_text(value)
