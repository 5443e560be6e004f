"""Folding the log: golden sequences, and that an event which cannot follow is refused and changes nothing."""

import copy
from collections.abc import Callable

import msgspec
import pytest

from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.spec import Processing
from service.domain.state import State, evolve, fold
from tests.domain.builders import (
    CLASSIC,
    NODE,
    Log,
    applied,
    declared,
    disabled,
    enabled,
    failed,
    interface_id,
    name,
    reconfigured,
    retired,
    spec,
)

ONE = interface_id(1)


def log_of(*bodies: ev.Event) -> Log:
    log = Log()
    for body in bodies:
        log.append(body)
    return log


def drift(number: int = 1) -> ev.DriftDetected:
    return ev.DriftDetected(interface_id=interface_id(number), name=name(), cause="unknown", differences=[])


def started(boot: str = "b1") -> ev.ServiceStarted:
    return ev.ServiceStarted(pid=1, version="0", boot_id=boot, uid=0, address="")


def test_declaring_is_pending_until_its_outcome() -> None:
    log = log_of(declared(request=CLASSIC))
    interface = log.state.interfaces[ONE]
    assert (interface.spec, interface.wanted, interface.generation, interface.via) == (None, spec(), 0, "classic")
    assert interface.pending is not None
    assert (interface.pending.command_id, interface.pending.position) == ("c1", 1)
    assert (interface.pending.intent, interface.pending.recorded_at) == ("InterfaceDeclared", log.events[0].recorded_at)
    log.append(applied())
    interface = log.state.interfaces[ONE]
    assert (interface.spec, interface.pending, interface.generation, interface.version) == (spec(), None, 1, 2)
    assert (interface.applied_position, interface.declared_at) == (2, log.events[0].recorded_at)


def test_declaring_that_fails_leaves_nothing_and_frees_the_name() -> None:
    log = log_of(declared(), failed())
    assert (log.state.interfaces, log.state.by_name) == ({}, {})
    log.append(declared(2))
    assert log.state.find("tun0") is log.state.interfaces[interface_id(2)]


def test_reconfiguring_that_fails_goes_back() -> None:
    log = log_of(declared(), applied(), reconfigured(mtu=1400))
    assert log.state.interfaces[ONE].wanted == spec(mtu=1400)
    assert log.state.interfaces[ONE].spec == spec()
    log.append(failed())
    interface = log.state.interfaces[ONE]
    assert (interface.wanted, interface.generation, interface.version, interface.applied_position) == (spec(), 1, 4, 2)


def test_processing_is_part_of_the_spec() -> None:
    log = log_of(declared(mtu=1400), applied(), enabled())
    on = msgspec.structs.replace(spec(mtu=1400), processing=Processing(running=True))
    assert log.state.interfaces[ONE].wanted == on
    log.append(applied())
    log.append(disabled())
    assert log.state.interfaces[ONE].spec == on
    log.append(applied())
    assert (log.state.interfaces[ONE].spec, log.state.interfaces[ONE].generation) == (spec(mtu=1400), 3)


def test_retiring_forgets_when_applied_and_not_when_failed() -> None:
    log = log_of(declared(), applied(), retired(), failed())
    assert log.state.interfaces[ONE].wanted == spec()
    log.append(retired())
    assert log.state.interfaces[ONE].wanted is None
    log.append(applied())
    assert (log.state.interfaces, log.state.find("tun0")) == ({}, None)


def test_observations_change_no_desired_state() -> None:
    log = log_of(declared(), applied())
    before = log.state.interfaces[ONE]
    for body in (
        drift(),
        ev.DriftRepaired(interface_id=ONE, name=name(), steps=[], took_us=1),
        ev.RepairFailed(interface_id=ONE, name=name(), code="x", message="", errno=None),
        ev.OrphanRemoved(interface_id=interface_id(77), name="tun9", ifindex=3),
        ev.WorkerExited(worker=0, pid=1, status="", devices=[]),
        ev.CommandRejected(name="tun0", command="x", code="", message="", field=None, request=CLASSIC, suppressed=0),
        ev.StartupReconciled(
            took_us=1,
            recreated=[],
            repaired=[],
            adopted=[],
            orphans_removed=[],
            finished=[],
            processing_resumed=[],
            failed=[],
        ),
    ):
        log.append(body, command_id=None)
    after = log.state.interfaces[ONE]
    assert msgspec.structs.replace(after, version=before.version) == before
    assert after.version == 5, "its own stream's events are counted"
    assert log.state.position == 9


