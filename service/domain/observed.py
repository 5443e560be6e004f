"""What the kernel says, in our words: links, their addresses, and whose networks are on the host.

Filled in by `service.kernel`; nothing in here knows netlink.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from service.domain.token import Token
from service.domain.values import Address, InterfaceId, Mode

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


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


@dataclass(frozen=True, slots=True)
class HostNetwork:
    """A network the host already uses through a link: by an address on it, or by a route over it."""

    network: IpNetwork
    ifindex: int
    ifname: str
    source: Literal["address", "route"]


@dataclass(frozen=True, slots=True)
class Observed:
    """A look at the host. `complete` says whether it was every link, or only those asked for by name."""

    links: Mapping[str, ObservedLink]
    complete: bool = True

    def by_interface(self, node: str) -> dict[InterfaceId, ObservedLink]:
        """The links that carry a token of this node, by the interface they were made for."""
        return {
            link.token.interface_id: link
            for link in self.links.values()
            if link.token is not None and link.token.node == node
        }


def one_each(links: Iterable[ObservedLink], node: str, names: Mapping[InterfaceId, str]) -> list[ObservedLink]:
    """The link of each declared interface: the one under its name, else the oldest that bears its token.

    A token can be copied onto a second link by whoever may set an alias; that one is then nobody's.

    Args:
        names: of the declared interfaces, by id.
    """
    found: dict[InterfaceId, ObservedLink] = {}
    for link in links:
        token = link.token
        if token is None or token.node != node or token.interface_id not in names:
            continue
        known, name = found.get(token.interface_id), names[token.interface_id]
        if known is None or link.name == name or (known.name != name and link.ifindex < known.ifindex):
            found[token.interface_id] = link
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Host:
    """What a command is judged against: who has the wanted name, and which networks are in use by others."""

    occupants: Mapping[str, ObservedLink] = field(default_factory=dict)
    networks: tuple[HostNetwork, ...] = ()
