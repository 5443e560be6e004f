"""/api/v1/counters and /interfaces/{name}/counters: lifetime totals, and how they came about over time.

Times and steps are parsed here; which rows are read and what rates are is the store's and `service.domain.series`'
business.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from litestar import Controller, Request, Response, get
from litestar.di import NamedDependency
from litestar.params import FromPath

from service.api.orders import Orders
from service.api.problems import answer
from service.domain.errors import ErrorCode, TunledgerError, invalid, unknown
from service.domain.series import HOUR_MS, MINUTE_MS, Point, figures_of, rates_of, totals_of
from service.domain.values import InterfaceId
from service.reconcile.engine import Engine
from service.store.counters import POINTS_MAX, CounterReader, Present, milliseconds, stamp_of

FRESH_S = 1.0  # readers who come at once share one sample
POINTS_AIM = 1500  # without a step one is taken that gives no more
STEPS_MS = (MINUTE_MS, 5 * MINUTE_MS, 15 * MINUTE_MS, HOUR_MS, 6 * HOUR_MS, 24 * HOUR_MS)
RATES_OVER_MS = 60_000  # of now: long enough to have two samples at most intervals, short enough to be now
YEAR_MS = 366 * 24 * HOUR_MS
_UNITS_MS = {"": 1000, "s": 1000, "m": MINUTE_MS, "h": HOUR_MS, "d": 24 * HOUR_MS}
_AGO = re.compile(r"-([0-9]{1,10})([smhd]?)", re.ASCII)
_STEP = re.compile(r"([0-9]{1,10})([smhd]?)", re.ASCII)
_PARAMETERS = ("id", "from", "to", "step")


@dataclass(frozen=True, slots=True)
class Range:
    """What is asked for: points with `after` < at <= `upto`, in ms; `step_ms` None for every sample."""

    after: int
    upto: int
    step_ms: int | None


class CountersController(Controller):
    """/api/v1/counters and /api/v1/interfaces/{name}/counters."""

    path = "/api/v1"

    @get("/counters")
    async def read_all_counters(
        self, request: Request[Any, Any, Any], orders: NamedDependency[Orders], counters: NamedDependency[CounterReader]
    ) -> Response[bytes]:
        """Lifetime totals of all interfaces, from a sample that is stored before it is shown."""
        _given(request, ())
        engine = orders.engine
        fresh = await _sample(engine)
        names = {i.id: i.name for i in engine.state.interfaces.values()}
        totals = {each: engine.totals(each) for each in names}
        if not fresh:
            totals = await asyncio.to_thread(lambda: {each: _stored(counters.present(each)) for each in names})
        return answer({"counters": {name: {"id": each, **totals[each]} for each, name in names.items()}})

    @get("/interfaces/{name:str}/counters")
    async def read_counters(
        self,
        request: Request[Any, Any, Any],
        orders: NamedDependency[Orders],
        counters: NamedDependency[CounterReader],
        name: FromPath[str],
    ) -> Response[bytes]:
        """Lifetime totals and present rates of one interface, and points over time if a time or a step is given."""
        engine = orders.engine
        given = _given(request, _PARAMETERS)
        live = next((i.id for i in engine.state.interfaces.values() if i.name == name), None)
        chosen = InterfaceId(given["id"]) if "id" in given else live
        if chosen is None:
            raise TunledgerError(
                ErrorCode.NOT_FOUND, f"there is no interface {name}; one that was retired is asked for by ?id="
            )
        if chosen != live and await asyncio.to_thread(counters.name_of, chosen) != name:
            raise TunledgerError(ErrorCode.NOT_FOUND, f"there never was an interface {name} with the id {chosen}")
        if chosen == live:
            await _sample(engine)
        wanted = range_of(given, milliseconds(orders.clock.now()))  # now is after the sample
        return answer(await asyncio.to_thread(_read, counters, chosen, name, wanted, is_live=chosen == live))


async def _sample(engine: Engine) -> bool:
    """Have a fresh sample stored; False if there is no room for one, when the last that was stored is what is known."""
    try:
        await engine.sample(at_most_every_s=FRESH_S)
    except TunledgerError as error:
        if error.code is not ErrorCode.LOG_FULL:
            raise
        return False
    return True


def _stored(present: Present | None) -> dict[str, dict[str, int]]:
    return totals_of(*figures_of(present.totals)) if present is not None else {"kernel": {}, "worker": {}}


def _read(
    counters: CounterReader, interface_id: InterfaceId, name: str, wanted: Range | None, *, is_live: bool
) -> dict[str, Any]:
    present = counters.present(interface_id)
    found = resource(interface_id, name, present, _recent(counters, interface_id, present) if is_live else ())
    if wanted is None:
        return found
    shown = counters.series(interface_id, wanted.after, wanted.upto, wanted.step_ms)
    return found | {
        "from": stamp_of(wanted.after),
        "to": stamp_of(wanted.upto),
        "step_s": None if wanted.step_ms is None else wanted.step_ms // 1000,
        "points": [point_json(point) for point in shown],
    }


def _recent(counters: CounterReader, interface_id: InterfaceId, present: Present | None) -> Sequence[Point]:
    if present is None:
        return ()
    at = milliseconds(present.sampled_at)
    return counters.series(interface_id, at - RATES_OVER_MS, at + 1000, 1000)  # the bucket of `at` too


def resource(interface_id: InterfaceId, name: str, present: Present | None, recent: Sequence[Point]) -> dict[str, Any]:
    """An interface's counters as they are now.

    `rates` are over the last minute, or the part of it that was observed without a gap; null if there is none.
    """
    totals = _stored(present)
    over_ms = sum(point.observed_ms for point in recent)
    rates = None
    if over_ms > 0:
        counted = [tuple(rate * p.observed_ms for rate in p.rates) for p in recent if p.rates is not None]
        rates = rates_of([sum(column) / over_ms for column in zip(*counted, strict=True)])
    return {
        "id": interface_id,
        "name": name,
        "sampled_at": present.sampled_at if present is not None else None,
        "totals": totals,
        "rates": rates,
        "rates_over_s": over_ms / 1000,
    }


def point_json(point: Point) -> dict[str, Any]:
    """A point of a series. rates * observed_s is what was counted since the point before, but for gaps."""
    return {
        "at": stamp_of(point.at),
        "sampled_at": stamp_of(point.sampled_at),
        "totals": totals_of(point.figures, point.classes),
        "rates": rates_of(point.rates) if point.rates is not None else None,
        "observed_s": point.observed_ms / 1000,
        "gap": point.gap_ms > 0,
        "gap_s": point.gap_ms / 1000,
    }


def range_of(given: Mapping[str, str], now: int) -> Range | None:
    """What `from`, `to` and `step` ask for; None without any of them.

    Left out, `to` is now (and never later), `from` an hour before `to`, and the step one that gives at most some
    `POINTS_AIM` points, or every sample for an hour or less.

    Raises:
        TunledgerError: invalid_field, naming the parameter.
    """
    if not given.keys() & {"from", "to", "step"}:
        return None
    upto = min(moment("to", given["to"], now), now) if "to" in given else now
    after = moment("from", given["from"], now) if "from" in given else max(0, upto - HOUR_MS)
    if after >= upto:
        raise invalid("from", given.get("from", ""), f"is not before to, which is {stamp_of(upto)}")
    if "step" in given:
        step_ms = _step(given["step"])
    elif upto - after <= HOUR_MS:
        return Range(after, upto, None)
    else:
        step_ms = next((step for step in STEPS_MS if (upto - after) // step <= POINTS_AIM), STEPS_MS[-1])
    if (upto - after) // step_ms > POINTS_MAX:
        least_s = -(-(upto - after) // (POINTS_MAX * 1000))
        expected = f"gives more than {POINTS_MAX:,} points in this range; expected {least_s}s or more"
        raise invalid("step", given.get("step", f"{step_ms // 1000}s"), expected)
    return Range(after, upto, step_ms)


def _step(given: str) -> int:
    match = _STEP.fullmatch(given)
    step_ms = int(match[1]) * _UNITS_MS[match[2]] if match is not None else 0
    if not 1000 <= step_ms <= YEAR_MS:
        raise invalid("step", given, 'is no step; expected seconds, or such as "1m" or "6h", up to "366d"')
    return step_ms


def moment(field: str, given: str, now: int) -> int:
    """A time in ms since the epoch: ISO 8601 with its zone, or so long ago: "-90", "-90s", "-15m", "-1h", "-7d".

    Raises:
        TunledgerError: invalid_field, naming the parameter.
    """
    ago = _AGO.fullmatch(given)
    if ago is not None:
        at = max(0, now - int(ago[1]) * _UNITS_MS[ago[2]])
    else:
        try:
            # In a query a "+" that was not quoted arrives as a blank.
            read = datetime.fromisoformat(re.sub(r" (?=\d\d:?\d\d$)", "+", given) if "T" in given else given)
            at = milliseconds(read.isoformat()) if read.tzinfo is not None else -1
        except (ValueError, OverflowError):
            at = -1
    if at < 0:
        expected = 'is no time; expected one such as "2026-11-22T13:00:00Z", or how long ago: "-1h", "-90s"'
        raise invalid(field, given, expected)
    return at


def _given(request: Request[Any, Any, Any], known: Sequence[str]) -> dict[str, str]:
    """The query parameters. Raises TunledgerError: invalid_field, for one that is unknown or comes twice."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise unknown("", name, known, "parameter")
        if name in found:
            raise TunledgerError(ErrorCode.INVALID_FIELD, f"{name}: given more than once", field=name)
        found[name] = value
    return found
