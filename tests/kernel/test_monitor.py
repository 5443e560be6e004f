"""What the monitor tells of others' changes, what it keeps quiet about, and when it vouches for a link.

First `Watch`, which is fed with bytes; then the monitor beside the real kernel.
"""

import fcntl
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some

from service.domain.observed import ObservedLink, Place
from service.domain.token import Token
from service.domain.values import Address, InterfaceId, Mode, NodeId
from service.kernel import monitor as module
from service.kernel import netlink
from service.kernel.monitor import Monitor, News, Watch
from tests.kernel.conftest import LinuxHost, wait_until
from tests.kernel.outside import (
    IFF_NO_PI,
    IFF_TUN,
    TUN_PATH,
    TUNSETIFF,
    TUNSETPERSIST,
    LinuxOutside,
    attached,
    attr,
    u32,
)
from tests.namespace import fresh_namespace

NODE = NodeId("0123456789ab")
TOKEN = Token(NODE, InterfaceId("0190b8a0-0000-7000-8000-000000000001"))
OTHER = Token(NODE, InterfaceId("0190b8a0-0000-7000-8000-000000000002"))
NEWLINK, DELLINK, NEWADDR, DELADDR = netlink.RTM_NEWLINK, netlink.RTM_DELLINK, netlink.RTM_NEWADDR, netlink.RTM_DELADDR
INDEX = 7
IFA_F_PERMANENT, IFA_F_TENTATIVE = 0x80, 0x40  # linux/if_addr.h
IFAPROT_KERNEL_LL = 3
TUNSETIFINDEX = 0x400454DA  # linux/if_tun.h
V4, V6 = Address(IPv4Address("192.0.2.1"), 24), Address(IPv6Address("2001:db8::1"), 64)

# -- Watch


def a_link(
    ifindex: int = INDEX,
    *,
    name: str = "tun0",
    alias: str = str(TOKEN),
    mtu: int = 1400,
    qlen: int = 500,
    mac: str = "",
    flags: int = 0x1,
    owner: int = 0,
    family: int = socket.AF_UNSPEC,
    carrier: int = 0,
    operstate: int = 2,
    more: bytes = b"",
) -> bytes:
    """The body of a link's message."""
    body = struct.pack("=BxHiII", family, 65534, ifindex, flags, 0) + attr(3, name.encode() + b"\0")
    body += attr(1, bytes.fromhex(mac)) + attr(4, u32(mtu)) + attr(13, u32(qlen)) + attr(16, bytes([operstate]))
    body += attr(33, bytes([carrier])) + attr(20, alias.encode() + b"\0") + more
    return body + attr(18, attr(1, b"tun\0") + attr(2, attr(3, b"\1") + attr(6, b"\1") + attr(1, u32(owner))))


