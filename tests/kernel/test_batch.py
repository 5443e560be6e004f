"""Batches on the real kernel: what others do between a check and what relies on it, and what a batch costs the kernel.

Others act at a failpoint or at a call of the code under test: there is no later moment that a test could reach.
"""

import contextlib
import errno
import os
import resource
import socket
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg

from service import failpoints
from service.domain import steps as st
from service.domain.errors import ErrorCode
from service.domain.observed import ObservedLink
from service.domain.token import Token
from service.domain.values import Mode
from service.kernel import batch, netlink, tundev
from service.kernel.linux import LinuxKernel
from tests.kernel.conftest import LinuxHost
from tests.kernel.outside import IFLA_GROUP, LinuxOutside, set_sysctl
from tests.kernel.test_contract import (
    OURS,
    TUN0,
    TUN1,
    Work,
    addr,
    all_made,
    codes,
    creation,
    fresh,
    named,
    removal,
    seen,
    there,
    token,
)

pytestmark = pytest.mark.kernel

FIRST_GROUP = st.REMOVAL_GROUPS[0]
TAKEN = ErrorCode.NAME_TAKEN


class Crash(BaseException):
    """What ends a batch at a point, as SIGKILL would."""


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[], None]]:
    """What is to be done when a failpoint is reached, by its name."""
    todo: dict[str, Callable[[], None]] = {}

    def reach(point: str, *, fails: bool = False) -> None:
        todo.get(point, lambda: None)()

    monkeypatch.setattr(failpoints, "reach", reach)
    return todo


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How many messages of each type were sent."""
    counted: Counter[int] = Counter()
    change_many = netlink.RouteSocket.change_many

    def count(self: netlink.RouteSocket, messages: list[bytearray]) -> list[netlink.NetlinkError | None]:
        counted.update(struct.unpack_from("=H", message, 4)[0] for message in messages)
        return change_many(self, messages)

    monkeypatch.setattr(netlink.RouteSocket, "change_many", count)
    return counted


@pytest.fixture
def first_group(netns: None) -> Iterator[LinuxHost]:
    """A kernel that deletes through the first group that is free, so that somebody can be in its way."""
    kernel, outside = LinuxKernel(choose=lambda groups: groups[0]), LinuxOutside()
    yield LinuxHost(kernel, outside)
    outside.close()
    kernel.close()


def bits(name: str) -> bytes:
    """All that the kernel says of a link, but for its counters."""
    route = netlink.RouteSocket()
    try:
        found = route.get(netlink.RTM_GETLINK, netlink.link_request(name))
        assert found is not None
        return found
    finally:
        route.close()


def remove(host: LinuxHost, links: dict[int, ObservedLink]) -> list[ErrorCode | None]:
    return codes(host.kernel.execute_many([removal(n, link) for n, link in links.items()]))


def once(do: Callable[[], None]) -> Callable[[], None]:
    """Do it the first time only."""
    left = [do]

    def act() -> None:
        if left:
            left.pop()()

    return act


# -- leaving together


def test_many_leave_by_one_message(linux: LinuxHost, sent: Counter[int]) -> None:
    links = all_made(linux, 300)
    sent.clear()
    assert remove(linux, links) == [None] * 300
    assert sent[netlink.RTM_DELLINK] == 1
    assert {name for _index, name in socket.if_nameindex()} == {"lo"}


def test_one_leaves_without_a_group(linux: LinuxHost, points: dict[str, Callable[[], None]]) -> None:
    reached: list[str] = []
    points["kernel.group.moved"] = lambda: reached.append("moved")
    assert remove(linux, all_made(linux, 1)) == [None]
    assert reached == []


def test_a_group_that_somebody_is_in_is_not_taken(first_group: LinuxHost, sent: Counter[int]) -> None:
    links = all_made(first_group, 3)
    first_group.outside.add_link("tun1000", Mode.TUN, alias="somebody's")
    first_group.outside.set_link_group("tun1000", FIRST_GROUP)
    before = bits("tun1000")
    sent.clear()
    assert remove(first_group, links) == [None] * 3
    assert sent == {netlink.RTM_SETLINK: 3, netlink.RTM_DELLINK: 1}
    assert bits("tun1000") == before
    assert there(first_group) == {"lo", "tun1000"}


@pytest.mark.parametrize("whose", ["", "tunledger:0123456789ab:00000000-0000-7000-8000-00000000ffff"])
def test_somebody_put_into_our_group_is_not_deleted_with_it(
    linux: LinuxHost, points: dict[str, Callable[[], None]], sent: Counter[int], whose: str
) -> None:
    """Neither a stranger nor a link of ours that is to stay."""
    links = all_made(linux, 20)
    linux.outside.add_link("tun1000", Mode.TUN, alias=whose)
    before: list[bytes] = []

    def put_in() -> None:
        linux.outside.set_link_group("tun1000", seen(linux).link_group)
        before.append(bits("tun1000"))

    points["kernel.group.moved"] = once(put_in)
    sent.clear()
    assert remove(linux, links) == [None] * 20
    assert sent[netlink.RTM_DELLINK] == 1, "through another group"
    assert before == [bits("tun1000")]
    assert there(linux) == {"lo", "tun1000"}


def test_somebody_who_follows_us_from_group_to_group_is_not_deleted(
    linux: LinuxHost, points: dict[str, Callable[[], None]], sent: Counter[int]
) -> None:
    links = all_made(linux, 5)
    linux.outside.add_link("tun1000", Mode.TUN)
    points["kernel.group.moved"] = lambda: linux.outside.set_link_group("tun1000", seen(linux).link_group)
    sent.clear()
    assert remove(linux, links) == [None] * 5
    assert sent[netlink.RTM_DELLINK] == 5, "one by one"
    assert there(linux) == {"lo", "tun1000"}


@pytest.mark.parametrize("home", [0, 7])
def test_a_link_that_lost_our_token_in_the_group_goes_home(
    linux: LinuxHost, points: dict[str, Callable[[], None]], home: int
) -> None:
    links = all_made(linux, 5)
    linux.outside.set_link_group("tun3", home)
    linux.outside.set_alias("tun3", "somebody's")
    before = bits("tun3")
    linux.outside.set_alias("tun3", str(token(3)))
    points["kernel.group.moved"] = once(lambda: linux.outside.set_alias("tun3", "somebody's"))
    assert remove(linux, links) == [None, None, None, TAKEN, None]
    assert bits("tun3") == before
    assert there(linux) == {"lo", "tun3"}


def test_a_link_that_lost_our_token_before_the_move_is_not_moved(
    linux: LinuxHost, points: dict[str, Callable[[], None]]
) -> None:
    links = all_made(linux, 5)
    linux.outside.set_alias("tun3", "somebody's")
    before, between = bits("tun3"), list[bytes]()
    points["kernel.group.moved"] = lambda: between.append(bits("tun3"))
    assert remove(linux, links) == [None, None, None, TAKEN, None]
    assert [*between, bits("tun3")] == [before, before]


@pytest.mark.parametrize("home", [7, st.REMOVAL_GROUPS[9]])
def test_home_is_where_a_link_was_before_the_first_move(
    linux: LinuxHost, points: dict[str, Callable[[], None]], home: int
) -> None:
    """Or no group at all, if a crash had left it in one for removals."""
    links = all_made(linux, 5)
    linux.outside.set_link_group("tun3", home)
    linux.outside.add_link("tun1000", Mode.TUN)
    moves: list[int] = []

    def moved() -> None:
        moves.append(seen(linux).link_group)
        if len(moves) == 1:
            linux.outside.set_link_group("tun1000", moves[0])  # so that there is a second
        elif len(moves) == 2:
            linux.outside.set_alias("tun3", "somebody's")

    points["kernel.group.moved"] = moved
    assert remove(linux, links) == [None, None, None, TAKEN, None]
    assert len(moves) == 3
    assert seen(linux, "tun3").link_group == (7 if home == 7 else 0)


def test_a_link_that_goes_between_the_last_look_and_the_delete_is_no_error(
    linux: LinuxHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = netlink.RouteSocket.change

    def too_late(self: netlink.RouteSocket, message: bytearray) -> None:
        for _index, name in socket.if_nameindex():
            if name != "lo":
                linux.outside.delete(name)
        change(self, message)

    for count in (1, 3):
        links = all_made(linux, count)
        with monkeypatch.context() as patched:
            patched.setattr(netlink.RouteSocket, "change", too_late)
            assert remove(linux, links) == [None] * count


def test_a_link_that_somebody_takes_out_of_the_group_leaves_all_the_same(
    linux: LinuxHost, points: dict[str, Callable[[], None]]
) -> None:
    links = all_made(linux, 5)
    points["kernel.group.moved"] = lambda: linux.outside.set_link_group("tun3", 0)
    assert remove(linux, links) == [None] * 5
    assert there(linux) == {"lo"}


@pytest.mark.parametrize("gone", [["tun3"], [f"tun{n}" for n in range(5)]], ids=["one", "all"])
def test_links_that_go_from_the_group_are_no_error(
    linux: LinuxHost, points: dict[str, Callable[[], None]], gone: list[str]
) -> None:
    links = all_made(linux, 5)

    def delete() -> None:
        for name in gone:
            linux.outside.delete(name)

    points["kernel.group.moved"] = once(delete)
    assert remove(linux, links) == [None] * 5
    assert there(linux) == {"lo"}


def test_a_stranger_that_gets_the_ifindex_of_one_in_the_group_stays(
    linux: LinuxHost, points: dict[str, Callable[[], None]]
) -> None:
    links = all_made(linux, 5)
    before: list[bytes] = []

    def change_hands() -> None:
        linux.outside.delete("tun3")
        linux.outside.add_link("tun3", alias=str(token(3)), ifindex=links[3].ifindex)  # a bridge: no token counts
        linux.outside.set_link_group("tun3", seen(linux).link_group)
        before.append(bits("tun3"))

    points["kernel.group.moved"] = once(change_hands)
    assert remove(linux, links) == [None, None, None, TAKEN, None]
    after = seen(linux, "tun3")
    assert (after.ifindex, after.mode, after.alias) == (links[3].ifindex, None, str(token(3)))


def test_a_group_that_the_kernel_does_not_delete_is_deleted_one_by_one(
    linux: LinuxHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = all_made(linux, 5)
    change = netlink.RouteSocket.change

    def refuse_groups(self: netlink.RouteSocket, message: bytearray) -> None:
        if struct.pack("=HH", 8, IFLA_GROUP) in message:
            raise netlink.NetlinkError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        change(self, message)

    monkeypatch.setattr(netlink.RouteSocket, "change", refuse_groups)
    assert remove(linux, links) == [None] * 5
    assert there(linux) == {"lo"}


def test_what_cannot_be_deleted_at_all_goes_home(linux: LinuxHost, monkeypatch: pytest.MonkeyPatch) -> None:
    links = all_made(linux, 3)
    linux.outside.set_link_group("tun1", 7)
    before = [bits(named(n)) for n in range(3)]

    def refuse(_self: netlink.RouteSocket, _message: bytearray) -> None:
        raise netlink.NetlinkError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(netlink.RouteSocket, "change", refuse)
    errors = linux.kernel.execute_many([removal(n, link) for n, link in links.items()])
    assert [(error.errno_name, error.retry) for error in errors if error] == [("ENOMEM", True)] * 3
    assert [bits(named(n)) for n in range(3)] == before


def test_a_crash_between_move_and_delete_leaves_links_that_can_be_removed_or_put_back(
    linux: LinuxHost, points: dict[str, Callable[[], None]]
) -> None:
    links = all_made(linux, 4)

    def crash() -> None:
        raise Crash

    points["kernel.group.moved"] = crash
    with pytest.raises(Crash):
        remove(linux, links)
    points.clear()
    assert {seen(linux, named(n)).link_group in st.REMOVAL_GROUPS for n in links} == {True}
    assert linux.kernel.execute_many([(token(0), [st.SetLinkGroup(TUN0, 0)])]) == [None]
    assert seen(linux) == links.pop(0)
    assert remove(linux, links) == [None] * 3
    assert there(linux) == {"lo", "tun0"}


def test_more_than_a_group_holds_leave_in_several(
    linux: LinuxHost, monkeypatch: pytest.MonkeyPatch, sent: Counter[int]
) -> None:
    monkeypatch.setattr(batch, "GROUP_MAX", 10)
    links = all_made(linux, 21)
    sent.clear()
    assert remove(linux, links) == [None] * 21
    assert sent[netlink.RTM_DELLINK] == 3
    assert there(linux) == {"lo"}


# -- making


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Have the process at so many of its limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    taken: list[int] = []
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC))
        for _ in range(count):
            os.close(taken.pop())
        yield
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_every_device_of_a_batch_is_marked_before_it_can_outlive_us(
    linux: LinuxHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    persist, early = tundev.set_persist, list[str]()

    def look_first(fd: int) -> None:
        name = tundev.attached_name(fd)
        link = linux.kernel.observe([name]).links[name]
        if link.token is None or link.persist:
            early.append(name)
        persist(fd)

    monkeypatch.setattr(tundev, "set_persist", look_first)
    all_made(linux, 150)
    assert early == []


def test_a_crash_while_devices_are_made_leaves_none_that_is_not_marked(
    linux: LinuxHost, points: dict[str, Callable[[], None]]
) -> None:
    for point, left in [("kernel.create.made", 0), ("kernel.create.marked", 5), ("kernel.create.persistent", 6)]:
        reached = iter(range(1000))

        def crash(reached: Iterator[int] = reached) -> None:
            if next(reached) == 5:
                raise Crash

        points.clear()
        points[point] = crash
        with pytest.raises(Crash):
            linux.kernel.execute_many([fresh(n) for n in range(20)])
        links = [link for link in linux.kernel.observe().links.values() if link.name != "lo"]
        assert len(links) == left, point
        assert all(link.token for link in links)
        for link in links:
            linux.outside.delete(link.name)


def test_one_whose_alias_fails_is_not_left_behind(linux: LinuxHost, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = netlink.alias_message

    def nowhere(ifindex: int, alias: str) -> bytearray:
        return mark(999_999 if alias == str(token(1)) else ifindex, alias)

    monkeypatch.setattr(netlink, "alias_message", nowhere)
    errors = linux.kernel.execute_many([fresh(n, st.SetUp(named(n))) for n in range(3)])
    assert codes(errors) == [None, ErrorCode.DEVICE_GONE, None]
    assert there(linux) == {"lo", "tun0", "tun2"}


def test_few_descriptors_make_a_batch_slower_not_shorter(linux: LinuxHost) -> None:
    linux.kernel.observe()
    before = descriptors()
    with descriptors_left(7):
        errors = linux.kernel.execute_many([fresh(n, st.SetUp(named(n))) for n in range(40)])
    assert errors == [None] * 40
    assert sum(link.up and link.token is not None for link in linux.kernel.observe().links.values()) == 40
    assert descriptors() == before


def test_no_descriptor_at_all_is_said(linux: LinuxHost) -> None:
    linux.kernel.observe()
    with descriptors_left(0):
        errors = linux.kernel.execute_many([fresh(n) for n in range(3)])
        socketless = LinuxKernel().execute_many([fresh(n) for n in range(3)])
    for told in (errors, socketless):
        assert [(error.errno_name, error.retry) for error in told if error] == [("EMFILE", True)] * 3


def test_a_device_whose_name_changes_hands_while_it_is_made_marks_nobody_else(
    linux: LinuxHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    index_of, before = netlink.RouteSocket.index_of, list[bytes]()

    def swap_first(self: netlink.RouteSocket, name: str) -> int:
        if not before:
            linux.outside.rename(name, "elsewhere")
            linux.outside.add_link(name, Mode.TUN)
            before.append(bits(name))
        return index_of(self, name)

    monkeypatch.setattr(netlink.RouteSocket, "index_of", swap_first)
    (error,) = linux.kernel.execute_many([fresh(0, st.SetUp(TUN0))])
    assert error is not None
    assert (error.code, error.retry) == (ErrorCode.DEVICE_GONE, True)
    assert before == [bits("tun0")]
    assert there(linux) == {"lo", "tun0"}


# -- changing


def test_a_stranger_that_takes_name_and_ifindex_between_observing_and_acting_is_left_alone(linux: LinuxHost) -> None:
    links = all_made(linux, 3)
    linux.outside.delete("tun1")
    linux.outside.add_link("tun1", alias=str(token(1)), ifindex=links[1].ifindex)
    before = bits("tun1")
    work: Work = [(token(n), [st.SetMtu(named(n), 1400), st.SetUp(named(n))]) for n in range(3)]
    assert codes(linux.kernel.execute_many(work)) == [None, TAKEN, None]
    assert codes(linux.kernel.execute_many([removal(1, links[1])])) == [TAKEN]
    assert bits("tun1") == before
    assert [seen(linux, named(n)).mtu for n in (0, 2)] == [1400, 1400]


def test_a_link_that_goes_between_two_steps_fails_alone(
    linux: LinuxHost, points: dict[str, Callable[[], None]]
) -> None:
    all_made(linux, 3)
    points["kernel.SetMtu.after"] = once(lambda: linux.outside.delete("tun1"))
    work: Work = [
        (token(n), [st.SetMtu(named(n), 1400), st.SetTxQueueLen(named(n), 7), st.SetUp(named(n))]) for n in range(3)
    ]
    errors = linux.kernel.execute_many(work)
    assert codes(errors) == [None, ErrorCode.DEVICE_GONE, None]
    assert str(errors[1]).startswith("ip link set tun1 txqueuelen 7: the link is gone")
    assert [seen(linux, named(n)).up for n in (0, 2)] == [True, True]


def test_our_token_is_looked_for_after_what_went_before_it(
    linux: LinuxHost, points: dict[str, Callable[[], None]]
) -> None:
    """A batch that takes long does not go by what it saw at its beginning."""
    all_made(linux, 2)
    before: list[bytes] = []

    def lose_it() -> None:
        linux.outside.set_alias("tun1", "somebody's")
        before.append(bits("tun1"))

    points["kernel.create.persistent"] = lose_it
    work: Work = [(token(1), [st.SetUp(TUN1)]), fresh(2)]
    assert codes(linux.kernel.execute_many(work)) == [TAKEN, None]
    assert before == [bits("tun1")]


def test_what_is_vouched_for_is_asked_after_the_link_was_seen(linux: LinuxHost) -> None:
    all_made(linux, 1)
    asked: list[int] = []

    def vouch(ifindex: int, of: Token) -> bool:
        assert of == token(0)
        asked.append(ifindex)
        return False

    kernel = LinuxKernel(vouched=vouch)
    try:
        index = seen(linux).ifindex
        assert codes(kernel.execute_many([(token(0), [st.SetAlias("tun0", index, token(0))])])) == [None]
        assert asked == []
        linux.outside.set_alias("tun0", "")
        assert codes(kernel.execute_many([(token(0), [st.SetAlias("tun0", index, token(0))])])) == [TAKEN]
        assert asked == [index]
    finally:
        kernel.close()


def test_the_points_of_a_batch_are_those_of_each_member(linux: LinuxHost, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[str] = []
    monkeypatch.setattr(failpoints, "reach", lambda point, **_: reached.append(point.removeprefix("kernel.")))
    assert linux.kernel.execute_many([fresh(0, st.SetUp(TUN0))]) == [None]
    one = list(reached)
    create = ["CreateLink.before", "create.made", "create.marked", "create.persistent", "CreateLink.after"]
    assert one == [*create, "SetUp.before", "SetUp.after"]
    reached.clear()
    assert linux.kernel.execute_many([fresh(n, st.SetUp(named(n))) for n in (1, 2, 3)]) == [None] * 3
    assert Counter(reached) == Counter(one * 3)
    reached.clear()
    links = linux.kernel.observe().links
    assert remove(linux, {n: links[named(n)] for n in range(3)}) == [None] * 3
    assert reached == [*["DeleteLink.before"] * 3, "group.moved", "group.deleted", *["DeleteLink.after"] * 3]


@pytest.mark.parametrize(
    "point",
    ["CreateLink.before", "create.made", "create.marked", "SetMtu.before", "group.moved", "DeleteLink.before"],
)
def test_a_failure_ordered_for_one_fails_one(
    linux: LinuxHost, points: dict[str, Callable[[], None]], point: str
) -> None:
    def fail() -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), point)

    points[f"kernel.{point}"] = once(fail)
    errors = linux.kernel.execute_many([fresh(n, st.SetMtu(named(n), 1400)) for n in range(3)])
    failed = [error.errno_name for error in errors if error]
    links = linux.kernel.observe().links
    left = {n: links[named(n)] for n in range(3) if named(n) in links}
    if point in {"group.moved", "DeleteLink.before"}:
        assert failed == []
        errors = linux.kernel.execute_many([removal(n, link) for n, link in left.items()])
        # the group that failed is deleted one by one
        assert [e.errno_name for e in errors if e] == ([] if point == "group.moved" else ["ENOMEM"])
        assert sum(name in linux.kernel.observe().links for name in map(named, range(3))) == len(errors) - errors.count(
            None
        )
    else:
        assert failed == ["ENOMEM"]
        assert len(left) == (3 if point == "SetMtu.before" else 2)


# -- the socket


def test_messages_are_those_that_pyroute2_makes(netns: None) -> None:
    """Byte for byte, values of every length that padding knows among them."""

    def encoded(make: Any, kind: int, header_flags: int, attrs: list[tuple[str, Any]], **fields: Any) -> bytes:
        message = make()
        for key, value in fields.items():
            message[key] = value
        message["attrs"] = attrs
        message["header"]["type"], message["header"]["flags"] = kind, header_flags
        message.encode()
        return bytes(message.data)

    mark = 0x3F3F3F3F
    for index in (1, 7, mark):
        for text in ("10.1.2.3/24", "63.63.63.63/31", "2001:db8::1/64", "3f3f:3f3f::3f3f/63"):
            address = addr(text)
            family = socket.AF_INET if address.version == 4 else socket.AF_INET6
            fields = {"family": family, "prefixlen": address.prefixlen, "index": index}
            attrs = [("IFA_LOCAL", str(address.ip)), ("IFA_ADDRESS", str(address.ip))]
            for kind, flags in ((netlink.RTM_NEWADDR, 0x501), (netlink.RTM_DELADDR, 0x001)):
                wanted = encoded(ifaddrmsg, kind, flags, attrs, **fields)
                assert bytes(netlink.address_message(kind, index, address)) == wanted
        for mac in ("02:00:00:00:12:34", "3f:3f:3f:3f:3f:3f"):
            wanted = encoded(ifinfmsg, netlink.RTM_SETLINK, 1, [("IFLA_ADDRESS", mac)], index=index)
            assert bytes(netlink.mac_message(index, mac)) == wanted
        wanted = encoded(ifinfmsg, netlink.RTM_SETLINK, 1, [("IFLA_IFNAME", "tun0")], index=index)
        assert bytes(netlink.name_message(index, "tun0")) == wanted
        for alias in (str(OURS), "?" * len(str(OURS))):
            wanted = encoded(ifinfmsg, netlink.RTM_SETLINK, 1, [("IFLA_IFALIAS", alias)], index=index)
            assert bytes(netlink.alias_message(index, alias)) == wanted
        values: list[tuple[str, int, int | str]] = [
            ("IFLA_MTU", netlink.IFLA_MTU, 65_521),
            ("IFLA_TXQLEN", netlink.IFLA_TXQLEN, 2**32 - 1),
            ("IFLA_GROUP", netlink.IFLA_GROUP, mark),
            *(("IFLA_IFNAME", netlink.IFLA_IFNAME, "abcdefghijklmno"[:length]) for length in (1, 2, 3, 4, 15)),
        ]
        for name, attr, value in values:
            wanted = encoded(ifinfmsg, netlink.RTM_SETLINK, 1, [(name, value)], index=index)
            assert bytes(netlink.link_message(netlink.RTM_SETLINK, index, [(attr, value)])) == wanted
        for up in (False, True):
            wanted = encoded(ifinfmsg, netlink.RTM_SETLINK, 1, [], index=index, flags=int(up), change=1)
            assert bytes(netlink.link_message(netlink.RTM_SETLINK, index, up=up)) == wanted
        wanted = encoded(ifinfmsg, netlink.RTM_DELLINK, 1, [], index=index)
        assert bytes(netlink.link_message(netlink.RTM_DELLINK, index)) == wanted


@pytest.fixture
def route(netns: None) -> Iterator[netlink.RouteSocket]:
    opened = netlink.RouteSocket()
    yield opened
    opened.close()


@pytest.fixture
def narrow(route: netlink.RouteSocket) -> netlink.RouteSocket:
    """With as little room for answers as a process without CAP_NET_ADMIN may get."""
    route._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 50_000)
    route._room = route._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
    return route


def test_refusals_find_their_messages_over_many_datagrams(route: netlink.RouteSocket) -> None:
    wrong = {0, 5, 255, 256, 700, 999}
    messages = [netlink.link_message(netlink.RTM_SETLINK, 999_999 if n in wrong else 1, up=True) for n in range(1000)]
    refusals = route.change_many(messages)
    assert {n for n, refusal in enumerate(refusals) if refusal is not None} == wrong
    assert {refusal.errno for refusal in refusals if refusal is not None} == {errno.ENODEV}


def test_a_thousand_refusals_fit_the_socket(narrow: netlink.RouteSocket) -> None:
    refusals = narrow.change_many(
        [netlink.link_message(netlink.RTM_SETLINK, 1, [(netlink.IFLA_MTU, 2**32 - 1)]) for _ in range(1000)]
    )
    assert [refusal.errno for refusal in refusals if refusal is not None] == [errno.EINVAL] * 1000


def test_a_thousand_links_asked_for_fit_the_socket(linux: LinuxHost, narrow: netlink.RouteSocket) -> None:
    linux.outside.add_link("tun0", Mode.TUN, alias="x" * 250)
    requests = [netlink.link_request("tun0" if n % 3 else f"nothing{n}") for n in range(1000)]
    found = narrow.get_many(netlink.RTM_GETLINK, requests)
    assert [body is None for body in found] == [n % 3 == 0 for n in range(1000)]
    assert {type(body) for body in found} == {bytes, type(None)}


def test_lost_answers_are_said_and_the_socket_goes_on(route: netlink.RouteSocket) -> None:
    """With a receive buffer as small as it gets, and no regard for it."""
    route._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    bad = [netlink.link_message(netlink.RTM_SETLINK, 999_999, up=True) for _ in range(100)]
    errnos = {refusal.errno for refusal in route.change_many(bad) if refusal is not None}
    assert errnos == {errno.ENODEV, errno.ENOBUFS}
    good = [netlink.link_message(netlink.RTM_SETLINK, 1, up=True) for _ in range(100)]
    assert route.change_many(good) == [None] * 100
    bodies = route.get_many(netlink.RTM_GETLINK, [netlink.link_request("lo")] * 100)
    assert {body.errno for body in bodies if isinstance(body, netlink.NetlinkError)} == {errno.ENOBUFS}
    assert route.change_many(good) == [None] * 100
    assert route.get(netlink.RTM_GETLINK, netlink.link_request("lo")) is not None


def test_a_dump_that_nobody_read_does_not_stand_in_the_way(
    linux: LinuxHost, route: netlink.RouteSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(netlink, "DUMP_TRIES", 2)
    for n in range(100):
        linux.outside.add_link(f"vpn{n}", Mode.TUN, alias="x" * 200)
    body = netlink.link_request()
    route._send(struct.pack("=IHHII", 16 + len(body), netlink.RTM_GETLINK, 0x301, 0, 0) + body)
    assert len(route.dump(netlink.RTM_GETLINK, netlink.link_request())) == 101


def test_sequence_numbers_come_to_no_end(route: netlink.RouteSocket) -> None:
    route._sequence = netlink.SEQUENCE_MAX - 1
    assert route.change_many([netlink.link_message(netlink.RTM_SETLINK, 1, up=True) for _ in range(4)]) == [None] * 4
    assert route.get(netlink.RTM_GETLINK, netlink.link_request("lo")) is not None


# The header of an IPv4 datagram that goes nowhere.
PACKET = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20, 0, 0, 64, 17, 0, bytes([10, 0, 0, 2]), bytes(4))


def test_what_did_not_change_is_not_decoded_again(linux: LinuxHost, monkeypatch: pytest.MonkeyPatch) -> None:
    linux.kernel.execute(OURS, [creation()])
    set_sysctl("net/ipv6/conf/tun0/disable_ipv6", "1")  # so that nothing comes to it by itself
    linux.kernel.execute(OURS, [st.AddAddress(TUN0, addr("10.0.0.1/24")), st.SetUp(TUN0)])
    read, decoded = netlink.link_of, list[str]()

    def count(*message: Any, **how: Any) -> ObservedLink:
        link = read(*message, **how)
        decoded.append(link.name)
        return link

    fd = linux.kernel.open_device(st.StartProcessing(TUN0, OURS.interface_id, Mode.TUN, False), OURS)
    try:
        seen(linux)
        assert linux.kernel.observe().links["tun0"].counters.rx_packets == 0
        monkeypatch.setattr(netlink, "link_of", count)
        for packets in (1, 2):
            os.write(fd, bytes(10) + PACKET)  # behind a virtio_net_hdr that asks for nothing
            for names in (["tun0"], None):
                assert linux.kernel.observe(names).links["tun0"].counters.rx_packets == packets
        assert decoded == [], "that packets passed is no other change"
        linux.kernel.execute(OURS, [st.SetMtu(TUN0, 1400)])
        linux.kernel.observe()
        assert decoded == ["tun0"]
        linux.kernel.execute(OURS, [st.AddAddress(TUN0, addr("10.0.1.1/24"))])
        linux.kernel.observe()
        assert decoded == ["tun0"] * 2
    finally:
        os.close(fd)
