"""A link takes its time to go. Commands on others do not wait for it; what looks at everything does."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.values import InterfaceName
from service.kernel.fake import FakeKernel
from service.reconcile import applier, applying
from tests.reconcile.rig import Rig, running

pytestmark = pytest.mark.anyio
DEADLINE_S = 20.0


class Held:
    """The same kernel, which carries nothing out before it is told to."""

    def __init__(self, kernel: FakeKernel) -> None:
        self._kernel = kernel
        self.reached, self.released = threading.Event(), threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel, name)

    def execute_many(self, work: Any) -> Any:
        self.reached.set()
        assert self.released.wait(DEADLINE_S)
        return self._kernel.execute_many(work)


@asynccontextmanager
async def leaving(folder: Path) -> AsyncIterator[tuple[Rig, Held, "asyncio.Task[Any]"]]:
    """tun0 on its way out, for as long as the kernel is held; beside it tun1."""
    kernel = FakeKernel()
    held = Held(kernel)
    async with running(folder, kernel, removing=held) as rig:
        await rig.declare("tun0")
        await rig.declare("tun1")
        task = asyncio.create_task(rig.order(cmd.RetireInterface(InterfaceName("tun0"))))
        try:
            assert await asyncio.to_thread(held.reached.wait, DEADLINE_S)
            yield rig, held, task
        finally:
            held.released.set()
        await task
        assert sorted(kernel.observe().links) == ["lo", "tun1", *(["tun2"] if rig.engine.state.find("tun2") else [])]
        assert rig.of(ev.OrphanRemoved) == []


async def test_commands_on_others_do_not_wait_for_a_link_that_is_going(tmp_path: Path) -> None:
    async with leaving(tmp_path) as (rig, _held, task):
        await rig.declare("tun2")
        await rig.change({"mtu": 1400}, "tun1")
        assert not task.done()


@pytest.mark.parametrize("look", [lambda rig: rig.engine.reconcile(), lambda rig: rig.engine.sample()])
async def test_a_look_at_everything_comes_before_a_removal_or_after_it(
    tmp_path: Path, look: Callable[[Rig], Awaitable[Any]]
) -> None:
    """Else a link seen before it went would be an orphan, and its counters another life's."""
    async with leaving(tmp_path) as (rig, held, _task):
        looking = asyncio.ensure_future(look(rig))
        done, _ = await asyncio.wait({looking}, timeout=0.3)
        assert not done
        held.released.set()
        await looking


async def test_a_look_at_everything_is_heard_of_before_a_removal_that_comes_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the applier's thread does not get the processor right after its look."""
    done = applier._do

    def late(group: Any) -> None:
        work = group[0].work

        def lagging(items: Any) -> Any:
            found = work(items)
            if threading.current_thread().name == "kernel-applier" and looking:
                time.sleep(0.2)
            return found

        group[0].work = lagging
        done(group)

    monkeypatch.setattr(applier, "_do", late)
    looking = False
    async with running(tmp_path, FakeKernel()) as rig:
        await rig.declare("tun0")
        looking = True
        seen = asyncio.ensure_future(rig.engine._applying.look_at_all([]))
        await asyncio.sleep(0.05)
        gone = asyncio.ensure_future(rig.order(cmd.RetireInterface(InterfaceName("tun0"))))
        await asyncio.wait({seen, gone}, return_when=asyncio.FIRST_COMPLETED)
        assert seen.done()
        assert not gone.done()
        await gone


async def test_of_many_removals_a_look_at_everything_waits_for_some_only(tmp_path: Path) -> None:
    assert applying.REMOVED_MAX < applier.BATCH_MAX
    async with running(tmp_path, FakeKernel()) as rig:
        names = [InterfaceName(f"tun{number}") for number in range(applying.REMOVED_MAX + 3)]
        await asyncio.gather(*(rig.declare(name) for name in names))
        await asyncio.gather(*(rig.order(cmd.RetireInterface(name)) for name in names))
        assert rig.engine.state.interfaces == {}
