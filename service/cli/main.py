"""The command line: options, and which function does what. What takes long to import is imported where it is used.

Exit status: 0 done; 1 it was refused, or a check found something; 2 bad usage or configuration; 3 no service answers.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from service import __version__
from service.cli import show
from service.config import ConfigError, Flag, Loaded, load
from service.domain.errors import ErrorCode, TunledgerError

FAILED, USAGE, UNREACHABLE = 1, 2, 3


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="tunledger")
def cli() -> None:
    """TUN/TAP interfaces over REST, every command in an event log first.

    \b
    Examples:
      tunledger migrate && tunledger serve
      tunledger status
      tunledger history tun0
      tunledger verify
    """


Command = Callable[..., None]


def _config_option(function: Command) -> Command:
    return click.option(
        "--config", "-c", type=click.Path(path_type=Path, dir_okay=True), help="Configuration file (JSON)."
    )(function)


def _output_option(function: Command) -> Command:
    return click.option(
        "--output", "-o", type=click.Choice(["table", "json"]), default="table", show_default=True, help="For whom."
    )(function)


def _url_option(function: Command) -> Command:
    return click.option("--url", help="Where the service is; by default as configured.")(function)


def _load(config: Path | None, **flags: tuple[str, Any]) -> Loaded:
    given = {
        key.replace("__", "."): Flag(spelling, value) for key, (spelling, value) in flags.items() if value is not None
    }
    try:
        return load(file=config, environ=os.environ, flags=given)
    except ConfigError as error:
        _fail("\n".join(str(problem) for problem in error.problems), USAGE)


def _fail(message: str, status: int = FAILED) -> NoReturn:
    click.secho("tunledger: " + message, fg="red" if sys.stderr.isatty() else None, err=True)
    sys.exit(status)


def _call(config: Path | None, url: str | None, path: str, **params: Any) -> Any:
    from service.cli.client import CallError, Client

    ok = params.pop("ok", (200,))
    if url is None:
        server = _load(config).config.server
        host = f"[{server.host}]" if ":" in server.host else server.host
        url = f"http://{host}:{server.port}"
    try:
        return Client(url).get(path, params, ok=ok)
    except CallError as error:
        _fail(str(error), FAILED if error.reachable else UNREACHABLE)


@cli.command()
@_config_option
@click.option("--host", help="Loopback address to listen on.")
@click.option("--port", help="Port to listen on; 0 for any free one.")
@click.option("--database", "database_url", help="SQLAlchemy URL of the log.")
@click.option("--log-level", help="debug, info, warning or error.")
def serve(
    config: Path | None, host: str | None, port: str | None, database_url: str | None, log_level: str | None
) -> None:
    """Run the service in the foreground until SIGINT, SIGTERM or SIGQUIT."""
    loaded = _load(
        config,
        server__host=("--host", host),
        server__port=("--port", port),
        database__url=("--database", database_url),
        logging__level=("--log-level", log_level),
    )
    from service.app import serve as run

    try:
        status = run(loaded.config)
    except TunledgerError as error:
        bad_setting = error.code in {ErrorCode.INVALID_FIELD, ErrorCode.SCHEMA_MISMATCH}
        _fail(error.message, USAGE if bad_setting else FAILED)
    sys.exit(status)


@cli.command()
@_config_option
@click.option("--database", "database_url", help="SQLAlchemy URL of the log.")
def migrate(config: Path | None, database_url: str | None) -> None:
    """Make the database, or bring it to this release's schema."""
    loaded = _load(config, database__url=("--database", database_url))
    from service.cli.local import migrate as run

    path = loaded.config.database.path
    try:
        before, after = run(path)
    except TunledgerError as error:
        _fail(error.message)
    if before == after:
        click.echo(f"{path} is at schema {after} already")
    elif before is None:
        click.echo(f"{path}: made at schema {after}")
    else:
        click.echo(f"{path}: brought from schema {before} to {after}")


@cli.command()
@_config_option
@_url_option
@_output_option
def status(config: Path | None, url: str | None, output: str) -> None:
    """The service's health, and all interfaces."""
    health = _call(config, url, "/health", ok=(200, 503))
    interfaces = _call(config, url, "/api/v1/interfaces")["interfaces"]
    if output == "json":
        show.emit_json({"health": health, "interfaces": interfaces})
    else:
        click.echo(
            f"tunledger {health['version']}, node {health['node']}, log position {health['log_position']}: "
            + (health["status"] if health["status"] == "healthy" else f"unhealthy: {health.get('error')}")
        )
        rows = [_status_row(interface) for interface in interfaces]
        if rows:
            show.table(("NAME", "MODE", "ADDRESSES", "MTU", "UP", "PROCESSING", "STATE", "GENERATION"), rows)
        else:
            click.echo("no interfaces")
    if health["status"] != "healthy":
        sys.exit(FAILED)


