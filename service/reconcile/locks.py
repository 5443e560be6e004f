"""One lock for each interface name: commands on one interface follow each other, others do not wait for them.

Nobody waits in a circle, since the locks of several names are taken in one order. What is done under them, and who has
to look again afterwards, does not belong in here.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager


class Locks:
    """For the event loop's thread.

    Args:
        freed: called whenever locks were let go.
    """

    def __init__(self, freed: Callable[[], None]) -> None:
        self._locks: dict[str, asyncio.Lock] = {}
        self._freed = freed

    def __len__(self) -> int:
        return len(self._locks)

    def busy(self, name: str) -> bool:
        """Whether somebody has the lock of this name."""
        lock = self._locks.get(name)
        return lock is not None and lock.locked()

    @asynccontextmanager
    async def hold(self, keys: Sequence[str]) -> AsyncIterator[None]:
        """Hold the locks of these names, taken in order so that nobody waits in a circle."""
        held: list[tuple[str, asyncio.Lock]] = []
        try:
            for key in sorted(set(keys)):
                lock = self._locks.setdefault(key, asyncio.Lock())
                await lock.acquire()
                held.append((key, lock))
            yield
        finally:
            for key, lock in held:
                lock.release()
                if not lock.locked() and not _awaited(lock):
                    self._locks.pop(key, None)
            if held:
                self._freed()


def _awaited(lock: asyncio.Lock) -> bool:
    return bool(getattr(lock, "_waiters", None))
