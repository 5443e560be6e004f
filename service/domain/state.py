"""Desired state, folded from the log: `fold(events)` and nothing else makes it.

`evolve` is deterministic and looks at nothing but its arguments. It changes the `State` it is given instead of
copying a thousand interfaces for every event; whoever needs an older state folds again.
"""

from collections.abc import Iterable
from typing import assert_never

import msgspec

from service.domain import events as ev
from service.domain.commands import Request
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.spec import InterfaceSpec
from service.domain.values import CommandId, InterfaceId, InterfaceName


class Pending(msgspec.Struct, frozen=True, kw_only=True):
    """An intent without an outcome yet. `spec` is what the interface becomes, None when it is to go."""

    command_id: CommandId
    position: int
    recorded_at: str
    intent: str
    actor: str
    request: Request
    spec: InterfaceSpec | None


class Unconfirmed(msgspec.Struct, frozen=True, kw_only=True):
    """An applied change that is taken back unless it is confirmed in time.

    Attributes:
        previous: the spec to go back to, None if there was no interface.
        confirm_by: UTC.
    """

    command_id: CommandId
    interface_id: InterfaceId
    name: InterfaceName
    via: str
    previous: InterfaceSpec | None
    confirm_by: str


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """A declared interface.

    Attributes:
        spec: the last spec that was applied, or None while its very first command is pending.
        version: of its stream, that is the number of its events.
        generation: grows by one with every applied change of the spec; writing the same again is no change.
        via: the API that declared it.
    """

    id: InterfaceId
    name: InterfaceName
    via: str
    declared_at: str
    version: int
    generation: int = 0
    spec: InterfaceSpec | None = None
    pending: Pending | None = None
    applied_position: int = 0

    @property
    def etag(self) -> str:
        """An entity tag that stands for one desired state only: a spec has one generation of one id."""
        pending = f".{self.pending.position}" if self.pending is not None else ""
        return f'"{self.id}.{self.generation}{pending}"'

    @property
    def netns(self) -> str | None:
        """The network namespace that its link is to be in; of one that is to go, where it is."""
        spec = self.wanted if self.wanted is not None else self.spec
        return spec.netns if spec is not None else None

    @property
    def wanted(self) -> InterfaceSpec | None:
        """What the kernel is to be brought to: the pending spec while there is one, else the applied one."""
        return self.pending.spec if self.pending is not None else self.spec


class State:
    """All declared interfaces, by id and by name, at one position of the log."""

    __slots__ = ("boot_id", "by_name", "head", "interfaces", "position", "stopped", "unconfirmed")

    def __init__(self) -> None:
        self.interfaces: dict[InterfaceId, Interface] = {}
        self.by_name: dict[InterfaceName, InterfaceId] = {}
        self.unconfirmed: dict[InterfaceName, Unconfirmed] = {}
        self.position = 0
        self.head = ""
        self.boot_id: str | None = None  # of the last service that started
        self.stopped: str | None = None  # what the last orderly stop did with the interfaces; None after a crash

    def find(self, name: str) -> Interface | None:
        """The interface declared under a name, pending ones included."""
        interface_id = self.by_name.get(InterfaceName(name))
        return None if interface_id is None else self.interfaces[interface_id]

    def classic(self) -> Interface | None:
        """The one interface that the original API acts on: the newest that its `create` made."""
        for interface in reversed(self.interfaces.values()):
            if interface.via == "classic":
                return interface
        return None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, State):
            return NotImplemented
        return (self.interfaces, self.unconfirmed, self.position) == (
            other.interfaces,
            other.unconfirmed,
            other.position,
        )

    __hash__ = None  # type: ignore[assignment]  # it changes


def fold(recorded: Iterable[ev.Recorded], state: State | None = None) -> State:
    """The state after these events, which follow in order of position on those already in `state`."""
    state = State() if state is None else state
    for event in recorded:
        evolve(state, event)
    return state