def an_address(address: Address, *, flags: int = IFA_F_PERMANENT, origin: int = 0, ifindex: int = INDEX) -> bytes:
    """The body of an address's message."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    body = struct.pack("=BBBBi", family, address.prefixlen, flags, 0, ifindex)
    body += attr(1, address.ip.packed) + attr(2, address.ip.packed) + attr(8, u32(flags))
    return body + (attr(11, bytes([origin])) if origin else b"")


def seen(*addresses: Address, **changes: Any) -> ObservedLink:
    """The link as a look at it sees it."""
    body = a_link(**changes)
    return replace(netlink.read_link(body, 0, len(body)), addresses=addresses)


def tell(watch: Watch, kind: int, body: bytes) -> None:
    """As it comes: in the midst of others."""
    watch.heard(kind, b"\xff" * 16 + body + b"\xff" * 16, 16, 16 + len(body))


def a_watch(*addresses: Address, cares: Callable[[str], bool] = lambda _name: True) -> Watch:
    """One that hears, and watches `tun0`."""
    watch = Watch(cares)
    watch.hear({1: b"lo", INDEX: b"tun0"})
    watch.settled(watch.mark(), [seen(*addresses)])
    assert not watch.take()
    assert watch.vouches(INDEX, TOKEN)
    return watch


DRIFT: dict[str, dict[str, Any]] = {
    "down": {"flags": 0},
    "mtu": {"mtu": 1300},
    "txqueuelen": {"qlen": 10},
    "alias": {"alias": "mine now"},
    "name": {"name": "tun9"},
    "mac": {"mac": "020000000001"},
    "owner": {"owner": 1000},
}


@pytest.mark.parametrize("change", DRIFT.values(), ids=DRIFT.keys())
def test_a_message_that_says_something_else_than_was_seen_is_news(change: dict[str, Any]) -> None:
    watch = a_watch()
    tell(watch, NEWLINK, a_link(**change))
    assert watch.pending
    assert watch.take() == News(changed={(None, INDEX): TOKEN})
    left = watch.pending, watch.take()
    assert left == (False, News())


@pytest.mark.parametrize(
    "says",
    [
        {},
        {"flags": 0x10041, "carrier": 1, "operstate": 6},  # a reader came
        {"flags": 0x101},  # IFF_PROMISC: somebody captures
        {"more": attr(44, u32(4))},  # IFLA_EVENT
    ],
)
def test_a_message_that_says_what_was_seen_is_none(says: dict[str, Any]) -> None:
    watch = a_watch()
    tell(watch, NEWLINK, a_link(**says))
    assert not watch.pending


@pytest.mark.parametrize("family", [socket.AF_BRIDGE, socket.AF_INET6])
@pytest.mark.parametrize("kind", [NEWLINK, DELLINK])
def test_a_bridge_that_speaks_of_its_ports_says_nothing_of_the_link(kind: int, family: int) -> None:
    watch = a_watch()
    tell(watch, kind, a_link(family=family, mtu=9000))
    assert not watch.pending
    assert watch.vouches(INDEX, TOKEN)


def test_a_link_that_left_is_gone_and_vouched_for_no_more_even_if_its_like_comes_back() -> None:
    watch = a_watch()
    tell(watch, NEWLINK, a_link(mtu=1300))
    tell(watch, DELLINK, a_link())
    assert not watch.vouches(INDEX, TOKEN)
    tell(watch, NEWLINK, a_link())
    assert not watch.vouches(INDEX, TOKEN)
    assert watch.take() == News(gone={(None, INDEX): TOKEN}, names=frozenset({"tun0"}))


def test_a_link_that_was_moved_says_where_to() -> None:
    watch = a_watch()
    tell(watch, DELLINK, a_link(more=attr(45, u32(0)) + attr(49, u32(12))))
    news = watch.take()
    assert news.gone == {(None, INDEX): TOKEN}
    assert news.moved == {(None, INDEX): "moved to another network namespace, where its ifindex is 12"}


def test_what_was_heard_before_the_mark_is_forgotten_and_what_came_after_is_kept() -> None:
    watch = a_watch(V4)
    tell(watch, NEWLINK, a_link(mtu=1300))
    first = watch.mark()
    tell(watch, DELADDR, an_address(V4))
    second = watch.mark()
    watch.settled(first, [seen(V4, mtu=1300)])
    assert watch.pending
    watch.settled(second, [seen(mtu=1300)])
    assert not watch.pending


def test_a_change_back_after_the_look_is_kept_though_it_says_what_was_known_before_the_look() -> None:
    watch = a_watch()
    mark = watch.mark()  # a silent change: an alias on a link that is down
    tell(watch, NEWLINK, a_link())
    watch.settled(mark, [seen(alias="x")])
    assert watch.take().changed == {(None, INDEX): TOKEN}
    tell(watch, NEWLINK, a_link(mtu=1300))
    mark = watch.mark()
    tell(watch, NEWLINK, a_link(alias="x"))
    watch.settled(mark, [seen(mtu=1300)])
    assert watch.take().changed == {(None, INDEX): TOKEN}


def test_a_change_between_the_first_look_at_a_link_and_its_being_watched_is_kept() -> None:
    watch = Watch()
    watch.hear({INDEX: b"tun0"})
    mark = watch.mark()
    tell(watch, NEWLINK, a_link(mtu=1300))
    watch.settled(mark, [seen()])
    assert watch.take().changed == {(None, INDEX): TOKEN}
    assert watch.vouches(INDEX, TOKEN)


@pytest.mark.parametrize("watched", [False, True])
def test_a_link_that_left_since_the_look_is_not_watched(watched: bool) -> None:
    watch = a_watch() if watched else Watch()
    watch.hear({INDEX: b"tun0"})
    watch.take()
    mark = watch.mark()
    tell(watch, DELLINK, a_link())
    tell(watch, NEWLINK, a_link())
    watch.settled(mark, [seen()])
    assert not watch.vouches(INDEX, TOKEN)
    assert watch.take().gone == {(None, INDEX): TOKEN}


def test_nothing_is_watched_by_a_look_that_began_before_messages_were_lost() -> None:
    watch = a_watch()
    mark = watch.mark()
    watch.deafen()
    assert not watch.vouches(INDEX, TOKEN)
    watch.settled(watch.mark(), [seen()])
    assert not watch.vouches(INDEX, TOKEN), "it is deaf"
    assert watch.take() == News(lost=True)
    early = watch.mark()
    watch.hear({INDEX: b"tun0"})
    for each in (mark, early):
        watch.settled(each, [seen()])
        assert not watch.vouches(INDEX, TOKEN)
    assert watch.take() == News(changed={(None, INDEX): TOKEN}, lost=True)
    watch.settled(watch.mark(), [seen()])
    assert watch.vouches(INDEX, TOKEN)
    assert not watch.pending


def test_an_overrun_message_is_a_loss() -> None:
    watch = a_watch()
    tell(watch, module.NLMSG_OVERRUN, bytes(4))
    assert watch.take().lost
    assert not watch.vouches(INDEX, TOKEN)


def test_a_look_is_void_when_more_was_heard_since_than_can_be_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARD_MOST", 10)
    watch = Watch(lambda _name: False)
    watch.hear({INDEX: b"tun0"})
    mark = watch.mark()
    tell(watch, DELLINK, a_link())
    for ifindex in range(100, 111):
        tell(watch, NEWLINK, a_link(ifindex=ifindex, alias=""))
    watch.settled(mark, [seen()])
    assert not watch.vouches(INDEX, TOKEN)
    assert watch.take().changed == {(None, INDEX): TOKEN}
    watch.settled(watch.mark(), [seen()])
    assert watch.vouches(INDEX, TOKEN)


def test_names_that_nobody_takes_have_a_bound_and_running_over_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HEARD_MOST", 10)
    watch = a_watch()
    for ifindex in range(100, 111):
        tell(watch, NEWLINK, a_link(ifindex=ifindex, name=f"veth{ifindex}", alias=""))
    news = watch.take()
    assert news.lost
    assert len(news.names) <= 10


def test_only_what_bears_a_token_is_watched_and_an_alias_does_not_change_whose_it_is() -> None:
    watch = a_watch()
    watch.settled(watch.mark(), [seen(ifindex=9, alias="a stranger's")])
    assert not watch.vouches(9, TOKEN)
    for alias in ("overwritten", str(OTHER)):
        watch.settled(watch.mark(), [seen(alias=alias)])
        assert watch.vouches(INDEX, TOKEN)
        assert not watch.vouches(INDEX, OTHER)
    tell(watch, NEWLINK, a_link(alias=str(OTHER)))
    assert not watch.pending, "that is what was seen"


def test_who_holds_a_token_is_known_as_long_as_it_is_watched() -> None:
    watch = a_watch()
    watch.settled(watch.mark(), [seen(ifindex=8, alias=str(OTHER))])
    held = watch.holder(TOKEN), watch.holder(OTHER), watch.watching
    assert held == (INDEX, 8, 2)
    tell(watch, DELLINK, a_link(8))
    held = watch.holder(TOKEN), watch.holder(OTHER), watch.watching
    assert held == (INDEX, None, 1)
    watch.settled(watch.mark(), [seen(ifindex=9)])
    tell(watch, DELLINK, a_link())
    assert watch.holder(TOKEN) == 9, "it was made anew before the old one went"
    watch.deafen()
    assert watch.holder(TOKEN) is None


def test_names_that_others_take_and_give_back_are_news_once_each() -> None:
    watch = a_watch()
    tell(watch, NEWLINK, a_link(ifindex=9, name="a", alias=""))
    assert watch.take().names == {"a"}
    tell(watch, NEWLINK, a_link(ifindex=9, name="a", alias="", mtu=9000))
    assert not watch.take()
    tell(watch, NEWLINK, a_link(ifindex=9, name="b", alias=""))
    assert watch.take().names == {"a", "b"}
    tell(watch, DELLINK, a_link(ifindex=9, name="b", alias=""))
    assert watch.take() == News(names=frozenset({"b"}))
    tell(watch, NEWLINK, a_link(ifindex=1, name="lo9", alias=""))
    assert watch.take().names == {"lo", "lo9"}, "lo was there from the beginning"


def test_names_that_do_not_matter_are_no_news_but_a_link_with_our_token_is() -> None:
    watch = a_watch(cares={"wanted"}.__contains__)
    tell(watch, NEWLINK, a_link(ifindex=9, name="veth9", alias=""))
    tell(watch, DELLINK, a_link(ifindex=9, name="veth9", alias=""))
    assert not watch.pending
    tell(watch, NEWLINK, a_link(ifindex=9, name="wanted", alias=""))
    tell(watch, NEWLINK, a_link(ifindex=10, name="renamed", alias=str(OTHER)))
    assert watch.take().names == {"wanted", "renamed"}


def test_the_news_of_ones_own_making_and_removing_is_forgotten() -> None:
    watch = Watch()
    watch.hear({})
    tell(watch, NEWLINK, a_link())
    watch.settled(watch.mark(), [seen()])
    assert not watch.pending
    tell(watch, DELLINK, a_link(more=attr(45, u32(0))))
    tell(watch, NEWLINK, a_link(ifindex=8, name="half"))
    tell(watch, DELLINK, a_link(ifindex=8, name="half"))
    mark = watch.mark()
    tell(watch, NEWLINK, a_link(ifindex=9, name="other"))
    tell(watch, DELLINK, a_link(ifindex=9, name="other"))
    watch.settled(mark, [], gone=[INDEX, 8, 9])
    assert watch.take() == News(names=frozenset({"other"}))


@pytest.mark.parametrize(
    ("kind", "address", "flags", "origin", "news"),
    [
        (NEWADDR, V6, IFA_F_PERMANENT | IFA_F_TENTATIVE, 0, False),
        (NEWADDR, V6, IFA_F_PERMANENT, 0, False),
        (NEWADDR, V6, 0, 0, True),  # it has a lifetime now
        (DELADDR, V6, IFA_F_PERMANENT, 0, True),
        (NEWADDR, V4, IFA_F_PERMANENT, 0, True),
        (NEWADDR, Address(V6.ip, 128), IFA_F_PERMANENT, 0, True),
        (DELADDR, V4, IFA_F_PERMANENT, 0, False),
        (NEWADDR, Address(IPv6Address("fe80::1"), 64), IFA_F_PERMANENT, IFAPROT_KERNEL_LL, False),
        (DELADDR, Address(IPv6Address("fe80::1"), 64), IFA_F_PERMANENT, IFAPROT_KERNEL_LL, False),
    ],
)
def test_an_address_is_news_if_it_is_not_as_it_was_seen(
    kind: int, address: Address, flags: int, origin: int, news: bool
) -> None:
    watch = a_watch(V6)
    tell(watch, kind, an_address(address, flags=flags, origin=origin))
    assert set(watch.take().changed) == ({(None, INDEX)} if news else set())
    tell(watch, kind, an_address(address, flags=flags, origin=origin, ifindex=99))
    assert not watch.pending


def test_a_name_that_does_not_fit_its_message_is_none() -> None:
    watch = a_watch()
    tell(watch, NEWLINK, struct.pack("=BxHiII", 0, 0, 9, 0, 0) + struct.pack("=HH", 30, 3) + b"abc\0")
    assert not watch.pending


MESSAGES = some.tuples(some.sampled_from([NEWLINK, DELLINK, NEWADDR, DELADDR, 3, 4, 24]), some.binary(max_size=120))


@settings(max_examples=150)
@given(some.lists(MESSAGES, max_size=4), some.data())
@example([(NEWLINK, struct.pack("=BxHiII", 0, 0, INDEX, 0, 0) + struct.pack("=HH", 4, 16))], None)
def test_no_bytes_make_it_raise(messages: list[tuple[int, bytes]], data: some.DataObject | None) -> None:
    watch = a_watch(V4)
    for kind, garbage in messages:
        whole = bytearray(garbage)
        if data is not None:
            whole = bytearray(data.draw(some.sampled_from([garbage, a_link(), an_address(V4), a_link(ifindex=9)])))
            for _ in range(data.draw(some.integers(0, 4)) if whole else 0):
                whole[data.draw(some.integers(0, len(whole) - 1))] = data.draw(some.integers(0, 255))
        start = data.draw(some.integers(0, len(whole))) if data is not None and data.draw(some.booleans()) else 0
        watch.heard(kind, memoryview(whole), start, start + len(whole))
        watch.take()


class World:
    """A link that changes and sends messages of it, and one who looks at it: what must hold between the two."""

    def __init__(self) -> None:
        self.watch = Watch(lambda _name: False)
        self.watch.hear({})
        self.link, self.born = seen(mtu=0), 0
        self.waiting: list[tuple[int, bytes]] = []
        self.mark = self.watch.mark()
        self.look = self.believed = self.link, self.born
        self.to_do = self.to_do_after_mark = False  # whether something was told that was not looked at yet
        self.watch.settled(self.mark, [self.link])

    def act(self, act: str) -> None:
        match act:
            case "mtu 0" | "mtu 1" | "silently mtu 1":
                self.link = seen(mtu=int(act[-1]))
                if "silently" not in act:
                    self.waiting.append((NEWLINK, a_link(mtu=self.link.mtu)))
            case "exchange":
                self.born += 1
                self.waiting += [(DELLINK, a_link()), (NEWLINK, a_link(mtu=self.link.mtu))]
            case "hear":
                for kind, body in self.waiting:
                    tell(self.watch, kind, body)
                self.waiting = []
            case "mark":
                self.act("hear")
                self.mark, self.to_do_after_mark = self.watch.mark(), False
            case "look":
                self.look = self.link, self.born
            case "settle":
                self.watch.settled(self.mark, [self.look[0]])
                self.believed, self.to_do = self.look, self.to_do_after_mark
            case "take":
                news = self.watch.take()
                self.to_do |= bool(news)
                self.to_do_after_mark |= bool(news)
            case "lose":
                self.watch.deafen()
                self.waiting = []
                self.watch.hear({})
            case _:
                raise AssertionError(act)


ACTS = some.sampled_from(["mtu 0", "mtu 1", "exchange", "hear", "take", "lose"])
BUSY = some.lists(ACTS, max_size=4)


@settings(max_examples=400)
@given(some.lists(some.tuples(BUSY, BUSY, BUSY), min_size=1, max_size=3), BUSY)
@example([(["mtu 1", "mtu 0"], [], ["mtu 1", "hear"])], [])
@example([([], ["silently mtu 1"], []), ([], [], ["mtu 0", "hear", "mtu 1", "hear"])], [])
def test_whatever_is_not_as_it_was_believed_to_be_is_told_in_any_order_of_events(
    rounds: list[tuple[list[str], list[str], list[str]]], end: list[str]
) -> None:
    world = World()
    for before, between, after in rounds:
        for act in (*before, "mark", *between, "look", *after, "settle"):
            world.act(act)
    for act in (*end, "hear", "take"):
        world.act(act)
    if not world.to_do:
        assert (world.link, world.born) == world.believed
    if world.watch.vouches(INDEX, TOKEN):
        assert world.born == world.believed[1]


# -- beside the kernel


class Listener:
    """A running monitor, and a link of ours that it watches."""

    def __init__(self, host: LinuxHost, monitor: Monitor, woken: threading.Event) -> None:
        self.host, self.monitor, self.woken = host, monitor, woken
        self.kernel, self.outside = host.kernel, host.outside
        self.ifindex = 0

    @property
    def place(self) -> Place:
        return None, self.ifindex

    def make(self, mode: Mode = Mode.TUN, *, up: bool = True) -> None:
        self.outside.add_link("ours0", mode, alias=str(TOKEN))
        self.outside.set_mtu("ours0", 1400)
        self.outside.add_address("ours0", V4)
        if up:
            self.outside.set_up("ours0", True)
        self.settle()
        self.monitor.take()
        self.woken.clear()

    def settle(self) -> ObservedLink:
        mark = self.monitor.drain()
        link = self.kernel.observe(["ours0"]).links["ours0"]
        self.monitor.settled(mark, [link])
        self.ifindex = link.ifindex
        return link

    def news(self) -> News:
        """What the monitor wakes somebody for."""
        while True:
            assert self.woken.wait(10), "nobody was woken"
            self.woken.clear()
            if news := self.monitor.take():  # it may have been woken in the midst of `make` or `settle`
                return news

    def quiet(self) -> None:
        """Nothing of ours was told, after all that was sent up to now is heard."""
        self.outside.add_link("sentinel")
        told = News()
        while "sentinel" not in told.names:
            told = self.news()
            assert not told.changed
            assert not told.gone
            assert told.names <= {"sentinel"}
        self.outside.delete("sentinel")
        assert self.news().names == {"sentinel"}


@pytest.fixture
def listener(linux: LinuxHost) -> Iterator[Listener]:
    woken = threading.Event()
    monitor = Monitor(woken.set)
    monitor.start()
    yield Listener(linux, monitor, woken)
    monitor.close()


def wait_until_read(monitor: Monitor) -> None:
    """By the monitor's own thread."""
    ear = monitor._own.ear
    assert ear is not None
    wait_until(lambda: not select.select([ear], [], [], 0)[0])


