"""What is not as wanted and why: repairs that failed, interfaces that somebody fights over, drift that is only told.

Pure bookkeeping: the time is passed in, on the monotonic clock in seconds. It says when to try again and whether there
is news worth an event; it records nothing itself. A failing repair backs off; one that works again and again within a
minute does not hold, so the interface is contested, and its repairs slow down until it has been quiet for a while.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

from service.domain.errors import TunledgerError
from service.domain.plan import Difference
from service.domain.values import InterfaceId

BACK_OFF_FIRST_S, BACK_OFF_MAX_S = 1.0, 60.0
CONTEST_REPAIRS = 5  # within this time: whoever changes it so often will do it again
CONTEST_WITHIN_S = 60.0
CONTEST_FIRST_S, CONTEST_MAX_S = 10.0, 300.0  # between repairs of a contested interface
QUIET_S = 60.0  # at least; longer where repairs already come slower


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why an interface is not as wanted, since when (UTC), how often that was tried to mend, and when it is next."""

    message: str
    code: str
    since: str
    attempts: int
    next_try: float


@dataclass(slots=True)
class _Contest:
    trouble: Trouble
    delay_s: float
    last_repair: float
    found: tuple[Difference, ...]
    differs: bool = False  # as it was last seen, so that it waits for a repair and not for the quiet to have lasted

    @property
    def quiet_at(self) -> float:
        """When it has been quiet for long enough."""
        return self.last_repair + max(QUIET_S, 2 * self.delay_s)

    def tell(self) -> None:
        """Have the trouble say what is known now: what differs, or that nothing does any more."""
        found = "; ".join(map(str, self.found))
        now = f"now: {found}" if self.differs else f"as wanted now, and watched; last seen: {found}"
        message = f"contested: something changes it again after each repair; {now}"
        self.trouble = replace(self.trouble, message=message)

    @property
    def next_look(self) -> float:
        """When something is to be done about it."""
        return self.trouble.next_try if self.differs else self.quiet_at


@dataclass(slots=True)
class _Reported:
    trouble: Trouble
    found: tuple[Difference, ...]


