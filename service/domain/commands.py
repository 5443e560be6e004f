"""What a client can order, as plain values. Judged in `decide`; nothing in here looks at state."""

import ipaddress
from dataclasses import dataclass

import msgspec

from service.domain.spec import InterfaceSpec
from service.domain.values import CommandId, InterfaceName, Mtu


@dataclass(frozen=True, slots=True)
class DeclareInterface:
    """Make this interface exist. `allow_overlap` lets its subnet cover one that the host uses already."""

    spec: InterfaceSpec
    allow_overlap: bool = False


@dataclass(frozen=True, slots=True)
class ConfigureInterface:
    """Change the primary address, its netmask or the MTU in place; None leaves a thing as it is."""

    name: InterfaceName
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None
    netmask: str | None = None
    mtu: Mtu | None = None
    allow_overlap: bool = False


@dataclass(frozen=True, slots=True)
class EnableProcessing:
    """Let our workers read the device."""

    name: InterfaceName


@dataclass(frozen=True, slots=True)
class DisableProcessing:
    """Take the device from our workers; others may then open it."""

    name: InterfaceName


@dataclass(frozen=True, slots=True)
class RetireInterface:
    """Remove the interface for good; its history stays."""

    name: InterfaceName


Command = DeclareInterface | ConfigureInterface | EnableProcessing | DisableProcessing | RetireInterface


def target(command: Command) -> InterfaceName:
    """The name of the interface a command is about."""
    return command.spec.name if isinstance(command, DeclareInterface) else command.name


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a command reached us; kept in the log with the intent.

    Attributes:
        via: "classic" for the original API, "v1", or "cli".
        peer: address and port of the caller, "127.0.0.1:40112".
        user: the caller's name on this host at that time, "root"; the actor has the uid.
        reason: the caller's own words on why.
    """

    via: str
    peer: str = ""
    user: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Submission:
    """A command with who sent it (`actor`, such as "uid:0") and the id it is known by from now on."""

    command: Command
    command_id: CommandId
    actor: str
    request: Request
