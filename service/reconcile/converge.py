"""Look, plan, carry out, look again, verify: the one road from what is desired to what is.

Blocking, for the applier's thread. It has no state, writes no log, and decides nothing that `plan` could: what to do
with the results is the engine's business. Many interfaces go together: one look for all, one batch of the kernel's,
one look again; one that fails, fails alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from service import failpoints
from service.domain import steps as st
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import Observed, ObservedLink, Place, link_key
from service.domain.plan import Difference, Sight, differences, plan, verify
from service.domain.spec import InterfaceSpec, Processing
from service.domain.token import Token
from service.domain.values import InterfaceId, InterfaceName
from service.reconcile.hands import Figures, Hands, Monitor


@dataclass(frozen=True, slots=True)
class Wanted:
    """One interface as it shall be; `spec` None if it shall be gone.

    Attributes:
        fresh: it cannot exist yet, so that a missing name needs no search for a renamed link.
        netns: the network namespace that its link is, or was, to be in; None for the service's own.
        formerly: those that it was to be in before; what it has there is to go.
    """

    token: Token
    name: InterfaceName
    spec: InterfaceSpec | None
    fresh: bool = False
    netns: str | None = None
    formerly: frozenset[str | None] = frozenset()

    @property
    def key(self) -> str:
        """What its link goes by; see `link_key`."""
        return link_key(self.netns, self.name)

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
        sight: the last look at it.
        last_link: the link as it was just before it was removed, for its counters.
        last_figures: what the worker had counted when it let go.
    """

    wanted: Wanted
    found: tuple[Difference, ...] = ()
    steps: list[st.Step] = field(default_factory=list)
    error: TunledgerError | None = None
    sight: Sight = field(default_factory=Sight)
    last_link: ObservedLink | None = None
    last_figures: Figures | None = None

    @property
    def link(self) -> ObservedLink | None:
        """The link as seen at the end."""
        return self.sight.link


FEW = 8  # looks by name cost less than one at everything up to about here, or up to a part of all that there is
FEW_OF = 4


