"""The engine with interfaces in network namespaces, on fake ones."""

from pathlib import Path
from typing import Any

import pytest

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.spec import parse_spec
from service.domain.token import Token
from service.domain.values import CommandId, InterfaceName, Mode
from service.kernel.fake import FakeNamespaces
from tests.reconcile.rig import CLOCK, Rig, running

pytestmark = pytest.mark.anyio
RUNNING = {"running": True}


async def replace(rig: Rig, **fields: Any) -> None:
    await rig.order(cmd.ReplaceInterface(parse_spec({"name": "tun0", **fields}), recreate=True))


def ours(hosts: FakeNamespaces) -> list[str]:
    return sorted(link.key for link in hosts.host().observe().links.values() if link.token is not None)


async def test_a_namespace_that_went_stops_processing_whatever_is_done_about_drift(tmp_path: Path) -> None:
    hosts = FakeNamespaces()
    hosts.add("blue")
    async with running(tmp_path, hosts.host()) as rig:
        await rig.declare(netns="blue", processing=RUNNING)
        await rig.declare("tun1", netns="blue", processing=RUNNING, drift="report")
        await rig.declare("tun2")
        hosts.delete("blue")
        await rig.engine.reconcile()
        assert rig.plane.held == {}
        (failed,) = rig.of(ev.RepairFailed)
        assert failed.code == "netns_missing"
        await rig.engine.reconcile()
        by_name: dict[str, Any] = {i.name: rig.engine.troubles.get(i.id) for i in rig.engine.state.interfaces.values()}
        assert by_name["tun0"] is not None
        assert "`ip netns add blue` makes it" in by_name["tun0"].message
        assert by_name["tun1"] is not None
        assert by_name["tun1"].code == "reported"
        assert by_name["tun2"] is None
        hosts.add("blue")
        await rig.engine.reconcile_now()
        assert ours(hosts) == ["blue/tun0", "blue/tun1", "tun2"]
        assert len(rig.plane.held) == 2


async def test_an_interface_in_a_namespace_that_went_can_be_deleted(tmp_path: Path) -> None:
    hosts = FakeNamespaces()
    hosts.add("blue")
    async with running(tmp_path, hosts.host()) as rig:
        await rig.declare(netns="blue", processing=RUNNING)
        hosts.delete("blue")
        await rig.order(cmd.RetireInterface(rig.engine.state.find("tun0").name))  # type: ignore[union-attr]
        assert rig.engine.state.interfaces == {}
        assert rig.plane.held == {}


async def test_an_interface_in_a_namespace_that_went_can_be_changed_and_comes_back_as_it_is_desired_then(
    tmp_path: Path,
) -> None:
    hosts = FakeNamespaces()
    hosts.add("blue")
    async with running(tmp_path, hosts.host()) as rig:
        await rig.declare(netns="blue", processing=RUNNING)
        await rig.declare("tun1")
        hosts.delete("blue")
        await rig.order(cmd.DisableProcessing(InterfaceName("tun0")))  # nobody has noticed yet
        assert rig.plane.held == {}
        assert rig.of(ev.CommandApplied)[-1].steps == ["# stop processing on tun0"]
        (changed,) = (await rig.change({"mtu": 1400})).finished
        assert "netns blue does not exist" in changed.waits
        assert rig.of(ev.CommandApplied)[-1].steps == []
        assert rig.of(ev.CommandFailed) == []
        known = rig.engine.state.find("tun0")
        assert known is not None
        assert "netns blue does not exist" in str(rig.engine.degraded(known.id))
        assert rig.of(ev.RepairFailed)[-1].code == "netns_missing"
        with pytest.raises(TunledgerError, match="netns blue does not exist"):
            await rig.declare("tun2", netns="blue")
        hosts.add("blue")
        await rig.engine.reconcile_now()
        assert ours(hosts) == ["blue/tun0", "tun1"]
        assert hosts.host().observe().links["blue/tun0"].mtu == 1400
        assert rig.plane.held == {}
        assert rig.engine.degraded(known.id) is None


async def test_what_cannot_be_done_while_a_namespace_is_gone_is_not_said_to_be_done(tmp_path: Path) -> None:
    hosts = FakeNamespaces()
    hosts.add("blue")
    async with running(tmp_path, hosts.host()) as rig:
        await rig.declare(netns="blue")
        hosts.delete("blue")
        change = cmd.PatchInterface(InterfaceName("tun0"), {"mtu": 1400})
        for gone in (True, False):
            asked = cmd.Submission((change,), CommandId(CLOCK.new_id()), "uid:0", cmd.Request(via="v1", call="change"))
            preview = await rig.engine.preview(asked)
            ((_, found, steps, why),) = preview.plans
            ((_, drifted, mending, because),) = await rig.engine.drift()
            assert [str(difference.path) for difference in found] == [str(d.path) for d in drifted] == ["tun0"]
            assert (not steps, not mending) == (gone, gone)
            for words in (why, because.message if because is not None else None):
                assert words == ("netns blue does not exist; `ip netns add blue` makes it" if gone else None)
            if gone:
                hosts.add("blue")


