"""When to try again, when to stop fighting, and what is news."""

from hypothesis import given
from hypothesis import strategies as st

from service.domain.errors import ErrorCode, TunledgerError
from service.domain.plan import Difference
from service.domain.values import InterfaceId
from service.reconcile import troubles as module
from service.reconcile.troubles import Troubles

ONE, OTHER = InterfaceId("01920000-0000-7000-8000-000000000001"), InterfaceId("01920000-0000-7000-8000-000000000002")
MTU = (Difference("tun0.mtu", 1400, 1500),)
REFUSED, ELSE = TunledgerError(ErrorCode.KERNEL_REFUSED, "no"), TunledgerError(ErrorCode.KERNEL_REFUSED, "other")


def contested(known: Troubles, at: float = 0.0) -> float:
    """Have an interface repaired until it is contested; when that was."""
    for number in range(module.CONTEST_REPAIRS - 1):
        assert known.repaired(ONE, MTU, at + number, "t") == 0
    at += module.CONTEST_REPAIRS - 1
    assert known.repaired(ONE, MTU, at, "t") == module.CONTEST_REPAIRS
    return at


def test_a_failure_is_news_once_and_again_when_it_changes() -> None:
    known = Troubles()
    assert known.failed(ONE, REFUSED, 0, "t0")
    assert not known.failed(ONE, REFUSED, 1, "t1")
    assert known.failed(ONE, ELSE, 2, "t2")
    trouble = known.get(ONE)
    assert trouble is not None
    assert (trouble.message, trouble.since, trouble.attempts) == ("other", "t0", 3)


def test_failures_are_tried_again_ever_more_slowly_up_to_a_limit() -> None:
    known, now, waits = Troubles(), 0.0, []
    for _ in range(12):
        known.failed(ONE, REFUSED, now, "t")
        due = known.next_try()
        assert due is not None
        assert not known.is_due(ONE, due - 0.001)
        assert known.due(due) == {ONE}
        waits.append(due - now)
        now = due
    assert waits[:4] == [1, 2, 4, 8]
    assert waits == sorted(waits)
    assert waits[-1] == module.BACK_OFF_MAX_S


def test_what_failed_for_a_reason_that_is_over_is_tried_at_once_and_nothing_else_is() -> None:
    known = Troubles()
    known.failed(ONE, REFUSED, 0, "t")
    known.failed(OTHER, REFUSED, 0, "t")
    known.hurry({ONE})
    assert known.is_due(ONE, 0.1)
    assert not known.is_due(OTHER, 0.1)
    known.hurry()
    assert known.is_due(OTHER, 0.1)


def test_one_repair_after_another_within_a_minute_is_a_contest_and_is_slowed_down() -> None:
    known = Troubles()
    at = contested(known)
    trouble = known.get(ONE)
    assert trouble is not None
    assert trouble.code == "contested"
    assert "tun0.mtu: desired 1400, observed 1500" in trouble.message
    assert not known.is_due(ONE, at + module.CONTEST_FIRST_S - 1)
    assert known.is_due(ONE, at + module.CONTEST_FIRST_S)
    at += module.CONTEST_FIRST_S
    assert known.repaired(ONE, MTU, at, "t") == 0, "it is contested already"
    assert not known.is_due(ONE, at + 2 * module.CONTEST_FIRST_S - 1), "ever more slowly"


def test_repairs_far_apart_and_our_own_workers_are_no_contest() -> None:
    known = Troubles()
    for number in range(20):
        assert known.repaired(ONE, MTU, number * module.CONTEST_WITHIN_S / 2, "t") == 0
        assert known.repaired(OTHER, (), number, "t") == 0
    assert ONE not in known
    assert len(known) == 0


def test_a_contest_ends_when_it_has_been_quiet_and_not_before() -> None:
    known = Troubles()
    at = contested(known)
    assert known.agreed(ONE, at + 1) == (False, 0)
    assert ONE in known
    due = known.next_try()
    assert due == at + module.QUIET_S, "somebody has to look when the quiet has lasted"
    assert known.agreed(ONE, due) == (False, round(module.QUIET_S))
    assert ONE not in known
    assert known.next_try() is None


def test_a_look_that_agrees_puts_no_repair_off() -> None:
    known = Troubles()
    at = contested(known)
    known.agreed(ONE, at + 1)
    known.waits(ONE, MTU)
    assert known.next_try() == at + module.CONTEST_FIRST_S
    assert known.is_due(ONE, at + module.CONTEST_FIRST_S)


def test_a_contest_says_what_differs_now_and_not_what_did_when_it_began() -> None:
    known, down = Troubles(), (Difference("tun0.up", True, False),)
    at = contested(known)

    def words() -> str:
        trouble = known.get(ONE)
        assert trouble is not None
        return trouble.message.partition("; ")[2]

    assert words() == "as wanted now, and watched; last seen: tun0.mtu: desired 1400, observed 1500"
    known.waits(ONE, down)
    assert words() == "now: tun0.up: desired true, observed false"
    known.agreed(ONE, at + 1)
    assert words() == "as wanted now, and watched; last seen: tun0.up: desired true, observed false"


def test_what_fails_while_it_is_contested_is_due_when_both_are() -> None:
    known = Troubles()
    at = contested(known)
    known.failed(ONE, REFUSED, at, "t")
    due = known.next_try()
    assert due == at + module.CONTEST_FIRST_S
    assert known.due(due) == {ONE}
    assert known.is_due(ONE, due)


def test_reported_drift_is_news_once_and_again_when_it_is_another() -> None:
    known = Troubles()
    assert known.reported(ONE, MTU, "t0")
    assert not known.reported(ONE, MTU, "t1")
    assert known.reported(ONE, (*MTU, Difference("tun0.up", True, False)), "t2")
    trouble = known.get(ONE)
    assert trouble is not None
    assert trouble.since == "t0"
    assert known.next_try() is None, "nobody is to mend it"
    known.reported(OTHER, MTU, "t0", "netns blue went away")
    other = known.get(OTHER)
    assert other is not None
    assert other.message.startswith("netns blue went away; changed by others, and left so")
    assert known.agreed(ONE, 3) == (True, 0)
    assert known.agreed(ONE, 4) == (False, 0)


def test_whoever_asks_need_not_wait() -> None:
    known = Troubles()
    contested(known)
    known.failed(OTHER, REFUSED, 100, "t")
    known.hurry()
    assert known.due(100) == {ONE, OTHER}


@given(st.lists(st.tuples(st.sampled_from(["failed", "repaired", "reported", "agreed"]), st.booleans()), max_size=60))
def test_what_is_forgotten_leaves_nothing_behind(doings: list[tuple[str, bool]]) -> None:
    known, now = Troubles(), 0.0
    for what, long in doings:
        now += 100.0 if long else 1.0
        match what:
            case "failed":
                known.failed(ONE, REFUSED, now, "t")
            case "repaired":
                known.repaired(ONE, MTU, now, "t")
            case "reported":
                known.reported(ONE, MTU, "t")
            case _:
                known.agreed(ONE, now)
    known.keep_only([OTHER])
    assert ONE not in known
    assert known == Troubles()
