"""Tells within milliseconds that somebody may have changed a link, and vouches that a link is still the same device.

The kernel multicasts what happens to links and addresses (rtnetlink(7), RTNLGRP_LINK and RTNLGRP_*_IFADDR). `Watch`
makes news of these messages and knows no socket; `Monitor` is the socket and the thread around it. News is a reason to
look, never a fact: what to do about a change does not belong in here.

What this kernel keeps to itself (net/core/dev.c, netdev_state_change): an alias, owner, group or persistence changed on
a link that is down sends nothing at all. Only looking now and then finds these.

A socket hears of one network namespace. So there is one for each in use, all read by the same thread; it is closed as
soon as the namespace's name is gone, since it would keep the namespace alive. That a name comes or goes is heard of as
a change of mounts (`ip netns` mounts them; /proc/self/mountinfo, proc_pid_mountinfo(5)), and looked for now and then.
"""

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from types import MappingProxyType
from typing import Any, TypeVar

from service.domain.errors import TunledgerError
from service.domain.observed import ObservedLink, Place
from service.domain.token import Token
from service.domain.values import Address
from service.kernel import errnos, netlink
from service.kernel.doorway import Doorway, Identity, identity_of, open_namespace

# linux/rtnetlink.h, linux/netlink.h, asm-generic/socket.h, linux/if_link.h
GROUPS = (1, 5, 9)  # RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR
NETLINK_ADD_MEMBERSHIP = 1
SO_RCVBUFFORCE = 33
NLMSG_OVERRUN = 4
IFLA_IFNAME, IFLA_IFALIAS, IFLA_NEW_NETNSID, IFLA_NEW_IFINDEX = 3, 20, 45, 49

QUEUE_BYTES = 16 << 20  # the kernel doubles it; some 3 KiB a message: about 10,000 may wait
PAUSE_S = 0.005  # between the first message and looking at what there is: bursts, and our own applier, come first
AGAIN_S = 1.0  # until the next try to open a socket, or to wake somebody who could not be woken
DRAIN_MOST = 1 << 16  # several times what fits the queue: they come faster than they can be read
MOUNTS = "/proc/self/mountinfo"
NAMES_EACH_S = 1.0  # between looks at the names of namespaces in use, should a change of mounts not be heard
HEARD_MOST = 1 << 16  # ifindexes and names that are remembered between a look and `settled`

# Looked up at every message.
_AF_UNSPEC, _NEWLINK = int(socket.AF_UNSPEC), netlink.RTM_NEWLINK
_OF_LINKS = frozenset({netlink.RTM_NEWLINK, netlink.RTM_DELLINK})
_OF_ADDRESSES = frozenset({netlink.RTM_NEWADDR, netlink.RTM_DELADDR})

_HEADER = struct.Struct("=IH")  # nlmsg_len, nlmsg_type
_HEADER_BYTES = 16
_INDEX = struct.Struct("=i")  # ifi_index and ifa_index both stand 4 bytes into their body
_IFINFOMSG_BYTES, _IFADDRMSG_BYTES = 16, 8
_ATTR = struct.Struct("=HH")
_ALIAS_OF_OURS = b"tunledger:"

# What a link is, without what comes and goes by itself, and addresses, which have messages of their own.
_PASSING = {"running", "carrier", "operstate", "flags", "counters", "addresses", "ifindex", "token", "netns"}
_lasting = attrgetter(*(each.name for each in fields(ObservedLink) if each.name not in _PASSING))

Moment = int  # the number of a message
_Key = TypeVar("_Key", int, str)


@dataclass(frozen=True, slots=True)
class News:
    """What may have changed. False if there is nothing.

    Attributes:
        changed: watched links of which something was heard that is not as it was seen, by where they are.
        gone: watched links that left. Each may be back already, as another device with the same ifindex.
        moved: in words, what became of those of the gone that were not deleted.
        names: of other links that came, left, or were renamed to or from it.
        namespaces: those in use, or wanted, whose names came or went, with words for it.
        lost: messages were lost. Anything may have changed, and no link is watched before it is `settled` again.
    """

    changed: Mapping[Place, Token] = field(default_factory=lambda: MappingProxyType({}))
    gone: Mapping[Place, Token] = field(default_factory=lambda: MappingProxyType({}))
    moved: Mapping[Place, str] = field(default_factory=lambda: MappingProxyType({}))
    names: frozenset[str] = frozenset()
    lost: bool = False
    namespaces: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __bool__(self) -> bool:
        return bool(self.changed or self.gone or self.names or self.lost or self.namespaces)


