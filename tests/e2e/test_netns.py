"""Interfaces in network namespaces that others make and remove, with the real service."""

from collections.abc import Iterator
from typing import Any

import pytest

from service.domain import events as ev
from tests.e2e.harness import Service, eventually, links
from tests.netns import Named, named

PATH = "/api/v1/interfaces"


@pytest.fixture
def blue(service: Service) -> Iterator[Named]:
    with named() as one:
        yield one
        service.close()


def create(service: Service, blue: Named, name: str = "tun0", **fields: Any) -> None:
    body = {"name": name, "netns": blue.name, "addresses": ["10.7.0.1/24"], **fields}
    status, answer = service.call("POST", PATH, body)
    assert status == 201, answer


def interface(service: Service, name: str = "tun0") -> Any:
    return service.ok("GET", f"{PATH}/{name}")


def of(service: Service, *kinds: type[Any]) -> list[Any]:
    return [event.body for event in service.events() if isinstance(event.body, kinds)]


def is_up(blue: Named, name: str = "tun0") -> bool:
    link = blue.links().get(name)
    return link is not None and "UP" in link["flags"]


def test_an_interface_lives_in_a_namespace_and_comes_back_when_it_is_deleted_there(
    service: Service, blue: Named
) -> None:
    service.start()
    create(service, blue, mtu=1400, processing={"running": True})
    link = blue.links()["tun0"]
    assert (link["mtu"], [a["local"] for a in link["addr_info"] if a["family"] == "inet"]) == (1400, ["10.7.0.1"])
    assert "tun0" not in links()
    assert is_up(blue)
    eventually(lambda: blue.links()["tun0"]["operstate"] == "UP", what="a reader")
    blue.ip("link", "del", "tun0")
    eventually(lambda: is_up(blue) and blue.links()["tun0"]["ifindex"] != link["ifindex"], 5, "the repair")
    eventually(lambda: blue.links()["tun0"]["operstate"] == "UP", what="a reader of the new one")
    blue.ip("link", "set", "tun0", "mtu", "1300")
    eventually(lambda: blue.links()["tun0"]["mtu"] == 1400, 5, "the repair of the mtu")
    steps = of(service, ev.DriftRepaired)[-1].steps
    assert steps == [f"ip -n {blue.name} link set tun0 mtu 1400"]
    status, _ = service.call("DELETE", f"{PATH}/tun0")
    assert status in {200, 204}
    assert "tun0" not in blue.links()


@pytest.mark.parametrize("drift", ["repair", "report"])
def test_a_namespace_that_is_deleted_dies_and_the_interface_comes_back_with_it(
    service: Service, blue: Named, drift: str
) -> None:
    service.start()
    create(service, blue, processing={"running": True}, drift=drift)
    create(service, blue, "tun1", addresses=[])
    blue.observe_death()
    blue.delete()
    eventually(blue.is_dead, 5, "the end of the namespace")
    eventually(lambda: interface(service, "tun1")["status"]["state"] == "degraded", 5, "degraded")
    reason = interface(service, "tun1")["status"]
    assert f"netns {blue.name} does not exist; `ip netns add {blue.name}` makes it" in str(reason)
    assert interface(service)["status"]["state"] == "degraded"
    assert service.call("GET", "/health")[0] == 200
    causes = {drift.cause for drift in of(service, ev.DriftDetected)}
    assert causes == {f"netns {blue.name} went away"}
    eventually(lambda: blue.name in interface(service)["status"]["reason"], 5, "why")
    words = interface(service)["status"]["reason"]
    for path in ("flows", "packets", "tail", "capture/stream"):
        status, problem = service.call("GET", f"{PATH}/tun0/{path}")
        assert (status, problem["code"], problem["retry"]) == (409, "not_running", True)
        assert problem["detail"] == f"tun0: nobody reads its packets, although its processing is on: {words}"
    assert service.ok("GET", f"{PATH}/tun0/processing")["reason"] == words
    status, problem = service.call("POST", f"{PATH}/tun0/start")
    assert (status, problem["detail"]) == (
        409,
        f"packet processing on tun0 is on already, but tun0 is degraded: {words}",
    )
    assert interface(service)["status"]["observed"] is None
    status, answer = service.call("PATCH", f"{PATH}/tun1", {"mtu": 1300}, headers={"Idempotency-Key": "meanwhile"})
    assert (status, answer["spec"]["mtu"], answer["status"]["state"]) == (200, 1300, "degraded")
    assert f"netns {blue.name} does not exist" in answer["status"]["reason"]
    blue.add()
    eventually(lambda: is_up(blue, "tun1"), 5, "tun1 again")
    assert interface(service, "tun1")["status"]["observed"]["netns"] == blue.name
    assert blue.links()["tun1"]["mtu"] == 1300
    if drift == "repair":
        eventually(lambda: is_up(blue), 5, "tun0 again")
        eventually(lambda: interface(service)["status"]["state"] == "applied", 5, "applied")
    else:
        assert "tun0" not in blue.links(), "it is only reported"


