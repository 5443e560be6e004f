"""What others do to a host and to the service on it, in bulk; and tests that run beside each other.

`ip -batch` changes links as an administrator would, `throng` is many clients at the same moment, `mute` is one that
hangs up. `OddService` is a service whose clock, boot and privileges a test holds in its hand. What must hold
afterwards is the world's to say.
"""

import contextlib
import functools
import http.client
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FunctionType, TracebackType
from typing import Any, Final, Self, cast

import pytest

from service.domain import events as ev
from tests.e2e.harness import ROOT, Service, eventually
from tests.faults.cases import AT_ONCE
from tests.faults.world import Heard, World

Work = Callable[[Path], None]


# -- tests beside each other: most of their time they wait


class Beside:
    """The chosen tests of one module, each in a thread of its own and so in a network namespace of its own."""

    def __init__(self, works: Sequence[Work], folder: Path) -> None:
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._futures: dict[Work, Future[None]] = {}
        for number, work in enumerate(works):
            self._futures[work] = self._pool.submit(work, folder / str(number))

    def result(self, work: Work) -> None:
        """Wait for a test; raises what it raised."""
        self._futures[work].result()

    def close(self) -> None:
        """Begin no other."""
        self._pool.shutdown(cancel_futures=True)


def beside(work: Work) -> Callable[[Beside], None]:
    """Have a test, which gets a folder, run beside the others of its module."""

    def test(others: Beside) -> None:
        others.result(work)

    functools.update_wrapper(test, work)
    del test.__wrapped__  # type: ignore[attr-defined]  # pytest would take the arguments of that one
    test.work = work  # type: ignore[attr-defined]
    return test


def run_beside(request: pytest.FixtureRequest, factory: pytest.TempPathFactory) -> Iterator[Beside]:
    """What the module's fixture `others` gives: its chosen tests, under way."""
    module = request.module
    chosen = [cast("Any", item).function for item in request.session.items if cast("Any", item).module is module]
    works = [each.work for each in chosen if isinstance(each, FunctionType) and hasattr(each, "work")]
    running = Beside(works, factory.mktemp(module.__name__.rpartition(".")[2]))
    try:
        yield running
    finally:
        running.close()


# -- the host


def ip(*lines: str, force: bool = False) -> None:
    """`ip -batch` in the calling thread's network namespace. `force`: go on after a line that fails."""
    options = ["-force"] if force else []
    done = subprocess.run(
        ["ip", *options, "-batch", "-"], input="\n".join(lines), capture_output=True, text=True, timeout=60, check=False
    )
    assert force or done.returncode == 0, done.stderr