def test_the_last_start_and_stop_are_known() -> None:
    log = log_of(started())
    assert log.state.boot_id == "b1"
    assert log.state.stopped is None
    log.append(ev.ServiceStopped(pid=1, reason="SIGTERM", interfaces="keep"))
    assert fold(log.events).stopped == "keep"
    log.append(started("b2"))
    assert log.state.boot_id == "b2"
    assert log.state.stopped is None


def test_classic_is_the_newest_that_the_original_api_made() -> None:
    log = log_of(declared(1, name="a", request=CLASSIC), applied(1), declared(2, name="b"), applied(2))
    classic = log.state.classic()
    assert classic is not None
    assert classic.name == "a"
    log.append(declared(3, name="c", request=CLASSIC))
    classic = log.state.classic()
    assert classic is not None
    assert classic.name == "c"
    assert State().classic() is None


IMPOSSIBLE: dict[str, tuple[list[ev.Event], Callable[[Log], ev.Recorded], str]] = {
    "gap": ([], lambda log: log.record(declared(), position=2), "follows position 0"),
    "repeated": ([declared()], lambda log: log.record(applied(), position=1), "follows position 1"),
    "name declared twice": ([declared(), applied()], lambda log: log.record(declared(2)), "tun0, which exists"),
    "name declared twice while pending": ([declared()], lambda log: log.record(declared(2)), "tun0, which exists"),
    "id declared twice": ([declared(), applied()], lambda log: log.record(declared(name="tun1")), "which exists"),
    "intent without a command": ([], lambda log: log.record(declared(), None), "without a command id"),
    "change without a command": (
        [declared(), applied()],
        lambda log: log.record(reconfigured(), None),
        "without a command id",
    ),
    **{
        f"{type(body).__name__} of nothing": ([], lambda log, b=body: log.record(b), "does not exist")  # type: ignore[misc]
        for body in (reconfigured(), enabled(), disabled(), retired(), applied(), failed())
    },
    **{
        f"{type(body).__name__} on one never applied": (
            [declared()],
            lambda log, b=body: log.record(b, "c2"),  # type: ignore[misc]
            words,
        )
        for body, words in (
            (reconfigured(), "while InterfaceDeclared is pending"),
            (enabled(), "never applied"),
            (disabled(), "never applied"),
            (retired(), "while InterfaceDeclared is pending"),
        )
    },
    **{
        f"{type(body).__name__} upon a pending one": (
            [declared(), applied(), retired()],
            lambda log, b=body: log.record(b, "c2"),  # type: ignore[misc]
            "while InterfaceRetired is pending on tun0",
        )
        for body in (reconfigured(), enabled(), disabled(), retired())
    },
    "outcome twice": ([declared(), applied()], lambda log: log.record(applied()), "which is not pending"),
    "failure after success": ([declared(), applied()], lambda log: log.record(failed()), "which is not pending"),
    "outcome of another command": ([declared()], lambda log: log.record(applied(), "c2"), "of command c2"),
    "outcome of no command": ([declared()], lambda log: log.record(failed(), None), "which is not pending"),
    "outcome of a retired one": (
        [declared(), applied(), retired(), applied()],
        lambda log: log.record(applied()),
        "does not exist",
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_event_is_refused_and_changes_nothing(case: str) -> None:
    bodies, record, words = IMPOSSIBLE[case]
    log = log_of(*bodies)
    event = record(log)
    before = {slot: copy.copy(getattr(log.state, slot)) for slot in State.__slots__}
    with pytest.raises(TunledgerError) as caught:
        evolve(log.state, event)
    assert caught.value.code is ErrorCode.LOG_CORRUPT
    assert words in str(caught.value)
    assert f"at position {event.position}: {type(event.body).__name__} " in str(caught.value)
    assert {slot: getattr(log.state, slot) for slot in State.__slots__} == before


def test_folding_the_rest_onto_a_fold_is_folding_it_all() -> None:
    log = log_of(
        started(),
        declared(1),
        applied(1),
        declared(2, name="tun1"),
        failed(2),
        enabled(1),
        drift(),
        applied(1),
        reconfigured(1, mtu=1400),
    )
    whole = fold(log.events)
    assert whole == log.state
    assert (whole.head, whole.position) == ("h9", 9)
    for cut in range(len(log.events) + 1):
        assert fold(log.events[cut:], fold(log.events[:cut])) == whole


def test_states_at_different_positions_differ() -> None:
    assert log_of(started()).state != State()
    assert State() != object()
    with pytest.raises(TypeError):
        hash(State())


def test_streams_are_named_by_what_they_are_about() -> None:
    assert (ev.interface_stream(ONE), ev.name_stream("tun0"), ev.node_stream(NODE)) == (
        f"interface/{ONE}",
        "name/tun0",
        f"node/{NODE}",
    )