@dataclass(frozen=True, slots=True)
class _Watched:
    token: Token
    lasting: tuple[object, ...]
    addresses: frozenset[Address]


class Numbers:
    """Numbers messages as they are heard, in all namespaces as one sequence."""

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last = 0

    def next(self) -> int:
        """The number of one more."""
        self.last += 1
        return self.last


class Watch:
    """Makes news of the netlink messages of one namespace. Knows no socket, takes no locks, and no bytes make it raise.

    Messages are numbered as they are heard. A mark is such a number: a look that began after it saw all that had
    happened up to it, so `settled` may forget up to there, and nothing behind.

    Begins deaf: until `hear`, nothing is watched or vouched for.

    Args:
        cares: whether a name that other links have matters; asked for each that comes or goes, so it must be quick,
            and must not raise or call back.
        netns: the namespace's name; None for the service's own.
        numbers: shared by all whose marks are one.
    """

    def __init__(
        self,
        cares: Callable[[str], bool] = lambda _name: True,
        *,
        netns: str | None = None,
        numbers: Numbers | None = None,
    ) -> None:
        self._cares, self._netns = cares, netns
        self._numbers = numbers if numbers is not None else Numbers()
        self._floor = 0  # marks below it are void: what came after them is not known any more
        self.deaf = True
        self._watched: dict[int, _Watched] = {}
        self._holder: dict[Token, int] = {}
        self._heard: dict[int, int] = {}  # ifindex: number of the last message about it
        self._left: dict[int, int] = {}  # ifindex: number of its last RTM_DELLINK
        self._name_of: dict[int, bytes] = {}
        self._changed: dict[int, tuple[int, Token]] = {}
        self._told: set[int] = set()  # changes that were taken and are not settled: back to what it was is news too
        self._gone: dict[int, tuple[int, Token]] = {}
        self._moved: dict[int, str] = {}
        self._names: dict[str, tuple[int, int]] = {}  # name: (number, ifindex)
        self._lost = False

    def hear(self, name_of: Mapping[int, bytes]) -> None:
        """From now on no message is missing. `name_of`: the names of all links, by ifindex."""
        self._lost |= self._floor > 0  # not the first time: whoever was told before could not have it watched
        self._floor = self._numbers.next()
        self.deaf = False
        self._name_of = dict(name_of)

    def deafen(self) -> None:
        """Messages are missing, and may go on missing until `hear`."""
        self.deaf = self._lost = True
        self._watched.clear()
        self._holder.clear()
        self._told.clear()
        self._heard.clear()
        self._left.clear()

    def heard(self, kind: int, data: bytes | memoryview, start: int, stop: int) -> None:
        """One message of type `kind`, whose body is data[start:stop]."""
        stop = min(stop, len(data))
        if kind == NLMSG_OVERRUN:
            self.deafen()
            return
        if stop - start < _IFADDRMSG_BYTES:
            return
        (ifindex,) = _INDEX.unpack_from(data, start + 4)
        if kind in _OF_LINKS:
            # A bridge reports its ports to the same group, also as RTM_DELLINK: of another family.
            if data[start] != _AF_UNSPEC:
                return
            self._count(ifindex)
            if kind == _NEWLINK:
                self._link_is(ifindex, data, start, stop)
            else:
                self._link_left(ifindex, data, start, stop)
        elif kind in _OF_ADDRESSES:
            self._count(ifindex)
            watched = self._watched.get(ifindex)
            if watched is not None and (self._differs(ifindex) or not _known(watched, kind, data, start, stop)):
                self._changed[ifindex] = self._numbers.last, watched.token

    def mark(self) -> Moment:
        """What was heard up to now; taken before a look."""
        return self._numbers.last

    def settled(self, mark: Moment, links: Iterable[ObservedLink], gone: Collection[int] = ()) -> None:
        """Somebody took `mark`, then looked, and acts upon what he saw: what was heard before is old.

        Messages that only say what was seen make no news. What was heard after the mark stays news.

        Args:
            links: as they were seen, with their addresses. Those with a token are watched from now on. One that is
                watched stays so under the token that it was first seen with, whatever its alias is now.
            gone: ifindexes that were found to be gone.
        """
        if self.deaf:
            return
        for link in links:
            self._settle(mark, link)
        for ifindex in gone:
            if _forget(self._gone, ifindex, mark):
                self._moved.pop(ifindex, None)
        if gone:
            for name in [name for name, (_, ifindex) in self._names.items() if ifindex in gone]:
                _forget(self._names, name, mark)

    def _settle(self, mark: Moment, link: ObservedLink) -> None:
        ifindex = link.ifindex
        watched = self._watched.get(ifindex)
        token = watched.token if watched is not None else link.token
        if token is None:
            return
        if mark < self._floor:
            self._changed[ifindex] = self._numbers.last, token
            return
        if self._left.get(ifindex, 0) > mark:
            # What is watched under this ifindex now, if anything, is not what was seen.
            self._gone.setdefault(ifindex, (self._left[ifindex], token))
            return
        _forget(self._changed, ifindex, mark)
        _forget(self._names, link.name, mark)
        now = _Watched(token, _lasting(link), frozenset(link.addresses))
        if now != watched and self._heard.get(ifindex, 0) > mark:
            # It may have been passed over for saying what was known before, or because it was not watched yet.
            self._changed[ifindex] = self._heard[ifindex], token
        self._watched[ifindex] = now
        self._holder[token] = ifindex
        self._told.discard(ifindex)

    def _unwatch(self, ifindex: int) -> _Watched | None:
        watched = self._watched.pop(ifindex, None)
        self._told.discard(ifindex)
        if watched is not None and self._holder.get(watched.token) == ifindex:
            del self._holder[watched.token]
        return watched

    def vouches(self, ifindex: int, token: Token) -> bool:
        """Whether the device with this ifindex is the one that was seen with this token."""
        watched = self._watched.get(ifindex)
        return watched is not None and watched.token == token

    def holder(self, token: Token) -> int | None:
        """The ifindex of the device that was seen with this token, or None."""
        return self._holder.get(token)

    @property
    def watching(self) -> int:
        """How many devices are watched."""
        return len(self._watched)

    @property
    def pending(self) -> bool:
        """Whether there is something to take."""
        return bool(self._changed or self._gone or self._names or self._lost)

    def take(self) -> News:
        """All news, which is none from then on."""
        news = News(
            MappingProxyType({(self._netns, ifindex): token for ifindex, (_, token) in self._changed.items()}),
            MappingProxyType({(self._netns, ifindex): token for ifindex, (_, token) in self._gone.items()}),
            MappingProxyType({(self._netns, ifindex): words for ifindex, words in self._moved.items()}),
            frozenset(self._names),
            self._lost,
        )
        self._told |= self._changed.keys() & self._watched.keys()
        self._changed, self._gone, self._moved, self._names, self._lost = {}, {}, {}, {}, False
        return news

    def leave(self, words: str) -> None:
        """The namespace went: all that was watched is gone with it."""
        for ifindex, watched in self._watched.items():
            self._changed.pop(ifindex, None)
            self._gone[ifindex] = self._numbers.last, watched.token
            self._moved[ifindex] = words
        lost = self._lost
        self.deafen()
        self._lost = lost

    def _differs(self, ifindex: int) -> bool:
        """Whether it is known to be not as it was seen, so that a message that says what was seen is no old one."""
        return ifindex in self._changed or ifindex in self._told

    def _count(self, ifindex: int) -> None:
        number = self._numbers.next()
        if len(self._heard) >= HEARD_MOST and ifindex not in self._heard:
            self._heard.clear()
            self._left.clear()
            self._floor = number
        self._heard[ifindex] = number

    def _link_is(self, ifindex: int, data: bytes | memoryview, start: int, stop: int) -> None:
        watched = self._watched.get(ifindex)
        name = _name(data, start + _IFINFOMSG_BYTES, stop)
        before = self._name_of.get(ifindex)
        if name != before and name:
            self._name_of[ifindex] = name
            if watched is None:
                ours = _alias(data, start + _IFINFOMSG_BYTES, stop).startswith(_ALIAS_OF_OURS)
                self._tell_name(ifindex, name, always=ours)
                if before is not None:
                    self._tell_name(ifindex, before)
        if watched is not None and (self._differs(ifindex) or not _as_seen(watched, data, start, stop)):
            self._changed[ifindex] = self._numbers.last, watched.token

    def _link_left(self, ifindex: int, data: bytes | memoryview, start: int, stop: int) -> None:
        self._left[ifindex] = self._numbers.last
        name = self._name_of.pop(ifindex, None)
        watched = self._unwatch(ifindex)
        if watched is None:
            if name is not None:
                self._tell_name(ifindex, name)
            return
        self._changed.pop(ifindex, None)
        self._moved.pop(ifindex, None)
        self._gone[ifindex] = self._numbers.last, watched.token
        there = {
            kind: _INDEX.unpack_from(data, first)[0]
            for kind, first, last in netlink.attributes(data, start + _IFINFOMSG_BYTES, stop)
            if kind in {IFLA_NEW_NETNSID, IFLA_NEW_IFINDEX} and last - first >= _INDEX.size
        }
        if IFLA_NEW_NETNSID in there:
            self._moved[ifindex] = "moved to another network namespace"
            if there.get(IFLA_NEW_IFINDEX, 0) > 0:
                self._moved[ifindex] += f", where its ifindex is {there[IFLA_NEW_IFINDEX]}"

    def _tell_name(self, ifindex: int, name: bytes, *, always: bool = False) -> None:
        text = name.decode("ascii", "replace")
        if always or self._cares(text):
            if len(self._names) >= HEARD_MOST:
                self._names.clear()
                self._lost = True
            self._names[text] = self._numbers.last, ifindex


