"""What the kernel says, in our words: links, their addresses, and whose networks are on the host.

Filled in by `service.kernel`; nothing in here knows netlink.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from service.domain.errors import TunledgerError
from service.domain.token import Token
from service.domain.values import Address, InterfaceId, Mode

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# Where a link is: its network namespace (None for the service's own) and its ifindex, which only that one knows.
Place = tuple[str | None, int]


def link_key(netns: str | None, name: str) -> str:
    """What a link goes by on the whole host: its name, or "blue/tun0" in a network namespace. No name has a '/'."""
    return name if netns is None else f"{netns}/{name}"


def parted_key(key: str) -> tuple[str | None, str]:
    """The network namespace and the name in a key."""
    netns, slash, name = key.rpartition("/")
    return (netns if slash else None), name


@dataclass(frozen=True, slots=True)
class LinkCounters:
    """The kernel's own counters of a link; rx and tx as the host sees them (its tx is what a reader of the fd gets)."""

    rx_packets: int = 0
    tx_packets: int = 0
    rx_bytes: int = 0
    tx_bytes: int = 0
    rx_errors: int = 0
    tx_errors: int = 0
    rx_dropped: int = 0
    tx_dropped: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedLink:
    """One link as the kernel has it.

    Attributes:
        mode: tun or tap, or None for a link of another kind.
        token: parsed from ifalias; None means that it is a stranger's.
        addresses: those that somebody set; the kernel's own (link-local) are left out.
        flags: IFF_* bits (linux/if.h); `up` is the admin state in them, `running` IFF_RUNNING.
        carrier: whether a reader holds the device.
        link_group: the kernel's group of links (`ip link set dev X group N`), 0 by default; no matter of users.
        netns: the network namespace it is in, by its name under /run/netns; None for the service's own.
    """

    name: str
    ifindex: int
    mode: Mode | None
    token: Token | None
    alias: str = ""
    mtu: int = 1500
    up: bool = False
    running: bool = False
    carrier: bool = False
    operstate: str = "DOWN"
    flags: int = 0
    txqueuelen: int = 500
    mac: str = ""
    owner: int | None = None
    group: int | None = None
    link_group: int = 0
    multi_queue: bool = False
    persist: bool = True
    vnet_hdr: bool = False
    packet_information: bool = False
    addresses: tuple[Address, ...] = ()
    counters: LinkCounters = LinkCounters()
    netns: str | None = None

    @property
    def key(self) -> str:
        """See `link_key`."""
        return link_key(self.netns, self.name)

    @property
    def place(self) -> Place:
        """Where it is."""
        return self.netns, self.ifindex


@dataclass(frozen=True, slots=True)
class HostNetwork:
    """A network that a network namespace already uses through a link: by an address on it, or by a route over it."""

    network: IpNetwork
    ifindex: int
    ifname: str
    source: Literal["address", "route"]
    netns: str | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """A look at the host.

    Attributes:
        links: by their keys (`link_key`).
        complete: whether it was every link, or only those asked for by name.
        closed: network namespaces that exist and could not be looked into, and why. One that does not exist has no
            links, and that is all.
    """

    links: Mapping[str, ObservedLink]
    complete: bool = True
    closed: Mapping[str, TunledgerError] = field(default_factory=dict)

    def by_interface(self, node: str) -> dict[InterfaceId, ObservedLink]:
        """The links that carry a token of this node, by the interface they were made for."""
        return {
            link.token.interface_id: link
            for link in self.links.values()
            if link.token is not None and link.token.node == node
        }


def one_each(links: Iterable[ObservedLink], node: str, keys: Mapping[InterfaceId, str]) -> list[ObservedLink]:
    """The link of each declared interface: the one under its key, else the oldest there that bears its token.

    A token can be copied onto a second link by whoever may set an alias; that one is then nobody's.

    Args:
        keys: of the links of the declared interfaces, by id (`link_key`).
    """
    found: dict[InterfaceId, ObservedLink] = {}
    for link in links:
        token = link.token
        if token is None or token.node != node or token.interface_id not in keys:
            continue
        known, key = found.get(token.interface_id), keys[token.interface_id]
        if link.netns != parted_key(key)[0]:
            continue
        if known is None or link.key == key or (known.key != key and link.ifindex < known.ifindex):
            found[token.interface_id] = link
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Host:
    """What a command is judged against: who has the wanted name, and which networks are in use by others.

    Attributes:
        occupants: by the key that was asked for.
        closed: network namespaces that were asked for and cannot be entered, and why; also those that do not exist.
    """

    occupants: Mapping[str, ObservedLink] = field(default_factory=dict)
    networks: tuple[HostNetwork, ...] = ()
    closed: Mapping[str, TunledgerError] = field(default_factory=dict)
