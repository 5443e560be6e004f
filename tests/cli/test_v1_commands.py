"""The commands over HTTP, against a real service in a network namespace: each as people and as programs see it.

They run in this process, in the service's namespace; each test has interfaces of its own.
"""

import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from service.cli.main import cli
from tests.e2e.harness import PORT, Service, eventually
from tests.namespace import fresh_namespace

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One running service for all tests here: starting one costs a second."""
    with fresh_namespace():
        one = Service(tmp_path_factory.mktemp("cli")).start()
        yield one
        one.close()


Run = Callable[..., Result]


@pytest.fixture
def run(service: Service) -> Run:
    """Run `tunledger` with these arguments; the exit status is checked."""

    def tunledger(*arguments: str, status: int = 0, given: str | None = None) -> Result:
        settings = {"TUNLEDGER_SERVER__PORT": str(PORT), "TUNLEDGER_CONFIG": None}
        done = CliRunner(env=settings).invoke(cli, arguments, input=given, prog_name="tunledger")
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
        assert done.exit_code == status, (done.stdout, done.stderr)
        assert "\x1b" not in done.output, "colours are for terminals"
        return done

    return tunledger


def _json(done: Result) -> Any:
    return json.loads(done.stdout)


def _command_id(done: Result) -> str:
    found = re.search(r"^command (\S+)$", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return found[1]


def _present(run: Run) -> set[str]:
    return {each["spec"]["name"] for each in _json(run("list", "-o", "json"))}


# -- one interface


def test_a_chain_is_written_stage_by_stage_or_as_json(run: Run) -> None:
    made = run(
        "create", "ch0", "--processor", "inspect", "--processor", "capture:files=1,size_bytes=null",
        "--processor", "reply:networks=10.0.0.0/24+10.1.0.0/24,answers=icmp",
        "--processor", "balance:to=tun1+tun2*3,symmetric=false",
        "--offloads", "off", "--dry-run", "-o", "json",
    )  # fmt: skip
    (event,) = _json(made)["events"]
    processing = event["payload"]["spec"]["processing"]
    assert processing["offloads"] == "off"
    inspect, capture, reply, balance = processing["chain"]
    assert (inspect["processor"], capture["files"], capture["size_bytes"]) == ("inspect", 1, None)
    assert (reply["networks"], reply["answers"]) == (["10.0.0.0/24", "10.1.0.0/24"], ["icmp"])
    assert balance["to"] == [{"to": "tun1", "weight": 1}, {"to": "tun2", "weight": 3}]
    assert balance["symmetric"] is False
    chain = [{"processor": "forward", "to": "tun9"}]
    run("create", "ch1", "--chain", json.dumps(chain))
    assert _json(run("show", "ch1", "-o", "json"))["spec"]["processing"]["chain"][0]["to"] == "tun9"
    assert "forward" in run("show", "ch1").stdout
    run("set", "ch1", "--processor", "none")
    assert _json(run("show", "ch1", "-o", "json"))["spec"]["processing"]["chain"] == []
    run("delete", "ch1")


@pytest.mark.parametrize("wrong", ["forward:to", "forward:=x", "forward:to=a,to=b", "balance:to=tun1*x"])
def test_a_stage_that_cannot_be_read_is_bad_usage(run: Run, wrong: str) -> None:
    assert "--processor" in run("create", "ch2", "--processor", wrong, status=2).stderr


def test_create_show_list_and_delete(run: Run) -> None:
    made = run(
        "create", "cr0", "--mode", "tap", "--address", "10.20.0.1/24", "--address", "fd20::1/64", "--mtu", "1400",
        "--txqueuelen", "700", "--owner", "root", "--group", "0", "--mac", "02:00:00:00:20:01", "--down",
        "--description", "für alle", "--label", "lab=north", "--label", "rack=7",
    )  # fmt: skip
    assert made.stdout.splitlines()[0] == "cr0 created"
    (found,) = _json(run("list", "cr*", "--mode", "tap", "--state", "applied", "--label", "lab=north", "-o", "json"))
    assert found == _json(run("show", "cr0", "-o", "json")) | {"status": found["status"]}
    assert found["spec"] == {
        "name": "cr0",
        "mode": "tap",
        "addresses": ["10.20.0.1/24", "fd20::1/64"],
        "mtu": 1400,
        "up": False,
        "txqueuelen": 700,
        "owner": 0,
        "group": 0,
        "multi_queue": False,
        "mac": "02:00:00:00:20:01",
        "netns": None,
        "processing": {"running": False, "chain": [], "offloads": "auto"},
        "drift": "repair",
        "description": "für alle",
        "labels": {"lab": "north", "rack": "7"},
    }
    header, row = run("list", "cr0").stdout.splitlines()
    assert " ".join(header.split()) == "NAME MODE ADDRESSES MTU UP PROCESSING STATE GENERATION LABELS"
    assert " ".join(row.split()) == "cr0 tap 10.20.0.1/24 fd20::1/64 1400 no stopped applied 1 lab=north rack=7"
    shown = dict(line.split(None, 1) for line in run("show", "cr0").stdout.splitlines() if not line.startswith(" "))
    assert shown["addresses"] == "10.20.0.1/24, fd20::1/64"
    assert shown["state"] == "applied"
    assert shown["description"] == "für alle"
    assert shown["etag"] == f"{found['id']}.1"
    assert run("list", "cr*", "--mode", "tun").stdout == "no interfaces\n"
    gone = _json(run("delete", "cr0", "--output", "json"))
    assert (gone["name"], gone["deleted"]) == ("cr0", True)
    assert _json(run("command", gone["command_id"], "-o", "json"))["state"] == "applied"
    assert run("list", "cr0").stdout == "no interfaces\n"


def test_set_changes_what_is_given_and_nothing_else(run: Run) -> None:
    run("create", "se0", "--address", "10.21.0.1/24", "--label", "a=1", "--label", "b=2", "--owner", "root")
    before = _json(run("show", "se0", "-o", "json"))["spec"]
    changed = run("set", "se0", "--mtu", "1400", "--label", "a=", "--label", "c=3", "--start", "--description", "x y")
    assert changed.stdout.splitlines()[0] == "se0 changed"
    after = _json(run("show", "se0", "-o", "json"))["spec"]
    assert after == before | {
        "mtu": 1400,
        "labels": {"b": "2", "c": "3"},
        "processing": {"running": True, "chain": [], "offloads": "auto"},
        "description": "x y",
    }
    _json(run("set", "se0", "--stop", "-o", "json"))
    run("delete", "se0")


def test_addresses_are_added_and_removed_one_by_one_or_given_all_at_once(run: Run) -> None:
    run("create", "ad0", "--address", "10.22.0.1/24", "--address", "10.22.1.1/24")
    run(
        "set",
        "ad0",
        "--add-address",
        "fd22:0::1/64",
        "--add-address",
        "10.22.1.1/24",
        "--remove-address",
        "10.22.0.1/24",
    )

    def addresses() -> list[str]:
        found: list[str] = _json(run("show", "ad0", "-o", "json"))["spec"]["addresses"]
        return found

    assert addresses() == ["10.22.1.1/24", "fd22::1/64"]
    refused = run("set", "ad0", "--remove-address", "10.22.0.1/24", status=1)
    assert "ad0 has no address 10.22.0.1/24; it has 10.22.1.1/24, fd22::1/64" in refused.stderr
    run("set", "ad0", "--address", "10.22.2.1/24")
    assert addresses() == ["10.22.2.1/24"]
    run("set", "ad0", "--address", "none")
    assert addresses() == []
    assert "do not go with it" in run("set", "ad0", "--address", "10.22.0.1/24", "--add-address", "x", status=2).stderr
    run("delete", "ad0")


def test_start_and_stop(run: Run) -> None:
    run("create", "st0")
    assert run("start", "st0", "--reason", "to see it").stdout.splitlines()[0] == "st0: processing started"
    assert run("list", "st0").stdout.splitlines()[1].split()[4] == "running"
    assert "(already_running)" in run("start", "st0", status=1).stderr
    assert _json(run("stop", "st0", "-o", "json"))["spec"]["processing"]["running"] is False
    run("delete", "st0")


def test_delete_of_many_is_all_or_none(run: Run) -> None:
    for name in ("de0", "de1"):
        run("create", name)
    assert "there is no interface de9" in run("delete", "de0", "de1", "de9", status=1).stderr
    assert {"de0", "de1"} <= _present(run)
    assert run("delete", "de0", "de1").stdout.splitlines()[:2] == ["de0 deleted", "de1 deleted"]
    assert not {"de0", "de1"} & _present(run)


# -- what all writes can do


def test_a_refusal_is_told_with_code_and_place_and_exits_1(run: Run) -> None:
    refused = run("create", "re0", "--mtu", "70000", status=1)
    assert refused.stdout == ""
    assert refused.stderr == (
        "tunledger: mtu: 70000 is out of range; expected 68 to 65535\n  (invalid_field; at /mtu)\n"
    )
    assert run("show", "re0", status=1).stderr == "tunledger: there is no interface re0\n  (no_interface)\n"
    run("create", "re0")
    assert "(interface_exists; at /name)" in run("create", "re0", status=1).stderr
    needs = run("set", "re0", "--mode", "tap", status=1).stderr
    assert "(needs_recreate; at /mode; give --recreate to have it done)" in needs
    anew = run("set", "re0", "--mode", "tap", "--recreate", "--dry-run").stdout
    assert anew.startswith("~ re0: change, made anew: new ifindex, its users are cut off\n    mode: tun -> tap\n")
    run("delete", "re0")


def test_a_dry_run_of_each_write_says_what_would_be_done_and_does_nothing(run: Run, service: Service) -> None:
    run("create", "dr0", "--mtu", "1400")
    before = _json(run("list", "-o", "json"))
    position = service.ok("GET", "/health")["log_position"]
    assert run("create", "dr1", "--address", "10.23.0.1/24", "--dry-run").stdout.splitlines() == [
        "+ dr1: create",
        "    mode: tun",
        "    addresses: 10.23.0.1/24",
        "    mtu: 1500",
        "      ip tuntap add dr1 mode tun",
        "      ip link set dr1 txqueuelen 1000",
        "      ip address replace 10.23.0.1/24 dev dr1",
        "      ip link set dr1 up",
        "a dry run: nothing was changed",
    ]
    assert run("set", "dr0", "--mtu", "1300", "--dry-run").stdout.splitlines() == [
        "~ dr0: change",
        "    mtu: 1400 -> 1300",
        "      ip link set dr0 mtu 1300",
        "a dry run: nothing was changed",
    ]
    assert "- dr0: delete\n      ip link delete dr0\n" in run("delete", "dr0", "--dry-run").stdout
    assert "~ dr0: start\n    processing.running: no -> yes\n" in run("start", "dr0", "--dry-run").stdout
    assert "(not_running)" in run("stop", "dr0", "--dry-run", status=1).stderr
    as_json = _json(run("set", "dr0", "--mtu", "1300", "--dry-run", "-o", "json"))
    assert as_json["dry_run"] is True
    assert as_json["plan"][0]["commands"] == ["ip link set dr0 mtu 1300"]
    after = _json(run("list", "-o", "json"))
    assert [each["spec"] for each in after] == [each["spec"] for each in before]
    assert service.ok("GET", "/health")["log_position"] == position
    run("delete", "dr0")


def test_if_match_keeps_two_people_apart(run: Run) -> None:
    etag = f"{_json(run('create', 'im0', '-o', 'json'))['id']}.1"
    run("set", "im0", "--mtu", "1400", "--if-match", etag)
    late = run("set", "im0", "--mtu", "1300", "--if-match", etag, status=1)
    assert "(precondition_failed; tunledger show has the present ETag)" in late.stderr
    assert "--if-match goes with one interface" in run("delete", "im0", "im1", "--if-match", etag, status=2).stderr
    run("delete", "im0", "--if-match", etag.replace(".1", ".2"))


def test_a_reason_is_kept_and_shown(run: Run) -> None:
    run("create", "hi0", "--reason", "für Łódź's Labor")
    run("set", "hi0", "--mtu", "1400")
    run("set", "hi0", "--mtu", "1", "--reason", "a mistake", status=1)
    run("delete", "hi0", "--reason", "over")
    entries = _json(run("history", "hi0", "-o", "json"))
    assert [(entry["reason"], entry["outcome"]) for entry in reversed(entries)] == [
        ("für Łódź's Labor", "applied"),
        ("", "applied"),
        ("a mistake", "rejected"),
        ("over", "applied"),
    ]
    table = run("history", "hi0", "--changes").stdout
    assert " ".join(table.splitlines()[0].split()) == "POS WHEN WHO NAME WHAT OUTCOME TOOK REASON"
    assert re.search(r"root \(uid:0\) +hi0 +configure mtu 1500 -> 1400 +applied", table)
    assert re.search(r"^ +mtu: 1500 -> 1400$", table, re.MULTILINE)
    assert "für Łódź's Labor" in table
    assert re.search(r" PatchInterface +rejected +a mistake\n +mtu: 1 is out of range; ", table)
    newest = _json(run("history", "hi0", "--limit", "1", "-o", "json"))
    assert newest == entries[:1]
    assert _json(run("history", "--id", entries[0]["interface_id"], "-o", "json"))[-1] == entries[-1]
    assert "(not_found)" in run("history", "never0", status=1).stderr
    assert "at most 256 printable" in run("create", "hi1", "--reason", "two\nlines", status=2).stderr


def test_an_unconfirmed_change_is_taken_back_and_a_confirmed_one_stays(run: Run) -> None:
    run("create", "co0")

    def mtu() -> int:
        return int(_json(run("show", "co0", "-o", "json"))["spec"]["mtu"])

    kept = run("set", "co0", "--mtu", "1400", "--confirm-within", "300")
    command_id = _command_id(kept)
    assert f"taken back in 300 s, unless: tunledger confirm {command_id}" in kept.stdout
    assert "applied (to be confirmed)" in run("list", "co0").stdout
    assert f"tunledger confirm {command_id}" in run("show", "co0").stdout
    assert "(awaiting_confirmation; " in run("set", "co0", "--mtu", "1300", status=1).stderr
    assert run("confirm", command_id, "--dry-run").stdout.startswith("~ co0: confirm\n")
    confirmed = run("confirm", command_id, "--reason", "it works")
    assert confirmed.stdout == f"confirmed: the change by command {command_id} stays\n"
    assert "(not_awaiting)" in run("confirm", command_id, status=1).stderr
    assert mtu() == 1400
    late = _json(run("set", "co0", "--mtu", "1300", "--confirm-within", "1", "-o", "json"))
    assert mtu() == 1300
    eventually(lambda: mtu() == 1400, 20, "taking it back")
    assert "(not_awaiting)" in run("confirm", late["command_id"], status=1).stderr
    run("delete", "co0")


def test_what_became_of_a_command(run: Run) -> None:
    command_id = _command_id(run("create", "cm0", "--mtu", "1400", "--reason", "to ask"))
    shown = run("command", command_id).stdout
    assert shown.splitlines()[0] == f"command  {command_id}"
    assert "reason   to ask" in shown
    assert re.search(r"^cm0: InterfaceDeclared, applied in [0-9.]+ ms$", shown, re.MULTILINE)
    assert "    mtu: 1400\n" in shown
    assert "      ip tuntap add cm0 mode tun\n" in shown
    assert "(not_found)" in run("command", "nope", status=1).stderr
    run("delete", "cm0")


# -- the log


def test_state_at_a_position_and_the_difference_between_two(run: Run) -> None:
    run("create", "sa0", "--mtu", "1400", "--label", "lab=west")
    before = _json(run("state", "-o", "json"))
    position = str(before["position"])
    run("set", "sa0", "--mtu", "1300")
    run("create", "sa1", "--address", "10.24.0.1/24")
    then = _json(run("state", "--at", position, "-o", "json"))
    assert then["interfaces"] == before["interfaces"]
    assert then["interfaces"]["sa0"]["spec"]["mtu"] == 1400
    assert _json(run("state", "--at", then["recorded_at"], "-o", "json"))["interfaces"] == then["interfaces"]
    first, _, *rows = run("state", "--at", position).stdout.splitlines()
    assert first == f"position {position}, {then['recorded_at'].replace('T', ' ')[:23]}Z"
    (row,) = (row for row in rows if row.startswith("sa0 "))
    assert " ".join(row.split()) == "sa0 tun 1400 yes stopped applied 1 lab=west"
    first, second, *rows = run("diff", position).stdout.splitlines()
    assert first.startswith(f"from position {position}, ")
    assert second.startswith("to   position ")
    assert rows == [
        "~ sa0: changed",
        "    mtu: 1400 -> 1300",
        "+ sa1: added",
        "    mode: tun",
        "    addresses: 10.24.0.1/24",
        "    mtu: 1500",
    ]
    assert run("diff", position, position).stdout.splitlines()[2:] == ["no difference"]
    assert [each["change"] for each in _json(run("diff", position, "-o", "json"))["interfaces"]] == ["changed", "added"]
    now = str(_json(run("state", "-o", "json"))["position"])
    run("delete", "sa0", "sa1")
    assert "- sa1: removed" in run("diff", now).stdout.splitlines()
    assert "(invalid_field; at /at)" in run("state", "--at", "yesterday", status=1).stderr


def test_events_by_filter_and_all_of_them(run: Run, service: Service) -> None:
    made = _json(run("create", "ev0", "-o", "json"))
    run("set", "ev0", "--mtu", "1400")
    run("set", "ev0", "--mtu", "1", status=1)
    stream = run("events", "--stream", f"interface/{made['id']}").stdout.splitlines()
    assert [line.split()[4] for line in stream] == [
        "InterfaceDeclared",
        "CommandApplied",
        "InterfaceReconfigured",
        "CommandApplied",
    ]
    assert stream[2].endswith("ev0         mtu: 1500 -> 1400")
    of_command = run("events", "--command", made["command_id"], "-o", "json").stdout.splitlines()
    assert [json.loads(line)["type"] for line in of_command] == ["InterfaceDeclared", "CommandApplied"]
    rejected = run("events", "--type", "CommandRejected", "--type", "CommandFailed", "--limit", "1").stdout
    assert "mtu: 1 is out of range; expected 68 to 65535 (invalid_field)" in rejected
    everything = [json.loads(line)["position"] for line in run("events", "--all", "-o", "json").stdout.splitlines()]
    assert everything == list(range(1, len(everything) + 1))
    assert len(run("events", "--limit", "3").stdout.splitlines()) == 3
    assert run("events", "--to", "2001-01-01").stdout == ""
    assert "(invalid_field; at /type)" in run("events", "--type", "Nope", status=1).stderr
    assert "--all goes neither" in run("events", "--all", "--limit", "1", status=2).stderr
    run("delete", "ev0")


def test_events_are_followed(run: Run, service: Service) -> None:
    run("create", "fo0")
    seen = [
        json.loads(line)
        for line in run("events", "--follow", "--after", "0", "--limit", "3", "-o", "json").stdout.splitlines()
    ]
    assert [event["position"] for event in seen] == [1, 2, 3]
    head = service.ok("GET", "/health")["log_position"]
    meanwhile = threading.Thread(target=service.call, args=("DELETE", "/api/v1/interfaces/fo0"))
    meanwhile.start()
    live = run("events", "--follow", "--after", str(head), "--limit", "2").stdout.splitlines()
    meanwhile.join()
    assert [int(line.split()[0]) for line in live] == [head + 1, head + 2]
    assert [line.split()[4] for line in live] == ["InterfaceRetired", "CommandApplied"]


# -- the host


def test_plan_drift_and_reconcile(run: Run) -> None:
    assert run("plan").stdout == run("reconcile", "--dry-run").stdout == "nothing to do: the host is as the log says\n"
    assert run("drift").stdout == "no drift: the host is as the log says\n"
    assert _json(run("drift", "-o", "json")) == []
    run("create", "pl0", "--mtu", "1400")
    done = run("reconcile").stdout
    assert done == "nothing to do: the host is as the log says\n"
    assert _json(run("reconcile", "-o", "json"))["failed"] == []
    subprocess.run(["ip", "link", "set", "pl0", "mtu", "1350"], check=True)
    # The service may have mended it before it was asked: either is right, and history has the repair.
    run("reconcile")
    assert "repair: ip link set pl0 mtu 1400" in run("history", "pl0").stdout
    assert _json(run("plan", "-o", "json")) == {"dry_run": True, "plan": []}
    run("delete", "pl0")


# -- files

LAB = """
interfaces:
  - name: lab0
    addresses: [10.30.0.1/24]
    mtu: 1400
    labels: {lab: north}
  - {name: lab1, mode: tap, mac: 02:00:00:00:30:01, processing: {running: true}}
