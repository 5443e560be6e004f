"""Counters over HTTP: totals, rates and points as they were sampled, and a refusal that names what was wrong."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import sqlalchemy as sa
from litestar import Litestar
from litestar.di import Provide
from litestar.testing import TestClient

from service.api.bodies import Defaults
from service.api.counters import CountersController, moment, range_of
from service.api.orders import Orders
from service.api.problems import from_domain
from service.domain.counters import Book, Reading, Source
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.series import DIRECTIONS, HOUR_MS, KERNEL, MINUTE_MS, WORKER
from service.domain.values import InterfaceId, NodeId
from service.store import schema
from service.store.counters import CounterKeeper, CounterReader, milliseconds, stamp_of
from service.store.writer import LogWriter

DEADLINE_S = 20.0
START = 1_790_000_000_000 // HOUR_MS * HOUR_MS
LIVE, RETIRED = InterfaceId("00000000-0000-7000-8000-000000000001"), InterfaceId("00000000-0000-7000-8000-00000000000f")
PATH = "/api/v1/interfaces/tun0/counters"


@dataclass
class Sampler:
    """What the routes need of an engine and a clock: it samples what the test counts, into a real database."""

    writer: LogWriter
    at: int = START
    packets: int = 0
    interfaces: dict[InterfaceId, str] = field(default_factory=lambda: {LIVE: "tun0"})
    book: Book = field(default_factory=Book)
    keeper: CounterKeeper = field(default_factory=CounterKeeper)
    samples: list[float] = field(default_factory=list)

    @property
    def state(self) -> Any:
        """The interfaces that there are."""
        interfaces = {i: SimpleNamespace(id=i, name=name) for i, name in self.interfaces.items()}
        return SimpleNamespace(interfaces=interfaces)

    def now(self) -> str:
        """Where the test has put it."""
        return stamp_of(self.at)

    def totals(self, interface_id: InterfaceId) -> dict[str, dict[str, int]]:
        """As the engine has them."""
        return {source.value: self.book.totals(interface_id, source) for source in Source}

    async def sample(self, *, at_most_every_s: float = 0.0) -> None:
        """Store a sample."""
        self.samples.append(at_most_every_s)
        self.store()

    def store(self) -> None:
        readings = []
        for one in self.interfaces:
            kernel = {"rx_packets": self.packets, "tx_bytes": 100 * self.packets}
            worker = {"from_kernel.ipv4.tcp.packets": self.packets, "from_kernel.ipv4.tcp.bytes": 60 * self.packets}
            readings.append(self.book.take(Reading(one, Source.KERNEL, "boot/1", kernel)))
            readings.append(self.book.take(Reading(one, Source.WORKER, "s", worker)))
        totals = {one: self.totals(one) for one in self.interfaces}
        for job in (self.keeper.store(readings, totals, self.now()), *self.keeper.tend(self.now())):
            self.writer.run(job).result(DEADLINE_S)

    def run(self, samples: int, packets: int = 10) -> None:
        """Every ten seconds, so many packets more."""
        for _ in range(samples):
            self.at += 10_000
            self.packets += packets
            self.store()


@pytest.fixture
def sampler(path: Path) -> Iterator[Sampler]:
    writer = LogWriter(
        path,
        NodeId("00c0ffee0001"),
        now=lambda: stamp_of(START),
        on_recorded=lambda _events: None,
        on_broken=pytest.fail,
    )
    writer.start()

    def declared(connection: sa.Connection) -> None:
        names = [{"interface_id": i, "name": "tun0", "position": n} for n, i in enumerate((RETIRED, LIVE))]
        connection.execute(schema.interface_names.insert(), names)

    writer.run(declared).result(DEADLINE_S)
    yield Sampler(writer)
    writer.close()


@pytest.fixture
def client(sampler: Sampler, path: Path) -> Iterator[TestClient[Litestar]]:
    reader = CounterReader(path)
    defaults = Defaults(name="tun0", address="10.0.0.1", netmask="255.255.255.0", mtu=1500)
    orders = Orders(cast("Any", sampler), cast("Any", sampler), defaults)
    app = Litestar(
        [CountersController],
        dependencies={
            "orders": Provide(lambda: orders, sync_to_thread=False),
            "counters": Provide(lambda: reader, sync_to_thread=False),
        },
        exception_handlers={TunledgerError: from_domain},
        openapi_config=None,
    )
    with TestClient(app) as client:
        yield client
    reader.close()


def _ok(client: TestClient[Litestar], path: str = PATH, **params: str) -> Any:
    answer = client.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


def _refused(
    client: TestClient[Litestar], params: dict[str, str], status: int = 400, path: str = PATH
) -> dict[str, Any]:
    answer = client.get(path, params=params)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found: dict[str, Any] = answer.json()
    return found


def test_present_totals_come_from_a_fresh_sample(client: TestClient[Litestar], sampler: Sampler) -> None:
    sampler.packets = 7
    found = _ok(client)
    assert sampler.samples == [1.0], "at most one sample a second, however many ask"
    assert found == {
        "id": LIVE,
        "name": "tun0",
        "sampled_at": stamp_of(START),
        "totals": {
            "kernel": {**dict.fromkeys(KERNEL, 0), "rx_packets": 7, "tx_bytes": 700},
            "worker": {
                **dict.fromkeys(WORKER, 0),
                "from_kernel.packets": 7,
                "from_kernel.bytes": 420,
                "from_kernel.ipv4.tcp.packets": 7,
                "from_kernel.ipv4.tcp.bytes": 420,
            },
        },
        "rates": None,
        "rates_over_s": 0.0,
    }


def test_present_rates_are_over_the_last_minute(client: TestClient[Litestar], sampler: Sampler) -> None:
    sampler.run(30, packets=1000)
    sampler.run(7, packets=10)
    sampler.at += 1000
    found = _ok(client)
    assert 60 <= found["rates_over_s"] <= 71
    assert found["rates"]["kernel"]["rx_packets"] == pytest.approx(70 / 71, rel=0.2)
    assert found["rates"]["worker"]["from_kernel.bytes"] == pytest.approx(
        60 * found["rates"]["kernel"]["rx_packets"], rel=1e-9
    )


def test_all_interfaces_keep_their_form(client: TestClient[Litestar], sampler: Sampler) -> None:
    sampler.packets = 7
    found = _ok(client, "/api/v1/counters")
    assert set(found) == {"counters"}
    assert found["counters"]["tun0"]["id"] == LIVE
    assert found["counters"]["tun0"]["kernel"] == {"rx_packets": 7, "tx_bytes": 700}
    assert _refused(client, {"step": "1m"}, path="/api/v1/counters")["pointer"] == "/step"


def test_points_are_every_sample_of_an_hour(client: TestClient[Litestar], sampler: Sampler) -> None:
    sampler.run(6)
    sampler.at += 10_000
    found = _ok(client, **{"from": "-65s"})
    assert (found["from"], found["to"], found["step_s"]) == (stamp_of(START + 5_000), stamp_of(START + 70_000), None)
    assert [p["at"] for p in found["points"]] == [stamp_of(START + n * 10_000) for n in range(1, 8)]
    assert found["points"][0]["rates"] is None, "the first sample there ever was"
    second = found["points"][1]
    assert second["totals"]["kernel"]["rx_packets"] == 20
    assert second["totals"]["worker"]["from_kernel.ipv4.tcp.packets"] == 20
    assert second["rates"]["kernel"]["rx_packets"] == 1.0
    assert second["rates"]["worker"]["from_kernel.bytes"] == 60.0
    assert (second["gap"], second["gap_s"], second["observed_s"]) == (False, 0.0, 10.0)


def test_points_of_minutes_and_hours_are_aligned_and_exact(client: TestClient[Litestar], sampler: Sampler) -> None:
    sampler.run(2 * 360)
    for step, count, seconds in (("1m", 120, 60), ("60", 120, 60), ("1h", 2, 3600), ("90", 80, 90)):
        found = _ok(client, **{"from": stamp_of(START), "to": stamp_of(START + 2 * HOUR_MS), "step": step})
        assert found["step_s"] == seconds
        assert len(found["points"]) == count
        assert all(milliseconds(p["at"]) % (seconds * 1000) == 0 for p in found["points"])
        for before, point in zip(found["points"], found["points"][1:], strict=False):
            grown = point["totals"]["kernel"]["rx_packets"] - before["totals"]["kernel"]["rx_packets"]
            assert grown == seconds
            assert point["rates"]["kernel"]["rx_packets"] * point["observed_s"] == pytest.approx(grown)


def test_a_gap_is_shown_and_has_no_points(client: TestClient[Litestar], sampler: Sampler) -> None:
    sampler.run(6)
    sampler.at += 30 * MINUTE_MS
    sampler.run(6)
    found = _ok(client, **{"from": "-1h", "step": "1m"})["points"]
    gaps = [p for p in found if p["gap"]]
    assert len(found) == 2
    assert len(gaps) == 1
    assert gaps[0]["gap_s"] == 30 * 60 + 10
    assert gaps[0]["observed_s"] == 50
    assert gaps[0]["rates"]["kernel"]["rx_packets"] == 1.0, "over what was observed of the minute"


def test_a_retired_interface_is_asked_for_by_its_id(client: TestClient[Litestar], sampler: Sampler) -> None:
    sampler.interfaces = {RETIRED: "tun0"}
    sampler.run(6)
    sampler.interfaces, sampler.packets = {LIVE: "tun0"}, 0
    assert _ok(client)["totals"]["kernel"]["rx_packets"] == 0
    found = _ok(client, id=RETIRED, step="10")
    assert (found["id"], found["name"]) == (RETIRED, "tun0")
    assert found["sampled_at"] == stamp_of(START + 60_000)
    assert found["totals"]["kernel"]["rx_packets"] == 60
    assert found["rates"] is None
    assert len(found["points"]) == 6
    sampler.interfaces = {}
    assert _ok(client, id=RETIRED)["totals"] == found["totals"]
    assert "?id=" in _refused(client, {}, 404)["detail"]
    assert _refused(client, {"id": "nobody"}, 404)["code"] == "not_found"
    assert _refused(client, {"id": RETIRED}, 404, "/api/v1/interfaces/other0/counters")["code"] == "not_found"


def test_an_interface_without_a_sample_has_no_totals_and_no_points(
    client: TestClient[Litestar], sampler: Sampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "store", lambda: None)
    found = _ok(client, step="1m")
    assert (found["sampled_at"], found["totals"], found["rates"]) == (None, {"kernel": {}, "worker": {}}, None)
    assert found["points"] == []


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *(("from", text) for text in ("", "yesterday", "-", "-1x", "--1h", "-1.5h", "1h", "2026-11-22T13:00:00")),
        *(("from", text) for text in ("2026-13-01T00:00:00Z", "1969-12-31T23:59:59Z", "0001-01-01T00:00:00+14:00")),
        *(("to", text) for text in ("now", "-1y", "2026-11-22", "\u0661")),
        *(("step", text) for text in ("", "0", "0s", "1ms", "1.5", "-1m", "m", "1 m", "367d", "99999999999", "\u0661")),
    ],
)
def test_a_bad_parameter_is_named(client: TestClient[Litestar], name: str, given: str) -> None:
    found = _refused(client, {name: given})
    assert (found["code"], found["pointer"]) == ("invalid_field", f"/{name}")
    assert found["detail"].startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("params", "pointer"),
    [
        ({"from": "-10", "to": "-20"}, "/from"),
        ({"from": "-10", "to": "-10"}, "/from"),
        ({"from": "9999-12-31T23:59:59Z"}, "/from"),
        ({"from": "-7d", "step": "1m"}, "/step"),
        ({"from": "1970-01-01T00:00:00Z"}, "/step"),
        ({"form": "-7d"}, "/form"),
    ],
)
def test_a_range_that_will_not_do_names_what_to_change(
    client: TestClient[Litestar], params: dict[str, str], pointer: str
) -> None:
    assert _refused(client, params)["pointer"] == pointer


def test_a_step_that_is_too_fine_is_told_the_finest_that_will_do(client: TestClient[Litestar]) -> None:
    assert "121s or more" in _refused(client, {"from": "-7d", "step": "1m"})["detail"]
    assert _ok(client, **{"from": "-7d", "step": "121s"})["points"] == []


def test_a_parameter_given_twice_is_refused(client: TestClient[Litestar]) -> None:
    answer = client.get(f"{PATH}?step=1m&step=1h")
    assert (answer.status_code, answer.json()["pointer"]) == (400, "/step")


def test_times_are_read_as_they_are_written() -> None:
    now = START + 12_345
    for text, at in {
        "2026-09-21T14:00:00Z": START,
        "2026-09-21T16:00:00+02:00": START,
        "2026-09-21T16:00:00 02:00": START,  # a "+" that was not quoted
        "2026-09-21T14:00:00.007Z": START + 7,
        "-0": now,
        "-90": now - 90_000,
        "-90s": now - 90_000,
        "-15m": now - 15 * MINUTE_MS,
        "-1h": now - HOUR_MS,
        "-7d": now - 7 * 24 * HOUR_MS,
        "-9999999999d": 0,
    }.items():
        assert moment("from", text, now) == at


def test_a_range_without_a_step_takes_one_that_gives_a_picture() -> None:
    for ago, step_ms in {
        "-1h": None,
        "-61m": MINUTE_MS,
        "-1d": MINUTE_MS,
        "-7d": 15 * MINUTE_MS,
        "-400d": 24 * HOUR_MS,
    }.items():
        found = range_of({"from": ago}, START)
        assert found is not None
        assert found.step_ms == step_ms
    assert range_of({}, START) is None
    assert range_of({"id": "x"}, START) is None
    later = range_of({"to": "9999-12-31T23:59:59-23:59"}, START)
    assert later is not None
    assert (later.after, later.upto) == (START - HOUR_MS, START), "nothing is later than now"
    with pytest.raises(TunledgerError) as refusal:
        range_of({"from": "-5001s", "step": "1"}, START)
    assert (refusal.value.code, refusal.value.field) == (ErrorCode.INVALID_FIELD, "step")
    assert range_of({"from": "-5000s", "step": "1"}, START) is not None


def test_directions_are_summed_over_classes() -> None:
    assert [name for name in WORKER if name.endswith("packets")] == [f"{d}.packets" for d in DIRECTIONS]
