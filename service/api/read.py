"""The log as people read it: one entry for each change, with its outcome beside its intent."""

from collections.abc import Sequence
from typing import Any

from service.api.resources import command_json, intent_changes, outcome_json
from service.domain import events as ev
from service.domain.chain import is_chain, shown
from service.domain.errors import ErrorCode, TunledgerError
from service.store.reader import LogReader


class LogView:
    """Reads for answers. Blocking: call it in a thread."""

    def __init__(self, reader: LogReader) -> None:
        self._reader = reader

    def history(
        self, name: str | None, limit: int, *, interface_id: str | None = None, before: int | None = None
    ) -> tuple[list[dict[str, Any]], int | None]:
        """The latest entries before a position, newest first, and the position to go on from.

        An outcome whose intent is older than the page has it looked up.
        """
        # An entry is at most two events.
        recorded = self._reader.history(name, limit=limit * 2, interface_id=interface_id, before=before)
        whole = len(recorded) < limit * 2
        intents = {(e.command_id, e.stream) for e in recorded if isinstance(e.body, ev.Intent)}
        for event in list(recorded):
            if isinstance(event.body, ev.Outcome) and (event.command_id, event.stream) not in intents:
                recorded += [
                    e
                    for e in self._reader.command(event.command_id or "")
                    if isinstance(e.body, ev.Intent) and e.stream == event.stream
                ]
        answered = {(e.command_id, e.stream) for e in recorded if isinstance(e.body, ev.Outcome)}
        for event in list(recorded) if before is not None else []:  # its outcome may be on the page before
            if isinstance(event.body, ev.Intent) and (event.command_id, event.stream) not in answered:
                recorded += [
                    e
                    for e in self._reader.command(event.command_id or "")
                    if isinstance(e.body, ev.Outcome) and e.stream == event.stream
                ]
        found = entries(recorded)
        if before is not None:
            found = [entry for entry in found if entry["position"] < before]
        following = (
            found[limit - 1]["position"] if len(found) >= limit and not (whole and len(found) == limit) else None
        )
        return found[:limit], following

    def command(self, command_id: str) -> dict[str, Any]:
        """What became of a command. Raises TunledgerError: not_found."""
        recorded = self._reader.command(command_id)
        if not recorded:
            raise TunledgerError(ErrorCode.NOT_FOUND, f"the log has no command {command_id}")
        return command_json(recorded)


def entries(recorded: Sequence[ev.Recorded]) -> list[dict[str, Any]]:
    """Join intents with their outcomes; everything else is an entry of its own. Newest first."""
    outcomes = {(e.command_id, e.stream): e for e in recorded if isinstance(e.body, ev.Outcome)}
    return [
        entry(event, outcomes.get((event.command_id, event.stream)))
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
        "origin": _origin(event),
        "outcome": None,
        "message": None,
        "took_us": getattr(body, "took_us", None),
        "changes": [],
        "reason": "",
    }
    if isinstance(
        body, ev.Intent | ev.CommandRejected | ev.ChangeConfirmed | ev.CaptureStarted | ev.ReconcileRequested
    ):
        told["user"] = body.request.user
        told["peer"] = body.request.peer
        told["via"] = body.request.via
        told["reason"] = body.request.reason
    match body:
        case ev.CommandRejected():
            told |= {"outcome": "rejected", "message": body.message, "code": body.code}
        case ev.RepairFailed():
            told |= {"outcome": "failed", "message": body.message, "code": body.code}
        case ev.InterfaceContested():
            told["outcome"] = "contested"
        case ev.DriftRepaired():
            told |= {"outcome": "repaired", "steps": body.steps}
        case (
            ev.InterfaceDeclared()
            | ev.InterfaceReconfigured()
            | ev.ProcessingEnabled()
            | ev.ProcessingDisabled()
            | ev.InterfaceRetired()
        ):
            told |= outcome_json(outcome)
            told["changes"] = intent_changes(body)
            if told["by"] == "recovery":
                told["origin"] = "recovery"
        case ev.ChangeConfirmed():
            told["outcome"] = "applied"
        case _:
            pass
    return told


def _origin(event: ev.Recorded) -> str | None:
    """Whose doing it was: a client's, or a repair's; of the service's own comings and goings nobody's."""
    if event.actor != "system":
        return "client"
    told = (
        ev.Intent
        | ev.DriftDetected
        | ev.DriftRepaired
        | ev.RepairFailed
        | ev.DriftEnded
        | ev.InterfaceContested
        | ev.ContestEnded
        | ev.OrphanRemoved
    )
    return "repair" if isinstance(event.body, told) else None


def _found(differences: Sequence[ev.FoundDifference]) -> str:
    return "; ".join(
        f"{d['path']}: desired {_text(d['desired'])}, observed {_text(d['observed'])}" for d in differences
    )


def what(body: ev.Event) -> str:
    """What an event says, in a few words."""
    match body:
        case ev.InterfaceDeclared():
            spec = body.spec
            return " ".join(("create", spec.mode.value, *map(str, spec.addresses), "mtu", str(spec.mtu)))
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
            return f"drift ({body.cause}): {_found(body.differences)}"
        case ev.DriftRepaired():
            return f"repair: {'; '.join(body.steps)}"
        case ev.RepairFailed():
            return "repair"
        case ev.DriftEnded():
            return "drift is over"
        case ev.InterfaceContested():
            return f"contested: {body.repairs} repairs in {body.within_s} s; {_found(body.differences)}"
        case ev.ContestEnded():
            return f"contested no more: quiet for {body.quiet_s} s"
        case ev.ReconcileRequested():
            return "reconcile"
        case ev.OrphanRemoved():
            return f"remove orphan (ifindex {body.ifindex})"
        case ev.ProcessorCrashed():
            return f"{body.processor} (stage {body.stage}) took worker {body.worker} down: {body.error or body.status}"
        case ev.CaptureStarted():
            return f"capture {body.capture_id} started{' (live)' if body.live else ''}"
        case ev.CaptureStopped():
            figures = f"{body.packets} packets, {body.bytes} bytes, {body.dropped} dropped"
            return f"capture {body.capture_id} stopped ({body.reason}): {figures}"
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
        case ev.ChangeConfirmed():
            return f"confirm {body.confirms}"
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
    if is_chain(value):
        return shown(value)
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return "absent" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
