"""The commands on what was ordered and when: history, command, confirm, state and diff. `events` has its own module."""

from collections.abc import Mapping
from typing import Any

import click

from service.cli import interfaces, planned, show
from service.cli.options import (
    PAGE,
    Remote,
    Write,
    complete_names,
    remote_options,
    segment,
    write_options,
)

HISTORY_MAX = 100_000


@click.command()
@remote_options
@click.argument("name", required=False, shell_complete=complete_names)
@click.option("--id", "interface_id", help="Of one interface by its id; its name may have had others.")
@click.option("--limit", type=click.IntRange(1, HISTORY_MAX), default=50, show_default=True, help="The latest so many.")
@click.option("--changes", is_flag=True, help="With every field that changed, its old and its new value.")
def history(remote: Remote, name: str | None, interface_id: str | None, limit: int, changes: bool) -> None:
    """Who changed what, when, why, and what came of it. Of one NAME over all its interfaces, or of everything.

    \b
    Examples:
      tunledger history
      tunledger history tun0 --changes
      tunledger history --id 01a2038b-7057-7466-a5dd-bef09cbbcf81 -o json
    """
    path = f"/interfaces/{segment(name)}/history" if name else "/history"
    entries: list[dict[str, Any]] = []
    before: int | None = None
    while len(entries) < limit:
        page = remote.get(path, limit=min(PAGE, limit - len(entries)), before=before, id=interface_id)
        entries += page["history"]
        before = page.get("next")
        if before is None:
            break
    if remote.json:
        show.emit_json(entries)
        return
    columns = ["POS", "WHEN", "WHO", "NAME", "WHAT", "OUTCOME", "TOOK"]
    rows = [_history_row(entry, changes=changes) for entry in reversed(entries)]
    if any(entry["reason"] for entry in entries):
        columns.append("REASON")
        rows = [[*row, entry["reason"]] for row, entry in zip(rows, reversed(entries), strict=True)]
    show.table(columns, rows, right=("POS", "TOOK"))


def _history_row(entry: Mapping[str, Any], *, changes: bool) -> list[str]:
    errno = f" [{entry['errno']}]" if entry.get("errno") else ""
    lines = [entry["message"] + errno] if entry["message"] else []
    lines += show.changes(entry["changes"]) if changes else []
    origin = "" if entry["origin"] in {"client", None} else f", {entry['origin']}"
    return [
        str(entry["position"]),
        show.when(entry["recorded_at"]),
        who(entry) + origin,
        entry["name"] or "",
        "\n  ".join((entry["what"], *lines)),
        entry["outcome"] or "",
        show.took(entry["took_us"]),
    ]


def who(entry: Mapping[str, Any]) -> str:
    """The user that an actor was at the time, and the actor: "root (uid:0)"."""
    return f"{entry['user']} ({entry['actor']})" if entry["user"] else str(entry["actor"])


@click.command()
@remote_options
@click.argument("command_id")
def command(remote: Remote, command_id: str) -> None:
    """What became of a command. For when the answer was lost.

    \b
    Example:
      tunledger command 01a2038b-7055-734f-89e1-da408b408a73
    """
    found = remote.get(f"/commands/{segment(command_id)}")
    if remote.json:
        show.emit_json(found)
        return
    show.fields(
        [
            ("command", found["command_id"]),
            ("state", found["state"] + (f": {found['message']} ({found['code']})" if found["message"] else "")),
            ("when", show.when(found["recorded_at"])),
            ("who", who(found)),
            ("reason", found["reason"]),
            ("confirm by", show.when(found["confirm_by"])),
            ("confirms", found["confirms"] or ""),
        ]
    )
    for each in found["interfaces"]:
        took = f" in {show.took(each['took_us'])}" if each["took_us"] is not None else ""
        click.echo(f"{each['name']}: {each['intent']}, {each['outcome']}{took}")
        if each["message"]:
            click.echo(f"    {each['message']} ({each['code']}{', ' + each['errno'] if each['errno'] else ''})")
        for line in show.changes(each["changes"]):
            click.echo(f"    {line}")
        for line in each.get("steps", []):
            click.echo(show.styled(f"      {line}", dim=True))


@click.command()
@remote_options
@click.argument("command_id")
@write_options("reason", "dry_run")
def confirm(remote: Remote, write: Write, command_id: str) -> None:
    """Make a change stay that was ordered with --confirm-within.

    \b
    Examples:
      tunledger set tun0 --mtu 1400 --confirm-within 60
      tunledger confirm 01a2038b-7055-734f-89e1-da408b408a73
    """
    body = remote.write("POST", f"/commands/{segment(command_id)}/confirm", write).body
    if remote.json:
        show.emit_json(body)
    elif write.dry_run:
        planned.tell(planned.ordered(body))
        click.echo(planned.DRY_RUN)
    else:
        click.echo(f"confirmed: the change by command {command_id} stays")


@click.command()
@remote_options
@click.option("--at", metavar="POSITION|TIME", help="A position of the log, or a time (UTC unless it says otherwise).")
def state(remote: Remote, at: str | None) -> None:
    """All interfaces as they were desired at a position or time. Without --at, as they are now.

    \b
    Examples:
      tunledger state --at 1200
      tunledger state --at 2026-11-22T14:00
      tunledger state --at 2026-11-22T15:00+01:00 -o json
    """
    found = remote.get("/state", at=at)
    if remote.json:
        show.emit_json(found)
        return
    click.echo(_place(found))
    known = [{"name": name, **each} for name, each in found["interfaces"].items()]
    interfaces.show_list(sorted(known, key=lambda each: each["name"]))


@click.command()
@remote_options
@click.argument("begin", metavar="FROM")
@click.argument("end", metavar="[TO]", required=False)
def diff(remote: Remote, begin: str, end: str | None) -> None:
    """What is desired otherwise at TO than at FROM. Both are positions of the log or times; without TO, it is now.

    \b
    Examples:
      tunledger diff 1200 1300
      tunledger diff 2026-11-22T14:00
    """
    between: dict[str, Any] = {"from": begin, "to": end}
    found = remote.get("/diff", **between)
    if remote.json:
        show.emit_json(found)
        return
    click.echo(f"from {_place(found['from'])}")
    click.echo(f"to   {_place(found['to'])}")
    for each in found["interfaces"]:
        sign, colour = {"added": ("+", "green"), "removed": ("-", "red")}.get(each["change"], ("~", "yellow"))
        click.echo(show.styled(f"{sign} {each['name']}: {each['change']}", fg=colour, bold=True))
        for line in _differences(each):
            click.echo(f"    {line}")
    if not found["interfaces"]:
        click.echo("no difference")


def _differences(each: Mapping[str, Any]) -> list[str]:
    match each["change"]:
        case "added":
            return planned.new_interface({change["path"]: change["new"] for change in each["changes"]})
        case "removed":
            return []
        case _:
            return show.changes(each["changes"])


def _place(found: Mapping[str, Any]) -> str:
    when = f", {show.when(found['recorded_at'])}" if found["recorded_at"] else ""
    return f"position {found['position']}{when}"


COMMANDS = (history, command, confirm, state, diff)
