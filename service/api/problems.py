"""The one table from error code to HTTP status, and how an error looks on the wire."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException

from service.domain.errors import ErrorCode, TunledgerError

STATUS: Final[Mapping[ErrorCode, HTTPStatus]] = {
    ErrorCode.INVALID_JSON: HTTPStatus.BAD_REQUEST,
    ErrorCode.INVALID_FIELD: HTTPStatus.BAD_REQUEST,
    ErrorCode.SUBNET_OVERLAP: HTTPStatus.BAD_REQUEST,
    ErrorCode.NO_INTERFACE: HTTPStatus.BAD_REQUEST,
    ErrorCode.UNAUTHORIZED: HTTPStatus.UNAUTHORIZED,
    ErrorCode.FORBIDDEN_HOST: HTTPStatus.FORBIDDEN,
    ErrorCode.NOT_FOUND: HTTPStatus.NOT_FOUND,
    ErrorCode.METHOD_NOT_ALLOWED: HTTPStatus.METHOD_NOT_ALLOWED,
    ErrorCode.INTERFACE_EXISTS: HTTPStatus.CONFLICT,
    ErrorCode.NAME_TAKEN: HTTPStatus.CONFLICT,
    ErrorCode.ALREADY_RUNNING: HTTPStatus.CONFLICT,
    ErrorCode.NOT_RUNNING: HTTPStatus.CONFLICT,
    ErrorCode.NOT_INSPECTED: HTTPStatus.CONFLICT,
    ErrorCode.PART_OF_CHAIN: HTTPStatus.CONFLICT,
    ErrorCode.TARGET_MODE: HTTPStatus.CONFLICT,
    ErrorCode.VERSION_CONFLICT: HTTPStatus.CONFLICT,
    ErrorCode.DEVICE_BUSY: HTTPStatus.CONFLICT,
    ErrorCode.NEEDS_RECREATE: HTTPStatus.CONFLICT,
    ErrorCode.NETNS_MISSING: HTTPStatus.CONFLICT,
    ErrorCode.AWAITING_CONFIRMATION: HTTPStatus.CONFLICT,
    ErrorCode.NOT_AWAITING: HTTPStatus.CONFLICT,
    ErrorCode.PRECONDITION_FAILED: HTTPStatus.PRECONDITION_FAILED,
    ErrorCode.KEY_REUSED: HTTPStatus.UNPROCESSABLE_ENTITY,
    ErrorCode.BODY_TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    ErrorCode.PERMISSION_DENIED: HTTPStatus.INTERNAL_SERVER_ERROR,
    ErrorCode.KERNEL_REFUSED: HTTPStatus.INTERNAL_SERVER_ERROR,
    ErrorCode.VERIFY_FAILED: HTTPStatus.INTERNAL_SERVER_ERROR,
    ErrorCode.INTERNAL: HTTPStatus.INTERNAL_SERVER_ERROR,
    ErrorCode.TUN_MISSING: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.DEVICE_GONE: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.WORKER_FAILED: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.LOG_UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.LOG_CORRUPT: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.SCHEMA_MISMATCH: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.ALREADY_SERVING: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.OVERLOADED: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.SHUTTING_DOWN: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.OUTCOME_UNKNOWN: HTTPStatus.SERVICE_UNAVAILABLE,
    ErrorCode.TOO_MANY_CAPTURES: HTTPStatus.TOO_MANY_REQUESTS,
    ErrorCode.CAPTURE_FAILED: HTTPStatus.INSUFFICIENT_STORAGE,
    ErrorCode.LOG_FULL: HTTPStatus.INSUFFICIENT_STORAGE,
}

RETRY_AFTER_S = 1  # what a busy service asks for; queues drain in far less

log = structlog.get_logger("tunledger.api")


def answer(content: Any, status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None) -> Response[bytes]:
    """A JSON answer. Encoded here, once, so that every answer of ours looks alike."""
    return Response(
        msgspec.json.encode(content),
        status_code=status,
        media_type="application/json",
        headers=dict(headers or {}),
    )


def refusal(error: TunledgerError, headers: Mapping[str, str] | None = None) -> Response[bytes]:
    """An error in the form of the original API: `{"error": text}`."""
    status = STATUS[error.code]
    extra = dict(headers or {})
    if error.retry and status is HTTPStatus.SERVICE_UNAVAILABLE:
        extra["Retry-After"] = str(RETRY_AFTER_S)
    return answer({"error": error.message}, status, extra)


def problem(error: TunledgerError, headers: Mapping[str, str] | None = None) -> Response[bytes]:
    """An error as problem details (RFC 9457), the form of /api/v1."""
    status = status_v1(error.code)
    extra = dict(headers or {})
    if error.retry and status is HTTPStatus.SERVICE_UNAVAILABLE:
        extra["Retry-After"] = str(RETRY_AFTER_S)
    return Response(
        msgspec.json.encode(problem_json(error)), status_code=status, media_type=PROBLEM_TYPE, headers=extra
    )


def problem_json(error: TunledgerError) -> dict[str, Any]:
    """The members of problem details: the stable `code`, the JSON pointer of the field, the errno's name."""
    status = status_v1(error.code)
    found: dict[str, Any] = {
        "type": f"urn:tunledger:error:{error.code.value}",
        "title": error.code.value.replace("_", " "),
        "status": int(status),
        "detail": error.message,
        "code": error.code.value,
        "retry": error.retry,
    }
    if error.field is not None:
        found["pointer"] = "/" + error.field.replace("~", "~0").replace("/", "~1").replace(".", "/")
    if error.errno_name is not None:
        found["errno"] = error.errno_name
    return found


