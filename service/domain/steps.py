"""The steps a plan is made of. Each reads like the `ip` command it stands for and leaves the executor no choice.

`netns` is the network namespace of the link, by its name under /run/netns; None is the service's own.
"""

from dataclasses import dataclass

from service.domain.observed import link_key
from service.domain.spec import Processing
from service.domain.token import Token
from service.domain.values import Address, InterfaceId, InterfaceName, Mode

# Link groups that links of ours are moved into on their way out, so that they leave together: 0x7461 is "ta". A link
# that is to stay and is found in one of them was left there by a crash.
REMOVAL_GROUPS = range(0x7461_0000, 0x7462_0000)

COUNT_ONLY = Processing(running=True)


@dataclass(frozen=True, slots=True)
class CreateLink:
    """Make the persistent device, exclusively, marked with the token before it can outlive us."""

    name: InterfaceName
    token: Token
    mode: Mode
    multi_queue: bool
    owner: int | None
    group: int | None
    netns: str | None = None

    def __str__(self) -> str:
        owner = "" if self.owner is None else f" user {self.owner}"
        group = "" if self.group is None else f" group {self.group}"
        queues = " multi_queue" if self.multi_queue else ""
        return f"{_ip(self.netns)} tuntap add {self.name} mode {self.mode}{owner}{group}{queues}"


@dataclass(frozen=True, slots=True)
class DeleteLink:
    """Remove the link with this ifindex, if it still carries the token."""

    name: str
    ifindex: int
    token: Token
    netns: str | None = None

    def __str__(self) -> str:
        return f"{_ip(self.netns)} link delete {self.name}"


@dataclass(frozen=True, slots=True)
class SetName:
    """Give the link its name back."""

    name: InterfaceName
    old: str
    netns: str | None = None

    def __str__(self) -> str:
        return f"{_ip(self.netns)} link set {self.old} name {self.name}"


@dataclass(frozen=True, slots=True)
class SetAlias:
    """Put our mark back on the link with this ifindex. The one step for a link that does not bear it: the kernel's
    side refuses unless it can vouch that it is the very link that bore it."""

    name: str
    ifindex: int
    token: Token
    netns: str | None = None

    def __str__(self) -> str:
        return f'{_ip(self.netns)} link set dev {self.name} alias "{self.token}"'


@dataclass(frozen=True, slots=True)
class SetLinkGroup:
    """0 is the group every link is made in."""

    name: InterfaceName
    group: int
    netns: str | None = None

    def __str__(self) -> str:
        return f"{_ip(self.netns)} link set dev {self.name} group {self.group}"


@dataclass(frozen=True, slots=True)
class SetMtu:
    """Bytes."""

    name: InterfaceName
    mtu: int
    netns: str | None = None

    def __str__(self) -> str:
        return f"{_ip(self.netns)} link set {self.name} mtu {self.mtu}"


@dataclass(frozen=True, slots=True)
class SetTxQueueLen:
    """Packets."""

    name: InterfaceName
    txqueuelen: int
    netns: str | None = None

    def __str__(self) -> str:
        return f"{_ip(self.netns)} link set {self.name} txqueuelen {self.txqueuelen}"


@dataclass(frozen=True, slots=True)
class SetMac:
    """The hardware address of a tap."""

    name: InterfaceName
    mac: str
    netns: str | None = None

    def __str__(self) -> str:
        return f"{_ip(self.netns)} link set {self.name} address {self.mac}"


@dataclass(frozen=True, slots=True)
class SetOwner:
    """Who may open the device besides root; None leaves that one unset."""

    name: InterfaceName
    owner: int | None
    group: int | None
    netns: str | None = None

    def __str__(self) -> str:
        owner = "none" if self.owner is None else self.owner
        group = "none" if self.group is None else self.group
        return f"# tuntap {link_key(self.netns, self.name)}: set user {owner} group {group}"


@dataclass(frozen=True, slots=True)
class AddAddress:
    """Adding one that is there already is no error, so that it can be said twice."""

    name: InterfaceName
    address: Address
    netns: str | None = None

    def __str__(self) -> str:
        return f"{_ip(self.netns)} address replace {self.address} dev {self.name}"


@dataclass(frozen=True, slots=True)
class RemoveAddress:
    """Removing one that is gone already is no error: the kernel drops secondary addresses with their primary."""

    name: InterfaceName
    address: Address
    netns: str | None = None

    def __str__(self) -> str:
        return f"{_ip(self.netns)} address delete {self.address} dev {self.name}"


@dataclass(frozen=True, slots=True)
class SetUp:
    """Admin state up."""

    name: InterfaceName
    netns: str | None = None

    def __str__(self) -> str:
        return f"{_ip(self.netns)} link set {self.name} up"


@dataclass(frozen=True, slots=True)
class SetDown:
    """Admin state down; the kernel then drops the link's IPv6 addresses."""

    name: InterfaceName
    netns: str | None = None

    def __str__(self) -> str:
        return f"{_ip(self.netns)} link set {self.name} down"


@dataclass(frozen=True, slots=True)
class StartProcessing:
    """Open the device and hand it to a worker, with what is to be done with its packets."""

    name: InterfaceName
    interface_id: InterfaceId
    mode: Mode
    multi_queue: bool
    processing: Processing = COUNT_ONLY
    netns: str | None = None

    def __str__(self) -> str:
        return f"# start processing on {link_key(self.netns, self.name)}{_chain(self.processing)}"


@dataclass(frozen=True, slots=True)
class ConfigureProcessing:
    """Have the worker that reads the device do something else with its packets, losing none."""

    name: InterfaceName
    interface_id: InterfaceId
    processing: Processing

    def __str__(self) -> str:
        return f"# change processing on {self.name}{_chain(self.processing) or ': count only'}"


@dataclass(frozen=True, slots=True)
class StopProcessing:
    """Make the worker let go of the device, and wait until it has."""

    name: str
    interface_id: InterfaceId

    def __str__(self) -> str:
        return f"# stop processing on {self.name}"


Step = (
    CreateLink
    | DeleteLink
    | SetName
    | SetAlias
    | SetLinkGroup
    | SetMtu
    | SetTxQueueLen
    | SetMac
    | SetOwner
    | AddAddress
    | RemoveAddress
    | SetUp
    | SetDown
    | StartProcessing
    | ConfigureProcessing
    | StopProcessing
)


def _ip(netns: str | None) -> str:
    return "ip" if netns is None else f"ip -n {netns}"


def _chain(processing: Processing) -> str:
    stages = ", ".join(stage["processor"] for stage in processing.chain)
    return f": {stages}" if stages else ""
