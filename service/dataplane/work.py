"""What is to be done with a device's packets, as the service says it and as a worker is told.

Values and their JSON form only: no descriptor and no process here. A worker gets a `Setup`, in which each stage has its
place in shared memory (`area`) and says how many of the descriptors that come along are its own.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from service.dataplane.contract import Mode

HEAD: Final = ("processor", "on_crash")
"""What of a stage is not the processor's own."""

Stage = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done with a device's packets. Without a chain they are counted, and end.

    Attributes:
        chain: the stages as they are in the spec.
        mtu: the interface's, octets; processors are told.
        vnet_hdr: whether the descriptor was attached with IFF_VNET_HDR: each packet has 10 octets in front of it.
        offloads: what the spec says of them; kept for the caller, who compares.
    """

    chain: tuple[dict[str, Any], ...] = ()
    mtu: int = 1500
    vnet_hdr: bool = False
    offloads: str = "auto"


COUNT_ONLY: Final = Work()


@dataclass(frozen=True, slots=True)
class StageSetup:
    """One stage as a worker is told. The same `area` and `spec` as before mean: keep the object you have.

    Attributes:
        area: where its figures are in the device's slot, and its name on the wire while the device is attached.
        place: its index in the spec's chain; below 0 for a tap.
        spec: the stage, whole.
        files: how many descriptors come with it, if it is new.
    """

    area: int
    place: int
    spec: Stage
    files: int = 0


@dataclass(frozen=True, slots=True)
class Setup:
    """A device as a worker is told of it: what it is, and its stages from the wire's side to the last."""

    name: str
    mode: Mode
    mtu: int
    vnet_hdr: bool
    stages: tuple[StageSetup, ...]


def encode(setup: Setup) -> bytes:
    """Return the JSON of a setup."""
    stages = [[stage.area, stage.place, stage.files, dict(stage.spec)] for stage in setup.stages]
    return json.dumps([setup.name, setup.mode, setup.mtu, setup.vnet_hdr, stages]).encode()


def decode(data: bytes) -> Setup:
    """Return the setup that `encode` made `data` of. Raises ValueError."""
    name, mode, mtu, vnet_hdr, stages = json.loads(data)
    made = tuple(StageSetup(area, place, spec, files) for area, place, files, spec in stages)
    return Setup(name, mode, mtu, vnet_hdr, made)


def options(stage: Stage) -> dict[str, Any]:
    """What the processor gets of a stage."""
    return {key: value for key, value in stage.items() if key not in HEAD}


def targets(chain: Iterable[Stage]) -> frozenset[str]:
    """The interfaces that a chain names in an option `to`: a name, or a list of objects with `to` in them.

    That is how `forward` and `balance` name theirs; a processor of another package that does the same has its outputs
    with the same worker.
    """
    found: set[str] = set()
    for stage in chain:
        to = stage.get("to")
        for each in to if isinstance(to, list) else [to]:
            name = each.get("to") if isinstance(each, Mapping) else each
            if isinstance(name, str):
                found.add(name)
    return frozenset(found)


def unchanged(old: Sequence[StageSetup], new: Sequence[Stage]) -> list[StageSetup | None]:
    """For each stage of a new chain the old one that is the same and keeps its state, or None; each old one once."""
    left = list(old)
    found: list[StageSetup | None] = []
    for stage in new:
        same = next((each for each in left if each.spec == stage), None)
        if same is not None:
            left.remove(same)
        found.append(same)
    return found
