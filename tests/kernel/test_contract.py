"""The contract of a kernel: what every step does, refuses and leaves alone. Fake and real Linux pass the same tests."""

import ipaddress
import os
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest

from service.domain import steps as st
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import LinkCounters, ObservedLink
from service.domain.spec import Offloads, Processing
from service.domain.token import Token
from service.domain.values import Address, InterfaceId, InterfaceName, Mode, NodeId, parse_cidr
from tests.kernel.conftest import Host, needs_other_uids, wait_until

NODE = NodeId("0123456789ab")
OURS = Token(NODE, InterfaceId("00000000-0000-7000-8000-000000000001"))
OTHER = Token(NODE, InterfaceId("00000000-0000-7000-8000-000000000002"))  # ours, but of another interface
TUN0, TUN1 = InterfaceName("tun0"), InterfaceName("tun1")


def addr(text: str) -> Address:
    return parse_cidr(text, "address")


def creation(name: str = "tun0", token: Token = OURS, **fields: Any) -> st.CreateLink:
    given = {"mode": Mode.TUN, "multi_queue": False, "owner": None, "group": None, **fields}
    return st.CreateLink(InterfaceName(name), token, **given)


def settled(link: ObservedLink) -> bool:
    """Linux makes operstate and IFF_RUNNING follow the carrier a little later (net/core/link_watch.c)."""
    runs = link.up and link.carrier
    return link.running is runs and (link.operstate in {"UP", "UNKNOWN"}) is runs


def seen(host: Host, name: str = "tun0") -> ObservedLink:
    wait_until(lambda: settled(host.kernel.observe([name]).links[name]))
    return host.kernel.observe([name]).links[name]


def there(host: Host) -> set[str]:
    return set(host.kernel.observe().links)


def addresses(host: Host, name: str = "tun0") -> list[str]:
    return sorted(map(str, seen(host, name).addresses))


def made(host: Host, *steps: st.Step, **fields: Any) -> ObservedLink:
    """tun0, created and changed by these steps."""
    host.kernel.execute(OURS, [creation(**fields), *steps])
    return seen(host)


def refusal(host: Host, *steps: st.Step, token: Token = OURS) -> TunledgerError:
    with pytest.raises(TunledgerError) as caught:
        host.kernel.execute(token, steps)
    return caught.value


def others(host: Host, ours: Collection[str] = ("tun0",)) -> dict[str, ObservedLink]:
    """All observed of every link but these; packets that come and go by themselves are nobody's change."""
    wait_until(lambda: all(map(settled, host.kernel.observe().links.values())))
    links = host.kernel.observe().links.values()
    return {link.name: replace(link, counters=LinkCounters()) for link in links if link.name not in ours}


# -- create


@pytest.mark.parametrize("mode", Mode)
def test_create_makes_a_marked_persistent_device_that_is_down(host: Host, mode: Mode) -> None:
    link = made(host, mode=mode)
    expected = ObservedLink(
        name="tun0",
        ifindex=link.ifindex,
        mode=mode,
        token=OURS,
        alias=str(OURS),
        mtu=1500,
        txqueuelen=500 if mode is Mode.TUN else 1000,
        mac=link.mac if mode is Mode.TAP else "",
        flags=0x1090 if mode is Mode.TUN else 0x1002,
        persist=True,
    )
    assert link == expected
    assert bool(link.mac) is (mode is Mode.TAP)
    assert link.ifindex > 1


def test_create_sets_owner_and_group_and_queues(host: Host) -> None:
    needs_other_uids(host)
    link = made(host, owner=1000, group=100, multi_queue=True)
    assert (link.owner, link.group, link.multi_queue) == (1000, 100, True)


def test_create_takes_every_uid_that_a_spec_may_have(host: Host) -> None:
    needs_other_uids(host)
    link = made(host, owner=2**32 - 2, group=2**31)
    assert (link.owner, link.group) == (2**32 - 2, 2**31)


def test_owner_zero_is_an_owner(host: Host) -> None:
    assert made(host, owner=0).owner == 0


@pytest.mark.parametrize("mode", [None, *Mode])
def test_create_refuses_a_name_that_somebody_has_and_leaves_them_alone(host: Host, mode: Mode | None) -> None:
    host.outside.add_link("tun0", mode, alias="somebody's")
    before = others(host, ())
    error = refusal(host, creation())
    assert error.code is ErrorCode.NAME_TAKEN
    assert str(error) == "tun0 exists and is not managed by tunledger; it was left alone"
    assert others(host, ()) == before


def test_create_refuses_a_name_that_is_ours_already(host: Host) -> None:
    before = made(host)
    assert refusal(host, creation()).code is ErrorCode.NAME_TAKEN
    assert seen(host) == before


def test_ifindex_is_never_used_again(host: Host) -> None:
    first = made(host)
    host.kernel.execute(OURS, [st.DeleteLink("tun0", first.ifindex, OURS)])
    assert made(host).ifindex > first.ifindex


def test_all_steps_of_a_fresh_interface_in_one_go(host: Host) -> None:
    link = made(
        host,
        st.SetMtu(TUN0, 1400),
        st.SetTxQueueLen(TUN0, 2000),
        st.AddAddress(TUN0, addr("10.0.0.1/24")),
        st.AddAddress(TUN0, addr("2001:db8::1/64")),
        st.SetUp(TUN0),
    )
    assert (link.mtu, link.txqueuelen, link.up) == (1400, 2000, True)
    assert addresses(host) == ["10.0.0.1/24", "2001:db8::1/64"]


