"""The `tunledger` command: the group, and what concerns the service itself. Other commands are in modules by subject.

What takes long to import is imported where it is used: `tunledger list` must not wait for litestar or SQLAlchemy, nor
`tunledger serve`, for which all interfaces wait, for what other commands need.
"""

import gc
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import click

from service import __version__
from service.cli import show
from service.cli.options import (
    FAILED,
    USAGE,
    Remote,
    config_option,
    fail,
    load,
    output_option,
    remote_options,
    segment,
    url_option,
)
from service.domain.errors import ErrorCode, TunledgerError

SUBJECTS: Final = {
    "Interfaces": "interfaces",
    "Packets": "packets",
    "Files": "files",
    "The host": "host",
    "What happened": "log",
    "The log": "events",
    "The shell": "completion",
}


class _Subjects(click.Group):
    """Commands by subject: their modules are imported when one is asked for that is not in this module, and the group's
    help has them by subject instead of all in one list.
    """

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by its name."""
        if cmd_name not in self.commands:
            self._complete()
        return super().get_command(ctx, cmd_name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of all commands."""
        self._complete()
        return super().list_commands(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands under their subjects, those of this module last."""
        subjects = self._complete()
        grouped = {name for names in subjects.values() for name in names}
        subjects["The service"] = [name for name in self.list_commands(ctx) if name not in grouped]
        for title, names in subjects.items():
            limit = formatter.width - 6 - max(map(len, self.commands))
            with formatter.section(title):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(limit)) for name in names])

    def _complete(self) -> dict[str, list[str]]:
        """Have the commands of all subjects; their names by subject."""
        found: dict[str, list[str]] = {}
        for title, module in SUBJECTS.items():
            commands: tuple[click.Command, ...] = import_module(f"service.cli.{module}").COMMANDS
            for command in commands:
                self.add_command(command)
            found[title] = [command.name or "" for command in commands]
        return found


@click.group(cls=_Subjects, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tunledger")
def cli() -> None:
    """TUN/TAP interfaces over REST, every command in an event log first.

    \b
    Examples:
      tunledger migrate && tunledger serve
      tunledger create tun0 --address 10.0.0.1/24 --start
      tunledger apply -f lab.yaml --dry-run
      tunledger history tun0 --changes
    """


@cli.command()
@config_option
@click.option("--host", help="Loopback address to listen on.")
@click.option("--port", help="Port to listen on; 0 for any free one.")
@click.option("--database", "database_url", help="SQLAlchemy URL of the log.")
@click.option("--log-level", help="debug, info, warning or error.")
def serve(
    config: Path | None, host: str | None, port: str | None, database_url: str | None, log_level: str | None
) -> None:
    """Run the service in the foreground until SIGINT, SIGTERM or SIGQUIT."""
    gc.disable()  # until the service is ready: nothing that start-up makes is garbage, and looking for it takes long
    click.get_current_context().call_on_close(gc.enable)  # or until it is not to be: this process may be a test's
    loaded = load(
        config,
        server__host=("--host", host),
        server__port=("--port", port),
        database__url=("--database", database_url),
        logging__level=("--log-level", log_level),
    )
    from service import logs

    logs.configure(loaded.config.logging.level, loaded.config.logging.format)
    from service import workforce

    workers = workforce.begin(loaded.config)  # they come up while what reads the log is imported
    from service.app import serve as run

    try:
        status = run(loaded.config, workers)
    except TunledgerError as error:
        bad_setting = error.code in {ErrorCode.INVALID_FIELD, ErrorCode.SCHEMA_MISMATCH}
        fail(error.message, USAGE if bad_setting else FAILED)
    sys.exit(status)


@cli.command()
@config_option
@click.option("--database", "database_url", help="SQLAlchemy URL of the log.")
def migrate(config: Path | None, database_url: str | None) -> None:
    """Make the database, or bring it to this release's schema."""
    loaded = load(config, database__url=("--database", database_url))
    from service.cli.local import migrate as run

    path = loaded.config.database.path
    try:
        before, after = run(path)
    except TunledgerError as error:
        fail(error.message)
    if before == after:
        click.echo(f"{path} is at schema {after} already")
    elif before is None:
        click.echo(f"{path}: made at schema {after}")
    else:
        click.echo(f"{path}: brought from schema {before} to {after}")


@cli.command()
@remote_options
def status(remote: Remote) -> None:
    """The service's health, and all interfaces.

    \b
    Example:
      tunledger status
    """
    from service.cli.interfaces import show_list

    health = remote.get("/health", ok=(200, 503))
    found = remote.pages("/interfaces", "interfaces")
    if remote.json:
        show.emit_json({"health": health, "interfaces": found})
    else:
        click.echo(
            f"tunledger {health['version']}, node {health['node']}, log position {health['log_position']}: "
            + (health["status"] if health["status"] == "healthy" else f"unhealthy: {health.get('error')}")
        )
        show_list(found)
    if health["status"] != "healthy":
        sys.exit(FAILED)


@cli.command()
@remote_options
@click.argument("name", required=False)
@click.option("--id", "interface_id", metavar="ID", help="The one with this id, although it was retired.")
@click.option("--from", "after", metavar="TIME", help="Over time, from then on: 2026-11-22T13:00:00Z, or -1h ago.")
@click.option("--to", "upto", metavar="TIME", help="Until then; by default until now.")
@click.option("--step", metavar="STEP", help="A point for each: 30, 1m, 6h; by default as many as make a picture.")
def counters(
    remote: Remote,
    name: str | None,
    interface_id: str | None,
    after: str | None,
    upto: str | None,
    step: str | None,
) -> None:
    """Lifetime packets and bytes: over recreation, restart and crash; and their rates over time.

    \b
    Examples:
      tunledger counters
      tunledger counters tun0
      tunledger counters tun0 --from -1h --step 1m
    """
    given: dict[str, Any] = {"id": interface_id, "from": after, "to": upto, "step": step}
    if name is None:
        if any(value is not None for value in given.values()):
            fail("--id, --from, --to and --step are for one interface: give its NAME", USAGE)
        found = remote.get("/counters")["counters"]
        if remote.json:
            show.emit_json(found)
        else:
            _show_totals({interface: {s: figures[s] for s in SOURCES} for interface, figures in found.items()})
        return
    found = remote.get(f"/interfaces/{segment(name)}/counters", **given)
    if remote.json:
        show.emit_json(found)
    elif "points" in found:
        _show_points(found["points"])
    else:
        _show_totals({name: found["totals"]}, found["rates"])


SOURCES = ("kernel", "worker")


def _show_totals(found: dict[str, Any], rates: dict[str, Any] | None = None) -> None:
    rows = [
        [interface, source, counter, f"{value:,}"]
        + ([] if rates is None else [_rate(rates[source][counter]) if counter in rates[source] else ""])
        for interface, totals in found.items()
        for source in SOURCES
        for counter, value in totals[source].items()
    ]
    columns = ("NAME", "COUNTED BY", "COUNTER", "TOTAL", *(("A SECOND",) if rates is not None else ()))
    show.table(columns, rows, right=("TOTAL", "A SECOND"))


# The kernel's, as the host sees them; what a worker counted is in the JSON.
_SHOWN = ("rx_packets", "rx_bytes", "tx_packets", "tx_bytes", "rx_dropped", "tx_dropped")


def _show_points(points: list[dict[str, Any]]) -> None:
    """Rates over time; where nothing was observed there are none, and a gap says how long it was."""
    rows = [
        [show.when(point["at"])]
        + [_rate(point["rates"]["kernel"][name]) if point["rates"] is not None else "" for name in _SHOWN]
        + [f"{point['gap_s']:,.0f} s not observed" if point["gap"] else ""]
        for point in points
    ]
    if not rows:
        click.echo("no samples in this time")
        return
    heads = tuple(f"{name.replace('_', ' ').upper()}/S" for name in _SHOWN)
    show.table(("AT", *heads, "GAP"), rows, right=heads)


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _known_head(_: click.Context, option: click.Parameter, value: str | None) -> tuple[int, str] | None:
    """A head as it was told: a position and the whole hash."""
    if value is None:
        return None
    position, colon, digest = value.strip().partition(":")
    known = digest.lower()
    if not (colon and position.isascii() and position.isdigit() and len(known) == 64 and set(known) <= _HEX):
        raise click.BadParameter("expected POSITION:HASH, the hash with its 64 hex digits", param=option)
    return int(position), known


_HEX = frozenset("0123456789abcdef")


@cli.command()
@config_option
@click.option("--database", "database_url", help="SQLAlchemy URL of the log.")
@click.option(
    "--head",
    metavar="POSITION:HASH",
    callback=_known_head,
    help="An event known from before, which must still be in the log: the head as it was told then.",
)
@url_option
@output_option
def verify(
    config: Path | None, database_url: str | None, head: tuple[int, str] | None, url: str | None, output: str
) -> None:
    """Check the log's hash chain, and that folding it gives the state the service shows.

    Reads the database itself, so it works with the service running or stopped.
    """
    loaded = load(config, database__url=("--database", database_url))
    from service.cli.local import verify as run

    report = run(loaded.config, url, head)
    if output == "json":
        show.emit_json(report)
    else:
        for problem in report["problems"]:
            click.secho(f"PROBLEM  {problem}", fg="red" if sys.stdout.isatty() else None)
        click.echo(f"{report['database']}: {report['events']:,} events, {report['interfaces']} interfaces")
        click.echo(f"head: position {report['position']}, hash {report['hash']}")
        click.echo(f"state shown by the service: {report['service']}")
        click.echo("NOT CHECKED" if not report["checked"] else "NOT SOUND" if report["problems"] else "sound")
    if report["problems"]:
        sys.exit(FAILED)


@cli.command()
@config_option
@output_option
def doctor(config: Path | None, output: str) -> None:
    """Check what commonly goes wrong, and say how to mend it."""
    loaded = load(config)
    from service.cli.doctor import examine

    findings = examine(loaded.config)
    if output == "json":
        show.emit_json([{"check": f.check, "state": f.state, "found": f.found, "mend": f.mend} for f in findings])
    else:
        show.table(("CHECK", "STATE", "FOUND", "HOW TO MEND"), [[f.check, f.state, f.found, f.mend] for f in findings])
    if any(f.state == "FAIL" for f in findings):
        sys.exit(FAILED)


@cli.group()
def config() -> None:
    """The configuration."""


@config.command(name="show")
@config_option
@output_option
def config_show(config: Path | None, output: str) -> None:
    """The configuration in force, and where each value came from."""
    from service.config import SETTINGS, shown

    loaded = load(config)
    rows = [(s.key, s.of(loaded.config), loaded.origins[s.key], s.meaning) for s in SETTINGS]
    if output == "json":
        show.emit_json({key: {"value": value, "origin": origin} for key, value, origin, _ in rows})
    else:
        cells = [[key, shown(value), origin, meaning] for key, value, origin, meaning in rows]
        show.table(("SETTING", "VALUE", "FROM", "MEANING"), cells)


def main() -> None:
    """Entry point of the `tunledger` command."""
    try:
        cli(prog_name="tunledger")
    except BrokenPipeError:  # `tunledger history | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
