"""The original API to the letter: existing clients depend on every word in here."""

import ipaddress
from pathlib import Path
from typing import Any

import pytest

from service.domain import steps as st
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import LinkCounters
from service.domain.values import Address, Mode
from tests.api.running import NOW, Running, ours

CREATE, STATUS, START, STOP, CONFIGURE, DELETE = (
    ("POST", "/api/interface/create"),
    ("GET", "/api/interface/status"),
    ("POST", "/api/interface/start"),
    ("POST", "/api/interface/stop"),
    ("POST", "/api/interface/configure"),
    ("DELETE", "/api/interface/delete"),
)
WRITES = [CREATE, START, STOP, CONFIGURE, DELETE]


def _ok(api: Running, call: tuple[str, str], body: Any = None) -> str:
    answer = api.call(*call, body)
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"status", "message"}
    assert answer.json()["status"] == "success"
    assert answer.headers["content-type"] == "application/json"
    message: str = answer.json()["message"]
    return message


def _refused(api: Running, call: tuple[str, str], status: int, body: Any = None) -> str:
    answer = api.call(*call, body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert isinstance(error, str)
    return error


def _status(api: Running) -> dict[str, Any]:
    answer = api.call(*STATUS)
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


# -- health


def test_health_is_healthy(api: Running) -> None:
    answer = api.call("GET", "/health")
    assert answer.status_code == 200
    body = answer.json()
    assert (body["status"], body["service"]) == ("healthy", "tunledger")
    assert "error" not in body


def test_health_is_503_with_the_reason_when_a_worker_is_gone(api: Running) -> None:
    api.readers.unwell = ["worker 0 is gone"]
    answer = api.call("GET", "/health")
    assert answer.status_code == 503
    assert (answer.json()["status"], answer.json()["error"]) == ("unhealthy", "worker 0 is gone")


# -- create


def test_create_says_what_it_made(api: Running) -> None:
    assert _ok(api, CREATE, {"name": "tun7"}) == "Interface tun7 created successfully"
    assert list(ours(api.kernel)) == ["tun7"]


@pytest.mark.parametrize("body", [b"", b"{}", b" \n", b'{"name": null, "mtu": null}'])
def test_create_with_an_empty_body_makes_the_configured_interface(api: Running, body: bytes) -> None:
    assert _ok(api, CREATE, body) == "Interface tun0 created successfully"
    status = _status(api)
    assert (status["name"], status["address"], status["netmask"], status["mtu"]) == (
        "tun0",
        "10.0.0.1",
        "255.255.255.0",
        1500,
    )


def test_create_takes_every_field(api: Running) -> None:
    _ok(api, CREATE, {"name": "lab0", "address": "10.9.0.1", "netmask": "255.255.0.0", "mtu": 1400})
    link = api.kernel.observe().links["lab0"]
    assert (link.mtu, link.up, [str(a) for a in link.addresses]) == (1400, True, ["10.9.0.1/16"])


@pytest.mark.parametrize("kind", ["application/x-www-form-urlencoded", "text/plain", "", "multipart/form-data"])
def test_create_does_not_care_how_json_is_labelled(api: Running, kind: str) -> None:
    answer = api.call(*CREATE, {"name": "tun7"}, headers={"Content-Type": kind})
    assert answer.json()["message"] == "Interface tun7 created successfully"


def test_create_twice_is_409(api: Running) -> None:
    _ok(api, CREATE)
    assert _refused(api, CREATE, 409) == "interface tun0 already exists"
    assert "tun0 already exists" in _refused(api, CREATE, 409, {"name": "tun1", "address": "10.1.0.1"})
    assert list(ours(api.kernel)) == ["tun0"]


def test_create_after_delete_makes_it_anew(api: Running) -> None:
    _ok(api, CREATE)
    first = _status(api)["index"]
    _ok(api, DELETE)
    _ok(api, CREATE)
    assert _status(api)["index"] != first


@pytest.mark.parametrize("mode", [None, Mode.TUN])
def test_create_leaves_a_strangers_interface_alone(api: Running, mode: Mode | None) -> None:
    api.kernel.outside.add_link("tun0", mode, alias="hands off")
    before = str(api.kernel)
    assert _refused(api, CREATE, 409) == "tun0 exists and is not managed by tunledger; it was left alone"
    assert str(api.kernel) == before
    assert api.intents() == []


def test_create_refuses_a_subnet_that_the_host_uses_unless_told_otherwise(api: Running) -> None:
    api.kernel.outside.add_link("eth0")
    api.kernel.outside.add_address("eth0", Address(ipaddress.IPv4Address("10.0.0.77"), 16))
    error = _refused(api, CREATE, 400)
    assert "10.0.0.0/24 overlaps 10.0.0.0/16" in error
    assert "eth0" in error
    assert '"allow_overlap": true' in error
    assert api.intents() == []
    _ok(api, CREATE, {"allow_overlap": True})


def test_create_undoes_what_was_half_made_and_gives_the_kernels_reason(api: Running) -> None:
    for step in (st.CreateLink, st.SetTxQueueLen, st.AddAddress, st.SetUp):
        api.kernel.fail(TunledgerError(ErrorCode.KERNEL_REFUSED, f"{step.__name__}: no (EIO)"), on=step)
        assert _refused(api, CREATE, 500) == f"{step.__name__}: no (EIO)"
        assert list(ours(api.kernel)) == []
        assert _status(api)["status"] == "no_interface"
    api.kernel.heal()
    _ok(api, CREATE)


def test_create_without_the_device_node_says_what_to_do(api: Running) -> None:
    missing = TunledgerError(ErrorCode.TUN_MISSING, "/dev/net/tun is missing: modprobe tun", retry=True)
    api.kernel.fail(missing, on=st.CreateLink)
    answer = api.call(*CREATE)
    assert (answer.status_code, answer.json()) == (503, {"error": missing.message})
    assert answer.headers["retry-after"] == "1"


# -- status


def test_status_without_an_interface(api: Running) -> None:
    assert _status(api) == {"status": "no_interface", "message": "no interface has been created"}


def test_status_is_one_flat_object(api: Running) -> None:
    _ok(api, CREATE)
    api.kernel.outside.count("tun0", LinkCounters(1, 2, 3, 4, 5, 6, 7, 8))
    status = _status(api)
    assert status == {
        "name": "tun0",
        "address": "10.0.0.1",
        "netmask": "255.255.255.0",
        "mtu": 1500,
        "up": True,
        "active": True,
        "running": False,
        "index": api.kernel.observe().links["tun0"].ifindex,
        "flags": "up|pointtopoint|multicast",
        "hardware_addr": "",
        "rx_packets": 1,
        "tx_packets": 2,
        "rx_bytes": 3,
        "tx_bytes": 4,
        "rx_errors": 5,
        "tx_errors": 6,
        "rx_dropped": 7,
        "tx_dropped": 8,
        "mode": "tun",
        "operstate": "DOWN",
        "id": status["id"],
        "state": "applied",
        "reason": "",
    }


def test_status_of_an_ipv6_interface(api: Running) -> None:
    _ok(api, CREATE, {"address": "2001:db8::1", "netmask": "64"})
    assert (_status(api)["address"], _status(api)["netmask"]) == ("2001:db8::1", "64")


def test_status_shows_what_is_and_not_what_should_be(api: Running) -> None:
    _ok(api, CREATE)
    api.kernel.outside.set_mtu("tun0", 1300)
    api.kernel.outside.set_up("tun0", False)
    assert (_status(api)["mtu"], _status(api)["up"]) == (1300, False)


def test_status_of_an_interface_that_somebody_deleted(api: Running) -> None:
    _ok(api, CREATE)
    api.kernel.outside.delete("tun0")
    status = _status(api)
    assert (status["up"], status["active"], status["running"], status["index"]) == (False, False, False, 0)
    assert (status["state"], status["reason"]) == ("degraded", "the link is missing")


# -- start and stop


def test_start_and_stop(api: Running) -> None:
    _ok(api, CREATE)
    assert _ok(api, START) == "Packet processing on tun0 started successfully"
    assert (_status(api)["running"], _status(api)["flags"]) == (True, "up|pointtopoint|multicast")
    assert _ok(api, STOP) == "Packet processing on tun0 stopped successfully"
    assert _status(api)["running"] is False
    assert api.kernel.open_devices() == {}


def test_start_twice_is_409_already_running(api: Running) -> None:
    _ok(api, CREATE)
    _ok(api, START)
    assert "already running" in _refused(api, START, 409)
    assert _status(api)["running"] is True


def test_stop_twice_is_409_not_running(api: Running) -> None:
    _ok(api, CREATE)
    assert "not running" in _refused(api, STOP, 409)
    _ok(api, START)
    _ok(api, STOP)
    assert "not running" in _refused(api, STOP, 409)


def test_start_on_a_device_in_use_names_the_holder(api: Running) -> None:
    _ok(api, CREATE)
    api.kernel.outside.hold("tun0", by="openvpn (pid 812)")
    assert "openvpn (pid 812)" in _refused(api, START, 409)
    assert _status(api)["running"] is False
    api.kernel.outside.hold("tun0", by="")
    _ok(api, START)


# -- configure


def test_configure_changes_in_place(api: Running) -> None:
    _ok(api, CREATE)
    index, done = _status(api)["index"], len(api.kernel.executed)
    body = {"address": "10.8.0.1", "netmask": "255.255.0.0", "mtu": 1400}
    assert _ok(api, CONFIGURE, body) == "Interface tun0 configured successfully"
    status = _status(api)
    assert (status["address"], status["netmask"], status["mtu"]) == ("10.8.0.1", "255.255.0.0", 1400)
    assert (status["index"], status["up"]) == (index, True)
    taken = {type(step) for step in api.kernel.executed[done:]}
    assert taken == {st.SetMtu, st.AddAddress, st.RemoveAddress}, "never down, never deleted"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"mtu": 1400}, ("10.0.0.1", "255.255.255.0", 1400)),
        ({"address": "10.0.0.2"}, ("10.0.0.2", "255.255.255.0", 1500)),
        ({"netmask": "255.255.0.0"}, ("10.0.0.1", "255.255.0.0", 1500)),
        ({}, ("10.0.0.1", "255.255.255.0", 1500)),
        (None, ("10.0.0.1", "255.255.255.0", 1500)),
        ({"mtu": None}, ("10.0.0.1", "255.255.255.0", 1500)),
    ],
)
def test_configure_takes_any_subset(api: Running, body: Any, expected: tuple[str, str, int]) -> None:
    _ok(api, CREATE)
    _ok(api, CONFIGURE, body)
    status = _status(api)
    assert (status["address"], status["netmask"], status["mtu"]) == expected