@contextmanager
def another_namespace() -> Iterator[int]:
    """A descriptor of one."""
    with fresh_namespace():
        fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


CHANGES: dict[str, Callable[[LinuxHost], None]] = {
    "down": lambda host: host.outside.set_up("ours0", False),
    "mtu": lambda host: host.outside.set_mtu("ours0", 1300),
    "txqueuelen": lambda host: host.outside.set_txqueuelen("ours0", 10),
    "alias": lambda host: host.outside.set_alias("ours0", "mine now"),
    "no alias": lambda host: host.outside.set_alias("ours0", ""),
    "renamed": lambda host: host.outside.rename("ours0", "theirs0"),
    "mac": lambda host: host.outside.set_mac("ours0", "02:00:00:00:00:01"),
    "owner": lambda host: host.outside.set_owner("ours0", 0, None),
    "persistence": lambda host: host.outside.not_persistent("ours0"),
    "IPv4 address": lambda host: host.outside.add_address("ours0", Address(IPv4Address("192.0.2.9"), 32)),
    "IPv6 address": lambda host: host.outside.add_address("ours0", V6),
    "no address": lambda host: host.outside.remove_address("ours0", V4),
}


@pytest.mark.kernel
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_others_change_wakes_with_the_right_link(listener: Listener, change: Callable[[LinuxHost], None]) -> None:
    listener.make(Mode.TAP if change is CHANGES["mac"] else Mode.TUN)
    change(listener.host)
    news = listener.news()
    assert {*news.changed, *news.gone} == {listener.place}
    assert not news.lost
    assert listener.monitor.trouble() is None


