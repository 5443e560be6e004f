"""What converging needs of the kernel, of its monitor and of the data plane, as small protocols, and all together.

Two kernels fit here (netlink and the fake one). Both are blocking and belong to the applier's thread.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from service.domain.errors import TunledgerError
from service.domain.observed import Host, Observed, ObservedLink, Place
from service.domain.spec import Processing
from service.domain.steps import COUNT_ONLY, StartProcessing, Step
from service.domain.token import Token


class Kernel(Protocol):
    """Looks at links and carries out steps, in all network namespaces. Every method raises TunledgerError.

    Names of links are their keys: "tun0", or "blue/tun0" in a network namespace (`observed.link_key`).
    """

    def observe(self, names: Collection[str] | None = None) -> Observed:
        """Links with these names, or all."""
        ...

    def sample(self) -> list[ObservedLink]:
        """All TUN and TAP links with their counters; addresses may be missing."""
        ...

    def survey(self, names: Collection[str], node: str, *, networks: bool) -> Host:
        """Who else holds these names, and which networks others use."""
        ...

    def execute(self, token: Token, steps: Sequence[Step]) -> None:
        """Carry out the steps of one interface, in order, until one fails."""
        ...

    def execute_many(self, work: Sequence[tuple[Token, Sequence[Step]]]) -> list[TunledgerError | None]:
        """Carry out the steps of many interfaces, each in its order until one fails; one that fails, fails alone.

        The results are in the order of `work`: None where all steps were done.
        """
        ...

    def open_device(self, step: StartProcessing, token: Token) -> int:
        """A descriptor on our device, for a worker."""
        ...

    def close(self) -> None:
        """Let go of all resources."""
        ...


class News(Protocol):
    """What may have changed on the host since it was last asked for."""

    @property
    def changed(self) -> Mapping[Place, Token]: ...
    @property
    def gone(self) -> Mapping[Place, Token]: ...
    @property
    def moved(self) -> Mapping[Place, str]: ...
    @property
    def names(self) -> frozenset[str]: ...
    @property
    def namespaces(self) -> Mapping[str, str]: ...
    @property
    def lost(self) -> bool: ...


class Monitor(Protocol):
    """Hears of changes that others make to links, and vouches for links that it watched without a break."""

    def drain(self) -> int:
        """Hear all that is queued. To be called before a look; the mark it gives is for `settled`."""
        ...

    def settled(self, mark: int, links: Iterable[ObservedLink], gone: Collection[Place] = ()) -> None:
        """A look that began after `mark` saw these links to be ours and as wanted, and these gone."""
        ...

    def holder(self, token: Token) -> Place | None:
        """The place of the link that was seen with this token, and is the same device still; None if none is."""
        ...

    def watching(self) -> int:
        """How many links are watched."""
        ...

    def take(self) -> News:
        """What was heard and is not settled; it is news no longer then."""
        ...

    def trouble(self) -> str | None:
        """Why changes may go unheard, in words, or None."""
        ...


class _NoNews:
    changed: Mapping[Place, Token] = {}
    gone: Mapping[Place, Token] = {}
    moved: Mapping[Place, str] = {}
    names: frozenset[str] = frozenset()
    namespaces: Mapping[str, str] = {}
    lost = False


class NoMonitor:
    """Hears nothing: what others change is found by looking now and then."""

    def drain(self) -> int:
        """Nothing is heard."""
        return 0

    def settled(self, mark: int, links: Iterable[ObservedLink], gone: Collection[Place] = ()) -> None:
        """Nothing is remembered."""

    def holder(self, token: Token) -> Place | None:
        """Nothing is vouched for."""
        del token
        return None

    def watching(self) -> int:
        """Nothing is watched."""
        return 0

    def take(self) -> News:
        """No news."""
        return _NoNews()

    def trouble(self) -> str | None:
        """Its deafness is meant."""
        return None


class Figures(Protocol):
    """What a worker counted on one device, packets and bytes by class, since `session` began."""

    @property
    def session(self) -> str: ...
    @property
    def from_kernel(self) -> Mapping[str, tuple[int, int]]: ...
    @property
    def to_kernel(self) -> Mapping[str, tuple[int, int]]: ...


class DataPlane(Protocol):
    """Reads devices in worker processes. Keys are interface ids.

    Where offloads are `auto` the device was attached with IFF_VNET_HDR, and its packets come with a virtio_net_hdr.
    """

    def attach(
        self,
        device: str,
        fd: int,
        *,
        mode: Literal["tun", "tap"],
        name: str | None = None,
        processing: Processing = COUNT_ONLY,
        mtu: int = 1500,
    ) -> str:
        """Hand a descriptor of `Kernel.open_device` to a worker, which owns it from then on, with what is to be done
        with the packets. Raises OSError or its own error.
        """
        ...

    def configure(self, device: str, processing: Processing, mtu: int) -> None:
        """Have a device's worker do something else, losing no packet. Raises its own error; all is as it was then."""
        ...

    def detach(self, device: str) -> Figures | None:
        """Return when the worker has let go of the device, with its last figures."""
        ...

    def attached(self) -> Mapping[str, Processing]:
        """The devices that live workers hold now, and what they were told to do."""
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
    monitor: Monitor = field(default_factory=NoMonitor)
