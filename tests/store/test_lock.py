"""One service on a database: the second is told who the first is, and a dead one holds nothing."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from service.domain.errors import ErrorCode, TunledgerError
from service.store.database import InstanceLock

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 20.0
WHO = {"pid": 4242, "since": "2026-01-02T03:04:05.000006Z", "what": "tunledger serve on 127.0.0.1:8080"}

_HOLD = """
import os, sys
from pathlib import Path
from service.store.database import InstanceLock
with InstanceLock(Path(sys.argv[1]), {"pid": os.getpid(), "since": "today", "what": "tunledger serve on [::1]:1"}):
    print("holds", flush=True)
    sys.stdin.read()
"""


@contextmanager
def _holder(database: Path) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(database)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        yield process
        process.communicate(timeout=DEADLINE_S)


def _taken(database: Path) -> str:
    with pytest.raises(TunledgerError) as refusal, InstanceLock(database, WHO):
        pass
    assert refusal.value.code is ErrorCode.ALREADY_SERVING
    return refusal.value.message


def test_the_second_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    database = tmp_path / "log.db"
    with _holder(database) as first:
        told = _taken(database)
        assert told == (
            f"{database}.lock: this database is in use by tunledger serve on [::1]:1 (pid {first.pid}, since today)"
        )


def test_a_refused_second_does_not_disturb_the_first(tmp_path: Path) -> None:
    database = tmp_path / "log.db"
    with InstanceLock(database, WHO):
        assert _taken(database) == _taken(database)
        assert json.loads(Path(f"{database}.lock").read_text()) == WHO


def test_the_lock_goes_with_a_process_that_was_killed(tmp_path: Path) -> None:
    database = tmp_path / "log.db"
    with _holder(database) as first:
        assert str(first.pid) in _taken(database)
        os.kill(first.pid, signal.SIGKILL)
        assert first.wait(DEADLINE_S) == -signal.SIGKILL
        with InstanceLock(database, WHO):
            assert "pid 4242" in _taken(database), "the dead one's name is not left over"


def test_the_lock_can_be_taken_again_after_it_was_let_go(tmp_path: Path) -> None:
    database = tmp_path / "log.db"
    for pid in (1, 2):
        with InstanceLock(database, WHO | {"pid": pid}):
            assert f"pid {pid}," in _taken(database)


def test_two_databases_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    with InstanceLock(tmp_path / "a.db", WHO), InstanceLock(tmp_path / "b.db", WHO):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": 1}', "\xff\xfe", "null"])
def test_a_holder_that_does_not_say_who_it_is_still_holds(tmp_path: Path, content: str) -> None:
    database = tmp_path / "log.db"
    with InstanceLock(database, WHO):
        Path(f"{database}.lock").write_bytes(content.encode("latin-1"))
        assert _taken(database).endswith("this database is in use by another process")


def test_a_lock_that_cannot_be_made_says_where(tmp_path: Path) -> None:
    with pytest.raises(TunledgerError, match=r"nowhere/log\.db\.lock: No such file") as refusal:
        InstanceLock(tmp_path / "nowhere" / "log.db", WHO).__enter__()
    assert refusal.value.code is ErrorCode.LOG_UNAVAILABLE


def test_a_lock_that_another_user_left_behind_says_whose_it_is(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`sudo tunledger migrate`, and then the service as a user of its own."""
    folder = tmp_path_factory.mktemp("owned")
    with InstanceLock(folder / "log.db", WHO):
        pass
    code = (
        "import os, sys; from pathlib import Path; from service.store.database import InstanceLock\n"
        "from service.domain.errors import TunledgerError\n"
        "path = Path(sys.argv[1]); os.chown(path.parent, 65534, 65534); os.chdir(path.parent); os.seteuid(65534)\n"
        "try: InstanceLock(Path('log.db'), {}).__enter__()\n"
        "except TunledgerError as error: print(error.code, error.message)"
    )
    if os.geteuid() != 0:
        pytest.skip("missing: another user than this one, which root could be")
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "log.db")],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    if "Operation not permitted" in done.stderr or "Invalid argument" in done.stderr:
        pytest.skip("missing: another user than root in this namespace")
    assert done.stdout.startswith(
        "log_unavailable log.db.lock: belongs to uid 0 (mode 600), and this process is uid 6553"
    )
    assert "remove the file or give it" in done.stdout


def test_the_lock_is_not_inherited_by_programs_that_are_started(tmp_path: Path) -> None:
    """A worker or an `ip` that outlives the service must not keep its lock."""
    database = tmp_path / "log.db"
    lock = InstanceLock(database, WHO)
    lock.__enter__()
    waits = "print('runs', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "runs\n"
        lock.__exit__(None, None, None)
        with InstanceLock(database, WHO):
            pass
        child.communicate("\n", timeout=DEADLINE_S)