@pytest.mark.kernel
@pytest.mark.parametrize(
    "change",
    [
        lambda outside: outside.set_up("ours0", True),
        lambda outside: outside.set_mtu("ours0", 1300),
        lambda outside: outside.set_txqueuelen("ours0", 10),
        lambda outside: outside.rename("ours0", "theirs0"),
        lambda outside: outside.add_address("ours0", V6),
    ],
)
def test_what_others_change_on_a_link_that_is_down_wakes(
    listener: Listener, change: Callable[[LinuxOutside], None]
) -> None:
    listener.make(up=False)
    change(listener.outside)
    assert set(listener.news().changed) == {listener.place}
    assert listener.monitor.vouches(listener.ifindex, TOKEN)


@pytest.mark.kernel
def test_what_we_changed_and_looked_at_wakes_nobody_nor_does_a_reader_that_comes_and_goes(listener: Listener) -> None:
    listener.make(Mode.TAP)
    listener.monitor.take()
    listener.woken.clear()
    for _ in range(2):
        listener.quiet()
        with attached("ours0", Mode.TAP):
            listener.quiet()
    listener.outside.add_link("br0")
    assert listener.news().names == {"br0"}
    for master in (socket.if_nametoindex("br0"), 0):
        listener.outside._link("ours0", attr(10, u32(master)))  # IFLA_MASTER
    listener.quiet()
    assert listener.monitor.vouches(listener.ifindex, TOKEN), "a bridge let go of it, which is no leaving"


