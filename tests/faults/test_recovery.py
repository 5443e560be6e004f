"""Crashes during recovery, three deep: what brings the host back may be cut off as often as it likes.

A life is cut short at one point. Each of the next three starts is killed too: at a point of its own start-up, or as
soon as it is up. The fourth has to find everything, and to finish what all the others left.
"""

import random
import signal
from pathlib import Path

import pytest

from service.domain import events as ev
from tests.faults.cases import AT_ONCE, SEED, Traces, at_once, folder_of, holds_and_works, parts
from tests.faults.counts import count
from tests.faults.scenarios import VARIABLE
from tests.faults.world import World
from tests.part import part_of

DEPTH = 3


def crash_again_and_again(folder: Path, case: str, longest: int) -> None:
    """A kill in a life, then one in each of the next starts, then one that is left alone."""
    rng = random.Random(case)
    scenario, order = parts(case)
    with scenario.world(folder, case) as world:
        scenario.run(world, order)
        world.assert_dead_is_sound()
        killed = []
        for _ in range(DEPTH):
            number = rng.randrange(1, longest)
            up = world.try_start(**{VARIABLE: f"kill:{number}"})
            killed.append(f"kill:{number}")
            world.case = f"{case}, then {', '.join(killed)}"
            if up and world.alive():
                world.service.kill()
            assert world.wait_dead() == -signal.SIGKILL, world.case
            world.assert_dead_is_sound()
        world.start()
        holds_and_works(world)
        assert_next_start_finds_nothing(world)


def assert_next_start_finds_nothing(world: World) -> None:
    """A start after a crash of a settled service records itself, has packets read again, and does nothing else."""
    before = world.query("SELECT max(position) FROM events")[0][0]
    world.kill()
    world.start()
    world.assert_holds()
    # The world asks again: once to reconcile, and what it asked under a key, where a refusal is recorded anew.
    found = [event.body for event in world.service.events() if event.position > before]
    again = [
        body
        for body in found
        if isinstance(body, ev.ReconcileRequested | ev.CommandRejected) and body.request.reason == "again"
    ]
    own = [type(body) for body in found if body not in again and not _reads_again(body)]
    assert own == [ev.ServiceStarted, ev.StartupReconciled], f"{world.case}: the next start found {found}"
    assert sum(isinstance(body, ev.ReconcileRequested) for body in again) == 1, f"{world.case}: {again}"


def _reads_again(body: ev.Event) -> bool:
    """Whether it tells of nothing but a reader that a device had before the crash and has again."""
    match body:
        case ev.DriftDetected():
            return all(".processing" in each["path"] for each in body.differences)
        case ev.DriftRepaired():
            return all(step.startswith("# start processing on ") for step in body.steps)
        case _:
            return False


def cases_of(traces: Traces, rng: random.Random, number: int) -> list[str]:
    """Places to begin with: half of them anywhere, half in what is recovery already."""
    anywhere = traces.places()
    recovering = [place for place in anywhere if place[0] == "recovery"]
    places = rng.sample(anywhere, number // 2) + rng.sample(recovering, number - number // 2)
    return [f"{scenario}: kill@{point}#{time}" for scenario, point, time in places]


def recovery_points(traces: Traces) -> int:
    """How many points a recovery reaches until it is done."""
    return traces.reached["recovery"].index("app.ready") + 2


@pytest.mark.timeout(300)
def test_three_crashes_during_recovery_lose_nothing_and_leave_nothing(traces: Traces, tmp_path: Path) -> None:
    cases = cases_of(traces, random.Random(SEED), 5 * AT_ONCE // 2)
    count("recoveries cut off three times", len(cases))
    longest = recovery_points(traces)
    at_once(lambda case: crash_again_and_again(tmp_path / folder_of(case), case, longest), cases)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_three_crashes_during_any_recovery_lose_nothing(traces: Traces, tmp_path: Path) -> None:
    most = 2 * min(400, len([p for p in traces.places() if p[0] == "recovery"]))
    cases = part_of(cases_of(traces, random.Random(SEED), most))
    count("recoveries cut off three times, whole", len(cases))
    longest = recovery_points(traces)
    at_once(lambda case: crash_again_and_again(tmp_path / folder_of(case), case, longest), cases)


def test_a_recovery_has_something_to_do(traces: Traces) -> None:
    """Or else nothing above shows anything."""
    trace = traces.reached["recovery"]
    before = trace[: trace.index("app.ready")]
    assert {"kernel.DeleteLink.before", "kernel.CreateLink.before", "store.answer.close"} <= set(before)
