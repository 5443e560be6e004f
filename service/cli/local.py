"""The commands that work on the database itself: migrate and verify."""

import os
from pathlib import Path
from typing import Any

from service.app import SystemClock
from service.cli.client import CallError, Client, url_of
from service.config import Config
from service.domain.errors import TunledgerError
from service.domain.spec import spec_to_json
from service.store import database, headfile
from service.store.migrate import migrate as run_migrations
from service.store.reader import LogReader

_DESIRED = ("id", "generation", "spec", "pending")  # of an interface, what follows from the log alone


def migrate(path: Path) -> tuple[str | None, str]:
    """Migrate with the instance lock held, so that no service is using the database meanwhile.

    Raises:
        TunledgerError: already_serving, schema_mismatch, log_unavailable, log_corrupt.
    """
    clock = SystemClock()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise database.unwritable(path, error) from error
    if database.is_migrated(path):
        return database.newest(), database.newest()
    with database.InstanceLock(path, {"pid": os.getpid(), "since": clock.now(), "what": "tunledger migrate"}):
        return run_migrations(path, now=clock.now)


def not_ours_to_read(path: Path) -> str | None:
    """Why this user may not read a database, where SQLite only says that it cannot open it; None if it may."""
    for part in (path.parent, path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))):
        try:
            owner = part.stat().st_uid
        except OSError:
            continue
        if not os.access(part, os.R_OK | (os.X_OK if part == path.parent else 0), effective_ids=True):
            return f"{part} may not be read by uid {os.geteuid()}; it belongs to uid {owner}"
    return None


def verify(config: Config, url: str | None, head: tuple[int, str] | None = None) -> dict[str, Any]:
    """Read the whole log, and compare the state it folds to with what a running service shows.

    Args:
        head: position and hash of an event as known from before; that it is gone or another one is a problem.
    """
    path = config.database.path
    report: dict[str, Any] = {
        "database": str(path),
        "events": 0,
        "interfaces": 0,
        "position": 0,
        "hash": "",
        "service": "not running",
        "checked": False,
        "problems": [],
    }
    shown: dict[str, Any] | None = None
    try:
        shown = Client(url or url_of(config.server.host, config.server.port)).get("/api/v1/state")
    except CallError as error:
        if error.reachable or url is not None:
            report["service"] = "could not be read"
            report["problems"].append(f"the service's state could not be read: {error}")
    try:
        database.require_current(path)
        reader = LogReader(path)
    except TunledgerError as error:
        report["problems"].append(not_ours_to_read(path) or error.message)
        return report
    report["checked"] = True
    try:
        found = reader.verify(head=head)
        report["problems"] += found.problems
        report["problems"] += _lost(path, reader, found.head_position)
        report |= {
            "events": found.events,
            "interfaces": len(found.state.interfaces),
            "position": found.head_position,
            "hash": found.head_hash,
        }
        if shown is not None:
            problem = _compare(reader, shown)
            report["service"] = "the same" if problem is None else "different"
            report["problems"] += [problem] if problem else []
    finally:
        reader.close()
    return report


def _lost(path: Path, reader: LogReader, head: int) -> list[str]:
    """That the log does not hold what the file beside it says it held."""
    try:
        lost = headfile.problem(path, reader.mark, head)
    except TunledgerError as error:
        lost = f"{headfile.path_of(path).name} could not be compared: {error.message}"
    return [lost] if lost is not None else []


def _compare(reader: LogReader, shown: dict[str, Any]) -> str | None:
    """What a service shows must be the fold of the log up to the position that it names."""
    folded = reader.verify(upto=shown["position"])
    if folded.head_hash != (shown["hash"] or folded.head_hash):
        return f"at position {shown['position']} the service has another hash: it serves another log than this file"
    expected = {
        i.name: {
            "id": i.id,
            "generation": i.generation,
            "spec": spec_to_json(i.spec) if i.spec is not None else None,
            "pending": i.pending.command_id if i.pending is not None else None,
        }
        for i in folded.state.interfaces.values()
    }
    # What the service knows besides, such as an interface's status, is not the log's to say.
    told = {name: {key: each.get(key) for key in _DESIRED} for name, each in shown["interfaces"].items()}
    if expected != told:
        names = sorted(name for name in {*expected, *told} if expected.get(name) != told.get(name))
        return f"at position {shown['position']} the service shows another state than the log for: {', '.join(names)}"
    return None
