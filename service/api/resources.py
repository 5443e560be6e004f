"""How interfaces, commands and plans look in /api/v1. Pure: values in, JSON out."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Final

import msgspec

from service.domain import events as ev
from service.domain import steps as st
from service.domain.observed import ObservedLink
from service.domain.plan import Difference
from service.domain.remarks import declared_modes, remarks
from service.domain.spec import Processing, changes, spec_to_json
from service.domain.state import Interface, Unconfirmed
from service.domain.values import Mode
from service.reconcile.answer import Preview
from service.reconcile.engine import Engine
from service.reconcile.troubles import Trouble
from service.store.codec import encode

MISSING: Final = "the link is missing"


def interface_resource(
    interface: Interface,
    link: ObservedLink | None,
    *,
    trouble: Trouble | None,
    awaiting: Unconfirmed | None,
    counters: dict[str, dict[str, int]],
    running: bool,
    applied: Processing | None = None,
    retry_in_s: float | None = None,
    missing: str = MISSING,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """An interface: what is desired of it, and what is known of it.

    Args:
        missing: why, where there is no link.
        notes: there where there are some.
    """
    spec = interface.spec if interface.spec is not None else interface.wanted
    if interface.pending is not None:
        state = "pending"
    elif trouble is not None or (link is None and interface.spec is not None):
        state = "degraded"
    else:
        state = "applied"
    reason = trouble.message if trouble is not None else missing if state == "degraded" else None
    return {
        "id": interface.id,
        "spec": spec_to_json(spec) if spec is not None else None,
        "status": {
            "state": state,
            "reason": reason,
            "since": trouble.since if trouble is not None else None,
            "attempts": trouble.attempts if trouble is not None else 0,
            "retry_in_s": round(retry_in_s, 1) if retry_in_s is not None else None,
            "command_id": interface.pending.command_id if interface.pending is not None else None,
            "generation": interface.generation + (1 if interface.pending is not None else 0),
            "observed_generation": interface.generation,
            "awaiting_confirmation": None
            if awaiting is None
            else {"command_id": awaiting.command_id, "confirm_by": awaiting.confirm_by},
            "declared_at": interface.declared_at,
            **_observed(link, running, applied),
            "counters": counters,
            **({"notes": list(notes)} if notes else {}),
        },
        "generation": interface.generation,
    }


def _observed(link: ObservedLink | None, running: bool, applied: Processing | None) -> dict[str, Any]:
    """What the kernel says; null where there is no link."""
    if link is None:
        return {"ifindex": None, "operstate": None, "carrier": None, "observed": None}
    return {
        "ifindex": link.ifindex,
        "operstate": link.operstate,
        "carrier": link.carrier,
        "observed": {
            "name": link.name,
            "mode": link.mode.value if link.mode is not None else None,
            "addresses": [str(address) for address in link.addresses],
            "mtu": link.mtu,
            "up": link.up,
            "txqueuelen": link.txqueuelen,
            "owner": link.owner,
            "group": link.group,
            "multi_queue": link.multi_queue,
            "mac": link.mac or None,
            "netns": link.netns,
            "processing": {
                "running": running,
                "chain": [dict(stage) for stage in applied.chain] if applied is not None else [],
                "offloads": applied.offloads.value if applied is not None else None,
            },
        },
    }


async def present(engine: Engine, interfaces: Sequence[Interface]) -> list[dict[str, Any]]:
    """Interfaces as they are now: one look at the kernel for all of them."""
    seen = await engine.observe_all(interfaces)
    modes = declared_modes(engine.state)
    return [
        of_engine(engine, i, seen[i.id].link, running=seen[i.id].attached, modes=modes, applied=seen[i.id].applied)
        for i in interfaces
    ]


def of_engine(
    engine: Engine,
    interface: Interface,
    link: ObservedLink | None,
    *,
    running: bool,
    modes: Mapping[str, Mode],
    applied: Processing | None = None,
) -> dict[str, Any]:
    """An interface with what the engine knows of it, and of others: their `modes`."""
    return interface_resource(
        interface,
        link,
        trouble=engine.troubles.get(interface.id),
        awaiting=engine.state.unconfirmed.get(interface.name),
        counters=engine.totals(interface.id),
        running=running,
        applied=applied,
        retry_in_s=engine.retry_in_s(interface.id),
        notes=remarks(interface.wanted, modes) if interface.wanted is not None else (),
    )


def step_json(step: st.Step) -> dict[str, Any]:
    """A step with its parts: {"step": "SetMtu", "ip": "ip link set tun0 mtu 1400", "name": "tun0", "mtu": 1400}."""
    parts = {field.name: _plain(getattr(step, field.name)) for field in fields(step)}
    if parts.get("netns", "") is None:  # as good as all are in the service's own
        del parts["netns"]
    return {"step": type(step).__name__, "ip": str(step), **parts}


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, bool | int) else str(value)


def plan_json(
    name: str, differences: Sequence[Difference], steps: Sequence[st.Step], reason: str | None = None
) -> dict[str, Any]:
    """What differs on one interface, and what would be done: as lines to read and as values."""
    return {
        "name": name,
        "differences": [difference.to_json() for difference in differences],
        "commands": [str(step) for step in steps],
        "steps": [step_json(step) for step in steps],
        "reason": reason,
    }


def preview_json(preview: Preview) -> dict[str, Any]:
    """The answer to a dry run: nothing of it has happened."""
    return {
        "dry_run": True,
        "plan": [plan_json(*each) for each in preview.plans],
        "events": [event_json(intent) for intent in preview.intents],
    }


def event_json(event: ev.Event) -> dict[str, Any]:
    """An event as it would be written: its name and version in the log, and its payload."""
    kind, version, payload = encode(event)
    return {"type": kind, "schema_version": version, "payload": msgspec.json.decode(payload)}


def command_json(recorded: Sequence[ev.Recorded]) -> dict[str, Any]:
    """What became of a command, from its events."""
    first = recorded[0]
    intents = [event for event in recorded if isinstance(event.body, ev.Intent)]
    outcomes = {
        event.body.interface_id: event
        for event in recorded
        if isinstance(event.body, ev.CommandApplied | ev.CommandFailed)
    }
    interfaces = []
    for event in intents:
        body = event.body
        assert isinstance(body, ev.Intent)
        outcome = outcomes.get(body.interface_id)
        interfaces.append(
            {
                "interface_id": body.interface_id,
                "name": body.name,
                "intent": type(body).__name__,
                "changes": intent_changes(body),
                **outcome_json(outcome),
            }
        )
    rejected = next((event.body for event in recorded if isinstance(event.body, ev.CommandRejected)), None)
    confirmed = next((event.body for event in recorded if isinstance(event.body, ev.ChangeConfirmed)), None)
    if rejected is not None:
        state = "rejected"
    elif confirmed is not None:
        state = "applied"
    elif len(outcomes) < len(intents):
        state = "pending"
    else:
        state = "applied" if all(i["outcome"] == "applied" for i in interfaces) else "failed"
    body = first.body
    request = body.request if isinstance(body, ev.Intent | ev.CommandRejected | ev.ChangeConfirmed) else None
    return {
        "command_id": first.command_id,
        "state": state,
        "recorded_at": first.recorded_at,
        "actor": first.actor,
        "user": request.user if request is not None else "",
        "reason": request.reason if request is not None else "",
        "confirm_by": (request.confirm_by or None) if request is not None else None,
        "confirms": confirmed.confirms if confirmed is not None else None,
        "message": rejected.message if rejected is not None else None,
        "code": rejected.code if rejected is not None else None,
        "interfaces": interfaces,
    }


def outcome_json(outcome: ev.Recorded | None) -> dict[str, Any]:
    """The outcome beside an intent; `pending` while there is none."""
    if outcome is None:
        return {"outcome": "pending", "took_us": None, "by": None, "message": None, "code": None, "errno": None}
    body = outcome.body
    assert isinstance(body, ev.CommandApplied | ev.CommandFailed)
    told: dict[str, Any] = {"took_us": body.took_us, "by": body.by, "finished_at": outcome.recorded_at}
    if isinstance(body, ev.CommandApplied):
        return told | {"outcome": "applied", "message": None, "code": None, "errno": None, "steps": body.steps}
    return told | {
        "outcome": "failed",
        "message": body.message,
        "code": body.code,
        "errno": body.errno,
        "undone": body.undone,
    }


def intent_changes(body: ev.Intent) -> list[dict[str, Any]]:
    """The fields that an intent changes, with old and new value."""
    match body:
        case ev.InterfaceDeclared():
            return changes(None, spec_to_json(body.spec))
        case ev.InterfaceReconfigured():
            return body.changes
        case ev.ProcessingEnabled():
            return [{"path": "processing.running", "old": False, "new": True}]
        case ev.ProcessingDisabled():
            return [{"path": "processing.running", "old": True, "new": False}]
        case ev.InterfaceRetired():
            return [{"path": "", "old": body.name, "new": None}]