@pytest.mark.kernel
def test_a_link_that_others_delete_is_gone_and_ours_that_we_delete_is_not_told(listener: Listener) -> None:
    listener.make()
    old = listener.ifindex
    listener.outside.delete("ours0")
    assert set(listener.news().gone) == {(None, old)}
    assert not listener.monitor.vouches(old, TOKEN)
    listener.make()
    listener.monitor.take()
    listener.outside.delete("ours0")
    mark = listener.monitor.drain()
    listener.monitor.settled(mark, [], gone=[listener.place])
    assert not listener.monitor.take()
    assert not listener.monitor.vouches(listener.ifindex, TOKEN)


@pytest.mark.kernel
def test_a_link_moved_to_another_namespace_and_back_is_not_vouched_for(listener: Listener) -> None:
    listener.make()
    assert listener.monitor.vouches(listener.ifindex, TOKEN)
    with another_namespace() as there:
        listener.outside._link("ours0", attr(28, u32(there)))  # IFLA_NET_NS_FD
        news = listener.news()
        assert set(news.gone) == {listener.place}
        assert news.moved[listener.place].startswith("moved to another network namespace, where its ifindex is ")
    assert not listener.monitor.vouches(listener.ifindex, TOKEN)


def impostor(name: str, ifindex: int) -> None:
    """A persistent tun with an ifindex of one's choice."""
    fd = os.open(TUN_PATH, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFINDEX, u32(ifindex))
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
        fcntl.ioctl(fd, TUNSETPERSIST, 1)
    finally:
        os.close(fd)


