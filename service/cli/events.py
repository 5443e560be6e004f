"""`tunledger events`: the log as it was written, and with --follow as it is being written.

A stream that breaks is taken up where it was: the position of the last event goes back as Last-Event-ID, so that none
is missed and none comes twice.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import click

from service.cli import show
from service.cli.client import CallError
from service.cli.options import PAGE, USAGE, Remote, fail, refused, remote_options

INTERRUPTED = 128 + 2  # SIGINT, as shells count it
AGAIN_FIRST_S, AGAIN_MAX_S = 0.2, 5.0  # between two attempts to take up a broken stream
_COLOURS = {"CommandFailed": "red", "RepairFailed": "red", "CommandRejected": "yellow", "DriftDetected": "yellow"}


@click.command()
@remote_options
@click.option(
    "--follow", "-f", is_flag=True, help="Go on with what is being recorded, from now or --after; ^C ends it."
)
@click.option("--stream", help="Of this stream only, such as interface/ID.")
@click.option("--type", "types", multiple=True, help="Of this type only, such as CommandFailed; may be repeated.")
@click.option("--actor", help="By this actor only, such as uid:0 or system.")
@click.option("--command", "command_id", help="Of this command only.")
@click.option("--after", type=click.IntRange(0), metavar="POSITION", help="After this position.")
@click.option("--before", type=click.IntRange(0), metavar="POSITION", help="Before this position.")
@click.option("--from", "begin", metavar="TIME", help="Recorded then or later (UTC unless it says otherwise).")
@click.option("--to", "end", metavar="TIME", help="Recorded before.")
@click.option(
    "--limit", type=click.IntRange(1), help="The latest so many, 50 by default; with --follow, end after them."
)
@click.option("--all", "everything", is_flag=True, help="All there are.")
def events(
    remote: Remote,
    follow: bool,
    types: tuple[str, ...],
    begin: str | None,
    end: str | None,
    limit: int | None,
    everything: bool,
    **filters: Any,
) -> None:
    """The events of the log, oldest first. As JSON: one on each line.

    \b
    Examples:
      tunledger events --limit 10
      tunledger events --type CommandFailed --type RepairFailed --from 2026-11-22
      tunledger events --all -o json > log.ndjson
      tunledger events --follow --after 0 -o json
    """
    if everything and (follow or limit is not None):
        fail("--all goes neither with --follow nor with --limit", USAGE)
    wanted = {**filters, "type": ",".join(types) or None, "from": begin, "to": end}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    if follow:
        if begin is not None:
            wanted.setdefault("after", 0)  # what is there of that time already comes too
        try:
            _follow(remote, wanted, limit)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        return
    for event in _all(remote, wanted) if everything else reversed(_latest(remote, wanted, limit or 50)):
        _tell(remote, event)


def _latest(remote: Remote, wanted: Mapping[str, Any], limit: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor: str | None = None
    while len(found) < limit:
        page = remote.get("/events", order="desc", limit=min(PAGE, limit - len(found)), cursor=cursor, **wanted)
        found += page["events"]
        cursor = page["next"]
        if cursor is None:
            break
    return found


def _all(remote: Remote, wanted: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    cursor: str | None = None
    while True:
        page = remote.get("/events", limit=PAGE, cursor=cursor, **wanted)
        yield from page["events"]
        cursor = page["next"]
        if cursor is None:
            return


def _follow(remote: Remote, wanted: Mapping[str, Any], limit: int | None) -> None:
    """Pass events on until there were enough of them."""
    last: str | None = None
    told, pause_s = 0, AGAIN_FIRST_S
    while True:
        try:
            for event in remote.client.events("/api/v1/events/stream", wanted, after=last):
                last, pause_s = event.id or last, AGAIN_FIRST_S
                if event.kind == "dropped":
                    _note(json.loads(event.data)["reason"])
                elif event.data:
                    _tell(remote, json.loads(event.data))
                    told += 1
                if told == limit:
                    return
            _note("the stream ended; taking it up again")
        except CallError as error:
            if last is None or error.reachable:
                refused(error)
            _note(f"{error}; trying again")
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, AGAIN_MAX_S)


def _note(text: str) -> None:
    click.echo(show.styled(f"tunledger: {text}", dim=True), err=True)


def _tell(remote: Remote, event: Mapping[str, Any]) -> None:
    if remote.json:
        click.echo(json.dumps(event, ensure_ascii=False))
        return
    kind = event["type"]
    name = event["payload"].get("name") or ""
    line = f"{event['position']:>6}  {show.when(event['recorded_at'])}  {event['actor']:<8}"
    click.echo(f"{line}  {show.styled(kind.ljust(21), fg=_COLOURS.get(kind))}  {name:<10}  {_gist(event)}".rstrip())


def _gist(event: Mapping[str, Any]) -> str:
    """What an event says, on one line: what changed, why it failed, or its other fields as they are."""
    payload = event["payload"]
    match event["type"]:
        case "InterfaceReconfigured":
            return "; ".join(show.changes(payload["changes"]))
        case "InterfaceDeclared":
            spec = payload["spec"]
            return f"{spec['mode']} {show.value(spec['addresses'])} mtu {spec['mtu']}"
        case "DriftDetected" | "InterfaceContested":
            found = "; ".join(
                f"{d['path']}: desired {show.value(d['desired'])}, observed {show.value(d['observed'])}"
                for d in payload["differences"]
            )
            rounds = f"{payload['repairs']} repairs in {payload['within_s']} s; " if "repairs" in payload else ""
            return rounds + found
        case "CommandApplied" | "DriftRepaired":
            took = show.took(payload.get("took_us"))
            return "; ".join(payload["steps"]) + (f" ({took})" if took else "")
        case "CommandFailed" | "RepairFailed" | "CommandRejected":
            codes = ", ".join(payload[key] for key in ("code", "errno") if payload.get(key))
            return f"{payload['message']} ({codes})"
        case _:
            kept = (key for key in payload if key not in {"name", "interface_id", "request"} and payload[key])
            return "; ".join(f"{key} {show.value(payload[key])}" for key in kept)


COMMANDS = (events,)
