"""A kernel in memory, for planning: the same protocol as `linux.LinuxKernel` and, where plans depend on it, the same
manners.

It exists so that any sequence of commands, drift and failures can be tried by the thousand, without a namespace. What
Linux does on its own and a plan has to reckon with is here: addresses that go with their primary, with the link or
with the MTU, and indexes that are never used twice. Both kernels pass one contract (tests/kernel). What nobody plans
by (queueing, packets, link-local addresses) is left out, and so is every decision.

The outside world has a hand of its own, `FakeKernel.outside`, since it asks for no token. `str(kernel)` is the host as
the `ip` commands that would make it. `FakeNamespaces` are more such hosts, under the names of network namespaces.
"""

import errno
import ipaddress
import os
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import assert_never

from service.domain import steps as st
from service.domain.decide import name_taken
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import Host, HostNetwork, IpNetwork, LinkCounters, Observed, ObservedLink
from service.domain.spec import Offloads
from service.domain.token import Token, parse_token
from service.domain.values import IPV6_MTU_MIN, MTU_MAX, MTU_MIN, TAP_MTU_MAX, Address, Mode
from service.kernel import errnos
from service.kernel.columns import Member, column
from service.kernel.doorway import Identity
from service.kernel.namespaces import HostKernel

# linux/if.h
IFF_UP, IFF_BROADCAST, IFF_POINTOPOINT, IFF_RUNNING = 0x1, 0x2, 0x10, 0x40
IFF_NOARP, IFF_MULTICAST, IFF_LOWER_UP = 0x80, 0x1000, 0x10000

MTU_DEFAULT = 1500
QUEUE_TUN, QUEUE_OTHER = 500, 1000  # TUN_READQ_SIZE; ether_setup's, which a tap gets as well


@dataclass(slots=True)
class _Link:
    """A link as the kernel keeps it. `ipv4` is in the kernel's order: primary addresses, then secondary ones."""

    name: str
    ifindex: int
    mode: Mode | None
    kind: str
    alias: str = ""
    mtu: int = MTU_DEFAULT
    up: bool = False
    txqueuelen: int = QUEUE_OTHER
    mac: str = ""
    owner: int | None = None
    group: int | None = None
    link_group: int = 0
    multi_queue: bool = False
    persist: bool = True
    ipv4: list[tuple[Address, bool]] = field(default_factory=list)  # with whether it is a secondary one
    ipv6: list[Address] = field(default_factory=list)
    own_ipv6: list[Address] = field(default_factory=list)  # which the kernel set by itself
    routes: list[IpNetwork] = field(default_factory=list)
    counters: LinkCounters = field(default_factory=LinkCounters)
    vnet_hdr: bool = False
    readers: list[int] = field(default_factory=list)  # our ends of the descriptors given out
    held_by: str = ""  # a process of somebody else that has the device open

    @property
    def addresses(self) -> tuple[Address, ...]:
        return (*(address for address, _secondary in self.ipv4), *self.ipv6)

    @property
    def token(self) -> Token | None:
        return parse_token(self.alias) if self.mode is not None else None

    @property
    def held(self) -> bool:
        """Whether anybody has the device open; forgets descriptors that were closed at the other end."""
        for fd in list(self.readers):
            poll = select.poll()
            poll.register(fd, 0)
            if poll.poll(0):  # POLLHUP
                os.close(fd)
                self.readers.remove(fd)
        return bool(self.readers or self.held_by)

    def drop(self) -> None:
        for fd in self.readers:
            os.close(fd)
        self.readers.clear()


@dataclass(slots=True)
class _Failure:
    error: BaseException
    on: type[st.Step] | None
    nth: int
    after: bool
    times: int


