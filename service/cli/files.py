"""`tunledger apply` and `tunledger export`: the host's interfaces from a file, and back into one."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli import planned, show
from service.cli.client import Client
from service.cli.options import (
    FAILED,
    USAGE,
    Remote,
    Write,
    complete_names,
    config_option,
    fail,
    remote_options,
    url_option,
    where,
    write_options,
)

if TYPE_CHECKING:
    from service.domain.spec import InterfaceSpec

BATCH_MAX = 1000  # the most commands the service takes at once


@click.command()
@remote_options
@click.option(
    "--file", "-f", "source", required=True, metavar="FILE", type=click.Path(), help="YAML, or JSON; - is stdin."
)
@click.option("--prune", is_flag=True, help="Delete interfaces that the file does not have; else they are left.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@write_options("reason", "confirm_within", "dry_run", "allow_overlap", "recreate")
def apply(remote: Remote, write: Write, source: str, prune: bool, yes: bool) -> None:
    """Make the host's interfaces what the file says. All of it, or nothing if any of it is refused.

    Shows what would be done and asks first. A field that the file leaves out gets its default.

    \b
    Examples:
      tunledger apply -f lab.yaml
      tunledger apply -f lab.yaml --prune --yes --reason "lab 7"
      tunledger export | tunledger apply -f - --dry-run
    """
    specs = _read(source)
    orders = _orders(remote, specs, prune=prune)
    if not orders:
        _tell(remote, [], specs, None)
        return
    if len(orders) > BATCH_MAX:
        fail(f"{source}: {len(orders)} interfaces to create, change or delete; at once it can be {BATCH_MAX}")
    body = {"commands": orders}
    preview = remote.write("POST", "/batch", write, body, dry_run=True).body
    entries = planned.ordered(preview)
    if write.dry_run:
        _tell(remote, entries, specs, None)
        return
    if not remote.json or not yes:
        planned.tell(entries, err=remote.json)
        click.echo(_counts(entries, specs), err=remote.json)
    if not yes:
        _ask(source)
        if _orders(remote, specs, prune=prune) != orders:
            fail("somebody changed an interface meanwhile, and this is no longer what would be done; run it again")
    answer = remote.write("POST", "/batch", write, body)
    command_id = answer.headers.get("tunledger-command-id", "")
    _tell(remote, entries, specs, command_id, confirm_within=write.confirm_within)


def _read(source: str) -> "list[InterfaceSpec]":
    from service.cli import labfile

    try:
        text = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        return labfile.read(text, "stdin" if source == "-" else source)
    except OSError as error:
        fail(f"{source}: {error.strerror}", USAGE)
    except labfile.FileError as error:
        fail(str(error), USAGE)


def _orders(remote: Remote, specs: "Sequence[InterfaceSpec]", *, prune: bool) -> list[dict[str, Any]]:
    from service.cli import labfile

    return labfile.commands(specs, _present(remote), prune=prune)


def _present(remote: Remote, **filters: Any) -> dict[str, Any]:
    found = remote.pages("/interfaces", "interfaces", **filters)
    return {each["spec"]["name"]: each["spec"] for each in found if each["spec"] is not None}


def _ask(source: str) -> None:
    if source == "-" or not sys.stdin.isatty():
        fail("standard input is no terminal to ask on; give --yes to apply it, or --dry-run to only look", USAGE)
    if not click.confirm("Apply?", err=True):
        click.echo("nothing was changed", err=True)
        sys.exit(FAILED)


def _counts(entries: "Sequence[planned.Entry]", specs: "Sequence[InterfaceSpec]") -> str:
    number = {action: sum(entry.action == action for entry in entries) for action in ("create", "change", "delete")}
    same = len(specs) - number["create"] - number["change"]
    return (
        ", ".join(f"{count} to {action}" for action, count in number.items() if count) + f", {same} as they should be"
    )


def _tell(
    remote: Remote,
    entries: "Sequence[planned.Entry]",
    specs: "Sequence[InterfaceSpec]",
    command_id: str | None,
    *,
    confirm_within: int | None = None,
) -> None:
    """What was done, if there is a command; else what would be."""
    if remote.json:
        plan = [
            {"name": e.name, "action": e.action, "changes": list(e.changes), "commands": list(e.commands)}
            for e in entries
        ]
        show.emit_json({"plan": plan, "applied": command_id is not None, "command_id": command_id})
        return
    if not entries:
        click.echo(f"nothing to do: {_many(len(specs))} as the file says")
        return
    if command_id is None:
        planned.tell(entries)
        click.echo(_counts(entries, specs))
        click.echo(planned.DRY_RUN)
        return
    click.echo(show.styled(f"applied: {_many(len(entries))}", fg="green"))
    click.echo(show.styled(f"command {command_id}", dim=True))
    if confirm_within is not None:
        click.echo(f"taken back in {confirm_within} s, unless: tunledger confirm {command_id}")


def _many(count: int) -> str:
    return f"{count} interface" if count == 1 else f"{count} interfaces"


@click.command()
@config_option
@url_option
@click.argument("pattern", required=False, shell_complete=complete_names)
@click.option("--label", "labels", metavar="K[=V]", multiple=True, help="With this label; may be repeated.")
@click.option("--output", "-o", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True, help="As what.")
def export(config: Path | None, url: str | None, pattern: str | None, labels: tuple[str, ...], output: str) -> None:
    """Write the interfaces as a file that apply takes.

    \b
    Examples:
      tunledger export > lab.yaml
      tunledger export 'lab-*' -o json
    """
    from service.cli import labfile

    found = _present(Remote(Client(where(config, url)), output), name=pattern, label=labels or None)
    click.echo(labfile.write(list(found.values()), output))


COMMANDS = (apply, export)
