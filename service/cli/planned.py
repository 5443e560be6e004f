"""What a dry run says would happen, for people: like a diff, with the lines that `ip` would take."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from service.cli import show

DRY_RUN = "a dry run: nothing was changed"

_SIGNS = {"create": ("+", "green"), "change": ("~", "yellow"), "delete": ("-", "red"), "mend": ("~", "yellow")}
_ACTIONS = {
    "InterfaceDeclared": "create",
    "InterfaceReconfigured": "change",
    "ProcessingEnabled": "start",
    "ProcessingDisabled": "stop",
    "InterfaceRetired": "delete",
    "ChangeConfirmed": "confirm",
}
_TOLD = ("mode", "addresses", "mtu")  # of a new interface; the rest only where it is not what it is by itself
_UNTOLD: Mapping[str, Any] = {
    "up": True,
    "txqueuelen": 1000,
    "owner": None,
    "group": None,
    "multi_queue": False,
    "mac": None,
    "netns": None,
    "processing": {"running": False, "chain": [], "offloads": "auto"},
    "drift": "repair",
    "description": "",
    "labels": {},
}


@dataclass(frozen=True, slots=True)
class Entry:
    """What would happen to one interface.

    Attributes:
        action: create, change, start, stop, delete, or mend.
        changes: old and new value by path, as lines.
        commands: what would be done, as `ip` would be told.
        anew: whether the device would be removed and made again.
        refusal: why it cannot be done, or None.
    """

    name: str
    action: str
    changes: tuple[str, ...]
    commands: tuple[str, ...]
    anew: bool = False
    refusal: str | None = None


def ordered(answer: Mapping[str, Any]) -> list[Entry]:
    """The entries of the answer to a write with dry_run: what would be recorded, and what would be done."""
    plans = {plan["name"]: plan for plan in answer["plan"]}
    found = []
    for event in answer["events"]:
        payload, action = event["payload"], _ACTIONS[event["type"]]
        plan = plans.get(payload["name"], {"commands": [], "steps": []})
        found.append(
            Entry(payload["name"], action, _changes(action, payload), tuple(plan["commands"]), anew=_is_anew(plan))
        )
    return found


def mending(plans: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """The entries of what a reconciliation would do: what differs, as dotted paths, and the way back."""
    return [
        Entry(
            plan["name"],
            "mend",
            tuple(
                f"{d['path']}: desired {show.value(d['desired'])}, observed {show.value(d['observed'])}"
                for d in plan["differences"]
            ),
            tuple(plan["commands"]),
            anew=_is_anew(plan),
            refusal=plan["reason"],
        )
        for plan in plans
    ]


def _changes(action: str, payload: Mapping[str, Any]) -> tuple[str, ...]:
    match action:
        case "create":
            return tuple(new_interface(payload["spec"]))
        case "change":
            return tuple(show.changes(payload["changes"])) or ("nothing: it is so already",)
        case "start":
            return ("processing.running: no -> yes",)
        case "stop":
            return ("processing.running: yes -> no",)
        case _:
            return ()


def new_interface(spec: Mapping[str, Any]) -> list[str]:
    """What is worth telling of an interface that was not there, a line for each field."""
    told = [*_TOLD, *(key for key, untold in _UNTOLD.items() if spec.get(key, untold) != untold)]
    return [f"{key}: {show.value(spec[key])}" for key in told]


def _is_anew(plan: Mapping[str, Any]) -> bool:
    kinds = [step["step"] for step in plan["steps"]]
    return "DeleteLink" in kinds and "CreateLink" in kinds


def tell(entries: Sequence[Entry], *, err: bool = False) -> None:
    """Write entries to standard output, or to standard error."""
    stream = sys.stderr if err else sys.stdout

    def line(text: str, **style: Any) -> None:
        click.echo(click.style(text, **style) if show.coloured(stream) else text, err=err)

    for entry in entries:
        sign, colour = _SIGNS.get(entry.action, ("~", "yellow"))
        anew = ", made anew: new ifindex, its users are cut off" if entry.anew else ""
        line(f"{sign} {entry.name}: {entry.action}{anew}", fg=colour, bold=True)
        for change in entry.changes:
            line(f"    {change}")
        for command in entry.commands:
            line(f"      {command}", dim=True)
        if entry.refusal is not None:
            line(f"    cannot be done: {entry.refusal}", fg="red")
