"""Copies of our tokens on links of others: told of and left alone, wherever they are."""

from pathlib import Path

import pytest

from service.domain.token import Token
from service.domain.values import Mode
from service.kernel.fake import FakeKernel, FakeNamespaces
from tests.reconcile.rig import Rig, running

pytestmark = pytest.mark.anyio


def token_of(rig: Rig, name: str) -> str:
    """What the link of a declared interface bears in its alias."""
    interface = rig.engine.state.find(name)
    assert interface is not None
    return str(Token(rig.engine.node, interface.id))


def complaint(link: str, name: str) -> str:
    return f"{link} carries a copy of the token of {name}"


async def test_a_copy_is_told_of_left_alone_and_forgotten_when_it_is_gone(tmp_path: Path) -> None:
    kernel = FakeKernel()
    async with running(tmp_path, kernel) as rig:
        await rig.declare()
        before = str(kernel)
        kernel.outside.add_link("copy0", Mode.TUN, alias=token_of(rig, "tun0"))
        for _ in range(2):
            summary = await rig.engine.reconcile_now()
            assert (summary.orphans_removed, summary.repaired) == ([], [])
            assert rig.engine.health() == [complaint("copy0", "tun0")]
        assert "copy0" in kernel.observe().links
        kernel.outside.delete("copy0")
        await rig.engine.reconcile()
        assert rig.engine.health() == []
        assert str(kernel) == before


async def test_a_copy_is_told_of_though_it_has_the_ifindex_of_a_link_of_ours_elsewhere(tmp_path: Path) -> None:
    """An ifindex says which link it is in one network namespace only."""
    hosts = FakeNamespaces()
    blue = hosts.add("blue")
    async with running(tmp_path, hosts.host()) as rig:
        await rig.declare("here0")
        index = hosts.own.observe().links["here0"].ifindex
        assert blue.outside.add_link("taken", Mode.TUN) == index  # so that blue gives another to ours
        await rig.declare("tun0", netns="blue")
        blue.outside.set_alias("taken", token_of(rig, "tun0"))
        links = rig.kernel.observe().links
        assert links["blue/taken"].ifindex == links["here0"].ifindex != links["blue/tun0"].ifindex
        await rig.engine.reconcile()
        assert rig.engine.health() == [complaint("blue/taken", "tun0")]
        assert {"blue/taken", "blue/tun0", "here0"} <= set(rig.kernel.observe().links)


async def test_what_others_put_into_another_namespace_is_no_copy(tmp_path: Path) -> None:
    """It was moved there, and is theirs to move back."""
    hosts = FakeNamespaces()
    blue = hosts.add("blue")
    async with running(tmp_path, hosts.host()) as rig:
        await rig.declare()
        await rig.declare("other0", netns="blue")  # else nobody looks in there
        blue.outside.add_link("tun0", Mode.TUN, alias=token_of(rig, "tun0"))
        summary = await rig.engine.reconcile()
        assert rig.engine.health() == []
        assert summary.orphans_removed == []
        assert "blue/tun0" in rig.kernel.observe().links
