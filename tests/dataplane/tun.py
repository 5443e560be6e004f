"""TUN and TAP devices for these tests, made with bare ioctls and netlink in the current network namespace.

Not the service's way of making them (that is `service.kernel`, a room this one does not know).
"""

import fcntl
import os
import socket
import struct

TUN_PATH = "/dev/net/tun"

_TUNSETIFF = 0x400454CA  # linux/if_tun.h
_TUNSETPERSIST = 0x400454CB
_IFF_TUN = 0x0001
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
_TUNSETOFFLOAD = 0x400454D0
ALL_OFFLOADS = 0x67  # CSUM, TSO4, TSO6, USO4, USO6
_SIOCGIFFLAGS = 0x8913  # linux/sockios.h
_SIOCSIFFLAGS = 0x8914
_SIOCSIFADDR = 0x8916
_SIOCSIFNETMASK = 0x891C
_IFF_UP = 0x1
_RTM_DELLINK = 17  # linux/rtnetlink.h
_NLM_F_REQUEST_ACK = 0x1 | 0x4


def open_device(name: str, *, mode: str = "tun", persist: bool = False, offloads: int | None = None) -> int:
    """Create the device or attach to it; return its fd. OSError EBUSY if another fd is attached.

    With `offloads` (TUN_F_ flags) its packets come behind a virtio_net_hdr.
    """
    fd = os.open(TUN_PATH, os.O_RDWR | os.O_CLOEXEC)
    try:
        flags = (_IFF_TUN if mode == "tun" else _IFF_TAP) | _IFF_NO_PI
        flags |= 0 if offloads is None else _IFF_VNET_HDR
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        if offloads is not None:
            fcntl.ioctl(fd, _TUNSETOFFLOAD, offloads)
        if persist:
            fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    except BaseException:
        os.close(fd)
        raise
    return fd


def set_up(name: str, address: str | None = None) -> None:
    """Give the interface an IPv4 address in a /24, and set it up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, address and "255.255.255.0")):
            if value is not None:
                sockaddr = struct.pack("H2x4s8x", socket.AF_INET, socket.inet_aton(value))
                fcntl.ioctl(control, request, struct.pack("16s16s8x", name.encode(), sockaddr))
        answer = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0))
        (flags,) = struct.unpack_from("H", answer, 16)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags | _IFF_UP))


def set_down(name: str) -> None:
    """Set the interface down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        answer = fcntl.ioctl(control, _SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0))
        (flags,) = struct.unpack_from("H", answer, 16)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags & ~_IFF_UP))


def set_mtu(name: str, mtu: int) -> None:
    """SIOCSIFMTU."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, 0x8922, struct.pack("16si20x", name.encode(), mtu))


def delete(name: str) -> None:
    """Delete the interface, whoever holds it (RTM_DELLINK)."""
    link = struct.pack("BxHiII", socket.AF_UNSPEC, 0, socket.if_nametoindex(name), 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.send(struct.pack("IHHII", 16 + len(link), _RTM_DELLINK, _NLM_F_REQUEST_ACK, 1, 0) + link)
        (error,) = struct.unpack_from("i", netlink.recv(4096), 16)
    if error:
        raise OSError(-error, os.strerror(-error), name)