"""


@pytest.fixture
def lab(tmp_path: Path, run: Run) -> Iterator[Path]:
    """A file of two interfaces, which are gone afterwards."""
    file = tmp_path / "lab.yaml"
    file.write_text(LAB)
    yield file
    file.write_text("interfaces: []")
    run("apply", "-f", str(file), "--prune", "--yes")


def test_apply_shows_what_it_would_do_and_does_it_all_at_once(run: Run, lab: Path) -> None:
    planned = run("apply", "-f", str(lab), "--dry-run").stdout
    assert "+ lab0: create\n" in planned
    assert "    mtu: 1400\n" in planned
    assert "      ip tuntap add lab1 mode tap\n" in planned
    assert planned.endswith("2 to create, 0 as they should be\na dry run: nothing was changed\n")
    assert not {"lab0", "lab1"} & _present(run)
    applied = run("apply", "-f", str(lab), "--yes", "--reason", "lab 7")
    assert "applied: 2 interfaces\n" in applied.stdout
    command = _json(run("command", _command_id(applied), "-o", "json"))
    assert (command["state"], command["reason"]) == ("applied", "lab 7")
    assert [each["name"] for each in command["interfaces"]] == ["lab0", "lab1"]
    assert run("apply", "-f", str(lab)).stdout == "nothing to do: 2 interfaces as the file says\n"


def test_apply_changes_what_differs_and_prunes_only_when_told(run: Run, lab: Path) -> None:
    run("apply", "-f", str(lab), "--yes")
    lab.write_text(LAB.replace("mtu: 1400", "mtu: 1300").replace("{lab: north}", "{}").split("  - {name: lab1")[0])
    kept = run("apply", "-f", str(lab), "--dry-run").stdout
    assert "~ lab0: change\n    mtu: 1400 -> 1300\n    labels.lab: north -> absent\n" in kept
    assert "lab1" not in kept
    pruned = _json(run("apply", "-f", str(lab), "--prune", "--yes", "-o", "json"))
    assert pruned["applied"] is True
    assert [(each["name"], each["action"]) for each in pruned["plan"]] == [("lab1", "delete"), ("lab0", "change")]
    assert pruned["plan"][0]["commands"] == ["# stop processing on lab1", "ip link delete lab1"]
    assert _present(run) == {"lab0"}
    assert _json(run("apply", "-f", str(lab), "-o", "json")) == {"plan": [], "applied": False, "command_id": None}


def test_apply_asks_and_refuses_where_nobody_can_answer(run: Run, lab: Path) -> None:
    for arguments, given in ((["-f", str(lab)], None), (["-f", "-"], LAB)):
        refused = run("apply", *arguments, given=given, status=2)
        assert "+ lab0: create" in refused.stdout, "what it would have asked for"
        assert "give --yes" in refused.stderr
    assert not {"lab0", "lab1"} & _present(run)


def test_apply_is_all_or_none(run: Run, lab: Path) -> None:
    lab.write_text(LAB.replace("name: lab1", "name: lo"))
    refused = run("apply", "-f", str(lab), "--yes", status=1)
    assert "lo exists and is not managed by tunledger" in refused.stderr
    assert "(name_taken; at /commands/1/name)" in refused.stderr
    assert "lab0" not in _present(run)
    lab.write_text("interfaces: []")


def test_a_mistake_in_a_file_exits_2_and_asks_nobody(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "lab.yaml"
    file.write_text(LAB.replace("1400", "70000"))
    wrong = run("apply", "-f", str(file), "--yes", "--url", "http://127.0.0.1:1", status=2)
    assert wrong.stderr.startswith(f"tunledger: {file}: interfaces.0 (lab0).mtu: 70000 is out of range")
    assert "No such file" in run("apply", "-f", str(tmp_path / "none.yaml"), status=2).stderr


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_what_is_exported_applies_as_nothing_to_do_and_brings_all_back(run: Run, lab: Path, form: str) -> None:
    run("apply", "-f", str(lab), "--yes")
    before = [each["spec"] for each in _json(run("list", "-o", "json"))]
    text = run("export", "-o", form).stdout
    assert run("apply", "-f", "-", "--prune", given=text).stdout == "nothing to do: 2 interfaces as the file says\n"
    run("delete", "lab0", "lab1")
    run("apply", "-f", "-", "--yes", given=text)
    assert [each["spec"] for each in _json(run("list", "-o", "json"))] == before
    assert "lab1" not in run("export", "lab0", "-o", form).stdout
    assert "lab1" not in run("export", "--label", "lab=north", "-o", form).stdout


# -- help, usage, completion, nobody there


@pytest.mark.parametrize("name", cli.list_commands(click.Context(cli)))
def test_every_command_says_what_it_does_with_an_example(name: str) -> None:
    done = CliRunner().invoke(cli, [name, "--help"], prog_name="tunledger")
    assert done.exit_code == 0
    if name not in {"config", "serve", "migrate", "verify", "doctor", "counters"}:
        assert re.search(rf"Examples?:\n.*tunledger {name}", done.stdout, re.DOTALL)


@pytest.mark.parametrize(
    "arguments",
    [
        ["create"],
        ["create", "x", "--mode", "tan"],
        ["create", "x", "--label", "lab"],
        ["create", "x", "--label", "lab="],
        ["create", "x", "--label", "a=1", "--label", "a=2"],
        ["create", "x", "--confirm-within", "0"],
        ["set", "x"],
        ["set", "x", "--if-match", 'a"b'],
        ["delete"],
        ["apply"],
        ["history", "--limit", "x"],
        ["completion", "tcsh"],
    ],
    ids=" ".join,
)
def test_bad_usage_exits_2(run: Run, arguments: list[str]) -> None:
    done = run(*arguments, status=2)
    assert done.stdout == ""
    assert done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["show", "x"], ["create", "x"], ["plan"], ["drift"], ["export"], ["confirm", "x"], ["command", "x"]],
    ids=" ".join,
)
def test_when_nobody_answers_it_exits_3(run: Run, arguments: list[str]) -> None:
    done = run(*arguments, "--url", "http://127.0.0.1:1", status=3)
    assert done.stdout == ""
    assert "no tunledger answers at http://127.0.0.1:1 " in done.stderr
    assert "is not a URL" in run(*arguments, "--url", "localhost", status=3).stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_asks_us(run: Run, shell: str) -> None:
    assert "_TUNLEDGER_COMPLETE" in run("completion", shell).stdout


def test_names_are_completed_by_the_service_and_without_it_in_silence(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("create", "tab0")
    run("create", "tab1")

    def completed(words: str) -> list[str]:
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
        asked = {"_TUNLEDGER_COMPLETE": "bash_complete", "TUNLEDGER_SERVER__PORT": str(PORT)}
        done = CliRunner(env=asked).invoke(cli, [], prog_name="tunledger", complete_var="_TUNLEDGER_COMPLETE")
        assert done.stderr == ""
        return done.stdout.split()

    for command in ("show", "set", "delete tab9", "start", "stop", "history", "list", "export"):
        assert completed(f"tunledger {command} tab") == ["plain,tab0", "plain,tab1"]
    assert completed("tunledger show t*") == []
    assert completed("tunledger show --url http://127.0.0.1:1 tab") == []
    assert completed("tunledger show --config /none tab") == []
    assert "plain,reconcile" in completed("tunledger rec")
    run("delete", "tab0", "tab1")