@contextlib.contextmanager
def elsewhere() -> Iterator[int]:
    """Another network namespace; the id of a process that lives there, as `ip link set X netns PID` wants it."""
    command = ["unshare", "--net", "sh", "-c", "echo there; exec sleep 600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"there\n"
            yield process.pid
        finally:
            process.kill()


def there(pid: int) -> dict[str, dict[str, Any]]:
    """The links of another process's network namespace, by name."""
    told = subprocess.run(
        ["nsenter", f"--net=/proc/{pid}/ns/net", "ip", "-json", "-details", "address"],
        capture_output=True,
        timeout=30,
        check=True,
    )
    return {link["ifname"]: link for link in json.loads(told.stdout)}


# -- what the service says


def events(world: World, *kinds: type, since: int = 0, name: str | None = None) -> list[ev.Recorded]:
    """The events of these kinds behind a position, oldest first."""
    return [
        each
        for each in world.service.events()
        if each.position > since
        and isinstance(each.body, kinds)
        and (name is None or getattr(each.body, "name", None) == name)
    ]


def number_of(found: Sequence[ev.Recorded]) -> Counter[str]:
    """How many events each interface has."""
    return Counter(str(cast("Any", each.body).name) for each in found)


def position(world: World) -> int:
    """The log's end."""
    return int(world.get("/api/v1/log/head")["position"])


def status(world: World, name: str) -> dict[str, Any]:
    """What the service says of one interface."""
    found: dict[str, Any] = world.get(f"/api/v1/interfaces/{name}")["status"]
    return found


def health(world: World) -> tuple[int, str]:
    """The status and the words of /health."""
    code, answer = world.service.call("GET", "/health")
    return code, json.dumps(answer)


def said(world: World) -> str:
    """The service's own log."""
    return world.service.log.read_text(errors="replace")


def make(world: World, *specs: Mapping[str, Any]) -> None:
    """Create interfaces; each must be acknowledged."""
    if len(specs) == 1:
        heard = world.send("POST", "/api/v1/interfaces", specs[0])
    else:
        heard = world.send("POST", "/api/v1/batch", {"commands": [{"create": spec} for spec in specs]})
    assert heard.kind == "acknowledged", f"{heard}: {heard.answer}"


def is_quiet(world: World) -> bool:
    """Whether nothing differs and nobody waits."""
    if world.get("/api/v1/drift")["drift"]:
        return False
    listed = world.get("/api/v1/interfaces?limit=1000")["interfaces"]
    return all(each["status"]["state"] == "applied" for each in listed)


# -- clients


def request_bytes(heard: Heard) -> bytes:
    """A request as it goes over the wire."""
    data = b"" if heard.body is None else json.dumps(heard.body).encode()
    head = f"{heard.method} {heard.path} HTTP/1.1\r\nHost: localhost\r\nTunledger-Reason: {heard.mark}\r\n"
    head += f"Idempotency-Key: {heard.key}\r\n" if heard.key else ""
    head += f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def note(world: World, method: str, path: str, body: Any = None, key: str | None = None) -> Heard:
    """A request that is about to be sent by other means than `World.send`."""
    with world._lock:
        number = len(world.sent) + 1
        heard = Heard(number, method, path, body, key, f"mark-{number}", time.monotonic())
        world.sent.append(heard)
    return heard


def call(world: World) -> socket.socket:
    """A connection to the service."""
    return socket.create_connection(("127.0.0.1", world.service.port), timeout=30)


def mute(world: World, heard: Heard, *, cut: int | None = None, reset: bool = False, after_s: float = 0.0) -> None:
    """Send a request, or its first bytes, and hang up without waiting for the answer, or for so long."""
    data = request_bytes(heard)
    with call(world) as connection:
        connection.sendall(data[:cut] if cut is not None else data)
        time.sleep(after_s)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    heard.why, heard.ended = "hung up", time.monotonic()


def throng(world: World, requests: Sequence[Heard]) -> None:
    """Send all of them while the service cannot answer, so that they come at once; then hear the answers."""
    assert world.service.process is not None
    with contextlib.ExitStack() as stack:
        world.service.process.send_signal(signal.SIGSTOP)
        try:
            connections = []
            for heard in requests:
                connections.append(stack.enter_context(call(world)))
                connections[-1].sendall(request_bytes(heard))
        finally:
            world.service.process.send_signal(signal.SIGCONT)
        for heard, connection in zip(requests, connections, strict=True):
            try:
                response = http.client.HTTPResponse(connection, method=heard.method)
                response.begin()
                text = response.read()
                heard.status = response.status
                heard.headers = {name.lower(): value for name, value in response.getheaders()}
                heard.answer = json.loads(text) if text else None
                response.close()
            except (OSError, http.client.HTTPException) as error:
                heard.why = repr(error)
            heard.ended = time.monotonic()


# -- a service in odd circumstances

_NOBODY: Final = 65534

# What runs instead of `python -m service`. The file CLOCK has the seconds that the wall clock is off. SIGUSR1 takes all
# capabilities from every thread (setresuid(2) by the C library changes all of them), SIGUSR2 gives them back.
_ODD: Final = f"""
import datetime, os, signal, sys, types
from pathlib import Path
from service import app

clock, boot = Path(os.environ.pop("ODD_CLOCK")), os.environ.pop("ODD_BOOT")


class Off(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime.datetime.now(tz) + datetime.timedelta(seconds=float(clock.read_text()))


app.datetime = types.SimpleNamespace(datetime=Off, UTC=datetime.UTC, timedelta=datetime.timedelta)
if boot:
    app.boot_id = lambda: boot
signal.signal(signal.SIGUSR1, lambda *_: os.seteuid({_NOBODY}))
signal.signal(signal.SIGUSR2, lambda *_: os.seteuid(0))
sys.argv = ["tunledger", "serve"]
from service.cli.main import main
main()
"""


class OddService(Service):
    """A service with a wall clock, a boot id and capabilities of the test's choice. Kernel and log are real.

    Attributes:
        boot: the boot id that it reads at its next start; empty for the real one.
        prefix: a command in front of it, such as setpriv(1).
    """

    def __init__(self, world: World) -> None:
        old = world.service
        super().__init__(old.folder, port=old.port)
        self.environment, self.database = old.environment, old.database
        self.boot, self.prefix = "", list[str]()
        self._clock = self.folder / "clock"
        self.clock(0)

    def clock(self, off_s: float) -> None:
        """Have the wall clock be off by this."""
        new = self._clock.with_suffix(".new")
        new.write_text(str(off_s))
        new.rename(self._clock)

    def spawn(self, **environment: str) -> None:
        """Start the process without waiting for it. The database must be there."""
        if self.process is not None:
            self.process.wait(30)
        odd = {"ODD_CLOCK": str(self._clock), "ODD_BOOT": self.boot}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.prefix, sys.executable, "-c", _ODD],
                env=self.environment | odd | environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def odd_world(folder: Path, case: str, **options: Any) -> tuple[World, OddService]:
    """A world whose service is odd. Enter it."""
    world = World(folder, case=case, **options)
    odd = OddService(world)
    world.service = odd
    return world, odd


class Repeated:
    """Something done again and again in a thread of its own, in the caller's network namespace, until the end."""

    def __init__(self, what: Callable[[], None], every_s: float) -> None:
        self._what, self._every_s = what, every_s
        self._end = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work)
        self.times = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _work(self) -> None:
        try:
            while not self._end.wait(self._every_s):
                with contextlib.suppress(OSError):  # the link is just being made anew
                    self._what()
                    self.times += 1
        except BaseException as error:  # noqa: BLE001  # it is the caller's
            self._error = error


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that everybody may write in, up to the root: what a service without capabilities can use."""
    with tempfile.TemporaryDirectory(prefix="tunledger-open-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder


def open_files(world: World) -> None:
    """Let everybody read and write the database."""
    for each in world.service.database.parent.glob("*"):
        each.chmod(0o666)


def soon(check: Callable[[], Any], what: str, within_s: float = 20.0) -> Any:
    """Wait for what must come; the deadline is a generous one."""
    return eventually(check, within_s, what)
