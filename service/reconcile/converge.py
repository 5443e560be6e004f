"""Look, plan, carry out, look again, verify: the one road from what is desired to what is.

Blocking, for the applier's thread. It has no state, writes no log, and decides nothing that `plan` could: what to do
with the results is the engine's business.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from service import failpoints
from service.domain import steps as st
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import Observed, ObservedLink
from service.domain.plan import Difference, Sight, differences, plan, verify
from service.domain.spec import InterfaceSpec
from service.domain.token import Token
from service.domain.values import InterfaceId, InterfaceName
from service.reconcile.hands import Figures, Hands


@dataclass(frozen=True, slots=True)
class Wanted:
    """One interface as it shall be; `spec` None if it shall be gone.

    Attributes:
        fresh: it cannot exist yet, so that a missing name needs no search for a renamed link.
    """

    token: Token
    name: InterfaceName
    spec: InterfaceSpec | None
    fresh: bool = False

    @property
    def id(self) -> InterfaceId:
        """The interface's id."""
        return self.token.interface_id


@dataclass(slots=True)
class Result:
    """What became of one interface.

    Attributes:
        found: what differed before anything was done.
        steps: what was carried out.
        error: why it is not as wanted, or None.
        link: as seen at the end.
        last_link: the link as it was just before it was removed, for its counters.
        last_figures: what the worker had counted when it let go.
    """

    wanted: Wanted
    found: tuple[Difference, ...] = ()
    steps: list[st.Step] = field(default_factory=list)
    error: TunledgerError | None = None
    link: ObservedLink | None = None
    last_link: ObservedLink | None = None
    last_figures: Figures | None = None


def look(hands: Hands, wanted: Sequence[Wanted]) -> tuple[dict[InterfaceId, Sight], Observed]:
    """What there is of these interfaces: by name when few are asked for, by token among all links where that fails."""
    attached = hands.dataplane.attached()
    few = len(wanted) <= FEW
    observed = hands.kernel.observe([w.name for w in wanted] if few else None)
    if few and any(not w.fresh and not _bears(observed.links.get(w.name), w.token) for w in wanted):
        observed = hands.kernel.observe()
    return sights(wanted, observed, attached), observed


FEW = 8  # targeted queries cost less than a full dump up to about here


def sights(wanted: Iterable[Wanted], observed: Observed, attached: frozenset[str]) -> dict[InterfaceId, Sight]:
    """Match interfaces to links: a link under the wanted name counts first, then one that bears the token."""
    by_token = {link.token: link for link in observed.links.values() if link.token is not None}
    found: dict[InterfaceId, Sight] = {}
    for each in wanted:
        named = observed.links.get(each.name)
        link = named if _bears(named, each.token) else by_token.get(each.token)
        found[each.id] = Sight(link=link, attached=each.id in attached, occupant=named if named is not link else None)
    return found


def inspect(hands: Hands, wanted: Sequence[Wanted]) -> tuple[list[Result], Observed]:
    """What differs now; nothing is changed."""
    seen, observed = look(hands, wanted)
    results = []
    for each in wanted:
        sight = seen[each.id]
        result = Result(each, found=differences(each.token, each.name, each.spec, sight), link=sight.link)
        results.append(result)
    return results, observed


def converge(hands: Hands, wanted: Sequence[Wanted]) -> list[Result]:
    """Bring these interfaces to what is wanted of them. One that fails, fails alone.

    Raises:
        TunledgerError: if the host could not be looked at; nothing was changed then.
    """
    seen, _ = look(hands, wanted)
    results = []
    for each in wanted:
        result = Result(each)
        results.append(result)
        try:
            sight = seen[each.id]
            result.found = differences(each.token, each.name, each.spec, sight)
            result.link = sight.link
            _carry_out(hands, result, plan(each.token, each.name, each.spec, sight), sight)
        except TunledgerError as error:
            result.error = error
    changed = [result.wanted for result in results if result.steps and result.error is None]
    if changed:
        after, _ = look(hands, changed)
        for result in results:
            if result.steps and result.error is None:
                sight = after[result.wanted.id]
                result.link = sight.link
                try:
                    verify(result.wanted.token, result.wanted.name, result.wanted.spec, sight)
                except TunledgerError as error:
                    result.error = error
    return results


def remove_orphans(hands: Hands, orphans: Iterable[ObservedLink]) -> list[tuple[ObservedLink, TunledgerError | None]]:
    """Remove links that carry our token and that nothing declares; one that went meanwhile is left out."""
    results: list[tuple[ObservedLink, TunledgerError | None]] = []
    for link in orphans:
        assert link.token is not None
        try:
            present = hands.kernel.observe([link.name]).links.get(link.name)
            if not _bears(present, link.token):
                continue
            hands.kernel.execute(link.token, [st.DeleteLink(link.name, link.ifindex, link.token)])
            results.append((link, None))
        except TunledgerError as error:
            results.append((link, error))
    return results


def _carry_out(hands: Hands, result: Result, steps: Sequence[st.Step], sight: Sight) -> None:
    token = result.wanted.token
    waiting: list[st.Step] = []

    def flush() -> None:
        if waiting:
            result.steps += waiting  # before: a step that fails may have done part of its work
            hands.kernel.execute(token, list(waiting))
            waiting.clear()

    for step in steps:
        match step:
            case st.StopProcessing():
                flush()
                result.steps.append(step)
                failpoints.reach("dataplane.detach.before")
                result.last_figures = _detach(hands, step)
                failpoints.reach("dataplane.detach.after")
            case st.StartProcessing():
                flush()
                result.steps.append(step)
                failpoints.reach("dataplane.attach.before")
                _attach(hands, step, token)
                failpoints.reach("dataplane.attach.after")
            case st.DeleteLink():
                waiting.append(step)
                flush()
                result.last_link = sight.link
            case _:
                waiting.append(step)
    flush()


def _attach(hands: Hands, step: st.StartProcessing, token: Token) -> None:
    fd = hands.kernel.open_device(step, token)
    try:
        hands.dataplane.attach(step.interface_id, fd, mode=step.mode.value, name=step.name)
    except Exception as error:
        raise _worker_failed(step, error) from error


def _detach(hands: Hands, step: st.StopProcessing) -> Figures | None:
    try:
        return hands.dataplane.detach(step.interface_id)
    except Exception as error:
        raise _worker_failed(step, error) from error


def _worker_failed(step: st.Step, error: Exception) -> TunledgerError:
    retry = bool(getattr(error, "retry", True))  # the data plane's own errors know; anything else may pass
    return TunledgerError(ErrorCode.WORKER_FAILED, f"{step}: {error}", retry=retry)


def _bears(link: ObservedLink | None, token: Token) -> bool:
    return link is not None and link.token == token