@pytest.mark.kernel
def test_another_device_with_the_same_ifindex_name_and_alias_is_not_vouched_for(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 60)  # nobody reads but the one who asks
    listener.make()
    ifindex = listener.ifindex
    assert listener.monitor.vouches(ifindex, TOKEN)
    listener.outside.delete("ours0")
    impostor("ours0", ifindex)
    listener.outside.set_alias("ours0", str(TOKEN))
    assert socket.if_nametoindex("ours0") == ifindex
    assert not listener.monitor.vouches(ifindex, TOKEN)
    assert set(listener.monitor.take().gone) == {(None, ifindex)}


@pytest.mark.kernel
def test_a_device_exchanged_between_the_look_and_its_being_watched_is_not_vouched_for(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 60)  # nobody reads but the one who settles
    listener.make()
    listener.monitor._own.watch._unwatch(listener.ifindex)
    mark = listener.monitor.drain()
    link = listener.kernel.observe(["ours0"]).links["ours0"]
    listener.outside.delete("ours0")
    impostor("ours0", link.ifindex)
    listener.monitor.settled(mark, [link])
    assert not listener.monitor.vouches(link.ifindex, TOKEN)
    assert set(listener.monitor.take().gone) == {link.place}


@pytest.mark.kernel
def test_an_overwritten_alias_is_still_vouched_for(listener: Listener) -> None:
    listener.make()
    listener.outside.set_alias("ours0", "mine now")
    assert set(listener.news().changed) == {listener.place}
    assert listener.settle().token is None
    assert listener.monitor.vouches(listener.ifindex, TOKEN)


@pytest.mark.kernel
def test_a_change_after_the_look_and_before_it_is_settled_wakes(listener: Listener) -> None:
    listener.make()
    listener.outside.set_mtu("ours0", 1300)
    mark = listener.monitor.drain()
    link = listener.kernel.observe(["ours0"]).links["ours0"]
    listener.outside.set_mtu("ours0", 1400)
    listener.monitor.settled(mark, [link])
    changed: set[Place] = set()
    while not changed:
        changed |= set(listener.news().changed)
    assert changed == {listener.place}


@pytest.fixture
def unread(linux: LinuxHost) -> Iterator[Listener]:
    """A monitor without its thread: nobody else reads, or sleeps through a kick."""
    monitor = Monitor(lambda: None)
    monitor._kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    monitor._open()
    yield Listener(linux, monitor, threading.Event())
    monitor.close()