def test_up_without_a_reader_is_not_running(host: Host) -> None:
    link = made(host, st.SetUp(TUN0))
    assert (link.up, link.running, link.carrier, link.operstate) == (True, False, False, "DOWN")


# -- delete


def test_delete_removes_ours(host: Host) -> None:
    link = made(host, st.SetUp(TUN0))
    host.kernel.execute(OURS, [st.DeleteLink("tun0", link.ifindex, OURS)])
    assert "tun0" not in there(host)


def test_delete_of_a_link_that_is_gone_is_no_error(host: Host) -> None:
    link = made(host)
    host.outside.delete("tun0")
    host.kernel.execute(OURS, [st.DeleteLink("tun0", link.ifindex, OURS)])


def test_delete_finds_ours_under_another_name(host: Host) -> None:
    link = made(host)
    host.outside.rename("tun0", "elsewhere")
    host.kernel.execute(OURS, [st.DeleteLink("tun0", link.ifindex, OURS)])
    assert not there(host) & {"tun0", "elsewhere"}


def test_delete_leaves_a_stranger_with_our_name_alone(host: Host) -> None:
    link = made(host)
    host.outside.delete("tun0")
    host.outside.add_link("tun0", Mode.TUN)
    before = others(host, ())
    host.kernel.execute(OURS, [st.DeleteLink("tun0", link.ifindex, OURS)])
    assert others(host, ()) == before


def test_delete_leaves_a_stranger_with_our_old_ifindex_alone(host: Host) -> None:
    link = made(host)
    host.outside.delete("tun0")
    host.outside.add_link("br0", ifindex=link.ifindex)
    before = others(host, ())
    assert refusal(host, st.DeleteLink("tun0", link.ifindex, OURS)).code is ErrorCode.NAME_TAKEN
    assert others(host, ()) == before


def test_delete_leaves_another_interface_of_ours_alone(host: Host) -> None:
    link = made(host)
    assert refusal(host, st.DeleteLink("tun0", link.ifindex, OTHER), token=OTHER).code is ErrorCode.NAME_TAKEN
    assert seen(host) == link


def test_recreate_gives_a_new_device_of_the_other_mode(host: Host) -> None:
    old = made(host, st.AddAddress(TUN0, addr("10.0.0.1/24")), st.SetUp(TUN0))
    host.kernel.execute(
        OURS, [st.DeleteLink("tun0", old.ifindex, OURS), creation(mode=Mode.TAP), st.SetMtu(TUN0, 1400)]
    )
    new = seen(host)
    assert (new.mode, new.mtu, new.up, new.addresses) == (Mode.TAP, 1400, False, ())
    assert new.ifindex != old.ifindex


# -- change


@pytest.mark.parametrize(
    ("step", "field", "value"),
    [
        (st.SetMtu(TUN0, 68), "mtu", 68),
        (st.SetMtu(TUN0, 65535), "mtu", 65535),
        (st.SetTxQueueLen(TUN0, 0), "txqueuelen", 0),
        (st.SetTxQueueLen(TUN0, 1_000_000), "txqueuelen", 1_000_000),
        (st.SetUp(TUN0), "up", True),
        (st.SetLinkGroup(TUN0, 7), "link_group", 7),
        (st.SetOwner(TUN0, 1000, None), "owner", 1000),
        (st.SetOwner(TUN0, None, 4_000_000_000), "group", 4_000_000_000),
    ],
    ids=str,
)
def test_change_changes_that_and_nothing_else(host: Host, step: st.Step, field: str, value: object) -> None:
    if isinstance(step, st.SetOwner):
        needs_other_uids(host)
    before = made(host)
    host.kernel.execute(OURS, [step])
    after = seen(host)
    assert getattr(after, field) == value
    assert replace(after, **{field: getattr(before, field)}, flags=before.flags) == before


def test_owner_is_replaced_and_none_leaves_it(host: Host) -> None:
    needs_other_uids(host)
    made(host, owner=1000, group=1001)
    host.kernel.execute(OURS, [st.SetOwner(TUN0, 7, None)])
    assert (seen(host).owner, seen(host).group) == (7, 1001)


def test_changes_keep_the_ifindex_and_the_admin_state(host: Host) -> None:
    before = made(host, st.AddAddress(TUN0, addr("10.0.0.1/24")), st.SetUp(TUN0))
    host.kernel.execute(
        OURS,
        [
            st.SetMtu(TUN0, 1400),
            st.SetTxQueueLen(TUN0, 77),
            st.AddAddress(TUN0, addr("10.9.0.1/16")),
            st.RemoveAddress(TUN0, addr("10.0.0.1/24")),
        ],
    )
    after = seen(host)
    assert (after.ifindex, after.up, addresses(host)) == (before.ifindex, True, ["10.9.0.1/16"])


@pytest.mark.parametrize(("mode", "mtu"), [(Mode.TUN, 67), (Mode.TUN, 65536), (Mode.TAP, 65522)])
def test_mtu_out_of_bounds_is_refused_and_changes_nothing(host: Host, mode: Mode, mtu: int) -> None:
    before = made(host, mode=mode)
    error = refusal(host, st.SetMtu(TUN0, mtu))
    assert (error.code, error.errno_name) == (ErrorCode.KERNEL_REFUSED, "EINVAL")
    assert str(error).startswith(f"ip link set tun0 mtu {mtu}: mtu ")
    assert seen(host) == before


