"""/api/v1: what the command line reads. Writing through it comes with its own resources."""

from typing import Any

from litestar import Controller, Response, get

from service.api.orders import Orders
from service.api.problems import answer
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.spec import spec_to_json
from service.domain.state import Interface

COUNTERS_FRESH_S = 1.0  # readers who come at once share one sample


class V1Controller(Controller):
    """/api/v1/..."""

    path = "/api/v1"

    @get("/state")
    async def state(self, orders: Orders) -> Response[bytes]:
        """Desired state at the position the service has reached, for comparison with the log."""
        state = orders.engine.state
        interfaces = {i.name: desired_json(i) for i in state.interfaces.values()}
        return answer({"position": state.position, "hash": state.head, "interfaces": interfaces})

    @get(["/counters", "/interfaces/{name:str}/counters"])
    async def counters(self, orders: Orders, name: str | None = None) -> Response[bytes]:
        """Lifetime totals by interface, from a sample that is stored before it is shown."""
        engine = orders.engine
        await engine.sample(at_most_every_s=COUNTERS_FRESH_S)
        chosen = [i for i in engine.state.interfaces.values() if name is None or i.name == name]
        if name is not None and not chosen:
            raise TunledgerError(ErrorCode.NOT_FOUND, f"there is no interface {name}")
        return answer({"counters": {i.name: {"id": i.id, **engine.totals(i.id)} for i in chosen}})

    @get("/log/head")
    async def head(self, orders: Orders) -> Response[bytes]:
        """Position and hash of the last event: what to keep elsewhere, to check a later log against."""
        engine = orders.engine
        return answer({"node": engine.node, "position": engine.state.position, "hash": engine.state.head})


def desired_json(interface: Interface) -> dict[str, Any]:
    """The desired state of one interface and nothing that the log does not say."""
    return {
        "id": interface.id,
        "generation": interface.generation,
        "spec": spec_to_json(interface.spec) if interface.spec is not None else None,
        "pending": interface.pending.command_id if interface.pending is not None else None,
    }
