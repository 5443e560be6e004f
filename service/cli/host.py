"""The commands on the host as a whole: plan, drift and reconcile."""

import sys
from typing import Any

import click

from service.cli import planned, show
from service.cli.options import FAILED, Remote, Write, remote_options, write_options

AGREED = "nothing to do: the host is as the log says"


@click.command()
@remote_options
def plan(remote: Remote) -> None:
    """What reconcile would do now. Nothing is changed. For what a change would do, give it --dry-run.

    \b
    Examples:
      tunledger plan
      tunledger set tun0 --mtu 1400 --dry-run
    """
    _told(remote, remote.write("POST", "/reconcile", Write(dry_run=True)).body)


@click.command()
@remote_options
def drift(remote: Remote) -> None:
    """What differs now between the log and the host. Exit status 1 if anything does.

    \b
    Example:
      tunledger drift || tunledger reconcile
    """
    found = remote.get("/drift")["drift"]
    if remote.json:
        show.emit_json(found)
    elif found:
        planned.tell(planned.mending(found))
    else:
        click.echo("no drift: the host is as the log says")
    if found:
        sys.exit(FAILED)


@click.command()
@remote_options
@write_options("dry_run")
def reconcile(remote: Remote, write: Write) -> None:
    """Look at every interface now, and mend what differs. Failed repairs are tried again at once.

    \b
    Examples:
      tunledger reconcile --dry-run
      tunledger reconcile
    """
    body = remote.write("POST", "/reconcile", write).body
    if write.dry_run:
        _told(remote, body)
        return
    if remote.json:
        show.emit_json(body)
    else:
        # "adopted" are those that were found as they should be.
        done = {w: names for w, names in body.items() if isinstance(names, list) and names and w != "adopted"}
        for what, names in done.items():
            text = f"{what.replace('_', ' ')}: {', '.join(names)}"
            click.echo(show.styled(text, fg="red") if what == "failed" else text)
        if not done:
            click.echo(AGREED)
    if body["failed"]:
        sys.exit(FAILED)


def _told(remote: Remote, body: dict[str, Any]) -> None:
    if remote.json:
        show.emit_json(body)
    elif body["plan"]:
        planned.tell(planned.mending(body["plan"]))
        click.echo(planned.DRY_RUN)
    else:
        click.echo(AGREED)


COMMANDS = (plan, drift, reconcile)
