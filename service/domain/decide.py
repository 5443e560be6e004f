"""Judges commands against desired state and the host, and turns each into the one intent it stands for.

Pure: refusing costs nothing and changes nothing. What the kernel may still refuse is not guessed here.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, assert_never

import msgspec

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.chain import BUILT_IN, custom, target_fields, targets
from service.domain.errors import ErrorCode, TunledgerError, close_to, invalid
from service.domain.observed import Host, link_key
from service.domain.remarks import declared_modes
from service.domain.spec import InterfaceSpec, changes, check, parse_spec, spec_to_json
from service.domain.state import Interface, State, Unconfirmed
from service.domain.values import Address, InterfaceId, InterfaceName, check_host_address, parse_prefixlen


def decide(
    state: State,
    submission: cmd.Submission,
    host: Host,
    new_id: Callable[[], str],
    degraded: Callable[[InterfaceId], str | None] = lambda _: None,
) -> list[ev.Intent]:
    """The intents that record these commands, one for each, in their order.

    Args:
        host: who holds the wanted names, and the networks of links that are not ours.
        new_id: ids for interfaces that are declared.
        degraded: why an interface is not as desired, or None; a refusal must not claim that it is.

    Raises:
        TunledgerError: why they are refused, all of them: invalid_field, subnet_overlap, interface_exists,
            name_taken, no_interface, already_running, not_running, precondition_failed, needs_recreate,
            awaiting_confirmation, netns_missing, permission_denied, target_mode. Of several, the field says which one:
            "commands.2.mtu".
    """
    many = len(submission.commands) > 1 or submission.request.call.endswith("batch")
    seen: set[InterfaceName] = set()
    intents: list[ev.Intent] = []
    for number, command in enumerate(submission.commands):
        name = cmd.target(command)
        try:
            if name in seen:
                raise TunledgerError(
                    ErrorCode.INVALID_FIELD, f"{name} is in this batch twice; give one command for each interface"
                )
            seen.add(name)
            _check_preconditions(state, submission, name)
            intents.append(_decide_one(state, command, submission.request, host, new_id, degraded))
        except TunledgerError as error:
            if not many:
                raise
            field = f"commands.{number}" + (f".{error.field}" if error.field else "")
            raise TunledgerError(
                error.code, f"commands.{number}: {error.message}", retry=error.retry, field=field
            ) from error
    _refuse_other_modes(state, intents)
    return intents


def _refuse_other_modes(state: State, intents: Sequence[ev.Intent]) -> None:
    """Refuse chains that begin to send to interfaces of another mode, which are there or come with the same batch.

    One that is there already may stay: its target was declared, or made anew in another mode, later (`remarks`).
    """
    modes = declared_modes(state)
    for intent in intents:
        match intent:
            case ev.InterfaceDeclared() | ev.InterfaceReconfigured():
                modes[intent.name] = intent.spec.mode
            case ev.InterfaceRetired():
                modes.pop(intent.name, None)
    for number, intent in enumerate(intents):
        if not isinstance(intent, ev.InterfaceDeclared | ev.InterfaceReconfigured):
            continue
        many = len(intents) > 1 or intent.request.call.endswith("batch")
        spec, present = intent.spec, state.find(intent.name)
        old = present.spec if present is not None else None
        had = targets(old.processing.chain) if old is not None and old.mode is spec.mode else frozenset()
        for path, name in target_fields(spec.processing.chain):
            mode = modes.get(name, spec.mode)
            if mode is not spec.mode and name not in had:
                at = f"processing.chain.{path}"
                field = f"commands.{number}.{at}" if many else at
                raise TunledgerError(
                    ErrorCode.TARGET_MODE,
                    f"{field}: {name} is a {mode}, and {spec.name} a {spec.mode}: neither takes the other's packets; "
                    f"name an interface that is a {spec.mode}, or make {name} one",
                    field=field,
                )


def _decide_one(
    state: State,
    command: cmd.Command,
    request: cmd.Request,
    host: Host,
    new_id: Callable[[], str],
    degraded: Callable[[InterfaceId], str | None],
) -> ev.Intent:
    match command:
        case cmd.DeclareInterface(spec=spec):
            _refuse_existing(state, spec.name, request.via)
            return _declare(spec, request, host, new_id, allow_overlap=command.allow_overlap)
        case cmd.ReplaceInterface(spec=spec):
            if state.find(spec.name) is None:
                return _declare(spec, request, host, new_id, allow_overlap=command.allow_overlap)
            interface, old = _existing(state, spec.name)
            return _reconfigure(interface, old, check(spec), command, request, host)
        case cmd.PatchInterface(name=name):
            interface, old = _existing(state, name)
            return _reconfigure(interface, old, patched(old, command.patch), command, request, host)
        case cmd.ConfigureInterface(name=name):
            interface, old = _existing(state, name)
            return _reconfigure(interface, old, _configured(old, command), command, request, host)
        case cmd.EnableProcessing(name=name):
            interface, spec = _existing(state, name)
            if spec.processing.running:
                why = degraded(interface.id)
                how = "already running" if why is None else f"on already, but {name} is degraded: {why}"
                raise TunledgerError(ErrorCode.ALREADY_RUNNING, f"packet processing on {name} is {how}")
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
            return msgspec.structs.replace(
                interface.spec, processing=msgspec.structs.replace(interface.spec.processing, running=running)
            )
        case ev.InterfaceRetired():
            return None
        case _:
            assert_never(intent)


def refuse_unknown_processors(state: State, intents: Sequence[ev.Intent], known: Collection[str]) -> None:
    """Refuse intents whose chains name processors of other packages that are not installed here.

    One that an interface has already may stay: its package went after it was accepted, and everything else about the
    interface can still be changed.

    Raises:
        TunledgerError: invalid_field.
    """
    for number, intent in enumerate(intents):
        if not isinstance(intent, ev.InterfaceDeclared | ev.InterfaceReconfigured):
            continue
        present = state.find(intent.spec.name)
        had = present.spec.processing.chain if present is not None and present.spec is not None else ()
        for name in sorted(custom(intent.spec.processing.chain) - custom(had) - set(known)):
            place = next(i for i, stage in enumerate(intent.spec.processing.chain) if stage["processor"] == name)
            at = f"processing.chain.{place}.processor"
            names = ", ".join([*BUILT_IN, *sorted(known)])
            many = len(intents) > 1 or intent.request.call.endswith("batch")
            field = f"commands.{number}.{at}" if many else at
            close = close_to(name, [*BUILT_IN, *known])
            raise invalid(field, name, f"is no processor here; known: {names}{close}")


def confirm(state: State, command_id: str, request: cmd.Request) -> list[ev.ChangeConfirmed]:
    """The events that make a change stay.

    Raises:
        TunledgerError: not_awaiting, if no change of that command awaits confirmation.
    """
    found = [awaiting for awaiting in state.unconfirmed.values() if awaiting.command_id == command_id]
    if not found:
        raise TunledgerError(
            ErrorCode.NOT_AWAITING,
            f"command {command_id} awaits no confirmation: it had one, never needed one, or it is too late",
        )
    return [
        ev.ChangeConfirmed(interface_id=each.interface_id, name=each.name, confirms=each.command_id, request=request)
        for each in found
    ]


def take_back(
    state: State, awaiting: Sequence[Unconfirmed], request: cmd.Request, new_id: Callable[[], str]
) -> list[ev.Intent]:
    """The intents that undo changes which nobody confirmed in time.

    An interface with a pending intent is left out: its recovery comes first.
    """
    intents: list[ev.Intent] = []
    for each in awaiting:
        named = state.find(each.name)
        if named is not None and named.pending is not None:
            continue
        interface = state.interfaces.get(each.interface_id)
        if interface is None and each.previous is not None:
            intents.append(
                ev.InterfaceDeclared(
                    interface_id=InterfaceId(new_id()),
                    name=each.name,
                    spec=each.previous,
                    request=msgspec.structs.replace(request, via=each.via),
                )
            )
        elif interface is not None and interface.spec is not None and each.previous is None:
            intents.append(ev.InterfaceRetired(interface_id=interface.id, name=each.name, request=request))
        elif interface is not None and interface.spec is not None and each.previous is not None:
            intents.append(
                ev.InterfaceReconfigured(
                    interface_id=interface.id,
                    name=each.name,
                    spec=each.previous,
                    changes=changes(spec_to_json(interface.spec), spec_to_json(each.previous)),
                    request=request,
                )
            )
    return intents


def name_taken(name: str) -> TunledgerError:
    """The refusal to touch a link that is not ours; `decide` gives it early, `plan` when one appears later."""
    return TunledgerError(
        ErrorCode.NAME_TAKEN, f"{name} exists and is not managed by tunledger; it was left alone", field="name"
    )


def merged(target: Any, patch: Any) -> Any:
    """A JSON merge patch applied (RFC 7396, section 2)."""
    if not isinstance(patch, Mapping):
        return patch
    result = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


def patched(old: InterfaceSpec, patch: Mapping[str, Any]) -> InterfaceSpec:
    """The spec after a merge patch on its JSON form; a null takes a field back to its default.

    Raises:
        TunledgerError: invalid_field.
    """
    if "name" in patch and patch["name"] != old.name:
        raise invalid(
            "name", patch["name"], f"cannot be given to {old.name}: a name is for life; make another interface"
        )
    return parse_spec(merged(spec_to_json(old), patch))


def _check_preconditions(state: State, submission: cmd.Submission, name: InterfaceName) -> None:
    interface = state.find(name)
    if submission.if_none_match and interface is not None:
        raise TunledgerError(ErrorCode.PRECONDITION_FAILED, f"If-None-Match: {name} exists")
    if submission.if_match is not None and (
        interface is None or not ({"*", interface.etag} & set(submission.if_match))
    ):
        now = "there is no such interface" if interface is None else f"it is {interface.etag} now"
        raise TunledgerError(
            ErrorCode.PRECONDITION_FAILED, f"If-Match: {name} has changed since it was read; {now}; read it again"
        )
    awaiting = state.unconfirmed.get(name)
    if awaiting is not None:
        raise TunledgerError(
            ErrorCode.AWAITING_CONFIRMATION,
            f"{name}: the change by command {awaiting.command_id} awaits confirmation until {awaiting.confirm_by}; "
            "confirm it, or wait until it is taken back",
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


def _declare(
    spec: InterfaceSpec, request: cmd.Request, host: Host, new_id: Callable[[], str], *, allow_overlap: bool
) -> ev.InterfaceDeclared:
    _refuse_closed(spec, host)
    if link_key(spec.netns, spec.name) in host.occupants:
        raise name_taken(spec.name)
    if not allow_overlap:
        _refuse_overlap(spec.addresses, spec, request.via, host)
    return ev.InterfaceDeclared(interface_id=InterfaceId(new_id()), name=spec.name, spec=check(spec), request=request)


def _reconfigure(
    interface: Interface,
    old: InterfaceSpec,
    new: InterfaceSpec,
    command: cmd.ReplaceInterface | cmd.PatchInterface | cmd.ConfigureInterface,
    request: cmd.Request,
    host: Host,
) -> ev.InterfaceReconfigured:
    moved = new.netns != old.netns
    if not command.allow_overlap:
        added = tuple(a for a in new.addresses if moved or a not in old.addresses)
        _refuse_overlap(added, new, request.via, host)
    if not isinstance(command, cmd.ConfigureInterface) and not command.recreate:
        _refuse_recreation(old, new)
    if moved:
        _refuse_closed(new, host)
    return ev.InterfaceReconfigured(
        interface_id=interface.id,
        name=interface.name,
        spec=new,
        changes=changes(spec_to_json(old), spec_to_json(new)),
        request=request,
    )


def _refuse_recreation(old: InterfaceSpec, new: InterfaceSpec) -> None:
    for field, fixed in (
        ("mode", old.mode is not new.mode),
        ("netns", old.netns != new.netns),
        ("multi_queue", old.multi_queue != new.multi_queue),
        ("owner", old.owner is not None and new.owner is None),
        ("group", old.group is not None and new.group is None),
    ):
        if fixed:
            raise TunledgerError(
                ErrorCode.NEEDS_RECREATE,
                f"{field}: the kernel cannot change this on a living device; with recreate=true {new.name} is removed "
                "and made again, with a new ifindex and without its connections",
                field=field,
            )


def _refuse_closed(spec: InterfaceSpec, host: Host) -> None:
    if spec.netns is not None and (why := host.closed.get(spec.netns)) is not None:
        raise TunledgerError(why.code, why.message, retry=why.retry, field="netns", errno_name=why.errno_name)


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


def _refuse_overlap(addresses: tuple[Address, ...], spec: InterfaceSpec, via: str, host: Host) -> None:
    """Refuse addresses of a spec whose networks others use; the original API has one, in a field of its own."""
    for address in addresses:
        net = address.network
        for used in host.networks:
            if used.netns != spec.netns:
                continue  # what others do in another network namespace is none of its business
            if used.network.version == net.version and used.network.overlaps(net):
                article = "an address" if used.source == "address" else "a route"
                field = "address" if via == "classic" else f"addresses.{spec.addresses.index(address)}"
                leave = 'give "allow_overlap": true' if via == "classic" else "allow it with allow_overlap=true"
                raise TunledgerError(
                    ErrorCode.SUBNET_OVERLAP,
                    f"{field}: {net} overlaps {used.network}, {article} of {used.ifname}, and could cut the host off; "
                    f"choose another subnet, or {leave}",
                    field=field,
                )


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
