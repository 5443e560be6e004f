"""Options, exit statuses and output that programs can read. Status: 0 done, 1 refused, 2 usage, 3 nobody answers."""

import errno
import fcntl
import gc
import http.server
import json
import socket
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from service import __version__
from service.api.events import desired_json
from service.cli import doctor
from service.cli.client import url_of
from service.config import SETTINGS
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.spec import InterfaceSpec
from service.domain.state import Interface
from service.domain.steps import CreateLink
from service.domain.token import Token
from service.domain.values import InterfaceId, InterfaceName, Mode, NodeId
from service.kernel import doorway
from service.kernel.linux import LinuxKernel
from service.store.database import newest
from service.store.reader import LogReader
from tests.cli.conftest import Tunledger
from tests.netns import named

COMMANDS = ["serve", "migrate", "status", "history", "counters", "verify", "doctor", "config"]


# -- help and usage


def test_help_lists_every_command(tunledger: Tunledger) -> None:
    ran = tunledger.process("--help")
    assert ran.status == 0
    for command in COMMANDS:
        assert f"  {command} " in ran.out
    assert "Examples:" in ran.out


@pytest.mark.parametrize("command", [[name] for name in COMMANDS] + [["config", "show"]], ids=" ".join)
def test_every_command_explains_itself(tunledger: Tunledger, command: list[str]) -> None:
    ran = tunledger(*command, "-h")
    assert ran.status == 0
    assert ran.out.startswith(f"Usage: tunledger {' '.join(command)}")
    assert not tunledger.database.parent.exists(), "asking for help makes nothing"


def test_version(tunledger: Tunledger) -> None:
    ran = tunledger.process("--version")
    assert (ran.status, ran.out) == (0, f"tunledger, version {__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["no-such-command"],
        ["status", "--no-such-option"],
        ["status", "surplus"],
        ["history", "--limit", "0"],
        ["history", "--limit", "x"],
        ["verify", "--output", "yaml"],
        ["migrate", "--database", "postgresql://localhost/x"],
        ["migrate", "--config", "/nowhere/tunledger.json"],
        ["serve", "--port", "http"],
        ["serve", "--host", "0.0.0.0"],
        ["serve", "--log-level", "loud"],
    ],
    ids=" ".join,
)
def test_bad_usage_and_bad_configuration_exit_2(tunledger: Tunledger, arguments: list[str]) -> None:
    ran = tunledger(*arguments)
    assert ran.status == 2
    assert ran.out == ""
    assert ran.err
    assert not tunledger.database.parent.exists()


def test_a_bad_setting_is_named_with_where_it_comes_from(tunledger: Tunledger) -> None:
    ran = tunledger("migrate", env={"TUNLEDGER_SERVER__PORT": "eighty"})
    assert ran.status == 2
    assert "TUNLEDGER_SERVER__PORT" in ran.err
    assert "server.port" in ran.err


def test_a_service_that_does_not_start_leaves_garbage_collection_on(tunledger: Tunledger) -> None:
    """It did not: tests that came after in the same process grew to 24 GB."""
    assert gc.isenabled()
    assert tunledger("serve", "--port", "http").status == 2
    assert gc.isenabled()


def test_exit_statuses_of_the_process_itself(lived: Tunledger) -> None:
    assert lived.process("verify").status == 0
    assert lived.process("verify", "--database", f"sqlite:///{lived.database}.missing").status == 1
    assert lived.process("verify", "--output", "yaml").status == 2
    assert lived.process("status").status == 3


# -- config show


def test_config_show_has_every_setting_and_its_origin(tunledger: Tunledger, tmp_path: Path) -> None:
    file = tmp_path / "my.json"
    file.write_text('{"shutdown": {"interfaces": "keep"}}')
    ran = tunledger("config", "show", "--config", str(file), "--output", "json")
    assert ran.status == 0
    assert set(ran.json) == {setting.key for setting in SETTINGS}
    assert ran.json["shutdown.interfaces"] == {"value": "keep", "origin": f"file {file}"}
    assert ran.json["server.port"] == {"value": tunledger.port, "origin": "environment TUNLEDGER_SERVER__PORT"}
    assert ran.json["interface.mtu"] == {"value": 1500, "origin": "default"}


def test_config_show_as_a_table_is_not_cut_when_it_is_piped(tunledger: Tunledger) -> None:
    ran = tunledger("config", "show")
    assert ran.status == 0
    lines = ran.out.splitlines()
    assert len(lines) == len(SETTINGS) + 1
    assert lines[0].split() == ["SETTING", "VALUE", "FROM", "MEANING"]
    for line, setting in zip(lines[1:], SETTINGS, strict=True):
        assert line.startswith(setting.key)
        assert line.rstrip().endswith(setting.meaning)
    assert "\x1b" not in ran.out


