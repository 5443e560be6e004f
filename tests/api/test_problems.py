"""Errors on the wire: one table from code to status, and one shape."""

import json
from http import HTTPStatus

import pytest

from service.api import problems
from service.domain.errors import ErrorCode, TunledgerError
from tests.api.running import Running


def test_every_code_has_a_status() -> None:
    assert set(problems.STATUS) == set(ErrorCode)


def test_every_status_is_one_of_an_error() -> None:
    assert all(400 <= status < 600 for status in problems.STATUS.values())


@pytest.mark.parametrize("code", ErrorCode)
def test_an_error_is_its_text_and_nothing_else(code: ErrorCode) -> None:
    response = problems.refusal(TunledgerError(code, f"why {code}", field="mtu", errno_name="EBUSY"))
    assert json.loads(response.content) == {"error": f"why {code}"}
    assert response.status_code == problems.STATUS[code]
    assert response.media_type == "application/json"


@pytest.mark.parametrize("code", [code for code, status in problems.STATUS.items() if status == 503])
def test_what_passes_says_when_to_come_back(code: ErrorCode) -> None:
    for retry in (True, False):
        response = problems.refusal(TunledgerError(code, "why", retry=retry))
        assert ("retry-after" in {name.lower() for name in response.headers}) is retry


def test_only_what_is_busy_says_when_to_come_back() -> None:
    """A full disk, say, is not mended in a second."""
    for code in (ErrorCode.LOG_FULL, ErrorCode.DEVICE_BUSY, ErrorCode.VERIFY_FAILED):
        response = problems.refusal(TunledgerError(code, "why", retry=True))
        assert "retry-after" not in {name.lower() for name in response.headers}


WRONG_METHODS = [
    ("GET", "/api/interface/create"),
    ("PUT", "/api/interface/create"),
    ("DELETE", "/api/interface/create"),
    ("POST", "/api/interface/status"),
    ("GET", "/api/interface/start"),
    ("GET", "/api/interface/stop"),
    ("PATCH", "/api/interface/configure"),
    ("GET", "/api/interface/delete"),
    ("POST", "/api/interface/delete"),
    ("POST", "/health"),
    ("HEAD", "/health"),
]


@pytest.mark.parametrize(("method", "where"), WRONG_METHODS)
def test_a_wrong_method_is_405(idle: Running, method: str, where: str) -> None:
    answer = idle.call(method, where)
    assert answer.status_code == HTTPStatus.METHOD_NOT_ALLOWED
    if method != "HEAD":
        assert answer.json() == {"error": f"{method} does not go with {where}"}


@pytest.mark.parametrize(
    "where",
    ["/", "/api", "/api/interface", "/api/interface/nothing", "/api/v2/history", "/api/interface/create/x"],
)
def test_an_unknown_path_is_404(idle: Running, where: str) -> None:
    answer = idle.call("GET", where)
    assert answer.status_code == HTTPStatus.NOT_FOUND
    assert answer.json() == {"error": f"there is no {where} here"}


def test_a_mistake_of_ours_is_500_without_its_details(api: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> object:
        raise RuntimeError("secret")

    monkeypatch.setattr("service.api.classic._status", fail)
    assert api.call("POST", "/api/interface/create").status_code == 200
    answer = api.call("GET", "/api/interface/status")
    assert answer.status_code == HTTPStatus.INTERNAL_SERVER_ERROR
    assert answer.json() == {"error": "internal error; the service's log has the details"}


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "limit="])
def test_a_bad_query_is_400(idle: Running, query: str) -> None:
    answer = idle.call("GET", f"/api/v1/history?{query}")
    assert answer.status_code == HTTPStatus.BAD_REQUEST
    assert answer.json()["detail"].startswith("limit: expected a whole number")
    assert "`" not in answer.json()["detail"], "names of Python"


@pytest.mark.parametrize(
    ("given", "kept"),
    [("ticket 4711", "ticket 4711"), ("x" * 10_000, "")],
)
def test_why_somebody_asked_is_in_the_log_also_where_it_was_refused(api: Running, given: str, kept: str) -> None:
    answer = api.call("POST", "/api/v1/interfaces", {"name": "tun0", "mtu": 7}, headers={"Tunledger-Reason": given})
    assert answer.status_code == HTTPStatus.BAD_REQUEST, answer.text
    (rejected,) = api.rejections(1)
    assert rejected.request.reason == kept