def test_configure_does_not_stop_processing(api: Running) -> None:
    _ok(api, CREATE)
    _ok(api, START)
    _ok(api, CONFIGURE, {"mtu": 1400})
    assert _status(api)["running"] is True


def test_a_configure_that_fails_is_undone(api: Running) -> None:
    _ok(api, CREATE)
    api.kernel.fail(TunledgerError(ErrorCode.KERNEL_REFUSED, "no"), on=st.RemoveAddress)
    _refused(api, CONFIGURE, 500, {"address": "10.8.0.1", "mtu": 1400})
    status = _status(api)
    assert (status["address"], status["mtu"], status["state"]) == ("10.0.0.1", 1500, "applied")
    assert len(api.kernel.observe().links["tun0"].addresses) == 1


# -- delete


def test_delete_stops_removes_and_cleans_up(api: Running) -> None:
    _ok(api, CREATE)
    _ok(api, START)
    assert _ok(api, DELETE) == "Interface tun0 deleted successfully"
    assert list(ours(api.kernel)) == []
    assert api.readers.devices == {}
    assert _status(api)["status"] == "no_interface"


def test_delete_of_what_is_gone_already_succeeds(api: Running) -> None:
    _ok(api, CREATE)
    api.kernel.outside.delete("tun0")
    _ok(api, DELETE)
    assert _status(api)["status"] == "no_interface"