def test_the_greatest_mtu_of_a_tap_is_what_a_spec_allows(host: Host) -> None:
    assert made(host, st.SetMtu(TUN0, 65521), mode=Mode.TAP).mtu == 65521


def test_tap_takes_a_hardware_address_also_while_up(host: Host) -> None:
    made(host, st.SetUp(TUN0), mode=Mode.TAP)
    host.kernel.execute(OURS, [st.SetMac(TUN0, "02:00:00:00:12:34")])
    assert (seen(host).mac, seen(host).up) == ("02:00:00:00:12:34", True)


def test_tun_refuses_a_hardware_address(host: Host) -> None:
    made(host)
    assert refusal(host, st.SetMac(TUN0, "02:00:00:00:12:34")).code is ErrorCode.KERNEL_REFUSED


def test_rename_keeps_everything_but_the_name(host: Host) -> None:
    before = made(host, st.AddAddress(TUN0, addr("10.0.0.1/24")))
    host.outside.rename("tun0", "elsewhere")
    host.kernel.execute(OURS, [st.SetName(TUN0, "elsewhere"), st.SetMtu(TUN0, 1400)])
    assert seen(host) == replace(before, mtu=1400)
    assert "elsewhere" not in there(host)


def test_rename_refuses_a_name_that_somebody_has(host: Host) -> None:
    made(host)
    host.outside.rename("tun0", "elsewhere")
    host.outside.add_link("tun0")
    before = others(host, ())
    assert refusal(host, st.SetName(TUN0, "elsewhere")).code is ErrorCode.NAME_TAKEN
    assert others(host, ()) == before


@pytest.mark.parametrize(
    "step", [st.StartProcessing(TUN0, OURS.interface_id, Mode.TUN, False), st.StopProcessing("tun0", OURS.interface_id)]
)
def test_processing_is_not_for_the_kernel(host: Host, step: st.Step) -> None:
    made(host)
    assert refusal(host, step).code is ErrorCode.INTERNAL


# -- whose is it

CHANGES = [
    st.SetMtu(TUN0, 1400),
    st.SetTxQueueLen(TUN0, 7),
    st.SetMac(TUN0, "02:00:00:00:12:34"),
    st.SetUp(TUN0),
    st.SetDown(TUN0),
    st.SetName(TUN1, "tun0"),
    st.SetOwner(TUN0, 1000, 1000),
    st.AddAddress(TUN0, addr("10.0.0.9/24")),
    st.RemoveAddress(TUN0, addr("10.0.0.1/24")),
    st.SetLinkGroup(TUN0, 7),
]


@pytest.mark.parametrize("alias", ["", "somebody's", str(OTHER), f"{OURS} "], ids=["none", "theirs", "other", "near"])
@pytest.mark.parametrize("step", CHANGES, ids=lambda step: type(step).__name__)
def test_no_step_touches_a_link_without_exactly_our_token(host: Host, step: st.Step, alias: str) -> None:
    host.outside.add_link("tun0", Mode.TAP, alias=alias)
    host.outside.add_address("tun0", addr("10.0.0.1/24"))
    before = others(host, ())
    assert refusal(host, step).code is ErrorCode.NAME_TAKEN
    assert others(host, ()) == before


def test_our_token_on_a_link_that_is_no_tun_proves_nothing(host: Host) -> None:
    host.outside.add_link("tun0", None, alias=str(OURS))
    before = others(host, ())
    assert seen(host).token is None
    assert refusal(host, st.SetMtu(TUN0, 1400)).code is ErrorCode.NAME_TAKEN
    assert refusal(host, st.DeleteLink("tun0", seen(host).ifindex, OURS)).code is ErrorCode.NAME_TAKEN
    assert others(host, ()) == before


@pytest.mark.parametrize("step", CHANGES, ids=lambda step: type(step).__name__)
def test_a_step_on_a_link_that_is_gone_says_so(host: Host, step: st.Step) -> None:
    error = refusal(host, step)
    assert (error.code, error.errno_name, error.retry) == (ErrorCode.DEVICE_GONE, "ENODEV", True)
    assert str(error) == f"{step}: the link is gone (tun0 does not exist any more)"


def test_everything_we_do_leaves_strangers_as_they_were(host: Host) -> None:
    needs_other_uids(host)
    host.outside.add_link("br0")
    host.outside.add_link("vpn0", Mode.TUN, alias="somebody's")
    for name in ("br0", "vpn0"):
        host.outside.set_up(name, True)
    host.outside.add_address("vpn0", addr("10.0.0.2/24"))
    host.outside.add_address("vpn0", addr("10.0.0.3/24"))
    host.outside.add_address("br0", addr("2001:db8::2/64"))
    host.outside.set_owner("vpn0", 7, 8)
    before = others(host)
    old = made(
        host,
        st.SetMtu(TUN0, 1400),
        st.AddAddress(TUN0, addr("10.0.0.2/24")),
        st.AddAddress(TUN0, addr("2001:db8::2/64")),
        st.SetUp(TUN0),
        st.RemoveAddress(TUN0, addr("10.0.0.2/24")),
        st.RemoveAddress(TUN0, addr("2001:db8::2/64")),
        st.SetDown(TUN0),
    )
    os.close(host.kernel.open_device(st.StartProcessing(TUN0, OURS.interface_id, Mode.TUN, False), OURS))
    host.kernel.execute(OURS, [st.DeleteLink("tun0", old.ifindex, OURS)])
    assert others(host) == before