class FakeKernel:
    """One host. Safe to use from several threads.

    Args:
        promote_secondaries: net.ipv4.conf.all.promote_secondaries; off is Linux' default, systemd turns it on.
        vouched: whether the link with this ifindex is the one that bore our token; asked by `SetAlias`.

    Attributes:
        outside: the hand of everybody else on this host.
        executed: every step carried out, in order.
        calls: how often each method was called.
    """

    def __init__(
        self,
        *,
        promote_secondaries: bool = False,
        vouched: Callable[[int, Token], bool] = lambda _ifindex, _token: False,
    ) -> None:
        self._lock = threading.RLock()
        self.vouched = vouched
        self._promote = promote_secondaries
        self._links: dict[int, _Link] = {}
        self._next_index = 1
        self._failures: list[_Failure] = []
        self.executed: list[st.Step] = []
        self.calls: Counter[str] = Counter()
        self.outside = Outside(self)
        lo = self._add("lo", None, "loopback")
        lo.mtu, lo.up, lo.mac = 65536, True, "00:00:00:00:00:00"
        lo.ipv4 = [(Address(ipaddress.IPv4Address("127.0.0.1"), 8), False)]
        lo.own_ipv6 = [Address(ipaddress.IPv6Address("::1"), 128)]

    # -- the protocol

    def observe(self, names: Collection[str] | None = None) -> Observed:
        """The links of these names, or all."""
        with self._call("observe"):
            links = [link for link in self._links.values() if names is None or link.name in names]
            return Observed({link.name: _seen(link) for link in links}, complete=names is None)

    def sample(self) -> list[ObservedLink]:
        """All TUN and TAP links with their counters, without addresses."""
        with self._call("sample"):
            return [_seen(link, addresses=False) for link in self._links.values() if link.mode is not None]

    def survey(self, names: Collection[str], node: str, *, networks: bool) -> Host:
        """Strangers with these names and, if asked for, the networks that links other than ours use."""
        with self._call("survey"):
            wanted = set(names)
            strangers = [link for link in self._links.values() if link.token is None or link.token.node != node]
            occupants = {link.name: _seen(link) for link in strangers if link.name in wanted}
            return Host(occupants, tuple(n for link in strangers for n in _networks(link)) if networks else ())

    def execute(self, token: Token, steps: Sequence[st.Step]) -> None:
        """Carry out steps on one interface, in order, until one fails.

        Raises:
            TunledgerError: the refusal, naming the step; or what `fail` was told to raise.
        """
        with self._call("execute"):
            (error,) = self._carry_out([(token, steps)])
            if error is not None:
                raise error

    def execute_many(self, work: Sequence[tuple[Token, Sequence[st.Step]]]) -> list[TunledgerError | None]:
        """Carry out the steps of many interfaces, those of each in order until one fails; the errors, in the order of
        `work`. Whatever else `fail` was told to raise, is raised.
        """
        with self._call("execute_many"):
            return self._carry_out(work)

    def open_device(self, step: st.StartProcessing, token: Token) -> int:
        """A real descriptor, of a socket pair: the device is busy until it and its copies are closed, in whatever
        process. Reading it gives what `Outside.deliver` sends.

        Raises:
            TunledgerError: device_busy, device_gone, name_taken, kernel_refused.
        """
        with self._call("open_device"):
            theirs: socket.socket | None = None
            try:
                with self._counted(step):
                    link = self._checked(step.name, token, step)
                    if link.mode is not step.mode or link.multi_queue != step.multi_queue:
                        raise errnos.refused(str(step), errno.EINVAL)
                    self._refuse_busy(link)
                    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                    ours.setblocking(False)
                    theirs.setblocking(False)
                    link.readers.append(ours.detach())
                    link.vnet_hdr = step.processing.offloads is Offloads.AUTO
            except BaseException:
                if theirs is not None:  # it failed on order after its effect: nobody gets the descriptor
                    theirs.close()
                raise
            return theirs.detach()

    def close(self) -> None:
        """Close our ends of all descriptors; links stay, as they do in Linux."""
        with self._call("close"):
            for link in self._links.values():
                link.drop()

    # -- for tests

    def fail(
        self,
        error: BaseException,
        *,
        on: type[st.Step] | None = None,
        nth: int = 1,
        after: bool = False,
        times: int = 1,
    ) -> None:
        """Raise `error` at the nth step from now, or the nth of one kind.

        Args:
            after: raise when the step has had its effect, as if the kernel's answer was lost.
            times: how many steps fail in a row from there on.
        """
        self._failures.append(_Failure(error, on, nth, after, times))

    def heal(self) -> None:
        """Forget failures that did not happen yet."""
        self._failures.clear()

    def open_devices(self) -> dict[str, int]:
        """How many descriptors that `open_device` gave out are still open, by interface."""
        with self._lock:
            return {link.name: len(link.readers) for link in self._links.values() if link.held and link.readers}

    def __str__(self) -> str:
        with self._lock:
            return "\n".join(line for link in self._links.values() if link.ifindex > 1 for line in _as_ip(link))

    # -- inside

    @contextmanager
    def _call(self, method: str) -> Iterator[None]:
        with self._lock:
            self.calls[method] += 1
            for link in list(self._links.values()):
                if not link.persist and not link.held:  # its last reader closed it
                    self._remove(link)
            yield

    @contextmanager
    def _counted(self, step: st.Step) -> Iterator[None]:
        failure = self._due(step)
        if failure is not None and not failure.after:
            raise failure.error
        yield
        self.executed.append(step)
        if failure is not None:
            raise failure.error

    def _due(self, step: st.Step) -> _Failure | None:
        for failure in self._failures:
            if failure.on is None or isinstance(step, failure.on):
                failure.nth -= 1
                if failure.nth <= 0:
                    failure.times -= 1
                    if failure.times <= 0:
                        self._failures.remove(failure)
                    return failure
        return None

    def _carry_out(self, work: Sequence[tuple[Token, Sequence[st.Step]]]) -> list[TunledgerError | None]:
        members = [Member(token, steps) for token, steps in work]
        while any(member.goes_on for member in members):
            for part in column(members):
                for member in part:
                    try:
                        with self._counted(member.step):
                            self._do(member)
                    except TunledgerError as error:
                        member.error = error
                    else:
                        member.at += 1
        return [member.error for member in members]

    def _do(self, member: Member) -> None:
        step = member.step
        if isinstance(step, st.CreateLink):
            member.ifindex = self._create(step).ifindex
        elif isinstance(step, st.DeleteLink):
            self._delete(step)
            member.ifindex = None
        else:
            if member.ifindex is None:
                member.ifindex = self._judged(member).ifindex
            link = self._links.get(member.ifindex)
            if link is None:
                raise errnos.refused(str(step), errno.ENODEV)
            self._change(step, link)

    def _judged(self, member: Member) -> _Link:
        step = member.step
        if not isinstance(step, st.SetAlias):
            return self._checked(step.old if isinstance(step, st.SetName) else step.name, member.token, step)
        link = self._links.get(step.ifindex)
        if link is None:
            raise errnos.refused(str(step), errno.ENODEV, f"{step.name} does not exist any more")
        is_it = step.token == member.token and link.name == step.name and link.mode is not None
        if link.token != member.token and not (is_it and self.vouched(link.ifindex, member.token)):
            raise name_taken(step.name)
        return link

    def _find(self, name: str) -> _Link | None:
        return next((link for link in self._links.values() if link.name == name), None)

    def _checked(self, name: str, token: Token, step: st.Step) -> _Link:
        link = self._find(name)
        if link is None:
            raise errnos.refused(str(step), errno.ENODEV, f"{name} does not exist any more")
        if link.token != token:
            raise name_taken(name)
        return link

    def _add(self, name: str, mode: Mode | None, kind: str, ifindex: int = 0) -> _Link:
        link = _Link(name, ifindex or self._next_index, mode, kind)
        assert link.ifindex not in self._links
        self._next_index = max(self._next_index, link.ifindex + 1)
        if mode is Mode.TUN:
            link.txqueuelen = QUEUE_TUN
        else:
            link.mac = f"02:00:00:00:{link.ifindex >> 8:02x}:{link.ifindex & 0xFF:02x}"
        self._links[link.ifindex] = link
        return link

    def _remove(self, link: _Link) -> None:
        link.drop()
        del self._links[link.ifindex]

    def _create(self, step: st.CreateLink) -> _Link:
        if self._find(step.name) is not None:
            raise name_taken(step.name)
        link = self._add(step.name, step.mode, "tun")
        link.owner, link.group, link.multi_queue = step.owner, step.group, step.multi_queue
        link.alias = str(step.token)
        return link

    def _delete(self, step: st.DeleteLink) -> None:
        link = self._links.get(step.ifindex)
        if link is None:
            return
        if link.token != step.token:
            raise name_taken(step.name)
        self._remove(link)

    def _change(self, step: st.Step, link: _Link) -> None:
        match step:
            case st.SetMtu():
                self._set_mtu(link, step.mtu, str(step))
            case st.SetTxQueueLen():
                link.txqueuelen = step.txqueuelen
            case st.SetMac():
                if link.mode is Mode.TUN:  # no ndo_set_mac_address in tun_netdev_ops
                    raise errnos.refused(str(step), errno.EOPNOTSUPP)
                link.mac = step.mac
            case st.SetUp():
                link.up = True
            case st.SetDown():
                _set_down(link)
            case st.SetName():
                self._rename(link, step.name)
            case st.SetAlias():
                link.alias = str(step.token)
            case st.SetLinkGroup():
                link.link_group = step.group
            case st.SetOwner():
                self._refuse_busy(link)
                link.owner = link.owner if step.owner is None else step.owner
                link.group = link.group if step.group is None else step.group
            case st.AddAddress():
                _add_address(link, step.address, str(step))
            case st.RemoveAddress():
                self._remove_address(link, step.address)
            case (
                st.StartProcessing()
                | st.ConfigureProcessing()
                | st.StopProcessing()
                | st.CreateLink()
                | st.DeleteLink()
            ):
                raise TunledgerError(ErrorCode.INTERNAL, f"{step} is not for the kernel to change a link with")
            case _:
                assert_never(step)

    def _refuse_busy(self, link: _Link) -> None:
        if link.held and not link.multi_queue:
            by = link.held_by or "another process"
            raise TunledgerError(
                ErrorCode.DEVICE_BUSY,
                f"{link.name} is in use by {by}; stop it, or wait until it lets go",
                retry=True,
                errno_name="EBUSY",
            )

    def _set_mtu(self, link: _Link, mtu: int, what: str) -> None:
        high = TAP_MTU_MAX if link.mode is Mode.TAP else MTU_MAX
        if mtu < MTU_MIN:
            raise errnos.refused(what, errno.EINVAL, "mtu less than device minimum")
        if mtu > high:
            raise errnos.refused(what, errno.EINVAL, "mtu greater than device maximum")
        link.mtu = mtu
        if mtu < IPV6_MTU_MIN:  # NETDEV_CHANGEMTU in net/ipv6/addrconf.c
            link.ipv6.clear()

    def _rename(self, link: _Link, name: str) -> None:
        other = self._find(name)
        if other is not None and other is not link:
            raise name_taken(name)
        link.name = name

    def _remove_address(self, link: _Link, address: Address) -> None:
        """No error if it is not there."""
        if address.version == 6:
            link.ipv6 = [a for a in link.ipv6 if a != address]
            return
        found = [secondary for a, secondary in link.ipv4 if a == address]
        if not found:
            return
        left = [(a, secondary) for a, secondary in link.ipv4 if a != address]
        if not found[0]:  # __inet_del_ifa in net/ipv4/devinet.c
            orphaned = [a for a, secondary in left if secondary and _same_subnet(a, address)]
            if self._promote and orphaned:
                left = [(a, secondary) for a, secondary in left if a != orphaned[0]]
                first_secondary = sum(not secondary for _a, secondary in left)
                left.insert(first_secondary, (orphaned[0], False))
            else:
                left = [(a, secondary) for a, secondary in left if a not in orphaned]
        link.ipv4 = left


