"""A process that brings a log into trouble with its disk, and tells in JSON what came of it.

`python -m tests.store.disk_trouble full|failing FOLDER`: processes of their own, since a mount namespace and a limit on
the size of files are not for the process that runs the tests.
"""

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.domain.errors import TunledgerError
from service.store.database import InstanceLock
from service.store.migrate import migrate
from service.store.reader import LogReader
from tests.store.log import DEADLINE_S, NOW, Log, draft, idle, note

CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 0x40000  # linux/sched.h, linux/mount.h
DISK_BYTES = 8 * 1024 * 1024
ENOUGH = 2000  # appends, some 1.5 MB: a disk that is not full by then never will be


def _outcome(action: Callable[[], object]) -> dict[str, Any]:
    try:
        action()
    except TunledgerError as error:
        return {"code": error.code.value, "retry": error.retry, "message": error.message}
    return {"code": None}


def _healed(action: Callable[[], object]) -> dict[str, Any]:
    """The outcome once there is another one than a full disk: it is looked at every second."""
    end = time.monotonic() + DEADLINE_S
    while (told := _outcome(action))["code"] == "log_full" and time.monotonic() < end:
        time.sleep(0.05)
    return told


def _reading(path: Path) -> dict[str, Any]:
    reader = LogReader(path)
    try:
        found = reader.verify()
        return {"events": found.events, "problems": found.problems}
    finally:
        reader.close()


def _mount_small_disk(folder: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def checked(result: int) -> None:
        if result:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    checked(libc.unshare(CLONE_NEWNS))
    checked(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    checked(libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={DISK_BYTES}".encode()))


def full(folder: Path) -> dict[str, Any]:
    """Fill the disk under a log that is being written, then make room again."""
    try:
        _mount_small_disk(folder)
    except OSError as error:
        return {"skip": f"CAP_SYS_ADMIN, to mount a small disk ({error.strerror})"}
    path = folder / "log.db"
    migrate(path, now=lambda: NOW)
    log = Log(path)
    log.fill(10)
    told: dict[str, Any] = {"trouble_before": log.writer.trouble()}
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            told["ballast"] = error.strerror
    refusal: dict[str, Any] = {"code": None}
    appended = 0
    while refusal["code"] is None and appended < ENOUGH:
        refusal = _outcome(lambda: log.append(draft(idle()), draft(idle())))
        appended += refusal["code"] is None
    told |= {
        "refusal": refusal,
        "again": _outcome(lambda: log.append(draft(idle()), draft(idle()))),
        "acknowledged": len(log.recorded),
        "trouble": log.writer.trouble(),
        "reading": _reading(path),
        "lock": _outcome(lambda: InstanceLock(path, {"pid": 1, "what": "x" * 5000, "since": NOW}).__enter__()),
    }
    ballast.unlink()
    told |= {
        "healed": _healed(lambda: log.append(draft(idle()), draft(idle()))),
        "trouble_after": log.writer.trouble(),
        "broken": log.broken,
        "acknowledged_after": len(log.recorded),
        "reading_after": _reading(path),
    }
    log.close()
    return told


def failing(folder: Path) -> dict[str, Any]:
    """Let writes to the log's files fail with another error than a full disk (EFBIG), then let them work again."""
    path = folder / "log.db"
    migrate(path, now=lambda: NOW)
    log = Log(path)
    log.fill(10)
    wal = path.with_name(path.name + "-wal")
    resource.setrlimit(resource.RLIMIT_FSIZE, (wal.stat().st_size + 1, resource.RLIM_INFINITY))
    with log.held():
        waiting = [log.queue(draft(note(number))) for number in range(3)]
    told: dict[str, Any] = {"waiting": [_outcome(lambda f=f: f.result(20)) for f in waiting]}  # type: ignore[misc]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    told |= {
        "later": [_outcome(lambda: log.append(draft(note()))) for _ in range(2)],
        "job": _outcome(lambda: log.writer.run(lambda _: None).result(20)),
        "trouble": log.writer.trouble(),
        "broken": log.broken,
        "acknowledged": len(log.recorded),
    }
    log.close()
    told["reading"] = _reading(path)
    again = Log(path)
    told["restarted"] = _outcome(lambda: again.append(draft(note())))
    again.close()
    told["reading_after"] = _reading(path)
    return told


if __name__ == "__main__":
    json.dump({"full": full, "failing": failing}[sys.argv[1]](Path(sys.argv[2])), sys.stdout)