def _forget(news: dict[_Key, tuple[int, Any]], key: _Key, mark: int) -> bool:
    """Drop what was heard of `key` up to `mark`; whether there was such."""
    old = key in news and news[key][0] <= mark
    if old:
        del news[key]
    return old


def _name(data: bytes | memoryview, start: int, stop: int) -> bytes:
    """IFLA_IFNAME, which the kernel puts first: strangers' messages are read no further."""
    if start + _ATTR.size <= stop:
        length, kind = _ATTR.unpack_from(data, start)
        if kind == IFLA_IFNAME and start + length <= stop:
            return bytes(data[start + _ATTR.size : start + length]).rstrip(b"\0")
    return _value(data, start, stop, IFLA_IFNAME)


def _alias(data: bytes | memoryview, start: int, stop: int) -> bytes:
    return _value(data, start, stop, IFLA_IFALIAS)


def _value(data: bytes | memoryview, start: int, stop: int, wanted: int) -> bytes:
    for kind, first, last in netlink.attributes(data, start, stop):
        if kind == wanted:
            return bytes(data[first:last]).rstrip(b"\0")
    return b""


def _as_seen(watched: _Watched, data: bytes | memoryview, start: int, stop: int) -> bool:
    """Whether an RTM_NEWLINK says nothing but what was seen last, carrier and counters aside."""
    try:
        return bool(_lasting(netlink.read_link(bytes(data[start:stop]), 0, stop - start)) == watched.lasting)
    except (struct.error, ValueError, IndexError):
        return False


