"""What the engine answers commands with, and who gives the time; the words that the API and the engine share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.errors import TunledgerError
from service.domain.observed import ObservedLink
from service.domain.plan import Difference
from service.domain.state import Interface
from service.domain.steps import Step
from service.domain.values import CommandId, InterfaceId, InterfaceName
from service.store.answers import Reply


class Clock(Protocol):
    """Time and ids, passed in so that tests can say what they are."""

    def now(self) -> str:
        """UTC, ISO 8601 with microseconds and a Z."""
        ...

    def before(self, seconds: float) -> str:
        """The UTC time this long ago, in the same form."""
        ...

    def seconds_until(self, stamp: str) -> float:
        """How long until a UTC time in that form; negative if it is past."""
        ...

    def elapsed_s(self) -> float:
        """Seconds on a clock that nobody sets, and that goes on while the host sleeps; its zero means nothing."""
        ...

    def new_id(self) -> str:
        """A new UUIDv7."""
        ...


@dataclass(frozen=True, slots=True)
class Finished:
    """One interface of a command: as it is desired now (None once it is gone), and the link as it was seen.

    Attributes:
        waits: why there is no link, although it is desired; empty if there is, or none is desired.
    """

    name: InterfaceName
    interface_id: InterfaceId
    created: bool
    interface: Interface | None
    link: ObservedLink | None
    waits: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command came to. `reply` is what a request with an Idempotency-Key hears, now and ever after."""

    command_id: CommandId
    finished: tuple[Finished, ...] = ()
    reply: Reply | None = None


class Renderer(Protocol):
    """Makes the reply of a command that came with an Idempotency-Key; also for one that recovery finished."""

    def __call__(
        self,
        request: cmd.Request,
        command_id: CommandId,
        finished: Sequence[Finished],
        error: TunledgerError | None,
    ) -> Reply:
        """The reply, from what the log and the kernel say, and nothing else."""
        ...


@dataclass(frozen=True, slots=True)
class Preview:
    """What a command would do: the events, and for each interface the differences and the steps, or why it has none."""

    intents: tuple[ev.Intent, ...]
    plans: tuple[tuple[InterfaceName, tuple[Difference, ...], tuple[Step, ...], str | None], ...]
