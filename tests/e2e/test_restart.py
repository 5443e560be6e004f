"""Start-up: whatever happened while the service was away, the host is brought to what the log says."""

import os
import signal
import sqlite3
from pathlib import Path

import pytest

from service.domain import events as ev
from service.domain.spec import parse_spec
from service.domain.steps import CreateLink, DeleteLink, SetMtu, SetName
from service.domain.token import Token
from service.domain.values import InterfaceName, Mode
from service.kernel.linux import LinuxKernel
from tests.e2e.harness import Service, eventually, links
from tests.stranger import Stranger


def declared(service: Service) -> Token:
    """The token of the one declared interface."""
    verification = service.verification()
    (interface,) = verification.state.interfaces.values()
    return Token(service.events()[0].node, interface.id)


def outside(token: Token, *steps: object) -> None:
    """Do something to the host behind the service's back."""
    kernel = LinuxKernel()
    try:
        kernel.execute(token, steps)  # type: ignore[arg-type]
    finally:
        kernel.close()


def last_summary(service: Service) -> ev.StartupReconciled:
    return [e.body for e in service.events() if isinstance(e.body, ev.StartupReconciled)][-1]


def test_after_a_kill_the_interface_is_adopted_as_it_is(service: Service) -> None:
    service.start()
    service.ok("POST", "/api/interface/create")
    before = links()["tun0"]
    service.kill()
    assert links()["tun0"].ifindex == before.ifindex, "an interface survives the service's death"
    service.start()
    assert links()["tun0"] == before
    assert last_summary(service).adopted == ["tun0"]
    assert service.status()["active"] is True


def test_an_interface_that_was_deleted_meanwhile_is_made_again(service: Service) -> None:
    service.start()
    service.ok("POST", "/api/interface/create", {"mtu": 1400})
    token = declared(service)
    service.kill()
    outside(token, DeleteLink("tun0", links()["tun0"].ifindex, token))
    assert "tun0" not in links()
    service.start()
    link = links()["tun0"]
    assert (link.token, link.mtu, link.up, [str(a) for a in link.addresses]) == (token, 1400, True, ["10.0.0.1/24"])
    assert last_summary(service).recreated == ["tun0"]
    drift = [e.body for e in service.events() if isinstance(e.body, ev.DriftDetected)][-1]
    assert drift.differences == [{"path": "tun0", "desired": "present", "observed": None}]


def test_what_was_changed_meanwhile_is_put_back(service: Service) -> None:
    service.start()
    service.ok("POST", "/api/interface/create")
    token = declared(service)
    service.kill()
    outside(token, SetMtu(InterfaceName("tun0"), 900), SetName(InterfaceName("mine"), "tun0"))
    service.start()
    link = links()["tun0"]
    assert (link.mtu, link.token) == (1500, token)
    assert "mine" not in links()
    assert last_summary(service).repaired == ["tun0"]


def test_an_orphan_with_our_token_is_removed_and_others_are_not(service: Service) -> None:
    service.start()
    service.ok("POST", "/api/interface/create")
    orphan = declared(service)
    service.ok("DELETE", "/api/interface/delete")  # so the log knows of it, and that it is to be gone
    service.kill()
    other = Token(type(orphan.node)("0123456789ab"), orphan.interface_id)
    outside(orphan, CreateLink(InterfaceName("orphan0"), orphan, Mode.TUN, False, None, None))
    outside(other, CreateLink(InterfaceName("other0"), other, Mode.TAP, False, None, None))
    with Stranger("eth9") as stranger:
        service.start()
        assert "orphan0" not in links()
        assert "other0" in links(), "another node's interface is not ours"
        stranger.assert_untouched()
    assert last_summary(service).orphans_removed == ["orphan0"]


def test_a_stranger_with_the_name_makes_the_interface_degraded_until_it_goes(service: Service) -> None:
    service.start()
    service.ok("POST", "/api/interface/create")
    token = declared(service)
    service.kill()
    outside(token, DeleteLink("tun0", links()["tun0"].ifindex, token))
    with Stranger("tun0") as stranger:
        service.start()
        assert last_summary(service).failed == ["tun0"]
        (shown,) = service.ok("GET", "/api/v1/interfaces")["interfaces"]
        assert shown["status"]["state"] == "degraded"
        assert "not managed by tunledger" in shown["status"]["reason"]
        stranger.assert_untouched()
    eventually(lambda: (link := links().get("tun0")) is not None and link.token == token, 20, "the repair")


def test_processing_that_was_running_is_resumed(service: Service) -> None:
    service.start()
    service.ok("POST", "/api/interface/create")
    service.ok("POST", "/api/interface/start")
    service.kill()
    service.start()
    assert service.status()["running"] is True
    assert last_summary(service).processing_resumed == ["tun0"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGQUIT])
