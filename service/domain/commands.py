"""What a client can order, as plain values. Judged in `decide`; nothing in here looks at state."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
class ReplaceInterface:
    """Make this interface exist just so, whether or not it does now.

    `recreate` allows what only a new device can do.
    """

    spec: InterfaceSpec
    allow_overlap: bool = False
    recreate: bool = False

    @property
    def name(self) -> InterfaceName:
        """The interface it is about."""
        return self.spec.name


@dataclass(frozen=True, slots=True)
class PatchInterface:
    """Change some fields of the spec: a merge patch (RFC 7396) on its JSON form."""

    name: InterfaceName
    patch: Mapping[str, Any]
    allow_overlap: bool = False
    recreate: bool = False


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


Command = (
    DeclareInterface
    | ConfigureInterface
    | ReplaceInterface
    | PatchInterface
    | EnableProcessing
    | DisableProcessing
    | RetireInterface
)


def target(command: Command) -> InterfaceName:
    """The name of the interface a command is about."""
    return command.spec.name if isinstance(command, DeclareInterface) else command.name


class Request(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a command reached us; kept in the log with the intent.

    Attributes:
        via: "classic" for the original API, "v1", or "system" for what the service orders itself.
        call: which call of that API: "create", "replace", "change", "batch", ...; its answer is made by this.
        peer: address and port of the caller, "127.0.0.1:40112".
        user: the caller's name on this host at that time, "root"; the actor has the uid.
        reason: the caller's own words on why.
        key, fingerprint: the Idempotency-Key, and the hash of the request that came with it.
        confirm_by: until when the change has to be confirmed, UTC; it is taken back otherwise.
        reverts: the command whose unconfirmed change this one takes back.
        confirms: the command whose unconfirmed change this one makes stay.
    """

    via: str
    call: str = ""
    peer: str = ""
    user: str = ""
    reason: str = ""
    key: str = ""
    fingerprint: str = ""
    confirm_by: str = ""
    reverts: str = ""
    confirms: str = ""


@dataclass(frozen=True, slots=True)
class Submission:
    """Commands that stand or fall together (mostly one), with who sent them and the id they are known by.

    Attributes:
        actor: such as "uid:0".
        if_match: the ETags of which the interface must have one, or None. Only for a single command.
        if_none_match: the interface must not exist yet.
    """

    commands: tuple[Command, ...]
    command_id: CommandId
    actor: str
    request: Request
    if_match: tuple[str, ...] | None = None
    if_none_match: bool = False