class FakeNamespaces:
    """Network namespaces with names, each a fake kernel; those that somebody else makes and removes.

    Attributes:
        own: that of the service.
    """

    def __init__(self, own: FakeKernel | None = None) -> None:
        self.own = own if own is not None else FakeKernel()
        self._kernels: dict[str, tuple[int, FakeKernel]] = {}
        self._made = 0
        self._refusals: dict[str, TunledgerError] = {}

    def host(self) -> HostKernel:
        """The kernel of it all."""
        return HostKernel(self.own, self)

    def add(self, name: str) -> FakeKernel:
        """`ip netns add NAME`; its links are made and changed in the kernel that this gives."""
        self._made += 1
        kernel = FakeKernel(vouched=self.own.vouched)
        self._kernels[name] = self._made, kernel
        return kernel

    def delete(self, name: str) -> None:
        """`ip netns del NAME`, and all that is in it goes."""
        _made, kernel = self._kernels.pop(name)
        kernel.close()

    def refuse(self, name: str, error: TunledgerError | None) -> None:
        """Have nobody enter it, or let them again."""
        if error is None:
            del self._refusals[name]
        else:
            self._refusals[name] = error

    def present(self) -> Mapping[str, Identity]:
        """See `namespaces.Namespaces`."""
        return {name: (0, number) for name, (number, _kernel) in self._kernels.items()}

    @contextmanager
    def entered(self, name: str, *, attended: bool = True) -> Iterator[FakeKernel]:
        """See `namespaces.Namespaces`."""
        del attended
        if name not in self._kernels:
            raise errnos.no_namespace(name)
        if name in self._refusals:
            raise self._refusals[name]
        yield self._kernels[name][1]

    def require_home(self) -> None:
        """A fake thread is at home everywhere."""


