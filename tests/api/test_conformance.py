"""What fuzzing and a second look found wrong in the API once, each told by itself."""

from typing import Any

import pytest

from tests.api.running import Running


def problem(api: Running, *request: Any, status: int = 400, **more: Any) -> dict[str, Any]:
    response = api.call(*request, **more)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = response.json()
    return found


def test_an_owner_with_a_nul_is_no_user(api: Running) -> None:
    assert problem(api, "POST", "/api/v1/interfaces", {"name": "a", "owner": "a\0b"})["pointer"] == "/owner"


@pytest.mark.parametrize("before", ["9223372036854775808", "9" * 40, "0", "null", "x"])
def test_a_position_fits_the_database(api: Running, before: str) -> None:
    found = problem(api, "GET", f"/api/v1/history?before={before}")
    assert found["pointer"] == "/before"
    assert found["detail"].startswith("before: ")


@pytest.mark.parametrize("cursor", ["", "%21%21%21%21", "YQ%3D%3D", "YR", "x", "4pyT"])
def test_a_cursor_is_one_that_was_given(api: Running, cursor: str) -> None:
    assert problem(api, "GET", f"/api/v1/interfaces?cursor={cursor}")["pointer"] == "/cursor"


def test_a_page_before_everything_is_empty_and_one_of_nothing_is_not_there(api: Running) -> None:
    interface_id = api.call("PUT", "/api/v1/interfaces/lab0", {}).json()["id"]
    for known in (f"history?id={interface_id}&", "interfaces/lab0/history?"):
        assert api.call("GET", f"/api/v1/{known}before=1").json() == {"history": [], "next": None}
    for unknown in ("history?id=nobody&", "interfaces/lab9/history?"):
        assert problem(api, "GET", f"/api/v1/{unknown}before=1", status=404)["code"] == "not_found"


@pytest.mark.parametrize("where", ["", "/lab0", "/lab0/history"])
def test_a_misspelt_parameter_is_refused_on_reads_too(api: Running, where: str) -> None:
    api.call("POST", "/api/v1/interfaces", {"name": "lab0"})
    assert problem(api, "GET", f"/api/v1/interfaces{where}?stat=degraded")["pointer"] == "/stat"


def test_a_parameter_is_given_once(api: Running) -> None:
    found = problem(api, "POST", "/api/v1/interfaces?dry_run=false&dry_run=true", {"name": "a"})
    assert (found["code"], found["pointer"]) == ("invalid_field", "/dry_run")
    assert problem(api, "GET", "/api/v1/interfaces?limit=1&limit=2")["pointer"] == "/limit"
    assert api.call("GET", "/api/v1/interfaces?label=a&label=b").status_code == 200


@pytest.mark.parametrize(
    ("header", "value"),
    [("If-Match", 'rubbish "x"'), ("If-Match", ""), ("If-None-Match", '"x"'), ("If-None-Match", "")],
)
def test_a_precondition_is_never_passed_over(api: Running, header: str, value: str) -> None:
    found = problem(api, "PUT", "/api/v1/interfaces/lab0", {}, headers={header: value})
    assert found["pointer"] == f"/{header}"
    assert api.intents() == []


def test_several_etags_are_one_precondition(api: Running) -> None:
    etag = api.call("PUT", "/api/v1/interfaces/lab0", {}).headers["etag"]
    changed = api.call("PATCH", "/api/v1/interfaces/lab0", {"mtu": 1300}, headers={"If-Match": f'"other", W/{etag}'})
    assert changed.status_code == 200


def test_a_location_is_a_reference(api: Running) -> None:
    response = api.call("POST", "/api/v1/interfaces", {"name": 'a<b#?"c'})
    assert response.headers["location"] == "/api/v1/interfaces/a%3Cb%23%3F%22c"
    assert api.call("GET", response.headers["location"]).json()["spec"]["name"] == 'a<b#?"c'


@pytest.mark.parametrize(("method", "where"), [("PUT", "/lab0"), ("PATCH", "/lab0"), ("POST", "")])
def test_a_body_that_got_lost_resets_nothing(api: Running, method: str, where: str) -> None:
    api.call("PUT", "/api/v1/interfaces/lab0", {"mtu": 1300})
    assert problem(api, method, f"/api/v1/interfaces{where}")["code"] == "invalid_json"
    assert api.call("GET", "/api/v1/interfaces/lab0").json()["spec"]["mtu"] == 1300


def test_null_is_not_given_in_a_batch_too(api: Running) -> None:
    created = api.call("POST", "/api/v1/batch", {"commands": [{"create": {"name": "lab0", "mtu": None}}]})
    assert created.json()["interfaces"][0]["spec"]["mtu"] == 1500


def test_options_has_all_methods(api: Running) -> None:
    for path, methods in (("", "GET, OPTIONS, POST"), ("/lab0", "DELETE, GET, OPTIONS, PATCH, PUT")):
        response = api.call("OPTIONS", f"/api/v1/interfaces{path}")
        assert (response.status_code, response.headers["allow"]) == (204, methods)


def test_the_gate_refuses_in_the_form_of_the_path(api: Running) -> None:
    foreign = {"Origin": "http://elsewhere.example"}
    found = problem(api, "GET", "/api/v1/interfaces", headers=foreign, status=403)
    assert found["code"] == "forbidden_host"
    assert api.call("GET", "/api/interface/status", headers=foreign).json().keys() == {"error"}


def test_a_dry_run_confirms_nothing(api: Running) -> None:
    made = api.call("POST", "/api/v1/interfaces?confirm_within_s=60", {"name": "lab0"})
    confirm = f"/api/v1/commands/{made.headers['tunledger-command-id']}/confirm"
    preview = api.call("POST", f"{confirm}?dry_run=true").json()
    assert (preview["dry_run"], [event["type"] for event in preview["events"]]) == (True, ["ChangeConfirmed"])
    assert api.call("GET", "/api/v1/interfaces/lab0").json()["status"]["awaiting_confirmation"] is not None
    assert api.call("POST", confirm).json()["confirmed"] is True
    assert problem(api, "POST", f"{confirm}?dry_run=true", status=409)["code"] == "not_awaiting"


@pytest.mark.parametrize("query", ["", "?dry_run=true"])
def test_a_dry_run_refuses_the_key_that_the_run_would_refuse(api: Running, query: str) -> None:
    found = problem(api, "POST", f"/api/v1/reconcile{query}", headers={"Idempotency-Key": "two words"})
    assert found["pointer"] == "/Idempotency-Key"
