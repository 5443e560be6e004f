"""Puts routes, error hooks and the gate together into the ASGI application."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from litestar import Litestar, Request, Response, get
from litestar.di import NamedDependency, Provide
from litestar.enums import HttpMethod
from litestar.exceptions import HTTPException
from litestar.routes import HTTPRoute
from litestar.types import ASGIApp

from service import __version__
from service.api.access import Gate, OwnerOf
from service.api.captures import CapturesController, KeptController
from service.api.classic import InterfaceController
from service.api.counters import CountersController
from service.api.events import EventLog, EventsController
from service.api.interfaces import CommandsController, InterfacesController
from service.api.openapi import SchemaController
from service.api.orders import Orders
from service.api.problems import BODY_MAX_BYTES, answer, from_anything, from_domain, from_http
from service.api.read import LogView
from service.api.traffic import Traffic
from service.domain.errors import TunledgerError
from service.reconcile.captures import Captures
from service.store.counters import CounterReader
from service.store.snapshots import Progress


@get("/health")
async def health(
    orders: NamedDependency[Orders], audit: NamedDependency[Callable[[], Progress] | None]
) -> Response[bytes]:
    """Whether commands can be taken now; 503 with the reasons if not."""
    # Workers are asked whether they answer, which can take half a second if one does not.
    reasons = await asyncio.to_thread(orders.engine.health)
    state = orders.engine.state
    body: dict[str, Any] = {
        "status": "healthy" if not reasons else "unhealthy",
        "service": "tunledger",
        "version": __version__,
        "node": orders.engine.node,
        "interfaces": len(state.interfaces),
        "degraded": len(orders.engine.troubles),
        "log_position": state.position,
    }
    if audit is not None:
        progress = audit()
        body["audit"] = {"checked": progress.checked, "target": progress.target, "whole": progress.whole}
    if reasons:
        body |= {"error": "; ".join(reasons), "reasons": reasons}
    return answer(body, 503 if reasons else 200)


def application(
    orders: Orders,
    view: LogView,
    event_log: EventLog,
    counters: CounterReader,
    *,
    captures: Captures,
    traffic: Traffic,
    owner_of: OwnerOf,
    own_uid: int,
    audit: Callable[[], Progress] | None = None,
) -> ASGIApp:
    """The whole API behind its gate.

    Args:
        audit: how far the log has been checked in the background; None where nothing checks it.
    """

    async def options(request: Request[Any, Any, Any]) -> Response[None] | None:
        """OPTIONS, with all methods of the path: litestar's own answer knows those of the first handler only.

        Not a plain function: litestar would call that in a thread, for every request.
        """
        if request.method != HttpMethod.OPTIONS:
            return None
        allowed = allowed_at[request.scope["path_template"]]
        return Response(None, status_code=HTTPStatus.NO_CONTENT, headers={"Allow": ", ".join(sorted(allowed))})

    app = Litestar(
        route_handlers=[
            health,
            InterfaceController,
            InterfacesController,
            CommandsController,
            EventsController,
            CountersController,
            CapturesController,
            KeptController,
            SchemaController,
        ],
        dependencies={
            "audit": Provide(lambda: audit, sync_to_thread=False),
            "captures": Provide(lambda: captures, sync_to_thread=False),
            "counters": Provide(lambda: counters, sync_to_thread=False),
            "event_log": Provide(lambda: event_log, sync_to_thread=False),
            "orders": Provide(lambda: orders, sync_to_thread=False),
            "traffic_of": Provide(lambda: traffic, sync_to_thread=False),
            "view": Provide(lambda: view, sync_to_thread=False),
        },
        exception_handlers={
            TunledgerError: from_domain,
            HTTPException: from_http,
            Exception: from_anything,
        },
        before_request=options,
        request_max_body_size=BODY_MAX_BYTES,
        openapi_config=None,
        logging_config=None,
    )
    allowed_at = {route.path_format: route.methods for route in app.routes if isinstance(route, HTTPRoute)}
    return Gate(app, owner_of=owner_of, own_uid=own_uid)
