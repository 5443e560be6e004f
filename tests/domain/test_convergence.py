"""Any commands, any drift, any failure, any crash: the plan arrives, a second one is empty, strangers are as they were.

The real decide, evolve, plan and converge run on the fake kernel; the log is a list. What the engine adds to them
(threads, locks, the database) is shown elsewhere.
"""

import contextlib
import ipaddress
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as some

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.decide import intended
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import ObservedLink
from service.domain.spec import InterfaceSpec, Processing
from service.domain.state import fold
from service.domain.steps import COUNT_ONLY
from service.domain.token import Token
from service.domain.values import Address, InterfaceName, Mode, Mtu
from service.kernel.fake import FakeKernel
from service.reconcile.converge import Result, Wanted, converge, inspect
from service.reconcile.hands import Figures, Hands
from tests.domain.builders import CLASSIC, NODE, V1, Log, interface_id, judge, submission

OUR_NAMES = ["tun0", "tun1", "tap0"]
ALL_NAMES = [*OUR_NAMES, "vpn0", "br0", "elsewhere"]

FULL = TunledgerError(ErrorCode.KERNEL_REFUSED, "no memory", retry=True, errno_name="ENOMEM")


class Killed(BaseException):
    """kill -9 at this step."""


@dataclass(frozen=True)
class NoFigures:
    session: str = "s"
    from_kernel: Mapping[str, tuple[int, int]] = ()  # type: ignore[assignment]
    to_kernel: Mapping[str, tuple[int, int]] = ()  # type: ignore[assignment]


class Readers:
    """A data plane that holds descriptors and reads nothing."""

    def __init__(self) -> None:
        self.fds: dict[str, int] = {}
        self.applied: dict[str, Processing] = {}

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
        assert device not in self.fds, f"{name} ({mode}) attached twice"
        assert mtu > 0
        self.fds[device] = fd
        self.applied[device] = processing
        return "s"

    def configure(self, device: str, processing: Processing, mtu: int) -> None:
        assert mtu > 0
        assert self.applied[device].offloads is processing.offloads
        self.applied[device] = processing

    def detach(self, device: str) -> Figures | None:
        fd = self.fds.pop(device, None)
        if fd is None:
            return None
        os.close(fd)
        return NoFigures()

    def attached(self) -> Mapping[str, Processing]:
        return {device: self.applied[device] for device in self.fds}

    def counters(self) -> Mapping[str, Figures]:
        return {}

    def healthy(self) -> list[str]:
        return []

    def die(self) -> None:
        for device in list(self.fds):
            self.detach(device)


ADDRESSES = some.sampled_from(
    [
        Address(ipaddress.ip_address(ip), length)
        for ip, length in [
            ("10.0.0.1", 24),
            ("10.0.0.1", 16),
            ("10.0.0.2", 24),
            ("10.0.0.3", 24),
            ("10.0.0.200", 25),
            ("10.0.1.1", 24),
            ("172.16.0.1", 31),
            ("192.168.9.9", 32),
            ("2001:db8::1", 64),
            ("2001:db8::1", 48),
            ("2001:db8::2", 64),
            ("fe80::1", 64),
        ]
    ]
)
MTUS = some.sampled_from([68, 1000, 1279, 1280, 1500, 9000, 65521, 65535])
UIDS = some.none() | some.sampled_from([0, 7, 2**32 - 2])
ANY_SPECS = some.builds(
    InterfaceSpec,
    name=some.sampled_from([InterfaceName(n) for n in OUR_NAMES]),
    mode=some.sampled_from(Mode),
    addresses=some.lists(ADDRESSES, max_size=4).map(tuple),
    mtu=MTUS.map(Mtu),
    up=some.sampled_from([True, True, False]),
    txqueuelen=some.sampled_from([0, 500, 1000]),
    owner=UIDS,
    group=UIDS,
    multi_queue=some.booleans(),
    mac=some.none() | some.just("02:00:00:00:00:01"),
    processing=some.builds(Processing, running=some.booleans()),
)


