"""What converging needs of the kernel and of the data plane, as two small protocols, and the pair of them.

Two kernels fit here (netlink and the fake one). Both are blocking and belong to the applier's thread.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from service.domain.observed import Host, Observed, ObservedLink
from service.domain.steps import StartProcessing, Step
from service.domain.token import Token


class Kernel(Protocol):
    """Looks at links and carries out steps. Every method raises TunledgerError."""

    def observe(self, names: Collection[str] | None = None) -> Observed:
        """Links with these names, or all."""
        ...

    def sample(self) -> list[ObservedLink]:
        """All TUN and TAP links with their counters; addresses may be missing."""
        ...

    def survey(self, name: str, node: str, *, networks: bool) -> Host:
        """Who else holds a name, and which networks others use."""
        ...

    def execute(self, token: Token, steps: Sequence[Step]) -> None:
        """Carry out steps on the interface with this token until one fails."""
        ...

    def open_device(self, step: StartProcessing, token: Token) -> int:
        """A descriptor on our device, for a worker."""
        ...

    def close(self) -> None:
        """Let go of all resources."""
        ...


class Figures(Protocol):
    """What a worker counted on one device, packets and bytes by class, since `session` began."""

    @property
    def session(self) -> str: ...
    @property
    def from_kernel(self) -> Mapping[str, tuple[int, int]]: ...
    @property
    def to_kernel(self) -> Mapping[str, tuple[int, int]]: ...


class DataPlane(Protocol):
    """Reads devices in worker processes. Keys are interface ids."""

    def attach(self, device: str, fd: int, *, mode: Literal["tun", "tap"], name: str | None = None) -> str:
        """Hand a descriptor to a worker, which owns it from then on. Raises OSError or its own error."""
        ...

    def detach(self, device: str) -> Figures | None:
        """Return when the worker has let go of the device, with its last figures."""
        ...

    def attached(self) -> frozenset[str]:
        """The devices that live workers hold now."""
        ...

    def counters(self) -> Mapping[str, Figures]:
        """The figures of all attached devices."""
        ...

    def healthy(self) -> list[str]:
        """What is wrong with the workers, in words; nothing if all is well."""
        ...


@dataclass(frozen=True, slots=True)
class Hands:
    """Everything a plan can be carried out with."""

    kernel: Kernel
    dataplane: DataPlane
