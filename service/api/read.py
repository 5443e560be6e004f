"""The log as people read it: one entry for each change, with its outcome beside its intent."""

from collections.abc import Sequence
from typing import Any

from service.domain import events as ev
from service.store.reader import LogReader


class LogView:
    """Reads for answers. Blocking: call it in a thread."""

    def __init__(self, reader: LogReader) -> None:
        self._reader = reader

    def history(self, name: str | None, limit: int) -> list[dict[str, Any]]:
        """The latest entries, newest first. An outcome whose intent is older than the page has it looked up."""
        recorded = self._reader.history(name, limit=limit * 2)  # an entry is at most two events
        intents = {e.command_id for e in recorded if isinstance(e.body, ev.Intent)}
        for event in list(recorded):
            if isinstance(event.body, ev.Outcome) and event.command_id not in intents and event.command_id:
                recorded += [e for e in self._reader.command(event.command_id) if isinstance(e.body, ev.Intent)]
        return entries(recorded)[:limit]


def entries(recorded: Sequence[ev.Recorded]) -> list[dict[str, Any]]:
    """Join intents with their outcomes; everything else is an entry of its own. Newest first."""
    outcomes = {e.command_id: e for e in recorded if isinstance(e.body, ev.Outcome)}
    return [
        entry(event, outcomes.get(event.command_id))
        for event in sorted(recorded, key=lambda event: event.position, reverse=True)
        if not isinstance(event.body, ev.Outcome)
    ]


def entry(event: ev.Recorded, outcome: ev.Recorded | None = None) -> dict[str, Any]:
    """One line of history: when, who, what, why, what came of it, how long it took."""
    body = event.body
    told: dict[str, Any] = {
        "position": event.position,
        "recorded_at": event.recorded_at,
        "actor": event.actor,
        "user": "",
        "command_id": event.command_id,
        "event": type(body).__name__,
        "name": getattr(body, "name", None),
        "interface_id": getattr(body, "interface_id", None),
        "what": what(body),
        "origin": "client" if event.command_id else "service",
        "outcome": None,
        "message": None,
        "took_us": getattr(body, "took_us", None),
    }
    if isinstance(body, ev.Intent | ev.CommandRejected):
        told["user"] = body.request.user
        told["peer"] = body.request.peer
        told["via"] = body.request.via
        told["reason"] = body.request.reason
    match body:
        case ev.CommandRejected():
            told |= {"outcome": "rejected", "message": body.message, "code": body.code}
        case ev.RepairFailed():
            told |= {"outcome": "failed", "message": body.message, "code": body.code}
        case ev.DriftRepaired():
            told |= {"outcome": "repaired", "steps": body.steps}
        case (
            ev.InterfaceDeclared()
            | ev.InterfaceReconfigured()
            | ev.ProcessingEnabled()
            | ev.ProcessingDisabled()
            | ev.InterfaceRetired()
        ):
            told |= _outcome(outcome)
        case _:
            pass
    return told


def _outcome(outcome: ev.Recorded | None) -> dict[str, Any]:
    if outcome is None:
        return {"outcome": "pending"}
    body = outcome.body
    assert isinstance(body, ev.Outcome)
    told: dict[str, Any] = {"took_us": body.took_us, "finished_at": outcome.recorded_at, "by": body.by}
    if isinstance(body, ev.CommandApplied):
        return told | {"outcome": "applied", "steps": body.steps}
    return told | {
        "outcome": "failed",
        "message": body.message,
        "code": body.code,
        "errno": body.errno,
        "undone": body.undone,
    }


def what(body: ev.Event) -> str:
    """What an event says, in a few words."""
    match body:
        case ev.InterfaceDeclared():
            spec = body.spec
            addresses = " ".join(map(str, spec.addresses))
            return f"create {spec.mode.value} {addresses} mtu {spec.mtu}"
        case ev.InterfaceReconfigured():
            changed = ", ".join(f"{c['path']} {_text(c['old'])} -> {_text(c['new'])}" for c in body.changes)
            return f"configure {changed or '(nothing new)'}"
        case ev.ProcessingEnabled():
            return "start processing"
        case ev.ProcessingDisabled():
            return "stop processing"
        case ev.InterfaceRetired():
            return "delete"
        case ev.DriftDetected():
            found = "; ".join(
                f"{d['path']}: desired {_text(d['desired'])}, observed {_text(d['observed'])}" for d in body.differences
            )
            return f"drift ({body.cause}): {found}"
        case ev.DriftRepaired():
            return f"repair: {'; '.join(body.steps)}"
        case ev.RepairFailed():
            return "repair"
        case ev.OrphanRemoved():
            return f"remove orphan (ifindex {body.ifindex})"
        case ev.WorkerExited():
            return (
                f"worker {body.worker} (pid {body.pid}) died: {body.status}; it read {', '.join(body.devices) or '-'}"
            )
        case ev.ServiceStarted():
            return f"service {body.version} started (pid {body.pid}) on {body.address}"
        case ev.StartupReconciled():
            return f"start-up: {_counts(body)}"
        case ev.ServiceStopped():
            return f"service stopped ({body.reason}), interfaces: {body.interfaces}"
        case ev.CommandRejected():
            more = f" (and {body.suppressed} more refusals)" if body.suppressed else ""
            return f"{body.command}{more}"
        case ev.CommandApplied() | ev.CommandFailed():
            return type(body).__name__


def _counts(body: ev.StartupReconciled) -> str:
    parts = (
        ("recreated", body.recreated),
        ("repaired", body.repaired),
        ("adopted", body.adopted),
        ("orphans removed", body.orphans_removed),
        ("commands finished", body.finished),
        ("processing resumed", body.processing_resumed),
        ("FAILED", body.failed),
    )
    return "; ".join(f"{label}: {', '.join(names)}" for label, names in parts if names) or "nothing to do"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return "absent" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
