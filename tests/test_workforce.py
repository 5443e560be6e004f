"""The workers that are begun before the rest of the service is there: waited for, told of, and ended in every case."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import pytest

from service.config import Config, DataplaneSection
from service.dataplane import supervisor, worker_process
from service.dataplane.attachment import Ended
from service.dataplane.errors import DataplaneError
from service.dataplane.telling import WorkerExit
from service.workforce import Workforce
from tests.dataplane.test_supervisor import children, worker_pids
from tests.e2e.harness import eventually

ONE = Config(dataplane=DataplaneSection(workers=1))


class Deaths:
    """Remembers who died."""

    def __init__(self) -> None:
        self.told: list[WorkerExit] = []

    def exited(self, death: WorkerExit) -> None:
        self.told.append(death)

    def device_lost(self, device: str, reason: str) -> None: ...

    def stage_ended(self, ended: Ended) -> None: ...

    def files_for(self, device: str, name: str, stage_id: int, options: dict[str, Any]) -> Sequence[int]:
        raise NotImplementedError((device, name, stage_id, options))

    def poked(self) -> None: ...


def test_a_death_is_told_to_whoever_listens_by_then() -> None:
    with closing(Workforce(ONE)) as workforce:
        workforce.begin().wait()
        (unheard,) = worker_pids()
        os.kill(unheard, signal.SIGKILL)
        (heard,) = eventually(lambda: [pid for pid in worker_pids() if pid != unheard], what="another worker")
        deaths = workforce.listener = Deaths()
        os.kill(heard, signal.SIGKILL)
        eventually(lambda: deaths.told, what="news of its death")
        assert [death.pid for death in deaths.told] == [heard]
    assert worker_pids() == []


def test_workers_that_cannot_start_are_an_error_for_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "_PROGRAM", "raise SystemExit(3)")
    monkeypatch.setattr(supervisor, "START_TIMEOUT_S", 0.5)
    before = set(children())  # other tests' processes may be among them
    with closing(Workforce(ONE)) as workforce:
        workforce.begin()
        with pytest.raises(DataplaneError, match="worker"):
            workforce.wait()
    assert set(children()) <= before


def test_one_that_was_not_begun_has_nothing_to_close() -> None:
    before = set(children())
    workforce = Workforce(ONE)
    workforce.close()
    workforce.close()
    assert set(children()) <= before


def test_its_imports_are_no_more_than_the_workers_need() -> None:
    """SQLAlchemy and litestar are imported while the workers come up, so not before they are begun."""
    code = (
        "import sys; import service.cli.main, service.logs, service.workforce; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'sqlalchemy', 'litestar', 'pyroute2'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