# -- whose was it


def set_alias(host: Host, name: str = "tun0", token: Token = OURS) -> st.SetAlias:
    return st.SetAlias(name, seen(host, name).ifindex, token)


def test_an_alias_is_put_back_on_a_link_that_is_vouched_for(host: Host) -> None:
    before = made(host, st.AddAddress(TUN0, addr("10.0.0.1/24")))
    host.outside.set_alias("tun0", "somebody's")
    host.vouched.add(before.ifindex)
    host.kernel.execute(OURS, [set_alias(host), st.SetMtu(TUN0, 1400)])
    assert seen(host) == replace(before, mtu=1400)


def test_an_alias_is_put_back_under_the_name_that_somebody_gave_the_link(host: Host) -> None:
    before = made(host)
    host.outside.rename("tun0", "elsewhere")
    host.outside.set_alias("elsewhere", "")
    host.vouched.add(before.ifindex)
    host.kernel.execute(OURS, [set_alias(host, "elsewhere"), st.SetName(TUN0, "elsewhere")])
    assert seen(host) == before


def test_no_alias_is_put_on_a_link_that_nobody_vouches_for(host: Host) -> None:
    made(host)
    host.outside.set_alias("tun0", "somebody's")
    before = others(host, ())
    assert refusal(host, set_alias(host), st.SetMtu(TUN0, 1400)).code is ErrorCode.NAME_TAKEN
    assert others(host, ()) == before


def test_a_link_that_bears_our_token_needs_nobody_to_vouch_for_it(host: Host) -> None:
    before = made(host)
    host.kernel.execute(OURS, [set_alias(host), st.SetMtu(TUN0, 1400)])
    assert seen(host) == replace(before, mtu=1400)


@pytest.mark.parametrize("change", ["renamed", "bridge", "another's token"])
def test_no_alias_is_put_on_what_is_not_as_it_was_seen(host: Host, change: str) -> None:
    made(host)
    host.outside.set_alias("tun0", "somebody's")
    step = set_alias(host)
    host.vouched.add(step.ifindex)
    if change == "renamed":
        host.outside.rename("tun0", "elsewhere")
    elif change == "bridge":
        host.outside.delete("tun0")
        host.outside.add_link("tun0", ifindex=step.ifindex)
    else:
        step = replace(step, token=OTHER)
    before = others(host, ())
    assert refusal(host, step).code is ErrorCode.NAME_TAKEN
    assert others(host, ()) == before


def test_no_alias_is_put_on_a_link_that_has_the_name_of_one_that_is_gone(host: Host) -> None:
    made(host)
    step = set_alias(host)
    host.vouched.add(step.ifindex)
    host.outside.delete("tun0")
    host.outside.add_link("tun0", Mode.TUN)
    before = others(host, ())
    error = refusal(host, step)
    assert (error.code, error.errno_name) == (ErrorCode.DEVICE_GONE, "ENODEV")
    assert others(host, ()) == before


# -- many at once


def token(number: int) -> Token:
    return Token(NODE, InterfaceId(f"00000000-0000-7000-8000-{number:012x}"))


def named(number: int) -> InterfaceName:
    return InterfaceName(f"tun{number}")


Work = list[tuple[Token, list[st.Step]]]


def fresh(number: int, *steps: st.Step) -> tuple[Token, list[st.Step]]:
    return token(number), [creation(named(number), token(number)), *steps]


def all_made(host: Host, count: int) -> dict[int, ObservedLink]:
    """tun0 to tun<count - 1>, each of an interface of its own."""
    assert host.kernel.execute_many([fresh(n) for n in range(count)]) == [None] * count
    links = host.kernel.observe().links
    return {n: links[named(n)] for n in range(count)}


def removal(number: int, link: ObservedLink) -> tuple[Token, list[st.Step]]:
    return token(number), [st.DeleteLink(link.name, link.ifindex, token(number))]


def codes(errors: list[TunledgerError | None]) -> list[ErrorCode | None]:
    return [error.code if error else None for error in errors]


def test_no_work_is_no_work(host: Host) -> None:
    before = others(host, ())
    assert host.kernel.execute_many([]) == []
    assert host.kernel.execute_many([(OURS, []), (OTHER, [])]) == [None, None]
    assert others(host, ()) == before


def test_three_hundred_are_made_and_set_up_in_one_batch(host: Host) -> None:
    work: Work = []
    for n in range(300):
        address = addr(f"10.{n // 250}.{n % 250}.1/24")
        work.append(fresh(n, st.SetMtu(named(n), 1300 + n), st.AddAddress(named(n), address), st.SetUp(named(n))))
    assert host.kernel.execute_many(work) == [None] * 300
    links = host.kernel.observe().links
    for n in range(300):
        link = links[named(n)]
        assert (link.token, link.mtu, link.up, link.persist) == (token(n), 1300 + n, True, True)
        assert [str(a) for a in link.addresses] == [f"10.{n // 250}.{n % 250}.1/24"]


def test_three_hundred_leave_together_and_strangers_stay(host: Host) -> None:
    host.outside.add_link("tun1000", Mode.TUN, alias="somebody's")
    host.outside.add_link("br0", alias=str(OURS))
    host.outside.set_link_group("tun1000", 7)
    links = all_made(host, 300)
    before = others(host, {link.name for link in links.values()})
    assert host.kernel.execute_many([removal(n, link) for n, link in links.items()]) == [None] * 300
    assert others(host, ()) == before


