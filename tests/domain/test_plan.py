"""Planning, case by case: each folder in `plans/` is a host, what is desired of it, and the plan.

`desired` is a spec, or a name (and "netns") with `"retired": true`. `observed` has the network namespaces besides our
own (`namespaces`) and the links (ours but for `"stranger": true`; one
with an `"alias"` was ours until that was written over it, and watched all the time), whether a worker reads the device,
and what it was told to do (`applied`). `plan` has one step on a line, or `refused: CODE`. Every plan is also carried
out on the fake kernel, where it has to arrive. A new case is a new folder.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from service.domain import steps as st
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import ObservedLink, Place, link_key
from service.domain.plan import Difference, Sight, differences, plan, verify
from service.domain.spec import InterfaceSpec, Processing, parse_spec
from service.domain.token import Token
from service.domain.values import Address, InterfaceName, Mode
from service.kernel.fake import FakeKernel, FakeNamespaces
from service.kernel.namespaces import HostKernel
from service.reconcile.converge import Wanted, sights
from service.reconcile.hands import NoMonitor
from tests.domain.builders import addr, interface_id, name, spec, token

PLANS = Path(__file__).parent / "plans"
OURS = token()
INSPECT = [{"processor": "inspect"}]


def host_of(observed: dict[str, Any]) -> FakeNamespaces:
    """A fake host with these links, each made as its maker would."""
    namespaces = FakeNamespaces(FakeKernel(vouched=lambda _ifindex, _token: True))
    inside = {netns: namespaces.add(netns) for netns in observed.get("namespaces", ())}
    for number, link in enumerate(observed["links"]):
        kernel = inside[link["netns"]] if "netns" in link else namespaces.own
        mode = None if link["mode"] is None else Mode(link["mode"])
        called, alias = link["name"], "" if link.get("stranger") else link.get("alias", str(OURS))
        if link.get("multi_queue"):
            step = st.CreateLink(
                InterfaceName(called), Token(OURS.node, interface_id(90 + number)), Mode.TUN, True, None, None
            )
            kernel.execute(step.token, [step])
            kernel.outside.set_alias(called, alias)
        else:
            kernel.outside.add_link(called, mode, alias=alias)
        if "mtu" in link:
            kernel.outside.set_mtu(called, link["mtu"])
        if "txqueuelen" in link:
            kernel.outside.set_txqueuelen(called, link["txqueuelen"])
        if "mac" in link:
            kernel.outside.set_mac(called, link["mac"])
        kernel.outside.set_owner(called, link.get("owner"), link.get("group"))
        for text in link.get("addresses", ()):
            kernel.outside.add_address(called, addr(text))
        kernel.outside.set_link_group(called, link.get("link_group", 0))
        kernel.outside.set_up(called, link.get("up", False))
        if not link.get("persist", True):
            kernel.outside.hold(called)
            kernel.outside.not_persistent(called)
    return namespaces


class Watching(NoMonitor):
    """Vouches for one link."""

    def __init__(self, place: Place | None) -> None:
        self._place = place

    def holder(self, token: Token) -> Place | None:
        assert token == OURS
        return self._place


def sight_of(
    kernel: HostKernel, called: str, netns: str | None, attached: Processing | None, watched: Place | None = None
) -> Sight:
    devices: dict[str, Processing] = {} if attached is None else {OURS.interface_id: attached}
    wanted = [Wanted(OURS, InterfaceName(called), None, netns=netns, formerly=frozenset({None, "blue"} - {netns}))]
    kernel.observe([each.key for each in wanted])  # so that its namespace is in use
    return sights(wanted, kernel.observe(), devices, Watching(watched))[OURS.interface_id]


def carry_out(kernel: HostKernel, steps: tuple[st.Step, ...], attached: Processing | None) -> Processing | None:
    """As converge does; gives what a worker does with the device afterwards."""
    for step in steps:
        match step:
            case st.StartProcessing():
                assert attached is None
                attached = step.processing
            case st.ConfigureProcessing():
                assert attached is not None
                assert attached.offloads is step.processing.offloads, "that takes a new descriptor"
                attached = step.processing
            case st.StopProcessing():
                assert attached is not None
                attached = None
            case _:
                kernel.execute(OURS, [step])
    return attached


def strangers(kernel: HostKernel) -> dict[Place, ObservedLink]:
    return {link.place: link for link in kernel.observe().links.values() if link.token != OURS}


CASES = sorted(path.name for path in PLANS.iterdir())


@pytest.mark.parametrize("case", CASES)
def test_plan(case: str) -> None:
    desired = json.loads((PLANS / case / "desired").read_text())
    observed = json.loads((PLANS / case / "observed").read_text())
    expected = (PLANS / case / "plan").read_text().splitlines()
    kernel = host_of(observed).host()
    told = parse_spec({"name": "x", "processing": {"running": True, **observed.get("applied", {})}}).processing
    attached = told if observed["attached"] else None
    called, wanted = name(desired["name"]), None if desired.get("retired") else parse_spec(desired)
    netns = desired.get("netns")
    watched_key = next(
        (link_key(link.get("netns"), link["name"]) for link in observed["links"] if "alias" in link), None
    )
    watched = kernel.observe([watched_key]).links[watched_key].place if watched_key is not None else None
    sight = sight_of(kernel, called, netns, attached, watched)
    try:
        steps = plan(OURS, called, wanted, sight)
    except TunledgerError as refused:
        assert [f"refused: {refused.code}"] == expected  # noqa: PT017  the case says whether it is refused
        return
    assert [str(step) for step in steps] == expected
    assert bool(differences(OURS, called, wanted, sight)) is bool(steps), "no step without a difference, and vice versa"
    before = {place: link for place, link in strangers(kernel).items() if place != watched}
    attached = carry_out(kernel, steps, attached)
    after = sight_of(kernel, called, netns, attached)
    assert differences(OURS, called, wanted, after) == ()
    assert plan(OURS, called, wanted, after) == ()
    verify(OURS, called, wanted, after)
    assert strangers(kernel) == before
    kernel.close()


def test_every_kind_of_step_is_planned_in_some_case() -> None:
    planned = {line for case in CASES for line in (PLANS / case / "plan").read_text().splitlines()}
    examples: list[st.Step] = [
        st.CreateLink(name(), OURS, Mode.TUN, False, None, None),
        st.DeleteLink("tun0", 1, OURS),
        st.SetName(name(), "elsewhere"),
        st.SetAlias("tun0", 1, OURS),
        st.SetLinkGroup(name(), 0),
        st.SetMtu(name(), 1400),
        st.SetTxQueueLen(name(), 1000),
        st.SetMac(name(), "02:00:00:00:00:01"),
        st.SetOwner(name(), 7, None),
        st.AddAddress(name(), addr("10.0.0.1/24")),
        st.RemoveAddress(name(), addr("10.0.0.1/24")),
        st.SetUp(name()),
        st.SetDown(name()),
        st.StartProcessing(name(), OURS.interface_id, Mode.TUN, False),
        st.ConfigureProcessing(name(), OURS.interface_id, spec(processing={"chain": INSPECT}).processing),
        st.StopProcessing("tun0", OURS.interface_id),
    ]
    assert {str(step) for step in examples} <= planned
    assert {type(example) for example in examples} == set(st.Step.__args__)


def seen(**changed: Any) -> ObservedLink:
    fields: dict[str, Any] = {
        "name": "tun0",
        "ifindex": 7,
        "mode": Mode.TUN,
        "token": OURS,
        "txqueuelen": 1000,
        "up": True,
        **changed,
    }
    return ObservedLink(**fields)


@pytest.mark.parametrize(
    ("wanted", "sight", "said"),
    [
        (spec(), Sight(), "tun0: desired present, observed absent"),
        (None, Sight(seen(name="x")), "tun0: desired absent, observed x (ifindex 7)"),
        (None, Sight(attached=True), "tun0.processing.running: desired false, observed true"),
        (spec(mtu=1400), Sight(seen()), "tun0.mtu: desired 1400, observed 1500"),
        (spec(), Sight(seen(name="x")), "tun0.name: desired tun0, observed x"),
        (spec(mode="tap"), Sight(seen()), "tun0.mode: desired tap, observed tun"),
        (spec(owner=7), Sight(seen()), "tun0.owner: desired 7, observed absent"),
        (spec(group=0), Sight(seen()), "tun0.group: desired 0, observed absent"),
        (spec(multi_queue=True), Sight(seen()), "tun0.multi_queue: desired true, observed false"),
        (spec(), Sight(seen(persist=False)), "tun0.persist: desired true, observed false"),
        (spec(), Sight(seen(txqueuelen=500)), "tun0.txqueuelen: desired 1000, observed 500"),
        (spec(), Sight(seen(up=False)), "tun0.up: desired true, observed false"),
        (
            spec(addresses=["10.0.0.2/24", "10.0.0.1/24"]),
            Sight(seen()),
            "tun0.addresses: desired 10.0.0.1/24, 10.0.0.2/24, observed none",
        ),
        (
            spec(mode="tap", mac="02:00:00:00:00:01"),
            Sight(seen(mode=Mode.TAP, mac="02:00:00:00:00:02")),
            "tun0.mac: desired 02:00:00:00:00:01, observed 02:00:00:00:00:02",
        ),
        (
            spec(processing={"running": True}),
            Sight(seen()),
            "tun0.processing.running: desired true, observed false",
        ),
    ],
)
def test_difference_names_the_path_and_both_values(wanted: InterfaceSpec | None, sight: Sight, said: str) -> None:
    assert [str(found) for found in differences(OURS, "tun0", wanted, sight)] == [said]
    with pytest.raises(TunledgerError) as caught:
        verify(OURS, "tun0", wanted, sight)
    assert (caught.value.code, str(caught.value), caught.value.retry) == (ErrorCode.VERIFY_FAILED, said, True)


def test_differences_go_into_events_as_json() -> None:
    assert Difference("tun0.mtu", 1400, None).to_json() == {"path": "tun0.mtu", "desired": 1400, "observed": None}


@pytest.mark.parametrize(
    "changed",
    [
        {"carrier": True, "running": True, "operstate": "UP", "flags": 1},
        {"mac": "02:00:00:00:00:09"},
        {"vnet_hdr": True, "packet_information": True},
        {"ifindex": 99},
    ],
    ids=str,
)
def test_what_is_not_ours_to_say_is_no_difference(changed: dict[str, Any]) -> None:
    assert differences(OURS, "tun0", spec(), Sight(seen(**changed))) == ()


def test_description_and_labels_are_no_matter_for_the_kernel() -> None:
    wanted = spec(description="lab", labels={"a": "b"})
    assert plan(OURS, name(), wanted, Sight(seen())) == ()


def test_new_addresses_come_before_old_ones_go() -> None:
    link = seen(addresses=(addr("10.0.0.1/24"), addr("2001:db8::1/64")))
    steps = plan(OURS, name(), spec(addresses=["10.9.0.1/24", "2001:db8:9::1/64"]), Sight(link))
    kinds = [type(step) for step in steps]
    assert kinds == [st.AddAddress, st.AddAddress, st.RemoveAddress, st.RemoveAddress]


def test_editing_never_takes_the_link_down_or_away() -> None:
    link = seen(mtu=68, txqueuelen=1, owner=1, group=1, addresses=(addr("10.0.0.1/24"),))
    steps = plan(OURS, name(), spec(owner=2, group=2, addresses=["10.0.0.2/24"]), Sight(link))
    assert not any(isinstance(step, st.SetDown | st.DeleteLink | st.CreateLink) for step in steps)


def test_delete_is_by_the_ifindex_that_was_seen() -> None:
    (step,) = plan(OURS, name(), None, Sight(seen(name="elsewhere")))
    assert step == st.DeleteLink("elsewhere", 7, OURS)


def test_addresses_print_as_ip_takes_them() -> None:
    step = st.AddAddress(name(), Address(addr("2001:db8::1/64").ip, 64))
    assert str(step) == "ip address replace 2001:db8::1/64 dev tun0"
