"""Who reads the packets: our worker, a C program, a plain Python loop, each to be had in the same way.

A reader is handed descriptors of TUN devices that stay the caller's, reads on `READER_CPU` until the end of the block,
and tells the process whose time is looked at. How packets are made and counted does not belong here.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.lab import READER_CPU, Programs, running, worker_of
from service.dataplane.supervisor import Supervisor
from service.dataplane.telling import WorkerExit
from service.dataplane.work import Work
from service.domain.chain import parse_chain

Devices = Mapping[str, int]
"""The descriptors, by the name of the device."""

Start = Callable[[Devices], AbstractContextManager[int]]
"""Starts a reader; in the block it reads, and gives the process that does."""

MTU = 1500


@dataclass(frozen=True, slots=True)
class Reader:
    """One of those that are compared."""

    what: str
    start: Start


def c_program(what: str, programs: Programs, name: str, *arguments: str) -> Reader:
    """A program of `bench/c`; "FD" among the arguments stands for the devices' descriptors."""
    return _process(what, [programs[name], *arguments])


def plain_loop(what: str, *arguments: str) -> Reader:
    """A loop of `bench/plain.py`; "FD" as for programs."""
    return _process(what, [sys.executable, "-I", str(Path(__file__).parent / "plain.py"), *arguments])


def _process(what: str, command: Sequence[str]) -> Reader:
    @contextmanager
    def start(devices: Devices) -> Iterator[int]:
        fds = list(devices.values())
        at = command.index("FD")
        with running([*command[:at], *map(str, fds), *command[at + 1 :]], READER_CPU, fds) as process:
            yield process.pid

    return Reader(what, start)


class Ours:
    """A supervisor with one worker, on the readers' core."""

    def __init__(self, **hooks: Any) -> None:
        """Start it; `hooks` are the supervisor's own."""
        self.exits: list[WorkerExit] = []
        self.supervisor = Supervisor(workers=1, on_exit=self.exits.append, **hooks)
        self.supervisor.start()

    def close(self) -> None:
        """Stop it."""
        self.supervisor.close()

    def reader(
        self,
        what: str,
        chains: Mapping[str, Sequence[Mapping[str, Any]]],
        *,
        offloads: bool = False,
        mode: Literal["tun", "tap"] = "tun",
    ) -> Reader:
        """The worker with these chains, by the name of the device."""

        @contextmanager
        def start(devices: Devices) -> Iterator[int]:
            pid = worker_of(os.getpid())
            os.sched_setaffinity(pid, {READER_CPU})
            try:
                for name, fd in devices.items():
                    work = Work(parse_chain(list(chains[name]), "chain"), MTU, offloads, "auto")
                    self.supervisor.attach(name, os.dup(fd), mode=mode, name=name, work=work)
                yield pid
                self._check(devices, chains)
            finally:
                for name in devices:
                    self.supervisor.detach(name)
            assert not self.exits, f"a worker died: {self.exits}"

        return Reader(what, start)

    def figure(self, device: str, place: int, name: str) -> int:
        """What a stage of a device's chain has counted so far."""
        return self.supervisor.stages(device)[place].figures.get(name, 0)

    def _check(self, devices: Devices, chains: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """That every stage was at work: a chain that is skipped is fast."""
        for name in devices:
            for stage, wanted in zip(self.supervisor.stages(name), chains[name], strict=True):
                assert stage.processor == wanted["processor"], stage
                assert not stage.bypassed, stage
                assert stage.packets_in > 0, stage