def valid(spec: InterfaceSpec) -> InterfaceSpec:
    """The nearest spec that passes."""
    unique = {address.ip: address for address in spec.addresses}
    has_v6 = any(ip.version == 6 for ip in unique)
    return msgspec.structs.replace(
        spec,
        addresses=tuple(unique.values()),
        mtu=Mtu(min(max(spec.mtu, 1280 if has_v6 else 68), 65521 if spec.mode is Mode.TAP else 65535)),
        mac=spec.mac if spec.mode is Mode.TAP else None,
    )


SPECS = ANY_SPECS.map(valid)
NAMES = some.sampled_from([InterfaceName(n) for n in OUR_NAMES])
CONFIGURE = some.builds(
    cmd.ConfigureInterface,
    name=NAMES,
    ip=some.none() | ADDRESSES.map(lambda a: a.ip),
    netmask=some.none() | some.sampled_from(["255.255.255.0", "16", "64", "48", "255.0.255.0", "31"]),
    mtu=some.none() | MTUS.map(Mtu),
    allow_overlap=some.booleans(),
)
ORDERS: list[some.SearchStrategy[cmd.Command]] = [
    some.builds(cmd.DeclareInterface, ANY_SPECS),
    some.builds(cmd.DeclareInterface, SPECS),
    some.builds(cmd.DeclareInterface, SPECS, some.just(True)),
    some.builds(cmd.DeclareInterface, SPECS, some.just(True)),
    CONFIGURE,
    CONFIGURE,
    CONFIGURE,
    some.builds(cmd.EnableProcessing, NAMES),
    some.builds(cmd.DisableProcessing, NAMES),
    some.builds(cmd.RetireInterface, NAMES),
]
COMMANDS = some.integers(0, len(ORDERS) - 1).flatmap(lambda which: ORDERS[which])
TROUBLES = [some.none(), some.none(), some.tuples(some.integers(1, 9), some.booleans(), some.booleans())]
TROUBLE = some.integers(0, 2).flatmap(lambda which: TROUBLES[which])
ORDERED = some.tuples(some.just("ordered"), COMMANDS, some.sampled_from([V1, V1, V1, CLASSIC]), TROUBLE)
LINKS = some.sampled_from([*OUR_NAMES, *ALL_NAMES])
DRIFT = some.one_of(
    some.tuples(some.just("delete"), LINKS),
    some.tuples(some.just("rename"), LINKS, some.sampled_from(ALL_NAMES)),
    some.tuples(some.just("set_alias"), LINKS, some.sampled_from(["", "mine now"])),
    some.tuples(some.just("set_mtu"), LINKS, MTUS),
    some.tuples(some.just("set_up"), LINKS, some.booleans()),
    some.tuples(some.just("set_txqueuelen"), LINKS, some.integers(0, 2000)),
    some.tuples(some.just("set_mac"), LINKS, some.just("02:00:00:00:00:09")),
    some.tuples(some.just("set_owner"), LINKS, UIDS, UIDS),
    some.tuples(some.just("add_address"), LINKS, ADDRESSES),
    some.tuples(some.just("remove_address"), LINKS, ADDRESSES),
    some.tuples(some.just("not_persistent"), LINKS),
    some.tuples(some.just("add_link"), LINKS, some.none() | some.sampled_from(Mode)),
).map(lambda verb: ("outside", *verb))
WEIGHTED = {"ordered": 8, "outside": 8, "reconcile": 2, "restart": 1, "workers_die": 1}
KINDS = [kind for kind, weight in WEIGHTED.items() for _ in range(weight)]


@some.composite
def moves(draw: some.DrawFn) -> tuple[Any, ...]:
    """One move; composed, since Hypothesis takes alternatives apart and weighs each the same."""
    kind = draw(some.sampled_from(KINDS))
    if kind == "ordered":
        return draw(ORDERED)
    return draw(DRIFT) if kind == "outside" else (kind,)


