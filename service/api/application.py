"""Puts routes, error hooks and the gate together into the ASGI application."""

import asyncio
from typing import Any

from litestar import Litestar, Response, get
from litestar.di import Provide
from litestar.exceptions import HTTPException
from litestar.types import ASGIApp

from service import __version__
from service.api.access import Gate, OwnerOf
from service.api.classic import InterfaceController
from service.api.interfaces import CommandsController, InterfacesController
from service.api.orders import Orders
from service.api.problems import BODY_MAX_BYTES, answer, from_anything, from_domain, from_http
from service.api.read import LogView
from service.api.v1 import V1Controller
from service.domain.errors import TunledgerError


@get("/health")
async def health(orders: Orders) -> Response[bytes]:
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
    if reasons:
        body |= {"error": "; ".join(reasons), "reasons": reasons}
    return answer(body, 503 if reasons else 200)


def application(orders: Orders, view: LogView, *, owner_of: OwnerOf, own_uid: int) -> ASGIApp:
    """The whole API behind its gate."""
    app = Litestar(
        route_handlers=[health, InterfaceController, InterfacesController, CommandsController, V1Controller],
        dependencies={
            "orders": Provide(lambda: orders, sync_to_thread=False),
            "view": Provide(lambda: view, sync_to_thread=False),
        },
        exception_handlers={
            TunledgerError: from_domain,
            HTTPException: from_http,
            Exception: from_anything,
        },
        request_max_body_size=BODY_MAX_BYTES,
        openapi_config=None,
        logging_config=None,
    )
    return Gate(app, owner_of=owner_of, own_uid=own_uid)
