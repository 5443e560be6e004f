"""Random lives: commands, drift, strangers, crashes and stops in any order, and after each crash everything must hold.

A run follows from its seed as far as the machine's timing lets it, and a failure names the seed and every step:
`TUNLEDGER_TEST_SEED=17 tests/run tests/faults/test_random.py` runs that one again.
"""

import http.client
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cases import at_once, retry_unknown
from tests.faults.counts import count
from tests.faults.scenarios import KEEP, VARIABLE
from tests.faults.world import World
from tests.kernel.outside import LinuxOutside
from tests.part import share

GIVEN = os.environ.get("TUNLEDGER_TEST_SEED")
NAMES = tuple(f"r{n}" for n in range(6))
CLIENTS = 4
MTUS = (1280, 1400, 1500, 9000)


class Run:
    """One random life in one world. `journal` is what was done, for the failure's message."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng, self.journal = world, random.Random(seed), list[str]()
        self.outside: LinuxOutside | None = None
        self.squatted: set[str] = set()
        # A change cannot be taken back while a stranger has the name; so a run has either deadlines or squatters.
        self.squats = self.rng.random() < 0.5
        self.keys = 0

    # -- commands

    def spec(self, name: str) -> dict[str, Any]:
        """A spec, sometimes with every field, sometimes with none."""
        number, rng = NAMES.index(name), self.rng
        addresses = [f"10.{20 + number}.0.1/24", f"fd00:{20 + number}::1/64", f"10.{30 + number}.0.1/16"]
        spec: dict[str, Any] = {"mtu": rng.choice(MTUS), "addresses": rng.sample(addresses, rng.randrange(3))}
        if rng.random() < 0.3:
            spec |= {"up": rng.random() < 0.5, "txqueuelen": rng.choice((10, 1000))}
        if rng.random() < 0.3:
            spec["processing"] = {"running": rng.random() < 0.7}
        if rng.random() < 0.2:
            spec |= {"mode": "tap", "mac": f"02:00:00:00:00:{rng.randrange(1, 255):02x}"}
            spec["mtu"] = min(spec["mtu"], 9000)
        if rng.random() < 0.2:
            spec |= {"labels": {"lab": rng.choice("ab")}, "description": rng.choice(("", "ß"))}
        return spec

    def request(self) -> tuple[str, str, Any, str | None]:
        """Any command on any name: (method, path, body, key)."""
        rng = self.rng
        name = rng.choice(NAMES)
        key = None
        if rng.random() < 0.4:
            self.keys += 1
            key = f"key-{self.keys}"
        confirm = "?confirm_within_s=1" if rng.random() < 0.1 and not self.squats else ""
        path = f"/api/v1/interfaces/{name}"
        match rng.randrange(8):
            case 0 | 1:
                return "POST", "/api/v1/interfaces", {"name": name, **self.spec(name)}, key
            case 2:
                return "PUT", path + "?recreate=true", self.spec(name), key
            case 3 | 4:
                spec = self.spec(name)
                field = rng.choice([field for field in spec if field not in ("mode", "mac")])
                return "PATCH", path + confirm, {field: spec[field]}, key
            case 5:
                return "POST", f"{path}/{rng.choice(('start', 'stop'))}", None, key
            case 6:
                return "DELETE", path + confirm, None, key
            case _:
                chosen = rng.sample(NAMES, rng.randrange(2, 4))
                verbs = [rng.choice(("create", "change", "delete")) for _ in chosen]
                commands = [
                    {verb: {"name": each, **self.spec(each)}}
                    if verb == "create"
                    else {verb: {"name": each, "patch": {"mtu": rng.choice(MTUS)}}}
                    if verb == "change"
                    else {verb: {"name": each}}
                    for verb, each in zip(verbs, chosen, strict=True)
                ]
                return "POST", "/api/v1/batch", {"commands": commands}, key

    def command(self) -> None:
        """One command, and sometimes the same again."""
        method, path, body, key = self.request()
        again = 2 if key is not None and self.rng.random() < 0.3 else 1
        for _ in range(again):
            self.journal.append(str(self.world.send(method, path, body, key=key)))

    def burst(self) -> None:
        """Several clients at once."""
        requests = [self.request() for _ in range(2 * CLIENTS)]

        def client(number: int) -> None:
            for method, path, body, key in requests[number::CLIENTS]:
                self.journal.append(str(self.world.send(method, path, body, key=key)))

        threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    # -- what others do

    def drift(self) -> None:
        """Somebody changes a link of ours."""
        links = [link for link in self.world.ours().values() if link.name in NAMES]
        if not links:
            return
        link, rng = self.rng.choice(sorted(links, key=lambda each: each.name)), self.rng
        assert self.outside is not None
        acts: dict[str, Callable[[], None]] = {
            "delete": lambda: self.out.delete(link.name),
            "mtu": lambda: self.out.set_mtu(link.name, 1290),
            "txqueuelen": lambda: self.out.set_txqueuelen(link.name, 7),
            "down": lambda: self.out.set_up(link.name, up=False),
            "rename": lambda: self.out.rename(link.name, f"x{rng.randrange(1000)}"),
        }
        what = rng.choice(sorted(acts))
        self.journal.append(f"outside: {what} {link.name}")
        try:
            acts[what]()
        except OSError as error:
            self.journal.append(f"outside: {error}")  # gone, or in use

    def traffic(self) -> None:
        """Packets for an interface of ours, and a look at what was counted."""
        for link in self.world.ours().values():
            if link.up and any("." in address for address in link.addresses):
                try:
                    self.world.traffic(link.name, packets=20)
                    self.world.note_counters()
                    self.journal.append(f"traffic on {link.name}")
                except (OSError, http.client.HTTPException):
                    return  # down, or gone by now; or the service is

    def squat(self) -> None:
        """Somebody takes a name that is free on the host, though one of ours may be declared under it."""
        free = [name for name in NAMES if name not in self.world.host.links()]
        if free and self.squats and len(self.squatted) < 2:
            name = self.rng.choice(free)
            try:
                self.world.plant(name)
            except OSError:
                return  # the service was faster
            self.squatted.add(name)
            self.journal.append(f"outside: a stranger is {name}")

    def leave(self) -> None:
        """A stranger goes."""
        if self.squatted:
            name = self.rng.choice(sorted(self.squatted))
            self.squatted.remove(name)
            self.world.uproot(name)
            self.journal.append(f"outside: the stranger {name} is gone")

    @property
    def out(self) -> LinuxOutside:
        """The hands of the others."""
        assert self.outside is not None
        return self.outside

    # -- ends

    def look(self) -> None:
        """Everything must hold now."""
        self.journal.append("look")
        retry_unknown(self.world)
        # Failed repairs are tried again ever more seldom; whoever asks gets one at once.
        self.world.send("POST", "/api/v1/reconcile")
        declared = {each["spec"]["name"] for each in self.world.get("/api/v1/interfaces")["interfaces"]}
        self.world.assert_holds(degraded=self.squatted & declared)

    def end(self) -> None:
        """The service ends in one of three ways: killed, stopped, or at the point that it was armed for."""
        if not self.world.alive():
            self.journal.append("died at its point")
        elif self.rng.random() < 0.5:
            self.journal.append("kill -9")
            self.world.kill()
        else:
            self.journal.append("stop")
            assert self.world.service.process is not None
            self.world.service.process.send_signal(signal.SIGTERM)
        status = self.world.wait_dead()
        assert status in {0, -signal.SIGKILL}, f"it ended with {status}"
        self.world.assert_dead_is_sound()

    def live(self, epochs: int, steps: int) -> None:
        """So many starts, with so many steps in each."""
        rng = self.rng
        self.outside = LinuxOutside()
        try:
            for _ in range(epochs):
                order = f"kill:{rng.randrange(1, 600)}" if rng.random() < 0.6 else ""
                self.journal.append(f"start {order}")
                if self.world.try_start(**{VARIABLE: order}):
                    for _ in range(steps):
                        acts = (self.command, self.burst, self.drift, self.traffic, self.squat, self.leave)
                        rng.choices(acts, (10, 2, 4, 2, 1, 2))[0]()
                        if not self.world.alive():
                            break
                self.end()
                if rng.random() < 0.5:
                    self.drift()
                self.journal.append("start")
                self.world.start()
                self.look()
                self.world.kill()
        finally:
            self.outside.close()


def run(folder: Path, seed: int, *, epochs: int, steps: int) -> None:
    """One run; its failure names the seed and the steps."""
    settings = KEEP | {"TUNLEDGER_RECONCILE__INTERVAL_S": "1"}
    with World(folder, case=f"TUNLEDGER_TEST_SEED={seed}", settings=settings) as world:
        life = Run(world, seed)
        try:
            life.live(epochs, steps)
        except Exception as error:
            told = "\n".join(life.journal)
            raise AssertionError(f"TUNLEDGER_TEST_SEED={seed}: {error}\n\nsteps:\n{told}") from error
        count("random steps", len(life.journal))


def seeds(number: int, first: int) -> list[str]:
    """The one that is asked for, or so many."""
    return [GIVEN] if GIVEN is not None else [str(first + n) for n in range(number)]


@pytest.mark.timeout(300)
def test_whatever_happens_in_whatever_order_everything_holds(tmp_path: Path) -> None:
    at_once(lambda seed: run(tmp_path / seed, int(seed), epochs=3, steps=12), seeds(8, 1))


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_long_random_lives_hold(tmp_path: Path) -> None:
    first = random.SystemRandom().randrange(10**6) * 1000
    print(f"seeds from {first} on")
    at_once(lambda seed: run(tmp_path / seed, int(seed), epochs=12, steps=30), seeds(share(60), first))