def _known(watched: _Watched, kind: int, data: bytes | memoryview, start: int, stop: int) -> bool:
    """Whether an address message leaves the addresses that were seen as they are."""
    try:
        # A kernel before 5.18 does not tell which addresses it made: each of those is news, for one look.
        _, address, kernel_made = netlink.read_address(bytes(data[start:stop]), 0, stop - start, tells_origin=True)
    except (struct.error, ValueError, IndexError):
        return False
    if kind == netlink.RTM_DELADDR:
        return address not in watched.addresses
    return (address in watched.addresses) == (not kernel_made)


class _MmsgHdr(ctypes.Structure):
    """struct mmsghdr, recvmmsg(2)."""

    _fields_ = (("header", netlink.MsgHdr), ("received", ctypes.c_uint))


class _Room:
    """Where datagrams are received, many at a time. The ears of a monitor share one: each is read before the next."""

    DATAGRAMS, DATAGRAM_BYTES = 64, 8192  # a link's message has some 2 KiB; of a longer one the beginning is enough

    def __init__(self) -> None:
        room = bytearray(self.DATAGRAMS * self.DATAGRAM_BYTES)
        self.data = memoryview(room)
        base = ctypes.addressof(ctypes.c_char.from_buffer(room))
        self._vectors = (netlink.IoVec * self.DATAGRAMS)()
        self.headers = (_MmsgHdr * self.DATAGRAMS)()
        for i in range(self.DATAGRAMS):
            self._vectors[i].base = base + i * self.DATAGRAM_BYTES
            self._vectors[i].length = self.DATAGRAM_BYTES
            self.headers[i].header.vectors = ctypes.addressof(self._vectors) + i * ctypes.sizeof(netlink.IoVec)
            self.headers[i].header.vectors_count = 1

    def messages(self, count: int) -> Iterator[tuple[int, int, int]]:
        """(type, start, stop) of the body of each message in the first `count` datagrams in `data`."""
        for i in range(count):
            offset = i * self.DATAGRAM_BYTES
            end = offset + self.headers[i].received
            while offset + _HEADER_BYTES <= end:
                length, kind = _HEADER.unpack_from(self.data, offset)
                yield kind, offset + _HEADER_BYTES, min(offset + length, end)
                offset += max((length + 3) & ~3, _HEADER_BYTES)


