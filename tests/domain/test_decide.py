"""Judging commands: what each comes to, every reason to refuse, and that refusing changes nothing."""

import ipaddress
from collections.abc import Callable

import msgspec
import pytest

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.decide import decide, intended, refuse_unknown_processors
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import Host, HostNetwork, ObservedLink
from service.domain.spec import InterfaceSpec, Processing
from service.domain.state import State
from service.domain.values import InterfaceName, Mode, Mtu
from tests.domain.builders import (
    CLASSIC,
    V1,
    Log,
    addr,
    applied,
    declared,
    enabled,
    interface_id,
    judge,
    name,
    retired,
    spec,
    submission,
)

FREE = Host()


def stranger(called: str = "tun0") -> Host:
    return Host({called: ObservedLink(name=called, ifindex=9, mode=Mode.TUN, token=None)})


def in_use(network: str, source: str = "address") -> Host:
    used = HostNetwork(ipaddress.ip_network(network), 9, "eth0", source)  # type: ignore[arg-type]
    return Host(networks=(used,))


def nothing() -> Log:
    return Log()


def stopped() -> Log:
    """tun0 is there, with 10.0.0.1/24 and a second address; processing is off."""
    log = Log()
    log.append(declared(addresses=["10.0.0.1/24", "10.1.0.1/24"], request=CLASSIC))
    log.append(applied())
    return log


def running() -> Log:
    log = stopped()
    log.append(enabled())
    log.append(applied())
    return log


def bare() -> Log:
    """tun0 without addresses."""
    log = Log()
    log.append(declared())
    log.append(applied())
    return log


def v6() -> Log:
    log = Log()
    log.append(declared(addresses=["2001:db8::1/64"]))
    log.append(applied())
    return log


def busy() -> Log:
    """A command is pending on tun0."""
    log = stopped()
    log.append(enabled())
    return log


def unborn() -> Log:
    """The very first command on tun0 is pending."""
    log = Log()
    log.append(declared())
    return log


def declare(**fields: object) -> cmd.DeclareInterface:
    return cmd.DeclareInterface(spec(**fields))


def configure(
    address: str | None = None, netmask: str | None = None, mtu: int | None = None, *, allow_overlap: bool = False
) -> cmd.ConfigureInterface:
    ip = None if address is None else ipaddress.ip_address(address)
    return cmd.ConfigureInterface(name(), ip, netmask, None if mtu is None else Mtu(mtu), allow_overlap)


