"""Links that carry our token and that nothing declares now.

Orphans, which the log once declared, are removed. A create is in the log before the kernel acts: one that the log has
never heard of says that the log lost its end, or that somebody wrote our mark on a link of his own. Such are left alone
and told of, as are links with a copy of a declared token. Of declared interfaces there is only one thing here: a second
link, in a network namespace that the interface was to be in before. What others moved elsewhere is not ours to remove
while its interface is declared.
"""

import asyncio
from collections.abc import Callable, Collection

import structlog

from service import failpoints
from service.domain import events as ev
from service.domain.observed import Observed, ObservedLink, link_key, one_each
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
        said = {link.key: f"{link.key} carries our token, but the log has never heard of it" for link in unheard}
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
                log.error("an orphan could not be removed", name=link.key, error=error.message)
                summary.failed.append(link.key)
            else:
                removed.append(link)
        names: list[str] = [link.key for link in removed]
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
        strays = self._strays(observed)
        suspects = {each: link for each, link in bearers.items() if each not in self._journal.state.interfaces}
        if not suspects:
            return strays, []
        known = await asyncio.to_thread(self._knows, list(suspects))  # after the look: a new one is in the log by now
        declared = self._journal.state.interfaces  # others by now, perhaps
        orphans = [link for each, link in suspects.items() if each in known and each not in declared]
        return [*strays, *orphans], [link for each, link in suspects.items() if each not in known]

    def _strays(self, observed: Observed) -> list[ObservedLink]:
        """Links with the token of a declared interface in a network namespace where it is not wanted any more, while
        it has its own link where it is. One that has none is `plan`'s to replace.
        """
        found = []
        for link in observed.links.values():
            token = link.token
            if token is None or token.node != self._journal.node:
                continue
            interface = self._journal.state.interfaces.get(token.interface_id)
            if interface is None or interface.pending is not None or interface.netns == link.netns:
                continue
            if link.netns not in self._applying.formerly(interface.id):
                continue
            own = observed.links.get(link_key(interface.netns, interface.name))
            if own is not None and own.token == token:
                found.append(link)
        return found

    def _copies(self, observed: Observed) -> dict[str, str]:
        """Links that carry the token of an interface which another link beside them is, and what to say of them."""
        known = self._journal.state.interfaces
        keys = {each: link_key(interface.netns, interface.name) for each, interface in known.items()}
        bearers = [
            link
            for link in observed.links.values()
            if link.token is not None and link.token.node == self._journal.node and link.token.interface_id in keys
        ]
        own = {link.place for link in one_each(bearers, self._journal.node, keys)}
        return {
            link.key: f"{link.key} carries a copy of the token of {known[link.token.interface_id].name}"
            for link in bearers
            if link.token is not None
            and link.place not in own
            and link.netns == known[link.token.interface_id].netns  # elsewhere it was moved
        }
