"""What many commands share: the options that say where the service is and how to write to it, and how it ends.

Exit status: 0 done; 1 it was refused, or a check found something; 2 bad usage or configuration; 3 no service answers.
"""

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import click

from service.cli import show
from service.cli.client import Answer, CallError, Client, url_of
from service.config import ConfigError, Flag, Loaded
from service.config import load as load_config

FAILED, USAGE, UNREACHABLE = 1, 2, 3
COMPLETION_TIMEOUT_S = 1.0  # somebody waits with a finger on Tab
PAGE = 1000  # the most the service gives at once
REASON_CHARS_MAX = 256

Command = Callable[..., None]
Options = Callable[[Command], Command]

# What a refusal means for somebody who typed a command: the service's own words name its parameters.
_HINTS = {
    "needs_recreate": "give --recreate to have it done",
    "subnet_overlap": "give --allow-overlap to have it all the same",
    "precondition_failed": "tunledger show has the present ETag",
    "awaiting_confirmation": "tunledger confirm makes it stay",
    "body_too_large": "split it: fewer interfaces at a time",
}


def config_option(function: Command) -> Command:
    """--config: the file that says where the service is, and all else."""
    return click.option(
        "--config", "-c", type=click.Path(path_type=Path, dir_okay=True), help="Configuration file (JSON)."
    )(function)


def output_option(function: Command) -> Command:
    """--output: for people or for programs."""
    return click.option(
        "--output", "-o", type=click.Choice(["table", "json"]), default="table", show_default=True, help="For whom."
    )(function)


def url_option(function: Command) -> Command:
    """--url: which service."""
    return click.option("--url", help="Where the service is; by default as configured.")(function)


def load(config: Path | None, **flags: tuple[str, Any]) -> Loaded:
    """The configuration, with flags such as server__port=("--port", 8080) over it; exits if it has mistakes."""
    given = {
        key.replace("__", "."): Flag(spelling, value) for key, (spelling, value) in flags.items() if value is not None
    }
    try:
        return load_config(file=config, environ=os.environ, flags=given)
    except ConfigError as error:
        fail("\n".join(str(problem) for problem in error.problems), USAGE)


def fail(message: str, status: int = FAILED) -> NoReturn:
    """Say on stderr what went wrong, and end."""
    click.secho("tunledger: " + message, fg="red" if show.coloured(sys.stderr) else None, err=True)
    sys.exit(status)


def refused(error: CallError) -> NoReturn:
    """Say why the service did not do it: its words, then the stable code, the field, the kernel's errno."""
    problem = error.problem
    parts = [str(problem[member]) for member in ("code", "errno") if problem.get(member)]
    if problem.get("pointer"):
        parts.append(f"at {problem['pointer']}")
    if problem.get("retry"):
        parts.append("trying again may help")
    if problem.get("code") in _HINTS:
        parts.append(_HINTS[problem["code"]])
    more = f"\n  ({'; '.join(parts)})" if parts else ""
    fail(f"{error}{more}", FAILED if error.reachable else UNREACHABLE)


@dataclass(frozen=True, slots=True)
class Remote:
    """The service that a command talks to, and how its result is to be shown. Ends the process when refused."""

    client: Client
    output: str

    @property
    def json(self) -> bool:
        """Whether a program reads the result."""
        return self.output == "json"

    def get(self, path: str, *, ok: tuple[int, ...] = (200,), **params: Any) -> Any:
        """The JSON of a resource under /api/v1 (or of /health). Parameters that are None are left out."""
        return self.read(path, ok=ok, **params).body

    def read(self, path: str, *, ok: tuple[int, ...] = (200,), **params: Any) -> Answer:
        """The same, with headers."""
        try:
            return self.client.call("GET", _full(path), _given(params), ok=ok)
        except CallError as error:
            refused(error)

    def pages(self, path: str, member: str, **params: Any) -> list[Any]:
        """All of a resource that comes in pages."""
        found: list[Any] = []
        cursor: str | None = None
        while True:
            page = self.get(path, limit=PAGE, cursor=cursor, **params)
            found += page[member]
            cursor = page.get("next")
            if cursor is None:
                return found

    def write(self, method: str, path: str, write: "Write", body: Any = None, *, dry_run: bool | None = None) -> Answer:
        """Order something."""
        try:
            return self.client.write(
                method, _full(path), write.params(dry_run=dry_run), body=body, headers=write.headers()
            )
        except CallError as error:
            refused(error)


def _full(path: str) -> str:
    return path if path.startswith("/health") else f"/api/v1{path}"


