"""/api/v1/interfaces, batch and commands: interfaces as resources, and what was ordered of them.

Reads of the log beyond that are in `events`, counters in `counters`.
"""

import asyncio
import base64
import fnmatch
import hashlib
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from litestar import Controller, Request, Response, delete, get, patch, post, put
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery, QueryParameter, RawBody

from service.api import bodies
from service.api.events import parameters
from service.api.orders import Orders, drift
from service.api.problems import BATCH_MAX_BYTES, answer
from service.api.read import LogView
from service.api.resources import present
from service.domain import commands as cmd
from service.domain import values
from service.domain.errors import ErrorCode, TunledgerError, invalid
from service.domain.state import Interface

PAGE_MAX, PAGE_DEFAULT = 1000, 100
HISTORY_MAX = 1000
POSITION_MAX = 2**63 - 1  # SQLite holds no larger integer
STATES = ("pending", "applied", "degraded")

Limit = Annotated[int, QueryParameter(ge=1, le=PAGE_MAX)]
Before = Annotated[int, QueryParameter(ge=1, le=POSITION_MAX)]
Entries = Annotated[int, QueryParameter(ge=1, le=HISTORY_MAX)]


class InterfacesController(Controller):
    """/api/v1/interfaces..."""

    path = "/api/v1/interfaces"

    @get("")
    async def list_interfaces(
        self,
        request: Request[Any, Any, Any],
        orders: NamedDependency[Orders],
        name: FromQuery[str | None] = None,
        mode: FromQuery[str | None] = None,
        in_state: Annotated[str | None, QueryParameter(name="state")] = None,
        label: FromQuery[list[str] | None] = None,
        cursor: FromQuery[str | None] = None,
        limit: Limit = PAGE_DEFAULT,
    ) -> Response[bytes]:
        """Interfaces in order of their names, a page at a time."""
        parameters(request, "name", "mode", "state", "label", "cursor", "limit", repeated="label")
        engine = orders.engine
        accepts = _filter(name, mode, label or [])
        after = _decoded(cursor) if cursor is not None else ""
        if in_state is not None and in_state not in STATES:
            raise invalid("state", in_state, f"is not one of: {', '.join(STATES)}")
        chosen = sorted(
            (i for i in engine.state.interfaces.values() if i.name > after and accepts(i)), key=lambda i: i.name
        )
        if in_state is None:
            chosen = chosen[: limit + 1]
        found = await present(engine, chosen)
        if in_state is not None:
            found = [each for each in found if each["status"]["state"] == in_state]
        page, more = found[:limit], len(found) > limit
        following = _encoded(page[-1]["spec"]["name"]) if more else None
        found_page = {"interfaces": page, "next": following}
        tag = hashlib.sha256(msgspec.json.encode(found_page)).hexdigest()[:32]  # status is in it, not only the log
        return answer(found_page, headers={"ETag": f'"{tag}"'})

    @post("")
    async def create_interface(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], body: RawBody
    ) -> Response[bytes]:
        """Make an interface that does not exist yet."""
        order = orders.begin(request, "DeclareInterface", "v1", "create", body)
        async with order.recorded() as named:
            document = bodies.document(body, required=True)
            named.name = bodies.recordable(document.get("name"))
            command = cmd.DeclareInterface(bodies.spec(document), order.flag("allow_overlap"))
        return await order.carry_out(command)

    @get("/{name:str}")
    async def read_interface(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], name: FromPath[str]
    ) -> Response[bytes]:
        """One interface: what is desired of it and what is known of it."""
        parameters(request)
        interface = _existing(orders, name)
        (found,) = await present(orders.engine, [interface])
        return answer(found, headers={"ETag": interface.etag})

    @put("/{name:str}")
    async def replace_interface(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], name: FromPath[str], body: RawBody
    ) -> Response[bytes]:
        """Declare the interface just so, whether or not it exists."""
        order = orders.begin(request, "ReplaceInterface", "v1", "replace", body)
        async with order.recorded() as named:
            named.name = bodies.recordable(name)
            spec = bodies.spec(bodies.document(body, required=True), values.parse_name(name))
            command = cmd.ReplaceInterface(spec, order.flag("allow_overlap"), order.flag("recreate"))
        return await order.carry_out(command)

    @patch("/{name:str}")
    async def change_interface(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], name: FromPath[str], body: RawBody
    ) -> Response[bytes]:
        """Change some fields: a JSON merge patch (RFC 7396) on the spec."""
        order = orders.begin(request, "PatchInterface", "v1", "change", body)
        async with order.recorded() as named:
            named.name = bodies.recordable(name)
            patch = bodies.numbered(bodies.document(body, nulls=True, required=True))
            command = cmd.PatchInterface(
                values.parse_name(name), patch, order.flag("allow_overlap"), order.flag("recreate")
            )
        return await order.carry_out(command)

    @delete("/{name:str}", status_code=200)
    async def delete_interface(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], name: FromPath[str]
    ) -> Response[bytes]:
        """Remove the interface for good; its history stays."""
        order = orders.begin(request, "RetireInterface", "v1", "delete")
        async with order.recorded() as named:
            named.name = bodies.recordable(name)
            command = cmd.RetireInterface(values.parse_name(name))
        return await order.carry_out(command)

    @post("/{name:str}/start", status_code=200)
    async def start_processing(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], name: FromPath[str], body: RawBody
    ) -> Response[bytes]:
        """Let the workers read the device."""
        order = orders.begin(request, "EnableProcessing", "v1", "start", body)
        async with order.recorded() as named:
            named.name = bodies.recordable(name)
            bodies.nothing(bodies.document(body))
            command = cmd.EnableProcessing(values.parse_name(name))
        return await order.carry_out(command)

    @post("/{name:str}/stop", status_code=200)
    async def stop_processing(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], name: FromPath[str], body: RawBody
    ) -> Response[bytes]:
        """Take the device from the workers."""
        order = orders.begin(request, "DisableProcessing", "v1", "stop", body)
        async with order.recorded() as named:
            named.name = bodies.recordable(name)
            bodies.nothing(bodies.document(body))
            command = cmd.DisableProcessing(values.parse_name(name))
        return await order.carry_out(command)


