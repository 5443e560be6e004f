"""Commands and repairs on a host where every step can fail."""

import asyncio
import datetime
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from service.app import SystemClock
from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import LinkCounters
from service.domain.spec import parse_spec
from service.domain.steps import CreateLink, DeleteLink, SetMtu
from service.domain.token import Token
from service.domain.values import CommandId, InterfaceId, InterfaceName, Mode, parse_cidr
from service.kernel.fake import FakeKernel
from service.reconcile import applier, loop
from service.reconcile import engine as engine_module
from service.reconcile.applier import Applier
from service.reconcile.rejections import Allowance
from service.reconcile.troubles import BACK_OFF_FIRST_S
from tests.reconcile.rig import CLOCK, Rig, running

FULL: dict[str, Any] = {
    "addresses": ["10.1.0.1/24", "fd00:1::1/64"],
    "mtu": 1400,
    "processing": {"running": True},
}
pytestmark = pytest.mark.anyio
NO_MEMORY = TunledgerError(ErrorCode.KERNEL_REFUSED, "no memory", errno_name="ENOMEM")


def assert_settled(rig: Rig) -> None:
    """Every intent has one outcome, and nothing is left to do."""
    assert all(interface.pending is None for interface in rig.engine.state.interfaces.values())
    assert len(rig.of(ev.CommandApplied, ev.CommandFailed)) == len(
        rig.of(
            ev.InterfaceDeclared,
            ev.InterfaceReconfigured,
            ev.ProcessingEnabled,
            ev.ProcessingDisabled,
            ev.InterfaceRetired,
        )
    )


async def steps_of_create(tmp_path: Path) -> int:
    async with running(tmp_path / "dry", FakeKernel()) as rig:
        await rig.declare(**FULL)
        return len(rig.kernel.executed)


@pytest.mark.parametrize("after", [False, True])
async def test_a_create_that_fails_at_any_step_leaves_nothing(tmp_path: Path, after: bool) -> None:
    for number in range(1, await steps_of_create(tmp_path) + 1):
        kernel = FakeKernel()
        empty = str(kernel)
        async with running(tmp_path / str(number), kernel) as rig:
            kernel.fail(NO_MEMORY, nth=number, after=after)
            with pytest.raises(TunledgerError, match="no memory"):
                await rig.declare(**FULL)
            assert str(kernel) == empty, f"step {number} left something behind"
            assert rig.plane.held == {}
            assert rig.engine.state.interfaces == {}
            (failed,) = rig.of(ev.CommandFailed)
            assert (failed.errno, failed.undone) == ("ENOMEM", True)
            assert_settled(rig)
            await rig.declare(**FULL)
            assert_settled(rig)


async def test_a_change_that_fails_at_any_step_is_undone_in_place(tmp_path: Path) -> None:
    patch = {"addresses": ["10.2.0.1/24"], "mtu": 1300, "txqueuelen": 77, "processing": {"running": False}}
    for number in range(1, 6):
        kernel = FakeKernel()
        async with running(tmp_path / str(number), kernel) as rig:
            await rig.declare(**FULL)
            before = kernel.observe(["tun0"]).links["tun0"]
            kernel.fail(NO_MEMORY, nth=number)
            with pytest.raises(TunledgerError, match="no memory"):
                await rig.change(patch)
            after = kernel.observe(["tun0"]).links["tun0"]
            assert (after.ifindex, after.mtu, after.txqueuelen) == (before.ifindex, before.mtu, before.txqueuelen)
            assert set(after.addresses) == set(before.addresses)
            assert rig.plane.attached(), "processing runs on, as it did"
            assert_settled(rig)
            assert (await rig.engine.drift()) == []