def look(hands: Hands, wanted: Sequence[Wanted]) -> tuple[dict[InterfaceId, Sight], Observed]:
    """What there is of these interfaces: by name when few are asked for, by token among all links where that fails.

    By name also where they may have left something: other hands than these may have put it there.
    """
    attached = hands.dataplane.attached()
    few = len(wanted) <= max(FEW, hands.monitor.watching() // FEW_OF)
    left = [link_key(netns, w.name) for w in wanted for netns in w.formerly]
    observed = hands.kernel.observe([*(w.key for w in wanted), *left] if few else None)
    if few and any(not w.fresh and not _bears(observed.links.get(w.key), w.token) for w in wanted):
        observed = hands.kernel.observe()
    return sights(wanted, observed, attached, hands.monitor), observed


def sights(
    wanted: Iterable[Wanted],
    observed: Observed,
    attached: Mapping[str, Processing],
    monitor: Monitor | None = None,
) -> dict[InterfaceId, Sight]:
    """Match interfaces to links: a link under the wanted name counts first, then one that bears the token, then the
    one that was the interface's own until now and was watched all the time, whatever its alias says. `attached`
    tells what workers hold, and do with it. A token counts in the network namespaces that the interface is or was to
    be in: what others moved elsewhere is theirs to bring back.
    """
    by_token = {(link.token, link.netns): link for link in observed.links.values() if link.token is not None}
    by_place: Mapping[Place, ObservedLink] | None = None
    found: dict[InterfaceId, Sight] = {}
    for each in wanted:
        named = observed.links.get(each.key)
        link = named if _bears(named, each.token) else by_token.get((each.token, each.netns))
        if link is None and each.formerly:
            link = next((by_token[each.token, ns] for ns in each.formerly if (each.token, ns) in by_token), None)
        if link is None and monitor is not None and (place := monitor.holder(each.token)) is not None:
            if by_place is None:
                by_place = {link.place: link for link in observed.links.values()}
            link = by_place.get(place)
            if link is not None and (link.mode is None or link.token is not None):
                link = None  # it says that it is another's
        found[each.id] = Sight(
            link=link,
            attached=each.id in attached,
            applied=attached.get(each.id),
            occupant=named if named is not link else None,
            blind=observed.closed.get(each.netns) if each.netns is not None else None,
        )
    return found


def inspect(hands: Hands, wanted: Sequence[Wanted]) -> tuple[list[Result], dict[InterfaceId, Sight]]:
    """What differs now; nothing is changed."""
    mark = hands.monitor.drain()
    seen, _ = look(hands, wanted)
    return compare(hands, mark, wanted, seen), seen


def compare(hands: Hands, mark: int, wanted: Sequence[Wanted], seen: Mapping[InterfaceId, Sight]) -> list[Result]:
    """What differs in a look that began with `mark`."""
    results = [
        Result(each, found=differences(each.token, each.name, each.spec, seen[each.id]), sight=seen[each.id])
        for each in wanted
    ]
    _settle(hands, mark, [result for result in results if not result.found])
    return results


def converge(hands: Hands, wanted: Sequence[Wanted], seen: Mapping[InterfaceId, Sight] | None = None) -> list[Result]:
    """Bring these interfaces to what is wanted of them. One that fails, fails alone.

    Args:
        seen: a look at them from just before; without, they are looked at.

    Raises:
        TunledgerError: if the host could not be looked at; nothing was changed then.
    """
    mark = None
    if seen is None:
        mark = hands.monitor.drain()
        seen, _ = look(hands, wanted)
    results: list[Result] = []
    under_way: list[_UnderWay] = []
    for each in wanted:
        result, sight = Result(each), seen[each.id]
        results.append(result)
        try:
            result.found = differences(each.token, each.name, each.spec, sight)
            result.sight = sight
            under_way.append(_UnderWay(result, sight, plan(each.token, each.name, each.spec, sight)))
        except TunledgerError as error:
            result.error = error
    _carry_out(hands, under_way)
    if mark is not None:
        _settle(hands, mark, [result for result in results if not result.steps and result.error is None])
    changed = [result for result in results if result.steps and result.error is None]
    if changed:
        failpoints.reach("converge.verify.before")
        mark = hands.monitor.drain()
        # What the kernel said it removed by ifindex is not searched for under other names.
        after: Mapping[InterfaceId, Sight] = {}
        blind: TunledgerError | None = None
        try:
            after, _ = look(hands, [_gone(r.wanted) if r.wanted.spec is None else r.wanted for r in changed])
        except TunledgerError as error:  # what was done is done, and cannot be shown to be right
            blind = error
        for result in changed:
            if blind is not None:
                result.error = blind
                continue
            result.sight = after[result.wanted.id]
            try:
                verify(result.wanted.token, result.wanted.name, result.wanted.spec, result.sight)
            except TunledgerError as error:
                result.error = error
        _settle(hands, mark, [result for result in changed if result.error is None])
    return results


def converge_each(hands: Hands, orders: Sequence[Sequence[Wanted]]) -> list[list[Result]]:
    """Several orders as one batch; the results of each. Raises as `converge` does."""
    results = iter(converge(hands, [each for order in orders for each in order]))
    return [[next(results) for _ in order] for order in orders]


def remove_orphans(hands: Hands, orphans: Iterable[ObservedLink]) -> list[tuple[ObservedLink, TunledgerError | None]]:
    """Remove links that carry our token and that nothing declares, all together. One that went meanwhile is no error,
    and one that changed hands is left alone: the kernel's executor looks at the token again.
    """
    present = list(orphans)
    work = []
    for link in present:
        assert link.token is not None
        work.append((link.token, [st.DeleteLink(link.name, link.ifindex, link.token, link.netns)]))
    return list(zip(present, hands.kernel.execute_many(work), strict=True))


_OfWorkers = st.StopProcessing | st.StartProcessing | st.ConfigureProcessing


@dataclass(slots=True)
class _UnderWay:
    """An interface with the steps to carry out."""

    result: Result
    sight: Sight
    steps: Sequence[st.Step]

    def of_kernel(self) -> list[st.Step]:
        """The steps that the kernel does; a plan has those of the workers before and after them."""
        return [step for step in self.steps if not isinstance(step, _OfWorkers)]

    @property
    def alive(self) -> bool:
        """Whether nothing of it has failed."""
        return self.result.error is None


def _carry_out(hands: Hands, under_way: Sequence[_UnderWay]) -> None:
    """First the workers let go, then the kernel changes all at once, then the workers take up, or change over."""
    for each in under_way:
        for step in each.steps:
            if isinstance(step, st.StopProcessing):
                _stop(hands, each.result, step)
    work = [(each, steps) for each in under_way if each.alive and (steps := each.of_kernel())]
    if work:
        for each, steps in work:
            each.result.steps += steps  # before: a step that fails may have done part of its work
        errors = hands.kernel.execute_many([(each.result.wanted.token, steps) for each, steps in work])
        for (each, steps), error in zip(work, errors, strict=True):
            if any(isinstance(step, st.DeleteLink) for step in steps):
                each.result.last_link = each.sight.link
            each.result.error = error
    for each in under_way:
        for step in each.steps:
            if isinstance(step, st.StartProcessing) and each.alive:
                _start(hands, each.result, step)
            elif isinstance(step, st.ConfigureProcessing) and each.alive:
                _configure(hands, each.result, step)
        if each.alive and each.sight.applied is not None and any(isinstance(step, st.SetMtu) for step in each.steps):
            _tell_mtu(hands, each.result)


def _stop(hands: Hands, result: Result, step: st.StopProcessing) -> None:
    result.steps.append(step)
    try:
        failpoints.reach("dataplane.detach.before")
        result.last_figures = hands.dataplane.detach(step.interface_id)
        failpoints.reach("dataplane.detach.after")
    except Exception as error:  # noqa: BLE001  # whatever it is, it is one interface's
        result.error = _worker_failed(step, error)


def _start(hands: Hands, result: Result, step: st.StartProcessing) -> None:
    result.steps.append(step)
    try:
        failpoints.reach("dataplane.attach.before")
        fd = hands.kernel.open_device(step, result.wanted.token)
        mtu = _mtu(result.wanted)
        hands.dataplane.attach(
            step.interface_id, fd, mode=step.mode.value, name=step.name, processing=step.processing, mtu=mtu
        )
        failpoints.reach("dataplane.attach.after")
    except TunledgerError as error:
        result.error = error
    except Exception as error:  # noqa: BLE001  # as above
        result.error = _worker_failed(step, error)


def _configure(hands: Hands, result: Result, step: st.ConfigureProcessing) -> None:
    result.steps.append(step)
    try:
        failpoints.reach("dataplane.configure.before")
        hands.dataplane.configure(step.interface_id, step.processing, _mtu(result.wanted))
        failpoints.reach("dataplane.configure.after")
    except Exception as error:  # noqa: BLE001  # as above
        result.error = _worker_failed(step, error)


def _tell_mtu(hands: Hands, result: Result) -> None:
    """Tell the processors of a device that is read on.

    No later look would find that they were not told: where they cannot be, the worker lets go, and the next attempt
    finds that missing and attaches with the right one.
    """
    applied = hands.dataplane.attached().get(result.wanted.id)
    if applied is None or not applied.chain:
        return
    step = st.ConfigureProcessing(result.wanted.name, result.wanted.id, applied)
    try:
        try:
            hands.dataplane.configure(step.interface_id, applied, _mtu(result.wanted))
        except Exception:  # noqa: BLE001  # it may have been busy just then
            hands.dataplane.configure(step.interface_id, applied, _mtu(result.wanted))
    except Exception as error:  # noqa: BLE001  # as above
        _stop(hands, result, st.StopProcessing(result.wanted.name, result.wanted.id))
        result.error = _worker_failed(step, error)


def _mtu(wanted: Wanted) -> int:
    assert wanted.spec is not None  # what is to be gone is not read
    return wanted.spec.mtu


def _worker_failed(step: _OfWorkers, error: Exception) -> TunledgerError:
    retry = bool(getattr(error, "retry", True))  # the data plane's own errors know; anything else may pass
    if getattr(error, "code", None) == "stage_refused":  # it is the user's to change
        return TunledgerError(ErrorCode.INVALID_FIELD, f"processing.chain: {error}", field="processing.chain")
    doing = str(step).removeprefix("# ").partition(":")[0]  # a chain may be long, and is in the spec
    return TunledgerError(ErrorCode.WORKER_FAILED, f"{doing}: {_bare(error, step.name)}", retry=retry)


def _bare(error: Exception, name: str) -> str:
    """What the data plane says, without the device's name that it begins with."""
    return str(error).removeprefix(f"{name}: ") or type(error).__name__


def _settle(hands: Hands, mark: int, agreed: Sequence[Result]) -> None:
    """Tell the monitor what a look found to be as wanted."""
    links = [r.link for r in agreed if r.wanted.spec is not None and _bears(r.link, r.wanted.token)]
    gone = [r.last_link.place for r in agreed if r.wanted.spec is None and r.last_link is not None]
    hands.monitor.settled(mark, [link for link in links if link is not None], gone)


def _gone(wanted: Wanted) -> Wanted:
    return replace(wanted, fresh=True)


def _bears(link: ObservedLink | None, token: Token) -> bool:
    return link is not None and link.token == token