class Outside:
    """What others do on the host: they see no tokens, and nobody asks them why. Names that do not exist are the
    test's mistake (LookupError); what Linux would refuse is refused with TunledgerError.
    """

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel

    @contextmanager
    def _link(self, name: str) -> Iterator[_Link]:
        kernel = self._kernel
        with kernel._lock:
            link = kernel._find(name)
            if link is None:
                raise LookupError(f"the test's host has no link {name}")
            yield link

    def add_link(self, name: str, mode: Mode | None = None, *, alias: str = "", ifindex: int = 0) -> int:
        """A link of somebody else: a bridge, or a persistent tun or tap. Gives its ifindex."""
        kernel = self._kernel
        with kernel._lock:
            if kernel._find(name) is not None:
                raise errnos.refused(f"ip link add {name}", errno.EEXIST)
            link = kernel._add(name, mode, "bridge" if mode is None else "tun", ifindex)
            link.alias = alias
            return link.ifindex

    def delete(self, name: str) -> None:
        """`ip link delete`."""
        with self._link(name) as link:
            self._kernel._remove(link)

    def rename(self, name: str, new: str) -> None:
        """`ip link set NAME name NEW`."""
        with self._link(name) as link:
            self._kernel._rename(link, new)

    def set_alias(self, name: str, alias: str) -> None:
        """`ip link set NAME alias ALIAS`."""
        with self._link(name) as link:
            link.alias = alias

    def set_link_group(self, name: str, group: int) -> None:
        """`ip link set NAME group GROUP`."""
        with self._link(name) as link:
            link.link_group = group

    def set_mtu(self, name: str, mtu: int) -> None:
        """`ip link set NAME mtu MTU`."""
        with self._link(name) as link:
            self._kernel._set_mtu(link, mtu, f"ip link set {name} mtu {mtu}")

    def set_txqueuelen(self, name: str, packets: int) -> None:
        """`ip link set NAME txqueuelen PACKETS`."""
        with self._link(name) as link:
            link.txqueuelen = packets

    def set_mac(self, name: str, mac: str) -> None:
        """`ip link set NAME address MAC`."""
        with self._link(name) as link:
            link.mac = mac

    def set_up(self, name: str, up: bool) -> None:
        """`ip link set NAME up|down`."""
        with self._link(name) as link:
            if up:
                link.up = True
            else:
                _set_down(link)

    def set_owner(self, name: str, owner: int | None, group: int | None) -> None:
        """TUNSETOWNER and TUNSETGROUP, by somebody who opened the device; None leaves it."""
        with self._link(name) as link:
            self._kernel._refuse_busy(link)
            link.owner = link.owner if owner is None else owner
            link.group = link.group if group is None else group

    def add_address(self, name: str, address: Address) -> None:
        """`ip address replace`."""
        with self._link(name) as link:
            _add_address(link, address, f"ip address replace {address} dev {name}")

    def remove_address(self, name: str, address: Address) -> None:
        """`ip address delete`."""
        with self._link(name) as link:
            self._kernel._remove_address(link, address)

    def add_route(self, name: str, network: IpNetwork) -> None:
        """`ip route add NETWORK dev NAME`."""
        with self._link(name) as link:
            link.routes.append(network)

    def not_persistent(self, name: str) -> None:
        """TUNSETPERSIST 0: gone at once, unless somebody has it open."""
        with self._link(name) as link:
            link.persist = False
            if not link.held:
                self._kernel._remove(link)

    def count(self, name: str, counters: LinkCounters) -> None:
        """Have the kernel's counters at these values."""
        with self._link(name) as link:
            link.counters = counters

    def deliver(self, name: str, packet: bytes) -> None:
        """Have the host send a packet over the link: whoever reads the device gets it."""
        with self._link(name) as link:
            if link.held and link.readers:
                os.write(link.readers[0], bytes(10) + packet if link.vnet_hdr else packet)

    def hold(self, name: str, by: str = "openvpn (pid 812)") -> None:
        """A process of somebody else opens the device, and keeps it open; "" ends that."""
        with self._link(name) as link:
            link.held_by = by


