"""One effect and one reply for each Idempotency-Key of a caller, however often and whenever it is sent.

What is being answered now is kept here; what was answered before is in the log's database (`service.store.answers`).
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from service.domain.commands import Request
from service.domain.errors import ErrorCode, TunledgerError
from service.store.answers import Kept, Reply

Spawn = Callable[[Coroutine[Any, Any, Reply]], "asyncio.Task[Reply]"]


# Refusals that say nothing of the request itself: a repetition under the same key is a new attempt.
NOT_SETTLED = frozenset(
    {
        ErrorCode.OVERLOADED,
        ErrorCode.SHUTTING_DOWN,
        ErrorCode.LOG_FULL,
        ErrorCode.LOG_UNAVAILABLE,
        ErrorCode.OUTCOME_UNKNOWN,
        ErrorCode.VERSION_CONFLICT,
    }
)


def is_settled(refusal: TunledgerError) -> bool:
    """Whether a repetition of the request is to hear the same."""
    return not (refusal.retry and refusal.code in NOT_SETTLED)


@dataclass(frozen=True, slots=True)
class _UnderWay:
    fingerprint: str
    task: "asyncio.Task[Reply]"


class Keys:
    """For the event loop's thread.

    Args:
        recall: looks up (actor, key) in the database; may block, it is called in a thread.
        spawn: runs a coroutine to its end, also when nobody waits for it.
    """

    def __init__(self, recall: Callable[[str, str], Kept | None], spawn: Spawn) -> None:
        self._recall, self._spawn = recall, spawn
        self._under_way: dict[tuple[str, str], _UnderWay] = {}

    def once(self, actor: str, request: Request, work: Coroutine[Any, Any, Reply]) -> "asyncio.Task[Reply]":
        """The reply to a request with a key: by doing `work`, unless that is done or being done.

        Raises:
            TunledgerError: key_reused; the task also outcome_unknown.
        """
        slot = (actor, request.key)
        known = self._under_way.get(slot)
        if known is None:
            known = _UnderWay(request.fingerprint, self._spawn(self._recalled(actor, request, work)))
            self._under_way[slot] = known
            known.task.add_done_callback(lambda _task: self._under_way.pop(slot, None))
            return known.task
        work.close()
        if known.fingerprint != request.fingerprint:
            raise _reused(request.key)
        return known.task

    async def _recalled(self, actor: str, request: Request, work: Coroutine[Any, Any, Reply]) -> Reply:
        try:
            kept = await asyncio.to_thread(self._recall, actor, request.key)
            if kept is None:
                return await work
        finally:
            work.close()
        if kept.fingerprint != request.fingerprint:
            raise _reused(request.key)
        if kept.reply is None:
            raise TunledgerError(
                ErrorCode.OUTCOME_UNKNOWN, f"command {kept.command_id} has no outcome yet; ask again", retry=True
            )
        return kept.reply


def _reused(key: str) -> TunledgerError:
    return TunledgerError(
        ErrorCode.KEY_REUSED, f"Idempotency-Key: {key} came with another request before; a key is for one request"
    )