def status_v1(code: ErrorCode) -> HTTPStatus:
    """The status of an error in /api/v1: as in the original API, but that what is not there is 404."""
    return HTTPStatus.NOT_FOUND if code is ErrorCode.NO_INTERFACE else STATUS[code]


PROBLEM_TYPE = "application/problem+json"


def _is_v1(request: Request[Any, Any, Any]) -> bool:
    return str(request.scope["path"]).startswith("/api/v1/")


def from_domain(request: Request[Any, Any, Any], error: TunledgerError) -> Response[bytes]:
    """litestar's hook for our own errors."""
    return problem(error) if _is_v1(request) else refusal(error)


def from_http(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """litestar's hook for its errors: unknown paths, wrong methods, bodies over the limit."""
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            text = f"there is no {request.scope['path']} here"
        case HTTPStatus.METHOD_NOT_ALLOWED:
            text = f"{request.method} does not go with {request.scope['path']}"
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            limit = BATCH_MAX_BYTES if request.scope["path"] == "/api/v1/batch" else BODY_MAX_BYTES
            text = f"body: over {limit} bytes"
        case _:
            text = _about(error) or error.detail or HTTPStatus(error.status_code).phrase
    if not _is_v1(request):
        return answer({"error": text}, error.status_code, error.headers)
    code = _CODES.get(HTTPStatus(error.status_code), ErrorCode.INVALID_FIELD)
    members = problem_json(TunledgerError(code, text, field=_field(error))) | {"status": error.status_code}
    headers = dict(error.headers or {})
    return Response(
        msgspec.json.encode(members), status_code=error.status_code, media_type=PROBLEM_TYPE, headers=headers
    )


def _field(error: HTTPException) -> str | None:
    """The parameter that litestar could not make sense of."""
    match error.extra:
        case [{"key": str(key)}, *_]:
            return key
        case _:
            return None


def _about(error: HTTPException) -> str | None:
    """litestar's words on a parameter, led by its name and without names of Python; its `detail` names the URL only."""
    match error.extra:
        case [{"key": str(key), "message": str(message)}, *_]:
            words = message.partition(", got ")[0].replace("`int`", "a whole number")
            return f"{key}: {words[:1].lower()}{words[1:]}"
        case _:
            return None


_CODES: Final[Mapping[HTTPStatus, ErrorCode]] = {
    HTTPStatus.NOT_FOUND: ErrorCode.NOT_FOUND,
    HTTPStatus.METHOD_NOT_ALLOWED: ErrorCode.METHOD_NOT_ALLOWED,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: ErrorCode.BODY_TOO_LARGE,
    HTTPStatus.INTERNAL_SERVER_ERROR: ErrorCode.INTERNAL,
}


def from_anything(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """A mistake of ours: told in the log with its trace, to the client without."""
    log.exception("unexpected error", path=request.scope["path"], exc_info=error)
    return from_domain(request, TunledgerError(ErrorCode.INTERNAL, "internal error; the service's log has the details"))


BODY_MAX_BYTES = 64 * 1024
BATCH_MAX_BYTES = 1024 * 1024  # a thousand commands of up to a kilobyte
