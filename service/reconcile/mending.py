"""What to do about differences: tell what drifted, mend what is due, and record what came of it.

Whether an interface is due, contested, or only to be reported is `troubles`' to say; how it is mended, `converge`'s.
Looking at the host, and finishing commands, does not belong in here.
"""

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import structlog

from service import failpoints
from service.domain import events as ev
from service.domain.errors import TunledgerError
from service.domain.plan import Difference, differences, leave_be
from service.domain.spec import Drift
from service.domain.steps import StartProcessing
from service.domain.values import InterfaceId
from service.reconcile.applying import Applying
from service.reconcile.converge import Result, Wanted, converge
from service.reconcile.counting import Counting
from service.reconcile.journal import Journal
from service.reconcile.summary import SHOWN_MAX, Summary, few
from service.reconcile.troubles import CONTEST_WITHIN_S, Troubles

LINE_MAX = 2000  # characters of a log line that tells of many interfaces

log = structlog.get_logger("tunledger.engine")


class Mending:
    """For the event loop's thread; the locks of the interfaces' names are held by the caller."""

    def __init__(self, *, journal: Journal, applying: Applying, counting: Counting, troubles: Troubles) -> None:
        self._journal, self._applying, self._counting, self._troubles = journal, applying, counting, troubles

    async def mend(
        self,
        results: Sequence[Result],
        cause: str,
        causes: Mapping[InterfaceId, str],
        summary: Summary,
        *,
        starting: bool,
        asked: bool,
    ) -> None:
        """Record what differs, mend what is due, and record what came of it.

        Raises:
            TunledgerError: if what was found could not be recorded, and nothing was changed; or what came of it.
        """
        now, stamp = time.monotonic(), self._journal.now()
        before = copy.deepcopy(self._troubles)
        due: list[Result] = []
        let_go: dict[InterfaceId, tuple[Result, str]] = {}
        drafts: list[ev.Draft] = []
        drifted: list[str] = []
        for result in results:
            wanted = result.wanted
            if not result.found:
                summary.adopted.append(wanted.name)
                drafts += self._agreed(wanted, now)
                continue
            own = _own_part(result, starting=starting, asked=asked)
            if own is None:
                told = self._troubles.reported(wanted.id, result.found, stamp, _why(causes.get(wanted.id, cause)))
            elif not self._troubles.is_due(wanted.id, now):
                self._troubles.waits(wanted.id, result.found)
                continue
            else:
                due.append(own)
                if own.wanted.spec is None:
                    let_go[wanted.id] = result, causes.get(wanted.id, cause)
                told = not self._troubles.is_failing(wanted.id)
            if told:
                drafts.append(self._drift(result, causes.get(wanted.id, cause)))
                drifted.append(wanted.name)
        if drifted:
            found = "; ".join(str(d) for result in results if result.found for d in result.found[:SHOWN_MAX])
            log.warning("drift", names=few(drifted), cause=cause, found=found[:LINE_MAX])
        failpoints.reach("engine.drift.before")
        try:
            await self._journal.append(drafts)
        except TunledgerError:
            self._troubles.put_back(before)  # what could not be told is news still
            raise
        failpoints.reach("engine.drift.after")
        if not due:
            return
        begun = time.monotonic_ns()
        chosen = [result.wanted for result in due]
        # What was just looked at is not looked at again: each change is checked at its last moment, and verified.
        seen = {result.wanted.id: result.sight for result in due}
        mended = await self._applying.run(lambda: converge(self._applying.hands, chosen, seen))
        took_us = (time.monotonic_ns() - begun) // 1000
        drafts = []
        for found_first, result in zip(due, mended, strict=True):
            drafts += self._mended(found_first, result, took_us, summary)
            if result.error is None and result.wanted.id in let_go:  # all else is as it was, and left so
                left, why = let_go[result.wanted.id]
                self._troubles.reported(left.wanted.id, left.found, stamp, _why(why))
                drafts.append(self._drift(left, why))
        done = [result.wanted.name for result in mended if result.error is None]
        if done:
            steps = "; ".join(str(step) for result in mended for step in result.steps[:SHOWN_MAX])
            log.info("repaired", names=few(done), steps=steps[:LINE_MAX])
        failpoints.reach("engine.mended.before")
        await self._journal.append(drafts, self._counting.job(self._counting.let_go(mended)))
        failpoints.reach("engine.mended.after")

    def _agreed(self, wanted: Wanted, now: float) -> list[ev.Draft]:
        """What to record of an interface that is as wanted: that a trouble is over."""
        if wanted.id not in self._troubles:
            return []
        over, quiet_s = self._troubles.agreed(wanted.id, now)
        stream, drafts = ev.interface_stream(wanted.id), list[ev.Draft]()
        if over:
            drafts.append(self._journal.draft(stream, ev.DriftEnded(interface_id=wanted.id, name=wanted.name)))
        if quiet_s:
            log.info("contested no more", name=wanted.name, quiet_s=quiet_s)
            ended = ev.ContestEnded(interface_id=wanted.id, name=wanted.name, quiet_s=quiet_s)
            drafts.append(self._journal.draft(stream, ended))
        return drafts

    def _drift(self, result: Result, cause: str) -> ev.Draft:
        body = ev.DriftDetected(
            interface_id=result.wanted.id,
            name=result.wanted.name,
            cause=cause,
            differences=[difference.to_json() for difference in result.found],
        )
        return self._journal.draft(ev.interface_stream(result.wanted.id), body)

    def _mended(self, found: Result, result: Result, took_us: int, summary: Summary) -> list[ev.Draft]:
        """What to record of one repair: it worked, or it failed in a way not recorded yet."""
        wanted, stream = result.wanted, ev.interface_stream(result.wanted.id)
        body: ev.Event
        if result.error is None:
            steps = [str(step) for step in result.steps]
            anew = found.link is None and wanted.spec is not None
            (summary.recreated if anew else summary.repaired).append(wanted.name)
            if wanted.spec is not None and wanted.spec.processing.running and _starts(result):
                summary.processing_resumed.append(wanted.name)
            body = ev.DriftRepaired(interface_id=wanted.id, name=wanted.name, steps=steps, took_us=took_us)
            drafts = [self._journal.draft(stream, body)]
            others = tuple(d for d in found.found if not _of_processing(d, wanted.name))
            repairs = self._troubles.repaired(wanted.id, others, time.monotonic(), self._journal.now())
            if repairs:
                log.warning("contested: repairs slow down", name=wanted.name, found="; ".join(map(str, others)))
                contested = ev.InterfaceContested(
                    interface_id=wanted.id,
                    name=wanted.name,
                    repairs=repairs,
                    within_s=round(CONTEST_WITHIN_S),
                    differences=[difference.to_json() for difference in others],
                )
                drafts.append(self._journal.draft(stream, contested))
            return drafts
        summary.failed.append(wanted.name)
        if not self._troubles.failed(wanted.id, result.error, time.monotonic(), self._journal.now()):
            return []
        log.error("repair failed", name=wanted.name, error=result.error.message)
        body = ev.RepairFailed(
            interface_id=wanted.id,
            name=wanted.name,
            code=result.error.code.value,
            message=result.error.message,
            errno=result.error.errno_name,
        )
        return [self._journal.draft(stream, body)]


