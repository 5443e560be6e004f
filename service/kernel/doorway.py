"""Makes sockets and descriptors in other network namespaces, and never leaves a thread in one.

A socket, and a descriptor of /dev/net/tun (tun_chr_open in drivers/net/tun.c), belong for good to the namespace that
the opening task was in; only the opening has to happen inside. So a thread goes in with setns(2), opens, and comes
back. Namespaces have names as `ip netns` gives them, entries of /run/netns (ip-netns(8)), made and removed by others.
What is done with what was opened does not belong in here.
"""

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from service.domain.errors import ErrorCode, TunledgerError
from service.kernel import errnos

NETNS_FOLDER = Path("/run/netns")  # NETNS_RUN_DIR of iproute2
OWN = Path("/proc/thread-self/ns/net")
CLONE_NEWNET = 0x40000000  # linux/sched.h
RETURN_TRIES = 3  # setns allocates (create_new_namespaces in kernel/nsproxy.c), which may fail for a moment

# st_dev and st_ino: what a namespace is told by, since a name may be given to another one. The number of one that died
# may be given to a new one; but none dies while it is held.
Identity = tuple[int, int]
T = TypeVar("T")

# Through PyDLL, which keeps the interpreter's lock: giving it away costs more than the call.
_LIBC = ctypes.PyDLL(None, use_errno=True)


def set_namespace(fd: int) -> None:
    """setns(2) for the calling thread. Raises OSError."""
    if _LIBC.setns(fd, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def own_identity() -> Identity:
    """The namespace that the calling thread is in. Raises OSError."""
    found = OWN.stat()
    return found.st_dev, found.st_ino


def identity_of(name: str) -> Identity | None:
    """The namespace under a name; None if there is none. Raises OSError, if that cannot be told.

    `ip netns add` makes an empty file first, and mounts the namespace upon it: the file alone is none.
    """
    try:
        found = (NETNS_FOLDER / name).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_dev, found.st_ino) if found.st_dev == OWN.stat().st_dev else None


def open_namespace(name: str) -> tuple[int, Identity]:
    """A descriptor of the namespace under a name, to be closed soon: while it is open, the namespace does not die.

    Raises:
        TunledgerError: netns_missing; invalid_field, for the thread's own; kernel_refused.
    """
    try:
        fd = os.open(NETNS_FOLDER / name, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise errnos.no_namespace(name) from None
    except OSError as error:
        raise errnos.no_entry(name, error.errno or errno.EIO) from error
    try:
        found, own = os.fstat(fd), own_identity()
        if found.st_dev != own[0]:
            raise errnos.no_namespace(name)
        if (found.st_dev, found.st_ino) == own:
            raise TunledgerError(
                ErrorCode.INVALID_FIELD,
                f"netns: {name} is the network namespace that the service runs in; leave netns out",
                field="netns",
            )
    except OSError as error:
        os.close(fd)
        raise errnos.no_entry(name, error.errno or errno.EIO) from error
    except TunledgerError:
        os.close(fd)
        raise
    return fd, (found.st_dev, found.st_ino)


class Doorway:
    """For any threads; each has a namespace of its own to come back to."""

    def __init__(self) -> None:
        self._lost = threading.local()  # `home`: what a thread that is in the wrong namespace has to go back to

    def opened(self, name: str, namespace: int, make: Callable[[], T], close: Callable[[T], None]) -> T:
        """What `make` opens inside. It must open only, and quickly: meanwhile the thread is elsewhere.

        Args:
            name: of the namespace, for words.
            close: undoes `make`, when the thread cannot come back.

        Raises:
            TunledgerError: permission_denied, kernel_refused.
            OSError: what `make` raises.
        """
        self.require_home()
        try:
            home = os.open(OWN, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise errnos.no_entry(name, error.errno or errno.EIO) from error
        made: list[T] = []
        try:
            try:
                set_namespace(namespace)
            except OSError as error:
                raise errnos.no_entry(name, error.errno or errno.EIO) from error
            try:
                made.append(make())
            finally:
                self._go_back(home)
        except BaseException:
            for each in made:
                close(each)
            raise
        finally:
            if getattr(self._lost, "home", None) != home:
                os.close(home)
        return made[0]

    def require_home(self) -> None:
        """Before anything else is done: the calling thread is in its own namespace, or back in it now.

        Raises:
            TunledgerError: kernel_refused; nothing may be done in this thread then.
        """
        home: int | None = getattr(self._lost, "home", None)
        if home is not None:
            self._go_back(home)
            self._lost.home = None
            os.close(home)

    def _go_back(self, home: int) -> None:
        for left in reversed(range(RETURN_TRIES)):
            try:
                set_namespace(home)
            except OSError as error:
                if left:
                    continue
                self._lost.home = home
                raise TunledgerError(
                    ErrorCode.KERNEL_REFUSED,
                    f"a thread could not come back from another network namespace: {os.strerror(error.errno or 0)}; "
                    "nothing is changed before it has",
                    retry=True,
                    errno_name=errnos.name_of(error.errno or 0),
                ) from error
            return
