"""The original API, exactly as its clients know it: one interface at a time, the one that `create` made.

Status 200 on success, `{"error": text}` otherwise. New things belong into /api/v1.
"""

import ipaddress
from typing import Any

from litestar import Controller, Request, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.params import RawBody

from service.api import bodies
from service.api.orders import Orders
from service.api.problems import answer
from service.domain import commands as cmd
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import LinkCounters, ObservedLink
from service.domain.state import Interface

# IFF_* of linux/if.h, in the words and the order of Go's net.Flags.
_FLAGS = ((0x1, "up"), (0x2, "broadcast"), (0x8, "loopback"), (0x10, "pointtopoint"), (0x1000, "multicast"))
_IFF_RUNNING = (0x40, "running")


class InterfaceController(Controller):
    """/api/interface/..."""

    path = "/api/interface"

    @post("/create", status_code=200)
    async def create(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], body: RawBody
    ) -> Response[bytes]:
        """Make an interface; fields that are not given come from the configuration."""
        order = orders.begin(request, "DeclareInterface", "classic", "create", body)
        async with order.recorded() as named:
            document = bodies.document(body)
            named.name = bodies.recordable(document.get("name", orders.defaults.name))
            command = bodies.create(document, orders.defaults)
        return await order.carry_out(command)

    @get("/status")
    async def status(self, orders: NamedDependency[Orders]) -> Response[bytes]:
        """The interface as it is, flat; or that there is none."""
        interface = orders.engine.state.classic()
        if interface is None or interface.wanted is None:
            return answer({"status": "no_interface", "message": "no interface has been created"})
        link, attached = await orders.engine.observe(interface)
        trouble = orders.engine.troubles.get(interface.id)
        return answer(_status(interface, link, attached=attached, trouble=trouble.message if trouble else None))

    @post("/start", status_code=200)
    async def start(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], body: RawBody
    ) -> Response[bytes]:
        """Start packet processing."""
        order = orders.begin(request, "EnableProcessing", "classic", "start", body)
        async with order.recorded() as named:
            named.name = name = _the_interface(orders).name
            bodies.nothing(bodies.document(body))
        return await order.carry_out(cmd.EnableProcessing(name))

    @post("/stop", status_code=200)
    async def stop(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], body: RawBody
    ) -> Response[bytes]:
        """Stop packet processing; answered when the worker has let go of the device."""
        order = orders.begin(request, "DisableProcessing", "classic", "stop", body)
        async with order.recorded() as named:
            named.name = name = _the_interface(orders).name
            bodies.nothing(bodies.document(body))
        return await order.carry_out(cmd.DisableProcessing(name))

    @post("/configure", status_code=200)
    async def configure(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], body: RawBody
    ) -> Response[bytes]:
        """Change address, netmask or MTU in place."""
        order = orders.begin(request, "ConfigureInterface", "classic", "configure", body)
        async with order.recorded() as named:
            named.name = name = _the_interface(orders).name
            command = bodies.configure(bodies.document(body), name)
        return await order.carry_out(command)

    @delete("/delete", status_code=200)
    async def delete(self, request: Request[Any, Any, Any], orders: NamedDependency[Orders]) -> Response[bytes]:
        """Stop processing and remove the interface."""
        order = orders.begin(request, "RetireInterface", "classic", "delete")
        async with order.recorded() as named:
            named.name = name = _the_interface(orders).name
        return await order.carry_out(cmd.RetireInterface(name))


def _the_interface(orders: Orders) -> Interface:
    interface = orders.engine.state.classic()
    if interface is None:
        raise TunledgerError(ErrorCode.NO_INTERFACE, "no interface has been created; create one first")
    return interface


def _status(interface: Interface, link: ObservedLink | None, *, attached: bool, trouble: str | None) -> dict[str, Any]:
    spec = interface.wanted
    assert spec is not None
    wanted = spec.addresses[0] if spec.addresses else None
    present = link.addresses if link is not None else ()
    shown = wanted if wanted in present else (present[0] if present else None)
    state = "pending" if interface.pending is not None else "degraded" if trouble or link is None else "applied"
    counters = link.counters if link is not None else LinkCounters()
    return {
        "name": interface.name,
        "address": str(shown.ip) if shown is not None else None,
        "netmask": _netmask(shown.network) if shown is not None else None,
        "mtu": link.mtu if link is not None else spec.mtu,
        "up": link is not None and link.up,
        "active": link is not None and state == "applied",
        "running": attached,
        "index": link.ifindex if link is not None else 0,
        "flags": _flags(link) if link is not None else "",
        "hardware_addr": link.mac if link is not None else "",
        **{name: getattr(counters, name) for name in LinkCounters.__slots__},
        "mode": spec.mode.value,
        "operstate": link.operstate if link is not None else "NOTPRESENT",
        "id": interface.id,
        "state": state,
        "reason": trouble if trouble is not None else "the link is missing" if link is None else "",
    }


def _netmask(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> str:
    return str(network.netmask) if network.version == 4 else str(network.prefixlen)


def _flags(link: ObservedLink) -> str:
    words = [word for bit, word in (*_FLAGS, _IFF_RUNNING) if link.flags & bit]
    return "|".join(words)
