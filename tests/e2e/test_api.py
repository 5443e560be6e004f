"""The original API on the real kernel, as its clients know it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from pyroute2.iproute.linux import IPRoute

from service.domain import events as ev
from service.domain.values import Mode
from service.kernel import tundev
from tests.e2e.harness import Service, links
from tests.stranger import Stranger


@pytest.fixture
def running(shared: Service) -> Iterator[Service]:
    """A service that answers, without an interface."""
    shared.seen = shared.verification().head_position
    yield shared
    shared.call("DELETE", "/api/interface/delete")


def test_a_life_by_curl_looks_as_the_clients_know_it(running: Service) -> None:
    assert running.status() == {"status": "no_interface", "message": "no interface has been created"}
    assert running.ok("POST", "/api/interface/create") == {
        "status": "success",
        "message": "Interface tun0 created successfully",
    }
    status = running.status()
    link = links()["tun0"]
    expected = {"name": "tun0", "address": "10.0.0.1", "netmask": "255.255.255.0", "mtu": 1500, "up": True}
    assert expected.items() <= status.items()
    assert (status["active"], status["running"], status["index"]) == (True, False, link.ifindex)
    assert status["flags"] == "up|pointtopoint|multicast"
    assert status["hardware_addr"] == ""
    assert {"rx_packets", "tx_packets", "rx_bytes", "tx_bytes"} <= set(status)
    assert running.ok("POST", "/api/interface/start")["status"] == "success"
    assert running.status()["running"] is True
    assert running.ok("POST", "/api/interface/stop")["status"] == "success"
    assert running.status()["running"] is False
    assert running.ok("DELETE", "/api/interface/delete")["message"] == "Interface tun0 deleted successfully"
    assert "tun0" not in links()
    assert running.status()["status"] == "no_interface"


def test_configure_changes_in_place(running: Service) -> None:
    running.ok("POST", "/api/interface/create")
    before = links()["tun0"]
    running.ok("POST", "/api/interface/configure", {"address": "10.0.0.9", "netmask": "255.255.0.0", "mtu": 1400})
    after = links()["tun0"]
    assert (after.ifindex, after.up, after.mtu) == (before.ifindex, True, 1400)
    assert [str(address) for address in after.addresses] == ["10.0.0.9/16"]
    running.ok("POST", "/api/interface/configure", {"address": "10.0.0.10"})
    assert [str(address) for address in links()["tun0"].addresses] == ["10.0.0.10/16"]
    running.ok("POST", "/api/interface/configure", {"mtu": 1280})
    assert links()["tun0"].mtu == 1280
    assert running.ok("POST", "/api/interface/configure", {})["status"] == "success"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/interface/start"),
        ("POST", "/api/interface/stop"),
        ("POST", "/api/interface/configure"),
        ("DELETE", "/api/interface/delete"),
    ],
)
def test_without_an_interface_it_is_400(running: Service, method: str, path: str) -> None:
    status, answer = running.call(method, path)
    assert status == 400
    assert list(answer) == ["error"]


def test_what_cannot_be_now_is_409(running: Service) -> None:
    running.ok("POST", "/api/interface/create")
    for body in ({}, {"name": "tun1", "address": "10.9.0.1"}):
        status, answer = running.call("POST", "/api/interface/create", body)
        assert status == 409
        assert "already exists" in answer["error"]
    status, answer = running.call("POST", "/api/interface/stop")
    assert status == 409
    assert "not running" in answer["error"]
    running.ok("POST", "/api/interface/start")
    status, answer = running.call("POST", "/api/interface/start")
    assert status == 409
    assert "already running" in answer["error"]


def test_wrong_methods_and_paths(running: Service) -> None:
    assert running.call("GET", "/api/interface/create")[0] == 405
    assert running.call("POST", "/api/interface/delete")[0] == 405
    assert running.call("GET", "/api/nothing")[0] == 404
    assert running.call("POST", "/health")[0] == 405


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "sixteen-bytes-xx"}, "name"),
        ({"name": "."}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "tün"}, "name"),
        ({"address": "10.0.0.300"}, "address"),
        ({"address": "0.0.0.0"}, "address"),
        ({"address": "224.0.0.1"}, "address"),
        ({"address": "127.0.0.1"}, "address"),
        ({"address": "10.0.0.255"}, "address"),
        ({"netmask": "255.0.255.0"}, "netmask"),
        ({"mtu": 67}, "mtu"),
        ({"mtu": 65536}, "mtu"),
        ({"mtu": True}, "mtu"),
        ({"mtu": "1500"}, "mtu"),
        ({"address": "fd00::1", "netmask": "64", "mtu": 1279}, "mtu"),
        ({"adress": "10.0.0.1"}, "adress"),
        (b"{", "body"),
        (b"[]", "body"),
    ],
)
def test_bad_input_is_refused_by_field_and_changes_nothing(running: Service, body: Any, field: str) -> None:
    status, answer = running.call("POST", "/api/interface/create", body)
    assert status == 400, answer
    assert answer["error"].startswith(field)
    assert [e for e in running.news() if isinstance(e.body, ev.Intent)] == []
    assert set(links()) == {"lo"}


def test_a_body_over_64_kib_is_refused(running: Service) -> None:
    assert running.call("POST", "/api/interface/create", b" " * (64 * 1024 + 1))[0] == 413


def test_a_strangers_name_is_409_and_the_stranger_untouched(running: Service) -> None:
    with Stranger("tun0") as stranger:
        status, answer = running.call("POST", "/api/interface/create")
        assert status == 409
        assert "tun0 exists and is not managed by tunledger" in answer["error"]
        stranger.assert_untouched()
    status, answer = running.call("POST", "/api/interface/create", {"name": "lo"})
    assert status == 409


def test_a_subnet_in_use_is_refused_unless_it_is_asked_for(running: Service) -> None:
    with Stranger("eth9"):
        with IPRoute() as host:  # type: ignore[no-untyped-call]  # pyroute2 has no types
            index = host.link_lookup(ifname="eth9")[0]
            host.addr("add", index=index, address="10.0.0.77", prefixlen=25)
            host.link("set", index=index, state="up")
        status, answer = running.call("POST", "/api/interface/create")
        assert status == 400
        assert "10.0.0.0/25" in answer["error"]
        assert "eth9" in answer["error"]
        running.ok("POST", "/api/interface/create", {"allow_overlap": True})
        status, answer = running.call("POST", "/api/interface/configure", {"address": "10.0.0.5"})
        assert status == 400
        assert running.status()["address"] == "10.0.0.1"


def test_ipv6_works_from_create_to_delete(running: Service) -> None:
    running.ok("POST", "/api/interface/create", {"address": "fd00:7::1", "netmask": "64"})
    status = running.status()
    assert (status["address"], status["netmask"]) == ("fd00:7::1", "64")
    running.ok("POST", "/api/interface/configure", {"address": "fd00:7::2"})
    assert [str(address) for address in links()["tun0"].addresses] == ["fd00:7::2/64"]


def test_a_host_name_that_is_not_loopback_is_refused(running: Service) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1:8080"):
        status, answer = running.call("GET", "/health", headers={"Host": host})
        assert status == 403
        assert "Host" in answer["error"]
    assert running.call("GET", "/health", headers={"Host": "localhost:8080"})[0] == 200
    assert running.call("GET", "/health", headers={"Origin": "http://evil.example"})[0] == 403


def test_another_user_is_401_with_the_reason(running: Service) -> None:
    script = (
        "import os,sys,http.client\n"
        "import encodings.idna\n"
        "try: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "except OSError as e: print('cannot', e); sys.exit()\n"
        "c=http.client.HTTPConnection('127.0.0.1',8080,timeout=10); c.request('POST','/api/interface/create')\n"
        "r=c.getresponse(); print(r.status, r.read().decode())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    if done.stdout.startswith("cannot"):
        pytest.skip("missing: CAP_SETUID over another uid")
    assert done.stdout.startswith("401 "), done
    assert "65534" in done.stdout
    assert running.status()["status"] == "no_interface"


def test_a_caller_that_has_closed_is_nobody(running: Service) -> None:
    """The kernel gives uid 0 for a socket in TIME-WAIT or FIN-WAIT-2; that must not make it root."""
    request = b"POST /api/interface/create HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", running.port)) as client:
            client.sendall(request)
    running.ok("GET", "/health")
    intents = [e for e in running.news() if isinstance(e.body, ev.Intent)]
    assert all(e.actor == "uid:0" for e in intents)


def test_the_caller_is_in_the_log_with_the_command_id(running: Service) -> None:
    running.ok("POST", "/api/interface/create")
    (declared,) = [e for e in running.news() if isinstance(e.body, ev.InterfaceDeclared)]
    assert declared.actor == "uid:0"
    assert declared.command_id
    assert declared.body.request.peer.startswith("127.0.0.1:")
    (applied,) = [e for e in running.news() if isinstance(e.body, ev.CommandApplied)]
    assert applied.command_id == declared.command_id


def test_a_device_that_another_program_holds_is_named(running: Service) -> None:
    running.ok("POST", "/api/interface/create")
    fd = tundev.open_node()
    try:
        tundev.attach(fd, "tun0", Mode.TUN, multi_queue=False, exclusive=False)
        status, answer = running.call("POST", "/api/interface/start")
    finally:
        os.close(fd)
    assert status == 409
    assert "in use by" in answer["error"]
    assert f"pid {os.getpid()}" in answer["error"]
    assert running.status()["running"] is False
    (failed,) = [e.body for e in running.news() if isinstance(e.body, ev.CommandFailed)]
    assert failed.undone
    running.ok("POST", "/api/interface/start")
