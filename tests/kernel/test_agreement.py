"""The fake kernel against the real one: any steps and any drift, done to both, leave them looking the same.

What the fake is for (planning by the thousand) is worth as much as this test.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as some

from service.domain import steps as st
from service.domain.errors import TunledgerError
from service.domain.observed import LinkCounters, ObservedLink
from service.domain.plan import Sight, differences, plan
from service.domain.spec import InterfaceSpec, check
from service.domain.values import InterfaceName, Mode
from service.kernel.fake import FakeKernel
from service.kernel.linux import LinuxKernel
from service.reconcile.converge import Wanted, sights
from service.reconcile.hands import Kernel
from tests.domain.test_convergence import ADDRESSES, MTUS, SPECS
from tests.kernel.conftest import LinuxHost
from tests.kernel.outside import Outside
from tests.kernel.test_contract import OTHER, OURS, token

pytestmark = pytest.mark.kernel

NAMES = [InterfaceName("tun0"), InterfaceName("tun1"), InterfaceName("elsewhere")]
NAME = some.sampled_from(NAMES)
ROOT_OR_NONE = some.sampled_from([None, 0])  # the uid that means something in every user namespace

STEPS: list[some.SearchStrategy[st.Step]] = [
    some.builds(
        st.CreateLink, NAME, some.just(OURS), some.sampled_from(Mode), some.booleans(), ROOT_OR_NONE, some.none()
    ),
    some.builds(st.SetName, NAME, NAME),
    some.builds(st.SetMtu, NAME, MTUS | some.sampled_from([67, 65522, 65536])),
    some.builds(st.SetTxQueueLen, NAME, some.integers(0, 2000)),
    some.builds(st.SetOwner, NAME, ROOT_OR_NONE, ROOT_OR_NONE),
    some.builds(st.SetMac, NAME, some.just("02:00:00:00:00:07")),
    some.builds(st.AddAddress, NAME, ADDRESSES),
    some.builds(st.AddAddress, NAME, ADDRESSES),
    some.builds(st.RemoveAddress, NAME, ADDRESSES),
    some.builds(st.SetUp, NAME),
    some.builds(st.SetDown, NAME),
    some.builds(st.SetLinkGroup, NAME, some.integers(0, 2)),
]
VERBS: list[some.SearchStrategy[tuple[Any, ...]]] = [
    some.tuples(some.just("delete"), NAME),
    some.tuples(some.just("rename"), NAME, NAME),
    some.tuples(some.just("set_alias"), NAME, some.sampled_from([str(OURS), str(OTHER), "mine"])),
    some.tuples(some.just("set_mtu"), NAME, MTUS),
    some.tuples(some.just("set_link_group"), NAME, some.integers(0, 2)),
    some.tuples(some.just("set_up"), NAME, some.booleans()),
    some.tuples(some.just("add_address"), NAME, ADDRESSES),
    some.tuples(some.just("remove_address"), NAME, ADDRESSES),
    some.tuples(some.just("add_link"), NAME, some.sampled_from([None, *Mode])),
]


@some.composite
def actions(draw: some.DrawFn) -> st.Step | tuple[Any, ...]:
    """A step of ours, or something that others do."""
    if draw(some.integers(0, 3)):
        return draw(STEPS[draw(some.integers(0, len(STEPS) - 1))])
    return draw(VERBS[draw(some.integers(0, len(VERBS) - 1))])


def tried(do: Callable[[], object]) -> object:
    """What came of it, as far as a plan may depend on it."""
    try:
        do()
    except TunledgerError as error:
        return error.code, error.errno_name, error.retry
    return "done"


def outside(world: Outside, verb: str, name: str, *arguments: Any) -> None:
    try:
        getattr(world, verb)(name, *arguments)
    except (TunledgerError, OSError, LookupError):
        pass  # whether it worked shows in what is seen


def looks(kernel: Kernel) -> dict[str, ObservedLink]:
    """What must agree: all but what each kernel gives out by itself, and what Linux lets follow the carrier later."""
    found = {}
    for link in kernel.observe().links.values():
        if link.name not in NAMES:
            continue
        mac = link.mac if link.mac == "02:00:00:00:00:07" else ""
        later: dict[str, Any] = {"running": False, "operstate": "", "flags": 0}
        if link.mode is None:  # a bridge has ways of its own
            later["carrier"] = False
        addresses = tuple(sorted(link.addresses, key=str))
        found[link.name] = replace(link, ifindex=0, mac=mac, addresses=addresses, counters=LinkCounters(), **later)
    return found


def cleared(host: LinuxHost) -> None:
    for name in NAMES:
        outside(host.outside, "delete", name)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(doings=some.lists(actions(), min_size=3, max_size=25))
def test_fake_and_real_kernel_agree_on_anything(linux: LinuxHost, doings: list[st.Step | tuple[Any, ...]]) -> None:
    cleared(linux)
    fake = FakeKernel()
    create = st.CreateLink(NAMES[0], OURS, Mode.TUN, False, None, None)
    for doing in [create, *doings]:
        note(str(doing))
        if isinstance(doing, tuple):
            outside(linux.outside, *doing)
            outside(fake.outside, *doing)
        else:
            step = doing
            results = [tried(lambda k=k, s=step: k.execute(OURS, [s])) for k in (linux.kernel, fake)]  # type: ignore[misc]
            assert results[0] == results[1], f"{step}: Linux, then the fake"
        assert looks(linux.kernel) == looks(fake), f"after {doing}, Linux, then the fake"


@dataclass(frozen=True)
class Put:
    """A step that names an ifindex, for the link that has a name when its turn comes."""

    kind: type[st.DeleteLink | st.SetAlias]
    name: InterfaceName

    def step(self, kernel: Kernel) -> st.Step:
        link = kernel.observe().links.get(self.name)
        return self.kind(self.name, link.ifindex if link else 999_999, MINE[self.name])


MINE = dict(zip(NAMES, (OURS, OTHER, token(3)), strict=True))


@some.composite
def batches(draw: some.DrawFn) -> dict[InterfaceName, list[st.Step | Put]]:
    """For each of some interfaces, steps on the link that has its name at first."""
    work: dict[InterfaceName, list[st.Step | Put]] = {}
    for name in draw(some.lists(NAME, min_size=1, max_size=3, unique=True)):
        steps: list[some.SearchStrategy[st.Step | Put]] = [
            some.just(st.CreateLink(name, MINE[name], Mode.TUN, False, None, None)),
            some.builds(Put, some.sampled_from([st.DeleteLink, st.SetAlias]), some.just(name)),
            some.builds(st.SetMtu, some.just(name), MTUS | some.just(67)),
            some.builds(st.AddAddress, some.just(name), ADDRESSES),
            some.builds(st.SetUp, some.just(name)),
            some.builds(st.SetLinkGroup, some.just(name), some.integers(0, 2)),
        ]
        work[name] = draw(some.lists(some.one_of(steps), max_size=5))
    return work


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    doings=some.lists(batches() | some.integers(0, len(VERBS) - 1).flatmap(VERBS.__getitem__), min_size=2, max_size=10)
)
def test_fake_and_real_kernel_agree_on_any_batch(
    linux: LinuxHost, doings: list[dict[InterfaceName, list[st.Step | Put]] | tuple[Any, ...]]
) -> None:
    """All are vouched for in both, so that an alias is put back wherever link and name still are as they were seen."""
    cleared(linux)
    fake = FakeKernel(vouched=lambda _ifindex, _token: True)
    real = LinuxKernel(vouched=lambda _ifindex, _token: True)
    try:
        for doing in doings:
            note(str(doing))
            if isinstance(doing, tuple):
                outside(linux.outside, *doing)
                outside(fake.outside, *doing)
                continue
            results = []
            for kernel in (real, fake):
                errors = kernel.execute_many(
                    [
                        (MINE[name], [step.step(kernel) if isinstance(step, Put) else step for step in steps])
                        for name, steps in doing.items()
                    ]
                )
                results.append([error and (error.code, error.errno_name, error.retry) for error in errors])
            assert results[0] == results[1], "Linux, then the fake"
            assert looks(real) == looks(fake), f"after {doing}, Linux, then the fake"
    finally:
        real.close()


def passes(spec: InterfaceSpec) -> bool:
    try:
        check(spec)
    except TunledgerError:
        return False
    return True


SOUND = SPECS.filter(passes).map(
    lambda spec: InterfaceSpec(
        name=NAMES[0],
        mode=spec.mode,
        addresses=spec.addresses,
        mtu=spec.mtu,
        up=spec.up,
        txqueuelen=spec.txqueuelen,
        owner=None if spec.owner is None else 0,
        multi_queue=spec.multi_queue,
        mac=spec.mac,
    )
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    first=SOUND, then=SOUND, drift=some.lists(some.integers(0, len(VERBS) - 1).flatmap(VERBS.__getitem__), max_size=4)
)
def test_a_plan_arrives_on_linux_from_any_spec_and_any_drift(
    linux: LinuxHost, first: InterfaceSpec, then: InterfaceSpec, drift: list[tuple[Any, ...]]
) -> None:
    cleared(linux)
    for spec in (first, then):
        sight = look(linux.kernel)
        try:
            steps = plan(OURS, NAMES[0], spec, sight)
        except TunledgerError:
            assert sight.occupant is not None
            return
        note("\n".join(map(str, steps)))
        linux.kernel.execute(OURS, steps)
        assert differences(OURS, NAMES[0], spec, look(linux.kernel)) == ()
        assert plan(OURS, NAMES[0], spec, look(linux.kernel)) == ()
        for verb, *arguments in drift:
            if verb != "set_alias" or arguments[-1] not in (str(OURS), str(OTHER)):  # a stolen token is another matter
                outside(linux.outside, verb, *arguments)


def look(kernel: Kernel) -> Sight:
    wanted = Wanted(OURS, NAMES[0], None)
    return sights([wanted], kernel.observe(), {})[wanted.id]
