"""What a worker that has given everything up can still do with its descriptors: no more than its loop does."""

import ctypes
import errno
import fcntl
import io
import mmap
import os
import socket
import struct
import termios
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from service.dataplane import slices, syscalls
from service.dataplane.confinement import confine
from service.dataplane.contract import Packet
from service.dataplane.segments import is_plain, plain
from service.packet.checksum import ones_complement_sum
from service.packet.vnet import F_NEEDS_CSUM, VnetHeader, build_vnet
from tests.dataplane import tun

F_SETSIG, F_SETOWN_EX = 10, 15  # asm-generic/fcntl.h, which Python does not name
TUNSETPERSIST, TUNSETOWNER, TUNSETGROUP = 0x400454CB, 0x400454CC, 0x400454CE  # linux/if_tun.h
TUNSETOFFLOAD, TUNATTACHFILTER = 0x400454D0, 0x401054D5
IFF_TUN_WITHOUT_PI = 0x1001
REFUSED = "EPERM"


def confined(attempt: Callable[[], object]) -> str:
    """How `attempt` ends in a child that has given everything up: `worked`, the name of an errno, an exception's."""
    if not syscalls.available():
        pytest.skip("missing: a seccomp filter for this machine")
    parent = os.getpid()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        said = "worked"
        try:
            confine(0, parent)
            attempt()
        except OSError as error:
            said = errno.errorcode.get(error.errno or 0, str(error))
        except BaseException as error:  # noqa: BLE001 - told to the parent
            said = repr(error)
        finally:
            os.write(writing, said.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, "it was ended"
    return said


@pytest.mark.parametrize(
    ("command", "argument"),
    [
        (fcntl.F_SETOWN, os.getpid()),
        (F_SETOWN_EX, struct.pack("ii", 1, os.getpid())),
        (F_SETSIG, 9),
        (fcntl.F_SETFL, os.O_RDWR | os.O_NONBLOCK | os.O_ASYNC),
        (fcntl.F_SETFL, os.O_RDWR | os.O_ASYNC),
        (fcntl.F_SETLEASE, fcntl.F_WRLCK),
        (fcntl.F_NOTIFY, fcntl.DN_CREATE),
        (fcntl.F_SETPIPE_SZ, 1 << 20),
    ],
    ids=["F_SETOWN", "F_SETOWN_EX", "F_SETSIG", "O_ASYNC", "O_ASYNC alone", "F_SETLEASE", "F_NOTIFY", "F_SETPIPE_SZ"],
)
def test_it_cannot_have_the_kernel_send_signals_for_it(command: int, argument: int | bytes) -> None:
    left, right = socket.socketpair()
    with left, right:
        assert confined(lambda: fcntl.fcntl(left, command, argument)) == REFUSED


@pytest.mark.parametrize(
    "attempt",
    [
        lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, 0),
        lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_RDWR),
        lambda fd: fcntl.fcntl(fd, fcntl.F_SETFL, os.O_RDWR | os.O_NONBLOCK),
        lambda fd: fcntl.ioctl(fd, termios.FIONBIO, struct.pack("i", 0)),
        lambda fd: os.set_blocking(fd, True),
    ],
    ids=["no flags", "F_SETFL", "O_NONBLOCK", "FIONBIO", "set_blocking"],
)
def test_it_cannot_make_the_service_wait_for_what_they_share(attempt: Callable[[int], object]) -> None:
    notice = os.eventfd(0, os.EFD_NONBLOCK)
    try:
        assert confined(lambda: attempt(notice)) == REFUSED
        assert not os.get_blocking(notice)
    finally:
        os.close(notice)


@pytest.mark.usefixtures("netns")
def test_it_can_neither_keep_a_device_nor_give_it_away() -> None:
    fd = os.open(tun.TUN_PATH, os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"tun0", IFF_TUN_WITHOUT_PI))  # TUNSETIFF
        for request, argument in ((TUNSETPERSIST, 1), (TUNSETPERSIST, 0), (TUNSETOWNER, 65534), (TUNSETGROUP, 65534)):
            assert confined(partial(fcntl.ioctl, fd, request, argument)) == REFUSED
        assert confined(lambda: fcntl.ioctl(fd, TUNATTACHFILTER, bytes(16))) == REFUSED
        assert confined(lambda: fcntl.ioctl(fd, TUNSETOFFLOAD, 1)) == REFUSED
        assert confined(lambda: fcntl.ioctl(fd, TUNSETOFFLOAD, 0)) == "worked", "how a device is closed"
    finally:
        os.close(fd)
    assert "tun0:" not in Path("/proc/net/dev").read_text()