def test_a_member_that_fails_fails_alone(host: Host) -> None:
    host.outside.add_link("tun1", Mode.TUN, alias="somebody's")
    host.outside.add_link("tun5", Mode.TAP)
    before = others(host, {named(n) for n in (0, 2, 3, 4, 6)})
    up = [st.SetUp(named(n)) for n in range(7)]
    errors = host.kernel.execute_many(
        [
            fresh(0, up[0]),
            fresh(1, up[1]),  # the name is somebody's
            fresh(2, st.SetMtu(named(2), 1), up[2]),
            fresh(3, st.SetMtu(named(3), 1000), st.AddAddress(named(3), addr("2001:db8::1/64")), up[3]),
            (token(4), [st.SetMtu(named(4), 1400), up[4]]),  # there is none
            (token(5), [st.SetMtu(named(5), 1400), up[5]]),  # not ours
            fresh(6, up[6]),
        ]
    )
    taken, gone, refused = ErrorCode.NAME_TAKEN, ErrorCode.DEVICE_GONE, ErrorCode.KERNEL_REFUSED
    assert codes(errors) == [None, taken, refused, refused, gone, taken, None]
    assert [str(error).split(":")[0] for error in errors if error][1:3] == [
        "ip link set tun2 mtu 1",
        "ip address replace 2001",
    ]
    links = host.kernel.observe().links
    assert {name: link.up for name, link in links.items() if link.token} == {
        "tun0": True,
        "tun2": False,
        "tun3": False,
        "tun6": True,
    }
    assert others(host, {named(n) for n in (0, 2, 3, 4, 6)}) == before


def test_each_member_has_its_steps_done_in_order(host: Host) -> None:
    """Another order leaves another address, name or state behind."""
    links = all_made(host, 2)
    host.outside.rename("tun1", "elsewhere")
    errors = host.kernel.execute_many(
        [
            (
                token(0),
                [
                    st.SetUp(TUN0),
                    st.AddAddress(TUN0, addr("2001:db8::1/64")),
                    st.SetDown(TUN0),
                    st.AddAddress(TUN0, addr("2001:db8::2/64")),
                    st.SetMtu(TUN0, 1300),
                    st.SetMtu(TUN0, 1400),
                ],
            ),
            (
                token(1),
                [
                    st.SetName(InterfaceName("between"), "elsewhere"),
                    st.SetName(TUN1, "between"),
                    st.SetMtu(TUN1, 1000),
                    st.SetMtu(TUN1, 1500),
                    st.AddAddress(TUN1, addr("2001:db8::1/64")),
                ],
            ),
        ]
    )
    assert errors == [None, None]
    assert addresses(host) == ["2001:db8::2/64"]
    assert (seen(host).mtu, seen(host).up) == (1400, False)
    assert (addresses(host, "tun1"), seen(host, "tun1").ifindex) == (["2001:db8::1/64"], links[1].ifindex)


def test_a_link_that_goes_in_the_middle_fails_alone(host: Host) -> None:
    """Its own delete makes it go, since nobody else can get a word in on both kernels."""
    links = all_made(host, 2)
    errors = host.kernel.execute_many(
        [
            (token(0), [st.SetMtu(TUN0, 1400), *removal(0, links[0])[1], st.SetUp(TUN0)]),
            (token(1), [st.SetMtu(TUN1, 1400), st.SetTxQueueLen(TUN1, 7), st.SetUp(TUN1)]),
        ]
    )
    assert codes(errors) == [ErrorCode.DEVICE_GONE, None]
    assert str(errors[0]) == "ip link set tun0 up: the link is gone (tun0 does not exist any more)"
    assert "tun0" not in there(host)
    assert (seen(host, "tun1").mtu, seen(host, "tun1").txqueuelen, seen(host, "tun1").up) == (1400, 7, True)


def test_a_name_that_one_gives_up_is_free_for_another(host: Host) -> None:
    links = all_made(host, 1)
    errors = host.kernel.execute_many([(OTHER, [creation("tun0", OTHER)]), removal(0, links[0])])
    assert errors == [None, None]
    assert seen(host).token == OTHER


def test_recreating_many_gives_new_devices(host: Host) -> None:
    links = all_made(host, 20)
    work: Work = [
        (token(n), [*removal(n, link)[1], creation(named(n), token(n), mode=Mode.TAP)]) for n, link in links.items()
    ]
    assert host.kernel.execute_many(work) == [None] * 20
    after = host.kernel.observe().links
    assert {after[named(n)].mode for n in links} == {Mode.TAP}
    assert not {after[named(n)].ifindex for n in links} & {link.ifindex for link in links.values()}


def test_delete_of_many_leaves_what_is_not_ours_any_more(host: Host) -> None:
    links = all_made(host, 6)
    host.outside.set_alias("tun1", "somebody's")
    host.outside.set_link_group("tun1", 7)
    host.outside.delete("tun2")
    host.outside.delete("tun3")
    host.outside.add_link("tun3", Mode.TUN)  # the name again
    host.outside.delete("tun4")
    host.outside.add_link("br0", ifindex=links[4].ifindex)  # the ifindex again
    before = others(host, {"tun0", "tun5"})
    errors = host.kernel.execute_many([removal(n, link) for n, link in links.items()])
    assert codes(errors) == [None, ErrorCode.NAME_TAKEN, None, None, ErrorCode.NAME_TAKEN, None]
    assert others(host, ()) == before


