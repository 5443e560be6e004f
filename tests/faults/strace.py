"""Runs processes under strace(1), reads what it wrote, and has it make system calls fail.

Whoever needs it calls `require` first, which skips where strace or the permission to trace is missing. What the calls
mean for a disk or for a service does not belong in here.
"""

import contextlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.e2e.harness import eventually

STRING_BYTES_MAX = 70_000  # of an argument, in a trace: more than SQLite writes at once

_ENTRY = re.compile(r"(?:(\d+) +)?(\w+)\((.*)")
_REST = re.compile(r"(?:(\d+) +)?<\.\.\. (\w+) resumed>(.*)")
_RESULT = re.compile(r"(.*)\)\s+= (.*)", re.DOTALL)
_UNFINISHED = " <unfinished ...>"
_DETACHED = " <detached ...>"
_DESCRIPTOR = re.compile(r"(?:\d+|AT_FDCWD)<((?:\\x[0-9a-f]{2})*)>")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


@cache
def _missing() -> str | None:
    if shutil.which("strace") is None:
        return "strace"
    tried = subprocess.run(["strace", "-qq", "-e", "trace=none", "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"ptrace, which strace needs: {tried.stderr.strip()}"


def require() -> None:
    """Skip the test where there is no strace, or where the kernel does not let it trace."""
    missing = _missing()
    if missing is not None:
        pytest.skip(f"missing: {missing}")


# -- reading a trace


@dataclass(slots=True)
class Call:
    """One system call of one thread.

    Attributes:
        thread: 0 in a trace of one thread.
        arguments: as strace writes them.
        result: what came back, such as "24" or "-1 EIO (Input/output error) (INJECTED)"; None if nothing ever did.
        entered, left: places in the order of all that happened; `left` is None without a result.
    """

    thread: int
    name: str
    arguments: str
    entered: int
    result: str | None = None
    left: int | None = None

    @property
    def ok(self) -> bool:
        """Whether it came back, without an error."""
        return self.result is not None and not self.result.startswith(("-1", "?"))

    @property
    def cut_off(self) -> bool:
        """Whether the process was killed in it; it may have been done nevertheless."""
        return self.result is None or self.result.startswith("?")

    @property
    def injected(self) -> bool:
        """Whether strace tampered with it."""
        return self.result is not None and "(INJECTED" in self.result

    def path(self) -> str:
        """What the descriptor among the arguments, the first one, stands for; empty if there is none. Needs -xx -y."""
        found = _DESCRIPTOR.search(self.arguments)
        return _decoded(found[1]).decode(errors="replace") if found else ""

    def strings(self) -> list[bytes]:
        """The string arguments. Needs -xx."""
        return [_decoded(found[1]) for found in _STRING.finditer(self.arguments)]

    def numbers(self) -> list[int]:
        """The last arguments that are plain numbers, in order."""
        numbers: list[int] = []
        for word in reversed(self.arguments.rsplit('"', 1)[-1].split(", ")):
            if not word.lstrip("-").isdigit():
                break
            numbers.insert(0, int(word))
        return numbers


def _decoded(hexadecimal: str) -> bytes:
    return bytes.fromhex(hexadecimal.replace("\\x", ""))


def calls(trace: Path) -> list[Call]:
    """The calls of a trace, in the order in which they were entered."""
    found: list[Call] = []
    open_calls: dict[int, Call] = {}
    with trace.open(errors="replace") as lines:
        for number, line in enumerate(lines):
            begun, rest = _ENTRY.match(line), _REST.match(line)
            if begun is not None:
                thread, name, text = int(begun[1] or 0), begun[2], begun[3].rstrip("\n")
                call = Call(thread, name, text.removesuffix(_UNFINISHED).removesuffix(_DETACHED), number)
                found.append(call)
                if text.endswith(_UNFINISHED):
                    open_calls[thread] = call
                    continue
            elif rest is not None:
                resumed = open_calls.pop(int(rest[1] or 0), None)
                assert resumed is not None, f"{trace}, line {number + 1}: {rest[2]} is resumed and was never begun"
                call = resumed
                call.arguments += rest[3].rstrip("\n")
            else:
                continue
            ended = _RESULT.match(call.arguments)
            if ended is not None:
                call.arguments, call.result, call.left = ended[1], ended[2], number
    return found


# -- running under it


def command(trace: Path, names: Collection[str], *program: str, options: Sequence[str] = ()) -> list[str]:
    """The command line that runs a program with its threads and children and writes these calls of theirs down."""
    return [
        *("strace", "-f", "--seccomp-bpf", "-qq", "-y", "-xx", "-s", str(STRING_BYTES_MAX)),
        *("-e", f"trace={','.join(names)}", "-e", "signal=none", "-o", str(trace), *options, *program),
    ]


def traced(strace: "subprocess.Popen[bytes]", program: str = sys.executable) -> int:
    """The process id of the program that a strace runs. It forks before, too, to see what the kernel can do."""

    def child() -> int:
        for each in Path(f"/proc/{strace.pid}/task/{strace.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{each}/cmdline").read_bytes().startswith(program.encode() + b"\0"):
                    return int(each)
        return 0

    return eventually(child, what="the process under strace")


def start(
    trace: Path,
    names: Collection[str],
    code: str,
    *arguments: str,
    environment: Mapping[str, str],
    folder: Path,
    output: Path,
) -> "subprocess.Popen[bytes]":
    """Run Python code under strace, in a session of its own."""
    with output.open("ab") as log:
        return subprocess.Popen(
            command(trace, names, sys.executable, "-c", code, *arguments),
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


@contextmanager
def attached(thread: int, trace: Path, *options: str) -> Iterator[None]:
    """While inside, strace is attached to one thread; with "-f" among the options, to all of its process.

    The thread may have ended before the end.
    """
    with trace.with_suffix(".errors").open("wb") as errors:
        strace = subprocess.Popen(
            ["strace", "-yy", "-s", "64", *options, "-o", str(trace), "-p", str(thread)],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
        )
    try:

        def there() -> bool:
            assert strace.poll() is None, trace.with_suffix(".errors").read_text()
            return f"TracerPid:\t{strace.pid}\n" in Path(f"/proc/{thread}/status").read_text()

        eventually(there, what="strace")
        yield
    finally:
        if strace.poll() is None and _lives(thread):
            strace.send_signal(signal.SIGTERM)  # it lets go of the process and ends
        strace.wait(30)  # after the end of all that it follows it ends by itself, once it has written that down


def _lives(thread: int) -> bool:
    with contextlib.suppress(OSError):
        return not re.search(r"^State:\s+[ZX]", Path(f"/proc/{thread}/status").read_text(), re.MULTILINE)
    return False


def killed(trace: Path) -> bool:
    """Whether a traced process was killed."""
    return "+++ killed by SIGKILL +++" in trace.read_text(errors="replace")


def threads(process: int) -> list[int]:
    """The threads of a process, in the order in which they were started."""
    return sorted(int(task.name) for task in Path(f"/proc/{process}/task").iterdir())