# -- without an interface, and bad bodies


@pytest.mark.parametrize("call", [START, STOP, CONFIGURE, DELETE], ids=lambda call: call[1].rsplit("/", 1)[1])
def test_without_an_interface_it_is_400(api: Running, call: tuple[str, str]) -> None:
    assert _refused(api, call, 400) == "no interface has been created; create one first"
    assert api.intents() == []


BAD_BODIES: list[tuple[bytes, str]] = [
    (b"{", "body: not JSON"),
    (b"[]", "body: a list where an object"),
    (b"null", "body: null where an object"),
    (b'{"mtu": 1400, "mtu": 1500}', '"mtu": given twice'),
    (b'{"speed": 10}', "speed: unknown field"),
    (b'{"mtu": "1400"}', 'mtu: "1400" is not a whole number'),
    (b'{"mtu": true}', "mtu: true is not a whole number"),
    (b'{"mtu": 67}', "mtu: 67 is out of range; expected 68 to 65535"),
    (b'{"address": 7}', "address: 7 is not a string"),
    (b'{"address": "127.0.0.1"}', 'address: "127.0.0.1" is a loopback address'),
    (b'{"netmask": "255.0.255.0"}', 'netmask: "255.0.255.0" is not contiguous'),
    (b'{"mtu": {"a": {"b": [1, {"c": 2}]}}}', "mtu: "),
    (b'{"mtu":' + b"[" * 900 + b"]" * 900 + b"}", "mtu: [[[["),
    (b'{"mtu":' + b"[" * 20000 + b"]" * 20000 + b"}", "body: not JSON"),
]