class Life:
    """A service's life on a host that others use too."""

    def __init__(self, *, promote: bool = False) -> None:
        self.kernel = FakeKernel(promote_secondaries=promote)
        self.readers = Readers()
        self.log = Log()
        self.commands = 0
        self.theirs: dict[int, ObservedLink] = {}
        self.remember_strangers()

    def close(self) -> None:
        self.readers.die()
        self.kernel.close()

    @property
    def hands(self) -> Hands:
        return Hands(self.kernel, self.readers)

    # -- others

    def strangers(self) -> dict[int, ObservedLink]:
        declared = {Token(NODE, i) for i in self.log.state.interfaces}
        links = self.kernel.observe().links.values()
        return {link.ifindex: link for link in links if link.token is None or link.token not in declared}

    def remember_strangers(self) -> None:
        self.theirs = self.strangers()

    def outside(self, verb: str, name: str, *arguments: Any) -> None:
        """Somebody else tries something; what Linux refuses them is no matter of ours."""
        with contextlib.suppress(TunledgerError, LookupError):
            getattr(self.kernel.outside, verb)(name, *arguments)
        self.remember_strangers()

    def workers_die(self) -> None:
        self.readers.die()
        self.remember_strangers()

    # -- us

    def ordered(self, command: cmd.Command, request: cmd.Request, trouble: tuple[int, bool, bool] | None) -> None:
        """A command, valid or not; the kernel may fail at its nth step, or the service be killed there."""
        self.commands += 1
        given = submission(command, command_id=f"c{self.commands}", request=request)
        host = self.kernel.survey([cmd.target(command)], NODE, networks=True)
        state, written = self.log.state, len(self.kernel.executed)
        before = dict(state.interfaces)
        try:
            intent = judge(state, given, host, interface_id(self.commands))
        except TunledgerError:
            assert state.interfaces == before
            assert len(self.kernel.executed) == written
            return
        previous = state.interfaces.get(intent.interface_id)
        self.log.append(intent, given.command_id)  # never refused: what decide gives, fold takes
        wanted = self.wanted(intent.interface_id, intent.name, intended(intent, previous), fresh=previous is None)
        assert wanted.spec == state.interfaces[intent.interface_id].wanted
        if trouble is not None:
            nth, after, kill = trouble
            self.kernel.fail(Killed() if kill else FULL, nth=nth, after=after)
        try:
            self.finish(wanted, previous.spec if previous is not None else None, given.command_id)
        except Killed:
            self.kernel.heal()
            self.restart()
        self.kernel.heal()

    def finish(self, wanted: Wanted, previous: InterfaceSpec | None, command_id: str) -> None:
        """As the engine does: converge, undo if that failed, record the outcome."""
        (result,) = converge(self.hands, [wanted])
        fields: dict[str, Any] = {"interface_id": wanted.id, "name": wanted.name, "by": "command", "took_us": 1}
        if result.error is None:
            self.check_arrived(wanted)
            self.log.append(ev.CommandApplied(**fields, steps=[str(step) for step in result.steps]), command_id)
            return
        self.kernel.heal()
        undo = replace(wanted, spec=previous, fresh=False)
        (undone,) = converge(self.hands, [undo])
        if undone.error is None:
            self.check_arrived(undo)
        else:
            self.check_blocked(undone)
        failed = ev.CommandFailed(
            **fields, code=result.error.code, message=str(result.error), errno=None, undone=undone.error is None
        )
        self.log.append(failed, command_id)

    def restart(self) -> None:
        """kill -9, and a new start: everything from the log, pending commands first."""
        self.readers.die()
        self.log.state = fold(self.log.events)
        for interface in list(self.log.state.interfaces.values()):
            if interface.pending is not None:
                wanted = self.wanted(interface.id, interface.name, interface.pending.spec)
                self.finish(wanted, interface.spec, interface.pending.command_id)
        self.reconcile()

    def reconcile(self) -> None:
        """Rounds until none has a step: names that moved among ours take a second one."""
        interfaces = self.log.state.interfaces.values()
        all_wanted = [self.wanted(i.id, i.name, i.spec) for i in interfaces]
        for _ in range(len(all_wanted) + 1):
            results = converge(self.hands, all_wanted)
            if not any(result.steps for result in results):
                break
        written = len(self.kernel.executed)
        again = converge(self.hands, all_wanted)
        assert len(self.kernel.executed) == written, "a second plan is empty"
        for result in again:
            if result.error is None:
                self.check_arrived(result.wanted)
            else:
                self.check_blocked(result)

    def wanted(self, number: Any, name: InterfaceName, spec: InterfaceSpec | None, *, fresh: bool = False) -> Wanted:
        return Wanted(Token(NODE, number), name, spec, fresh)

    def check_arrived(self, wanted: Wanted) -> None:
        (result,), _ = inspect(self.hands, [wanted])
        assert result.found == (), f"{list(map(str, result.found))} on\n{self.kernel}"
        steps = len(self.kernel.executed)
        (again,) = converge(self.hands, [wanted])
        assert (again.steps, again.error, len(self.kernel.executed)) == ([], None, steps)

    def check_blocked(self, result: Result) -> None:
        """The one thing that may stand in the way for good: somebody has the name."""
        assert result.error is not None
        assert result.error.code is ErrorCode.NAME_TAKEN, str(result.error)
        occupant = self.kernel.observe().links[result.wanted.name]
        assert occupant.token != result.wanted.token

    def strangers_are_as_they_were(self) -> None:
        def plain(links: Mapping[int, ObservedLink]) -> Sequence[ObservedLink]:
            # A device that lost our alias while our worker read it loses that reader too, and with it the carrier,
            # or itself if somebody made it not persistent.
            gone: dict[str, Any] = {"carrier": False, "running": False, "operstate": "", "flags": 0}
            return [replace(link, **gone) for link in links.values() if link.persist or link.mode is None]

        assert plain(self.strangers()) == plain(self.theirs)

    def folding_the_log_is_the_state(self) -> None:
        assert fold(self.log.events) == self.log.state

    def every_link_of_ours_is_declared_and_once(self) -> None:
        tokens = [link.token for link in self.kernel.observe().links.values() if link.token is not None]
        assert len(set(tokens)) == len(tokens)
        assert {token.interface_id for token in tokens} <= set(self.log.state.interfaces)

    def every_intent_has_its_outcome(self) -> None:
        assert all(interface.pending is None for interface in self.log.state.interfaces.values())

    def no_device_is_held_that_nobody_wants(self) -> None:
        assert sum(self.kernel.open_devices().values()) <= len(self.readers.fds)

    def check_all(self) -> None:
        self.strangers_are_as_they_were()
        self.folding_the_log_is_the_state()
        self.every_link_of_ours_is_declared_and_once()
        self.every_intent_has_its_outcome()
        self.no_device_is_held_that_nobody_wants()


