"""/dev/net/tun: the ioctls of tun(4), Documentation/networking/tuntap.rst and include/uapi/linux/if_tun.h.

Raises plain OSError; `linux` puts it into words. Netlink does not live here.
"""

import errno
import fcntl
import os
import struct

from service.domain.values import Mode

TUN_PATH = "/dev/net/tun"

TUNSETIFF = 0x400454CA  # _IOW('T', 202, int)
TUNSETPERSIST = 0x400454CB  # _IOW('T', 203, int)
TUNSETOWNER = 0x400454CC  # _IOW('T', 204, int)
TUNSETGROUP = 0x400454CE  # _IOW('T', 206, int)
TUNSETOFFLOAD = 0x400454D0  # _IOW('T', 208, unsigned int)
TUNGETIFF = 0x800454D2  # _IOR('T', 210, unsigned int)
TUNSETVNETHDRSZ = 0x400454D8  # _IOW('T', 216, int)
TUNSETVNETLE = 0x400454DC  # _IOW('T', 220, int)

TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 0x01, 0x02, 0x04
TUN_F_USO4, TUN_F_USO6 = 0x20, 0x40  # Linux 6.2

VNET_HDR_BYTES = 10  # struct virtio_net_hdr (linux/virtio_net.h), little-endian as virtio 1.0 has it

IFF_TUN = 0x0001
IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_MULTI_QUEUE = 0x0100
IFF_VNET_HDR = 0x4000
IFF_TUN_EXCL = 0x8000

_IFREQ = struct.Struct("16sH22x")  # struct ifreq: name, flags, padding to 40 bytes
_UID, _C_INT = struct.Struct("=I"), struct.Struct("=i")


def open_node(path: str = TUN_PATH) -> int:
    """A descriptor on the clone device, attached to nothing yet. Non-blocking, closed on exec."""
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def attach(fd: int, name: str, mode: Mode, *, multi_queue: bool, exclusive: bool, vnet_hdr: bool = False) -> None:
    """TUNSETIFF. With `exclusive` it makes a new device or fails with EBUSY, whatever kind of link has the name.

    Without, it attaches to the device of that name, or makes one that is not persistent if there is none: the
    caller has to check the ifindex afterwards. With `vnet_hdr` packets come and go behind a virtio_net_hdr of
    `VNET_HDR_BYTES`; a single-queue attach overwrites what another set (drivers/net/tun.c, tun_set_iff).
    """
    flags = (IFF_TUN if mode is Mode.TUN else IFF_TAP) | IFF_NO_PI
    if multi_queue:
        flags |= IFF_MULTI_QUEUE
    if exclusive:
        flags |= IFF_TUN_EXCL
    if vnet_hdr:
        flags |= IFF_VNET_HDR
    fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(name.encode("ascii"), flags))


def offer(fd: int, *, offloads: bool) -> int:
    """Tell the kernel what the reader of an attached descriptor takes: as much as it has to offer, or nothing.

    Without, a device may still hand over what an earlier reader asked for: the offloads are the device's, not the
    descriptor's (tun.c, set_offload). Returns the TUN_F_ flags that are set now.
    """
    if offloads:
        for request, value in ((TUNSETVNETHDRSZ, VNET_HDR_BYTES), (TUNSETVNETLE, 1)):
            fcntl.ioctl(fd, request, _C_INT.pack(value))
    full = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6
    for flags in (full | TUN_F_USO4 | TUN_F_USO6, full, TUN_F_CSUM) if offloads else ():
        try:
            fcntl.ioctl(fd, TUNSETOFFLOAD, flags)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        else:
            return flags
    fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
    return 0


def attached_name(fd: int) -> str:
    """TUNGETIFF: the present name of the device behind a descriptor."""
    name, _flags = _IFREQ.unpack(fcntl.ioctl(fd, TUNGETIFF, bytes(_IFREQ.size)))
    return str(name.split(b"\0", 1)[0].decode("ascii", "replace"))


def set_owner(fd: int, uid: int) -> None:
    """TUNSETOWNER: this user may attach besides CAP_NET_ADMIN."""
    fcntl.ioctl(fd, TUNSETOWNER, _as_int(uid))


def set_group(fd: int, gid: int) -> None:
    """TUNSETGROUP: members of this group may attach besides CAP_NET_ADMIN."""
    fcntl.ioctl(fd, TUNSETGROUP, _as_int(gid))


def set_persist(fd: int) -> None:
    """TUNSETPERSIST: from here on the device outlives its descriptor."""
    fcntl.ioctl(fd, TUNSETPERSIST, 1)


def _as_int(number: int) -> int:
    """A 32-bit id as Python's ioctl takes one: a C int with the same bits. The kernel makes a uid_t of them again."""
    return int(_C_INT.unpack(_UID.pack(number))[0])