def test_one_link_may_be_deleted_twice_in_a_batch(host: Host) -> None:
    links = all_made(host, 2)
    work = [removal(0, links[0]), removal(0, links[0]), removal(1, links[1])]
    host.outside.set_alias("tun0", "somebody's")
    assert codes(host.kernel.execute_many(work)) == [ErrorCode.NAME_TAKEN, ErrorCode.NAME_TAKEN, None]
    host.outside.set_alias("tun0", links[0].alias)
    assert host.kernel.execute_many(work) == [None] * 3
    assert not there(host) & {"tun0", "tun1"}


def test_a_link_that_a_crash_left_in_a_group_for_removals_is_put_back_or_removed(host: Host) -> None:
    links = all_made(host, 3)
    group = st.REMOVAL_GROUPS[5]
    for n in range(3):
        host.outside.set_link_group(named(n), group)
    assert {seen(host, named(n)).link_group for n in range(3)} == {group}
    work: Work = [(token(0), [st.SetLinkGroup(TUN0, 0)]), removal(1, links[1]), removal(2, links[2])]
    assert host.kernel.execute_many(work) == [None] * 3
    assert seen(host) == links[0]
    assert not there(host) & {"tun1", "tun2"}


# -- addresses


def test_adding_an_address_twice_and_removing_it_twice_is_no_error(host: Host) -> None:
    made(host, *[st.AddAddress(TUN0, addr(a)) for a in ("10.0.0.1/24", "2001:db8::1/64")] * 2)
    assert addresses(host) == ["10.0.0.1/24", "2001:db8::1/64"]
    host.kernel.execute(OURS, [st.RemoveAddress(TUN0, addr(a)) for a in ("10.0.0.1/24", "2001:db8::1/64")] * 2)
    assert addresses(host) == []


def test_the_same_ipv4_address_may_have_two_prefix_lengths(host: Host) -> None:
    made(host, st.AddAddress(TUN0, addr("10.0.0.1/24")), st.AddAddress(TUN0, addr("10.0.0.1/16")))
    assert addresses(host) == ["10.0.0.1/16", "10.0.0.1/24"]
    host.kernel.execute(OURS, [st.RemoveAddress(TUN0, addr("10.0.0.1/24"))])
    assert addresses(host) == ["10.0.0.1/16"]


def test_an_ipv6_address_keeps_its_prefix_length_until_it_is_removed(host: Host) -> None:
    made(host, st.AddAddress(TUN0, addr("2001:db8::1/64")), st.AddAddress(TUN0, addr("2001:db8::1/48")))
    assert addresses(host) == ["2001:db8::1/64"]
    host.kernel.execute(
        OURS, [st.RemoveAddress(TUN0, addr("2001:db8::1/64")), st.AddAddress(TUN0, addr("2001:db8::1/48"))]
    )
    assert addresses(host) == ["2001:db8::1/48"]


def test_ipv6_goes_with_the_admin_state_and_does_not_come_back(host: Host) -> None:
    made(host, *[st.AddAddress(TUN0, addr(a)) for a in ("10.0.0.1/24", "2001:db8::1/64")], st.SetUp(TUN0))
    host.kernel.execute(OURS, [st.SetDown(TUN0)])
    assert addresses(host) == ["10.0.0.1/24"]
    host.kernel.execute(OURS, [st.SetUp(TUN0)])
    assert addresses(host) == ["10.0.0.1/24"]


def test_ipv6_can_be_added_while_down_and_stays_on_up(host: Host) -> None:
    made(host, st.AddAddress(TUN0, addr("2001:db8::1/64")))
    host.kernel.execute(OURS, [st.SetDown(TUN0)])  # down already
    assert addresses(host) == ["2001:db8::1/64"]
    host.kernel.execute(OURS, [st.SetUp(TUN0)])
    assert addresses(host) == ["2001:db8::1/64"]


def test_ipv6_goes_with_an_mtu_under_1280(host: Host) -> None:
    made(host, *[st.AddAddress(TUN0, addr(a)) for a in ("10.0.0.1/24", "2001:db8::1/64")], st.SetMtu(TUN0, 1280))
    assert addresses(host) == ["10.0.0.1/24", "2001:db8::1/64"]
    host.kernel.execute(OURS, [st.SetMtu(TUN0, 1279)])
    assert addresses(host) == ["10.0.0.1/24"]
    error = refusal(host, st.AddAddress(TUN0, addr("2001:db8::1/64")))
    assert (error.code, error.errno_name) == (ErrorCode.KERNEL_REFUSED, "EINVAL")
    host.kernel.execute(OURS, [st.SetMtu(TUN0, 1500), st.AddAddress(TUN0, addr("2001:db8::1/64"))])
    assert addresses(host) == ["10.0.0.1/24", "2001:db8::1/64"]


def test_removing_an_ipv6_address_that_the_mtu_took_is_no_error(host: Host) -> None:
    made(host, st.AddAddress(TUN0, addr("2001:db8::1/64")), st.SetUp(TUN0))
    host.kernel.execute(OURS, [st.SetMtu(TUN0, 1000), st.RemoveAddress(TUN0, addr("2001:db8::1/64"))])
    assert addresses(host) == []