REFUSALS: list[tuple[Callable[[], Log], cmd.Command, Host, cmd.Request, ErrorCode, str]] = [
    (stopped, declare(), FREE, V1, ErrorCode.INTERFACE_EXISTS, "interface tun0 already exists"),
    (unborn, declare(), FREE, V1, ErrorCode.INTERFACE_EXISTS, "interface tun0 already exists"),
    (stopped, declare(name="tun1"), FREE, CLASSIC, ErrorCode.INTERFACE_EXISTS, "interface tun0 already exists, and"),
    (nothing, declare(), stranger(), V1, ErrorCode.NAME_TAKEN, "tun0 exists and is not managed by tunledger"),
    (
        nothing,
        declare(addresses=["10.0.0.1/24"]),
        in_use("10.0.0.0/8", "route"),
        V1,
        ErrorCode.SUBNET_OVERLAP,
        "addresses.0: 10.0.0.0/24 overlaps 10.0.0.0/8, a route of eth0",
    ),
    (
        nothing,
        declare(addresses=["10.9.0.1/24", "10.0.0.1/24"]),
        in_use("10.0.0.128/32"),
        V1,
        ErrorCode.SUBNET_OVERLAP,
        "addresses.1: 10.0.0.0/24 overlaps 10.0.0.128/32, an address of eth0",
    ),
    (
        nothing,
        declare(addresses=["2001:db8::1/64"]),
        in_use("2001:db8::/32"),
        V1,
        ErrorCode.SUBNET_OVERLAP,
        "overlaps 2001:db8::/32",
    ),
    (
        stopped,
        configure("10.2.0.1"),
        in_use("10.2.0.0/16"),
        V1,
        ErrorCode.SUBNET_OVERLAP,
        "addresses.0: 10.2.0.0/24 overlaps",
    ),
    (
        stopped,
        configure(netmask="255.0.0.0"),
        in_use("10.2.0.0/16"),
        V1,
        ErrorCode.SUBNET_OVERLAP,
        "addresses.0: 10.0.0.0/8 overlaps",
    ),
    *[
        (log, order, FREE, V1, ErrorCode.NO_INTERFACE, "there is no interface tun0")
        for log in (nothing, unborn)
        for order in (
            configure(mtu=1400),
            cmd.EnableProcessing(name()),
            cmd.DisableProcessing(name()),
            cmd.RetireInterface(name()),
        )
    ],
    *[
        (busy, order, FREE, V1, ErrorCode.OVERLOADED, "command c1 is pending on tun0")
        for order in (
            configure(mtu=1400),
            cmd.EnableProcessing(name()),
            cmd.DisableProcessing(name()),
            cmd.RetireInterface(name()),
        )
    ],
    (
        running,
        cmd.EnableProcessing(name()),
        FREE,
        V1,
        ErrorCode.ALREADY_RUNNING,
        "packet processing on tun0 is already running",
    ),
    (
        stopped,
        cmd.DisableProcessing(name()),
        FREE,
        V1,
        ErrorCode.NOT_RUNNING,
        "packet processing on tun0 is not running",
    ),
    (bare, configure(netmask="24"), FREE, V1, ErrorCode.INVALID_FIELD, 'netmask: "24" has no address to go with'),
    (bare, configure("10.0.0.1"), FREE, V1, ErrorCode.INVALID_FIELD, "give netmask too"),
    (stopped, configure("2001:db8::1"), FREE, V1, ErrorCode.INVALID_FIELD, "is of another IP version than"),
    (stopped, configure(netmask="64"), FREE, V1, ErrorCode.INVALID_FIELD, 'netmask: "64" is too long a prefix'),
    (stopped, configure(netmask="255.0.255.0"), FREE, V1, ErrorCode.INVALID_FIELD, "is not contiguous"),
    (stopped, configure("10.0.0.255"), FREE, V1, ErrorCode.INVALID_FIELD, "is the broadcast address of its network"),
    (v6, configure(mtu=1279), FREE, V1, ErrorCode.INVALID_FIELD, "mtu: 1279 is under 1280"),
    (stopped, configure("2001:db8::1", "64", 1000), FREE, V1, ErrorCode.INVALID_FIELD, "mtu: 1000 is under 1280"),
    (
        nothing,
        cmd.DeclareInterface(InterfaceSpec(name=name(), addresses=(addr("2001:db8::1/64"),), mtu=Mtu(1000))),
        FREE,
        V1,
        ErrorCode.INVALID_FIELD,
        "mtu: 1000 is under 1280",
    ),
]


@pytest.mark.parametrize(("log", "command", "host", "request_", "code", "words"), REFUSALS)
def test_refusal_says_why_and_changes_nothing(
    log: Callable[[], Log], command: cmd.Command, host: Host, request_: cmd.Request, code: ErrorCode, words: str
) -> None:
    state = log().state
    before = (dict(state.interfaces), dict(state.by_name), state.position)
    with pytest.raises(TunledgerError) as caught:
        judge(state, submission(command, request=request_), host, interface_id(9))
    assert caught.value.code is code
    assert words in str(caught.value)
    assert caught.value.retry is (code is ErrorCode.OVERLOADED)
    assert (state.interfaces, state.by_name, state.position) == before


def test_declare_becomes_the_spec_under_the_new_id() -> None:
    command = declare(addresses=["10.0.0.1/24"])
    intent = judge(State(), submission(command, request=CLASSIC), FREE, interface_id(9))
    assert intent == ev.InterfaceDeclared(interface_id=interface_id(9), name=name(), spec=command.spec, request=CLASSIC)
    assert intended(intent, None) == command.spec


def test_several_interfaces_are_fine_beside_the_classic_one() -> None:
    assert judge(stopped().state, submission(declare(name="tun1")), FREE, interface_id(9)).name == "tun1"


@pytest.mark.parametrize("host", [in_use("10.1.0.0/16"), in_use("192.168.0.0/24"), in_use("::/0"), stranger("tun1")])
def test_other_networks_and_names_of_others_do_not_matter(host: Host) -> None:
    judge(State(), submission(declare(addresses=["10.0.0.1/24"])), host, interface_id(9))


@pytest.mark.parametrize(
    ("log", "command"),
    [
        (nothing, cmd.DeclareInterface(spec(addresses=["10.0.0.1/24"]), allow_overlap=True)),
        (stopped, configure("10.0.0.2", allow_overlap=True)),
        (stopped, configure(mtu=1400)),
    ],
    ids=["declare", "configure", "what it has already"],
)
def test_overlap_passes_when_allowed_or_when_the_address_stays(log: Callable[[], Log], command: cmd.Command) -> None:
    judge(log().state, submission(command), in_use("10.0.0.0/8"), interface_id(9))


