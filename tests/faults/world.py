"""A host with a service on it, strangers around it, and an oracle outside it that knows what must hold.

A case is a `World`: break something, then ask whether everything still holds.

    with World(tmp_path, case="a kill between the intent and the ioctl") as world:
        world.start(TUNLEDGER_TEST_FAILPOINTS="kill@kernel.create.made")
        heard = world.send("POST", "/api/v1/interfaces", {"name": "tun1"})    # never raises: it may be "unknown"
        world.wait_dead()
        world.start()
        world.assert_holds()

Every request goes out through `World.send`, which notes what was heard: acknowledged, refused, or unknown. Each carries
a mark of its own (Tunledger-Reason) that the log keeps, so that every intent in the log belongs to exactly one request.
`assert_holds` replays the requests that the log says were applied, in its order, on a model of its own, and compares:
model = fold of the log = what the API shows = the kernel. The kernel is read here by messages of our own making, and
the chain is computed anew, so that a mistake of the service is not made twice. Only pure functions of the domain are
borrowed: parsing a spec, merging a patch, folding.

Network namespaces belong to threads: a World lives in the thread that entered it; threads started inside live there
too. Several worlds at once need a thread each. Nothing in here injects faults; that is the cases' business.
"""

import contextlib
import errno
import hashlib
import http.client
import ipaddress
import json
import re
import shutil
import socket
import sqlite3
import struct
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, cast
from urllib.parse import quote

from service.domain import events as ev
from service.domain.decide import merged
from service.domain.errors import TunledgerError
from service.domain.spec import parse_spec, spec_to_json
from service.domain.state import State
from service.domain.values import Address, Mode
from service.store.migrate import migrate
from service.store.reader import LogReader
from tests.e2e.harness import Service, eventually
from tests.faults.forked import nursery
from tests.kernel.outside import LinuxOutside, attr, u32
from tests.namespace import fresh_namespace

Kind = Literal["acknowledged", "accepted", "refused", "unknown", "read"]
Spec = dict[str, Any]  # the JSON form, whole

SETTLE_S = 30.0  # a generous deadline for recovery, retries and deadlines of seconds to be over
# Refusals after which it is not known whether the command had its effect: the write itself failed or was cut off.
UNSETTLED: Final = {"outcome_unknown", "log_unavailable", "internal", "log_corrupt"}
# Refusals that a repetition under the same key may change.
NOT_KEPT: Final = UNSETTLED | {"overloaded", "shutting_down", "log_full", "version_conflict", "key_reused"}
AGAIN_MAX, TAGS_MAX = 5, 12  # keys asked again and ETags looked at, the latest ones: each costs a request
MARK = "mark-"


# -- the kernel, as somebody else reads it

_RTM_GETLINK, _RTM_GETADDR = 18, 22
_NLM_F_REQUEST, _NLM_F_DUMP, _NLM_F_DUMP_INTR = 0x1, 0x300, 0x10
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_IFLA = {"address": 1, "name": 3, "mtu": 4, "txqlen": 13, "linkinfo": 18, "alias": 20, "af_spec": 26, "group": 27}
# What moves by itself: statistics, and what the kernel's link watch notes up to a second later (net/core/link_watch.c).
_IFLA_STATS, _IFLA_STATS64, _IFLA_OPERSTATE, _IFF_RUNNING, _IFF_LOWER_UP = 7, 23, 16, 0x40, 0x10000
_IFLA_CARRIER = (33, 35, 47, 48)  # IFLA_CARRIER, _CHANGES, _UP_COUNT, _DOWN_COUNT
_MOVING = frozenset({_IFLA_STATS, _IFLA_STATS64, _IFLA_OPERSTATE, *_IFLA_CARRIER})
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _IFLA_INFO_XSTATS = 1, 2, 3
_INET6_MOVING = {3, 5, 6}  # IFLA_INET6_STATS, _CACHEINFO, _ICMP6STATS
_TUN = {"owner": 1, "group": 2, "type": 3, "pi": 4, "persist": 6, "multi_queue": 7}  # IFLA_TUN_*, if_link.h
_IFF_UP, _IFF_TUN = 0x1, 0x1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8


@dataclass(frozen=True)
class Link:
    """One link as the kernel tells of it. `still` is all that does not move by itself: compare it bit for bit."""

    name: str
    ifindex: int
    alias: str
    up: bool
    mtu: int
    txqueuelen: int
    mac: str
    kind: str
    tun: Mapping[str, int]
    addresses: frozenset[str]
    still: tuple[Any, ...] = field(repr=False)


