"""What the cases share: dry runs that enumerate every place, a pool that runs cases, and what is asked after each.

A place is (scenario, point, time): the time-th time that a scenario reaches a point. A case is a place and an order in
words, "SCENARIO: kill@POINT#TIME". What is broken where is for the tests to say.
"""

import os
import random
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.scenarios import BY_NAME, Scenario
from tests.faults.world import World

SEED = int(os.environ.get("TUNLEDGER_TEST_SEED", "1"))
AT_ONCE = 2 * (os.cpu_count() or 1)  # a case waits for as long as it works


def at_once(work: Callable[[str], None], cases: Iterable[str]) -> None:
    """Run all cases, several at a time, each in a thread and so in a namespace of its own; then tell what failed."""

    def run(case: str) -> str | None:
        try:
            work(case)
        except Exception as error:  # noqa: BLE001  # one failing case must not hide the others
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"{case}: {where.name}:{where.lineno}: {error if str(error) else repr(error)}"
        return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        failed = [told for told in pool.map(run, cases) if told is not None]
    if failed:
        briefly = "\n".join(told.partition("\n")[0][:300] for told in failed)
        pytest.fail(f"{len(failed)} cases failed:\n{briefly}\n\n" + "\n\n-----\n\n".join(failed[:3]), pytrace=False)


def folder_of(case: str) -> str:
    """A name for a case's folder that goes into a database's URL."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", case)


class Traces:
    """What each scenario reaches when nothing is broken: the names in order."""

    def __init__(self, folder: Path) -> None:
        self.reached: dict[str, list[str]] = {}

        def trace(name: str) -> None:
            scenario, path = BY_NAME[name], folder / f"{name}.trace"
            with scenario.world(folder / name, f"the dry run of {name}") as world:
                scenario.run(world, f"trace:{path}", strict=True)
                self.reached[name] = path.read_text().split()
                world.start()
                world.assert_holds()

        at_once(trace, BY_NAME)

    def places(self, wanted: Callable[[str], bool] = lambda _name: True) -> list[tuple[str, str, int]]:
        """(scenario, point, time) of every time that a wanted point was reached."""
        return [
            (scenario, point, time)
            for scenario, trace in self.reached.items()
            for point, times in Counter(filter(wanted, trace)).items()
            for time in range(1, times + 1)
        ]

    def chosen(self, wanted: Callable[[str], bool] = lambda _name: True) -> list[tuple[str, str, int]]:
        """One place for each wanted name, chosen by the seed."""
        by_name: dict[str, list[tuple[str, str, int]]] = {}
        for place in self.places(wanted):
            if comes_surely(*place[:2]):
                by_name.setdefault(place[1], []).append(place)
        return [random.Random(f"{SEED} {name}").choice(by_name[name]) for name in sorted(by_name)]


def comes_surely(scenario: str, point: str) -> bool:
    """Whether a life reaches a point in every run. The loop is woken by the kernel's news: only what waits for it to
    act lives long enough.
    """
    return point != "loop.woken" or scenario in ("drifts", "deadline")


def parts(case: str) -> tuple[Scenario, str]:
    """The scenario and the order of a case."""
    scenario, _, order = case.partition(": ")
    return BY_NAME[scenario], order


def retry_unknown(world: World) -> None:
    """As a client does that lost an answer: the same again, under the same key."""
    for heard in [each for each in world.sent if each.kind == "unknown" and each.key is not None]:
        world.send(heard.method, heard.path, heard.body, key=heard.key)


def holds_and_works(world: World) -> None:
    """All that must hold; and a command is taken afterwards as if nothing had been."""
    retry_unknown(world)
    world.assert_holds()
    last = world.send("PUT", "/api/v1/interfaces/last0", {"mtu": 1400})
    assert last.kind == "acknowledged", f"{world.case}: {last}: {last.answer}"
    world.assert_holds()