@pytest.mark.timeout(600)  # a failure is worth the minutes it takes to make its example small
@settings(max_examples=200, deadline=None, report_multiple_bugs=False)
@given(some.lists(SPECS, max_size=3), some.lists(moves(), min_size=8, max_size=25), some.booleans())
def test_any_life_arrives_at_what_is_desired_and_leaves_strangers_alone(
    declared: list[InterfaceSpec], life: list[tuple[Any, ...]], promote: bool
) -> None:
    host = Life(promote=promote)
    try:
        first = [("ordered", cmd.DeclareInterface(spec, allow_overlap=True), V1, None) for spec in declared]
        for verb, *arguments in [*first, *life, ("reconcile",)]:
            note(f"{verb}{tuple(map(str, arguments))}")
            getattr(host, verb)(*arguments)
            host.check_all()
    finally:
        host.close()


def test_links_of_ours_whose_names_were_swapped_get_them_back() -> None:
    life = Life()
    try:
        for called in ("tun0", "tun1"):
            spec = InterfaceSpec(name=InterfaceName(called))
            life.ordered(cmd.DeclareInterface(spec), V1, None)
        for old, new in (("tun0", "aside"), ("tun1", "tun0"), ("aside", "tun1")):
            life.outside("rename", old, new)
        life.reconcile()
        results, _ = inspect(
            life.hands, [life.wanted(i.id, i.name, i.spec) for i in life.log.state.interfaces.values()]
        )
        assert [result.found for result in results] == [(), ()]
    finally:
        life.close()