async def test_the_host_is_looked_at_first_only_for_a_new_name_or_network(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        kernel.outside.add_link("eth0")
        kernel.outside.add_address("eth0", parse_cidr("192.0.2.1/24", "address"))
        await rig.declare()
        surveys = kernel.calls["survey"]
        assert surveys == 1
        await rig.change({"mtu": 1300})
        assert kernel.calls["survey"] == surveys
        with pytest.raises(TunledgerError, match="overlaps"):
            await rig.change({"addresses": ["192.0.2.9/24"]})
        assert kernel.calls["survey"] == surveys + 1
        with pytest.raises(TunledgerError, match="eth0"):
            await rig.declare("eth0")
        await rig.order(cmd.RetireInterface(InterfaceName("tun0")))
        assert kernel.calls["survey"] == surveys + 2


async def test_what_cannot_be_undone_is_said_and_mended_later(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare()
        kernel.fail(NO_MEMORY, on=SetMtu, after=True)
        kernel.fail(NO_MEMORY, on=SetMtu)
        with pytest.raises(TunledgerError):
            await rig.change({"mtu": 1300})
        (failed,) = rig.of(ev.CommandFailed)
        assert failed.undone is False
        assert rig.engine.troubles
        await rig.engine.reconcile_now()
        assert kernel.observe(["tun0"]).links["tun0"].mtu == 1500
        assert not rig.engine.troubles


async def test_drift_is_one_event_and_its_repair_another_and_then_there_is_peace(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare()
        kernel.outside.set_mtu("tun0", 1000)
        await rig.engine.reconcile()
        (drift,), (repair,) = rig.of(ev.DriftDetected), rig.of(ev.DriftRepaired)
        assert drift.differences == [{"path": "tun0.mtu", "desired": 1500, "observed": 1000}]
        assert repair.steps == ["ip link set tun0 mtu 1500"]
        executed, events = len(kernel.executed), len(rig.events())
        await rig.engine.reconcile()
        assert (len(kernel.executed), len(rig.events())) == (executed, events)


async def test_a_repair_that_keeps_failing_is_told_once_and_backed_off(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare()
        kernel.outside.set_mtu("tun0", 1000)
        kernel.fail(NO_MEMORY, on=SetMtu, times=100)
        for _ in range(3):
            await rig.engine.reconcile_now()
        assert len(rig.of(ev.RepairFailed)) == 1
        assert len(rig.of(ev.DriftDetected)) == 1
        trouble = rig.engine.troubles.get(rig.engine.state.by_name[InterfaceName("tun0")])
        assert trouble is not None
        assert trouble.attempts == 3
        calls = kernel.calls["execute"]
        await rig.engine.reconcile()
        assert kernel.calls["execute"] == calls, "it is not due yet"
        delay = rig.engine.next_retry_s()
        assert delay is not None
        assert delay > BACK_OFF_FIRST_S
        kernel.heal()
        kernel.fail(TunledgerError(ErrorCode.KERNEL_REFUSED, "another reason"), on=SetMtu)
        await rig.engine.reconcile_now()
        assert [failed.message for failed in rig.of(ev.RepairFailed)] == ["no memory", "another reason"]


async def test_an_outcome_that_cannot_be_recorded_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, FakeKernel()) as rig:
        append, calls = rig.writer.append, 0

        def full_at_second(*arguments: Any) -> "Future[list[ev.Recorded]]":
            nonlocal calls
            calls += 1
            if calls == 2:
                raise TunledgerError(ErrorCode.LOG_FULL, "disk full", retry=True)
            return append(*arguments)

        monkeypatch.setattr(rig.writer, "append", full_at_second)
        with pytest.raises(TunledgerError) as refused:
            await rig.declare()
        assert refused.value.code is ErrorCode.OUTCOME_UNKNOWN
        (interface,) = rig.engine.state.interfaces.values()
        assert interface.pending is not None
        await rig.engine.reconcile()
        (applied,) = rig.of(ev.CommandApplied)
        assert applied.by == "recovery"
        assert_settled(rig)


async def test_a_log_that_cannot_be_written_means_no_kernel_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:

        def full(*_arguments: Any) -> "Future[list[ev.Recorded]]":
            raise TunledgerError(ErrorCode.LOG_FULL, "disk full", retry=True)

        monkeypatch.setattr(rig.writer, "append", full)
        with pytest.raises(TunledgerError, match="disk full"):
            await rig.declare()
        assert kernel.executed == []
        kernel_before = str(kernel)
        await rig.engine.stop(pid=1, reason="test", interfaces="remove")
        assert str(kernel) == kernel_before


async def test_commands_on_one_interface_follow_each_other(tmp_path: Path) -> None:
    async with running(tmp_path, FakeKernel()) as rig:
        await rig.declare()
        await asyncio.gather(*(rig.change({"mtu": 1300 + number}) for number in range(20)))
        assert len(rig.of(ev.InterfaceReconfigured)) == 20
        assert_settled(rig)
        assert len(rig.engine._locks) == 0, "locks of nobody are kept"


async def test_the_same_name_at_once_is_made_once(tmp_path: Path) -> None:
    async with running(tmp_path, FakeKernel()) as rig:
        answers = await asyncio.gather(*(rig.declare() for _ in range(10)), return_exceptions=True)
        refused = [a for a in answers if isinstance(a, TunledgerError)]
        assert (len(refused), {error.code for error in refused}) == (9, {ErrorCode.INTERFACE_EXISTS})
        assert len([s for s in rig.kernel.executed if isinstance(s, CreateLink)]) == 1


async def test_too_many_commands_at_once_are_refused_with_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "IN_FLIGHT_MAX", 5)
    async with running(tmp_path, FakeKernel()) as rig:
        answers = await asyncio.gather(*(rig.declare(f"tun{n}") for n in range(20)), return_exceptions=True)
        refused = [a for a in answers if isinstance(a, TunledgerError)]
        assert {(error.code, error.retry) for error in refused} == {(ErrorCode.OVERLOADED, True)}
        assert len(rig.engine.state.interfaces) == 20 - len(refused) == 5


async def test_who_asked_to_reconcile_is_in_the_log_before_anything_is_mended(tmp_path: Path) -> None:
    async with running(tmp_path, FakeKernel()) as rig:
        await rig.declare()
        rig.kernel.outside.set_mtu("tun0", 1300)
        begun = len(rig.events())
        request = cmd.Request(via="v1", call="reconcile", reason="after the storm", key="k", fingerprint="f")
        asked = cmd.Submission((), CommandId("c-1"), "uid:1000", request)
        first = await rig.engine.reconcile_for(asked)
        assert [type(body) for body in rig.events()[begun:]] == [
            ev.ReconcileRequested,
            ev.DriftDetected,
            ev.DriftRepaired,
        ]
        (event,) = [each for each in rig.recorded() if isinstance(each.body, ev.ReconcileRequested)]
        assert (event.actor, event.command_id, event.stream) == ("uid:1000", "c-1", ev.node_stream(rig.engine.node))
        assert event.body == ev.ReconcileRequested(request=request)
        # The same key again is nobody's asking anew; what the service does by itself nobody asked for.
        rig.kernel.outside.set_mtu("tun0", 1300)
        assert await rig.engine.reconcile_for(asked) == first
        assert rig.kernel.observe().links["tun0"].mtu == 1300
        await rig.engine.reconcile()
        assert rig.kernel.observe().links["tun0"].mtu == 1500
        assert len(rig.of(ev.ReconcileRequested)) == 1


async def test_who_asks_to_reconcile_is_refused_while_the_log_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, FakeKernel()) as rig:
        await rig.declare()
        rig.kernel.outside.set_mtu("tun0", 1300)

        def full(*_arguments: Any) -> "Future[list[ev.Recorded]]":
            raise TunledgerError(ErrorCode.LOG_FULL, "disk full", retry=True)

        monkeypatch.setattr(rig.writer, "append", full)
        asked = cmd.Submission((), CommandId("c-1"), "uid:0", cmd.Request(via="v1", call="reconcile"))
        with pytest.raises(TunledgerError, match="disk full"):
            await rig.engine.reconcile_for(asked)
        assert rig.kernel.observe().links["tun0"].mtu == 1300, "mended, and nobody knows who asked"


@pytest.mark.parametrize("call", ["confirm", "reconcile_for"])
async def test_confirmations_and_orders_to_reconcile_count_among_the_commands_in_flight(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, FakeKernel()) as rig:
        ask = getattr(rig.engine, call)

        def submission() -> cmd.Submission:
            return cmd.Submission((), CommandId(CLOCK.new_id()), "uid:0", cmd.Request(via="v1", call="x", confirms="x"))

        monkeypatch.setattr(engine_module, "IN_FLIGHT_MAX", 3)
        answers = await asyncio.gather(*(ask(submission()) for _ in range(8)), return_exceptions=True)
        refused = [a for a in answers if isinstance(a, TunledgerError) and a.code is ErrorCode.OVERLOADED]
        assert len(refused) == 5
        assert all(error.retry for error in refused)
        again: Any = (await asyncio.gather(ask(submission()), return_exceptions=True))[0]
        assert getattr(again, "code", None) is not ErrorCode.OVERLOADED, "they are counted for good"


async def test_a_mistake_while_looking_or_counting_is_told_and_taken_back_when_it_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "STUMBLED_S", 0.01)
    async with running(tmp_path, FakeKernel()) as rig:
        engine = rig.engine
        work, sample, broken = engine.work, engine.sample, True

        async def look(*, everything: bool) -> None:
            if broken:
                raise ZeroDivisionError("looking")
            await work(everything=everything)

        async def count() -> None:
            if broken:
                raise ZeroDivisionError("counting")
            await sample()

        monkeypatch.setattr(engine, "work", look)
        monkeypatch.setattr(engine, "sample", count)
        tasks = [
            asyncio.create_task(loop.keep_reconciled(engine, 0.01)),
            asyncio.create_task(loop.keep_counted(engine, 0.01)),
        ]
        try:
            async with asyncio.timeout(20):
                while len(engine.health()) < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                assert [("looking" in words, "counting" in words) for words in engine.health()] == [
                    (True, False),
                    (False, True),
                ]
                broken = False
                while engine.health():  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def test_a_full_queue_of_the_applier_refuses_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(applier, "QUEUE_MAX", 3)
    hands = Applier()  # not started: nobody empties the queue
    done = [hands.run(lambda: 1) for _ in range(3)]
    with pytest.raises(TunledgerError) as refused:
        hands.run(lambda: 1)
    assert (refused.value.code, refused.value.retry) == (ErrorCode.OVERLOADED, True)
    hands.start()
    assert [each.result(10) for each in done] == [1, 1, 1]
    hands.close()
    with pytest.raises(TunledgerError, match="stopping"):
        hands.run(lambda: 1)


