"""Short ways to say what a test is about: a spec, a command, a recorded event."""

from typing import Any

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.decide import decide
from service.domain.observed import Host
from service.domain.spec import InterfaceSpec, parse_spec
from service.domain.state import State, evolve
from service.domain.token import Token
from service.domain.values import Address, CommandId, InterfaceId, InterfaceName, NodeId, parse_cidr

NODE = NodeId("0123456789ab")
CLASSIC = cmd.Request(via="classic")
V1 = cmd.Request(via="v1")


def interface_id(number: int) -> InterfaceId:
    return InterfaceId(f"00000000-0000-7000-8000-{number:012x}")


def token(number: int = 1) -> Token:
    return Token(NODE, interface_id(number))


def addr(text: str) -> Address:
    return parse_cidr(text, "address")


def name(text: str = "tun0") -> InterfaceName:
    return InterfaceName(text)


def spec(**fields: Any) -> InterfaceSpec:
    return parse_spec({"name": "tun0", **fields})


def submission(command: cmd.Command, *, command_id: str = "c1", request: cmd.Request = V1) -> cmd.Submission:
    return cmd.Submission((command,), CommandId(command_id), "uid:0", request)


def judge(state: State, given: cmd.Submission, host: Host, new_id: InterfaceId) -> ev.Intent:
    """The one intent that a submission of one command comes to."""
    (intent,) = decide(state, given, host, lambda: new_id)
    return intent


class Log:
    """A log in memory: numbers what is appended, as the writer does, and keeps the state that follows from it."""

    def __init__(self) -> None:
        self.events: list[ev.Recorded] = []
        self.state = State()
        self._versions: dict[str, int] = {}

    def record(self, body: ev.Event, command_id: str | None = "c1", **changed: Any) -> ev.Recorded:
        """The event as it would be recorded next; not appended."""
        which = getattr(body, "interface_id", None)
        stream = ev.node_stream(NODE) if which is None else ev.interface_stream(which)
        position = len(self.events) + 1
        fields: dict[str, Any] = {
            "position": position,
            "event_id": f"e{position}",
            "stream": stream,
            "version": self._versions.get(stream, 0) + 1,
            "actor": "uid:0",
            "command_id": None if command_id is None else CommandId(command_id),
            "node": NODE,
            "recorded_at": f"2026-01-01T00:00:00.{position:06d}Z",
            "hash": f"h{position}",
            "body": body,
            **changed,
        }
        return ev.Recorded(**fields)

    def append(self, body: ev.Event, command_id: str | None = "c1") -> ev.Recorded:
        """Record it and take it into the state; refused events are not kept."""
        event = self.record(body, command_id)
        evolve(self.state, event)
        self.events.append(event)
        self._versions[event.stream] = event.version
        return event


def declared(number: int = 1, *, request: cmd.Request = V1, **fields: Any) -> ev.InterfaceDeclared:
    wanted = spec(**fields)
    return ev.InterfaceDeclared(interface_id=interface_id(number), name=wanted.name, spec=wanted, request=request)


def reconfigured(number: int = 1, **fields: Any) -> ev.InterfaceReconfigured:
    wanted = spec(**fields)
    return ev.InterfaceReconfigured(
        interface_id=interface_id(number), name=wanted.name, spec=wanted, changes=[], request=V1
    )


def enabled(number: int = 1) -> ev.ProcessingEnabled:
    return ev.ProcessingEnabled(interface_id=interface_id(number), name=name(), request=V1)


def disabled(number: int = 1) -> ev.ProcessingDisabled:
    return ev.ProcessingDisabled(interface_id=interface_id(number), name=name(), request=V1)


def retired(number: int = 1) -> ev.InterfaceRetired:
    return ev.InterfaceRetired(interface_id=interface_id(number), name=name(), request=V1)


def applied(number: int = 1) -> ev.CommandApplied:
    return ev.CommandApplied(interface_id=interface_id(number), name=name(), by="command", took_us=1, steps=[])


def failed(number: int = 1) -> ev.CommandFailed:
    return ev.CommandFailed(
        interface_id=interface_id(number),
        name=name(),
        by="command",
        took_us=1,
        code="kernel_refused",
        message="no",
        errno="EINVAL",
        undone=True,
    )