def _status_row(interface: dict[str, Any]) -> list[str]:
    spec = interface["spec"] or {}
    state = interface["status"]["state"]
    reason = interface["status"]["reason"]
    return [
        interface["name"],
        str(spec.get("mode", "")),
        " ".join(spec.get("addresses", [])),
        str(spec.get("mtu", "")),
        "yes" if spec.get("up") else "no",
        "running" if spec.get("processing", {}).get("running") else "stopped",
        f"{state} ({reason})" if reason else state,
        str(interface["generation"]),
    ]


@cli.command()
@click.argument("name", required=False)
@_config_option
@_url_option
@_output_option
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="The latest so many.")
def history(config: Path | None, url: str | None, output: str, name: str | None, limit: int) -> None:
    """Who changed what, when, and what came of it; of one NAME over all its interfaces, or of everything."""
    path = f"/api/v1/interfaces/{_segment(name)}/history" if name else "/api/v1/history"
    entries = _call(config, url, path, limit=limit)["history"]
    if output == "json":
        show.emit_json(entries)
        return
    rows = [
        [
            str(entry["position"]),
            show.when(entry["recorded_at"]),
            _who(entry),
            entry["name"] or "",
            entry["what"],
            _outcome(entry),
            show.took(entry["took_us"]),
        ]
        for entry in reversed(entries)
    ]
    show.table(("POS", "WHEN", "WHO", "NAME", "WHAT", "OUTCOME", "TOOK"), rows, right=("POS", "TOOK"))


def _who(entry: dict[str, Any]) -> str:
    return f"{entry['user']} ({entry['actor']})" if entry["user"] else entry["actor"]


def _outcome(entry: dict[str, Any]) -> str:
    text = entry["outcome"] or ""
    if entry.get("by") == "recovery":
        text += " (by recovery)"
    if entry["message"]:
        text += f": {entry['message']}"
    return text


def _segment(name: str) -> str:
    from urllib.parse import quote

    return quote(name, safe="")


@cli.command()
@click.argument("name", required=False)
@_config_option
@_url_option
@_output_option
def counters(config: Path | None, url: str | None, output: str, name: str | None) -> None:
    """Lifetime packets and bytes: over recreation, restart and crash."""
    path = f"/api/v1/interfaces/{_segment(name)}/counters" if name else "/api/v1/counters"
    found = _call(config, url, path)["counters"]
    if output == "json":
        show.emit_json(found)
        return
    rows = [
        [interface, source, counter, f"{value:,}"]
        for interface, figures in found.items()
        for source in ("kernel", "worker")
        for counter, value in figures[source].items()
    ]
    show.table(("NAME", "COUNTED BY", "COUNTER", "TOTAL"), rows, right=("TOTAL",))


@cli.command()
@_config_option
@click.option("--database", "database_url", help="SQLAlchemy URL of the log.")
@_url_option
@_output_option
def verify(config: Path | None, database_url: str | None, url: str | None, output: str) -> None:
    """Check the log's hash chain, and that folding it gives the state the service shows.

    Reads the database itself, so it works with the service running or stopped.
    """
    loaded = _load(config, database__url=("--database", database_url))
    from service.cli.local import verify as run

    report = run(loaded.config, url)
    if output == "json":
        show.emit_json(report)
    else:
        for problem in report["problems"]:
            click.secho(f"PROBLEM  {problem}", fg="red" if sys.stdout.isatty() else None)
        click.echo(f"{report['database']}: {report['events']:,} events, {report['interfaces']} interfaces")
        click.echo(f"head: position {report['position']}, hash {report['hash']}")
        click.echo(f"state shown by the service: {report['service']}")
        click.echo("sound" if not report["problems"] else "NOT SOUND")
    if report["problems"]:
        sys.exit(FAILED)


@cli.command()
@_config_option
@_output_option
def doctor(config: Path | None, output: str) -> None:
    """Check what commonly goes wrong, and say how to mend it."""
    loaded = _load(config)
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
@_config_option
@_output_option
def config_show(config: Path | None, output: str) -> None:
    """The configuration in force, and where each value came from."""
    from service.config import SETTINGS, shown

    loaded = _load(config)
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
