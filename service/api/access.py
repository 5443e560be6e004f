"""Who may call: this host only, by a loopback name, and only processes of root or of the service's own user.

A loopback address alone proves nothing: every user of the host has it, and so has a web page in a browser on it.
So the Host header must be loopback too (DNS rebinding), a page's Origin is refused (cross-site requests), and the
kernel is asked whose the connection is. Tokens and TLS will be two more ways to become a `Caller`, here.
"""

import functools
import pwd
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, cast

from litestar import Request
from litestar.enums import ScopeType
from litestar.types import ASGIApp, Receive, Scope, Send

from service import failpoints
from service.api.problems import from_domain
from service.domain.errors import ErrorCode, TunledgerError

Endpoint = tuple[str, int]
OwnerOf = Callable[[Endpoint, Endpoint], int]  # (client, server) -> uid; raises TunledgerError: unauthorized


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request. `actor` goes into the log with what they order; `user` is their name at this time."""

    actor: str
    user: str
    peer: str


def loopback_host(header: str) -> bool:
    """Whether a Host header names this host by loopback: localhost, 127.0.0.0/8 or [::1], with or without a port."""
    host = header.strip().lower()
    if host.startswith("["):
        host, bracket, port = host[1:].partition("]")
        if not bracket or (port and not (port[0] == ":" and port[1:].isdigit())):
            return False
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
        if not port.isdigit():
            return False
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def loopback_origin(header: str) -> bool:
    """Whether an Origin header is a page of this host itself."""
    scheme, separator, host = header.partition("://")
    return bool(separator) and scheme in {"http", "https"} and loopback_host(host)


class Gate:
    """The ASGI layer before all routes.

    Args:
        owner_of: asks the kernel for the uid behind a connection.
        own_uid: the service's own user, who may call besides root.
    """

    def __init__(self, app: ASGIApp, *, owner_of: OwnerOf, own_uid: int) -> None:
        self._app, self._owner_of, self._own_uid = app, owner_of, own_uid

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != ScopeType.HTTP:
            await self._app(scope, receive, send)
            return
        try:
            # Not a wait: the kernel answers an exact sock_diag query within the sending call, some 30 us. Once for each
            # connection, since beside busy threads it may take a while to have the interpreter again.
            scope["state"]["caller"] = self._identify(scope)
        except TunledgerError as error:
            response = from_domain(Request(scope), error)
            await response.to_asgi_response(None, Request(scope))(scope, receive, send)
            return
        failpoints.reach("api.request")
        await self._app(scope, receive, send)
        failpoints.reach("api.response.after")

    def _identify(self, scope: Scope) -> Caller:
        hosts = _header(scope, b"host")
        host = ", ".join(hosts)
        if len(hosts) != 1 or not loopback_host(host):  # two: which one counts is not the sender's to choose
            raise TunledgerError(
                ErrorCode.FORBIDDEN_HOST,
                f"Host: {host or 'missing'} is not a loopback name; use 127.0.0.1 or localhost",
            )
        for origin in _header(scope, b"origin"):
            if not loopback_origin(origin) or origin.partition("://")[2].lower() != host.lower():
                raise TunledgerError(ErrorCode.FORBIDDEN_HOST, f"Origin: {origin} is not a page of this service")
        for site in _header(scope, b"sec-fetch-site"):
            if site not in {"none", "same-origin"}:
                raise TunledgerError(ErrorCode.FORBIDDEN_HOST, f"Sec-Fetch-Site: {site} is a call by another page")
        client, server = scope.get("client"), scope.get("server")
        if client is None or server is None or server[1] is None:
            raise TunledgerError(ErrorCode.UNAUTHORIZED, "the connection has no addresses to ask the kernel about")
        # The other end of a connection was opened once, by one user: who else writes to it was given it by them.
        connection = cast("dict[str, int]", scope["state"].get("connection", {}))
        uid = connection.get("uid", -1)
        if uid < 0:
            uid = connection["uid"] = self._owner_of(client, (server[0], server[1]))
        if uid not in {0, self._own_uid}:
            allowed = "root" if self._own_uid == 0 else f"root and {_named(self._own_uid)}"
            raise TunledgerError(ErrorCode.UNAUTHORIZED, f"{_named(uid)} may not call tunledger; {allowed} may")
        return Caller(actor=f"uid:{uid}", user=_user(uid), peer=f"{client[0]}:{client[1]}")


def caller(request: Request[Any, Any, Any]) -> Caller:
    """Who sent this request, as the gate found out."""
    return cast("Caller", request.scope["state"]["caller"])


def _header(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


@functools.lru_cache(256)  # a directory server can take its time, and names hardly change
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def _named(uid: int) -> str:
    name = _user(uid)
    return f"{name} (uid {uid})" if name else f"uid {uid}"