def _attrs(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            return
        yield kind & 0x3FFF, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode("utf-8", "replace")


class Host:
    """The network namespace it was made in, read by a netlink socket of its own."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.settimeout(10)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def links(self) -> dict[str, Link]:
        """All links by name, with their addresses."""
        with self._lock:
            while True:
                links, addresses = self._dump(_RTM_GETLINK, 16), self._dump(_RTM_GETADDR, 8)
                if links is not None and addresses is not None:
                    break
        by_index: dict[int, list[bytes]] = {}
        for body in addresses:
            by_index.setdefault(struct.unpack_from("=I", body, 4)[0], []).append(body)
        found = (_link(body, by_index) for body in links)
        return {link.name: link for link in found}

    def _dump(self, kind: int, header: int) -> list[bytes] | None:
        """The bodies of all messages; None if the kernel says that the dump was interrupted."""
        self._socket.send(struct.pack("=IHHII", 16 + header, kind, _NLM_F_REQUEST | _NLM_F_DUMP, 1, 0) + bytes(header))
        bodies: list[bytes] = []
        whole = True
        while True:
            data = self._socket.recv(1 << 18)
            offset = 0
            while offset < len(data):
                length, answer, flags, _, _ = struct.unpack_from("=IHHII", data, offset)
                whole = whole and not flags & _NLM_F_DUMP_INTR
                if answer == _NLMSG_DONE:
                    return bodies if whole else None
                assert answer != _NLMSG_ERROR, data[offset : offset + length]
                bodies.append(data[offset + 16 : offset + length])
                offset += (length + 3) & ~3


def _link(body: bytes, addresses: Mapping[int, Sequence[bytes]]) -> Link:
    _family, _type, ifindex, flags, _change = struct.unpack_from("=BxHiII", body)
    found = dict(_attrs(body[16:]))
    info = dict(_attrs(found.get(_IFLA["linkinfo"], b"")))
    data = dict(_attrs(info.get(_IFLA_INFO_DATA, b"")))
    kind = _text(info.get(_IFLA_INFO_KIND, b""))
    still = {k: v for k, v in found.items() if k not in _MOVING}
    still[_IFLA["af_spec"]] = b"".join(
        attr(family, b"".join(attr(k, v) for k, v in _attrs(value) if family != 10 or k not in _INET6_MOVING))
        for family, value in _attrs(found.get(_IFLA["af_spec"], b""))
    )
    still[_IFLA["linkinfo"]] = b"".join(attr(k, v) for k, v in sorted(info.items()) if k != _IFLA_INFO_XSTATS)
    own = sorted(addresses.get(ifindex, ()))
    return Link(
        name=_text(found[_IFLA["name"]]),
        ifindex=ifindex,
        alias=_text(found.get(_IFLA["alias"], b"")),
        up=bool(flags & _IFF_UP),
        mtu=struct.unpack("=I", found[_IFLA["mtu"]])[0],
        txqueuelen=struct.unpack("=I", found.get(_IFLA["txqlen"], bytes(4)))[0],
        mac=":".join(f"{byte:02x}" for byte in found.get(_IFLA["address"], b"")),
        kind=kind,
        tun={name: int.from_bytes(data[n], "little") for name, n in _TUN.items() if n in data} if kind == "tun" else {},
        addresses=frozenset(filter(None, map(_address, own))),
        still=(flags & ~(_IFF_RUNNING | _IFF_LOWER_UP), tuple(sorted(still.items())), tuple(own)),
    )


def _address(body: bytes) -> str | None:
    """An address that somebody set; None for a link-local one of the kernel's own."""
    family, prefixlen = struct.unpack_from("=BB", body)
    found = dict(_attrs(body[8:]))
    packed = found.get(_IFA_LOCAL) or found[_IFA_ADDRESS]
    ip = ipaddress.ip_address(packed)
    return None if family == socket.AF_INET6 and ip.is_link_local else f"{ip}/{prefixlen}"


def _changed(before: tuple[Any, ...], now: tuple[Any, ...]) -> str:
    """What of a link's `still` is another: the flags, or attributes by number (IFLA_*, if_link.h), or addresses."""
    if before == now:
        return ""
    old, new = dict(before[1]), dict(now[1])
    attributes = {n: (old.get(n), new.get(n)) for n in old.keys() | new.keys() if old.get(n) != new.get(n)}
    flags = f"flags {before[0]:#x} -> {now[0]:#x}" if before[0] != now[0] else ""
    return f"{flags} attributes {attributes} addresses {set(before[2]) ^ set(now[2])}"


# -- what was sent


@dataclass
class Heard:
    """One request and what came back. `status` is None if nothing did."""

    number: int
    method: str
    path: str
    body: Any
    key: str | None
    mark: str
    began: float
    status: int | None = None
    answer: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    ended: float | None = None
    why: str = ""

    @property
    def kind(self) -> Kind:
        """Acknowledged (2xx), accepted (202), refused (it promises no effect), unknown, or a mere read."""
        if self.method == "GET" or "dry_run=" in self.path:
            return "read"
        if self.status is None:
            return "unknown"
        if self.status == 202:
            return "accepted"
        if self.status < 300:
            return "acknowledged"
        if self.status >= 500 and self.path.startswith("/api/interface/"):  # that API has no codes
            cut_off = self.status == 503 and "shutting" not in str(self.answer) and "stopping" not in str(self.answer)
            return "unknown" if cut_off else "refused"
        return "unknown" if self.code in UNSETTLED else "refused"

    @property
    def code(self) -> str | None:
        """The error's code, where the answer has one."""
        return self.answer.get("code") if isinstance(self.answer, dict) else None

    @property
    def kept(self) -> bool:
        """Whether the same key and body must give this very answer again."""
        return (
            self.key is not None and self.kind in ("acknowledged", "accepted", "refused") and self.code not in NOT_KEPT
        )

    @property
    def command_id(self) -> str | None:
        """The command's id, as the answer says it."""
        return self.headers.get("tunledger-command-id")

    def __str__(self) -> str:
        what = f"#{self.number} {self.method} {self.path} {json.dumps(self.body) if self.body is not None else ''}"
        return f"{what.strip()} -> {self.status or self.why or 'no answer'} ({self.kind})"

    def names(self) -> set[str] | None:
        """The interfaces it is about; None where only the service knows (the original API's one)."""
        found = re.fullmatch(r"/api/v1/interfaces/([^/?]+)(?:/(?:start|stop))?(?:\?.*)?", self.path)
        if found:
            return {found[1]}
        if re.fullmatch(r"/api/v1/interfaces(\?.*)?", self.path):
            return {self.body["name"]}
        if self.path.startswith("/api/v1/batch"):
            return {next(iter(each.values()))["name"] for each in self.body["commands"]}
        return None

    def apply(self, name: str, spec: Spec | None) -> Spec | None:
        """What this command makes of an interface, in the model."""
        path = self.path.partition("?")[0]
        body = self.body if isinstance(self.body, dict) else {}
        if path.startswith("/api/interface/"):
            return _classic(path.rpartition("/")[2], name, body, spec)
        if path == "/api/v1/batch":
            for each in body["commands"]:
                ((verb, value),) = each.items()
                if value["name"] == name:
                    return _done(verb, name, value.get("patch", value), spec)
            raise AssertionError(f"{self}: the log has {name} in it")
        verb = {"POST": "create", "PUT": "create", "PATCH": "change", "DELETE": "delete"}[self.method]
        last = path.rpartition("/")[2]
        return _done(last if path.count("/") == 5 else verb, name, body, spec)


def _whole(name: str, spec: Mapping[str, Any]) -> Spec:
    given = {key: value for key, value in spec.items() if value is not None}
    return spec_to_json(parse_spec({"name": name, **given}))


def _done(verb: str, name: str, body: Mapping[str, Any], spec: Spec | None) -> Spec | None:
    if verb == "create":
        return _whole(name, body)
    if verb == "delete":
        return None
    assert spec is not None, f"{verb} on {name}, which is not there"
    if verb == "change":
        return _whole(name, merged(spec, dict(body)))
    return spec | {"processing": spec["processing"] | {"running": verb == "start"}}


def _classic(verb: str, name: str, body: Mapping[str, Any], spec: Spec | None) -> Spec | None:
    if verb in ("create", "configure"):
        old: Any = ipaddress.ip_interface((spec or {"addresses": ["10.0.0.1/24"]})["addresses"][0])
        ip = body.get("address") or str(old.ip)
        mask = body.get("netmask") or ("255.255.255.0" if spec is None else str(old.network.prefixlen))
        address = str(ipaddress.ip_interface(f"{ip}/{mask}"))
        if verb == "create":
            return _whole(name, {"addresses": [address], "mtu": body.get("mtu", 1500)})
        assert spec is not None
        return _whole(
            name, spec | {"addresses": [address, *spec["addresses"][1:]], "mtu": body.get("mtu", spec["mtu"])}
        )
    return _done(verb, name, body, spec)


# -- strangers


def _plant(node: str) -> None:
    """Links of other owners, in the present namespace. All of them outlive whoever made them."""
    outside = LinuxOutside()
    try:
        outside.add_link("tun90", Mode.TUN)
        outside.add_link("tap90", Mode.TAP)
        somebody = "0192f0c0-0000-7000-8000-000000000001"
        other = ("0" if node[0] != "0" else "1") + node[1:]
        outside.add_link("tun91", Mode.TUN, alias=f"tunledger:{other}:{somebody}")
        outside.add_link("tun92", Mode.TUN, alias=f"tunledgar:{node}:{somebody}")
        outside.add_link("tun93", Mode.TUN, alias=f"tunledger:{node}:{somebody} ")
        outside.add_link("tun94", Mode.TUN)
        outside.add_address("tun94", Address(ipaddress.ip_address("198.51.100.1"), 24))
        address = ipaddress.ip_address("2001:db8:94::1")
        # With IFA_F_NODAD: otherwise its flags change by themselves, once nobody else was found to have it.
        body = struct.pack("=BBBBi", socket.AF_INET6, 64, 0x02, 0, socket.if_nametoindex("tun94"))
        outside._request(20, body + attr(_IFA_ADDRESS, address.packed), 0x400)  # RTM_NEWADDR, NLM_F_CREATE
        outside.set_up("tun94", up=True)
        outside.add_link("tun95", Mode.TUN)
        outside._link("tun95", attr(_IFLA["group"], u32(77)))  # as `ip link set group 77`
        for kind in ("dummy", "ifb", "veth"):  # whichever this kernel has
            body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + attr(_IFLA["name"], b"other90\0")
            body += attr(_IFLA["linkinfo"], attr(_IFLA_INFO_KIND, kind.encode()))
            with contextlib.suppress(OSError):
                outside._request(16, body, 0x600)  # RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL
                break
    finally:
        outside.close()


# -- databases

_template_lock = threading.Lock()
_template: list[tempfile.TemporaryDirectory[str]] = []


def _migrated(path: Path) -> None:
    """A fresh migrated database, as a copy of one: making it costs a fifth of a second."""
    with _template_lock:
        if not _template:
            folder = tempfile.TemporaryDirectory(prefix="tunledger-template-")
            migrate(Path(folder.name) / "log.db", now=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
            _template.append(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(_template[0].name) / "log.db", path)


class ForkedService(Service):
    """A service that is forked instead of started from the interpreter on (`tests.faults.forked`)."""

    def spawn(self, **environment: str) -> None:
        """Start the process without waiting for it. The database must be there."""
        if self.process is not None:
            self.process.wait(30)
        forked = nursery().start("serve", environment=self.environment | environment, log=self.log)
        self.process = cast("Any", forked)


# -- the world


class World:
    """A fresh network namespace, strangers in it, and a service that is not started yet.

    Args:
        folder: for the database and the service's log.
        case: names the case in every failure.
        settings: environment for the service, such as {"TUNLEDGER_SHUTDOWN__INTERFACES": "keep"}.
        decoys: whether to plant links of other owners.
        forked: False to start each service from the interpreter on, which costs a second more.
        database: the database's file, if it is to lie elsewhere (on a small file system, say).

    Attributes:
        service: the process and its files (`tests.e2e.harness`).
        host: the kernel's links as somebody else reads them.
        node: the node's id in our tokens.
        sent: all commands that were sent, with what was heard.
        planted: ids of interfaces whose links a case has put on the host itself, so that the log need not declare them.
    """

    def __init__(
        self,
        folder: Path,
        *,
        case: str = "",
        settings: Mapping[str, str] | None = None,
        decoys: bool = True,
        database: Path | None = None,
        forked: bool = True,
    ) -> None:
        self.case, self.sent = case, list[Heard]()
        self.clock_was_set = False  # while a deadline ran: then the log's times do not tell whether it was kept
        self.planted: set[str] = set()
        self._decoys_wanted = decoys
        extra = {} if database is None else {"TUNLEDGER_DATABASE__URL": f"sqlite:///{database}"}
        kind = ForkedService if forked else Service
        self.service: Service = kind(folder, settings={**extra, **(settings or {})})
        if database is not None:
            self.service.database = database
        self.node = ""
        self._stack = contextlib.ExitStack()
        self._lock = threading.Lock()
        self._strangers: dict[str, Link] = {}
        self._etags: dict[str, str] = {}
        self._counters: dict[str, dict[str, int]] = {}
        self._carried: dict[str, int] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(fresh_namespace())
            self.host = Host()
            stack.callback(self.host.close)
            stack.callback(self.service.close)
            if not self.service.database.exists():
                _migrated(self.service.database)
            with contextlib.suppress(sqlite3.Error):
                self.node = self.query("SELECT id FROM node")[0][0]
            if self._decoys_wanted:
                _plant(self.node or "0123456789ab")
            self.adopt_strangers()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if error is None:  # thousands of cases would leave 4 MiB each
            with contextlib.suppress(OSError):  # on a disk that was made read-only
                self.service.database.with_name(self.service.database.name + ".reserve").unlink(missing_ok=True)

    # -- the process

    def start(self, **environment: str) -> None:
        """Start the service and wait until it answers. Fails if it ends first."""
        self.service.start(**environment)

    def try_start(self, **environment: str) -> bool:
        """Start the service; whether it answered before it died."""
        self.service.spawn(**environment)
        try:
            self.service.wait_ready()
        except AssertionError:
            assert self.service.process is not None
            if self.service.process.poll() is None:
                raise
            return False
        return True

    def kill(self) -> None:
        """kill -9, and see that the host has nothing that the log does not know."""
        self.service.kill()
        self.assert_dead_is_sound()

    def stop(self) -> int:
        """An orderly stop; the exit status."""
        return self.service.stop()

    def alive(self) -> bool:
        """Whether the service runs."""
        return self.service.process is not None and self.service.process.poll() is None

    def wait_dead(self) -> int:
        """Wait for the service to end by itself; its exit status, negative for a signal."""
        assert self.service.process is not None
        return self.service.process.wait(30)

    def workers(self) -> list[int]:
        """The pids of the service's packet workers."""
        assert self.service.process is not None
        found: list[int] = []
        for thread in Path(f"/proc/{self.service.process.pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, thread.read_text().split())
        return found

    # -- requests

    def send(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 30.0,
    ) -> Heard:
        """Send one request and note what comes of it. Never raises; may be called by several threads.

        Args:
            key: an Idempotency-Key.
            timeout_s: hang up after this long without an answer.
        """
        with self._lock:
            number = len(self.sent) + 1
            heard = Heard(number, method, path, body, key, f"{MARK}{number}", time.monotonic())
            if method != "GET":
                self.sent.append(heard)
        given = {"Tunledger-Reason": heard.mark, **({"Idempotency-Key": key} if key else {}), **(headers or {})}
        heard.mark = given["Tunledger-Reason"]
        try:
            heard.status, heard.headers, heard.answer = self._exchange(method, path, body, given, timeout_s)
        except (OSError, http.client.HTTPException, ValueError) as error:
            heard.status, heard.why = None, repr(error)
        heard.ended = time.monotonic()
        tag = heard.headers.get("etag")
        if tag and method in ("POST", "PUT", "PATCH") and isinstance(heard.answer, dict) and "spec" in heard.answer:
            self._note_etag(tag, heard.answer)
        return heard

    def get(self, path: str) -> Any:
        """A read that must succeed: its JSON."""
        status, _, answer = self._exchange("GET", path, None, {}, 30.0)
        assert status == 200, f"GET {path}: {status} {answer}"
        return answer

    def traffic(self, name: str, *, packets: int = 100, size_bytes: int = 1000) -> None:
        """Have the host send packets into an interface of ours that has an IPv4 address and a reader.

        Raises:
            OSError: it is down, or gone.
        """
        link = self.host.links().get(name)
        if link is None:
            raise OSError(errno.ENODEV, f"{name}: gone, or its name was mended")
        inside = next(ipaddress.ip_interface(a) for a in sorted(link.addresses) if ":" not in a)
        to = str(next(ip for ip in inside.network.hosts() if ip != inside.ip))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
            for _ in range(packets):
                sender.sendto(bytes(size_bytes), (to, 9))
        identity = link.alias.rpartition(":")[2]
        self._carried[identity] = self._carried.get(identity, 0) + packets * (size_bytes + 28)

    def _exchange(
        self, method: str, path: str, body: Any, headers: Mapping[str, str], timeout_s: float
    ) -> tuple[int, dict[str, str], Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=timeout_s)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, dict(headers))
            response = connection.getresponse()
            text = response.read()
            found = {name.lower(): value for name, value in response.getheaders()}
            return response.status, found, json.loads(text) if text else None
        finally:
            connection.close()

    # -- strangers

    def adopt_strangers(self) -> None:
        """Take every link that is there now and does not bear our token for somebody else's, as it is now."""
        self._strangers = {
            link.name: link for link in self.host.links().values() if link.name != "lo" and not self._identity(link)
        }

    def plant(self, name: str) -> None:
        """Somebody else makes a link: one more that must stay as it is, whatever its name."""
        outside = LinuxOutside()
        try:
            outside.add_link(name, Mode.TAP)
        finally:
            outside.close()
        self._strangers[name] = self.host.links()[name]

    def uproot(self, name: str) -> None:
        """Somebody else removes a link of theirs."""
        del self._strangers[name]
        outside = LinuxOutside()
        try:
            outside.delete(name)
        finally:
            outside.close()

    def assert_strangers_untouched(self) -> None:
        """Links of other owners are bit for bit what they were; holds also while the service is down or read-only."""
        now = self.host.links()
        for name, before in self._strangers.items():
            assert name in now, f"{name} is not ours and is gone"
            changed = _changed(before.still, now[name].still)
            assert not changed, f"{name} is not ours and was changed: {changed}"

    def ours(self) -> dict[str, Link]:
        """The links that bear our token, by interface id. No two bear the same."""
        found: dict[str, Link] = {}
        for link in self.host.links().values():
            identity = self._identity(link)
            if identity is not None:
                assert identity not in found, f"{link.name} and {found[identity].name} are both interface {identity}"
                found[identity] = link
        return found

    def _identity(self, link: Link) -> str | None:
        found = re.fullmatch(
            rf"tunledger:{self.node}:([0-9a-f]{{8}}(?:-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}})", link.alias
        )
        return found[1] if found else None

    # -- what must hold

    def assert_dead_is_sound(self) -> None:
        """While the service is dead: no kernel effect without an intent in the log, strangers as they were."""
        with self._said():
            self.assert_strangers_untouched()
            state, events = self._log()
            botched = {
                e.body.interface_id for e in events if isinstance(e.body, ev.CommandFailed) and not e.body.undone
            }
            known = {*state.interfaces, *botched, *self.planted}
            unknown = {link.name for identity, link in self.ours().items() if identity not in known}
            assert not unknown, f"{unknown}: on the host, but the log has no intent for it"

    def assert_holds(
        self, *, degraded: Collection[str] = (), unrepaired: Collection[str] = (), mistakes: bool = False
    ) -> None:
        """Wait until the service is up and settled, then assert everything that must always hold (docs of the plan).

        Args:
            degraded: interfaces that cannot be as desired now, and must say so.
            unrepaired: interfaces that may differ without being degraded, such as those with `drift: report`.
            mistakes: whether the service may have logged a traceback; it writes one only of what nobody expected.
        """
        with self._said():
            self._settle(set(degraded), set(unrepaired))
            self.assert_strangers_untouched()
            state, events = self._log()
            model = self._assert_commands(events)
            shown = self._assert_one_state(state, model, set(degraded) | set(unrepaired))
            self._assert_host(shown, set(degraded), set(unrepaired))
            self.note_counters()
            self._assert_etags(shown)
            self._assert_nothing_left(set(degraded) | set(unrepaired))
            self._assert_keys()  # last: a refusal that is repeated may be recorded once more
            self.assert_strangers_untouched()
            if not mistakes:
                assert "Traceback" not in self.service.log.read_text(errors="replace"), (
                    "a traceback in the service's log"
                )

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except (AssertionError, TunledgerError, OSError, http.client.HTTPException, KeyError) as error:
            told = "\n".join(map(str, self.sent[-20:]))
            log = self.service.log.read_text()[-3000:] if self.service.log.exists() else ""
            raise AssertionError(f"{self.case}: {error!r}\n\nsent:\n{told}\n\nthe service's log:\n{log}") from error

    def _settle(self, degraded: set[str], unrepaired: set[str]) -> None:
        def settled() -> bool:
            assert self.alive(), "the service is not running"
            try:
                status, _, health = self._exchange("GET", "/health", None, {}, 30.0)
                if status != 200:
                    waiting.append(str(health))
                    return False
                before = self.get("/api/v1/log/head")["position"]
                interfaces = self._listed()
                drift = self.get("/api/v1/drift")["drift"]
                pending = [i["spec"]["name"] for i in interfaces if i["status"]["state"] == "pending"]
                said = {i["spec"]["name"] for i in interfaces if i["status"]["state"] == "degraded"}
                bad = {each["name"] for each in drift} | said
                waiting.append(f"pending {pending}, drift {drift}, not as desired {bad}")
                if pending or bad - degraded - unrepaired or degraded - said:
                    return False
                due = self._due()
                waiting.append(f"taken back soon: {due}")
                return not due and bool(before == self.get("/api/v1/log/head")["position"])
            except (OSError, http.client.HTTPException) as error:
                waiting.append(repr(error))
                return False

        waiting: list[str] = []
        try:
            eventually(settled, SETTLE_S, "settling")
        except AssertionError as error:
            raise AssertionError(f"{error}; {waiting[-1:]}") from error

    def _due(self) -> list[str]:
        """Interfaces whose unconfirmed change is taken back now, or while we look."""
        if not self.query('SELECT 1 FROM events WHERE payload LIKE \'%"confirm_by":"2%\' LIMIT 1'):
            return []
        soon = (datetime.now(UTC) + timedelta(seconds=2)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        state, _ = self._log()
        return [str(name) for name, each in state.unconfirmed.items() if each.confirm_by <= soon]

    def _listed(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        cursor: str | None = ""
        while cursor is not None:
            page = self.get(f"/api/v1/interfaces?limit=1000{cursor and '&cursor=' + cursor}")
            found += page["interfaces"]
            cursor = page["next"]
        return found

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Rows of the database as it is on disk, read by a connection of our own."""
        connection = sqlite3.connect(f"file:{quote(str(self.service.database))}?mode=ro", uri=True, timeout=10)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    def _log(self) -> tuple[State, list[ev.Recorded]]:
        """The log as it is on disk: its chain computed anew, then verified and folded."""
        columns = (
            "position, event_id, stream, version, type, schema_version, actor, "
            "coalesce(command_id, ''), node, recorded_at, payload"
        )
        head, expected = "0" * 64, 1
        for *row, previous, digest in self.query(
            f"SELECT {columns}, previous_hash, hash FROM events ORDER BY position"  # noqa: S608  # our own words
        ):
            text = "\n".join(map(str, (previous, *row)))
            assert row[0] == expected, f"position {row[0]} where {expected} belongs"
            assert previous == head, f"the chain breaks before position {row[0]}"
            assert digest == hashlib.sha256(text.encode()).hexdigest(), f"position {row[0]} was changed"
            head, expected = digest, expected + 1
        reader = LogReader(self.service.database)
        try:
            found = reader.verify()
            events = list(reader.events(upto=found.head_position))
        finally:
            reader.close()
        assert found.problems == []
        return found.state, events

    def _assert_commands(self, events: Sequence[ev.Recorded]) -> dict[str, Spec]:
        """Every intent has one outcome and belongs to one request, every request had one effect or none; what the
        applied ones make of nothing, in the log's order, by the model's own reckoning.
        """
        groups = self._groups()
        commands: dict[str, list[ev.Recorded]] = {}
        for event in events:
            if event.command_id is not None:
                commands.setdefault(event.command_id, []).append(event)
        by_group: dict[str, list[str]] = {}
        for command_id, own in commands.items():
            request = next((e.body.request for e in own if isinstance(e.body, ev.Intent | ev.ChangeConfirmed)), None)
            if request is None:
                continue  # a refusal
            self._assert_outcomes(command_id, own)
            if request.reverts:
                continue
            group = f"key {request.key}" if request.key else f"mark {request.reason}"
            assert group in groups, f"command {command_id} ({group}) is in the log, but nobody sent it"
            by_group.setdefault(group, []).append(command_id)
        for group, heard in groups.items():
            self._assert_group(heard, [(each, commands[each]) for each in by_group.get(group, [])])
        self._assert_order(groups, by_group, commands)
        return self._replay(events, groups)

    def _groups(self) -> dict[str, list[Heard]]:
        """Requests by what makes them one command: the key, or else the mark."""
        found: dict[str, list[Heard]] = {}
        for heard in self.sent:
            if heard.kind != "read":
                found.setdefault(f"key {heard.key}" if heard.key else f"mark {heard.mark}", []).append(heard)
        return found

    @staticmethod
    def _assert_outcomes(command_id: str, own: Sequence[ev.Recorded]) -> None:
        intents = [e.body.interface_id for e in own if isinstance(e.body, ev.Intent)]
        outcomes = [e.body.interface_id for e in own if isinstance(e.body, ev.Outcome)]
        assert sorted(intents) == sorted(outcomes), f"command {command_id}: intents {intents}, outcomes {outcomes}"
        kinds = {type(e.body) for e in own if isinstance(e.body, ev.Outcome)}
        assert len(kinds) <= 1, f"command {command_id} was applied in part: {kinds}"

    @staticmethod
    def _assert_group(heard: Sequence[Heard], found: Sequence[tuple[str, Sequence[ev.Recorded]]]) -> None:
        said = "; ".join(map(str, heard))
        assert len(found) <= 1, f"{said}: had {len(found)} effects"
        command_id, own = found[0] if found else ("", [])
        applied = any(isinstance(e.body, ev.CommandApplied | ev.ChangeConfirmed) for e in own)
        kept = [each for each in heard if each.kept]
        assert len({(each.status, json.dumps(each.answer, sort_keys=True)) for each in kept}) <= 1, (
            f"{said}: two answers"
        )
        for each in heard:
            if each.path.startswith("/api/v1/reconcile"):
                assert not own, f"{each}: has intents"
            elif each.kind == "acknowledged":
                assert applied, f"{each}: was acknowledged, but the log has {[type(e.body).__name__ for e in own]}"
                assert each.command_id in (None, command_id), (
                    f"{each}: command {each.command_id} is {command_id} in the log"
                )
            elif each.kind == "accepted":
                assert own, f"{each}: was accepted, but is not in the log"
            elif (
                each.kind == "refused"
                and each.code != "key_reused"
                and not any(h.status and h.status < 300 for h in heard)
            ):
                # Under one key an earlier try may have been cut off and had its effect all the same.
                cut_off = any(h.kind == "unknown" for h in heard)
                assert not applied or cut_off, f"{each}: was refused, but applied"
        names = heard[0].names()
        told = {e.body.name for e in own if isinstance(e.body, ev.Intent)}
        assert not told or names is None or told == names, f"{said}: the log has intents for {told}"

    @staticmethod
    def _assert_order(
        groups: Mapping[str, Sequence[Heard]],
        by_group: Mapping[str, Sequence[str]],
        commands: Mapping[str, Sequence[ev.Recorded]],
    ) -> None:
        """What was acknowledged before another request was sent stands before it in the log."""
        ended, begun = [], []
        for group, heard in groups.items():
            for command_id in by_group.get(group, []):
                own = [e.position for e in commands[command_id]]
                done = [each.ended for each in heard if each.kind == "acknowledged" and each.ended is not None]
                if done:
                    ended.append((min(done), max(own)))
                begun.append((min(each.began for each in heard), min(own)))
        ended.sort()
        highest, number = 0, 0
        for moment, position in sorted(begun):
            while number < len(ended) and ended[number][0] < moment:
                highest = max(highest, ended[number][1])
                number += 1
            assert position > highest, f"position {position} was sent after {highest} was acknowledged"

    def _replay(self, events: Sequence[ev.Recorded], groups: Mapping[str, Sequence[Heard]]) -> dict[str, Spec]:
        model: dict[str, Spec] = {}
        before: dict[tuple[str, str], Spec | None] = {}
        intents: dict[tuple[str | None, str], ev.Recorded] = {}
        deadlines: dict[str, str] = {}
        confirmed: set[str] = set()
        for event in events:
            body = event.body
            if isinstance(body, ev.Intent):
                intents[event.command_id, body.interface_id] = event
            elif isinstance(body, ev.ChangeConfirmed):
                confirmed.add(body.confirms)
            elif isinstance(body, ev.CommandApplied):
                intent = intents[event.command_id, body.interface_id]
                assert isinstance(intent.body, ev.Intent)
                assert event.command_id is not None
                request, name = intent.body.request, str(body.name)
                before[event.command_id, name] = model.get(name)
                if request.reverts:
                    deadline = deadlines.get(request.reverts)
                    assert deadline, f"command {request.reverts} was taken back, but had no deadline"
                    assert request.reverts not in confirmed, f"command {request.reverts} was taken back and confirmed"
                    early = intent.recorded_at < deadline and not self.clock_was_set
                    assert not early, f"command {request.reverts} was taken back before its time"
                    spec = before[request.reverts, name]
                else:
                    group = groups[f"key {request.key}" if request.key else f"mark {request.reason}"]
                    spec = group[0].apply(name, model.get(name))
                    if request.confirm_by:
                        deadlines[event.command_id] = request.confirm_by
                if spec is None:
                    model.pop(name, None)
                else:
                    model[name] = spec
        return model

    def _assert_one_state(
        self, state: State, model: Mapping[str, Spec], excused: set[str]
    ) -> dict[str, dict[str, Any]]:
        """Model = fold = what the API shows, present and at the head (snapshot + tail); the interfaces as listed."""
        folded = {str(i.name): spec_to_json(i.spec) for i in state.interfaces.values() if i.spec is not None}
        pending = [i.name for i in state.interfaces.values() if i.pending is not None]
        assert not pending, f"{pending}: no outcome"
        assert folded == model, f"the log folds to {folded}, what was heard makes {dict(model)}"
        listed = {each["spec"]["name"]: each for each in self._listed()}
        shown = {name: each["spec"] for name, each in listed.items()}
        assert shown == model, f"the API shows {shown}, what was heard makes {dict(model)}"
        present = self.get("/api/v1/state")
        past = self.get(f"/api/v1/state?at={present['position']}")
        assert (present["position"], present["hash"]) == (past["position"], past["hash"])
        for then in (present, past):
            assert {n: i["spec"] for n, i in then["interfaces"].items()} == model, (
                f"another state at {then['position']}"
            )
        assert {n: i["id"] for n, i in present["interfaces"].items()} == {n: i["id"] for n, i in listed.items()}
        assert {n: i["generation"] for n, i in present["interfaces"].items()} == {
            n: i["generation"] for n, i in past["interfaces"].items()
        }
        ids = {str(i.name): str(i.id) for i in state.interfaces.values()}
        assert {n: i["id"] for n, i in listed.items()} == ids
        for name, each in listed.items():
            assert name in excused or each["status"]["state"] == "applied", f"{name}: {each['status']}"
        return listed

    def _assert_host(self, listed: Mapping[str, dict[str, Any]], degraded: set[str], unrepaired: set[str]) -> None:
        """One live link for each declared interface, as desired, and no other way round; or it says degraded."""
        ours = self.ours()
        ids = {each["id"]: name for name, each in listed.items()}
        stray = {link.name for identity, link in ours.items() if identity not in ids}
        assert not stray, f"{stray}: on the host with our token, but not declared"
        for identity, name in ids.items():
            found = _differences(name, listed[name]["spec"], ours.get(identity))
            status = listed[name]["status"]
            if name in degraded:
                assert status["state"] == "degraded", f"{name}: {found}, but it says {status['state']}"
                assert status["reason"], f"{name}: degraded without a reason"
                continue
            if name in unrepaired:
                continue
            assert not found, f"{name}: {found}"
            assert status["ifindex"] == ours[identity].ifindex
            running = status["observed"]["processing"]["running"]
            assert running == listed[name]["spec"]["processing"]["running"], f"{name}: running {running}"

    def note_counters(self) -> None:
        """Lifetime totals never go down, over restarts and recreations; nor do they grow by more than was sent.

        What is shown is stored, so it counts from the moment it was read here. Raises AssertionError.
        """
        for name, each in self.get("/api/v1/counters")["counters"].items():
            identity = each["id"]
            now = {f"{source}.{k}": v for source in ("kernel", "worker") for k, v in each.get(source, {}).items()}
            known = self._counters.setdefault(identity, {})
            for figure, value in known.items():
                assert now.get(figure, 0) >= value, f"{name}: {figure} was {value}, is {now.get(figure, 0)}"
            known.update(now)
            carried = self._carried.get(identity)
            if carried is not None:
                counted = now.get("kernel.tx_bytes", 0)
                assert counted <= carried + 65_536, f"{name}: {counted} bytes counted, {carried} sent"

    def _assert_etags(self, listed: Mapping[str, dict[str, Any]]) -> None:
        for name in sorted(listed)[:TAGS_MAX]:
            status, headers, answer = self._exchange("GET", f"/api/v1/interfaces/{name}", None, {}, 30.0)
            if status == 200:
                self._note_etag(headers["etag"], answer)

    def _note_etag(self, tag: str, answer: Mapping[str, Any]) -> None:
        desired = json.dumps([answer["id"], answer["spec"], answer["generation"]], sort_keys=True)
        known = self._etags.setdefault(tag, desired)
        assert known == desired, f"{self.case}: ETag {tag} stands for {known} and for {desired}"

    def _assert_keys(self) -> None:
        """The same Idempotency-Key and body give the answer that was given before."""
        asked: dict[str, Heard] = {each.key: each for each in self.sent if each.key is not None and each.kept}
        for key, heard in list(asked.items())[-AGAIN_MAX:]:
            again = self._exchange(
                heard.method, heard.path, heard.body, {"Idempotency-Key": key, "Tunledger-Reason": "again"}, 30.0
            )
            assert (again[0], again[2]) == (heard.status, heard.answer), f"{heard}: again {again[0]} {again[2]}"

    def _assert_nothing_left(self, excused: set[str]) -> None:
        """A second reconcile finds nothing, writes nothing but that it was asked for, does nothing."""
        before, links = self.get("/api/v1/log/head"), {i: _set_by_somebody(link) for i, link in self.ours().items()}
        status, _, summary = self._exchange("POST", "/api/v1/reconcile", None, {"Tunledger-Reason": "again"}, 30.0)
        assert status == 200, f"reconcile: {status} {summary}"
        acted = {
            what: left
            for what, names in summary.items()
            if isinstance(names, list) and what != "adopted"
            if (left := set(names) - excused)
        }
        assert not acted, f"a second reconcile had something to do: {acted}"
        if not excused:
            news = self.query(f"SELECT type, payload FROM events WHERE position > {int(before['position'])}")  # noqa: S608
            assert [kind for kind, _payload in news] == ["ReconcileRequested"], f"a second reconcile wrote {news}"
            done = {i: _set_by_somebody(link) for i, link in self.ours().items()}
            assert done == links, f"a second reconcile made {done} of {links}"


def _set_by_somebody(link: Link) -> tuple[Any, ...]:
    """What of a link changes only if somebody changes it: not its carrier, nor addresses that the kernel makes."""
    return (link.name, link.ifindex, link.alias, link.up, link.mtu, link.txqueuelen, link.mac, link.tun, link.addresses)


def _differences(name: str, spec: Spec, link: Link | None) -> list[str]:
    """What of a link is not as its spec says, read without the service's code."""
    if link is None:
        return ["it does not exist"]
    wanted: dict[str, Any] = {
        "name": name,
        "kind": "tun",
        "mode": spec["mode"],
        "addresses": sorted(spec["addresses"]),
        "mtu": spec["mtu"],
        "up": spec["up"],
        "txqueuelen": spec["txqueuelen"],
        "owner": spec["owner"],
        "group": spec["group"],
        "multi_queue": spec["multi_queue"],
        "persist": True,
    }
    found: dict[str, Any] = {
        "name": link.name,
        "kind": link.kind,
        "mode": "tun" if link.tun.get("type") == _IFF_TUN else "tap",
        "addresses": sorted(link.addresses),
        "mtu": link.mtu,
        "up": link.up,
        "txqueuelen": link.txqueuelen,
        "owner": link.tun.get("owner"),
        "group": link.tun.get("group"),
        "multi_queue": bool(link.tun.get("multi_queue", 0)),
        "persist": bool(link.tun.get("persist", 0)),
    }
    if spec["mac"] is not None:
        wanted["mac"], found["mac"] = spec["mac"], link.mac
    return [f"{key}: desired {wanted[key]}, found {found[key]}" for key in wanted if wanted[key] != found[key]]