def _own_part(result: Result, *, starting: bool, asked: bool) -> Result | None:
    """What of the drift is to be mended: all of it; or, where drift is only to be reported, what our own workers are
    to do, if that is all; else None.
    """
    wanted, link = result.wanted, result.link
    if wanted.spec is None or wanted.spec.drift is not Drift.REPORT or asked or (starting and link is None):
        return result
    if link is None:
        # A descriptor that nobody can want any more must not keep a network namespace alive.
        let_go = wanted.netns is not None and result.sight.attached and result.sight.blind is None
        return replace(result, wanted=replace(wanted, spec=None), found=()) if let_go else None
    left = replace(wanted, spec=leave_be(wanted.spec, link))
    found = differences(wanted.token, wanted.name, left.spec, result.sight)
    ours = tuple(d for d in found if _of_processing(d, wanted.name))
    return replace(result, wanted=left, found=found) if found and ours == found else None


def _why(cause: str) -> str:
    """A cause that says more than that it was others; those are words, the rest are names."""
    return cause if " " in cause else ""


def _starts(result: Result) -> bool:
    return any(isinstance(step, StartProcessing) for step in result.steps)


def _of_processing(difference: Difference, name: str) -> bool:
    """Whether a difference is between us and our own workers: nobody else can make one."""
    return difference.path.startswith(f"{name}.processing.")
