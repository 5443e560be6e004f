"""Chains that name other interfaces: what is refused, what is only remarked on, in whatever order they are declared."""

from typing import Any

import pytest

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.decide import decide
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import Host
from service.domain.remarks import declared_modes, remarks
from service.domain.state import State
from service.domain.values import CommandId
from tests.domain.builders import V1, Log, applied, declared, interface_id, judge, spec, submission

TAP1: dict[str, Any] = {"name": "tun1", "mode": "tap"}


def to(*names: str, running: bool = True) -> dict[str, Any]:
    """Processing that forwards to the first and balances over all."""
    targets = [{"to": name} for name in names]
    chain = [
        {"processor": "inspect"},
        {"processor": "forward", "to": names[0]},
        {"processor": "balance", "to": targets},
    ]
    return {"running": running, "chain": chain}


def having(*specs: dict[str, Any]) -> State:
    log = Log()
    for number, fields in enumerate(specs, 1):
        log.append(declared(number, **fields))
        log.append(applied(number))
    return log.state


def refusal(state: State, *wanted: dict[str, Any], request: cmd.Request = V1) -> TunledgerError:
    commands = tuple(cmd.DeclareInterface(spec(**fields)) for fields in wanted)
    with pytest.raises(TunledgerError) as caught:
        decide(state, cmd.Submission(commands, CommandId("c9"), "uid:0", request), Host(), lambda: interface_id(9))
    return caught.value


@pytest.mark.parametrize(
    ("names", "field"),
    [(["tun1"], "processing.chain.1.to"), (["tun2", "tun1"], "processing.chain.2.to.1.to")],
)
def test_a_target_of_the_other_mode_is_refused_with_its_place_and_what_would_do(names: list[str], field: str) -> None:
    error = refusal(having(TAP1), {"processing": to(*names)})
    assert (error.code, error.field) == (ErrorCode.TARGET_MODE, field)
    assert error.message == (
        f"{field}: tun1 is a tap, and tun0 a tun: neither takes the other's packets; "
        "name an interface that is a tun, or make tun1 one"
    )


def test_one_of_the_same_batch_counts_as_it_will_be() -> None:
    error = refusal(State(), {"processing": to("tun1")}, TAP1)
    assert (error.code, error.field) == (ErrorCode.TARGET_MODE, "commands.0.processing.chain.1.to")


def test_in_a_batch_of_one_the_field_is_of_the_batch() -> None:
    error = refusal(having(TAP1), {"processing": to("tun1")}, request=cmd.Request(via="v1", call="batch"))
    assert error.field == "commands.0.processing.chain.1.to"


def test_targets_may_come_later_and_what_came_out_wrong_can_be_mended_step_by_step() -> None:
    wrong = having({"processing": to("tun1")}, TAP1)
    patch = cmd.PatchInterface(name=spec().name, patch={"mtu": 1400})
    assert isinstance(judge(wrong, submission(patch), Host(), interface_id(9)), ev.InterfaceReconfigured)


def test_what_is_not_there_or_of_the_other_mode_or_not_judged_yet_is_remarked_on() -> None:
    state = having({"processing": to("tun1", "tun2")}, TAP1)
    wanted = state.interfaces[interface_id(1)].wanted
    assert wanted is not None
    assert remarks(wanted, declared_modes(state)) == [
        "processing.chain.1.to: tun1 is a tap, not a tun; what is sent there is dropped (mode)",
        "processing.chain.2.to.0.to: tun1 is a tap, not a tun; what is sent there is dropped (mode)",
        "processing.chain.2.to.1.to: tun2 is not declared; what is sent there is dropped (no_output)",
    ]
    assert remarks(wanted, {"tun1": wanted.mode, "tun2": wanted.mode}) == []
    theirs = {"running": False, "chain": [{"processor": "inspect"}, {"processor": "theirs", "x": 1}]}
    assert remarks(spec(processing=theirs), {}) == [
        "processing.chain.1: theirs looks at its options when processing starts"
    ]
    assert remarks(spec(processing={**theirs, "running": True}), {}) == []
