"""A TUN device of somebody else, and a proof that it was left alone."""

import os
from types import TracebackType
from typing import Self

from service.domain.observed import ObservedLink
from service.domain.values import Mode
from service.kernel import tundev
from service.kernel.linux import LinuxKernel


class Stranger:
    """A device that this process holds open, in the present namespace, with an alias that is not ours."""

    def __init__(self, name: str, mode: Mode = Mode.TUN) -> None:
        self.name, self._mode, self._fd = name, mode, -1
        self._before: ObservedLink | None = None

    def __enter__(self) -> Self:
        self._fd = tundev.open_node()
        tundev.attach(self._fd, self.name, self._mode, multi_queue=False, exclusive=True)
        self._before = self._look()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def assert_untouched(self) -> None:
        """Everything the kernel says of it is what it said at first."""
        assert self._look() == self._before, f"{self.name} is not ours and was changed"

    def _look(self) -> ObservedLink | None:
        kernel = LinuxKernel()
        try:
            return kernel.observe([self.name]).links.get(self.name)
        finally:
            kernel.close()