@pytest.mark.kernel
def test_a_change_that_only_settling_shows_to_be_one_is_left_to_the_thread_to_tell(unread: Listener) -> None:
    monitor = unread.monitor
    unread.make()
    monitor._own.watch._unwatch(unread.ifindex)
    mark = monitor.drain()
    link = unread.kernel.observe(["ours0"]).links["ours0"]
    unread.outside.set_mtu("ours0", 1300)
    monitor.drain()
    assert os.eventfd_read(monitor._kick), "in `make`"
    monitor.settled(mark, [link])
    assert os.eventfd_read(monitor._kick) == 1
    assert set(monitor.take().changed) == {link.place}


@pytest.mark.kernel
def test_what_somebody_else_reads_is_left_to_the_thread_to_tell(unread: Listener) -> None:
    monitor, ifindex = unread.monitor, 0
    reading: tuple[Callable[[], object], ...] = (
        monitor.drain,
        lambda: monitor.vouches(ifindex, TOKEN),
        lambda: monitor.holder(TOKEN),
    )
    unread.make()
    ifindex = unread.ifindex
    assert os.eventfd_read(monitor._kick), "in `make`"
    for i, read in enumerate(reading):
        unread.outside.set_mtu("ours0", 1301 + i)
        assert read()
        assert os.eventfd_read(monitor._kick) == 1
        assert set(monitor.take().changed) == {(None, ifindex)}
        unread.settle()


@pytest.mark.kernel
def test_what_is_looked_at_within_the_pause_wakes_nobody(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 60)
    listener.make()
    for mtu in range(1301, 1321):
        listener.outside.set_mtu("ours0", mtu)
        listener.settle()
    assert not listener.woken.is_set()
    assert not listener.monitor.take()


@pytest.mark.kernel
def test_a_stranger_that_takes_or_frees_a_name_we_want_wakes(linux: LinuxHost) -> None:
    woken = threading.Event()
    linux.outside.add_link("early")
    monitor = Monitor(woken.set, cares={"wanted", "early"}.__contains__)
    monitor.start()
    try:
        for act, names in (
            (lambda: linux.outside.add_link("wanted"), {"wanted"}),
            (lambda: linux.outside.rename("wanted", "veth0"), {"wanted"}),
            (lambda: linux.outside.rename("early", "veth1"), {"early"}),
            (lambda: linux.outside.rename("veth0", "wanted"), {"wanted"}),
            (lambda: linux.outside.delete("wanted"), {"wanted"}),
        ):
            act()
            assert woken.wait(10)
            woken.clear()
            assert monitor.take() == News(names=frozenset(names))
    finally:
        monitor.close()


@pytest.mark.kernel
def test_lost_messages_are_told_and_break_every_watch_and_later_ones_are_heard(linux: LinuxHost) -> None:
    woken = threading.Event()
    monitor = Monitor(woken.set, queue_bytes=1)  # the kernel makes it the least it has, some 2 KiB
    listener = Listener(linux, monitor, woken)
    monitor.start()
    try:
        listener.make()
        for _ in range(3):
            while monitor.take() or not monitor.vouches(listener.ifindex, TOKEN):
                listener.settle()
            lost = False
            while not lost:
                for i in range(20):
                    linux.outside.set_mtu("ours0", 1301 + i)
                lost = listener.news().lost
            assert not monitor.vouches(listener.ifindex, TOKEN)
            listener.settle()
            assert monitor.vouches(listener.ifindex, TOKEN)
            linux.outside.set_txqueuelen("ours0", 10)
            news = listener.news()
            assert set(news.changed) == {listener.place}
            assert monitor.trouble() is None
            linux.outside.set_txqueuelen("ours0", 500)
    finally:
        monitor.close()


