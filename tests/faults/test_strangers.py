"""Links of others, made to look like ours, or put where ours were: they are told of where they are in the way, and
never touched; and ours come back as soon as they can.

What `World` plants around every service is compared bit for bit after each case; the cases here add what is made to
be mistaken. They run beside each other, each in a world of its own.
"""

import json
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.domain import events as ev
from service.domain.values import Mode
from tests.faults.cases import SEED, at_once, folder_of
from tests.faults.counts import count
from tests.faults.outsiders import (
    Beside,
    Repeated,
    beside,
    elsewhere,
    events,
    health,
    ip,
    is_quiet,
    make,
    position,
    run_beside,
    soon,
    status,
    there,
)
from tests.faults.world import World
from tests.kernel.outside import LinuxOutside
from tests.part import part_of

EVERY_SECOND = {"TUNLEDGER_RECONCILE__INTERVAL_S": "1"}

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def others(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    """The cases of this module, under way."""
    yield from run_beside(request, tmp_path_factory)


def token(world: World, name: str) -> str:
    """What the link of an interface bears."""
    return f"tunledger:{world.node}:{world.get(f'/api/v1/interfaces/{name}')['id']}"


def frozen(world: World, *lines: str) -> None:
    """`ip -batch` while the service is stopped, so that it finds all of it done."""
    process = world.service.process
    assert process is not None
    process.send_signal(signal.SIGSTOP)
    try:
        ip(*lines)
    finally:
        process.send_signal(signal.SIGCONT)


def refused_for_the_name(world: World, name: str) -> None:
    """Each kind of create says that somebody else has it."""
    for method, path, body in (
        ("POST", "/api/v1/interfaces", {"name": name}),
        ("PUT", f"/api/v1/interfaces/{name}", {"mode": "tap"}),
        ("POST", "/api/v1/batch", {"commands": [{"create": {"name": "free0"}}, {"create": {"name": name}}]}),
    ):
        heard = world.send(method, path, body)
        assert (heard.status, heard.code) == (409, "name_taken"), f"{heard}: {heard.answer}"
    assert "free0" not in world.host.links()


# -- looking like ours


@beside
def test_a_name_that_others_have_is_refused_whatever_their_alias_says(folder: Path) -> None:
    with World(folder, case="names of others") as world:
        world.start()
        make(world, {"name": "n0"})
        ours = token(world, "n0")
        other = ours.replace(world.node, "0" * 12)
        looks = ["", "tunledger", "tunledger:", ours + " ", " " + ours, ours.upper(), ours[:-1], ours + "0", other]
        looks += [ours.replace(":", ";"), ours.replace("tunledger", "tunledger:tunledger")]
        outside = LinuxOutside()
        for number, alias in enumerate(looks):
            outside.add_link(f"look{number}", Mode.TUN, alias=alias)
        outside.close()
        world.adopt_strangers()
        assert len(world._strangers) >= len(looks)
        for number in range(len(looks)):
            refused_for_the_name(world, f"look{number}")
        assert world.send("POST", "/api/v1/reconcile").answer["adopted"] == ["n0"]
        assert world.send("DELETE", "/api/v1/interfaces/n0").kind == "acknowledged"
        world.assert_holds()
        world.kill()
        world.start()
        assert not events(world, ev.OrphanRemoved)
        world.assert_holds()


@beside
def test_our_token_on_a_link_of_somebody_else_does_not_make_it_ours(folder: Path) -> None:
    """Two bear it: the one under the interface's name is the one, and the other is left alone and told of."""
    with World(folder, case="a copied token", settings=EVERY_SECOND) as world:
        world.start()
        make(world, {"name": "m0", "mtu": 1400}, {"name": "m1", "mtu": 1400})
        index = world.host.links()["m0"].ifindex
        ip("tuntap add dev copy0 mode tun", f"link set copy0 alias {token(world, 'm0')}")
        before = world.host.links()["copy0"]

        def untouched() -> None:
            assert world.host.links()["copy0"].still == before.still

        for body in ({"mtu": 1300}, {"up": False}, {"addresses": ["10.40.0.1/24"]}):
            assert world.send("PATCH", "/api/v1/interfaces/m0", body).kind == "acknowledged"
            untouched()
        ip("link set m0 mtu 1290")
        soon(lambda: world.host.links()["m0"].mtu == 1300, "the repair")
        untouched()
        assert world.host.links()["m0"].ifindex == index
        time.sleep(1.5)
        untouched()
        world.service.kill()
        world.start()
        untouched()
        assert world.host.links()["m0"].ifindex == index
        assert world.send("DELETE", "/api/v1/interfaces/m0").kind == "acknowledged"
        assert "m0" not in world.host.links()
        assert "copy0" in world.host.links(), "it was never ours, and was removed with the one whose token it copied"
        untouched()
        ip("link delete copy0")
        world.assert_holds()


@beside
def test_a_token_of_ours_that_the_log_never_heard_of_is_left_alone_and_told_of(folder: Path) -> None:
    with World(folder, case="an unheard token") as world:
        world.start()
        make(world, {"name": "m0"})
        strange = f"tunledger:{world.node}:0192f0c0-0000-7000-8000-00000000dead"
        ip("tuntap add dev odd0 mode tun", f"link set odd0 alias {strange}")
        before = world.host.links()["odd0"].still
        assert world.send("POST", "/api/v1/reconcile").kind == "acknowledged"
        code, words = health(world)
        assert code == 503
        assert "odd0" in words
        assert world.send("PATCH", "/api/v1/interfaces/m0", {"mtu": 1400}).kind == "acknowledged"
        assert world.host.links()["odd0"].still == before
        ip("link delete odd0")
        assert world.send("POST", "/api/v1/reconcile").kind == "acknowledged"
        world.assert_holds()


# -- where ours were


@beside
def test_a_stranger_under_the_name_of_a_deleted_interface_is_waited_for(folder: Path) -> None:
    with World(folder, case="a stranger takes a name") as world:
        world.start()
        make(world, {"name": "v0", "mtu": 1400}, {"name": "v1"})
        frozen(world, "link delete v0", "tuntap add dev v0 mode tap", "link set v0 mtu 1333")
        world.adopt_strangers()
        soon(lambda: status(world, "v0")["state"] == "degraded", "the trouble")
        world.assert_holds(degraded={"v0"})
        assert "v0" in status(world, "v0")["reason"]
        heard = world.send("PATCH", "/api/v1/interfaces/v0", {"mtu": 1350})
        assert heard.code == "name_taken", heard.answer
        assert world.send("POST", "/api/v1/interfaces/v0/start").kind == "refused"
        world.assert_holds(degraded={"v0"})
        world.kill()
        world.start()
        world.assert_holds(degraded={"v0"})
        since = position(world)
        world.uproot("v0")
        soon(lambda: status(world, "v0")["state"] == "applied", "the repair", 10)
        assert world.host.links()["v0"].mtu == 1400
        soon(lambda: len(events(world, ev.DriftRepaired, since=since, name="v0")) == 1, "one event of it")
        world.assert_holds()


@beside
def test_what_is_deleted_while_a_stranger_has_its_name_leaves_the_stranger(folder: Path) -> None:
    with World(folder, case="delete under a stranger") as world:
        world.start()
        make(world, {"name": "v0"}, {"name": "v1"})
        frozen(
            world, "link delete v0", "tuntap add dev v0 mode tap", "link set v1 name w1", "tuntap add dev v1 mode tun"
        )
        world.adopt_strangers()
        soon(lambda: status(world, "v0")["state"] == status(world, "v1")["state"] == "degraded", "the troubles")
        for name in ("v0", "v1"):
            heard = world.send("DELETE", f"/api/v1/interfaces/{name}")
            assert heard.kind == "acknowledged", heard.answer
        assert "w1" not in world.host.links(), "the renamed link is the interface, whatever its name"
        world.assert_holds()


@beside
def test_an_ifindex_of_ours_that_somebody_else_gets_is_not_ours_any_more(folder: Path) -> None:
    with World(folder, case="an ifindex is reused") as world:
        world.start()
        names = [f"j{n}" for n in range(6)]
        make(world, *({"name": name} for name in names))
        was = {name: world.host.links()[name].ifindex for name in names}
        for turn, name in enumerate(names):
            take = [f"link delete {name}", f"link add other{turn} index {was[name]} type bridge"]
            if turn < 2:
                frozen(world, *take)
            elif turn < 4:  # while it is watched, and a command comes at the same moment
                asked = threading.Thread(target=world.send, args=("PATCH", f"/api/v1/interfaces/{name}", {"mtu": 1400}))
                asked.start()
                ip(*take, force=True)
                asked.join()
            else:  # while it is down
                world.kill()
                ip(*take)
                world.start()
            if f"other{turn}" in world.host.links():
                world._strangers[f"other{turn}"] = world.host.links()[f"other{turn}"]
        assert len({f"other{n}" for n in range(6)} & world.host.links().keys()) >= 4
        soon(lambda: is_quiet(world), "all to be made anew")
        world.assert_holds()
        for name in names:
            assert world.send("DELETE", f"/api/v1/interfaces/{name}").kind == "acknowledged"
        world.assert_holds()


@beside
def test_an_alias_is_put_back_while_it_was_watched_and_the_link_is_a_strangers_otherwise(folder: Path) -> None:
    with World(folder, case="an alias is overwritten") as world:
        world.start()
        make(world, {"name": "b0", "mtu": 1400}, {"name": "b1", "mtu": 1400}, {"name": "b2", "up": False})
        ours, index = token(world, "b0"), world.host.links()["b0"].ifindex
        since = position(world)
        ip("link set b0 alias mine")
        soon(lambda: world.host.links()["b0"].alias == ours, "the alias", 10)
        assert world.host.links()["b0"].ifindex == index
        soon(lambda: len(events(world, ev.DriftRepaired, since=since, name="b0")) == 1, "one event of it")
        # A token of another node says that somebody else claims it: that is not fought.
        world.kill()
        ip("link set b0 alias mine", "link set b1 alias ''")
        world.adopt_strangers()
        world.start()
        world.assert_holds(degraded={"b0", "b1"})
        for name in ("b0", "b1"):
            heard = world.send("PATCH", f"/api/v1/interfaces/{name}", {"mtu": 1300})
            assert heard.code == "name_taken", heard.answer
            assert world.send("DELETE", f"/api/v1/interfaces/{name}").kind == "acknowledged"
        world.assert_holds()
        world.kill()
        world.start()
        world.assert_holds()


@beside
def test_a_token_of_others_on_a_watched_link_of_ours_is_not_overwritten(folder: Path) -> None:
    with World(folder, case="a claimed link") as world:
        world.start()
        make(world, {"name": "b0"})
        ip(f"link set b0 alias tunledger:{'0' * 12}:0192f0c0-0000-7000-8000-00000000dead")
        world.adopt_strangers()
        world.assert_holds(degraded={"b0"})
        world.uproot("b0")
        world.assert_holds()


@beside
def test_a_stranger_under_the_old_name_of_a_renamed_interface_is_waited_for(folder: Path) -> None:
    with World(folder, case="a renamed interface") as world:
        world.start()
        make(world, {"name": "e0", "mtu": 1400, "processing": {"running": True}}, {"name": "e1"})
        index = world.host.links()["e0"].ifindex
        frozen(world, "link set e0 name elsewhere0", "tuntap add dev e0 mode tun", "link set e0 mtu 1333")
        world.adopt_strangers()
        soon(lambda: status(world, "e0")["state"] == "degraded", "the trouble")
        assert world.host.links()["elsewhere0"].ifindex == index
        world.assert_strangers_untouched()
        world.uproot("e0")
        soon(lambda: status(world, "e0")["state"] == "applied", "the repair", 10)
        assert world.host.links()["e0"].ifindex == index
        world.assert_holds()


@beside
def test_two_interfaces_that_swapped_their_names_get_their_own_back(folder: Path) -> None:
    with World(folder, case="swapped names") as world:
        world.start()
        make(world, {"name": "e0", "mtu": 1400}, {"name": "e1"})
        index = {name: world.host.links()[name].ifindex for name in ("e0", "e1")}
        frozen(world, "link set e0 name tmp0", "link set e1 name e0", "link set tmp0 name e1")

        def named() -> dict[str, int]:
            return {name: link.ifindex for name, link in world.host.links().items() if name in index}

        soon(lambda: named() == index, "the names", 20)
        world.assert_holds()


@beside
def test_a_link_that_was_moved_to_another_namespace_stays_as_it_is_there(folder: Path) -> None:
    with World(folder, case="a moved link") as world, elsewhere() as pid:
        world.start()
        make(
            world,
            {"name": "y0", "addresses": ["10.41.0.1/24"], "processing": {"running": True}},
            {"name": "y1", "up": False},
        )
        ip(f"link set y0 netns {pid}", f"link set y1 netns {pid}")
        soon(lambda: {"y0", "y1"} <= world.host.links().keys() and is_quiet(world), "others in their place")
        moved = there(pid)["y0"]
        assert moved["ifalias"] == token(world, "y0")
        assert len(events(world, ev.DriftDetected, name="y0")) == 1
        # One that is up goes down first, and may be looked at before the kernel has said where it went.
        (drift,) = events(world, ev.DriftDetected, name="y1")
        assert "moved to another network namespace" in drift.body.cause  # type: ignore[union-attr]
        assert world.send("PATCH", "/api/v1/interfaces/y0", {"mtu": 1400}).kind == "acknowledged"
        world.assert_holds()
        after = there(pid)["y0"]
        assert {k: v for k, v in after.items() if k != "stats64"} == {k: v for k, v in moved.items() if k != "stats64"}
        assert world.send("DELETE", "/api/v1/interfaces/y0").kind == "acknowledged"
        assert "y0" in there(pid)
        world.assert_holds()


# -- many


def _groups(names: list[str]) -> dict[int, int]:
    """How many links each link group has."""
    told = subprocess.run(["ip", "-json", "-details", "link"], capture_output=True, check=True, timeout=30)
    found: dict[int, int] = {}
    for link in json.loads(told.stdout):
        if link["ifname"] in names:
            group = {"default": 0}.get(link["group"], link["group"])
            found[int(group)] = found.get(int(group), 0) + 1
    return found


@beside
def test_a_hundred_are_deleted_from_among_a_hundred_strangers_in_the_same_groups(folder: Path) -> None:
    with World(folder, case="deletes among strangers") as world:
        world.start()
        ours, theirs = [f"a{n}" for n in range(100)], [f"z{n}" for n in range(100)]
        for start in range(0, 100, 20):  # in turns, so that the ifindexes are mixed
            made = ours[start : start + 20]
            make(world, *({"name": name, "up": n % 2 == 0} for n, name in enumerate(made)))
            ip(*(f"tuntap add dev {name} mode tun" for name in theirs[start : start + 20]))
        ip(*(f"link set {name} group {n % 3 and 42}" for n, name in enumerate([*ours, *theirs])))
        ip(*(f"link set {name} group {2_000_000_000 + n}" for n, name in enumerate(theirs[:20])))
        world.adopt_strangers()
        assert _groups(ours).get(42)
        assert _groups(theirs).get(42)
        world.assert_holds()
        gone = {"commands": [{"delete": {"name": name}} for name in ours[:80]]}
        assert world.send("POST", "/api/v1/batch", gone).kind == "acknowledged"
        assert not set(ours[:80]) & world.host.links().keys()
        world.assert_holds()
        world.stop()  # which removes the rest, all at once
        assert not set(ours) & world.host.links().keys()
        world.assert_strangers_untouched()
        world.start()
        world.assert_holds()


@beside
def test_orphans_are_removed_and_nothing_beside_them(folder: Path) -> None:
    """Removed ones that come back with their token, as after a backup of the host was restored."""
    with World(folder, case="orphans") as world:
        world.start()
        names = [f"o{n}" for n in range(20)]
        make(world, *({"name": name} for name in names))
        tokens = {name: token(world, name) for name in names}
        gone = {"commands": [{"delete": {"name": name}} for name in names]}
        assert world.send("POST", "/api/v1/batch", gone).kind == "acknowledged"
        world.planted |= {each.rpartition(":")[2] for each in tokens.values()}
        outside = LinuxOutside()
        for number, name in enumerate(names):
            outside.add_link(name, Mode.TUN, alias=tokens[name] if number % 2 else f"{tokens[name]}x")
        outside.close()
        world.adopt_strangers()
        assert world.send("POST", "/api/v1/reconcile").kind == "acknowledged"
        assert {str(e.body.name) for e in events(world, ev.OrphanRemoved)} == set(names[1::2])  # type: ignore[union-attr]
        world.assert_holds()


# -- anybody, anything, at any time


class Adversary:
    """Does what comes into its mind to our links and to the space around them. A seed replays it."""

    def __init__(self, world: World, rng: random.Random, pid: int) -> None:
        self.world, self._rng, self._pid = world, rng, pid
        self._number = 0

    def act(self) -> None:
        """One thing."""
        rng, links = self._rng, self.world.host.links()
        ours = sorted(link.name for link in links.values() if self.world._identity(link))
        self._number += 1
        new = f"adv{self._number}"
        if not ours:
            return
        one = rng.choice(ours)
        todo: dict[str, list[str]] = {
            "down": [f"link set {one} down"],
            "mtu": [f"link set {one} mtu {rng.randrange(1280, 1500)}"],
            "queue": [f"link set {one} txqueuelen {rng.randrange(1, 900)}"],
            "address": [f"address add 10.99.{rng.randrange(256)}.1/24 dev {one}"],
            "flush": [f"address flush dev {one}"],
            "group": [f"link set {one} group {rng.choice((0, 7, 77))}"],
            "rename": [f"link set {one} name {new}"],
            "delete": [f"link delete {one}"],
            "alias": [f"link set {one} alias mine"],
            "move": [f"link set {one} name {new}", f"link set {new} netns {self._pid}"],
            "replace": [f"link delete {one}", f"tuntap add dev {one} mode {rng.choice(('tun', 'tap'))}"],
            "reuse": [f"link delete {one}", f"link add {new} index {links[one].ifindex} type bridge"],
            "usurp": [f"link set {one} name {new}", f"tuntap add dev {one} mode tap"],
            "decoy": [f"tuntap add dev {new} mode tun", f"link set {new} alias {links[one].alias}x"],
        }
        ip(*todo[rng.choice(sorted(todo))], force=True)  # the link may be gone by now


def _rampage(folder: Path, seed: str, last_s: float) -> None:
    """Commands of two clients, kills, and an adversary, all at once; then peace, in which all must come right."""
    rng = random.Random(seed)
    with World(folder, case=f"an adversary, seed {seed}", settings=EVERY_SECOND) as world, elsewhere() as pid:
        world.start()
        names = [f"u{n}" for n in range(12)]
        make(world, *({"name": name, "addresses": [f"10.50.{n}.1/24"]} for n, name in enumerate(names[:6])))
        adversary = Adversary(world, random.Random(f"{seed} adversary"), pid)

        def client(own: random.Random, mine: list[str]) -> None:
            name = own.choice(mine)
            path, key = f"/api/v1/interfaces/{name}", f"{own.getrandbits(64):x}"
            number = names.index(name)
            match own.randrange(6):
                case 0:
                    world.send("POST", "/api/v1/interfaces", {"name": name, "up": own.random() < 0.8}, key=key)
                case 1:
                    world.send("DELETE", path, key=key)
                case 2:
                    world.send("POST", f"{path}/{own.choice(('start', 'stop'))}", key=key)
                case 3:
                    body = {"mtu": own.randrange(1280, 1500), "addresses": [f"10.50.{number}.{own.randrange(1, 9)}/24"]}
                    world.send("PUT", path, body, key=key)
                case 4:
                    batch = [
                        {"change": {"name": each, "patch": {"mtu": own.randrange(1280, 1500)}}} for each in mine[:3]
                    ]
                    world.send("POST", "/api/v1/batch", {"commands": batch}, key=key)
                case _:
                    world.send("PATCH", path, {"txqueuelen": own.randrange(1, 999)}, key=key)

        first, second = random.Random(f"{seed} first"), random.Random(f"{seed} second")
        end = time.monotonic() + last_s
        with (
            Repeated(adversary.act, 0.05) as acts,
            Repeated(lambda: client(first, names[::2]), 0.02),
            Repeated(lambda: client(second, names[1::2]), 0.02),
        ):
            while time.monotonic() < end:
                time.sleep(rng.uniform(1.0, 4.0))
                if rng.random() < 0.4:
                    world.service.kill()
                    world.service.start()
        count("things an adversary did", acts.times)
        # What is left in the way is somebody's: it goes, and all must come right.
        declared = {each["spec"]["name"] for each in world._listed()}
        ids = {world._identity(link) for link in world.host.links().values()}
        mine = [
            link.name for link in world.host.links().values() if link.name in declared and not world._identity(link)
        ]
        assert ids
        ip(*(f"link delete {name}" for name in mine), force=True)
        world.adopt_strangers()
        for heard in [each for each in world.sent if each.kind == "unknown"]:
            world.send(heard.method, heard.path, heard.body, key=heard.key)
        # Those that were fought over are mended when somebody asks, and say so until it has been quiet.
        assert world.send("POST", "/api/v1/reconcile").kind == "acknowledged"
        soon(lambda: not world.get("/api/v1/drift")["drift"], "peace", 30)
        world.service.kill()
        world.start()
        world.assert_holds()


@beside
def test_whatever_an_adversary_does_nothing_of_others_is_touched_and_all_comes_right(folder: Path) -> None:
    _rampage(folder, str(SEED), 12.0)


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_whatever_adversaries_do_for_long_nothing_of_others_is_touched(tmp_path: Path) -> None:
    cases = part_of(f"{SEED}-{n}" for n in range(24))
    at_once(lambda case: _rampage(tmp_path / folder_of(case), case, 60.0), cases)
