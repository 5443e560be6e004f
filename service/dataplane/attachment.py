"""A device and the worker that has it, as the supervisor keeps it: its slot, its stages' areas, its figures.

State without threads or I/O; all of it is used under the supervisor's lock. A device may be handed from worker to
worker within one session: what it counted before is kept here and added.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from service.dataplane import layout
from service.dataplane.contract import Mode
from service.dataplane.work import StageSetup, Work
from service.dataplane.worker_process import WorkerProcess

Busy = Literal["attaching", "detaching", "changing"]

Ending = Literal["removed", "refused", "moved", "interface_gone", "worker_exit"]
"""Why a stage or tap is over: taken out of its chain, never begun, its device moved to another worker, its device gone,
its worker ended."""


@dataclass(frozen=True, slots=True)
class DeviceCounters:
    """What a device's worker has read and written since it was attached, by class of `packet.classify.CLASSES`.

    Each figure is (packets, bytes); classes without a packet are left out. `drops` are packets that ended, by
    `contract.DropReason`.
    """

    session: str
    """Unique to the attach. All figures start at zero with it and only grow."""
    from_kernel: Mapping[str, tuple[int, int]]
    to_kernel: Mapping[str, tuple[int, int]]
    drops: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageStatus:
    """A stage of a device's chain. `figures` are the processor's own; all start at zero when the stage is made.

    `id` is unique to the set-up and stays with it while chains around it change; 0 of a stage that is bypassed.
    """

    processor: str
    bypassed: bool
    packets_in: int
    packets_out: int
    figures: Mapping[str, int]
    id: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """A stage or tap that is over, with the figures that it had once its worker was done with it."""

    device: str
    stage: int
    figures: Mapping[str, int]
    reason: Ending


@dataclass(slots=True, eq=False)
class Held:
    """A stage that a worker has.

    Attributes:
        id: unique to this set-up, whatever its place becomes.
        setup: as the worker was told.
        figures: the names of its own, as the worker said.
        memory: what it shares with the service, read-only.
        told: somebody gave files for it, and is to hear of its end.
    """

    id: int
    setup: StageSetup
    figures: Sequence[str] = ()
    memory: memoryview | None = None
    told: bool = False


@dataclass(slots=True, eq=False)
class Attachment:
    """A device with a worker, or on its way to one."""

    device: str
    name: str
    mode: Mode
    session: str
    worker: WorkerProcess
    slot: int
    serial: int
    work: Work
    confirmed: bool = False
    """Whether the worker has said that it has it."""
    busy: Busy | None = "attaching"
    """What a caller is doing with it."""
    waits: bool = False
    """Whether that caller waits until others are done with another device."""
    stages: list[Held | None] = field(default_factory=list)
    """By place in the chain; None: bypassed."""
    taps: list[Held] = field(default_factory=list)
    coming: tuple[Work, Sequence[Held]] | None = None
    """What the worker is being told right now: it may have it, and die of it, before it answers."""
    before: layout.SlotFigures = field(default_factory=lambda: layout.SlotFigures({}, {}, {}))
    """What earlier workers counted in this session."""

    def figures(self) -> DeviceCounters:
        """Everything counted in this session."""
        before = self.before
        now = self.worker.counters.read(self.slot) if self.confirmed else layout.SlotFigures({}, {}, {})
        return DeviceCounters(
            self.session,
            _added(now.from_kernel, before.from_kernel),
            _added(now.to_kernel, before.to_kernel),
            {reason: now.drops.get(reason, 0) + before.drops.get(reason, 0) for reason in now.drops | before.drops},
        )

    def leave(self) -> None:
        """The worker has let go of it in good order: keep what was counted."""
        total = self.figures()
        self.before = layout.SlotFigures(dict(total.from_kernel), dict(total.to_kernel), dict(total.drops))

    def held(self) -> list[Held]:
        """All its stages and taps."""
        return [held for held in (*self.taps, *self.stages) if held is not None]

    def free_areas(self) -> list[int]:
        """Areas that no stage of it has."""
        used = {held.setup.area for held in self.held()}
        return [area for area in range(layout.AREAS) if area not in used]

    def name_figures(self, names: Mapping[str, Any]) -> None:
        """Keep what the worker said of its stages: area (JSON: as text) to names."""
        for held in self.held():
            held.figures = [str(name) for name in names.get(str(held.setup.area), ())]

    def own_figures(self, held: Held) -> dict[str, int]:
        """The figures of one stage."""
        return dict(zip(held.figures, self.worker.counters.read_area(self.slot, held.setup.area)[2:], strict=False))

    def statuses(self) -> list[StageStatus]:
        """What becomes of packets, stage by stage."""
        found = []
        for stage, held in zip(self.work.chain, self.stages, strict=True):
            if held is None:
                found.append(StageStatus(stage["processor"], True, 0, 0, {}))
                continue
            into, out, *own = self.worker.counters.read_area(self.slot, held.setup.area)
            figures = dict(zip(held.figures, own, strict=False))
            found.append(StageStatus(stage["processor"], False, into, out, figures, held.id))
        return found

    def by_area(self, area: int) -> tuple[Work, Held] | None:
        """The stage that has this area, and what it is part of."""
        present = (self.work, self.held())
        for work, stages in (present, self.coming or present):
            for held in stages:
                if held.setup.area == area:
                    return work, held
        return None


def _added(now: Mapping[str, tuple[int, int]], before: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    if not before:
        return dict(now)
    found = dict(before)
    for name, (packets, octets) in now.items():
        earlier = found.get(name, (0, 0))
        found[name] = (earlier[0] + packets, earlier[1] + octets)
    return found