async def test_a_batch_that_fails_elsewhere_leaves_one_whose_namespace_went_as_it_was(tmp_path: Path) -> None:
    hosts = FakeNamespaces()
    hosts.add("blue")
    async with running(tmp_path, hosts.host()) as rig:
        await rig.declare(netns="blue")
        await rig.declare("tun1")
        hosts.delete("blue")
        hosts.own.fail(TunledgerError(ErrorCode.KERNEL_REFUSED, "no memory"))
        patches = [cmd.PatchInterface(InterfaceName(name), {"mtu": 1300}) for name in ("tun0", "tun1")]
        with pytest.raises(TunledgerError, match="no memory"):
            await rig.order(*patches)
        assert [(body.name, body.undone) for body in rig.of(ev.CommandFailed)] == [("tun0", True), ("tun1", True)]
        spec = rig.engine.state.find("tun0").spec  # type: ignore[union-attr]
        assert spec is not None
        assert spec.mtu == 1500


async def test_one_in_a_namespace_that_may_not_be_entered_is_not_taken_for_gone(tmp_path: Path) -> None:
    hosts = FakeNamespaces()
    hosts.add("blue")
    why = TunledgerError(ErrorCode.PERMISSION_DENIED, "needs CAP_SYS_ADMIN")
    async with running(tmp_path, hosts.host()) as rig:
        await rig.declare(netns="blue")
        await rig.declare("tun1")
        hosts.refuse("blue", why)
        with pytest.raises(TunledgerError, match="needs CAP_SYS_ADMIN"):
            await rig.order(cmd.RetireInterface(rig.engine.state.find("tun0").name))  # type: ignore[union-attr]
        with pytest.raises(TunledgerError, match="needs CAP_SYS_ADMIN") as refused:
            await rig.declare("tun2", netns="blue")
        assert refused.value.field == "netns"
        await rig.change({"mtu": 1400}, "tun1")
        await rig.engine.reconcile()
        hosts.refuse("blue", None)
        await rig.engine.reconcile_now()
        assert ours(hosts) == ["blue/tun0", "tun1"]


async def test_a_change_of_namespace_that_fails_is_undone_where_it_was(tmp_path: Path) -> None:
    hosts = FakeNamespaces()
    hosts.add("blue")
    red = hosts.add("red")
    async with running(tmp_path, hosts.host()) as rig:
        await rig.declare(netns="blue", processing=RUNNING)
        red.fail(TunledgerError(ErrorCode.KERNEL_REFUSED, "no memory"))
        with pytest.raises(TunledgerError, match="no memory"):
            await replace(rig, netns="red", processing=RUNNING)
        assert ours(hosts) == ["blue/tun0"]
        assert len(rig.plane.held) == 1
        await replace(rig, netns="red")
        assert ours(hosts) == ["red/tun0"]
        await replace(rig)
        assert ours(hosts) == ["tun0"]


async def test_a_crash_between_two_namespaces_leaves_one_link(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    hosts = FakeNamespaces()
    blue = hosts.add("blue")
    red = hosts.add("red")
    async with running(tmp_path, hosts.host()) as rig:
        await rig.declare(netns="blue")
        token = Token(rig.engine.node, next(iter(rig.engine.state.interfaces)))
    for kernel, left in ((blue, "blue/tun0"), (red, "red/tun0")):
        del left
        async with running(tmp_path, hosts.host()) as rig:
            kernel.fail(Killed())
            with pytest.raises(Killed):
                await replace(rig, netns="red" if kernel is blue else "blue")
            kernel.heal()
        async with running(tmp_path, hosts.host()) as rig:
            assert ours(hosts) == ["red/tun0" if kernel is blue else "blue/tun0"]
            assert rig.engine.state.interfaces[token.interface_id].pending is None


async def test_orphans_are_removed_in_namespaces_and_what_others_moved_is_not(tmp_path: Path) -> None:
    hosts = FakeNamespaces()
    hosts.add("blue")
    red = hosts.add("red")
    async with running(tmp_path, hosts.host()) as rig:
        await rig.declare(netns="blue")
        await rig.declare("tun1")
        node = rig.engine.node
        kept, retired = (i.id for i in rig.engine.state.interfaces.values())
        await rig.order(cmd.RetireInterface(rig.engine.state.find("tun1").name))  # type: ignore[union-attr]
    red.outside.add_link("left0", Mode.TUN, alias=str(Token(node, retired)))
    red.outside.add_link("moved0", Mode.TUN, alias=str(Token(node, kept)))
    red.outside.add_link("theirs0", Mode.TUN)
    async with running(tmp_path, hosts.host()) as rig:
        assert ours(hosts) == ["blue/tun0", "red/moved0"]
        assert "theirs0" in red.observe().links
        await rig.engine.reconcile()
        assert ours(hosts) == ["blue/tun0", "red/moved0"]
        assert rig.of(ev.DriftDetected) == []


async def test_a_deletion_looks_where_the_interface_was_to_be_before_also_with_hands_of_its_own(tmp_path: Path) -> None:
    """The remover's hands looked through `red` when nothing of ours was in it, and have never been there since."""
    hosts = FakeNamespaces()
    blue, red = hosts.add("blue"), hosts.add("red")
    async with running(tmp_path, hosts.host(), removing=hosts.host()) as rig:
        await rig.declare("tun9")
        hosts.own.outside.delete("tun9")
        await rig.order(cmd.RetireInterface(InterfaceName("tun9")))
        await rig.declare(netns="red")
        (alias,) = [link.alias for link in hosts.host().observe().links.values() if link.token is not None]
        await replace(rig, netns="blue")
        blue.outside.delete("tun0")
        red.outside.add_link("tun0", Mode.TUN, alias=alias)  # as if somebody had moved it back
        await rig.order(cmd.RetireInterface(InterfaceName("tun0")))
        assert ours(hosts) == []
