"""Replies to writes, of both APIs: from what came of the command, so that recovery gives the same one."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import msgspec
from litestar import Response

from service.api.problems import PROBLEM_TYPE, RETRY_AFTER_S, STATUS, problem_json, status_v1
from service.api.resources import MISSING, interface_resource
from service.domain import commands as cmd
from service.domain.errors import TunledgerError
from service.domain.values import CommandId
from service.reconcile.answer import Finished
from service.store.answers import Reply

COMMAND_ID = "Tunledger-Command-Id"

# What the original API says when it worked, by call.
_SUCCESS = {
    "create": "Interface {} created successfully",
    "configure": "Interface {} configured successfully",
    "start": "Packet processing on {} started successfully",
    "stop": "Packet processing on {} stopped successfully",
    "delete": "Interface {} deleted successfully",
}
ASYNC = "async:"  # before a call that was answered before it had an outcome


def render(
    request: cmd.Request, command_id: CommandId, finished: Sequence[Finished], error: TunledgerError | None
) -> Reply:
    """The reply to a command that has its outcome, or was refused."""
    headers: dict[str, str] = {COMMAND_ID: command_id}
    if request.via == "classic":
        if error is not None:
            return _json(STATUS[error.code], {"error": error.message}, headers)
        message = _SUCCESS[request.call].format(finished[0].name)
        return _json(200, {"status": "success", "message": message}, headers)
    if request.call.startswith(ASYNC) and (error is None or finished):
        return accepted(command_id)
    if error is not None:
        extra = {"Retry-After": str(RETRY_AFTER_S)} if error.retry and status_v1(error.code) == 503 else {}
        members = problem_json(error) | {"command_id": command_id}
        return _json(status_v1(error.code), members, headers | extra, PROBLEM_TYPE)
    if request.call == "confirm":
        told = {"command_id": command_id, "confirms": request.confirms, "confirmed": True}
        return _json(200, told, headers)
    if request.call == "batch":
        return _json(200, {"command_id": command_id, "interfaces": [_resource(f, request) for f in finished]}, headers)
    (only,) = finished
    if only.interface is None:
        return _json(
            200, {"command_id": command_id, "id": only.interface_id, "name": only.name, "deleted": True}, headers
        )
    headers["ETag"] = only.interface.etag
    headers["Location"] = f"/api/v1/interfaces/{quote(only.name, safe='')}"  # names may have "#", "?", "<"
    return _json(201 if only.created else 200, _resource(only, request), headers)


def accepted(command_id: CommandId) -> Reply:
    """The reply to `Prefer: respond-async`: where to ask what became of it."""
    where = f"/api/v1/commands/{command_id}"
    headers: dict[str, str] = {COMMAND_ID: command_id, "Location": where, "Preference-Applied": "respond-async"}
    return _json(202, {"command_id": command_id, "state": "pending", "location": where}, headers)


def response(reply: Reply) -> Response[bytes]:
    """A reply on its way out."""
    return Response(reply.body, status_code=reply.status, media_type=reply.media_type, headers=dict(reply.headers))


def _resource(finished: Finished, request: cmd.Request) -> dict[str, Any]:
    """An interface as its command left it; counters are not part of what a command did."""
    if finished.interface is None:
        return {"id": finished.interface_id, "name": finished.name, "deleted": True}
    spec = finished.interface.spec
    resource = interface_resource(
        finished.interface,
        finished.link,
        trouble=None,
        awaiting=None,
        counters={},
        running=spec is not None and spec.processing.running,
        applied=spec.processing if spec is not None and spec.processing.running else None,
        missing=finished.waits or MISSING,
    )
    if request.confirm_by:
        resource["status"]["awaiting_confirmation"] = {"confirm_by": request.confirm_by}
    return resource


def _json(status: int, value: Any, headers: dict[str, str], media_type: str = "application/json") -> Reply:
    return Reply(int(status), msgspec.json.encode(value), headers, media_type)