class CommandsController(Controller):
    """/api/v1/commands, /batch, /history, /reconcile and /drift."""

    path = "/api/v1"

    @post("/batch", status_code=200, request_max_body_size=BATCH_MAX_BYTES)
    async def batch(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], body: RawBody
    ) -> Response[bytes]:
        """Several commands, all applied or none."""
        order = orders.begin(request, "Batch", "v1", "batch", body)
        async with order.recorded():
            commands = bodies.batch(
                bodies.document(body, required=True),
                allow_overlap=order.flag("allow_overlap"),
                recreate=order.flag("recreate"),
            )
        return await order.carry_out(*commands)

    @get("/commands/{command_id:str}")
    async def read_command(
        self, request: Request[Any, Any, Any], view: NamedDependency[LogView], command_id: FromPath[str]
    ) -> Response[bytes]:
        """What became of a command."""
        parameters(request)
        found = await asyncio.to_thread(view.command, command_id)
        return answer(found, headers={"ETag": f'"{command_id}.{found["state"]}"'})

    @post("/commands/{command_id:str}/confirm", status_code=200)
    async def confirm_command(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], command_id: FromPath[str], body: RawBody
    ) -> Response[bytes]:
        """Make a change stay that was ordered with confirm_within_s."""
        order = orders.begin(request, "ConfirmChange", "v1", "confirm", body)
        async with order.recorded():
            bodies.nothing(bodies.document(body))
            return await order.confirm(command_id)

    @get("/history")
    async def read_history(
        self,
        request: Request[Any, Any, Any],
        view: NamedDependency[LogView],
        name: FromQuery[str | None] = None,
        id: FromQuery[str | None] = None,  # noqa: A002  # the query parameter's name
        before: Before = POSITION_MAX,
        limit: Entries = 100,
    ) -> Response[bytes]:
        """The latest changes, newest first: of everything, of a name over all its interfaces, or of one id."""
        return await _history(request, view, name, id, before, limit)

    @get("/interfaces/{name:str}/history")
    async def read_history_of(
        self,
        request: Request[Any, Any, Any],
        view: NamedDependency[LogView],
        name: FromPath[str],
        id: FromQuery[str | None] = None,  # noqa: A002  # the query parameter's name
        before: Before = POSITION_MAX,
        limit: Entries = 100,
    ) -> Response[bytes]:
        """The latest changes of a name over all its interfaces, newest first."""
        return await _history(request, view, name, id, before, limit)

    @post("/reconcile", status_code=200)
    async def reconcile(self, request: Request[Any, Any, Any], orders: NamedDependency[Orders]) -> Response[bytes]:
        """Look at everything now, and mend what differs; or only say what would be done."""
        order = orders.begin(request, "Reconcile", "v1", "reconcile")
        return await order.reconcile()

    @get("/drift")
    async def read_drift(self, request: Request[Any, Any, Any], orders: NamedDependency[Orders]) -> Response[bytes]:
        """What differs now between the log and the host, and what would mend it."""
        parameters(request)
        return answer({"drift": await drift(orders.engine)})


async def _history(
    request: Request[Any, Any, Any], view: LogView, name: str | None, interface_id: str | None, before: int, limit: int
) -> Response[bytes]:
    parameters(request, "id", "before", "limit")
    first = before == POSITION_MAX
    entries, following = await asyncio.to_thread(
        view.history, name, limit, interface_id=interface_id, before=None if first else before
    )
    one = name is not None or interface_id is not None
    if one and not entries and not first:  # nothing before this position, or nothing at all?
        first = not (await asyncio.to_thread(view.history, name, 1, interface_id=interface_id))[0]
    if one and not entries and first:
        raise TunledgerError(ErrorCode.NOT_FOUND, f"nothing is known of an interface {interface_id or name}")
    return answer({"history": entries, "next": following})


def _existing(orders: Orders, name: str) -> Interface:
    interface = orders.engine.state.find(name)
    if interface is None:
        raise TunledgerError(ErrorCode.NO_INTERFACE, f"there is no interface {name}")
    return interface


def _filter(name: str | None, mode: str | None, labels: list[str]) -> Callable[[Interface], bool]:
    if mode is not None and mode not in ("tun", "tap"):
        raise invalid("mode", mode, 'is not "tun" or "tap"')
    wanted = []
    for label in labels:
        key, separator, value = label.partition("=")
        if not key:
            raise invalid("label", label, "is not a label such as lab=north, or a key alone")
        wanted.append((key, value if separator else None))

    def accepts(interface: Interface) -> bool:
        spec = interface.wanted or interface.spec
        if spec is None or (name is not None and not fnmatch.fnmatchcase(interface.name, name)):
            return False
        if mode is not None and spec.mode.value != mode:
            return False
        return all(key in spec.labels and value in {None, spec.labels[key]} for key, value in wanted)

    return accepts


def _encoded(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode().rstrip("=")


def _decoded(cursor: str) -> str:
    try:
        name = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode("ascii")
    except ValueError:
        name = ""
    if not name or _encoded(name) != cursor:  # what is not base64 is passed over by decoding
        raise invalid("cursor", cursor, 'is not one that "next" of an earlier page gave')
    return name
