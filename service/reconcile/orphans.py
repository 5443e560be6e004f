"""Links that carry our token and that nothing declares now.

Orphans, which the log once declared, are removed. A create is in the log before the kernel acts: one that the log has
never heard of says that the log lost its end, or that somebody wrote our mark on a link of his own. Such are left alone
and told of, as are links with a copy of a declared token. What declared interfaces are like is not looked at here.
"""

import asyncio
from collections.abc import Callable, Collection

import structlog

from service import failpoints
from service.domain import events as ev
from service.domain.observed import Observed, ObservedLink, one_each
from service.domain.values import InterfaceId
from service.reconcile.applying import Applying
from service.reconcile.converge import remove_orphans
from service.reconcile.journal import Journal
from service.reconcile.summary import Summary, few

log = structlog.get_logger("tunledger.engine")


class Orphans:
    """For the event loop's thread.

    Args:
        knows: which of these interface ids the log has ever declared. May block; it is called in a thread.
    """

    def __init__(
        self, *, journal: Journal, applying: Applying, knows: Callable[[Collection[InterfaceId]], set[InterfaceId]]
    ) -> None:
        self._journal, self._applying, self._knows = journal, applying, knows
        self._unheard: dict[str, str] = {}  # links with a token of ours that is not theirs, and what to say

    def complaints(self) -> list[str]:
        """What there is that should not be, in words."""
        return list(self._unheard.values())

    async def remove(self, observed: Observed, summary: Summary) -> bool:
        """Remove links that carry our token and that nothing declares: what a crash or an older state left behind.

        Returns:
            Whether there were any.
        """
        orphans, unheard = await self.undeclared(observed)
        said = {link.name: f"{link.name} carries our token, but the log has never heard of it" for link in unheard}
        said |= self._copies(observed)
        for name in said.keys() - self._unheard.keys():
            log.warning("a link carries a token that is not its own: left alone", name=name, why=said[name])
        self._unheard = said
        if not orphans:
            return False
        failpoints.reach("engine.orphans.before")
        removed: list[ObservedLink] = []
        for link, error in await self._applying.run(lambda: remove_orphans(self._applying.hands, orphans)):
            if error is not None:
                log.error("an orphan could not be removed", name=link.name, error=error.message)
                summary.failed.append(link.name)
            else:
                removed.append(link)
        names: list[str] = [link.name for link in removed]
        log.info("orphans removed", names=few(names))
        summary.orphans_removed += names
        failpoints.reach("engine.orphans.removed")
        drafts = []
        for link in removed:
            assert link.token is not None
            body = ev.OrphanRemoved(interface_id=link.token.interface_id, name=link.name, ifindex=link.ifindex)
            drafts.append(self._journal.draft(ev.interface_stream(link.token.interface_id), body))
        await self._journal.append(drafts)
        failpoints.reach("engine.orphans.after")
        return True

    async def undeclared(self, observed: Observed) -> tuple[list[ObservedLink], list[ObservedLink]]:
        """Links with our token that nothing declares now: orphans, which the log once declared, and those that it has
        never heard of.
        """
        bearers = observed.by_interface(self._journal.node)
        suspects = {each: link for each, link in bearers.items() if each not in self._journal.state.interfaces}
        if not suspects:
            return [], []
        known = await asyncio.to_thread(self._knows, list(suspects))  # after the look: a new one is in the log by now
        declared = self._journal.state.interfaces  # others by now, perhaps
        orphans = [link for each, link in suspects.items() if each in known and each not in declared]
        return orphans, [link for each, link in suspects.items() if each not in known]

    def _copies(self, observed: Observed) -> dict[str, str]:
        """Links that carry the token of an interface which another link is, and what to say of them."""
        names: dict[InterfaceId, str] = {each: known.name for each, known in self._journal.state.interfaces.items()}
        bearers = [
            link
            for link in observed.links.values()
            if link.token is not None and link.token.node == self._journal.node and link.token.interface_id in names
        ]
        own = {link.ifindex for link in one_each(bearers, self._journal.node, names)}
        return {
            link.name: f"{link.name} carries a copy of the token of {names[link.token.interface_id]}"
            for link in bearers
            if link.ifindex not in own and link.token is not None
        }
