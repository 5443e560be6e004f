"""Where packets are measured: network namespaces of our own, TUN devices in them, the kernel's figures, programs.

Made with bare system calls, so that all competitors stand on the same ground and none of it is ours. What is measured,
and against what, does not belong here.
"""

import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from tests.namespace import CLONE_NEWNET, _checked, _libc, fresh_namespace

READER_CPU, SENDER_CPU = 0, 1
"""All competitors read on the one core, everything that makes them packets runs on the other."""

TXQUEUELEN = 1000  # the service's default (service/domain/spec.py)

IFF_TUN, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x0002, 0x1000, 0x4000  # linux/if_tun.h
IFF_NAPI, IFF_NAPI_FRAGS, IFF_MULTI_QUEUE = 0x0010, 0x0020, 0x0100
TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6 = 0x01, 0x02, 0x04, 0x20, 0x40
OFFLOADS = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_USO4 | TUN_F_USO6
VNET_HDR_BYTES = 10  # linux/virtio_net.h, without the number of merged buffers
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x8913, 0x8914, 0x8916, 0x891C  # linux/sockios.h
SIOCSIFMTU, SIOCSIFTXQLEN = 0x8922, 0x8943
IFF_UP = 0x1


class Namespace:
    """A network namespace that lives as long as this object is not closed, or somebody is in it."""

    def __init__(self) -> None:
        """Make it, with lo up and without IPv6, whose own packets would be counted."""
        with fresh_namespace():
            for which in ("all", "default"):
                Path(f"/proc/sys/net/ipv6/conf/{which}/disable_ipv6").write_text("1")
            self._fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Run in it: the calling thread, and the processes and devices that it makes."""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _checked(_libc.setns(self._fd, CLONE_NEWNET), "setns")
            try:
                yield
            finally:
                _checked(_libc.setns(home, CLONE_NEWNET), "setns")
        finally:
            os.close(home)


def open_tun(name: str, address: str, *, mtu: int = 1500, offloads: bool = False, flags: int = IFF_TUN) -> int:
    """A TUN in the present namespace, up, with `address` in a /16; its fd, which does not wait.

    `flags` are more of linux/if_tun.h, or have IFF_TAP in the place of IFF_TUN.

    With `offloads` packets have a virtio_net_hdr, and come unfinished and in segments (TUNSETOFFLOAD). Raises OSError
    EINVAL where the kernel cannot (USO: Linux 6.2).
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        flags |= IFF_NO_PI | (IFF_VNET_HDR if offloads else 0)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(fd, TUNSETOFFLOAD, OFFLOADS if offloads else 0)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            for request, value in ((SIOCSIFMTU, mtu), (SIOCSIFTXQLEN, TXQUEUELEN)):
                fcntl.ioctl(control, request, struct.pack("16si20x", name.encode(), value))
            for request, text in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, "255.255.0.0")):
                end = struct.pack("H2x4s8x", socket.AF_INET, socket.inet_aton(text))
                fcntl.ioctl(control, request, struct.pack("16s16s8x", name.encode(), end))
            answer = fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16sH22x", name.encode(), 0))
            (now,) = struct.unpack_from("H", answer, 16)
            fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), now | IFF_UP))
    except BaseException:
        os.close(fd)
        raise
    return fd


@dataclass(frozen=True, slots=True)
class Counted:
    """A TUN's figures as the kernel has them: what was read from it, dropped because nobody read, and written to it."""

    read_packets: int
    read_bytes: int
    dropped: int
    written_packets: int


def counted(name: str) -> Counted:
    """The figures of an interface of the present namespace. tx is counted as the reader takes it (tun_put_user)."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        head, _, rest = line.partition(":")
        if head.strip() == name:
            words = [int(word) for word in rest.split()]
            return Counted(words[9], words[8], words[11], words[1])
    raise LookupError(name)


def echo_replies() -> int:
    """How many ICMP echo replies the present namespace took as good (RFC 4293, icmpInEchoReps)."""
    rows = [row.split() for row in Path("/proc/thread-self/net/snmp").read_text().splitlines() if row[:5] == "Icmp:"]
    return int(dict(zip(*rows, strict=True))["InEchoReps"])


@dataclass(frozen=True, slots=True)
class Spent:
    """A process's time on a core so far, in seconds, and how long it waited for one; `user_s` in steps of a tick."""

    total_s: float
    user_s: float
    system_s: float
    waited_s: float


def spent(pid: int) -> Spent:
    """How long the main thread of `pid` ran (Documentation/scheduler/sched-stats.rst, proc(5))."""
    ran_ns, waited_ns, _ = map(int, Path(f"/proc/{pid}/schedstat").read_text().split())
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return Spent(ran_ns / 1e9, int(words[11]) / tick, int(words[12]) / tick, waited_ns / 1e9)


def worker_of(pid: int) -> int:
    """The one child of a process that is a worker of the data plane."""
    found = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
        if Path(f"/proc/{child}/comm").read_text().startswith("tunledger-dp")
    ]
    (worker,) = found
    return worker


class Programs:
    """The C programs of `bench/c`, built into a folder."""

    def __init__(self, folder: Path) -> None:
        """Build them. Raises FileNotFoundError where there is no compiler."""
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise FileNotFoundError("no C compiler (gcc or cc)")
        self._folder = folder
        for source in sorted((Path(__file__).parent / "c").glob("*.c")):
            subprocess.run([compiler, "-O2", "-Wall", "-o", folder / source.stem, source], check=True)

    def __getitem__(self, name: str) -> str:
        """The path of one."""
        return str(self._folder / name)


@contextmanager
def running(command: Sequence[str], cpu: int, fds: Sequence[int] = ()) -> Iterator[subprocess.Popen[str]]:
    """Run `command` on a core, in the present namespace, until the end of the block: then SIGTERM."""
    process = subprocess.Popen(
        command, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        os.sched_setaffinity(process.pid, {cpu})
        yield process
        assert process.poll() is None, f"{' '.join(command)} ended by itself: {process.returncode}"
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(5)
        assert process.stdout is not None
        process.stdout.close()


_told = [0.0]

TOLD_S = 10.0
"""How often it is told what is under way where nobody sees a line that is written over."""


def tell(text: str) -> None:
    """Show on stderr what is under way: on a terminal in one line that is written over, elsewhere now and then."""
    here = sys.stderr.isatty()
    if not text and not here:
        return
    if not text or monotonic() - _told[0] > (0.1 if here else TOLD_S):
        _told[0] = monotonic()
        print(f"\r\x1b[K{text}" if here else f"  {text}", end="" if here else "\n", file=sys.stderr, flush=True)


@contextmanager
def under_way(part: str, about_s: float) -> Iterator[None]:
    """Say on stderr that a part begins, about how long it takes, and how long it took."""
    minutes = f"{about_s / 60:.0f} minutes" if about_s >= 90 else f"{about_s:.0f} s"
    begun = monotonic()
    tell("")
    print(f"# {part}: about {minutes}", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        tell("")
        print(f"# {part}: took {monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
