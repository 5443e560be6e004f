"""Which devices have to be with the same worker: those that hand each other packets, over any number of others.

Pure. A name that no device bears joins those that send to it: whoever bears it later has to be with all of them.
"""

from collections.abc import Collection


class Neighbours:
    """Devices by key with the names that each bears or sends to."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}
        self._keys: dict[str, set[str]] = {}

    def put(self, key: str, names: Collection[str]) -> None:
        """From now on this device bears and sends to these names."""
        self.remove(key)
        self._names[key] = frozenset(names)
        for name in names:
            self._keys.setdefault(name, set()).add(key)

    def remove(self, key: str) -> None:
        """It is gone; nothing if it was not there."""
        for name in self._names.pop(key, ()):
            keys = self._keys[name]
            keys.discard(key)
            if not keys:
                del self._keys[name]

    def of(self, names: Collection[str]) -> set[str]:
        """The devices that one with these names exchanges packets with, itself included if it is there."""
        found: set[str] = set()
        seen = set(names)
        todo = list(seen)
        while todo:
            for key in self._keys.get(todo.pop(), ()):
                if key not in found:
                    found.add(key)
                    new = self._names[key] - seen
                    seen |= new
                    todo.extend(new)
        return found
