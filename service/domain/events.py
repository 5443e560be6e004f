"""Everything the log can say: three families of events, and the envelope a recorded one comes in.

Intents and the outcomes of their commands make desired state; observations feed status and audit only. A field is
never renamed or given a new meaning: raise the event's schema version and add an upcaster (`service.store.codec`).
"""

from typing import Any, Literal

import msgspec

from service.domain.commands import Request
from service.domain.spec import InterfaceSpec
from service.domain.values import CommandId, InterfaceId, InterfaceName, NodeId

Change = dict[str, Any]  # {"path": dotted, "old": JSON, "new": JSON}
FoundDifference = dict[str, Any]  # {"path": dotted, "desired": JSON, "observed": JSON}
FinishedBy = Literal["command", "recovery"]


class InterfaceDeclared(msgspec.Struct, frozen=True, kw_only=True):
    """Intent: this interface shall exist."""

    interface_id: InterfaceId
    name: InterfaceName
    spec: InterfaceSpec
    request: Request


class InterfaceReconfigured(msgspec.Struct, frozen=True, kw_only=True):
    """Intent: the interface shall look like `spec`; `changes` says what is new in it."""

    interface_id: InterfaceId
    name: InterfaceName
    spec: InterfaceSpec
    changes: list[Change]
    request: Request


class ProcessingEnabled(msgspec.Struct, frozen=True, kw_only=True):
    """Intent: our workers shall read the device."""

    interface_id: InterfaceId
    name: InterfaceName
    request: Request


class ProcessingDisabled(msgspec.Struct, frozen=True, kw_only=True):
    """Intent: our workers shall let go of the device."""

    interface_id: InterfaceId
    name: InterfaceName
    request: Request


class InterfaceRetired(msgspec.Struct, frozen=True, kw_only=True):
    """Intent: the interface shall be gone for good."""

    interface_id: InterfaceId
    name: InterfaceName
    request: Request


