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
    ErrorCode.VERSION_CONFLICT: HTTPStatus.CONFLICT,
    ErrorCode.DEVICE_BUSY: HTTPStatus.CONFLICT,
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


def from_domain(_request: Request[Any, Any, Any], error: TunledgerError) -> Response[bytes]:
    """litestar's hook for our own errors."""
    return refusal(error)


def from_http(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """litestar's hook for its errors: unknown paths, wrong methods, bodies over the limit."""
    match error.status_code:
        case HTTPStatus.NOT_FOUND:
            text = f"there is no {request.scope['path']} here"
        case HTTPStatus.METHOD_NOT_ALLOWED:
            text = f"{request.method} does not go with {request.scope['path']}"
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            text = f"body: over {BODY_MAX_BYTES} bytes"
        case _:
            text = error.detail or HTTPStatus(error.status_code).phrase
    return answer({"error": text}, error.status_code, error.headers)


def from_anything(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """A mistake of ours: told in the log with its trace, to the client without."""
    log.exception("unexpected error", path=request.scope["path"], exc_info=error)
    return answer({"error": "internal error; the service's log has the details"}, HTTPStatus.INTERNAL_SERVER_ERROR)


BODY_MAX_BYTES = 64 * 1024
