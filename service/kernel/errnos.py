"""The one place where an errno becomes an error that says what to do."""

import contextlib
import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from service.domain.errors import ErrorCode, TunledgerError
from service.kernel.netlink import NetlinkError

UNREADABLE = (struct.error, ValueError, IndexError)  # what Python says of an answer that is not as it should be

RETRY_LATER = {errno.EAGAIN, errno.EINTR, errno.ENOBUFS, errno.ENOMEM, errno.EBUSY, errno.EMFILE, errno.ENFILE}


def name_of(number: int) -> str:
    """`ENOBUFS` for 105; the number itself if the C library has no name for it."""
    return errno.errorcode.get(number, str(number))


def refused(what: str, number: int, words: str = "") -> TunledgerError:
    """The kernel's refusal of `what` ("ip link set tun0 mtu 9000"), with its own words where it gave any."""
    detail = words or os.strerror(number)
    # With words of its own it is no capability that the kernel misses ("IPv6 is disabled on this device" is EACCES).
    if number in {errno.EPERM, errno.EACCES} and detail == os.strerror(number):
        return TunledgerError(
            ErrorCode.PERMISSION_DENIED,
            f"{what}: permission denied: needs CAP_NET_ADMIN; run as root or grant the capability in the unit file",
            errno_name=name_of(number),
        )
    if number in {errno.ENODEV, errno.ENXIO}:
        return TunledgerError(
            ErrorCode.DEVICE_GONE, f"{what}: the link is gone ({detail})", retry=True, errno_name=name_of(number)
        )
    return TunledgerError(
        ErrorCode.KERNEL_REFUSED,
        f"{what}: {detail} ({name_of(number)})",
        retry=number in RETRY_LATER,
        errno_name=name_of(number),
    )


def in_words(what: object, error: Exception) -> TunledgerError:
    """What came up while `what` was done, as the refusal of it. Takes OSError and `UNREADABLE`."""
    if isinstance(error, TunledgerError):
        return error
    if isinstance(error, OSError):
        words = error.strerror if isinstance(error, NetlinkError) else ""
        told = refused(str(what), error.errno or errno.EIO, words or "")
    else:
        told = TunledgerError(ErrorCode.KERNEL_REFUSED, f"{what}: the kernel's answer does not read: {error}")
    told.__cause__ = error
    return told


@contextlib.contextmanager
def said(what: object) -> Iterator[None]:
    """Turn an error inside into the kernel's refusal of `what`."""
    try:
        yield
    except (OSError, *UNREADABLE) as error:
        raise in_words(what, error) from error


def no_device_node(path: str, number: int) -> TunledgerError:
    """Why the TUN device node could not be opened."""
    if number in {errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTDIR}:
        return TunledgerError(
            ErrorCode.TUN_MISSING,
            f"{path} is missing: modprobe tun, or pass the device into the container",
            retry=True,
            errno_name=name_of(number),
        )
    if number in {errno.EPERM, errno.EACCES}:
        return TunledgerError(
            ErrorCode.PERMISSION_DENIED,
            f"{path}: permission denied: needs CAP_NET_ADMIN and read and write access to the device node",
            errno_name=name_of(number),
        )
    return refused(f"open {path}", number)


def no_namespace(name: str) -> TunledgerError:
    """There is no network namespace of that name."""
    return TunledgerError(
        ErrorCode.NETNS_MISSING,
        f"netns {name} does not exist; `ip netns add {name}` makes it",
        retry=True,
        errno_name="ENOENT",
    )


def no_entry(name: str, number: int) -> TunledgerError:
    """Why a network namespace that exists could not be entered (setns(2))."""
    if number in {errno.EPERM, errno.EACCES}:
        return TunledgerError(
            ErrorCode.PERMISSION_DENIED,
            f"netns {name}: permission denied: needs CAP_SYS_ADMIN, besides CAP_NET_ADMIN, to enter network "
            "namespaces; run as root or grant the capability in the unit file",
            errno_name=name_of(number),
        )
    return refused(f"enter netns {name}", number)


def busy(name: str) -> TunledgerError:
    """Somebody else has the device open; names them where /proc tells."""
    return TunledgerError(
        ErrorCode.DEVICE_BUSY,
        f"{name} is in use by {holder(name) or 'another process'}; stop it, or wait until it lets go",
        retry=True,
        errno_name="EBUSY",
    )


def gone(name: str) -> NetlinkError:
    """There is no link of that name, or not any more."""
    return NetlinkError(errno.ENODEV, f"{name} does not exist any more")


def holder(name: str) -> str | None:
    """The process that has a TUN device open, as "openvpn (pid 812)".

    The driver names the device in fdinfo (tun_chr_show_fdinfo in drivers/net/tun.c), and not its network namespace: of
    a process in another one than ours it is only said that it may be. None if none is found or /proc hides it. Slow
    (all processes): for error messages only.
    """
    wanted, ours, elsewhere = f"iff:\t{name}\n", _namespace(Path("/proc/thread-self")), None
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for entry in (process / "fdinfo").iterdir():
                if wanted in entry.read_text():
                    found = f"{(process / 'comm').read_text().strip()} (pid {process.name})"
                    if _namespace(process) == ours:
                        return found
                    elsewhere = f"another process, perhaps {found}, which is in another network namespace"
                    break
        except OSError:
            continue  # it ended, or is not ours to look at
    return elsewhere


def _namespace(process: Path) -> int:
    return (process / "ns/net").stat().st_ino
