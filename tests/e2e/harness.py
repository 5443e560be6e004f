"""Runs the real service as a process, in the caller's network namespace, and talks HTTP to it."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from service.domain.observed import ObservedLink
from service.kernel.linux import LinuxKernel
from service.store.reader import LogReader, Verification

ROOT = Path(__file__).resolve().parents[2]
PORT = 8080
T = TypeVar("T")


def eventually(check: Callable[[], T], deadline_s: float = 10.0, what: str = "it") -> T:
    """Wait until `check` gives something true, and give that. The deadline is generous: only a hang reaches it."""
    end = time.monotonic() + deadline_s
    while True:
        found = check()
        if found:
            return found
        if time.monotonic() > end:
            raise AssertionError(f"{what} did not come true in {deadline_s} s; last: {found!r}")
        time.sleep(0.01)


class Service:
    """One database and the service processes that run on it, one after the other."""

    def __init__(self, folder: Path, *, port: int = PORT, settings: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, port
        self.database = folder / "tunledger.db"
        self.log = folder / "service.log"
        self.environment = {
            "PATH": os.environ["PATH"],
            "TUNLEDGER_DATABASE__URL": f"sqlite:///{self.database}",
            "TUNLEDGER_SERVER__PORT": str(port),
            "TUNLEDGER_DATAPLANE__WORKERS": "1",  # which of several has a device is no matter here
            **(settings or {}),
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.seen = 0

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command line against this service."""
        return subprocess.run(
            [sys.executable, "-m", "service", *arguments],
            env=self.environment | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def spawn(self, **environment: str) -> None:
        """Start the process without waiting for it."""
        if not self.database.exists():
            migrated = self.command("migrate")
            assert migrated.returncode == 0, migrated.stderr
        if self.process is not None:
            self.process.wait(30)  # one at a time: the one before was killed, or is about to be
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service", "serve"],
                env=self.environment | environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def start(self, **environment: str) -> "Service":
        """Start the process and wait until it answers."""
        self.spawn(**environment)
        self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Wait until the service answers, whatever its health."""

        def answers() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the service ended:\n{self.log.read_text()[-3000:]}"
            try:
                return self.call("GET", "/health")[0] in {200, 503}
            except OSError:
                return False

        eventually(answers, 30, "an answer from the service")

    def call(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any]:
        """One request: (status, decoded JSON). A body that is bytes is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, dict(headers or {}))
            response = connection.getresponse()
            text = response.read()
            return response.status, json.loads(text) if text else None
        finally:
            connection.close()

    def ok(self, method: str, path: str, body: Any = None) -> Any:
        """One request that must succeed."""
        status, answer = self.call(method, path, body)
        assert status == 200, (status, answer, self.log.read_text()[-2000:])
        return answer

    def status(self) -> Any:
        """The original API's status."""
        return self.ok("GET", "/api/interface/status")

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """An orderly stop; the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def close(self) -> None:
        """Leave no process behind."""
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def verification(self) -> Verification:
        """The log as it is on disk, verified and folded."""
        reader = LogReader(self.database)
        try:
            return reader.verify()
        finally:
            reader.close()

    def events(self) -> list[Any]:
        """All events, oldest first."""
        reader = LogReader(self.database)
        try:
            return list(reader.events())
        finally:
            reader.close()

    def news(self) -> list[Any]:
        """The events after position `seen`."""
        return [event for event in self.events() if event.position > self.seen]


def links() -> dict[str, ObservedLink]:
    """All links of the present namespace."""
    kernel = LinuxKernel()
    try:
        return dict(kernel.observe().links)
    finally:
        kernel.close()
