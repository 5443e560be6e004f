"""An engine with a fake kernel, a data plane that only keeps count, and a real log in a folder of the test's."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

from service.api.render import render
from service.app import SystemClock
from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.spec import Processing, parse_spec
from service.domain.steps import COUNT_ONLY
from service.domain.values import CommandId, InterfaceName
from service.kernel.fake import FakeKernel
from service.kernel.namespaces import HostKernel
from service.reconcile.answer import Answer, Clock
from service.reconcile.applier import Applier
from service.reconcile.applying import Remover
from service.reconcile.engine import Engine
from service.reconcile.hands import Figures, Hands
from service.store import counters
from service.store.answers import Answers
from service.store.migrate import migrate
from service.store.reader import LogReader
from service.store.writer import LogWriter

CLOCK = SystemClock()
BOOT = "11111111-1111-1111-1111-111111111111"


class CountingDataPlane:
    """Holds descriptors and reads nothing."""

    def __init__(self) -> None:
        self.held: dict[str, int] = {}
        self.applied: dict[str, Processing] = {}
        self.refusal: Exception | None = None

    def attach(
        self,
        device: str,
        fd: int,
        *,
        mode: Literal["tun", "tap"],
        name: str | None = None,
        processing: Processing = COUNT_ONLY,
        mtu: int = 1500,
    ) -> str:
        del mode, name, mtu
        if self.refusal is not None:
            os.close(fd)
            raise self.refusal
        self.held[device] = fd
        self.applied[device] = processing
        return "session"

    def configure(self, device: str, processing: Processing, mtu: int) -> None:
        del mtu
        if self.refusal is not None:
            raise self.refusal
        self.applied[device] = processing

    def detach(self, device: str) -> Figures | None:
        os.close(self.held.pop(device))
        return None

    def attached(self) -> Mapping[str, Processing]:
        return {device: self.applied[device] for device in self.held}

    def counters(self) -> Mapping[str, Figures]:
        return {}

    def healthy(self) -> list[str]:
        return []

    def close(self) -> None:
        for device in list(self.held):
            self.detach(device)


class Rig:
    """Everything of one running engine."""

    def __init__(self, engine: Engine, kernel: Any, plane: CountingDataPlane, writer: LogWriter, path: Path):
        self.engine, self.kernel, self.plane, self.writer, self.path = engine, kernel, plane, writer, path

    async def order(self, *commands: cmd.Command, **request: Any) -> Answer:
        """Submit one command as root would, or several as a batch."""
        submission = cmd.Submission(
            commands, CommandId(CLOCK.new_id()), "uid:0", cmd.Request(via="v1", call="create", **request)
        )
        return await self.engine.submit(submission)

    async def declare(self, name: str = "tun0", **fields: Any) -> Answer:
        """Make an interface."""
        return await self.order(cmd.DeclareInterface(parse_spec({"name": name, **fields})))

    async def declare_with_key(self, key: str, name: str) -> Answer:
        """Make an interface under an Idempotency-Key."""
        return await self.order(cmd.DeclareInterface(parse_spec({"name": name})), key=key, fingerprint=name)

    async def change(self, patch: Mapping[str, Any], name: str = "tun0") -> Answer:
        """Change an interface."""
        return await self.order(cmd.PatchInterface(InterfaceName(name), patch))

    def recorded(self) -> list[ev.Recorded]:
        """All events of the log, oldest first."""
        reader = LogReader(self.path)
        try:
            return list(reader.events())
        finally:
            reader.close()

    def events(self) -> list[Any]:
        """All that the log says, oldest first."""
        return [event.body for event in self.recorded()]

    def of(self, *kinds: type[Any]) -> list[Any]:
        """The events of some kinds."""
        return [body for body in self.events() if isinstance(body, kinds)]


@asynccontextmanager
async def running(
    folder: Path, kernel: FakeKernel | HostKernel, clock: Clock = CLOCK, *, removing: Any = None
) -> AsyncIterator[Rig]:
    """An engine that has started up on the log in this folder.

    Args:
        removing: the kernel as the remover has it; the same where that can be, and not given.
    """
    path = folder / "log.db"
    migrate(path, now=CLOCK.now)
    reader = LogReader(path)
    found, node = reader.verify(), reader.node()
    reader.close()
    assert found.problems == []
    engine: Engine | None = None

    def on_recorded(events: Sequence[ev.Recorded]) -> None:
        assert engine is not None
        engine.record(list(events))

    writer = LogWriter(path, node, now=CLOCK.now, on_recorded=on_recorded, on_broken=lambda _reason: None)
    reader = LogReader(path)
    applier, plane, answers = Applier(), CountingDataPlane(), Answers(path)
    removing = removing or (kernel if isinstance(kernel, FakeKernel) else None)
    remover = Remover(Applier("kernel-remover"), Hands(removing, plane)) if removing is not None else None
    engine = Engine(
        node=node,
        state=found.state,
        book=counters.load(path),
        writer=writer,
        applier=applier,
        hands=Hands(kernel, plane),
        clock=clock,
        boot_id=BOOT,
        render=render,
        recall=answers.find,
        knows=reader.declared,
        remover=remover,
    )
    writer.start()
    applier.start()
    if remover is not None:
        remover.applier.start()
    try:
        await engine.start_up(
            ev.ServiceStarted(pid=os.getpid(), version="0", boot_id=BOOT, uid=0, address="127.0.0.1:0")
        )
        yield Rig(engine, kernel, plane, writer, path)
    finally:
        if remover is not None:
            await asyncio.to_thread(remover.applier.close)
        await asyncio.to_thread(applier.close)
        await asyncio.to_thread(writer.close)
        answers.close()
        reader.close()
        plane.close()