def test_secondary_addresses_go_with_their_primary(host: Host) -> None:
    subnet = ["10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24"]
    made(host, *[st.AddAddress(TUN0, addr(a)) for a in (*subnet, "10.0.0.4/25", "10.0.1.1/24", "2001:db8::1/64")])
    host.kernel.execute(OURS, [st.RemoveAddress(TUN0, addr("10.0.0.1/24"))])
    assert addresses(host) == ["10.0.0.4/25", "10.0.1.1/24", "2001:db8::1/64"]


def test_a_primary_stays_when_its_secondary_goes(host: Host) -> None:
    made(host, *[st.AddAddress(TUN0, addr(a)) for a in ("10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24")])
    host.kernel.execute(OURS, [st.RemoveAddress(TUN0, addr("10.0.0.2/24"))])
    assert addresses(host) == ["10.0.0.1/24", "10.0.0.3/24"]


# -- look


def test_observe_by_name_says_that_it_is_not_everything(host: Host) -> None:
    link = made(host, st.AddAddress(TUN0, addr("10.0.0.1/24")))
    some, everything = host.kernel.observe(["tun0", "nothing"]), host.kernel.observe()
    assert (dict(some.links), some.complete) == ({"tun0": link}, False)
    assert everything.complete
    assert everything.links["tun0"] == link
    assert everything.by_interface(NODE) == {OURS.interface_id: link}
    assert everything.by_interface("ffffffffffff") == {}


def test_observe_finds_many_names_and_passes_over_those_that_are_not(host: Host) -> None:
    work = [fresh(n, st.AddAddress(named(n), addr(f"10.0.{n}.1/24"))) for n in range(12)]
    assert host.kernel.execute_many(work) == [None] * 12
    host.outside.add_link("br0")
    wanted = [name for n in range(12) for name in (named(n), f"nothing{n}")]
    some, everything = host.kernel.observe(wanted), host.kernel.observe()
    assert dict(some.links) == {name: link for name, link in everything.links.items() if name in wanted}
    assert [str(some.links[named(n)].addresses[0]) for n in range(12)] == [f"10.0.{n}.1/24" for n in range(12)]


def test_what_changed_is_seen_at_the_next_look(host: Host) -> None:
    """Also by a kernel that remembers what it saw."""
    before = made(host, st.AddAddress(TUN0, addr("10.0.0.1/24")))
    for _ in range(2):
        assert host.kernel.observe().links["tun0"] == before
    host.outside.set_mtu("tun0", 1400)
    assert host.kernel.observe().links["tun0"].mtu == 1400
    host.outside.add_address("tun0", addr("10.0.1.1/24"))
    assert {str(a) for a in host.kernel.observe().links["tun0"].addresses} == {
        "10.0.0.1/24",
        "10.0.1.1/24",
    }
    host.outside.remove_address("tun0", addr("10.0.0.1/24"))
    assert [str(a) for a in host.kernel.observe().links["tun0"].addresses] == ["10.0.1.1/24"]
    host.outside.set_alias("tun0", "")
    assert host.kernel.observe().links["tun0"].token is None
    host.outside.delete("tun0")
    assert "tun0" not in host.kernel.observe().links


def test_sample_has_tuns_and_taps_only(host: Host) -> None:
    link = made(host)
    host.outside.add_link("br0")
    host.outside.add_link("vpn0", Mode.TAP)
    assert {sampled.name: sampled.token for sampled in host.kernel.sample()} == {"tun0": OURS, "vpn0": None}
    assert next(sampled for sampled in host.kernel.sample() if sampled.token) == link


def networks(host: Host, node: str = NODE) -> set[tuple[str, str, str]]:
    found = host.kernel.survey(["tun0"], node, networks=True).networks
    return {(str(n.network), n.ifname, n.source) for n in found if n.ifname != "lo"}


def test_survey_names_a_stranger_with_the_name(host: Host) -> None:
    assert dict(host.kernel.survey(["tun0"], NODE, networks=False).occupants) == {}
    index = host.outside.add_link("tun0", Mode.TUN, alias="somebody's")
    occupants = host.kernel.survey(["tun0"], NODE, networks=False).occupants
    assert [(name, link.ifindex, link.alias) for name, link in occupants.items()] == [("tun0", index, "somebody's")]
    assert host.kernel.survey(["tun1"], NODE, networks=True).occupants == {}


def test_survey_tells_of_many_names_in_one_look(host: Host) -> None:
    made(host)
    host.outside.add_link("tun1", Mode.TUN)
    host.outside.add_link("tun2", alias="somebody's")
    found = host.kernel.survey(["tun0", "tun1", "tun2", "tun3"], NODE, networks=True)
    assert {name: link.name for name, link in found.occupants.items()} == {"tun1": "tun1", "tun2": "tun2"}
    assert found.networks == host.kernel.survey(["tun3"], NODE, networks=True).networks


def test_survey_does_not_take_ours_for_a_stranger(host: Host) -> None:
    made(host, st.AddAddress(TUN0, addr("10.0.0.1/24")), st.SetUp(TUN0))
    assert host.kernel.survey(["tun0"], NODE, networks=False).occupants == {}
    assert networks(host) == set()
    assert "tun0" in host.kernel.survey(["tun0"], "ffffffffffff", networks=False).occupants, (
        "another node's is a stranger"
    )
    assert ("10.0.0.0/24", "tun0", "address") in networks(host, "ffffffffffff")


