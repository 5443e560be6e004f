"""The control plane, one client: what a command costs over HTTP, next to the bare kernel, `ip`, and the disk alone.

Each round makes, changes, shows and removes one interface, ours and the peers' in turn, so that a machine that gets
slower gets slower for all.
"""

import http.client
import json
import os
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

from bench.figures import Figure, Row, show, timed
from service.domain.plan import Sight, plan
from service.domain.spec import parse_spec
from service.domain.token import Token
from service.domain.values import InterfaceId, InterfaceName, NodeId
from service.kernel.linux import LinuxKernel
from tests.e2e.harness import Service
from tests.namespace import fresh_namespace

ROUNDS = 100
BARE = Token(NodeId("0123456789ab"), InterfaceId("01900000-0000-7000-8000-000000000000"))
WANTED = {"name": "bare0", "addresses": ["10.50.0.1/24"], "mtu": 1400}


def run() -> None:
    """Measure and print the tables, with the log on the disk of the temporary folder and then in memory."""
    _measure("One client, the log on disk (every command fsynced twice before its answer)", None)
    if Path("/dev/shm").is_dir():
        _measure("The same with the log in memory: what is left is ours and the kernel's", "/dev/shm")


def _measure(title: str, where: str | None) -> None:
    times: dict[str, list[float]] = defaultdict(list)
    with fresh_namespace(), tempfile.TemporaryDirectory(dir=where) as folder:
        service = Service(Path(folder))
        kernel = LinuxKernel()
        try:
            service.start()
            connection = http.client.HTTPConnection("127.0.0.1", service.port)
            for number in range(ROUNDS + 5):
                if number == 5:  # warm
                    times.clear()
                _ours(connection, times)
                _bare(kernel, times)
                if shutil.which("ip") is not None:
                    _ip(times)
                times["disk"].append(timed(lambda: _fsync(Path(folder))))
            connection.close()
        finally:
            kernel.close()
            service.close()

    def figure(key: str, what: str) -> list[Figure]:
        return [Figure(what, tuple(times[key]))] if times[key] else []

    disk = figure("disk", "one fdatasync of 4 KiB")
    show(
        title,
        [
            Row(
                figure("create", "create")[0],
                [*figure("bare create", "kernel only, same steps"), *figure("ip create", "three ip commands"), *disk],
            ),
            Row(
                figure("configure", "configure address and mtu")[0],
                [
                    *figure("bare configure", "kernel only, same steps"),
                    *figure("ip configure", "three ip commands"),
                    *disk,
                ],
            ),
            Row(
                figure("status", "status")[0],
                [*figure("bare status", "kernel only"), *figure("ip status", "ip address show")],
            ),
            Row(
                figure("delete", "delete")[0],
                [*figure("bare delete", "kernel only"), *figure("ip delete", "ip link delete"), *disk],
            ),
        ],
    )


def _call(connection: http.client.HTTPConnection, method: str, path: str, body: object = None) -> None:
    connection.request(method, path, json.dumps(body) if body is not None else None)
    response = connection.getresponse()
    text = response.read()
    assert response.status == 200, text


def _ours(connection: http.client.HTTPConnection, times: dict[str, list[float]]) -> None:
    body = {"name": "tun0", "address": "10.51.0.1", "netmask": "255.255.255.0", "mtu": 1400}
    change = {"address": "10.52.0.1", "mtu": 1300}
    times["create"].append(timed(lambda: _call(connection, "POST", "/api/interface/create", body)))
    times["configure"].append(timed(lambda: _call(connection, "POST", "/api/interface/configure", change)))
    times["status"].append(timed(lambda: _call(connection, "GET", "/api/interface/status")))
    times["delete"].append(timed(lambda: _call(connection, "DELETE", "/api/interface/delete")))


def _bare(kernel: LinuxKernel, times: dict[str, list[float]]) -> None:
    """The same steps by the same executor, without log, HTTP, or verification."""
    name = InterfaceName("bare0")
    spec = parse_spec(WANTED)
    changed = parse_spec(WANTED | {"addresses": ["10.53.0.1/24"], "mtu": 1300})
    create = plan(BARE, name, spec, Sight())
    times["bare create"].append(timed(lambda: kernel.execute(BARE, create)))
    change = plan(BARE, name, changed, Sight(link=kernel.observe([name]).links[name]))
    times["bare configure"].append(timed(lambda: kernel.execute(BARE, change)))
    times["bare status"].append(timed(lambda: kernel.observe([name])))
    remove = plan(BARE, name, None, Sight(link=kernel.observe([name]).links[name]))
    times["bare delete"].append(timed(lambda: kernel.execute(BARE, remove)))


def _ip(times: dict[str, list[float]]) -> None:
    def ip(*commands: str) -> None:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True, stdout=subprocess.DEVNULL)

    create = ("tuntap add ipx0 mode tun", "address add 10.54.0.1/24 dev ipx0", "link set ipx0 mtu 1400 up")
    change = ("address add 10.55.0.1/24 dev ipx0", "address delete 10.54.0.1/24 dev ipx0", "link set ipx0 mtu 1300")
    times["ip create"].append(timed(lambda: ip(*create)))
    times["ip configure"].append(timed(lambda: ip(*change)))
    times["ip status"].append(timed(lambda: ip("address show dev ipx0")))
    times["ip delete"].append(timed(lambda: ip("link delete ipx0")))


def _fsync(folder: Path) -> None:
    fd = os.open(folder / "fsync", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(fd, b"x" * 4096)
        os.fdatasync(fd)
    finally:
        os.close(fd)
