"""What a client of /api/v1 can build on: keys, tags, dry runs, confirmation, batches, reasons; also over a crash."""

import http.client
import json
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pyroute2.iproute.linux import IPRoute

from service.domain import events as ev
from service.domain.values import Mode
from service.kernel import tundev
from tests.e2e.harness import Service, eventually, links
from tests.stranger import Stranger

ADDRESSES = ["10.1.0.1/24", "fd00:1::1/64"]
SPEC: dict[str, Any] = {"name": "tun1", "addresses": ADDRESSES, "mtu": 1400, "labels": {"lab": "north"}}


@pytest.fixture
def api(shared: Service) -> Iterator[Service]:
    """A running service, without interfaces before and after."""
    shared.seen = shared.verification().head_position
    yield shared
    for interface in shared.ok("GET", "/api/v1/interfaces")["interfaces"]:
        shared.call("DELETE", f"/api/v1/interfaces/{interface['spec']['name']}")
    eventually(lambda: set(links()) == {"lo"}, what="an empty namespace")


def exchange(
    service: Service, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], Any]:
    """One request with headers (underscores for dashes): (status, headers, JSON)."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {key.replace("_", "-"): value for key, value in headers.items()})
        response = connection.getresponse()
        text = response.read()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, json.loads(text) if text else None
    finally:
        connection.close()


def tunnels() -> dict[str, Any]:
    """All links but lo, whose counters grow with every request."""
    return {name: link for name, link in links().items() if name != "lo"}


def intents(service: Service) -> list[Any]:
    return [event for event in service.news() if isinstance(event.body, ev.Intent)]


def test_an_interface_reads_as_it_was_written(api: Service) -> None:
    status, headers, made = exchange(api, "POST", "/api/v1/interfaces", SPEC)
    assert status == 201
    assert headers["location"] == "/api/v1/interfaces/tun1"
    read_status, read_headers, read = exchange(api, "GET", headers["location"])
    assert read_status == 200
    assert SPEC.items() <= read["spec"].items()
    assert (made["id"], made["spec"], made["generation"]) == (read["id"], read["spec"], 1)
    assert headers["etag"] == read_headers["etag"]
    assert read["status"]["state"] == "applied"
    assert read["status"]["ifindex"] == links()["tun1"].ifindex
    assert sorted(read["status"]["observed"]["addresses"]) == sorted(ADDRESSES)


def test_put_declares_and_patch_merges(api: Service) -> None:
    assert exchange(api, "PUT", "/api/v1/interfaces/tun2", {"mtu": 1300})[0] == 201
    assert exchange(api, "PUT", "/api/v1/interfaces/tun2", {"mtu": 1350, "description": "b"})[0] == 200
    index = links()["tun2"].ifindex
    status, _, changed = exchange(
        api, "PATCH", "/api/v1/interfaces/tun2", {"addresses": ["10.2.0.1/30"], "description": None, "up": False}
    )
    assert (status, changed["spec"]["mtu"], changed["spec"]["description"]) == (200, 1350, "")
    link = links()["tun2"]
    assert (link.ifindex, link.up, [str(a) for a in link.addresses]) == (index, False, ["10.2.0.1/30"])
    assert exchange(api, "PATCH", "/api/v1/interfaces/tun2", {"name": "tun3"})[0] == 400
    status, _, problem = exchange(api, "PATCH", "/api/v1/interfaces/tun2", {"mode": "tap"})
    assert (status, problem["code"], problem["pointer"]) == (409, "needs_recreate", "/mode")
    assert exchange(api, "PATCH", "/api/v1/interfaces/tun2?recreate=true", {"mode": "tap"})[0] == 200
    assert links()["tun2"].ifindex != index


def test_errors_are_problem_details_with_a_pointer(api: Service) -> None:
    status, headers, problem = exchange(api, "POST", "/api/v1/interfaces", SPEC | {"mtu": "big"})
    assert (status, headers["content-type"]) == (400, "application/problem+json")
    assert (problem["code"], problem["pointer"], problem["status"]) == ("invalid_field", "/mtu", 400)
    assert exchange(api, "GET", "/api/v1/interfaces/none")[2]["code"] == "no_interface"
    assert exchange(api, "GET", "/api/v1/interfaces/none")[0] == 404
    status, _, problem = exchange(api, "POST", "/api/v1/interfaces?dryrun=true", SPEC)
    assert (status, problem["pointer"]) == (400, "/dryrun")
    assert "tun1" not in links(), "a misspelt dry_run must not do it for real"


def test_a_hundred_equal_keys_at_once_have_one_effect_and_one_answer(api: Service) -> None:
    with ThreadPoolExecutor(100) as pool:
        heard = list(
            pool.map(lambda _: exchange(api, "POST", "/api/v1/interfaces", SPEC, Idempotency_Key="k-100"), range(100))
        )
    assert {status for status, _, _ in heard} == {201}
    assert len({json.dumps(body, sort_keys=True) for _, _, body in heard}) == 1
    assert len({headers["tunledger-command-id"] for _, headers, _ in heard}) == 1
    assert len(intents(api)) == 1
    assert exchange(api, "POST", "/api/v1/interfaces", SPEC | {"mtu": 1300}, Idempotency_Key="k-100")[0] == 422


def test_a_refusal_under_a_key_is_the_same_refusal_again(api: Service) -> None:
    exchange(api, "POST", "/api/v1/interfaces", SPEC)
    first = exchange(api, "POST", "/api/v1/interfaces", SPEC, Idempotency_Key="again")
    assert first[0] == 409
    exchange(api, "DELETE", "/api/v1/interfaces/tun1")
    second = exchange(api, "POST", "/api/v1/interfaces", SPEC, Idempotency_Key="again")
    assert (second[0], second[2]) == (first[0], first[2])
    assert "tun1" not in links()


def test_the_original_api_takes_keys_too(api: Service) -> None:
    heard = [exchange(api, "POST", "/api/interface/create", {"mtu": 1400}, Idempotency_Key="old") for _ in range(3)]
    assert {(status, body["message"]) for status, _, body in heard} == {(200, "Interface tun0 created successfully")}
    assert len(intents(api)) == 1


def test_if_match_lets_only_the_first_of_two_writers_through(api: Service) -> None:
    _, headers, _ = exchange(api, "POST", "/api/v1/interfaces", SPEC)
    tag = headers["etag"]
    status, headers, _ = exchange(api, "PATCH", "/api/v1/interfaces/tun1", {"mtu": 1300}, If_Match=tag)
    assert status == 200
    assert headers["etag"] != tag
    status, _, problem = exchange(api, "PATCH", "/api/v1/interfaces/tun1", {"mtu": 1350}, If_Match=tag)
    assert (status, problem["code"]) == (412, "precondition_failed")
    assert links()["tun1"].mtu == 1300
    assert exchange(api, "PUT", "/api/v1/interfaces/tun1", {}, If_None_Match="*")[0] == 412


def test_a_dry_run_says_all_and_changes_nothing(api: Service) -> None:
    exchange(api, "POST", "/api/v1/interfaces", SPEC)
    head, before = api.ok("GET", "/api/v1/log/head"), tunnels()
    status, _, told = exchange(api, "PATCH", "/api/v1/interfaces/tun1?dry_run=true", {"mtu": 1300})
    assert status == 200
    (plan,) = told["plan"]
    assert plan["commands"] == ["ip link set tun1 mtu 1300"]
    assert plan["differences"] == [{"path": "tun1.mtu", "desired": 1300, "observed": 1400}]
    assert plan["steps"] == [{"step": "SetMtu", "ip": "ip link set tun1 mtu 1300", "name": "tun1", "mtu": 1300}]
    assert [event["type"] for event in told["events"]] == ["InterfaceReconfigured"]
    assert exchange(api, "POST", "/api/v1/interfaces?dry_run=true", SPEC)[0] == 409
    assert exchange(api, "POST", "/api/v1/interfaces?dry_run=true", {"mtu": 1})[0] == 400
    assert exchange(api, "DELETE", "/api/v1/interfaces/tun1?dry_run=true")[0] == 200
    assert api.ok("GET", "/api/v1/log/head") == head
    assert tunnels() == before


def test_respond_async_answers_at_once_with_where_to_ask(api: Service) -> None:
    status, headers, told = exchange(api, "POST", "/api/v1/interfaces", SPEC, Prefer="respond-async")
    assert status == 202
    where = headers["location"]
    assert where == f"/api/v1/commands/{told['command_id']}"
    done = eventually(lambda: (c := api.ok("GET", where))["state"] != "pending" and c, what="an outcome")
    assert done["state"] == "applied"
    assert done["interfaces"][0]["name"] == "tun1"
    assert exchange(api, "POST", "/api/v1/interfaces", SPEC, Prefer="respond-async")[0] == 409
    spec = SPEC | {"name": "tun2", "addresses": []}
    heard = [
        exchange(api, "POST", "/api/v1/interfaces", spec, Prefer="respond-async", Idempotency_Key="async")
        for _ in range(3)
    ]
    assert {status for status, _, _ in heard} == {202}
    assert len({headers["location"] for _, headers, _ in heard}) == 1


def test_a_batch_is_all_or_none(api: Service) -> None:
    create = [{"create": {"name": f"b{n}", "addresses": [f"10.9.{n}.1/24"]}} for n in range(5)]
    status, _, told = exchange(api, "POST", "/api/v1/batch", {"commands": create})
    assert status == 200
    assert [i["spec"]["name"] for i in told["interfaces"]] == [f"b{n}" for n in range(5)]
    before = tunnels()
    with Stranger("taken0") as stranger:
        bad = [{"change": {"name": "b0", "patch": {"mtu": 1300}}}, {"create": {"name": "taken0"}}]
        status, _, problem = exchange(api, "POST", "/api/v1/batch", {"commands": bad})
        assert (status, problem["pointer"]) == (409, "/commands/1/name")
        stranger.assert_untouched()
    assert tunnels() == before
    mixed = [
        {"change": {"name": "b0", "patch": {"mtu": 1300}}},
        {"start": {"name": "b1"}},
        {"delete": {"name": "b2"}},
    ]
    assert exchange(api, "POST", "/api/v1/batch", {"commands": mixed})[0] == 200
    assert (links()["b0"].mtu, links()["b1"].carrier, "b2" in links()) == (1300, True, False)
    large = [{"create": {"name": f"l{n}", "description": "x" * 200, "up": False}} for n in range(300)]
    assert len(json.dumps(large)) > 64 * 1024
    assert exchange(api, "POST", "/api/v1/batch?dry_run=true", {"commands": large})[0] == 200
    twice = [{"start": {"name": "b3"}}, {"delete": {"name": "b3"}}]
    assert exchange(api, "POST", "/api/v1/batch", {"commands": twice})[0] == 400


def test_a_batch_that_the_kernel_refuses_is_undone_whole(api: Service) -> None:
    """Two interfaces whose devices cannot both be read: the second is held by this test."""
    exchange(api, "POST", "/api/v1/batch", {"commands": [{"create": {"name": "c0"}}, {"create": {"name": "c1"}}]})
    before = {name: link.ifindex for name, link in links().items()}
    fd = tundev.open_node()
    try:
        tundev.attach(fd, "c1", Mode.TUN, multi_queue=False, exclusive=False)
        commands = [{"start": {"name": "c0"}}, {"start": {"name": "c1"}}]
        status, _, problem = exchange(api, "POST", "/api/v1/batch", {"commands": commands})
    finally:
        os.close(fd)
    assert (status, problem["code"], problem["errno"]) == (409, "device_busy", "EBUSY")
    outcomes = [e.body for e in api.news() if isinstance(e.body, ev.CommandFailed)]
    assert {(o.name, o.undone) for o in outcomes} == {("c0", True), ("c1", True)}
    assert {name: link.ifindex for name, link in links().items()} == before
    assert api.ok("GET", "/api/v1/interfaces/c0")["spec"]["processing"]["running"] is False
    assert links()["c0"].carrier is False


def test_a_change_that_nobody_confirms_takes_itself_back(api: Service) -> None:
    exchange(api, "POST", "/api/v1/interfaces", SPEC)
    status, headers, told = exchange(api, "PATCH", "/api/v1/interfaces/tun1?confirm_within_s=1", {"mtu": 1300})
    assert status == 200
    assert told["status"]["awaiting_confirmation"]
    assert links()["tun1"].mtu == 1300
    status, _, problem = exchange(api, "PATCH", "/api/v1/interfaces/tun1", {"mtu": 1200})
    assert (status, problem["code"]) == (409, "awaiting_confirmation")
    eventually(lambda: links()["tun1"].mtu == 1400, what="the way back")
    eventually(lambda: not api.ok("GET", "/api/v1/interfaces/tun1")["status"]["awaiting_confirmation"])
    command = headers["tunledger-command-id"]
    status, _, problem = exchange(api, "POST", f"/api/v1/commands/{command}/confirm")
    assert (status, problem["code"]) == (409, "not_awaiting")
    back = [e.body for e in api.news() if isinstance(e.body, ev.InterfaceReconfigured)][-1]
    assert back.request.reverts == command


def test_a_confirmed_change_stays_and_a_created_interface_can_be_unconfirmed(api: Service) -> None:
    _, headers, _ = exchange(api, "POST", "/api/v1/interfaces?confirm_within_s=2", SPEC)
    command = headers["tunledger-command-id"]
    confirmed = [
        exchange(api, "POST", f"/api/v1/commands/{command}/confirm", Idempotency_Key="confirm") for _ in range(2)
    ]
    assert [(status, body["confirmed"]) for status, _, body in confirmed] == [(200, True)] * 2
    exchange(api, "POST", "/api/v1/interfaces?confirm_within_s=1", {"name": "tun9"})
    eventually(lambda: "tun9" not in links(), what="the way back")
    assert "tun1" in links()
    exchange(api, "DELETE", "/api/v1/interfaces/tun1?confirm_within_s=1")
    assert "tun1" not in links()
    eventually(lambda: "tun1" in links() and links()["tun1"].mtu == 1400, what="the deleted one again")


def test_a_reason_is_kept_and_shown(api: Service) -> None:
    exchange(api, "POST", "/api/v1/interfaces", SPEC, Tunledger_Reason="ticket 42")
    exchange(api, "PATCH", "/api/v1/interfaces/tun1", {"mtu": 1300}, Tunledger_Reason="too big")
    exchange(api, "POST", "/api/v1/interfaces", SPEC)
    rejected, changed, made = eventually(
        lambda: (
            (h := api.ok("GET", "/api/v1/interfaces/tun1/history")["history"])[0]["outcome"] == "rejected" and h[:3]
        ),
        what="the refusal in history",
    )
    assert (made["reason"], changed["reason"], rejected["outcome"]) == ("ticket 42", "too big", "rejected")
    assert changed["changes"] == [{"path": "mtu", "old": 1400, "new": 1300}]
    assert (changed["outcome"], changed["origin"], changed["actor"], changed["user"]) == (
        "applied",
        "client",
        "uid:0",
        "root",
    )
    assert changed["took_us"] > 0


def test_list_filters_and_pages(api: Service) -> None:
    for n in range(5):
        exchange(api, "PUT", f"/api/v1/interfaces/p{n}", {"labels": {"lab": "a" if n % 2 else "b"}})
    exchange(api, "PUT", "/api/v1/interfaces/q0", {"mode": "tap"})

    def names(query: str) -> list[str]:
        return [i["spec"]["name"] for i in api.ok("GET", "/api/v1/interfaces" + query)["interfaces"]]

    assert names("?name=p*") == [f"p{n}" for n in range(5)]
    assert names("?label=lab=a") == ["p1", "p3"]
    assert names("?mode=tap") == ["q0"]
    assert names("?state=applied&name=p1") == ["p1"]
    seen: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = api.ok("GET", f"/api/v1/interfaces?limit=2{cursor and '&cursor=' + cursor}")
        seen += [i["spec"]["name"] for i in page["interfaces"]]
        cursor = page["next"]
    assert seen == [*(f"p{n}" for n in range(5)), "q0"]


def test_drift_is_told_and_reconcile_mends_it(api: Service) -> None:
    exchange(api, "POST", "/api/v1/interfaces", SPEC | {"drift": "report"})
    with IPRoute() as host:  # type: ignore[no-untyped-call]  # pyroute2 has no types
        host.link("set", index=links()["tun1"].ifindex, mtu=1350)
    (drift,) = api.ok("GET", "/api/v1/drift")["drift"]
    assert drift["differences"] == [{"path": "tun1.mtu", "desired": 1400, "observed": 1350}]
    assert api.ok("POST", "/api/v1/reconcile?dry_run=true")["plan"] == [drift]
    assert links()["tun1"].mtu == 1350
    assert api.ok("POST", "/api/v1/reconcile")["repaired"] == ["tun1"]
    assert links()["tun1"].mtu == 1400
    assert api.ok("GET", "/api/v1/drift")["drift"] == []
    first, second = (exchange(api, "POST", "/api/v1/reconcile", Idempotency_Key="mend") for _ in range(2))
    assert (first[0], first[2]) == (second[0], second[2])


def test_a_client_that_hangs_up_has_its_command_carried_out_all_the_same(api: Service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=30)
    connection.request("POST", "/api/v1/interfaces", json.dumps(SPEC))
    # The kernel must be able to say whose the connection is: it is closed only once the request was taken.
    eventually(lambda: intents(api), what="the intent")
    connection.close()
    eventually(lambda: api.ok("GET", "/api/v1/interfaces/tun1")["status"]["state"] == "applied", what="the outcome")


def test_keys_and_deadlines_hold_over_a_kill(service: Service) -> None:
    service.start()
    first = exchange(service, "POST", "/api/v1/interfaces", SPEC, Idempotency_Key="crash")
    _, headers, _ = exchange(service, "PATCH", "/api/v1/interfaces/tun1?confirm_within_s=3", {"mtu": 1300})
    begun = time.monotonic()
    service.kill()
    service.start()
    again = exchange(service, "POST", "/api/v1/interfaces", SPEC, Idempotency_Key="crash")
    assert (again[0], again[2]) == (first[0], first[2])
    assert links()["tun1"].mtu == 1300 or time.monotonic() - begun > 3
    eventually(lambda: links()["tun1"].mtu == 1400, what="the way back after the restart")
    assert service.verification().problems == []
    assert exchange(service, "POST", f"/api/v1/commands/{headers['tunledger-command-id']}/confirm")[0] == 409


def test_a_deadline_that_passed_while_the_service_was_down_is_kept_at_its_start(service: Service) -> None:
    service.start()
    exchange(service, "POST", "/api/v1/interfaces", SPEC)
    exchange(service, "PATCH", "/api/v1/interfaces/tun1?confirm_within_s=1", {"mtu": 1300})
    service.kill()
    threading.Event().wait(1.2)  # the deadline itself is what passes here
    service.start()
    eventually(lambda: links()["tun1"].mtu == 1400, what="the way back")


def test_a_key_whose_command_a_crash_cut_off_gets_the_answer_of_its_recovery(service: Service) -> None:
    """Killed right after the intent was durable: the client heard nothing, asks again, and there is one effect."""
    service.start()
    service.kill()
    service.spawn(TUNLEDGER_TEST_FAILPOINTS="kill@engine.intent.after")
    service.wait_ready()
    with pytest.raises((OSError, http.client.HTTPException)):
        exchange(service, "POST", "/api/v1/interfaces", SPEC, Idempotency_Key="cut")
    service.start()
    status, headers, told = exchange(service, "POST", "/api/v1/interfaces", SPEC, Idempotency_Key="cut")
    assert (status, told["spec"]["name"]) == (201, "tun1")
    (intent,) = [e for e in service.events() if isinstance(e.body, ev.Intent)]
    assert intent.command_id == headers["tunledger-command-id"]
    (outcome,) = [e.body for e in service.events() if isinstance(e.body, ev.Outcome)]
    assert outcome.by == "recovery"


def test_a_refusal_under_a_key_outlives_a_crash(service: Service) -> None:
    """What the client heard is what it hears again, also when it would be done now."""
    service.start()
    first = service.call("DELETE", "/api/interface/delete", headers={"Idempotency-Key": "x"})
    assert first[0] == 400
    service.kill()
    service.start()
    service.ok("POST", "/api/interface/create")
    assert service.call("DELETE", "/api/interface/delete", headers={"Idempotency-Key": "x"}) == first
    assert "tun0" in links()
