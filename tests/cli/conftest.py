"""Runs `tunledger` in a process of its own, with a configuration of its own."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from service.cli.main import cli
from service.domain import events as ev
from service.domain.commands import Request
from service.domain.spec import InterfaceSpec
from service.domain.values import CommandId, InterfaceId, InterfaceName
from service.store.migrate import migrate
from service.store.reader import LogReader
from service.store.writer import LogWriter
from tests.namespace import fresh_namespace

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 60.0
NOW = "2026-01-02T03:04:05.000006Z"
ID = InterfaceId("0192f0c1-7d3e-7cc2-9c11-0242ac120002")


@dataclass(frozen=True, slots=True)
class Ran:
    """What a command left."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.out)


@dataclass(frozen=True)
class Tunledger:
    """The command, with its settings in the environment.

    Attributes:
        database: where it keeps its log.
        port: where it would serve; nobody listens there.
    """

    database: Path
    port: int

    def __call__(self, *arguments: str, env: Mapping[str, str] | None = None) -> Ran:
        """Run it in this process: a hundred times as fast, for whatever does not serve."""
        done = CliRunner().invoke(cli, arguments, prog_name="tunledger", env=self._settings(env))
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Ran(done.exit_code, done.stdout, done.stderr)

    def _settings(self, env: Mapping[str, str] | None) -> dict[str, str]:
        return {
            "TUNLEDGER_DATABASE__URL": f"sqlite:///{self.database}",
            "TUNLEDGER_SERVER__PORT": str(self.port),
            **(env or {}),
        }

    def process(self, *arguments: str, env: Mapping[str, str] | None = None) -> Ran:
        """Run it as people do."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TUNLEDGER_")}
        done = subprocess.run(
            [sys.executable, "-m", "service", *arguments],
            cwd=self.database.parents[1],
            env=kept | {"PYTHONPATH": str(REPOSITORY)} | self._settings(env),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Ran(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port that nobody listens on: taken, so that nobody else gets it, but not served."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


@pytest.fixture
def tunledger(tmp_path: Path, free_port: int) -> Tunledger:
    """The command, with no database yet."""
    return Tunledger(tmp_path / "data" / "log.db", free_port)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as `tunledger migrate` leaves it; copied, never written to."""
    path = tmp_path_factory.mktemp("migrated") / "log.db"
    migrate(path, now=lambda: NOW)
    return path


@pytest.fixture
def lived(tunledger: Tunledger, migrated: Path) -> Tunledger:
    """The command, with a sound log of three events: tun0 was declared and is there."""
    tunledger.database.parent.mkdir()
    shutil.copy(migrated, tunledger.database)
    reader = LogReader(tunledger.database)
    node = reader.node()
    reader.close()
    writer = LogWriter(tunledger.database, node, now=lambda: NOW, on_recorded=lambda _: None, on_broken=lambda _: None)
    writer.start()
    name, stream = InterfaceName("tun0"), ev.interface_stream(ID)
    command = CommandId("command-1")
    spec = InterfaceSpec(name=name)
    writer.append(
        [
            ev.Draft(
                event_id="event-1",
                stream=ev.node_stream(node),
                body=ev.ServiceStarted(pid=1, version="0", boot_id="b", uid=0, address="127.0.0.1:1"),
                actor="system",
            ),
            ev.Draft(
                event_id="event-2",
                stream=stream,
                body=ev.InterfaceDeclared(interface_id=ID, name=name, spec=spec, request=Request(via="cli")),
                actor="uid:0",
                command_id=command,
            ),
            ev.Draft(
                event_id="event-3",
                stream=stream,
                body=ev.CommandApplied(interface_id=ID, name=name, by="command", took_us=1, steps=[]),
                actor="uid:0",
                command_id=command,
            ),
        ]
    ).result(DEADLINE_S)
    writer.close()
    return tunledger


@pytest.fixture
def netns() -> Iterator[None]:
    """A fresh network namespace for this test and everything it starts."""
    with fresh_namespace():
        yield