def evolve(state: State, event: ev.Recorded) -> None:
    """Take one more event into the state.

    Raises:
        TunledgerError: log_corrupt, if the event cannot follow: a gap in positions, an outcome without an intent,
            an intent upon one that is still pending. The state is then unchanged.
    """
    if event.position != state.position + 1:
        raise _impossible(event, f"follows position {state.position}")
    body = event.body
    match body:
        case ev.InterfaceDeclared():
            if body.name in state.by_name or body.interface_id in state.interfaces:
                raise _impossible(event, f"declares {body.name}, which exists")
            state.interfaces[body.interface_id] = Interface(
                id=body.interface_id,
                name=body.name,
                via=body.request.via,
                declared_at=event.recorded_at,
                version=event.version,
                pending=_pending(event, body.spec),
            )
            state.by_name[body.name] = body.interface_id
        case ev.InterfaceReconfigured():
            _intend(state, event, body.interface_id, body.spec)
        case ev.ProcessingEnabled():
            _intend(
                state,
                event,
                body.interface_id,
                _with_processing(state, event, body.interface_id, running=True),
            )
        case ev.ProcessingDisabled():
            _intend(
                state,
                event,
                body.interface_id,
                _with_processing(state, event, body.interface_id, running=False),
            )
        case ev.InterfaceRetired():
            _intend(state, event, body.interface_id, None)
        case ev.CommandApplied():
            interface = _pending_of(state, event, body.interface_id)
            assert interface.pending is not None
            _note_confirmation(state, interface, interface.pending)
            if interface.pending.spec is None:
                _forget(state, interface)
            else:
                state.interfaces[interface.id] = msgspec.structs.replace(
                    interface,
                    spec=interface.pending.spec,
                    pending=None,
                    generation=interface.generation + (interface.pending.spec != interface.spec),
                    version=event.version,
                    applied_position=event.position,
                )
        case ev.CommandFailed():
            interface = _pending_of(state, event, body.interface_id)
            if interface.spec is None:
                _forget(state, interface)
            else:
                state.interfaces[interface.id] = msgspec.structs.replace(interface, pending=None, version=event.version)
        case ev.ChangeConfirmed():
            awaiting = state.unconfirmed.get(body.name)
            if awaiting is None or awaiting.command_id != body.confirms:
                raise _impossible(event, f"confirms {body.confirms}, which awaits no confirmation")
            del state.unconfirmed[body.name]
            _bump(state, event, body.interface_id)
        case (
            ev.DriftDetected()
            | ev.DriftRepaired()
            | ev.RepairFailed()
            | ev.DriftEnded()
            | ev.InterfaceContested()
            | ev.ContestEnded()
            | ev.OrphanRemoved()
            | ev.ProcessorCrashed()
            | ev.CaptureStarted()
            | ev.CaptureStopped()
        ):
            _bump(state, event, body.interface_id)
        case ev.ServiceStarted():
            state.boot_id, state.stopped = body.boot_id, None
        case ev.ServiceStopped():
            state.stopped = body.interfaces
        case ev.WorkerExited() | ev.ReconcileRequested() | ev.StartupReconciled() | ev.CommandRejected():
            pass
        case _:
            assert_never(body)
    state.position, state.head = event.position, event.hash


def _bump(state: State, event: ev.Recorded, interface_id: InterfaceId) -> None:
    known = state.interfaces.get(interface_id)
    if known is not None:
        state.interfaces[known.id] = msgspec.structs.replace(known, version=event.version)


def _note_confirmation(state: State, interface: Interface, pending: Pending) -> None:
    """An applied change either awaits confirmation from now on, or takes one back that did."""
    if pending.request.reverts:
        state.unconfirmed.pop(interface.name, None)
    elif pending.request.confirm_by:
        state.unconfirmed[interface.name] = Unconfirmed(
            command_id=pending.command_id,
            interface_id=interface.id,
            name=interface.name,
            via=interface.via,
            previous=interface.spec,
            confirm_by=pending.request.confirm_by,
        )


def _pending(event: ev.Recorded, spec: InterfaceSpec | None) -> Pending:
    body = event.body
    if event.command_id is None or not isinstance(body, ev.Intent):
        raise _impossible(event, "is an intent without a command id")
    return Pending(
        actor=event.actor,
        request=body.request,
        command_id=event.command_id,
        position=event.position,
        recorded_at=event.recorded_at,
        intent=type(event.body).__name__,
        spec=spec,
    )


def _intend(state: State, event: ev.Recorded, interface_id: InterfaceId, spec: InterfaceSpec | None) -> None:
    interface = _known(state, event, interface_id)
    if interface.pending is not None:
        raise _impossible(event, f"comes while {interface.pending.intent} is pending on {interface.name}")
    state.interfaces[interface_id] = msgspec.structs.replace(
        interface, pending=_pending(event, spec), version=event.version
    )


def _with_processing(state: State, event: ev.Recorded, interface_id: InterfaceId, *, running: bool) -> InterfaceSpec:
    spec = _known(state, event, interface_id).spec
    if spec is None:
        raise _impossible(event, "changes an interface that was never applied")
    return msgspec.structs.replace(spec, processing=msgspec.structs.replace(spec.processing, running=running))


def _known(state: State, event: ev.Recorded, interface_id: InterfaceId) -> Interface:
    interface = state.interfaces.get(interface_id)
    if interface is None:
        raise _impossible(event, f"is about interface {interface_id}, which does not exist")
    return interface


def _pending_of(state: State, event: ev.Recorded, interface_id: InterfaceId) -> Interface:
    interface = _known(state, event, interface_id)
    if interface.pending is None or interface.pending.command_id != event.command_id:
        raise _impossible(event, f"is an outcome of command {event.command_id}, which is not pending")
    return interface


def _forget(state: State, interface: Interface) -> None:
    del state.interfaces[interface.id]
    del state.by_name[interface.name]


def _impossible(event: ev.Recorded, what: str) -> TunledgerError:
    kind = type(event.body).__name__
    return TunledgerError(ErrorCode.LOG_CORRUPT, f"the log makes no sense at position {event.position}: {kind} {what}")