def _same_subnet(one: Address, other: Address) -> bool:
    return one.prefixlen == other.prefixlen and one.network == other.network


def _add_address(link: _Link, address: Address, what: str) -> None:
    """With NLM_F_REPLACE: no error if it is there."""
    if address.version == 6:
        if link.mtu < IPV6_MTU_MIN:
            raise errnos.refused(what, errno.EINVAL)
        # Of the same address with another prefix length Linux changes all but that (inet6_addr_modify).
        if all(a.ip != address.ip for a in link.ipv6):
            link.ipv6.append(address)
        return
    if any(a == address for a, _secondary in link.ipv4):
        return
    secondary = any(_same_subnet(a, address) for a, _secondary in link.ipv4)
    end = len(link.ipv4) if secondary else sum(not s for _a, s in link.ipv4)
    link.ipv4.insert(end, (address, secondary))


def _set_down(link: _Link) -> None:
    if link.up:
        link.ipv6.clear()  # keep_addr_on_down is off by default (net/ipv6/addrconf.c)
    link.up = False


def _seen(link: _Link, *, addresses: bool = True) -> ObservedLink:
    carrier = link.held if link.mode is not None else link.kind == "loopback"
    running = link.up and carrier
    flags = IFF_MULTICAST | (IFF_POINTOPOINT | IFF_NOARP if link.mode is Mode.TUN else IFF_BROADCAST)
    flags |= IFF_UP if link.up else 0
    flags |= IFF_RUNNING | IFF_LOWER_UP if running else 0
    return ObservedLink(
        name=link.name,
        ifindex=link.ifindex,
        mode=link.mode,
        token=link.token,
        alias=link.alias,
        mtu=link.mtu,
        up=link.up,
        running=running,
        carrier=carrier,
        operstate="UP" if running else "DOWN",
        flags=flags,
        txqueuelen=link.txqueuelen,
        mac=link.mac,
        owner=link.owner,
        group=link.group,
        link_group=link.link_group,
        multi_queue=link.multi_queue,
        persist=link.persist and link.mode is not None,
        vnet_hdr=link.vnet_hdr,
        addresses=link.addresses if addresses else (),
        counters=link.counters,
    )