def test_survey_gives_strangers_addresses_and_routes_but_no_default_route(host: Host) -> None:
    host.outside.add_link("vpn0", Mode.TUN)
    host.outside.add_address("vpn0", addr("10.1.0.1/24"))
    host.outside.set_up("vpn0", True)
    host.outside.add_address("vpn0", addr("2001:db8::1/64"))
    host.outside.add_route("vpn0", ipaddress.ip_network("10.2.0.0/16"))
    host.outside.add_route("vpn0", ipaddress.ip_network("0.0.0.0/0"))
    found = {n for n in networks(host) if n[0] != "2001:db8::/64" or n[2] == "address"}
    assert found == {
        ("10.1.0.0/24", "vpn0", "address"),
        ("10.1.0.0/24", "vpn0", "route"),
        ("2001:db8::/64", "vpn0", "address"),
        ("10.2.0.0/16", "vpn0", "route"),
    }
    assert host.kernel.survey(["tun0"], NODE, networks=False).networks == ()


def test_survey_knows_that_loopback_is_in_use(host: Host) -> None:
    found = host.kernel.survey(["tun0"], NODE, networks=True).networks
    assert {str(n.network) for n in found if n.ifname == "lo"} >= {"127.0.0.0/8", "::1/128"}


# -- open


def start(
    mode: Mode = Mode.TUN, *, multi_queue: bool = False, offloads: Offloads = Offloads.AUTO
) -> st.StartProcessing:
    processing = Processing(running=True, offloads=offloads)
    return st.StartProcessing(TUN0, OURS.interface_id, mode, multi_queue, processing)


def test_open_device_gives_carrier_and_keeps_everything_else(host: Host) -> None:
    before = made(host, st.SetUp(TUN0))
    fd = host.kernel.open_device(start(), OURS)
    try:
        assert os.get_blocking(fd) is False
        assert os.get_inheritable(fd) is False
        held = seen(host)
        assert held.carrier
        bare = replace(held, carrier=False, running=False, operstate="DOWN", flags=before.flags, vnet_hdr=False)
        assert bare == before
    finally:
        os.close(fd)
    assert not seen(host).carrier


@pytest.mark.parametrize("offloads", list(Offloads))
def test_packets_come_behind_a_header_where_offloads_are_wanted_and_bare_where_not(
    host: Host, offloads: Offloads
) -> None:
    made(host)
    for _ in range(2):  # the flags are the last opener's
        os.close(host.kernel.open_device(start(offloads=Offloads.AUTO), OURS))
        fd = host.kernel.open_device(start(offloads=offloads), OURS)
        assert seen(host).vnet_hdr is (offloads is Offloads.AUTO)
        os.close(fd)


def test_open_device_twice_is_busy_until_the_first_is_closed(host: Host) -> None:
    made(host)
    fd = host.kernel.open_device(start(), OURS)
    copy = os.dup(fd)
    os.close(fd)
    with pytest.raises(TunledgerError) as caught:
        host.kernel.open_device(start(), OURS)
    assert (caught.value.code, caught.value.retry) == (ErrorCode.DEVICE_BUSY, True)
    os.close(copy)
    os.close(host.kernel.open_device(start(), OURS))


def test_several_queues_can_be_open_at_once(host: Host) -> None:
    made(host, multi_queue=True)
    for fd in [host.kernel.open_device(start(multi_queue=True), OURS) for _ in range(3)]:
        os.close(fd)


def test_set_owner_of_a_held_device_is_busy(host: Host) -> None:
    made(host)
    fd = host.kernel.open_device(start(), OURS)
    try:
        assert refusal(host, st.SetOwner(TUN0, 1000, None)).code is ErrorCode.DEVICE_BUSY
    finally:
        os.close(fd)
    assert seen(host).owner is None


@pytest.mark.parametrize("step", [start(Mode.TAP), start(multi_queue=True)], ids=["mode", "queues"])
def test_open_device_refuses_what_the_device_is_not(host: Host, step: st.StartProcessing) -> None:
    before = made(host)
    with pytest.raises(TunledgerError) as caught:
        host.kernel.open_device(step, OURS)
    assert (caught.value.code, caught.value.errno_name) == (ErrorCode.KERNEL_REFUSED, "EINVAL")
    assert seen(host) == before


def test_open_device_opens_no_strangers_and_makes_no_new_one(host: Host) -> None:
    with pytest.raises(TunledgerError) as caught:
        host.kernel.open_device(start(), OURS)
    assert caught.value.code is ErrorCode.DEVICE_GONE
    assert "tun0" not in there(host)
    host.outside.add_link("tun0", Mode.TUN)
    with pytest.raises(TunledgerError) as caught:
        host.kernel.open_device(start(), OURS)
    assert caught.value.code is ErrorCode.NAME_TAKEN


def test_a_device_made_not_persistent_goes_with_its_last_reader(host: Host) -> None:
    made(host)
    host.outside.not_persistent("tun0")
    assert "tun0" not in there(host)


def test_steps_before_the_one_that_fails_stay_done(host: Host) -> None:
    made(host)
    assert refusal(host, st.SetTxQueueLen(TUN0, 7), st.SetMtu(TUN0, 1), st.SetUp(TUN0)).code is ErrorCode.KERNEL_REFUSED
    assert (seen(host).txqueuelen, seen(host).up) == (7, False)