def _given(params: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def segment(name: str) -> str:
    """A name as a part of a path."""
    return quote(name, safe="")


def remote_options(function: Command) -> Command:
    """--config, --url and --output; the command gets a `Remote` first."""
    return config_option(_with_remote(function))


def remote_options_but_c(function: Command) -> Command:
    """The same, for a command whose -c is another: --config has no short form there."""
    config = click.option("--config", type=click.Path(path_type=Path, dir_okay=True), help="Configuration file (JSON).")
    return config(_with_remote(function))


def _with_remote(function: Command) -> Command:
    @functools.wraps(function)
    def with_remote(*, config: Path | None, url: str | None, output: str, **others: Any) -> None:
        function(Remote(Client(where(config, url)), output), **others)

    return url_option(output_option(with_remote))


def where(config: Path | None, url: str | None) -> str:
    """The service's URL: the one given, or as configured."""
    if url is not None:
        return url
    server = load(config).config.server
    return url_of(server.host, server.port)


@dataclass(frozen=True, slots=True)
class Write:
    """How something is to be ordered; the fields are options of the same name."""

    reason: str | None = None
    confirm_within: int | None = None
    dry_run: bool = False
    if_match: str | None = None
    allow_overlap: bool = False
    recreate: bool = False

    def params(self, *, dry_run: bool | None = None) -> dict[str, str]:
        """As query parameters."""
        flags = {
            "dry_run": self.dry_run if dry_run is None else dry_run,
            "allow_overlap": self.allow_overlap,
            "recreate": self.recreate,
        }
        found = {name: "true" for name, given in flags.items() if given}
        return found if self.confirm_within is None else found | {"confirm_within_s": str(self.confirm_within)}

    def headers(self) -> dict[str, str]:
        """As headers."""
        found = {"Tunledger-Reason": self.reason, "If-Match": self.if_match}
        return {name: value for name, value in found.items() if value is not None}


def _line(_: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """A header takes one line."""
    if value is not None and (len(value) > REASON_CHARS_MAX or not value.isprintable()):
        raise click.BadParameter(f"expected a line of at most {REASON_CHARS_MAX} printable characters", param=option)
    return value


def _etag(_: click.Context, option: click.Parameter, value: str | None) -> str | None:
    """An ETag is quoted, and a shell takes the quotes off: they need not be typed."""
    if value is None or value == "*":
        return value
    bare = value.strip('"')
    if not bare.isascii() or not bare.isprintable() or '"' in bare:
        raise click.BadParameter("expected an ETag as tunledger show has it", param=option)
    return f'"{bare}"'


_WRITE_OPTIONS: dict[str, Callable[[Command], Command]] = {
    "reason": click.option("--reason", metavar="TEXT", callback=_line, help="Why; kept in the log with who and when."),
    "confirm_within": click.option(
        "--confirm-within",
        metavar="SECONDS",
        type=click.IntRange(1, 24 * 3600),
        help="Take it back by itself unless it is confirmed in time.",
    ),
    "dry_run": click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing."),
    "if_match": click.option("--if-match", metavar="ETAG", callback=_etag, help="Only if it still is what was read."),
    "allow_overlap": click.option(
        "--allow-overlap", is_flag=True, help="Also a subnet that the host uses on another link."
    ),
    "recreate": click.option(
        "--recreate", is_flag=True, help="Allow what only a new device can do (mode, multi-queue)."
    ),
}


def write_options(*names: str) -> Options:
    """Some of the options of `Write`; the command gets a `Write` as `write`."""

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def with_write(*args: Any, **others: Any) -> None:
            function(*args, write=Write(**{name: others.pop(name) for name in names}), **others)

        decorated: Command = with_write
        for name in reversed(names):
            decorated = _WRITE_OPTIONS[name](decorated)
        return decorated

    return decorate


def complete_names(ctx: click.Context, _: click.Parameter, incomplete: str) -> Sequence[str]:
    """Interface names for the shell. Whatever goes wrong, there are none: a shell completing is no place for errors."""
    try:
        url = ctx.params.get("url")
        if url is None:
            server = load_config(file=ctx.params.get("config"), environ=os.environ, flags={}).config.server
            url = url_of(server.host, server.port)
        pattern = "".join(f"[{char}]" if char in "*?[" else char for char in incomplete) + "*"
        client = Client(url, timeout_s=COMPLETION_TIMEOUT_S)
        found = client.get("/api/v1/interfaces", {"name": pattern, "limit": PAGE})
        return [interface["spec"]["name"] for interface in found["interfaces"]]
    except (CallError, ConfigError, OSError, KeyError, TypeError):
        return []


name_argument = click.argument("name", shell_complete=complete_names)
