"""Events to bytes and back, their hashes, and the upcasting of old payloads.

The payload is canonical JSON (RFC 8785) and kept as it was written: hashes are over those exact bytes, whatever later
releases make of them. msgspec writes it, forty times as fast as rfc8785, which a test holds it to: payloads have ASCII
keys, no fractions, and no integers beyond 2^53. Type names are stable and no import paths.
"""

import hashlib
import ipaddress
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.values import Address, CommandId, NodeId

GENESIS = "0" * 64  # the previous hash of the first event

# Type name -> (schema version written today, class).
TYPES: Final[Mapping[str, tuple[int, type[ev.Event]]]] = {
    "InterfaceDeclared": (3, ev.InterfaceDeclared),
    "InterfaceReconfigured": (3, ev.InterfaceReconfigured),
    "ProcessingEnabled": (1, ev.ProcessingEnabled),
    "ProcessingDisabled": (1, ev.ProcessingDisabled),
    "InterfaceRetired": (1, ev.InterfaceRetired),
    "ChangeConfirmed": (1, ev.ChangeConfirmed),
    "CommandApplied": (1, ev.CommandApplied),
    "CommandFailed": (1, ev.CommandFailed),
    "DriftDetected": (1, ev.DriftDetected),
    "DriftRepaired": (1, ev.DriftRepaired),
    "RepairFailed": (1, ev.RepairFailed),
    "DriftEnded": (1, ev.DriftEnded),
    "InterfaceContested": (1, ev.InterfaceContested),
    "ContestEnded": (1, ev.ContestEnded),
    "ReconcileRequested": (1, ev.ReconcileRequested),
    "OrphanRemoved": (1, ev.OrphanRemoved),
    "WorkerExited": (1, ev.WorkerExited),
    "ProcessorCrashed": (1, ev.ProcessorCrashed),
    "CaptureStarted": (1, ev.CaptureStarted),
    "CaptureStopped": (1, ev.CaptureStopped),
    "ServiceStarted": (1, ev.ServiceStarted),
    "StartupReconciled": (1, ev.StartupReconciled),
    "ServiceStopped": (1, ev.ServiceStopped),
    "CommandRejected": (1, ev.CommandRejected),
}


def _drift_repaired(payload: dict[str, Any]) -> dict[str, Any]:
    """Before specs said what to do about drift, it was always repaired."""
    return payload | {"spec": payload["spec"] | {"drift": "repair"}}


def _chain_empty(payload: dict[str, Any]) -> dict[str, Any]:
    """Before packets could be processed they were counted only, as they came, in the service's own namespace."""
    spec = payload["spec"]
    processing = spec["processing"] | {"chain": [], "offloads": "off"}
    return payload | {"spec": spec | {"netns": None, "processing": processing}}


# (type name, schema version) -> payload of that version to payload of the next.
UPCASTERS: Final[Mapping[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    ("InterfaceDeclared", 1): _drift_repaired,
    ("InterfaceReconfigured", 1): _drift_repaired,
    ("InterfaceDeclared", 2): _chain_empty,
    ("InterfaceReconfigured", 2): _chain_empty,
}


def _encode_value(value: object) -> object:
    if isinstance(value, Address):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _decode_value(kind: type, value: object) -> object:
    """Trusted: what the log holds was valid when it was written, and must stay readable when rules change."""
    if kind is Address and isinstance(value, str):
        host, _, length = value.partition("/")
        return Address(ipaddress.ip_address(host), int(length))
    raise TypeError(f"cannot make {kind.__name__} from {value!r}")


_DECODERS: Final = {
    name: msgspec.json.Decoder(kind, dec_hook=_decode_value) for name, (_version, kind) in TYPES.items()
}


_ENCODER: Final = msgspec.json.Encoder(enc_hook=_encode_value, order="sorted")


def encode(body: ev.Event) -> tuple[str, int, str]:
    """An event as (type name, schema version, canonical JSON)."""
    name = type(body).__name__
    return name, TYPES[name][0], _ENCODER.encode(body).decode()


def decode(name: str, version: int, payload: str) -> ev.Event:
    """The event that a stored payload means today.

    Raises:
        TunledgerError: log_corrupt, for a type or version of a newer release, or a payload that does not fit.
    """
    known = TYPES.get(name)
    try:
        if known is None or version > known[0]:
            raise TunledgerError(
                ErrorCode.LOG_CORRUPT, f"event type {name} version {version} is of a newer tunledger than this one"
            )
        while version < known[0]:
            payload = msgspec.json.encode(UPCASTERS[name, version](msgspec.json.decode(payload))).decode()
            version += 1
        return _DECODERS[name].decode(payload)
    except (msgspec.MsgspecError, LookupError, ValueError, TypeError) as error:
        raise TunledgerError(
            ErrorCode.LOG_CORRUPT, f"a {name} payload of version {version} does not read: {error}"
        ) from error


def chain_hash(
    previous: str,
    position: int,
    event_id: str,
    stream: str,
    version: int,
    kind: str,
    schema_version: int,
    actor: str,
    command_id: str | None,
    node: str,
    recorded_at: str,
    payload: str,
) -> str:
    """SHA-256, in hex, over the previous hash and the event's own columns, one on a line, the payload last.

    No column can hold a line break (the writer refuses one), so two different events never give the same text.
    """
    text = (
        f"{previous}\n{position}\n{event_id}\n{stream}\n{version}\n{kind}\n{schema_version}\n{actor}\n"
        f"{command_id or ''}\n{node}\n{recorded_at}\n{payload}"
    )
    return hashlib.sha256(text.encode()).hexdigest()


def recorded(row: Any) -> ev.Recorded:
    """A row of `events` as the event it holds. Raises TunledgerError: log_corrupt."""
    return ev.Recorded(
        position=row.position,
        event_id=row.event_id,
        stream=row.stream,
        version=row.version,
        actor=row.actor,
        command_id=None if row.command_id is None else CommandId(row.command_id),
        node=NodeId(row.node),
        recorded_at=row.recorded_at,
        hash=row.hash,
        body=decode(row.type, row.schema_version, row.payload),
    )