def test_after_a_restart_what_is_in_a_namespace_is_adopted_and_orphans_go_and_strangers_stay(
    service: Service, blue: Named
) -> None:
    service.start()
    create(service, blue)
    create(service, blue, "tun1", addresses=[])
    before = blue.links()["tun0"]["ifindex"]
    token = blue.links()["tun1"]["ifalias"]
    assert service.call("DELETE", f"{PATH}/tun1")[0] in {200, 204}
    service.kill()
    blue.ip("tuntap", "add", "left0", "mode", "tun")
    blue.ip("link", "set", "left0", "alias", token)
    blue.ip("tuntap", "add", "theirs0", "mode", "tun")
    service.start()
    assert blue.links()["tun0"]["ifindex"] == before
    assert "left0" not in blue.links()
    assert "theirs0" in blue.links()
    assert of(service, ev.StartupReconciled)[-1].adopted == ["tun0"]
    assert of(service, ev.StartupReconciled)[-1].orphans_removed == [f"{blue.name}/left0"]


def test_another_namespace_needs_recreate_and_moves_nothing_by_half(service: Service, blue: Named) -> None:
    service.start()
    with named() as red:
        create(service, blue, processing={"running": True})
        status, problem = service.call("PATCH", f"{PATH}/tun0", {"netns": red.name})
        assert (status, problem["code"], problem["pointer"]) == (409, "needs_recreate", "/netns")
        status, answer = service.call("PATCH", f"{PATH}/tun0?recreate=true", {"netns": red.name})
        assert status == 200, answer
        assert "tun0" not in blue.links()
        assert is_up(red)
        status, answer = service.call("PATCH", f"{PATH}/tun0?recreate=true", {"netns": None})
        assert status == 200, answer
        assert "tun0" not in red.links()
        assert links()["tun0"].up
        status, problem = service.call("PATCH", f"{PATH}/tun0?recreate=true", {"netns": "nowhere"})
        assert (status, problem["code"], problem["pointer"]) == (409, "netns_missing", "/netns")
        assert links()["tun0"].up


def test_a_link_that_is_moved_elsewhere_is_made_again_and_stays_as_it_is_there(service: Service, blue: Named) -> None:
    service.start()
    with named() as red:
        create(service, blue, up=False, addresses=[])  # else these go first, and may be looked for before it has gone
        before = blue.links()["tun0"]["ifindex"]
        blue.ip("link", "set", "tun0", "netns", red.name)
        moved = red.links()["tun0"]
        eventually(lambda: blue.links().get("tun0", moved)["ifindex"] != before, 5, "another in its place")
        assert of(service, ev.DriftDetected)[-1].cause.startswith("moved to another network namespace")
        service.kill()
        service.start()
        assert red.links()["tun0"] == moved
        assert service.call("DELETE", f"{PATH}/tun0")[0] in {200, 204}
        assert red.links()["tun0"] == moved
        assert "tun0" not in blue.links()
        service.kill()
        service.start()
        assert "tun0" not in red.links(), "nothing declares it any more"


def test_addresses_overlap_within_a_namespace_only(service: Service, blue: Named) -> None:
    service.start()
    blue.ip("link", "add", "br0", "type", "bridge")
    blue.ip("address", "add", "10.7.0.9/24", "dev", "br0")
    body = {"name": "tun1", "addresses": ["10.7.0.1/24"]}
    assert service.call("POST", PATH, body)[0] == 201, "what is in blue does not matter here"
    status, problem = service.call("POST", PATH, {**body, "name": "tun0", "netns": blue.name})
    assert (status, problem["code"]) == (400, "subnet_overlap")
