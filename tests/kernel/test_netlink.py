"""The netlink reader and bytes that no kernel sends: it ends, and says what it could not read."""

import errno
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some

from service.domain.values import Mode
from service.kernel import netlink
from service.kernel.netlink import NetlinkError, RouteSocket, attributes, read_address, read_link, read_route
from tests.kernel.conftest import LinuxHost

UNREADABLE = (struct.error, IndexError, ValueError)  # what Python says of bytes that are not there


@given(some.binary(max_size=200), some.integers(0, 40), some.integers(0, 220))
@example(b"\0\0\0\0" * 8, 0, 32)
@example(struct.pack("=HH", 4, 1) * 8, 0, 32)
def test_attributes_end_and_stay_inside(data: bytes, offset: int, end: int) -> None:
    end = min(end, len(data))
    last = offset
    for _kind, first, stop in attributes(data, offset, end):
        assert last + 4 <= first <= stop <= end
        last = first


NESTED = some.recursive(
    some.binary(max_size=12),
    lambda inner: some.lists(some.tuples(some.integers(0, 64), inner), max_size=6),
    max_leaves=20,
)


def encoded(tree: object) -> bytes:
    if isinstance(tree, bytes):
        return tree
    assert isinstance(tree, list)
    out = b""
    for kind, value in tree:
        body = encoded(value)
        out += (struct.pack("=HH", 4 + len(body), kind) + body).ljust((7 + len(body)) & ~3, b"\0")
    return out


@settings(max_examples=300)
@given(NESTED, some.binary(min_size=16, max_size=16), some.data())
def test_readers_take_garbled_messages_or_say_that_they_cannot(
    tree: object, head: bytes, data: some.DataObject
) -> None:
    message = bytearray(head + encoded(tree))
    for _ in range(data.draw(some.integers(0, 3))):
        message[data.draw(some.integers(0, len(message) - 1))] = data.draw(some.integers(0, 255))
    whole = bytes(message[: data.draw(some.integers(0, len(message)))])
    for read in (read_link, lambda *m: read_address(*m, tells_origin=True), read_route):
        try:
            read(whole, 0, len(whole))
        except UNREADABLE:
            pass


@given(some.binary(max_size=60), some.integers(1, 2**32 - 1), some.binary(max_size=60))
@example(struct.pack("=HHI", 8, netlink.IFLA_GROUP, 7)[4:], 9, b"")
def test_a_link_group_is_found_wherever_it_stands(before: bytes, group: int, after: bytes) -> None:
    other = struct.pack("=HH", 4 + len(before), 20) + before
    message = bytes(16) + other.ljust((len(other) + 3) & ~3, b"\0")
    message += struct.pack("=HHI", 8, netlink.IFLA_GROUP, group) + after
    found = netlink.possible_groups(b"\1" * 3 + message, 3, 3 + len(message))
    assert netlink.read_mark(message, 0, len(message)).link_group in found
    assert netlink.possible_groups(message, 0, 16) == set()


class Script(RouteSocket):
    """A route socket that hears what the test says instead of the kernel."""

    def __init__(self, *answers: bytes | OSError) -> None:
        self._answers = iter(answers)
        self._sequence = 0
        self._interrupted = False
        self._room = 1 << 20
        self._waits = True
        self._socket = self  # type: ignore[assignment]

    def settimeout(self, seconds: float) -> None:
        self._waits = seconds > 0

    def send(self, _data: bytes) -> None:
        pass

    def _answer(self) -> bytes:
        return self._receive()

    def recvmsg(self, _size: int) -> tuple[bytes, list[object], int, None]:
        answer = next(self._answers, TimeoutError()) if self._waits else BlockingIOError(errno.EAGAIN, "nothing there")
        if isinstance(answer, OSError):
            raise answer
        return answer, [], 0, None


def message(kind: int, body: bytes = b"", *, sequence: int = 1, flags: int = 0, length: int | None = None) -> bytes:
    return struct.pack("=IHHII", 16 + len(body) if length is None else length, kind, flags, sequence, 0) + body


DONE = struct.pack("=i", 0)


@given(some.lists(some.binary(max_size=120), max_size=3))
@example([b"\0" * 16])
@example([message(16, length=0)])
@example([message(16, sequence=9, length=8)])
@example([message(16, length=4096)])
@example([message(2)])
def test_a_garbled_datagram_never_hangs_the_reader(datagrams: list[bytes]) -> None:
    try:
        assert Script(*datagrams).dump(18, b"") is not None
    except (NetlinkError, *UNREADABLE):
        pass


@pytest.mark.parametrize("length", [0, 15, 17, 4096])
def test_a_length_that_does_not_fit_is_an_error(length: int) -> None:
    with pytest.raises(NetlinkError, match="does not fit") as caught:
        Script(message(16, length=length)).dump(18, b"")
    assert caught.value.errno == errno.EBADMSG


def test_an_interrupted_dump_is_taken_again() -> None:
    script = Script(
        message(16, b"old.", flags=0x10) + message(3, DONE, sequence=1, flags=0x10),
        message(16, b"new.", sequence=2) + message(3, DONE, sequence=2),
    )
    assert [data[start:stop] for data, start, stop in script.dump(18, b"")] == [b"new."]