def _networks(link: _Link) -> Iterator[HostNetwork]:
    """Its addresses, and its routes with those that the kernel makes for an address on a link that is up."""
    for address in (*link.addresses, *link.own_ipv6):
        if not (address.version == 6 and address.ip.is_link_local):
            yield HostNetwork(address.network, link.ifindex, link.name, "address")
    for address, secondary in link.ipv4:
        if link.up and not secondary and address.prefixlen < 32 and not address.ip.is_loopback:
            yield HostNetwork(address.network, link.ifindex, link.name, "route")
    for network in link.routes:
        if network.prefixlen > 0:
            yield HostNetwork(network, link.ifindex, link.name, "route")


def _as_ip(link: _Link) -> Iterator[str]:
    name = link.name
    if link.mode is None:
        yield f"ip link add {name} type {link.kind}"
    else:
        owner = "" if link.owner is None else f" user {link.owner}"
        group = "" if link.group is None else f" group {link.group}"
        queues = " multi_queue" if link.multi_queue else ""
        yield f"ip tuntap add {name} mode {link.mode}{owner}{group}{queues}"
    if link.alias:
        yield f"ip link set {name} alias {link.alias}"
    if link.link_group:
        yield f"ip link set {name} group {link.link_group}"
    if link.mtu != MTU_DEFAULT:
        yield f"ip link set {name} mtu {link.mtu}"
    if link.txqueuelen != (QUEUE_TUN if link.mode is Mode.TUN else QUEUE_OTHER):
        yield f"ip link set {name} txqueuelen {link.txqueuelen}"
    for address, secondary in link.ipv4:
        yield f"ip address add {address} dev {name}{'  # secondary' if secondary else ''}"
    for address in link.ipv6:
        yield f"ip address add {address} dev {name}"
    if link.up:
        yield f"ip link set {name} up"
    for network in link.routes:
        yield f"ip route add {network} dev {name}"
