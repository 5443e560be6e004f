"""Judges a command against desired state and the host, and turns it into the one intent it stands for.

Pure: refusing costs nothing and changes nothing. What the kernel may still refuse is not guessed here.
"""

from typing import assert_never

import msgspec

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError, invalid
from service.domain.observed import Host
from service.domain.spec import InterfaceSpec, Processing, changes, check, spec_to_json
from service.domain.state import Interface, State
from service.domain.values import Address, InterfaceId, InterfaceName, check_host_address, parse_prefixlen


def decide(state: State, submission: cmd.Submission, host: Host, new_id: InterfaceId) -> ev.Intent:
    """The intent that records this command.

    Args:
        host: who holds the wanted name, and the networks of links that are not ours.
        new_id: the id for an interface that the command declares.

    Raises:
        TunledgerError: why the command is refused: invalid_field, subnet_overlap, interface_exists, name_taken,
            no_interface, already_running, not_running.
    """
    command, request = submission.command, submission.request
    match command:
        case cmd.DeclareInterface(spec=spec):
            _refuse_existing(state, spec.name, request.via)
            stranger = host.occupants.get(spec.name)
            if stranger is not None:
                raise name_taken(spec.name)
            if not command.allow_overlap:
                _refuse_overlap(spec.addresses, host)
            return ev.InterfaceDeclared(interface_id=new_id, name=spec.name, spec=check(spec), request=request)
        case cmd.ConfigureInterface(name=name):
            interface, old = _existing(state, name)
            new = _configured(old, command)
            if not command.allow_overlap:
                _refuse_overlap(tuple(a for a in new.addresses if a not in old.addresses), host)
            return ev.InterfaceReconfigured(
                interface_id=interface.id,
                name=interface.name,
                spec=new,
                changes=changes(spec_to_json(old), spec_to_json(new)),
                request=request,
            )
        case cmd.EnableProcessing(name=name):
            interface, spec = _existing(state, name)
            if spec.processing.running:
                raise TunledgerError(ErrorCode.ALREADY_RUNNING, f"packet processing on {name} is already running")
            return ev.ProcessingEnabled(interface_id=interface.id, name=interface.name, request=request)
        case cmd.DisableProcessing(name=name):
            interface, spec = _existing(state, name)
            if not spec.processing.running:
                raise TunledgerError(ErrorCode.NOT_RUNNING, f"packet processing on {name} is not running")
            return ev.ProcessingDisabled(interface_id=interface.id, name=interface.name, request=request)
        case cmd.RetireInterface(name=name):
            interface, _ = _existing(state, name)
            return ev.InterfaceRetired(interface_id=interface.id, name=interface.name, request=request)
        case _:
            assert_never(command)


def intended(intent: ev.Intent, interface: Interface | None) -> InterfaceSpec | None:
    """The spec that the kernel is to be brought to by an intent; None when the interface is to go."""
    match intent:
        case ev.InterfaceDeclared() | ev.InterfaceReconfigured():
            return intent.spec
        case ev.ProcessingEnabled() | ev.ProcessingDisabled():
            assert interface is not None
            assert interface.spec is not None
            running = isinstance(intent, ev.ProcessingEnabled)
            return msgspec.structs.replace(interface.spec, processing=Processing(running=running))
        case ev.InterfaceRetired():
            return None
        case _:
            assert_never(intent)


def name_taken(name: str) -> TunledgerError:
    """The refusal to touch a link that is not ours; `decide` gives it early, `plan` when one appears later."""
    return TunledgerError(
        ErrorCode.NAME_TAKEN,
        f"{name} exists and is not managed by tunledger; it was left alone",
        field="name",
    )


def _existing(state: State, name: InterfaceName) -> tuple[Interface, InterfaceSpec]:
    interface = state.find(name)
    if interface is None or interface.spec is None:
        raise TunledgerError(ErrorCode.NO_INTERFACE, f"there is no interface {name}")
    if interface.pending is not None:
        raise TunledgerError(
            ErrorCode.OVERLOADED, f"command {interface.pending.command_id} is pending on {name}", retry=True
        )
    return interface, interface.spec


def _refuse_existing(state: State, name: InterfaceName, via: str) -> None:
    if state.find(name) is not None:
        raise TunledgerError(ErrorCode.INTERFACE_EXISTS, f"interface {name} already exists", field="name")
    if via == "classic":
        other = state.classic()
        if other is not None:
            raise TunledgerError(
                ErrorCode.INTERFACE_EXISTS,
                f"interface {other.name} already exists, and this API keeps one at a time; delete it first",
                field="name",
            )


def _refuse_overlap(addresses: tuple[Address, ...], host: Host) -> None:
    for address in addresses:
        net = address.network
        for used in host.networks:
            if used.network.version == net.version and used.network.overlaps(net):
                raise TunledgerError(
                    ErrorCode.SUBNET_OVERLAP,
                    f"address: {net} overlaps {used.network}, {_article(used.source)} of {used.ifname}, and could cut "
                    'the host off; choose another subnet, or give "allow_overlap": true',
                    field="address",
                )


def _article(source: str) -> str:
    return "an address" if source == "address" else "a route"


def _configured(old: InterfaceSpec, command: cmd.ConfigureInterface) -> InterfaceSpec:
    mtu = old.mtu if command.mtu is None else command.mtu
    if command.ip is None and command.netmask is None:
        return check(msgspec.structs.replace(old, mtu=mtu))
    primary = old.addresses[0] if old.addresses else None
    ip = command.ip if command.ip is not None else (primary.ip if primary is not None else None)
    if ip is None:
        raise invalid("netmask", command.netmask, "has no address to go with; give address too")
    if command.netmask is not None:
        prefixlen = parse_prefixlen(command.netmask, ip)
    elif primary is not None and primary.version == ip.version:
        prefixlen = primary.prefixlen
    else:
        raise invalid("address", str(ip), "is of another IP version than the address it replaces; give netmask too")
    new = check_host_address(Address(ip, prefixlen))
    rest = tuple(address for address in old.addresses[1:] if address.ip != new.ip)
    return check(msgspec.structs.replace(old, addresses=(new, *rest), mtu=mtu))