@pytest.mark.parametrize(("body", "words"), BAD_BODIES, ids=[words[:30] for _, words in BAD_BODIES])
def test_a_bad_body_changes_nothing(api: Running, body: bytes, words: str) -> None:
    assert _refused(api, CREATE, 400, body).startswith(words)
    assert api.intents() == []
    assert list(ours(api.kernel)) == []
    _ok(api, CREATE)
    before, done = _status(api), str(api.kernel)
    if "speed" not in words:
        assert _refused(api, CONFIGURE, 400, body).startswith(words.replace("is not contiguous", ""))
    assert (_status(api), str(api.kernel)) == (before, done)
    assert len(api.intents()) == 1


@pytest.mark.parametrize("body", [{"force": True}, b"{", b"[]"])
@pytest.mark.parametrize("call", [START, STOP])
def test_start_and_stop_take_no_fields(api: Running, call: tuple[str, str], body: Any) -> None:
    _ok(api, CREATE)
    _refused(api, call, 400, body)
    assert _status(api)["running"] is False


def test_no_nesting_is_too_deep_to_be_refused(api: Running) -> None:
    """Around the depth that the parser still takes, showing the value must not fail either."""
    for depth in range(850, 1010):
        body = b'{"mtu":' + b"[" * depth + b"]" * depth + b"}"
        assert api.call(*CREATE, body).status_code == 400, f"depth {depth}"


@pytest.mark.parametrize(("size", "status"), [(64 * 1024, 200), (64 * 1024 + 1, 413), (10 * 1024 * 1024, 413)])
def test_a_body_is_64_kib_at_most(api: Running, size: int, status: int) -> None:
    body = b'{"mtu": 1400}'.ljust(size)
    answer = api.call(*CREATE, body)
    assert answer.status_code == status
    if status == 413:
        assert answer.json() == {"error": "body: over 65536 bytes"}
        assert api.intents() == []


NAMES_OF_ALL_KINDS = [
    "a\nb",
    "\x00",
    "\u2028",
    "\x1b[31m",
    "a" * 60000,
    "\U0001f600",
    7,
    ["x"],
    {"a": 1},
    True,
    "",
    "..",
]


@pytest.mark.parametrize("name", NAMES_OF_ALL_KINDS, ids=lambda name: repr(name)[:12])
def test_no_name_however_odd_harms_the_log(api: Running, name: object) -> None:
    _refused(api, CREATE, 400, {"name": name})
    (rejected,) = api.rejections(1)
    assert (rejected.code, rejected.field, rejected.command) == ("invalid_field", "name", "DeclareInterface")
    assert len(rejected.name) <= 64
    assert rejected.name.isprintable()
    assert api.call("GET", "/health").status_code == 200
    _ok(api, CREATE)
    assert api.reader.verify().problems == []


# -- the log behind it


def test_every_success_names_its_command_and_is_in_the_log_with_its_outcome(api: Running) -> None:
    for call in (CREATE, START, CONFIGURE, STOP, DELETE):
        answer = api.call(*call)
        command = answer.headers["tunledger-command-id"]
        intent, outcome = api.reader.command(command)
        assert type(outcome.body).__name__ == "CommandApplied"
        assert intent.actor == outcome.actor == "uid:0"
    assert api.reader.verify().problems == []