# -- migrate


def test_migrate_makes_the_database_and_the_second_time_nothing(tunledger: Tunledger) -> None:
    first = tunledger("migrate")
    assert (first.status, first.out) == (0, f"{tunledger.database}: made at schema {newest()}\n")
    before = tunledger.database.read_bytes()
    second = tunledger("migrate")
    assert (second.status, second.out) == (0, f"{tunledger.database} is at schema {newest()} already\n")
    assert tunledger.database.read_bytes() == before


def test_migrate_by_flag(tunledger: Tunledger, tmp_path: Path) -> None:
    assert tunledger("migrate", "--database", f"sqlite:///{tmp_path}/other.db").status == 0
    assert (tmp_path / "other.db").exists()
    assert not tunledger.database.exists()


def test_migrate_refuses_a_newer_database_by_name(lived: Tunledger) -> None:
    with closing(sqlite3.connect(lived.database)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0999'")
    for command in ("migrate", "verify"):
        ran = lived(command)
        assert ran.status == 1
        assert "0999" in ran.out + ran.err
    ran = lived.process("serve", "--port", "0")
    assert ran.status == 2
    assert "0999" in ran.err


def test_migrate_refuses_while_another_holds_the_database(tunledger: Tunledger) -> None:
    tunledger.database.parent.mkdir()
    lock = tunledger.database.with_name("log.db.lock")
    with lock.open("w") as held:
        held.write(json.dumps({"pid": 4242, "since": "today", "what": "tunledger serve on 127.0.0.1:8080"}))
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        ran = tunledger("migrate")
    assert ran.status == 1
    assert "in use by tunledger serve on 127.0.0.1:8080 (pid 4242, since today)" in ran.err


def test_migrate_refuses_what_is_no_database_and_leaves_it(tunledger: Tunledger) -> None:
    tunledger.database.parent.mkdir()
    tunledger.database.write_text("dear diary")
    ran = tunledger("migrate")
    assert ran.status == 1
    assert "does not read" in ran.err
    assert tunledger.database.read_text() == "dear diary"


def test_serve_without_a_database_says_what_to_do(tunledger: Tunledger) -> None:
    ran = tunledger.process("serve", "--port", "0")
    assert ran.status == 2
    assert "run tunledger migrate" in ran.err


# -- verify


def test_a_database_that_the_caller_may_not_read_is_not_called_unsound(
    lived: Tunledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    cannot = TunledgerError(ErrorCode.LOG_UNAVAILABLE, "unable to open database file (SQLITE_CANTOPEN)")

    def closed(_path: Path) -> None:
        raise cannot

    monkeypatch.setattr("service.store.database.require_current", closed)
    ran = lived("verify")
    assert (ran.status, ran.out.splitlines()[-1]) == (1, "NOT CHECKED")
    assert "SQLITE_CANTOPEN" in ran.out
    monkeypatch.setattr("service.cli.local.os.access", lambda *_, **__: False)
    ran = lived("verify")
    assert "may not be read by uid" in ran.out
    assert "SQLITE_CANTOPEN" not in ran.out
    assert "run as root, or as the service's user" in lived("doctor").out


def test_verify_of_a_sound_log(lived: Tunledger) -> None:
    ran = lived("verify", "--output", "json")
    assert ran.status == 0
    assert ran.json == {
        "database": str(lived.database),
        "events": 3,
        "interfaces": 1,
        "position": 3,
        "hash": ran.json["hash"],
        "service": "not running",
        "checked": True,
        "problems": [],
    }
    assert len(ran.json["hash"]) == 64
    table = lived("verify")
    assert table.status == 0
    assert table.out.splitlines()[-1] == "sound"
    assert ran.json["hash"] in table.out


def test_verify_of_a_log_that_was_tampered_with_names_the_position(lived: Tunledger) -> None:
    with closing(sqlite3.connect(lived.database)) as connection, connection:
        connection.execute("DROP TRIGGER events_never_change")
        connection.execute("UPDATE events SET actor = 'nobody' WHERE position = 2")
    ran = lived("verify", "--output", "json")
    assert ran.status == 1
    (problem,) = ran.json["problems"]
    assert problem.startswith("position 2: InterfaceDeclared was changed after it was written")
    table = lived("verify")
    assert table.status == 1
    assert "PROBLEM  position 2: " in table.out
    assert table.out.splitlines()[-1] == "NOT SOUND"


def test_verify_of_a_log_that_lost_its_end_says_how_far_it_had_come(lived: Tunledger) -> None:
    """The chain of what is left verifies: only the file beside the database knows better."""
    with closing(sqlite3.connect(lived.database)) as connection, connection:
        connection.execute("DROP TRIGGER events_never_go")
        (head,) = connection.execute("SELECT max(position) FROM events").fetchone()
        connection.execute("DELETE FROM events WHERE position = ?", (head,))
    ran = lived("verify", "--output", "json")
    assert ran.status == 1
    (problem,) = ran.json["problems"]
    assert problem.startswith(f"position {head - 1}: the log ends here, and had come to position {head} (")


@pytest.mark.parametrize("content", [None, b"", b"garbage" * 1000], ids=["none", "empty", "garbage"])
def test_verify_without_a_log_is_not_sound(tunledger: Tunledger, content: bytes | None) -> None:
    if content is not None:
        tunledger.database.parent.mkdir()
        tunledger.database.write_bytes(content)
    ran = tunledger("verify", "--output", "json")
    assert ran.status == 1
    assert len(ran.json["problems"]) == 1
    assert str(tunledger.database) in ran.json["problems"][0]


@contextmanager
def _answering(answers: dict[str, Any]) -> Iterator[str]:
    """Something on HTTP that answers; its URL."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answers.get(self.path.partition("?")[0], {"error": "unknown"})).encode()
            self.send_response(200 if self.path.partition("?")[0] in answers else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_verify_finds_that_a_service_shows_what_the_log_says(lived: Tunledger) -> None:
    reader = LogReader(lived.database)
    found = reader.verify()
    reader.close()
    interfaces = {interface.name: desired_json(interface) for interface in found.state.interfaces.values()}
    shown = {"position": found.head_position, "hash": found.head_hash, "interfaces": interfaces}
    with _answering({"/api/v1/state": shown}) as url:
        ran = lived("verify", "--url", url, "--output", "json")
    assert (ran.status, ran.json["service"], ran.json["problems"]) == (0, "the same", [])


def test_verify_finds_a_service_that_shows_another_state_than_the_log(lived: Tunledger) -> None:
    head = lived("verify", "--output", "json").json
    shown = {"position": head["position"], "hash": head["hash"], "interfaces": {}}
    with _answering({"/api/v1/state": shown}) as url:
        ran = lived("verify", "--url", url, "--output", "json")
    assert ran.status == 1
    assert ran.json["service"] == "different"
    assert ran.json["problems"] == ["at position 3 the service shows another state than the log for: tun0"]


def test_verify_finds_a_service_that_serves_another_log(lived: Tunledger) -> None:
    with _answering({"/api/v1/state": {"position": 3, "hash": "f" * 64, "interfaces": {}}}) as url:
        ran = lived("verify", "--url", url, "--output", "json")
    assert ran.status == 1
    assert "another hash: it serves another log than this file" in ran.json["problems"][0]


# -- nobody answers


@pytest.mark.parametrize(
    "arguments", [["status"], ["history"], ["history", "tun0"], ["counters"], ["counters", "tun0"]], ids=" ".join
)
def test_when_nobody_answers_it_exits_3_and_says_how_to_reach_one(lived: Tunledger, arguments: list[str]) -> None:
    for more in ([], ["--output", "json"]):
        ran = lived(*arguments, *more)
        assert ran.status == 3
        assert ran.out == ""
        assert f"no tunledger answers at http://127.0.0.1:{lived.port}" in ran.err
        assert "tunledger serve" in ran.err


def test_an_answer_of_something_else_exits_1(lived: Tunledger) -> None:
    with _answering({}) as url:
        ran = lived("status", "--url", url)
    assert (ran.status, ran.out) == (1, "")
    assert ran.err == "tunledger: unknown\n"


def test_an_unhealthy_service_is_shown_and_exits_1(lived: Tunledger) -> None:
    health = {
        "status": "unhealthy",
        "error": "worker 0 is gone",
        "service": "tunledger",
        "version": "9",
        "node": "n",
        "log_position": 7,
    }
    with _answering({"/health": health, "/api/v1/interfaces": {"interfaces": []}}) as url:
        ran = lived("status", "--url", url)
        assert ran.status == 1
        assert "unhealthy: worker 0 is gone" in ran.out
        as_json = lived("status", "--url", url, "--output", "json")
        assert as_json.status == 1
        assert as_json.json["health"] == health


def test_an_ipv6_address_goes_into_a_url_in_brackets() -> None:
    assert url_of("::1", 8080) == "http://[::1]:8080"
    assert url_of("127.0.0.1", 8080) == "http://127.0.0.1:8080"


# -- doctor


def _doctor(tunledger: Tunledger, **env: str) -> tuple[int, dict[str, dict[str, str]]]:
    ran = tunledger.process("doctor", "--output", "json", env=env)
    findings = ran.json
    assert all(set(finding) == {"check", "state", "found", "mend"} for finding in findings)
    assert all(finding["state"] in {"ok", "warning", "FAIL"} for finding in findings)
    assert all(finding["mend"] for finding in findings if finding["state"] != "ok")
    return ran.status, {finding["check"]: finding for finding in findings}


@pytest.mark.kernel
def test_doctor_finds_a_healthy_host_healthy(lived: Tunledger, netns: None) -> None:
    status, found = _doctor(lived)
    wrong = {check: finding for check, finding in found.items() if finding["state"] == "FAIL"}
    assert (status, wrong) == (0, {})
    assert set(found) == {"capability", "device node", "service", "database", "disk", "interfaces"}
    assert found["service"]["found"] == f"not running; 127.0.0.1 port {lived.port} is free"
    assert found["database"]["found"] == f"{lived.database}: 3 events, chain sound"
    table = lived.process("doctor")
    assert table.status == 0
    assert table.out.splitlines()[0].split()[:3] == ["CHECK", "STATE", "FOUND"]


@pytest.mark.kernel
def test_doctor_looks_into_the_namespaces_that_interfaces_live_in(netns: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: int) -> None:
        raise PermissionError(errno.EPERM, "no")

    one = Interface(
        id=InterfaceId("1"),
        name=InterfaceName("tun0"),
        via="v1",
        declared_at="",
        version=1,
        spec=InterfaceSpec(name=InterfaceName("tun0"), netns="tltnowhere"),
    )
    (missing,) = doctor._namespaces({one.id: one})
    assert (missing.check, missing.state, missing.mend) == ("namespaces", "FAIL", "ip netns add tltnowhere")
    with named() as blue:
        there = msgspec.structs.replace(one, spec=InterfaceSpec(name=one.name, netns=blue.name))
        (found,) = doctor._namespaces({one.id: there})
        assert found.state == "ok"
        monkeypatch.setattr(doorway, "set_namespace", refuse)
        (closed,) = doctor._namespaces({one.id: there})
        assert "CAP_SYS_ADMIN" in closed.found
        assert "CAP_SYS_ADMIN" in closed.mend
    assert doctor._namespaces({}) == []


@pytest.mark.kernel
def test_doctor_says_to_migrate(tunledger: Tunledger, netns: None) -> None:
    status, found = _doctor(tunledger)
    assert status == 1
    assert found["database"]["state"] == "FAIL"
    assert found["database"]["mend"] == "tunledger migrate"
    assert not tunledger.database.exists(), "it changes nothing"


@pytest.mark.kernel
def test_doctor_finds_a_log_that_was_tampered_with(lived: Tunledger, netns: None) -> None:
    with closing(sqlite3.connect(lived.database)) as connection, connection:
        connection.execute("DROP TRIGGER events_never_change")
        connection.execute("UPDATE events SET actor = 'nobody' WHERE position = 2")
    status, found = _doctor(lived)
    assert (status, found["database"]["state"]) == (1, "FAIL")
    assert found["database"]["found"].startswith("position 2: ")


@pytest.mark.kernel
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_doctor_finds_a_port_that_somebody_else_has(lived: Tunledger, netns: None, host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as other:
        port = other.getsockname()[1]
        other.settimeout(0.01)

        def hang_up() -> None:
            while not done.is_set():
                try:
                    other.accept()[0].close()
                except TimeoutError:
                    continue

        done = threading.Event()
        thread = threading.Thread(target=hang_up)
        thread.start()
        try:
            status, found = _doctor(lived, TUNLEDGER_SERVER__PORT=str(port), TUNLEDGER_SERVER__HOST=host)
        finally:
            done.set()
            thread.join()
    assert (status, found["service"]["state"]) == (1, "FAIL")
    assert "Address already in use" in found["service"]["found"]


@pytest.mark.kernel
def test_doctor_finds_who_holds_the_database(lived: Tunledger, netns: None) -> None:
    with lived.database.with_name("log.db.lock").open("w") as held:
        held.write(json.dumps({"pid": 4242, "since": "today", "what": "tunledger serve on 127.0.0.1:9"}))
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        status, found = _doctor(lived)
    assert (status, found["lock"]["state"]) == (1, "FAIL")
    assert "tunledger serve on 127.0.0.1:9 (pid 4242" in found["lock"]["found"]


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("node", "words"),
    [("", "ours, but no longer declared: left0"), ("ffffffffffff", "of another tunledger database: left0")],
)
def test_doctor_finds_interfaces_that_nobody_will_remove(lived: Tunledger, netns: None, node: str, words: str) -> None:
    reader = LogReader(lived.database)
    token = Token(NodeId(node or reader.node()), InterfaceId("00000000-0000-7000-8000-000000000001"))
    reader.close()
    kernel = LinuxKernel()
    kernel.execute(token, [CreateLink(InterfaceName("left0"), token, Mode.TUN, False, None, None)])
    kernel.close()
    status, found = _doctor(lived)
    assert (status, found["interfaces"]["state"], found["interfaces"]["found"]) == (0, "warning", words)
