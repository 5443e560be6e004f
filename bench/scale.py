"""Many interfaces: coming back after kill -9, leaving together, many clients, repair, and what rest costs.

Beside `ip -batch` and systemd-networkd doing the same links in the same run, or beside ourselves doing it one by one.
A start is timed from the spawn of the process: to the event that says that every interface was verified, and to the
first answer, which comes after it.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.figures import Figure, Row, show, timed
from tests.e2e.harness import ROOT, Service, eventually, links
from tests.namespace import fresh_namespace

SIZES = (100, 1000, 5000)
BATCH = 1000  # commands in one request
STARTS = 3
ONE_BY_ONE = 100  # links that are removed one by one; the rest is worked out from them, at 20 ms each
CLIENTS, CLIENTS_S = 64, 8.0
REPAIRS = 10
REST_S = float(os.environ.get("BENCH_REST_S", "60"))  # 3600 for an hour
NETWORKD = Path("/lib/systemd/systemd-networkd")
TICKS = os.sysconf("SC_CLK_TCK")


def run() -> None:
    """Measure and print the tables."""
    for size in SIZES:
        _measure(size)
    _clients()
    _rest(1000)


def _measure(size: int) -> None:
    rows: list[Row] = []
    python = Figure("the interpreter's start alone", tuple(timed(_python) for _ in range(3)))
    bare = _figure("ip -batch, the same links", _ip_batch, size)
    both = Figure("ip -batch and the interpreter's start", (bare.p50 + python.p50,))
    networkd = _networkd(size)
    with _served() as service:
        _create(service, size)
        service.kill()
        there, there_answered = _starts(service, f"start, all {size} still there", gone=False)
        anew, anew_answered = _starts(service, f"start after kill -9, all {size} gone", gone=True)
        assert len(links()) == size + 1
        peers = [both, *([networkd] if networkd is not None else [])]
        rows += [Row(anew, peers), Row(anew_answered, peers), Row(there, [both, anew]), Row(there_answered, [both])]
        rows.append(
            Row(Figure(f"notice and repair one of {size}, deleted", tuple(_repair(n) for n in range(REPAIRS))), [])
        )
        few = min(size, ONE_BY_ONE)
        together = timed(lambda: _remove(service, few, size))
        rows.append(Row(Figure(f"remove {size - few} together, by the API", (together,)), []))
        names = [f"t{number}" for number in range(few)]
        single = timed(lambda: [service.call("DELETE", f"/api/v1/interfaces/{name}") for name in names])
        if size > few:
            by_one = Figure(f"one by one (worked out from {few})", (single / few * (size - few),))
            rows[-1] = Row(rows[-1].ours, [by_one])
        else:
            rows[-1] = Row(Figure(f"remove {few} one by one, by the API", (single,)), [])
    show(f"{size} interfaces", rows)


@contextlib.contextmanager
def _served() -> Iterator[Service]:
    with fresh_namespace(), tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder))
        try:
            yield service.start()
        finally:
            service.close()


def _figure(what: str, work: Any, *arguments: Any) -> Figure:
    return Figure(what, tuple(work(*arguments) for _ in range(3)))


def _python() -> None:
    subprocess.run([sys.executable, "-c", "pass"], check=True)


def _address(number: int) -> str:
    return f"10.{number // 250 + 1}.{number % 250}.1/24"


def _create(service: Service, size: int) -> None:
    for first in range(0, size, BATCH):
        commands = [
            {"create": {"name": f"t{n}", "addresses": [_address(n)], "mtu": 1400}}
            for n in range(first, min(size, first + BATCH))
        ]
        status, answer = service.call("POST", "/api/v1/batch", {"commands": commands})
        assert status == 200, answer


def _remove(service: Service, first: int, last: int) -> None:
    for begin in range(first, last, BATCH):
        commands = [{"delete": {"name": f"t{n}"}} for n in range(begin, min(last, begin + BATCH))]
        status, answer = service.call("POST", "/api/v1/batch", {"commands": commands})
        assert status == 200, answer


def _starts(service: Service, what: str, *, gone: bool) -> tuple[Figure, Figure]:
    """To all verified, and to the first answer."""
    verified, answered = list[float](), list[float]()
    for _ in range(STARTS):
        service.kill()
        if gone:
            _delete_all()
        begun = time.time()  # the log has no other clock
        service.spawn()
        service.wait_ready()
        answered.append((time.time() - begun) * 1000)
        assert service.call("GET", "/health")[0] == 200
        told = service.ok("GET", "/api/v1/events?type=StartupReconciled&order=desc&limit=1")["events"][0]
        verified.append((datetime.fromisoformat(told["recorded_at"]).timestamp() - begun) * 1000)
    return Figure(what, tuple(verified)), Figure("  to its first answer", tuple(answered))


def _ip(lines: list[str]) -> None:
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines).encode(), check=True)


def _delete_all() -> None:
    """By a link group: nobody measures this."""
    _ip([f"link set {name} group 4711" for name in links() if name != "lo"] + ["link delete group 4711"])


def _ip_batch(size: int) -> float:
    lines: list[str] = []
    for n in range(size):
        lines += [
            f"tuntap add dev t{n} mode tun",
            f"link set t{n} mtu 1400 txqueuelen 1000 alias tunledger:bench:{n}",
            f"address add {_address(n)} dev t{n}",
            f"link set t{n} up",
        ]
    with fresh_namespace():
        took_ms = timed(lambda: _ip(lines))
        _delete_all()
    return took_ms


def _networkd(size: int) -> Figure | None:
    """systemd-networkd, cold, to all addresses; None where it is not installed or does not run here."""
    if not NETWORKD.exists():
        print("systemd-networkd is not installed: left out")
        return None
    with fresh_namespace(), tempfile.TemporaryDirectory() as folder:
        for n in range(size):
            netdev = f"[NetDev]\nName=t{n}\nKind=tun\n"
            network = f"[Match]\nName=t{n}\n[Link]\nMTUBytes=1400\nRequiredForOnline=no\n"
            network += f"[Network]\nAddress={_address(n)}\n"
            network += "LinkLocalAddressing=no\nConfigureWithoutCarrier=yes\nIPv6AcceptRA=no\n"
            Path(folder, f"{n}.netdev").write_text(netdev)
            Path(folder, f"{n}.network").write_text(network)
        # It gives up root, so it must be let in; and with a /sys that is read-only it does not wait for udev.
        script = (
            "mount -t tmpfs -o mode=755 tmpfs /run && mkdir -p /run/systemd/network /run/systemd/netif && "
            f"cp {folder}/* /run/systemd/network/ && chown -R systemd-network: /run/systemd/netif && "
            "mount -t tmpfs tmpfs /etc/systemd/network && mount -t sysfs -o ro sysfs /sys && "
            "mount -t tmpfs -o mode=755,dev tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200 && "
            f"exec {NETWORKD}"
        )
        begun = time.perf_counter()
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            eventually(lambda: process.poll() is None and _addressed() >= size, 120, "systemd-networkd's work")
            return Figure("systemd-networkd, cold, the same links", ((time.perf_counter() - begun) * 1000,))
        except AssertionError as error:
            print(f"systemd-networkd does not do it here: {error}")
            return None
        finally:
            process.kill()
            process.wait()


def _addressed() -> int:
    time.sleep(0.02)  # looking costs the one who is looked at
    shown = subprocess.run(["ip", "-o", "-4", "address"], capture_output=True, check=True).stdout
    return shown.count(b"inet 10.")


def _repair(number: int) -> float:
    """From the deletion to the moment at which the link is there with its address again."""
    name = f"t{number}"
    _ip([f"link delete {name}"])
    begun = time.perf_counter()
    while (
        b"inet 10."
        not in subprocess.run(["ip", "-o", "address", "show", name], capture_output=True, check=False).stdout
    ):
        if time.perf_counter() - begun > 60:
            raise AssertionError(f"{name} was not repaired")
    return (time.perf_counter() - begun) * 1000


def _clients() -> None:
    if shutil.which("ip") is None:
        return
    with _served() as service:
        figures = {clients: _commands(service, clients) for clients in (1, CLIENTS)}
    print("\nClients that create, change and delete, every command fsynced before its answer\n")
    print(f"| {'clients':>8} | {'commands a second':>18} | {'to one client':>14} |")
    print(f"| {'-' * 7}: | {'-' * 17}: | {'-' * 13}: |")
    for clients, rate in figures.items():
        print(f"| {clients:8} | {rate:18.0f} | {rate / figures[1]:13.1f}x |")


def _commands(service: Service, clients: int) -> float:
    arguments = [str(service.port), str(clients), str(CLIENTS_S)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.clients", *arguments], cwd=ROOT, capture_output=True, check=True, text=True
    )
    return float(done.stdout)


def _rest(size: int) -> None:
    """What the service costs while nothing happens: processor and memory of it and of its workers."""
    with _served() as service:
        _create(service, size)
        assert service.process is not None
        time.sleep(15)  # the first sample, and what creating left behind
        pids = [service.process.pid, *_children(service.process.pid)]
        before, memory, begun = _ticks(pids), _memory(pids), time.monotonic()
        _wait(REST_S)
        took_s = time.monotonic() - begun
        share = (_ticks(pids) - before) / TICKS / took_s
        after = _memory(pids)
        status, _ = service.call("GET", "/health")
        assert status == 200
    print(f"\nAt rest with {size} interfaces, counters sampled every 10 s, over {took_s:.0f} s\n")
    print(f"processor: {share * 100:.2f} % of one core; memory: {memory:.1f} MiB before, {after:.1f} MiB after")


def _wait(seconds: float) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if sys.stderr.isatty():
            print(f"\r{left:5.0f} s of rest left", end="", file=sys.stderr, flush=True)
        time.sleep(min(1.0, left))


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _ticks(pids: list[int]) -> int:
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields)


def _memory(pids: list[int]) -> float:
    total = 0
    for pid in pids:
        total += sum(
            int(line.split()[1])
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            if line.startswith("Pss:")
        )
    return total / 1024