def test_history_shows_what_was_refused_by_whom_and_why(api: Running) -> None:
    _ok(api, CREATE)
    _refused(api, CREATE, 409)
    _refused(api, CREATE, 400, {"mtu": 7})
    _refused(api, STOP, 409)
    _refused(api, CONFIGURE, 400, {"mtu": "x"})
    api.rejections(4)
    shown = [entry for entry in api.history("tun0") if entry["outcome"] == "rejected"]
    assert sorted((entry["what"], entry["code"], entry["message"]) for entry in shown) == [
        ("ConfigureInterface", "invalid_field", 'mtu: "x" is not a whole number; expected 68 to 65535'),
        ("DeclareInterface", "interface_exists", "interface tun0 already exists"),
        ("DeclareInterface", "invalid_field", "mtu: 7 is out of range; expected 68 to 65535"),
        ("DisableProcessing", "not_running", "packet processing on tun0 is not running"),
    ]
    for entry in shown:
        assert (entry["actor"], entry["user"], entry["via"]) == ("uid:0", "root", "classic")
        assert (entry["event"], entry["name"], entry["recorded_at"]) == ("CommandRejected", "tun0", NOW)


def test_history_shows_commands_with_their_outcomes_newest_first(api: Running) -> None:
    _ok(api, CREATE)
    api.kernel.fail(TunledgerError(ErrorCode.KERNEL_REFUSED, "no (EIO)", errno_name="EIO"), on=st.SetMtu)
    _refused(api, CONFIGURE, 500, {"mtu": 1400})
    _ok(api, DELETE)
    shown = [(e["what"], e["outcome"], e["message"]) for e in api.history("tun0")]
    assert shown == [
        ("delete", "applied", None),
        ("configure mtu 1500 -> 1400", "failed", "no (EIO)"),
        ("create tun 10.0.0.1/24 mtu 1500", "applied", None),
    ]


def test_history_of_a_name_nobody_had_is_404(api: Running) -> None:
    assert api.call("GET", "/api/v1/interfaces/tun9/history").status_code == 404


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_page_of_history_has_whole_entries(api: Running, limit: int) -> None:
    for call in (CREATE, START, STOP, CONFIGURE, DELETE):
        _ok(api, call)
    whole = api.history()
    assert api.call("GET", f"/api/v1/history?limit={limit}").json()["history"] == whole[:limit]
    assert {entry["outcome"] for entry in whole[:5]} == {"applied"}


# -- a restart, and read-only


def test_a_restart_brings_it_all_back(path: Path) -> None:
    with Running(path) as api:
        _ok(api, CREATE, {"name": "lab0", "mtu": 1400})
        _ok(api, START)
        before = api.call("GET", "/api/v1/state").json()["interfaces"]
    with Running(path) as api:
        status = _status(api)
        assert (status["name"], status["mtu"], status["running"]) == ("lab0", 1400, True)
        assert api.call("GET", "/api/v1/state").json()["interfaces"] == before
        assert "already running" in _refused(api, START, 409)


@pytest.fixture
def lived(path: Path) -> Path:
    """A log with an interface in it."""
    with Running(path) as api:
        _ok(api, CREATE)
    return path


@pytest.mark.parametrize("call", WRITES, ids=lambda call: call[1].rsplit("/", 1)[1])
def test_read_only_refuses_writes_and_says_why(lived: Path, call: tuple[str, str]) -> None:
    before = lived.read_bytes()
    with Running(
        lived, frozen=TunledgerError(ErrorCode.LOG_CORRUPT, "the log does not verify: position 3: was changed")
    ) as api:
        error = _refused(api, call, 503)
        assert error == "read-only: the log does not verify: position 3: was changed"
        _refused(api, CREATE, 400, b"{")
        assert list(ours(api.kernel)) == []
        assert api.kernel.executed == []
    assert lived.read_bytes() == before


def test_read_only_serves_reads_and_is_unhealthy(lived: Path) -> None:
    with Running(lived, frozen=TunledgerError(ErrorCode.LOG_CORRUPT, "no trust")) as api:
        health = api.call("GET", "/health")
        assert (health.status_code, health.json()["error"]) == (503, "read-only: no trust")
        for path in (
            "/api/interface/status",
            "/api/v1/interfaces",
            "/api/v1/state",
            "/api/v1/counters",
            "/api/v1/log/head",
        ):
            assert api.call("GET", path).status_code == 200, path
        assert [entry["what"] for entry in api.history("tun0")] == ["create tun 10.0.0.1/24 mtu 1500"]