async def test_a_worker_that_cannot_take_the_device_fails_the_command_and_frees_it(tmp_path: Path) -> None:
    async with running(tmp_path, FakeKernel()) as rig:
        await rig.declare()
        rig.plane.refusal = RuntimeError("no worker")
        with pytest.raises(TunledgerError) as refused:
            await rig.order(cmd.EnableProcessing(InterfaceName("tun0")))
        assert refused.value.code is ErrorCode.WORKER_FAILED
        assert rig.kernel.open_devices() == {}
        assert rig.engine.state.find("tun0").spec.processing.running is False  # type: ignore[union-attr]


async def test_a_delete_that_fails_keeps_the_interface(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare(**FULL)
        kernel.fail(NO_MEMORY, on=DeleteLink)
        with pytest.raises(TunledgerError, match="no memory"):
            await rig.order(cmd.RetireInterface(InterfaceName("tun0")))
        assert "tun0" in kernel.observe().links
        assert rig.plane.attached(), "what was stopped for the removal is started again"
        await rig.order(cmd.RetireInterface(InterfaceName("tun0")))
        assert "tun0" not in kernel.observe().links


async def test_a_copied_token_does_not_count_twice(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        answer = await rig.declare()
        kernel.outside.add_link("copy", Mode.TUN, alias=kernel.observe(["tun0"]).links["tun0"].alias)
        kernel.outside.count("tun0", LinkCounters(rx_packets=10))
        kernel.outside.count("copy", LinkCounters(rx_packets=500))
        for _ in range(5):
            await rig.engine.sample()
        assert rig.engine.totals(answer.finished[0].interface_id)["kernel"]["rx_packets"] == 10


async def test_a_sample_between_a_look_and_its_repair_is_not_counted_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        of = (await rig.declare()).finished[0].interface_id
        kernel.outside.count("tun0", LinkCounters(rx_packets=10))
        kernel.outside.set_owner("tun0", 4711, None)  # which only making it anew can mend
        append = rig.engine._journal.append

        async def after_a_sample(drafts: Any, also: Any = None) -> Any:
            if any(isinstance(draft.body, ev.DriftDetected) for draft in drafts):
                kernel.outside.count("tun0", LinkCounters(rx_packets=12))
                await rig.engine.sample()
            return await append(drafts, also)

        monkeypatch.setattr(rig.engine._journal, "append", after_a_sample)
        await rig.engine.reconcile()
        assert len(rig.of(ev.DriftRepaired)) == 1
        await rig.engine.sample()
        assert rig.engine.totals(of)["kernel"]["rx_packets"] == 12


async def test_the_next_engine_goes_on_where_one_ended(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare(**FULL)
        state = rig.engine.state
    async with running(tmp_path, kernel) as rig:
        assert {i.id: i.spec for i in rig.engine.state.interfaces.values()} == {
            i.id: i.spec for i in state.interfaces.values()
        }
        (done,) = rig.of(ev.StartupReconciled)[-1:]
        assert (done.processing_resumed, done.recreated) == (["tun0"], [])


def test_a_flood_of_refusals_is_recorded_as_a_number() -> None:
    allowance = Allowance(burst=3, per_s=1.0)
    taken = [allowance.take(1.0) for _ in range(10)]
    assert [allowed for allowed, _ in taken] == [True] * 3 + [False] * 7
    assert allowance.take(2.5) == (True, 7)
    assert allowance.take(2.5) == (False, 0)


async def test_a_take_back_waits_for_a_pending_intent_and_never_comes_upon_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outcome of a take-back that could not be recorded is recovery's to bring, and no second intent comes."""
    async with running(tmp_path, FakeKernel()) as rig:
        await rig.declare()
        change = cmd.PatchInterface(InterfaceName("tun0"), {"mtu": 1400})
        await rig.order(change, confirm_by="2020-01-01T00:00:00.000000Z")
        append, calls = rig.writer.append, 0

        def full_at_second(*arguments: Any) -> "Future[list[ev.Recorded]]":
            nonlocal calls
            calls += 1
            if calls == 2:
                raise TunledgerError(ErrorCode.LOG_FULL, "disk full", retry=True)
            return append(*arguments)

        monkeypatch.setattr(rig.writer, "append", full_at_second)
        await rig.engine.take_back_overdue()
        monkeypatch.setattr(rig.engine._deadlines, "_take_backs", {})
        await rig.engine.take_back_overdue()
        assert len(rig.of(ev.InterfaceReconfigured)) == 2, "a second take-back was recorded upon the first"
        await rig.engine.reconcile()
        assert rig.kernel.observe(["tun0"]).links["tun0"].mtu == 1500
        assert rig.engine.state.unconfirmed == {}
        assert_settled(rig)


class SetClock(SystemClock):
    """A host's clock that somebody sets, and one beside it that nobody can."""

    def __init__(self) -> None:
        self.wall, self.elapsed = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC), 1000.0

    def passes(self, seconds: float) -> None:
        self.wall += datetime.timedelta(seconds=seconds)
        self.elapsed += seconds

    def is_set_by(self, hours: float) -> None:
        self.wall += datetime.timedelta(hours=hours)

    def now(self) -> str:
        return self.wall.strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    def seconds_until(self, stamp: str) -> float:
        return (datetime.datetime.fromisoformat(stamp) - self.wall).total_seconds()

    def elapsed_s(self) -> float:
        return self.elapsed


@pytest.mark.parametrize("hours", [-5, 5])
async def test_a_deadline_goes_by_a_clock_that_nobody_sets(tmp_path: Path, hours: float) -> None:
    clock = SetClock()
    async with running(tmp_path, FakeKernel(), clock) as rig:
        await rig.declare()
        change = cmd.PatchInterface(InterfaceName("tun0"), {"mtu": 1400})
        await rig.order(change, confirm_by="2026-01-01T00:01:00.000000Z")
        clock.is_set_by(hours)
        clock.passes(59)
        await rig.engine.take_back_overdue()
        assert rig.engine.next_deadline_s() == pytest.approx(1)
        assert "tun0" in rig.engine.state.unconfirmed, "it fired before its time"
        clock.passes(2)
        assert rig.engine.next_deadline_s() == 0
        await rig.engine.take_back_overdue()
        assert rig.engine.state.unconfirmed == {}
        assert rig.kernel.observe(["tun0"]).links["tun0"].mtu == 1500


class SlowClock(SetClock):
    """Between two looks at it time passes: somebody else had the processor."""

    slow_s = 0.0

    def seconds_until(self, stamp: str) -> float:
        found = super().seconds_until(stamp)
        self.passes(self.slow_s)
        return found

    def elapsed_s(self) -> float:
        found = super().elapsed_s()
        self.passes(self.slow_s)
        return found


async def test_what_passes_between_looks_at_two_clocks_brings_no_deadline_on(tmp_path: Path) -> None:
    clock = SlowClock()
    async with running(tmp_path, FakeKernel(), clock) as rig:
        await rig.declare()
        change = cmd.PatchInterface(InterfaceName("tun0"), {"mtu": 1400})
        clock.slow_s = 5
        await rig.order(change, confirm_by="2026-01-01T00:01:00.000000Z")
        clock.slow_s = 0
        clock.passes((datetime.datetime(2026, 1, 1, 0, 0, 59, tzinfo=datetime.UTC) - clock.wall).total_seconds())
        await rig.engine.take_back_overdue()
        assert "tun0" in rig.engine.state.unconfirmed, "it fired before its time"
        clock.passes(10)
        await rig.engine.take_back_overdue()
        assert rig.engine.state.unconfirmed == {}


async def test_after_a_restart_the_recorded_time_of_a_deadline_counts(tmp_path: Path) -> None:
    kernel, clock = FakeKernel(), SetClock()
    async with running(tmp_path, kernel, clock) as rig:
        await rig.declare()
        change = cmd.PatchInterface(InterfaceName("tun0"), {"mtu": 1400})
        await rig.order(change, confirm_by="2026-01-01T00:01:00.000000Z")
    clock.passes(30)
    clock.elapsed = 5.0  # a reboot
    async with running(tmp_path, kernel, clock) as rig:
        assert rig.engine.next_deadline_s() == pytest.approx(30)
        clock.passes(31)
        await rig.engine.take_back_overdue()
        assert rig.engine.state.unconfirmed == {}


async def test_a_frozen_log_takes_nothing_back(tmp_path: Path) -> None:
    async with running(tmp_path, FakeKernel()) as rig:
        await rig.order(cmd.DeclareInterface(parse_spec({"name": "tun0"})), confirm_by="2020-01-01T00:00:00.000000Z")
        rig.engine.freeze("somebody changed the log")
        await rig.engine.take_back_overdue()
        assert "tun0" in rig.kernel.observe().links
        assert rig.engine.next_deadline_s() is None


async def test_the_trouble_of_what_is_gone_is_forgotten(tmp_path: Path) -> None:
    """A create that fails and cannot be undone leaves no repair that is due for ever."""
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        kernel.fail(NO_MEMORY, on=SetMtu)
        kernel.fail(NO_MEMORY, on=DeleteLink)
        with pytest.raises(TunledgerError):
            await rig.declare(mtu=1400)
        assert not rig.engine.troubles
        assert rig.engine.next_retry_s() is None
        await rig.engine.reconcile()
        assert "tun0" not in kernel.observe().links, "the orphan is removed"


async def test_writing_the_same_again_is_no_other_state(tmp_path: Path) -> None:
    async with running(tmp_path, FakeKernel()) as rig:
        first = (await rig.declare()).finished[0].interface
        second = (await rig.change({"mtu": 1500})).finished[0].interface
        third = (await rig.change({"mtu": 1400})).finished[0].interface
        assert first is not None
        assert second is not None
        assert third is not None
        assert first.etag == second.etag != third.etag


async def test_drift_that_is_only_to_be_reported_is_told_once_and_left_alone(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare(drift="report")
        kernel.outside.set_mtu("tun0", 1000)
        for _ in range(3):
            await rig.engine.reconcile()
        assert [len(d.differences) for d in rig.of(ev.DriftDetected)] == [1]
        assert kernel.observe(["tun0"]).links["tun0"].mtu == 1000
        trouble = rig.engine.troubles.get(rig.engine.state.by_name[InterfaceName("tun0")])
        assert trouble is not None
        assert "tun0.mtu: desired 1500, observed 1000" in trouble.message
        kernel.outside.set_up("tun0", False)
        await rig.engine.reconcile()
        assert [len(d.differences) for d in rig.of(ev.DriftDetected)] == [1, 2], "it changed"
        kernel.outside.set_mtu("tun0", 1500)
        kernel.outside.set_up("tun0", True)
        await rig.engine.reconcile()
        assert len(rig.of(ev.DriftEnded)) == 1
        assert rig.of(ev.DriftRepaired) == []
        assert not rig.engine.troubles


async def test_whoever_asks_has_reported_drift_mended_and_a_worker_is_ours_to_mend(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare(drift="report", processing={"running": True})
        kernel.outside.set_mtu("tun0", 1000)
        (device,) = rig.plane.held
        rig.plane.detach(device)
        await rig.engine.reconcile()
        assert rig.plane.held, "reading the device again is no change of the link"
        assert kernel.observe(["tun0"]).links["tun0"].mtu == 1000
        await rig.engine.reconcile_now()
        assert kernel.observe(["tun0"]).links["tun0"].mtu == 1500


async def test_a_start_makes_what_is_missing_also_where_drift_is_only_reported(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare(drift="report")
        kernel.outside.delete("tun0")
        await rig.engine.reconcile()
        assert "tun0" not in kernel.observe().links
    async with running(tmp_path, kernel) as rig:
        assert "tun0" in kernel.observe().links
        assert not rig.engine.troubles


async def test_whoever_fights_back_is_not_fought_for_ever(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare()
        for _ in range(12):
            kernel.outside.set_mtu("tun0", 1000)
            await rig.engine.reconcile()
        (contested,) = rig.of(ev.InterfaceContested)
        assert contested.differences == [{"path": "tun0.mtu", "desired": 1500, "observed": 1000}]
        assert len(rig.of(ev.DriftRepaired)) == len(rig.of(ev.DriftDetected)) == contested.repairs == 5
        assert kernel.observe(["tun0"]).links["tun0"].mtu == 1000
        trouble = rig.engine.troubles.get(rig.engine.state.by_name[InterfaceName("tun0")])
        assert trouble is not None
        assert trouble.code == "contested"
        await rig.change({"mtu": 1400})
        assert kernel.observe(["tun0"]).links["tun0"].mtu == 1400
        assert not rig.engine.troubles, "a command makes it as wanted"


async def test_a_token_that_the_log_never_gave_out_is_nobodys_orphan(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare()
        forged = Token(rig.engine.node, InterfaceId("01920000-0000-7000-8000-000000000009"))
        kernel.outside.add_link("tun9", Mode.TUN, alias=str(forged))
        await rig.engine.reconcile()
        assert "tun9" in kernel.observe().links
        assert any("tun9" in complaint for complaint in rig.engine.health())
        kernel.outside.delete("tun9")
        await rig.engine.reconcile()
        assert rig.engine.health() == []


async def test_a_start_on_a_log_that_lost_its_end_changes_nothing(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare()
        kernel.outside.set_mtu("tun0", 1000)
        forged = Token(rig.engine.node, InterfaceId("01920000-0000-7000-8000-000000000009"))
        kernel.outside.add_link("tun9", Mode.TUN, alias=str(forged))
        events = len(rig.events())
    before = kernel.observe().links
    async with running(tmp_path, kernel) as rig:
        assert kernel.observe().links == before
        assert len(rig.events()) == events
        assert "tun9" in (rig.engine.frozen or "")
        with pytest.raises(TunledgerError) as refused:
            await rig.change({"mtu": 1400})
        assert refused.value.code is ErrorCode.LOG_CORRUPT


async def test_a_key_is_taken_from_the_moment_its_intent_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While there is no outcome, a repetition is neither done again nor told that all is well."""
    async with running(tmp_path, FakeKernel()) as rig:
        append = rig.writer.append

        def refuse_outcomes(drafts: Any, also: Any = None) -> Future[list[ev.Recorded]]:
            if any(isinstance(draft.body, ev.Outcome) for draft in drafts):
                raise TunledgerError(ErrorCode.LOG_FULL, "no space", retry=True)
            return append(drafts, also)

        monkeypatch.setattr(rig.writer, "append", refuse_outcomes)
        for _ in range(2):
            with pytest.raises(TunledgerError) as refused:
                await rig.declare_with_key("k", "tun0")
            assert refused.value.code is ErrorCode.OUTCOME_UNKNOWN
        assert len(rig.of(ev.InterfaceDeclared)) == 1
        monkeypatch.setattr(rig.writer, "append", append)
        await rig.engine.reconcile()
        answer = await rig.declare_with_key("k", "tun0")
        assert answer.reply is not None
        assert answer.reply.status == 201
        assert len(rig.of(ev.InterfaceDeclared)) == 1


async def test_a_take_back_that_cannot_be_done_keeps_no_other_waiting(tmp_path: Path) -> None:
    kernel = FakeKernel()
    past = "2020-01-01T00:00:00.000000Z"
    async with running(tmp_path, kernel) as rig:
        for name in ("tun0", "tun1"):
            await rig.declare(name)
        await rig.order(cmd.RetireInterface(InterfaceName("tun0")), confirm_by=past)
        kernel.outside.add_link("tun0", Mode.TUN)  # so it cannot come back
        await rig.engine.take_back_overdue()
        await rig.order(cmd.PatchInterface(InterfaceName("tun1"), {"mtu": 1400}), confirm_by=past)
        await rig.engine.take_back_overdue()
        assert kernel.observe(["tun1"]).links["tun1"].mtu == 1500
        assert list(rig.engine.state.unconfirmed) == ["tun0"]
        later = rig.engine.next_deadline_s()
        assert later is not None
        assert later > 1


async def test_a_refusal_that_cannot_be_kept_is_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key: a repetition after a restart might hear another answer."""
    async with running(tmp_path, FakeKernel()) as rig:
        await rig.declare()

        def broken(*_arguments: Any) -> "Future[list[ev.Recorded]]":
            raise TunledgerError(ErrorCode.LOG_UNAVAILABLE, "I/O error")

        monkeypatch.setattr(rig.writer, "append", broken)
        answer = await rig.declare_with_key("k", "tun0")
        assert answer.reply is not None
        assert answer.reply.status == 503, "and not 409, which nobody will remember"
        with pytest.raises(TunledgerError) as heard:
            await rig.declare()
        assert heard.value.code is ErrorCode.INTERFACE_EXISTS, "without a key nothing has to be kept"


async def test_a_repair_that_somebody_asked_for_in_vain_keeps_no_loop_busy(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare(drift="report")
        kernel.outside.set_mtu("tun0", 1000)
        kernel.fail(NO_MEMORY, on=SetMtu, times=100)
        await rig.engine.reconcile_now()
        await rig.engine.reconcile()
        assert rig.engine.next_retry_s() is None


async def test_drift_that_could_not_be_told_is_told_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare(drift="report")
        kernel.outside.set_mtu("tun0", 1000)

        def full(*_arguments: Any) -> "Future[list[ev.Recorded]]":
            raise TunledgerError(ErrorCode.LOG_FULL, "no space", retry=True)

        with monkeypatch.context() as patched:
            patched.setattr(rig.writer, "append", full)
            with pytest.raises(TunledgerError):
                await rig.engine.reconcile()
        await rig.engine.reconcile()
        await rig.engine.reconcile()
        assert len(rig.of(ev.DriftDetected)) == 1


async def test_a_batch_is_finished_whole_or_not_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        append = rig.writer.append

        def refuse_outcomes(drafts: Any, also: Any = None) -> "Future[list[ev.Recorded]]":
            if any(isinstance(draft.body, ev.Outcome) for draft in drafts):
                raise TunledgerError(ErrorCode.LOG_FULL, "no space", retry=True)
            return append(drafts, also)

        batch = tuple(cmd.DeclareInterface(parse_spec({"name": name})) for name in ("tun0", "tun1"))
        request = cmd.Request(via="v1", call="batch")
        with monkeypatch.context() as patched:
            patched.setattr(rig.writer, "append", refuse_outcomes)
            with pytest.raises(TunledgerError):
                await rig.engine.submit(cmd.Submission(batch, CommandId("c1"), "uid:0", request))
        async with rig.engine._locks.hold(["tun0"]):  # as a request on it does that is being refused
            await rig.engine.reconcile()
            assert rig.of(ev.CommandApplied, ev.CommandFailed) == []
        await rig.engine.reconcile()
        assert [type(body) for body in rig.of(ev.CommandApplied, ev.CommandFailed)] == [
            ev.CommandApplied,
            ev.CommandApplied,
        ]


async def test_a_repair_that_cannot_be_looked_at_again_is_told_as_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare()
        kernel.outside.set_mtu("tun0", 1000)
        execute = kernel.execute_many

        def then_blind(work: Any) -> Any:
            done = execute(work)

            def refused(_names: Any = None) -> Any:
                raise TunledgerError(ErrorCode.KERNEL_REFUSED, "no memory", retry=True)

            monkeypatch.setattr(kernel, "observe", refused)
            return done

        observe = kernel.observe
        monkeypatch.setattr(kernel, "execute_many", then_blind)
        await rig.engine.reconcile()
        assert [body.message for body in rig.of(ev.RepairFailed)] == ["no memory"]
        monkeypatch.setattr(kernel, "observe", observe)
        monkeypatch.setattr(kernel, "execute_many", execute)
        await rig.engine.reconcile_now()
        assert not rig.engine.troubles
