"""What commonly goes wrong on a host, each check with how to mend it. Changes nothing."""

import os
import shutil
import socket
from collections.abc import Container, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Literal

import sqlalchemy as sa

from service.cli.client import CallError, Client, url_of
from service.cli.local import not_ours_to_read
from service.config import Config
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.state import Interface
from service.domain.values import InterfaceId
from service.kernel import tundev
from service.kernel.errnos import no_device_node
from service.kernel.namespaces import RunNetns, host_kernel
from service.store import database
from service.store.reader import LogReader

CAP_NET_ADMIN = 12  # include/uapi/linux/capability.h
SPACE_LOW_BYTES = 100 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: "ok", "warning" or "FAIL", what was found, and what to do about it."""

    check: str
    state: Literal["ok", "warning", "FAIL"]
    found: str
    mend: str = ""


def examine(config: Config) -> list[Finding]:
    """All checks, in the order in which a start would meet them."""
    service = _service(config)
    log = _database(config, serving="tunledger" in service.found)
    node, declared = _declared(config)
    return [
        _capability(),
        _device_node(),
        service,
        *log,
        *_namespaces(declared),
        _leftovers(node, declared),
    ]


def _capability() -> Finding:
    status = Path("/proc/self/status").read_text()
    effective = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff"))
    if effective >> CAP_NET_ADMIN & 1:
        return Finding("capability", "ok", f"uid {os.geteuid()} has CAP_NET_ADMIN")
    return Finding(
        "capability",
        "FAIL",
        f"uid {os.geteuid()} lacks CAP_NET_ADMIN",
        "run as root, or give the unit AmbientCapabilities=CAP_NET_ADMIN",
    )


def _device_node() -> Finding:
    try:
        os.close(tundev.open_node())
    except OSError as error:
        refusal = no_device_node(tundev.TUN_PATH, error.errno or 0)
        mend = "modprobe tun; in a container: --device /dev/net/tun"
        if refusal.code is ErrorCode.PERMISSION_DENIED:
            mend = "run as root, or as a user who may read and write it"
        return Finding("device node", "FAIL", refusal.message, mend)
    return Finding("device node", "ok", f"{tundev.TUN_PATH} opens")


def _service(config: Config) -> Finding:
    host, port = config.server.host, config.server.port
    try:
        answer = Client(url_of(host, port)).call("GET", "/health", ok=(200, 401, 503))
        health = answer.body if isinstance(answer.body, dict) else {}
        if answer.status == HTTPStatus.UNAUTHORIZED:
            mend = "ask as root, or as the user that the service runs as"
            return Finding("service", "FAIL", f"{host}:{port}: {health.get('error')}", mend)
        if health.get("service") == "tunledger":
            if health["status"] == "healthy":
                return Finding("service", "ok", f"tunledger answers on {host}:{port}")
            return Finding("service", "FAIL", f"tunledger is unhealthy: {health.get('error')}", "see its log")
    except CallError as error:
        if error.reachable:
            return Finding("service", "FAIL", f"{host}:{port}: {error}", "choose another server.port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            mend = f"find it with: ss -ltnp 'sport = {port}'; or choose another server.port"
            return Finding("service", "FAIL", f"{host} port {port}: {error.strerror}", mend)
    return Finding("service", "ok", f"not running; {host} port {port} is free")


def _database(config: Config, *, serving: bool) -> list[Finding]:
    path = config.database.path
    try:
        database.require_current(path)
    except TunledgerError as error:
        if (why := not_ours_to_read(path)) is not None:
            return [Finding("database", "FAIL", why, "run as root, or as the service's user")]
        lost = error.code is ErrorCode.LOG_CORRUPT
        mend = "keep the file, restore a copy; until then the service starts read-only" if lost else "tunledger migrate"
        return [Finding("database", "FAIL", error.message, mend)]
    except OSError as error:
        return [Finding("database", "FAIL", f"{path}: {error.strerror}", "run as the service's user")]
    found = []
    reader = LogReader(path)
    try:
        verification = reader.verify()
    finally:
        reader.close()
    if verification.problems:
        mend = "keep the file, restore a copy; until then the service starts read-only"
        found.append(Finding("database", "FAIL", verification.problems[0], mend))
    else:
        found.append(Finding("database", "ok", f"{path}: {verification.events:,} events, chain sound"))
    if not os.access(path, os.W_OK):
        found.append(Finding("database", "FAIL", f"{path} is not writable", "run as the service's user"))
    free = shutil.disk_usage(path.parent).free
    if free < SPACE_LOW_BYTES:
        found.append(Finding("disk", "warning", f"{free // 1024**2} MiB free at {path.parent}", "free some space"))
    else:
        found.append(Finding("disk", "ok", f"{free // 1024**2:,} MiB free at {path.parent}"))
    if not serving:
        try:
            with database.InstanceLock(path, {}):
                pass
        except TunledgerError as error:
            found.append(Finding("lock", "FAIL", error.message, "stop that one, or give each its own database.url"))
    return found


def _declared(config: Config) -> tuple[str, dict[InterfaceId, Interface]]:
    """The log's node and the interfaces that it declares; none, if it cannot be read."""
    try:
        reader = LogReader(config.database.path)
        try:
            return reader.node(), reader.verify().state.interfaces
        finally:
            reader.close()
    except (TunledgerError, sa.exc.SQLAlchemyError, OSError):
        return "", {}


def _namespaces(declared: Mapping[InterfaceId, Interface]) -> list[Finding]:
    """Whether the network namespaces that interfaces live in are there, and may be entered."""
    wanted = sorted({each.netns for each in declared.values() if each.netns is not None})
    host = RunNetns()
    found = []
    for netns in wanted:
        try:
            with host.entered(netns) as kernel:
                kernel.observe([])
        except TunledgerError as error:
            mend = f"ip netns add {netns}"
            if error.code is ErrorCode.PERMISSION_DENIED:
                mend = "run as root, or give the unit AmbientCapabilities=CAP_NET_ADMIN CAP_SYS_ADMIN"
            found.append(Finding("namespaces", "FAIL", error.message, mend))
    if wanted and not found:
        found.append(Finding("namespaces", "ok", f"{', '.join(wanted)}: there, and may be entered"))
    return found


def _leftovers(node: str, declared: Container[InterfaceId]) -> Finding:
    """Interfaces with our mark that no log of this host declares, and so nothing will ever remove."""
    kernel = host_kernel()
    try:
        links = [link for link in kernel.observe().links.values() if link.token is not None]
    except TunledgerError as error:
        return Finding("interfaces", "FAIL", error.message)
    finally:
        kernel.close()
    foreign = [link.key for link in links if link.token is not None and link.token.node != node]
    orphans = [
        link.key
        for link in links
        if link.token is not None and link.token.node == node and link.token.interface_id not in declared
    ]
    if orphans:
        return Finding(
            "interfaces",
            "warning",
            f"ours, but no longer declared: {', '.join(orphans)}",
            "tunledger serve removes them",
        )
    if foreign and not node:
        names = ", ".join(foreign)
        return Finding(
            "interfaces", "warning", f"made by tunledger, and no log to tell by which: {names}", "mend that first"
        )
    if foreign:
        mend = "leave them to that one; only if its database is gone for good: ip link delete NAME"
        return Finding("interfaces", "warning", f"of another tunledger database: {', '.join(foreign)}", mend)
    return Finding("interfaces", "ok", f"{len(links)} of ours, all declared")
