"""Network namespaces with names, as `ip netns` makes them, for tests; each name is the test's own, and goes with it.

Whether one that lost its name has died is told by the far end of a veth pair: that goes when the namespace does.
"""

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_numbers = itertools.count()


def ip(*arguments: str) -> str:
    """`ip` in the calling thread's network namespace; what it says."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout


class Named:
    """A network namespace's name; there may be a namespace behind it or not."""

    def __init__(self) -> None:
        self.name = f"tlt{os.getpid()}-{next(_numbers)}"
        self._witness = f"w{next(_numbers)}"

    def add(self) -> None:
        """`ip netns add`."""
        ip("netns", "add", self.name)

    def delete(self) -> None:
        """`ip netns del`: the name goes; the namespace, when nobody holds it any more."""
        ip("netns", "del", self.name)

    def ip(self, *arguments: str) -> str:
        """`ip -n NAME`."""
        return ip("-n", self.name, *arguments)

    def links(self) -> dict[str, dict[str, Any]]:
        """What is in it, by name."""
        told = self.ip("-json", "-details", "address")
        return {link["ifname"]: link for link in json.loads(told)}

    def observe_death(self) -> None:
        """Put a veth into it, whose other end tells `is_dead`."""
        ip("link", "add", self._witness, "type", "veth", "peer", "name", self._witness, "netns", self.name)

    def is_dead(self) -> bool:
        """Whether the namespace that `observe_death` was called in is no more."""
        devices = Path("/proc/thread-self/net/dev").read_text()
        return not any(line.strip().startswith(f"{self._witness}:") for line in devices.splitlines())


@contextmanager
def named() -> Iterator[Named]:
    """A name of the test's own, with a namespace."""
    if os.geteuid():
        pytest.skip("missing: CAP_SYS_ADMIN, to make a network namespace")
    one = Named()
    one.add()
    try:
        yield one
    finally:
        subprocess.run(["ip", "netns", "del", one.name], capture_output=True, check=False)