def test_a_dump_that_is_interrupted_every_time_gives_up() -> None:
    script = Script(*[message(3, DONE, sequence=n, flags=0x10) for n in range(1, 20)])
    with pytest.raises(NetlinkError) as caught:
        script.dump(18, b"")
    assert (caught.value.errno, script._sequence) == (errno.EAGAIN, netlink.DUMP_TRIES)


def test_lost_messages_are_asked_for_again() -> None:
    script = Script(OSError(errno.ENOBUFS, "lost"), message(16, b"new.", sequence=2) + message(3, DONE, sequence=2))
    assert len(script.dump(18, b"")) == 1


def test_what_an_earlier_answer_left_behind_is_passed_over() -> None:
    script = Script(message(16, b"old.", sequence=0), message(16, b"new.", sequence=1))
    found = script.get(18, b"")
    assert found is not None
    assert found == b"new."


def test_no_answer_is_an_error_after_a_while() -> None:
    with pytest.raises(NetlinkError) as caught:
        Script().get(18, b"")
    assert caught.value.errno == errno.ETIMEDOUT


def test_the_kernels_own_words_are_kept() -> None:
    words = b"mtu less than device minimum\0"
    attr = struct.pack("=HH", 4 + len(words), 1) + words
    refusal = struct.pack("=i", -errno.EINVAL) + message(19) + attr
    with pytest.raises(NetlinkError, match="mtu less than device minimum"):
        Script(message(2, refusal, flags=0x300)).dump(18, b"")  # NLM_F_CAPPED | NLM_F_ACK_TLVS


@pytest.fixture
def captured(linux: LinuxHost) -> Iterator[list[bytes]]:
    """Real messages: a tun, a tap and a bridge."""
    linux.outside.add_link("br0")
    linux.outside.add_link("vpn0", Mode.TUN, alias="somebody's")
    linux.outside.add_link("vpn1", Mode.TAP)
    route = RouteSocket()
    found = route.dump(netlink.RTM_GETLINK, netlink.link_request())
    yield [data[start:stop] for data, start, stop in found]
    route.close()


@pytest.mark.kernel
def test_real_messages_cut_anywhere_are_read_or_refused(captured: list[bytes]) -> None:
    read = 0
    for whole in captured:
        for size in range(len(whole) + 1):
            try:
                read_link(whole[:size], 0, size)
                read += 1
            except UNREADABLE:
                pass
    assert read >= len(captured)


@pytest.mark.kernel
def test_an_unknown_link_is_none_and_the_socket_goes_on(linux: LinuxHost) -> None:
    route = RouteSocket()
    try:
        assert route.get(netlink.RTM_GETLINK, netlink.link_request("nothing")) is None
        assert route.get(netlink.RTM_GETLINK, netlink.link_request(ifindex=999_999)) is None
        assert route.get(netlink.RTM_GETLINK, netlink.link_request("lo")) is not None
    finally:
        route.close()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        route.get(netlink.RTM_GETLINK, netlink.link_request("lo"))


def link_body(*attrs: tuple[int, bytes]) -> bytes:
    return struct.pack("=BxHiII", 0, 0, 7, 0, 0) + encoded(list(attrs))


NAME, STATS, STATS64, ALIAS = (3, b"tun0\0"), (7, bytes(96)), (23, bytes(192)), (20, b"theirs")


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (link_body(NAME, STATS64, STATS), link_body(NAME, STATS64, STATS, ALIAS)),
        (link_body(NAME, STATS64, STATS, ALIAS), link_body(NAME, STATS64, STATS)),
        (link_body(NAME, STATS64, ALIAS), link_body(NAME, STATS64, (20, b"others"))),
        (link_body(NAME, (23, bytes(192))), link_body(NAME, (24, bytes(192)))),
        (link_body(NAME, (23, bytes(192))), link_body(NAME, (23, bytes(180)), (20, b"12345678"))),
        (link_body(NAME, STATS64), link_body(NAME, (23, struct.pack("=8Q", *range(8)) + bytes(128)))),
        (link_body(NAME), link_body(NAME, STATS64)),
    ],
)
def test_a_link_that_was_read_before_reads_as_if_it_had_not_been(first: bytes, then: bytes) -> None:
    known = netlink.LinkReader(tells_origin=True)
    known.read_all([first], {})
    assert known.read_all([then], {}) == netlink.LinkReader(tells_origin=True).read([then], {})
    assert known.read_all([first], {}) == netlink.LinkReader(tells_origin=True).read([first], {})
    assert known.read_all([], {}) == []


@settings(max_examples=300)
@given(NESTED, some.binary(min_size=16, max_size=16), some.data())
def test_what_is_known_of_where_attributes_stand_is_not_believed_of_another_message(
    tree: object, head: bytes, data: some.DataObject
) -> None:
    reader, message = netlink.LinkReader(tells_origin=True), bytearray(head + encoded(tree))
    for _ in range(4):  # each of one length, with other bytes in it
        outcomes: list[object] = []
        for anew in (True, False):
            try:
                whole = bytes(message)
                outcomes.append(read_link(whole, 0, len(whole)) if anew else reader.read([whole], {})[0])
            except UNREADABLE as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]
        message[data.draw(some.integers(0, len(message) - 1))] = data.draw(some.integers(0, 255))
