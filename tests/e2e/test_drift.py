"""What others do is heard of, not found by looking now and then: here nobody looks for an hour."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.domain import events as ev
from tests.e2e.harness import Service, eventually, links
from tests.namespace import fresh_namespace

pytestmark = pytest.mark.kernel

CHANGES = (
    "link set tun1 mtu 1300",
    "link set tun1 txqueuelen 10",
    "link set tun1 down",
    "address delete 10.61.0.1/24 dev tun1",
    "address add 10.62.0.1/24 dev tun1",
    "link set tun1 alias mine",
    "link set tun1 name other",
    "link delete tun1",
)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with fresh_namespace():
        running = Service(tmp_path, settings={"TUNLEDGER_RECONCILE__INTERVAL_S": "3600"})
        try:
            yield running.start()
        finally:
            running.close()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_by_others_is_heard_of_told_once_and_mended(service: Service, change: str) -> None:
    spec = {"name": "tun1", "mtu": 1400, "addresses": ["10.61.0.1/24"]}
    assert service.call("POST", "/api/v1/interfaces", spec)[0] == 201
    before = links()["tun1"]
    subprocess.run(["ip", *change.split()], check=True)

    def repaired() -> list[ev.DriftRepaired]:
        return [event.body for event in service.events() if isinstance(event.body, ev.DriftRepaired)]

    eventually(repaired, 15, "the repair")
    after = links()["tun1"]
    assert (after.mtu, after.txqueuelen, after.up, after.addresses, after.alias) == (
        before.mtu,
        before.txqueuelen,
        before.up,
        before.addresses,
        before.alias,
    )
    assert (after.ifindex == before.ifindex) == (change != "link delete tun1")
    found = [event.body for event in service.events() if isinstance(event.body, ev.DriftDetected)]
    assert [each.cause for each in found] == ["outside"]
    assert len(repaired()) == 1


def test_drift_that_is_only_reported_is_heard_to_be_over(service: Service) -> None:
    spec = {"name": "tun1", "mtu": 1400, "addresses": ["10.61.0.1/24"], "drift": "report"}
    assert service.call("POST", "/api/v1/interfaces", spec)[0] == 201

    def told(kind: type[ev.Event]) -> int:
        return sum(isinstance(event.body, kind) for event in service.events())

    for number, (there, back) in enumerate(
        (
            ("link set tun1 mtu 1300", "link set tun1 mtu 1400"),
            ("address delete 10.61.0.1/24 dev tun1", "address add 10.61.0.1/24 dev tun1"),
        ),
        1,
    ):
        subprocess.run(["ip", *there.split()], check=True)
        eventually(lambda: told(ev.DriftDetected) == number, 15, "the drift")  # noqa: B023
        subprocess.run(["ip", *back.split()], check=True)
        eventually(lambda: told(ev.DriftEnded) == number, 15, "its end")  # noqa: B023
    assert told(ev.DriftRepaired) == 0
