"""In which order the steps of many interfaces are carried out: column by column. Both kernels keep to it.

A column is the next step of every interface that has one left and has not failed. So each interface sees its own
steps in order and none after one that failed, while steps of many interfaces can be done as one. How a step is done
does not live here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from service.domain import steps as st
from service.domain.errors import TunledgerError
from service.domain.token import Token

T = TypeVar("T")


@dataclass(slots=True)
class Member:
    """One interface of a batch.

    Attributes:
        at: how many of its steps are done.
        ifindex: of its link, once the token was seen on it; steps address it by this from then on.
        error: why its step `at` failed; it gets no further one.
    """

    token: Token
    steps: Sequence[st.Step]
    at: int = 0
    ifindex: int | None = None
    error: TunledgerError | None = None

    @property
    def step(self) -> st.Step:
        """The next step."""
        return self.steps[self.at]

    @property
    def goes_on(self) -> bool:
        """Whether there is a next step."""
        return self.error is None and self.at < len(self.steps)


def column(members: Sequence[Member]) -> Iterator[list[Member]]:
    """The members whose next step is due, in four lists: deletes, renames, creates, and the rest.

    In that order, since a name that one interface gives up may be wanted by another.
    """
    parts: tuple[list[Member], ...] = ([], [], [], [])
    for member in members:
        if member.goes_on:
            parts[_rank(member.step)].append(member)
    return (part for part in parts if part)


def _rank(step: st.Step) -> int:
    match step:
        case st.DeleteLink():
            return 0
        case st.SetName():
            return 1
        case st.CreateLink():
            return 2
        case _:
            return 3


def cut(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Pieces of at most this size."""
    return (items[at : at + size] for at in range(0, len(items), size))