def test_an_orderly_stop_removes_interfaces_and_the_next_start_restores_them(
    service: Service, number: signal.Signals
) -> None:
    service.start()
    service.ok("POST", "/api/interface/create", {"name": "tun5", "mtu": 1300})
    service.ok("POST", "/api/interface/start")
    assert service.stop(number) == 0
    assert set(links()) == {"lo"}
    stopped = service.events()[-1].body
    assert isinstance(stopped, ev.ServiceStopped)
    assert stopped.reason == number.name
    service.start()
    status = service.status()
    assert (status["name"], status["mtu"], status["running"]) == ("tun5", 1300, True)
    drift = [e.body for e in service.events() if isinstance(e.body, ev.DriftDetected)][-1]
    assert drift.cause == "shutdown"


def test_keep_leaves_the_interface_to_others(service: Service) -> None:
    service.environment["TUNLEDGER_SHUTDOWN__INTERFACES"] = "keep"
    service.start()
    service.ok("POST", "/api/interface/create")
    service.ok("POST", "/api/interface/start")
    index = links()["tun0"].ifindex
    assert service.stop() == 0
    assert links()["tun0"].ifindex == index
    assert links()["tun0"].carrier is False, "a worker still holds the device"
    service.start()
    assert links()["tun0"].ifindex == index
    assert service.status()["running"] is True


def test_a_second_signal_forces_the_exit(service: Service) -> None:
    service.start()
    service.ok("POST", "/api/interface/create")
    assert service.process is not None
    worker = eventually(lambda: children(service.process.pid if service.process else 0), what="a worker")[0]
    os.kill(worker, signal.SIGSTOP)  # makes the orderly stop take long
    try:
        service.ok("GET", "/api/interface/status")
        service.process.send_signal(signal.SIGTERM)
        eventually(lambda: "stopping" in service.log.read_text(), what="the stop")
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(20) in {0, 128 + signal.SIGINT}
    finally:
        try:
            os.kill(worker, signal.SIGCONT)
        except ProcessLookupError:
            pass


def children(pid: int) -> list[int]:
    """Live child processes."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


def test_two_services_on_one_database_the_second_names_the_first(service: Service) -> None:
    service.start()
    second = service.command("serve", "--port", "8099")
    assert second.returncode == 1
    assert service.process is not None
    assert f"pid {service.process.pid}" in second.stderr
    service.ok("GET", "/health")


def test_a_changed_log_is_served_read_only_and_deletes_nothing(service: Service) -> None:
    service.start()
    service.ok("POST", "/api/interface/create")
    service.kill()
    token = declared(service)
    with sqlite3.connect(service.database) as connection:
        connection.execute("DROP TRIGGER events_never_change")
        connection.execute("UPDATE events SET actor = 'uid:1' WHERE position = 3")
    connection.close()
    service.start()
    status, health = service.call("GET", "/health")
    assert status == 503
    assert "position 3" in health["error"]
    status, answer = service.call("DELETE", "/api/interface/delete")
    assert status == 503
    assert "read-only" in answer["error"]
    assert service.status()["name"] == "tun0"
    assert links()["tun0"].token == token
    assert service.stop() == 0
    assert links()["tun0"].token == token, "a service that cannot trust its log removes nothing, at its stop neither"


def test_a_file_that_is_no_database_is_served_read_only(service: Service) -> None:
    service.start()
    service.ok("POST", "/api/interface/create")
    service.kill()
    for extra in service.folder.glob("tunledger.db-*"):
        extra.unlink()
    service.database.write_bytes(os.urandom(65536))
    service.start()
    assert service.call("GET", "/health")[0] == 503
    assert service.call("POST", "/api/interface/create")[0] == 503
    assert service.stop() == 0
    assert "tun0" in links()


def test_a_newer_database_is_refused_by_name(service: Service) -> None:
    service.start()
    service.kill()
    with sqlite3.connect(service.database) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    refused = service.command("serve")
    assert refused.returncode == 2
    assert "9999" in refused.stderr
    assert "newer" in refused.stderr


def test_the_spec_of_history_is_enough_to_make_it_again(service: Service) -> None:
    """The log alone says what was declared: nothing comes from today's configuration."""
    service.start()
    service.ok("POST", "/api/interface/create", {"name": "tun3"})
    (event,) = [e.body for e in service.events() if isinstance(e.body, ev.InterfaceDeclared)]
    assert event.spec == parse_spec({"name": "tun3", "addresses": ["10.0.0.1/24"], "mtu": 1500})