class _Ear:
    """A socket in the link and address groups of the present network namespace, read many messages at a time.

    recvmmsg(2) through PyDLL keeps the interpreter's lock, as a call that never waits may. Each `socket.recv` gives it
    away: beside a busy thread that made 1.5 ms a message here, instead of 1.3 us. Raises OSError.
    """

    def __init__(self, queue_bytes: int, room: _Room) -> None:
        self._receive = ctypes.PyDLL(None, use_errno=True).recvmmsg
        self._receive.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p]
        self._headers = ctypes.addressof(room.headers)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        try:
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, queue_bytes)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, queue_bytes)
            self._socket.bind((0, 0))
            for group in GROUPS:
                self._socket.setsockopt(netlink.SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def receive(self) -> int:
        """How many datagrams came, now in the room; 0 if none wait."""
        count: int = self._receive(self._socket.fileno(), self._headers, _Room.DATAGRAMS, socket.MSG_DONTWAIT, None)
        if count >= 0:
            return count
        number = ctypes.get_errno()
        if number == errno.EAGAIN:
            return 0
        raise OSError(number, os.strerror(number))


@dataclass(slots=True)
class _Post:
    """Where one network namespace is listened to.

    Attributes:
        broken: why the ear is to be replaced, which only the monitor's thread does.
        opened_s: when the ear was opened, or that was last tried.
        identity: of the namespace; None for the service's own.
    """

    netns: str | None
    watch: Watch
    identity: Identity | None = None
    ear: _Ear | None = None
    broken: str | None = None
    opened_s: float = 0.0

    def hush(self) -> None:
        """Close the ear."""
        if self.ear is not None:
            self.ear.close()
            self.ear = None


class Monitor:
    """Listens in a thread of its own. Each method may be called from any thread; `start` and `close` once.

    Who looks at links goes: `mark = drain()`, look, `settled(mark, links)`. Who is called by `on_news` calls `take`;
    best in the thread that changes links, since in the midst of its work there is news of its own doing.

    Args:
        on_news: called in the monitor's thread when there is something to take, and then not again before it was
            taken. Must not block.
        cares: see `Watch`.
        queue_bytes: what may wait to be read, of each namespace.
    """

    def __init__(
        self,
        on_news: Callable[[], None],
        *,
        cares: Callable[[str], bool] = lambda _name: True,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        self._on_news, self._cares, self._queue_bytes = on_news, cares, queue_bytes
        self._lock = threading.Lock()
        self._numbers, self._room, self._doorway = Numbers(), _Room(), Doorway()
        self._own = _Post(None, Watch(cares, numbers=self._numbers))
        self._posts: dict[str | None, _Post] = {None: self._own}
        self._names: dict[str, Identity | None] = {}  # namespaces in use or wanted, as last seen
        self._came_or_went: dict[str, str] = {}
        self._farewells: list[News] = []  # of namespaces that went
        self._mounts = -1
        self._unheeded: str | None = None
        self._told = False
        self._kick = -1
        self._started = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="kernel-monitor", daemon=True)

    def start(self) -> None:
        """Listen from now on, in the network namespace of the caller's thread.

        Raises:
            TunledgerError: kernel_refused.
        """
        try:
            self._kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._open()
        except OSError as error:
            self.close()
            raise errnos.refused("listen to changes of links", error.errno or errno.EIO) from error
        self._started = True
        self._thread.start()

    def close(self) -> None:
        """Stop listening; nothing is vouched for any more. Closing twice is closing once."""
        self._closing.set()
        with self._lock:
            self._wake()
        if self._started:
            self._thread.join()
        with self._lock:
            for post in self._posts.values():
                post.watch.deafen()
                post.hush()
            if self._mounts >= 0:
                os.close(self._mounts)
                self._mounts = -1
            if self._kick >= 0:
                os.close(self._kick)
                self._kick = -1

    def trouble(self) -> str | None:
        """Why changes may go unheard, in words, or None if all is well."""
        if self._started and not self._closing.is_set() and not self._thread.is_alive():
            return "the thread that listens to changes of links has ended"
        for post in list(self._posts.values()):
            if post.broken is not None:
                where = "" if post.netns is None else f" in netns {post.netns}"
                return f"changes of links{where} are not heard, which is tried again: {post.broken}"
        return self._unheeded

    def attend(self, netns: str, identity: Identity | None, fd: int) -> None:
        """Listen in a network namespace too, from now on until its name goes; or, without an identity, tell when there
        is one of that name. Quick where that is so already. Raises nothing: see `trouble`.

        Args:
            fd: of the namespace.
        """
        post = self._posts.get(netns)
        if post is not None and post.identity == identity:
            return
        with self._lock:
            if self._closing.is_set() or (identity is None and netns in self._names and post is None):
                return
            self._note(netns, identity, known=netns in self._names)
            if identity is not None:
                self._posts[netns] = post = _Post(
                    netns, Watch(self._cares, netns=netns, numbers=self._numbers), identity
                )
                self._open_inside(post, fd)
            self._wake()  # there is another to wait for

    def drain(self) -> Moment:
        """Read what is queued, without waiting. To be called before a look; `settled` takes the mark."""
        with self._drained():
            return self._numbers.last

    def settled(self, mark: Moment, links: Iterable[ObservedLink], gone: Collection[Place] = ()) -> None:
        """See `Watch.settled`. Give it only what the look saw to be ours, and one link for each token."""
        with self._lock:
            if len(self._posts) == 1:
                own = [link for link in links if link.netns is None]
                self._own.watch.settled(mark, own, [ifindex for netns, ifindex in gone if netns is None])
            else:
                seen: dict[str | None, list[ObservedLink]] = {}
                for link in links:
                    seen.setdefault(link.netns, []).append(link)
                left: dict[str | None, list[int]] = {}
                for netns, ifindex in gone:
                    left.setdefault(netns, []).append(ifindex)
                for netns in seen.keys() | left.keys():
                    if netns in self._posts:
                        self._posts[netns].watch.settled(mark, seen.get(netns, ()), left.get(netns, ()))
                for netns in left:
                    self._leave_if_empty(netns)
            self._nudge()

    def vouches(self, ifindex: int, token: Token, netns: str | None = None) -> bool:
        """Whether the device that has this ifindex now is the one that `settled` was given with this token.

        True only if every message since then was heard, and none said that the ifindex was given up.
        """
        with self._drained():
            return netns in self._posts and self._posts[netns].watch.vouches(ifindex, token)

    def holder(self, token: Token) -> Place | None:
        """The place of the device that was seen with this token and is the same still; None if there is none."""
        with self._drained():
            for netns, post in self._posts.items():
                ifindex = post.watch.holder(token)
                if ifindex is not None:
                    return netns, ifindex
            return None

    def watching(self) -> int:
        """How many devices are watched."""
        with self._lock:
            return sum(post.watch.watching for post in self._posts.values())

    def take(self) -> News:
        """All that is to be told, also what is queued now; it is news no longer then."""
        with self._drained():
            self._told = False
            told = [*self._farewells, *(post.watch.take() for post in self._posts.values())]
            namespaces, self._came_or_went, self._farewells = self._came_or_went, {}, []
            return told[0] if len(told) == 1 and not namespaces else _together(told, namespaces)

    @contextlib.contextmanager
    def _drained(self) -> Iterator[None]:
        """With the lock, and all that is queued read."""
        with self._lock:
            self._drain()
            yield
            self._nudge()

    def _drain(self) -> None:
        for post in self._posts.values():
            if post.ear is not None and post.broken is None:
                try:
                    self._listen(post, post.ear)
                except Exception as error:  # noqa: BLE001  # who drains has other things to do; `trouble` tells it
                    _break(post, error)

    def _listen(self, post: _Post, ear: _Ear) -> None:
        read, watch = 0, post.watch
        while read < DRAIN_MOST:
            try:
                count = ear.receive()
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # Until its queue is empty, the kernel drops more and does not say so again (net/netlink/af_netlink.c,
                # NETLINK_S_CONGESTED).
                watch.deafen()
                continue
            if count == 0:
                if watch.deaf:
                    watch.hear(self._names_of_links(post))
                return
            read += count
            for kind, start, stop in self._room.messages(count):
                watch.heard(kind, self._room.data, start, stop)
        watch.deafen()

    @property
    def _untold(self) -> bool:
        if self._told:
            return False
        return bool(self._farewells or self._came_or_went) or any(p.watch.pending for p in self._posts.values())

    @property
    def _is_broken(self) -> bool:
        return any(post.broken is not None for post in self._posts.values())

    def _nudge(self) -> None:
        """Leave it to the thread to tell, or to mend, what it would not find out about by itself."""
        if self._is_broken or self._untold:
            self._wake()

    def _wake(self) -> None:
        if self._kick >= 0:
            os.eventfd_write(self._kick, 1)

    def _work(self) -> None:
        while not self._closing.is_set():
            try:
                self._wait()
                if self._closing.wait(PAUSE_S):
                    return
                with self._lock:
                    self._drain()
                    self._look_at_names()
                if self._is_broken:
                    self._reopen()
                with self._lock:
                    tell = self._untold
                    self._told |= tell
                if tell:
                    self._tell()
            except Exception as error:  # noqa: BLE001  # this thread ends only when it is told to
                with self._lock:
                    _break(self._own, error)
                self._closing.wait(AGAIN_S)

    def _wait(self) -> None:
        """Until there is something to read, or others have read it, or it is time to look or to try again."""
        poll = select.poll()
        poll.register(self._kick, select.POLLIN)
        with self._lock:
            again_s = AGAIN_S if self._is_broken or self._untold else None
            for post in self._posts.values():
                if post.ear is not None and post.broken is None:
                    poll.register(post.ear, select.POLLIN)
            if self._names:
                again_s = min(again_s, NAMES_EACH_S) if again_s is not None else NAMES_EACH_S
                if self._mounts < 0:
                    with contextlib.suppress(OSError):
                        self._mounts = os.open(MOUNTS, os.O_RDONLY | os.O_CLOEXEC)
                        self._wake()  # what came or went before it was open
                if self._mounts >= 0:
                    poll.register(self._mounts, select.POLLPRI | select.POLLERR)
        poll.poll(again_s * 1000 if again_s is not None else None)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._kick)

    # -- namespaces

    def _look_at_names(self) -> None:
        """Leave namespaces whose names have gone, and tell of those that came."""
        for netns, known in list(self._names.items()):
            try:
                identity = identity_of(netns)
            except OSError:
                continue  # it cannot be told now
            if identity != known:
                self._note(netns, identity, known=True)

    def _note(self, netns: str, identity: Identity | None, *, known: bool) -> None:
        """A name stands for another namespace than before, or for none, or is heard of for the first time."""
        before = self._names.get(netns)
        self._names[netns] = identity
        post = self._posts.get(netns)
        if post is not None and post.identity != identity:
            del self._posts[netns]
            post.hush()
            post.watch.leave(f"netns {netns} went away")
            self._farewells.append(post.watch.take())
        if known and identity != before:
            self._came_or_went[netns] = f"netns {netns} {'went away' if identity is None else 'came'}"

    def _leave_if_empty(self, netns: str | None) -> None:
        post = self._posts.get(netns)
        if netns is not None and post is not None and not post.watch.watching and not post.watch.pending:
            post.hush()
            del self._posts[netns], self._names[netns]

    def _open_inside(self, post: _Post, fd: int) -> None:
        """With the lock. What goes wrong is in `broken`."""
        assert post.netns is not None
        post.opened_s = time.monotonic()
        try:
            post.ear = self._doorway.opened(post.netns, fd, self._ear, _Ear.close)
            post.broken = None
            post.watch.hear(self._names_inside(post.netns, fd))
        except (OSError, TunledgerError) as error:
            post.broken = str(error)

    def _names_of_links(self, post: _Post) -> dict[int, bytes]:
        if post.netns is None:
            return _names_of_links(netlink.RouteSocket)
        try:
            fd, identity = open_namespace(post.netns)
        except TunledgerError:
            return {}
        try:
            return self._names_inside(post.netns, fd) if identity == post.identity else {}
        finally:
            os.close(fd)

    def _names_inside(self, netns: str, fd: int) -> dict[int, bytes]:
        route = netlink.RouteSocket
        return _names_of_links(lambda: self._doorway.opened(netns, fd, route, route.close))

    def _ear(self) -> _Ear:
        return _Ear(self._queue_bytes, self._room)

    def _tell(self) -> None:
        try:
            self._on_news()
            self._unheeded = None
        except Exception as error:  # noqa: BLE001  # as above
            self._unheeded = f"a change of links was heard, but nobody could be woken: {error}"
            with self._lock:
                self._told = False

    def _open(self) -> None:
        self._doorway.require_home()
        self._own.ear, self._own.opened_s = self._ear(), time.monotonic()
        self._own.broken = None
        self._own.watch.hear(_names_of_links(netlink.RouteSocket))

    def _reopen(self) -> None:
        broken = [post for post in list(self._posts.values()) if post.broken is not None]
        if any(time.monotonic() < post.opened_s + AGAIN_S for post in broken):
            self._closing.wait(AGAIN_S)  # it broke at once: so may the next one
        with self._lock:
            for post in broken:
                if self._posts.get(post.netns) is post:
                    post.hush()
                    self._open_again(post)

    def _open_again(self, post: _Post) -> None:
        try:
            if post.netns is None:
                self._open()
                return
            fd, identity = open_namespace(post.netns)
            try:
                if identity == post.identity:  # else its name has gone, which is noticed by itself
                    self._open_inside(post, fd)
            finally:
                os.close(fd)
        except (OSError, TunledgerError) as error:
            post.broken = str(error)


def _break(post: _Post, error: Exception) -> None:
    """With the lock: hear nothing more there until the thread has opened another ear."""
    post.watch.deafen()
    post.broken = str(error) or type(error).__name__


def _together(told: Iterable[News], namespaces: Mapping[str, str]) -> News:
    changed: dict[Place, Token] = {}
    gone: dict[Place, Token] = {}
    moved: dict[Place, str] = {}
    names: set[str] = set()
    lost = False
    for news in told:
        changed |= news.changed
        gone |= news.gone
        moved |= news.moved
        names |= news.names
        lost |= news.lost
    return News(changed, gone, moved, frozenset(names), lost, namespaces)


def _names_of_links(open_socket: Callable[[], netlink.RouteSocket]) -> dict[int, bytes]:
    """Of all links, by ifindex. Nothing, if they cannot be read: each is a new name then when it is heard of."""
    try:
        route = open_socket()
    except (OSError, TunledgerError):
        return {}
    try:
        return {
            _INDEX.unpack_from(data, start + 4)[0]: _name(data, start + _IFINFOMSG_BYTES, stop)
            for data, start, stop in route.dump(netlink.RTM_GETLINK, netlink.link_request())
        }
    except (OSError, struct.error):
        return {}
    finally:
        route.close()
