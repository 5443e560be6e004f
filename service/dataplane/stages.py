"""The stages of one device in a worker: made, kept over a change, given their packets, taken apart.

A stage is a processor's object with its place in shared memory. Nothing here reads or writes a device: `device` does.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from service.dataplane.blackbox import AREA, BlackBox
from service.dataplane.contract import Mode, Output, Processor
from service.dataplane.registry import Registry, UnknownProcessorError
from service.dataplane.work import Setup, StageSetup, options

if TYPE_CHECKING:
    from service.dataplane.device_batch import DeviceBatch


_OURS: Final = "service.dataplane.processors."


class RefusedError(Exception):
    """A stage that cannot be: its processor is not there or does not like its options. For people."""


class Place(Protocol):
    """What a device is to its stages."""

    @property
    def name(self) -> str: ...
    @property
    def mode(self) -> Mode: ...
    def output(self, name: str) -> Output:
        """The interface of that name, there or not."""
        ...

    def clear_area(self, area: int) -> int:
        """Zero the figures of a stage that is about to begin; return its first word."""
        ...

    def poke(self) -> None:
        """Have the service look at the worker."""
        ...


class StageContext:
    """A stage's `contract.Context`. `poke` has the service look at the worker's stages soon."""

    __slots__ = ("_at", "_figures", "_words", "files", "interface", "mode", "mtu", "output", "poke")

    def __init__(self, place: Place, mtu: int, words: memoryview, at: int, figures: Sequence[str]) -> None:
        self.interface: str = place.name
        self.mode: Mode = place.mode
        self.mtu: int = mtu
        self.output: Callable[[str], Output] = place.output
        self.poke: Callable[[], None] = place.poke
        self.files: Sequence[int] = ()
        self._words = words
        self._at = at
        self._figures: Final = {name: at + 2 + index for index, name in enumerate(figures)}

    def count(self, figure: str, increment: int = 1) -> None:
        """See `contract.Context.count`. Raises KeyError for a name that the processor did not announce."""
        self._words[self._figures[figure]] += increment


class Stage:
    """A processor at work. `at` is the word with its packets in; the one behind it has those that went on."""

    __slots__ = ("area", "at", "context", "cuts", "place", "process", "processor", "spec", "ticks")

    def __init__(self, setup: StageSetup, processor: Processor, context: StageContext, at: int) -> None:
        self.area: Final = setup.area
        self.place: Final = setup.place
        self.spec: Final = setup.spec
        self.processor: Final = processor
        self.context: Final = context
        self.at: Final = at
        self.process: Final = processor.process
        self.cuts: Final = not type(processor).takes_segments
        """Whether segments have to be cut for it."""
        self.ticks: Final = type(processor).tick is not Processor.tick


class Chain:
    """A device's stages, in the two orders in which packets meet them."""

    def __init__(self, stages: Sequence[Stage] = ()) -> None:
        self.stages: Final = tuple(stages)
        self.from_kernel: Final = tuple(s for s in stages if "from_kernel" in s.processor.directions)
        self.to_kernel: Final = tuple(s for s in reversed(stages) if "to_kernel" in s.processor.directions)
        self.ticking: Final = tuple(s for s in stages if s.ticks)
        self.foreign: Final = any(not type(s.processor).__module__.startswith(_OURS) for s in stages)
        """Whether other packages' processors are among them: they may release the views that they are given."""

    def by_area(self, area: int) -> Stage | None:
        """The stage with this area."""
        return next((stage for stage in self.stages if stage.area == area), None)


def build(
    setup: Setup,
    old: Chain,
    place: Place,
    *,
    registry: Registry,
    words: memoryview,
    box: BlackBox,
    files: Sequence[int],
) -> Chain:
    """Make the chain that `setup` says; stages that it has in common with `old` are kept as they are.

    `files` are the new stages', in order, and theirs from here on. Nothing of `old` is closed: see `close`.

    Raises:
        RefusedError: a stage cannot be made; the new ones are gone again, their files closed.
    """
    left = list(files)
    made: list[Stage] = []
    stages: list[Stage] = []
    try:
        for each in setup.stages:
            kept = old.by_area(each.area)
            if kept is not None:
                kept.context.mtu = setup.mtu
                stages.append(kept)
                continue
            own, left = left[: each.files], left[each.files :]
            stage = _make(each, setup.mtu, place, registry, words, box, own)
            made.append(stage)
            stages.append(stage)
    except RefusedError:
        close(made, box)
        for fd in left:
            os.close(fd)
        raise
    return Chain(stages)


def _make(
    setup: StageSetup,
    mtu: int,
    place: Place,
    registry: Registry,
    words: memoryview,
    box: BlackBox,
    files: Sequence[int],
) -> Stage:
    processor = str(setup.spec["processor"])
    box.words[AREA] = setup.area + 1
    try:
        found = registry.find(processor)
        context = StageContext(place, mtu, words, place.clear_area(setup.area), found.figures)
        context.files = tuple(files)
        made = found(options(setup.spec), context)
    except UnknownProcessorError as error:
        _close_files(files)
        raise RefusedError(str(error)) from error
    except Exception as error:  # of a processor that is perhaps not ours; nothing has begun yet
        _close_files(files)
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise RefusedError(f"{processor}: {said}") from error
    finally:
        box.words[AREA] = 0
    return Stage(setup, made, context, context._at)  # the two are one


def close(stages: Sequence[Stage], box: BlackBox) -> None:
    """Close stages that are no longer in a chain, and their files."""
    for stage in stages:
        box.words[AREA] = stage.area + 1
        stage.processor.close()
        box.words[AREA] = 0
        _close_files(stage.context.files)


def _close_files(files: Sequence[int]) -> None:
    for fd in files:
        os.close(fd)


def feed(stage: Stage, fd: int) -> bool:
    """Hand one more file to a stage, which owns it then; return False if it takes none."""
    take: Callable[[int], None] | None = getattr(stage.processor, "take_file", None)
    if take is None:
        return False
    take(fd)
    return True


def run(stages: Sequence[Stage], batch: "DeviceBatch", words: memoryview, box: memoryview) -> None:
    """Hand `batch` through `stages`; what is left in it afterwards came out of the last.

    Raises what a processor raises, with its area left in the black box.
    """
    for stage in stages:
        box[AREA] = stage.area + 1
        at = stage.at
        words[at] += len(batch.packets)
        batch.at = 0
        if stage.cuts and batch.headers is not None:
            batch.make_plain()
        stage.process(batch)
        left = len(batch.packets)
        if not left:
            break
        words[at + 1] += left
    box[AREA] = 0


def figure_names(chain: Chain) -> Mapping[int, Sequence[str]]:
    """The names of each stage's figures, by its area."""
    return {stage.area: tuple(cast("Any", stage.processor).figures) for stage in chain.stages}