class CommandApplied(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome: the kernel was seen to be as the intent wants it. `took_us` counts from the intent's recording."""

    interface_id: InterfaceId
    name: InterfaceName
    by: FinishedBy
    took_us: int
    steps: list[str]


class CommandFailed(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome: it could not be done; desired state is what it was before, and partial work was undone (or not)."""

    interface_id: InterfaceId
    name: InterfaceName
    by: FinishedBy
    took_us: int
    code: str
    message: str
    errno: str | None
    undone: bool


class ChangeConfirmed(msgspec.Struct, frozen=True, kw_only=True):
    """Intent without effect on the kernel: the change that `confirms` made is to stay."""

    interface_id: InterfaceId
    name: InterfaceName
    confirms: CommandId
    request: Request


class DriftDetected(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: the host differs from what is desired.

    `cause`: shutdown, reboot, worker_exit, outside (the kernel told of a change that is not ours), where a link was
    moved to, or unknown.
    """

    interface_id: InterfaceId
    name: InterfaceName
    cause: str
    differences: list[FoundDifference]


class DriftRepaired(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: a difference was mended and the result verified."""

    interface_id: InterfaceId
    name: InterfaceName
    steps: list[str]
    took_us: int


class RepairFailed(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: a difference could not be mended; it is tried again later."""

    interface_id: InterfaceId
    name: InterfaceName
    code: str
    message: str
    errno: str | None


class DriftEnded(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: a difference that was reported, not repaired (`drift: report`), is there no more."""

    interface_id: InterfaceId
    name: InterfaceName


class InterfaceContested(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: somebody changes the interface again after each repair; from now on repairs come slowly.

    `repairs` were needed within `within_s` seconds; `differences` are what was found the last time.
    """

    interface_id: InterfaceId
    name: InterfaceName
    repairs: int
    within_s: int
    differences: list[FoundDifference]


class ContestEnded(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: nobody has changed a contested interface for `quiet_s` seconds; repairs are prompt again."""

    interface_id: InterfaceId
    name: InterfaceName
    quiet_s: int


class ReconcileRequested(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: a client asked for the host to be compared with the log, and mended, now."""

    request: Request


class OrphanRemoved(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: a link with our token that nothing declares any more was removed."""

    interface_id: InterfaceId
    name: str
    ifindex: int


class WorkerExited(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: a packet worker died. `devices` are the names of the interfaces it was reading."""

    worker: int
    pid: int
    status: str
    devices: list[str]


class ProcessorCrashed(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: a processor in an interface's chain took its worker down.

    `stage` is its place in the chain, `status` how the worker ended, `error` what Python said (empty if it did not come
    to that). `packet` is the start, in hexadecimal, of the packet that was being processed, of `packet_bytes` bytes.
    `then`: restart (the device is read again, with the processor) or bypass (without it).
    """

    interface_id: InterfaceId
    name: InterfaceName
    worker: int
    pid: int
    stage: int
    processor: str
    status: str
    error: str
    packet: str
    packet_bytes: int
    then: str


class CaptureStarted(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: somebody asked for the packets of an interface, and gets them from now on.

    `settings` are those of the processor `capture`; `live` says that they go to the caller and to no file.
    """

    interface_id: InterfaceId
    name: InterfaceName
    capture_id: str
    live: bool
    settings: dict[str, Any]
    request: Request


class CaptureStopped(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: a capture ended, with all that it got.

    `reason`: asked, finished (a limit of its own), client_gone, interface_gone (or its processing stopped),
    worker_exit, moved (to another worker), refused (it never began), disk_full, write_failed, shutdown or crash (found
    at start-up; the figures are then 0).
    """

    interface_id: InterfaceId
    name: InterfaceName
    capture_id: str
    reason: str
    packets: int
    bytes: int
    dropped: int


class ServiceStarted(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: a service opened the log and is about to reconcile."""

    pid: int
    version: str
    boot_id: str
    uid: int
    address: str


class StartupReconciled(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: what start-up found and did, by interface name; the summary a person reads."""

    took_us: int
    recreated: list[str]
    repaired: list[str]
    adopted: list[str]
    orphans_removed: list[str]
    finished: list[str]
    processing_resumed: list[str]
    failed: list[str]


class ServiceStopped(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: an orderly stop. `interfaces`: "remove" or "keep", recorded before any is removed."""

    pid: int
    reason: str
    interfaces: str


class CommandRejected(msgspec.Struct, frozen=True, kw_only=True):
    """Observation: a command was refused before it became an intent. `suppressed`: how many more went unrecorded."""

    name: str
    command: str
    code: str
    message: str
    field: str | None
    request: Request
    suppressed: int


Intent = InterfaceDeclared | InterfaceReconfigured | ProcessingEnabled | ProcessingDisabled | InterfaceRetired
Outcome = CommandApplied | CommandFailed
Observation = (
    DriftDetected
    | DriftRepaired
    | RepairFailed
    | DriftEnded
    | InterfaceContested
    | ContestEnded
    | ReconcileRequested
    | OrphanRemoved
    | WorkerExited
    | ProcessorCrashed
    | CaptureStarted
    | CaptureStopped
    | ServiceStarted
    | StartupReconciled
    | ServiceStopped
    | CommandRejected
)
Event = Intent | Outcome | ChangeConfirmed | Observation


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """An event on its way into the log; position, version and hash are the writer's to give.

    Attributes:
        expected_version: the stream's version the writer must find, or None where order does not matter.
    """

    event_id: str
    stream: str
    body: Event
    actor: str
    command_id: CommandId | None = None
    expected_version: int | None = None


class Recorded(msgspec.Struct, frozen=True, kw_only=True):
    """An event that is in the log. `recorded_at` is UTC, ISO 8601 with microseconds."""

    position: int
    event_id: str
    stream: str
    version: int
    actor: str
    command_id: CommandId | None
    node: NodeId
    recorded_at: str
    hash: str
    body: Event


def interface_stream(interface_id: InterfaceId) -> str:
    """The stream of everything about one interface, one incarnation."""
    return f"interface/{interface_id}"


def name_stream(name: str) -> str:
    """The stream of what was refused under a name."""
    return f"name/{name}"


def node_stream(node: NodeId) -> str:
    """The stream of the service itself."""
    return f"node/{node}"