def test_an_argument_is_looked_at_as_a_whole() -> None:
    def call(number: int, *arguments: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(number, *map(ctypes.c_ulong, arguments)) < 0:
            raise OSError(ctypes.get_errno(), "syscall")

    column, _ = syscalls._MACHINES[os.uname().machine]
    ioctl, function = syscalls._IOCTL[column], syscalls._FCNTL[column]
    left, right = socket.socketpair()
    with left, right:
        fd = left.fileno()
        assert confined(lambda: call(ioctl, fd, TUNSETOFFLOAD, 0)) == "ENOTTY", "the socket's word, not the filter's"
        assert confined(lambda: call(ioctl, fd, TUNSETOFFLOAD, 1 << 32)) == REFUSED
        # The kernel takes a command as an int: with anything in its high word it is the same command.
        assert confined(lambda: call(function, fd, fcntl.F_SETOWN | 1 << 32, 1)) == REFUSED
        assert confined(lambda: call(ioctl, fd, TUNSETPERSIST | 1 << 32, 0)) == REFUSED


@pytest.mark.parametrize(
    "attempt",
    [lambda: os.stat("/etc/passwd"), lambda: os.stat("passwd", dir_fd=0), lambda: os.lstat("/")],  # noqa: PTH116
    ids=["stat", "in a folder", "lstat"],
)
def test_it_cannot_look_files_up(attempt: Callable[[], object]) -> None:
    assert confined(attempt) == REFUSED


@pytest.mark.parametrize("refused", ["sched_getscheduler", "getpriority"])
def test_a_service_that_may_not_ask_for_slices_goes_without(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, refused)

    monkeypatch.setattr(os, refused, refuse)
    slices.short()
    assert confined(lambda: None) == "worked"


def test_it_can_do_what_its_loop_does_with_what_it_is_handed() -> None:
    memory = os.memfd_create("handed")
    os.ftruncate(memory, mmap.PAGESIZE)
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def loop() -> None:
        assert os.fstat(memory).st_size == mmap.PAGESIZE
        mmap.mmap(memory, 0)[0] = 7
        file = io.FileIO(os.dup(memory), "r+b")
        assert file.read(1) == b"\x07"
        file.close()
        os.dup2(memory, os.dup(memory), inheritable=False)
        with os.fdopen(os.dup(memory), "rb") as buffered:
            buffered.read()
        assert os.get_blocking(left.fileno())

    with left, right:
        assert confined(loop) == "worked"
    os.close(memory)


# -- finished checksums


def unfinished() -> tuple[bytearray, bytes]:
    """A UDP packet whose checksum is the pseudo header's sum, as offloads leave it, and the header that says so."""
    packet = bytearray(bytes.fromhex("4500001e000040004011000a0a0000010a000002") + struct.pack("!4H", 1, 2, 10, 0))
    packet += b"hi"
    struct.pack_into("!H", packet, 26, ones_complement_sum(packet, 12, 8, 17 + 10))
    return packet, build_vnet(VnetHeader(flags=F_NEEDS_CSUM, csum_start=20, csum_offset=6))


def right(packet: Packet) -> bool:
    return ones_complement_sum(packet, 20, None, ones_complement_sum(packet, 12, 8, 17 + 10)) == 0xFFFF


def refuse(reason: str, count: int) -> None:
    pytest.fail(f"{count} dropped: {reason}")


def test_a_packet_that_goes_to_two_devices_is_finished_once() -> None:
    packet, header = unfinished()
    packets, headers = [memoryview(packet)], [memoryview(bytearray(header))]
    for _ in range(2):
        found, _ = plain(packets, headers, "tun", refuse)
        assert right(found[0])
    assert is_plain(headers), "a third one, with offloads, is told that nothing is left to do"
    assert right(packets[0])


def test_a_header_that_nobody_can_write_keeps_its_packet_as_it_says() -> None:
    packet, header = unfinished()
    as_it_was = bytes(packet)
    for _ in range(2):
        found, _ = plain([memoryview(packet)], [memoryview(header)], "tun", refuse)
        assert right(found[0])
    assert packet == as_it_was