@pytest.mark.kernel
def test_a_flood_that_comes_faster_than_it_can_be_read_is_a_loss(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener.make()
    monkeypatch.setattr(module, "DRAIN_MOST", 1)
    for i in range(5):
        listener.outside.set_mtu("ours0", 1301 + i)
    assert listener.news().lost
    monkeypatch.undo()
    listener.settle()
    assert listener.monitor.vouches(listener.ifindex, TOKEN)


@pytest.mark.kernel
def test_threads_that_drain_and_take_at_once_lose_nothing(listener: Listener) -> None:
    taken: list[News] = []
    done = threading.Event()

    def take() -> None:
        while not done.is_set():
            listener.monitor.drain()
            taken.append(listener.monitor.take())

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    wanted = {f"br{i}" for i in range(40)}
    for name in sorted(wanted):
        listener.outside.add_link(name)
    done.set()
    for thread in threads:
        thread.join()
    taken.append(listener.monitor.take())
    assert frozenset().union(*(news.names for news in taken)) == wanted
    assert sum(len(news.names) for news in taken) == len(wanted)
    assert not any(news.lost for news in taken)


@pytest.mark.kernel
def test_what_somebody_else_read_is_told_all_the_same(listener: Listener) -> None:
    listener.make()
    for mtu in range(1301, 1306):
        listener.outside.set_mtu("ours0", mtu)
        listener.monitor.drain()
        assert set(listener.news().changed) == {listener.place}
        listener.settle()


@pytest.mark.kernel
def test_it_wakes_once_and_then_not_before_its_news_was_taken(linux: LinuxHost) -> None:
    woken: list[int] = []
    monitor = Monitor(lambda: woken.append(1))
    monitor.start()
    try:
        names = [f"br{i}" for i in range(10)]
        for name in names:
            linux.outside.add_link(name)
            wait_until_read(monitor)
        wait_until(lambda: len(woken) > 0)
        assert monitor.take().names == set(names)
        linux.outside.delete("br0")
        wait_until(lambda: len(woken) > 1)
        assert len(woken) == 2
    finally:
        monitor.close()


@pytest.mark.kernel
def test_one_who_could_not_be_woken_is_woken_later_and_meanwhile_it_says_so(
    linux: LinuxHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    awake = threading.Event()
    woken = threading.Event()

    def wake() -> None:
        if not awake.is_set():
            raise RuntimeError("Event loop is closed")
        woken.set()

    monitor = Monitor(wake)
    monitor.start()
    try:
        linux.outside.add_link("br0")
        wait_until(lambda: monitor.trouble() is not None)
        assert "Event loop is closed" in str(monitor.trouble())
        awake.set()
        assert woken.wait(10)
        wait_until(lambda: monitor.trouble() is None)
        assert monitor.take().names == {"br0"}
    finally:
        monitor.close()


@pytest.mark.kernel
@pytest.mark.parametrize("by", ["itself", "another thread"])
def test_a_socket_that_fails_is_opened_anew_in_the_same_namespace(
    listener: Listener, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    listener.make()
    listener.monitor.take()
    troubles: list[str | None] = []
    opened = threading.Event()
    ear = module._Ear

    def failing(queue_bytes: int, room: module._Room) -> module._Ear:
        troubles.append(listener.monitor.trouble())
        if len(troubles) < 3:
            raise OSError(24, os.strerror(24))
        opened.set()
        return ear(queue_bytes, room)

    def broken(_self: module._Ear) -> int:
        raise OSError(9, os.strerror(9))

    monkeypatch.setattr(module, "_Ear", failing)
    with monkeypatch.context() as broke:
        broke.setattr(ear, "receive", broken)
        if by == "itself":
            listener.outside.add_link("br0")
        else:
            assert not listener.monitor.vouches(listener.ifindex, TOKEN)
        wait_until(lambda: listener.monitor.trouble() is not None)
        assert not listener.monitor.vouches(listener.ifindex, TOKEN)
        assert listener.news().lost
    assert opened.wait(10)
    wait_until(lambda: listener.monitor.trouble() is None)
    assert "Bad file descriptor" in str(troubles[0])
    assert "Too many open files" in str(troubles[2])
    assert listener.news().lost, "who looked in between could not have anything watched"
    listener.settle()
    assert listener.monitor.vouches(listener.ifindex, TOKEN)
    listener.outside.set_mtu("ours0", 1300)
    assert set(listener.news().changed) == {listener.place}


@pytest.mark.kernel
def test_closing_ends_the_thread_and_with_it_what_was_vouched_for(linux: LinuxHost) -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208  # names are enough
    monitor = Monitor(lambda: None)
    listener = Listener(linux, monitor, threading.Event())
    assert not monitor.vouches(1, TOKEN), "it has not begun"
    monitor.start()
    listener.make()
    assert monitor.vouches(listener.ifindex, TOKEN)
    assert [thread.name for thread in threading.enumerate()].count("kernel-monitor") == 1
    monitor.close()
    monitor.close()
    assert [thread.name for thread in threading.enumerate()].count("kernel-monitor") == 0
    assert not monitor.vouches(listener.ifindex, TOKEN)
    monitor.settled(monitor.drain(), [listener.kernel.observe(["ours0"]).links["ours0"]])
    assert not monitor.vouches(listener.ifindex, TOKEN)
    assert monitor.trouble() is None
    linux.kernel.close()
    assert set(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208


@pytest.mark.kernel
def test_reading_is_not_slowed_down_by_a_busy_thread(linux: LinuxHost) -> None:
    linux.outside.add_link("tun0", Mode.TUN)
    room = module._Room()
    ear = module._Ear(module.QUEUE_BYTES, room)
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            sum(range(100))

    busy = threading.Thread(target=work)
    try:
        for i in range(2000):
            linux.outside.set_mtu("tun0", 1301 + i % 2)
        busy.start()
        began, read = time.monotonic(), 0
        while count := ear.receive():
            read += sum(1 for _ in room.messages(count))
        took_s = time.monotonic() - began
    finally:
        done.set()
        busy.join()
        ear.close()
    assert read == 2000
    assert took_s < 1.5, "by one recv(2) each it is 3 s"
