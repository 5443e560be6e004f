"""Processors of another package in a real service: found by entry point, refused by name, told of when they crash."""

import socket
from pathlib import Path

import pytest

from service.domain import events as ev
from tests.e2e.harness import Service, eventually

CODE = """
from service.dataplane.contract import Processor

class Crashy(Processor):
    def process(self, batch):
        for packet in batch:
            if packet[-1] == 0xEE:
                raise RuntimeError("could not bear it")
"""
POINTS = "[tunledger.processors]\ncrashy = crashy_package:Crashy\nbroken = crashy_package:Missing\n"


@pytest.fixture
def installed(service: Service, tmp_path: Path) -> Service:
    """A service that finds a package with a processor."""
    folder = tmp_path / "site"
    (folder / "crashy_package-1.dist-info").mkdir(parents=True)
    (folder / "crashy_package.py").write_text(CODE)
    (folder / "crashy_package-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: crashy\nVersion: 1\n")
    (folder / "crashy_package-1.dist-info" / "entry_points.txt").write_text(POINTS)
    return service.start(PYTHONPATH=str(folder))


def send(last: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.sendto(bytes([1, 2, last]), ("10.0.0.2", 9))


def test_a_processor_that_crashes_is_in_the_log_and_left_out(installed: Service) -> None:
    service = installed
    chain = [{"processor": "crashy", "on_crash": "bypass"}]
    spec = {"name": "tun0", "addresses": ["10.0.0.1/24"], "processing": {"running": True, "chain": chain}}
    assert service.call("POST", "/api/v1/interfaces", spec)[0] == 201
    send(0xEE)
    (crash,) = eventually(
        lambda: [e.body for e in service.events() if isinstance(e.body, ev.ProcessorCrashed)], what="the crash"
    )
    assert (crash.name, crash.stage, crash.processor, crash.then) == ("tun0", 0, "crashy", "bypass")
    assert (crash.status, crash.error) == ("exit 1", "RuntimeError: could not bear it")
    assert crash.packet.endswith("0102ee")
    assert crash.packet_bytes == 31
    eventually(lambda: service.call("GET", "/health")[0] == 200, what="health")
    for _ in range(3):
        send(0xEE)
    eventually(
        lambda: service.ok("GET", "/api/v1/interfaces/tun0")["status"]["observed"]["processing"]["running"],
        what="read again",
    )
    assert len([e for e in service.events() if isinstance(e.body, ev.WorkerExited)]) == 1


def test_a_processor_that_is_not_there_or_cannot_be_used_is_refused(installed: Service) -> None:
    service = installed
    spec = {"name": "tun0", "addresses": ["10.0.0.1/24"]}
    unknown = spec | {"processing": {"running": True, "chain": [{"processor": "inspct"}]}}
    status, problem = service.call("POST", "/api/v1/interfaces", unknown)
    assert (status, problem["code"]) == (400, "invalid_field"), problem
    assert "processing.chain.0.processor" in str(problem)
    assert "known: inspect, filter, capture, reply, forward, balance, broken, crashy" in problem["detail"]
    broken = spec | {"processing": {"running": True, "chain": [{"processor": "broken"}]}}
    status, problem = service.call("POST", "/api/v1/interfaces", broken)
    assert (status, problem["code"]) == (400, "invalid_field")
    assert "has no attribute 'Missing'" in problem["detail"]
    assert service.ok("GET", "/api/v1/interfaces")["interfaces"] == []