@pytest.mark.parametrize(
    ("log", "command", "addresses", "mtu"),
    [
        (stopped, configure(mtu=1400), ["10.0.0.1/24", "10.1.0.1/24"], 1400),
        (stopped, configure("10.0.0.7"), ["10.0.0.7/24", "10.1.0.1/24"], 1500),
        (stopped, configure(netmask="255.255.0.0"), ["10.0.0.1/16", "10.1.0.1/24"], 1500),
        (stopped, configure("172.16.0.1", "12", 9000), ["172.16.0.1/12", "10.1.0.1/24"], 9000),
        (stopped, configure("10.1.0.1"), ["10.1.0.1/24"], 1500),
        (stopped, configure("2001:db8::1", "64"), ["2001:db8::1/64", "10.1.0.1/24"], 1500),
        (stopped, configure(), ["10.0.0.1/24", "10.1.0.1/24"], 1500),
        (bare, configure("10.0.0.1", "24"), ["10.0.0.1/24"], 1500),
        (v6, configure("10.0.0.1", "24", 1000), ["10.0.0.1/24"], 1000),
    ],
)
def test_configure_changes_what_is_given_and_keeps_the_rest(
    log: Callable[[], Log], command: cmd.Command, addresses: list[str], mtu: int
) -> None:
    state = log().state
    intent = judge(state, submission(command), FREE, interface_id(9))
    assert isinstance(intent, ev.InterfaceReconfigured)
    before = state.interfaces[interface_id(1)].spec
    assert before is not None
    assert ([str(a) for a in intent.spec.addresses], intent.spec.mtu) == (addresses, mtu)
    assert msgspec.structs.replace(intent.spec, addresses=before.addresses, mtu=before.mtu) == before
    assert {change["path"] for change in intent.changes} == {
        key
        for key, changed in (
            ("addresses", before.addresses != intent.spec.addresses),
            ("mtu", before.mtu != intent.spec.mtu),
        )
        if changed
    }
    assert intended(intent, state.interfaces[interface_id(1)]) == intent.spec


def test_processing_and_retiring_keep_the_rest_of_the_spec() -> None:
    on, off = running(), stopped()
    here, there = on.state.interfaces[interface_id(1)], off.state.interfaces[interface_id(1)]
    enable = judge(off.state, submission(cmd.EnableProcessing(name())), FREE, interface_id(9))
    disable = judge(on.state, submission(cmd.DisableProcessing(name())), FREE, interface_id(9))
    retire = judge(on.state, submission(cmd.RetireInterface(name())), FREE, interface_id(9))
    assert there.spec is not None
    assert intended(enable, there) == msgspec.structs.replace(there.spec, processing=Processing(running=True))
    assert intended(disable, here) == there.spec
    assert intended(retire, here) is None
    assert {intent.interface_id for intent in (enable, disable, retire)} == {interface_id(1)}


def test_target_is_the_name_a_command_is_about() -> None:
    assert cmd.target(declare(name="tun7")) == "tun7"
    assert cmd.target(cmd.RetireInterface(InterfaceName("tun8"))) == "tun8"


def test_a_pending_spec_is_what_the_engine_brings_the_host_to() -> None:
    assert stopped().state.interfaces[interface_id(1)].wanted == stopped().state.interfaces[interface_id(1)].spec
    log = stopped()
    log.append(retired())
    assert log.state.interfaces[interface_id(1)].wanted is None


def test_what_is_on_already_and_degraded_is_not_called_running() -> None:
    start = submission(cmd.EnableProcessing(name()))
    with pytest.raises(TunledgerError) as refused:
        decide(running().state, start, FREE, lambda: "", lambda _: "netns blue does not exist")
    assert (
        refused.value.message
        == "packet processing on tun0 is on already, but tun0 is degraded: netns blue does not exist"
    )


def test_a_batch_of_one_names_its_command_as_any_batch_does() -> None:
    batch = msgspec.structs.replace(V1, call="async:batch")
    with pytest.raises(TunledgerError) as refused:
        decide(nothing().state, submission(cmd.EnableProcessing(name()), request=batch), FREE, lambda: "")
    assert refused.value.message == "commands.0: there is no interface tun0"
    chain = [{"processor": "inspct"}]
    declare = submission(cmd.DeclareInterface(spec(processing={"chain": chain})), request=batch)
    intents = decide(nothing().state, declare, FREE, lambda: "an id")
    with pytest.raises(TunledgerError, match="did you mean inspect") as refused:
        refuse_unknown_processors(nothing().state, intents, ())
    assert refused.value.field == "commands.0.processing.chain.0.processor"