@dataclass(slots=True)
class Troubles:
    """Of all interfaces. `get` gives what a person should hear of one: a failure before a contest before a report."""

    _failing: dict[InterfaceId, Trouble] = field(default_factory=dict)
    _contests: dict[InterfaceId, _Contest] = field(default_factory=dict)
    _reported: dict[InterfaceId, _Reported] = field(default_factory=dict)
    _repairs: dict[InterfaceId, list[float]] = field(default_factory=dict)

    def get(self, interface_id: InterfaceId) -> Trouble | None:
        """What is wrong with one interface, or None."""
        if (failing := self._failing.get(interface_id)) is not None:
            return failing
        if (contest := self._contests.get(interface_id)) is not None:
            return contest.trouble
        reported = self._reported.get(interface_id)
        return reported.trouble if reported is not None else None

    def __len__(self) -> int:
        return len({*self._failing, *self._contests, *self._reported})

    def __contains__(self, interface_id: InterfaceId) -> bool:
        return self.get(interface_id) is not None

    def is_failing(self, interface_id: InterfaceId) -> bool:
        """Whether its last repair failed; the drift behind it is recorded already."""
        return interface_id in self._failing

    def failed(self, interface_id: InterfaceId, error: TunledgerError, now: float, stamp: str) -> bool:
        """A repair failed; whether in another way than the last time."""
        known = self._failing.get(interface_id)
        attempts = known.attempts + 1 if known is not None else 1
        delay_s = min(BACK_OFF_MAX_S, BACK_OFF_FIRST_S * 2.0 ** min(attempts - 1, 16))
        since = known.since if known is not None else stamp
        self._failing[interface_id] = Trouble(error.message, error.code.value, since, attempts, now + delay_s)
        return known is None or known.message != error.message

    def repaired(self, interface_id: InterfaceId, found: tuple[Difference, ...], now: float, stamp: str) -> int:
        """A repair worked. The number of repairs within CONTEST_WITHIN_S if that makes it contested now, else 0.

        Args:
            found: what others had changed; empty for what was our own doing, which is nobody's fight.
        """
        self._failing.pop(interface_id, None)
        if not found:
            return 0
        self._reported.pop(interface_id, None)
        contest = self._contests.get(interface_id)
        if contest is not None:
            contest.delay_s = min(CONTEST_MAX_S, contest.delay_s * 2)
            contest.last_repair, contest.found, contest.differs = now, found, False
            trouble = contest.trouble
            contest.trouble = replace(trouble, attempts=trouble.attempts + 1, next_try=now + contest.delay_s)
            contest.tell()
            return 0
        recent = [at for at in self._repairs.get(interface_id, []) if at > now - CONTEST_WITHIN_S]
        recent.append(now)
        self._repairs[interface_id] = recent
        if len(recent) < CONTEST_REPAIRS:
            return 0
        del self._repairs[interface_id]
        trouble = Trouble("", "contested", stamp, len(recent), now + CONTEST_FIRST_S)
        contest = self._contests[interface_id] = _Contest(trouble, CONTEST_FIRST_S, now, found)
        contest.tell()
        return len(recent)

    def reported(self, interface_id: InterfaceId, found: tuple[Difference, ...], stamp: str, why: str = "") -> bool:
        """Drift was seen that is not to be mended; whether it is another than the last time.

        Args:
            why: what is known to be behind it, in words.
        """
        self._failing.pop(interface_id, None)
        self._contests.pop(interface_id, None)
        known = self._reported.get(interface_id)
        if known is not None and known.found == found:
            return False
        because = f"{why}; " if why else ""
        message = f"{because}changed by others, and left so (drift: report): {'; '.join(map(str, found))}"
        since = known.trouble.since if known is not None else stamp
        self._reported[interface_id] = _Reported(Trouble(message, "reported", since, 0, float("inf")), found)
        return True

    def agreed(self, interface_id: InterfaceId, now: float) -> tuple[bool, int]:
        """It was seen to be as wanted: (whether reported drift is over, seconds of quiet that ended a contest or 0)."""
        self._failing.pop(interface_id, None)
        over = self._reported.pop(interface_id, None) is not None
        contest = self._contests.get(interface_id)
        if contest is None:
            return over, 0
        contest.differs = False
        if now < contest.quiet_at:
            contest.tell()
            return over, 0
        del self._contests[interface_id]
        return over, round(now - contest.last_repair)

    def waits(self, interface_id: InterfaceId, found: tuple[Difference, ...]) -> None:
        """It was seen to differ before its repair is due; `found` is what differs now."""
        contest = self._contests.get(interface_id)
        if contest is not None:
            contest.differs, contest.found = True, found
            contest.tell()

    def is_due(self, interface_id: InterfaceId, now: float) -> bool:
        """Whether a repair may be tried now."""
        failing, contest = self._failing.get(interface_id), self._contests.get(interface_id)
        return (failing is None or failing.next_try <= now) and (contest is None or contest.trouble.next_try <= now)

    def due(self, now: float) -> frozenset[InterfaceId]:
        """Those whose next try has come."""
        return frozenset(each for each in (*self._failing, *self._contests) if self._next(each) <= now)

    def next_try(self) -> float | None:
        """When the next one is due; None if nothing is to be tried again."""
        return min((self._next(each) for each in (*self._failing, *self._contests)), default=None)

    def _next(self, interface_id: InterfaceId) -> float:
        failing, contest = self._failing.get(interface_id), self._contests.get(interface_id)
        if failing is None:
            return contest.next_look if contest is not None else float("inf")
        return max(failing.next_try, contest.trouble.next_try if contest is not None else 0.0)

    def hurry(self, only: Collection[InterfaceId] | None = None) -> None:
        """Everything may be tried at once, since somebody asks; or what failed of `only`: its reason may be over."""
        for each, trouble in self._failing.items():
            if only is None or each in only:
                self._failing[each] = replace(trouble, next_try=0.0)
        if only is not None:
            return
        for contest in self._contests.values():
            contest.trouble, contest.differs = replace(contest.trouble, next_try=0.0), True

    def forget(self, interface_id: InterfaceId) -> None:
        """A command has made it as wanted, or it is gone."""
        for each in (self._failing, self._contests, self._reported, self._repairs):
            each.pop(interface_id, None)

    def put_back(self, before: "Troubles") -> None:
        """Be again what it was: what was noted since could not be told, and is news still."""
        self._failing, self._contests = before._failing, before._contests
        self._reported, self._repairs = before._reported, before._repairs

    def keep_only(self, known: Iterable[InterfaceId]) -> None:
        """Forget all others: nobody waits for the repair of what is not declared any more."""
        kept = set(known)
        for each in (self._failing, self._contests, self._reported, self._repairs):
            for interface_id in [i for i in each if i not in kept]:
                del each[interface_id]
