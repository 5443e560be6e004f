"""The API while a worker has all it can do: does packets' work slow commands down?

A real service on two cores. The worker has one for itself and gets a tenth more packets than it can read. What sends
and what asks is not what is measured: the sender, on the other core, has what of it the service leaves (nice 19), and
the client a processor whenever it wants one. It asks one thing after the other, with a pause between: without, service
and client together take a core's time, and it would be the worker that is held up. Idle and loaded take turns. Beside
it the sender alone, into a device that nobody reads, and the same load with a C reader in the worker's place: what any
sender and any reader would cost.
"""

import http.client
import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter, sleep

from bench.figures import timed
from bench.lab import READER_CPU, SENDER_CPU, Namespace, Programs, counted, open_tun, running, spent, tell, worker_of
from tests.e2e.harness import Service

ROUNDS = 8
GETS, PATCHES = 60, 60  # a round
PAUSE_S = 0.005
OURS, OTHER, UNREAD = "bench0", "bench1", "bench2"
CHAIN = [{"processor": "inspect"}]
AIM = 2.0


def measure_latency(programs: Programs, space: Namespace) -> None:
    """Measure and print the table."""
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    busy: dict[str, list[float]] = defaultdict(list)
    with space.inside(), tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder), settings={"TUNLEDGER_DATAPLANE__WORKERS": "1"})
        try:
            service.start()
            body = {
                "name": OURS,
                "addresses": ["10.60.0.1/16"],
                "processing": {"running": True, "chain": CHAIN},
            }
            status, answer = service.call("POST", "/api/v1/interfaces", body)
            assert status == 201, answer
            assert service.process is not None
            worker = worker_of(service.process.pid)
            os.sched_setaffinity(worker, {READER_CPU})
            fds = open_tun(OTHER, "10.61.0.1"), open_tun(UNREAD, "10.62.0.1")
            client = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
            try:
                with running([programs["read"], str(fds[0]), "bare", "0"], READER_CPU, fds[:1]) as reader:
                    flood, beside, unread = (
                        [programs["flood"], name, "udp", f"{net}.0.1", f"{net}.1.1", "64", "1000"]
                        for name, net in ((OURS, "10.60"), (OTHER, "10.61"), (UNREAD, "10.62"))
                    )
                    rates = {name: _capacity(command) * 1.1 for name, command in ((OURS, flood), (OTHER, beside))}
                    for number in range(ROUNDS + 1):
                        tell(f"API latency: round {number} of {ROUNDS}")
                        if number == 1:  # warm
                            times.clear()
                            busy.clear()
                        for state, sender, pid in (
                            ("idle", None, worker),
                            ("the sender alone", [*unread, str(int(rates[OURS]))], worker),
                            ("the worker at full load", [*flood, str(int(rates[OURS]))], worker),
                            ("a C reader at full load", [*beside, str(int(rates[OTHER]))], reader.pid),
                        ):
                            with _sending(sender), _let_in_at_once():
                                begun, before = perf_counter(), spent(pid).total_s
                                _ask(client, state, times)
                                busy[state].append((spent(pid).total_s - before) / (perf_counter() - begun))
            finally:
                client.close()
                for fd in fds:
                    os.close(fd)
        finally:
            service.close()
    _show(times, busy)


@contextmanager
def _sending(command: Sequence[str] | None) -> Iterator[None]:
    if command is None:
        yield
        return
    with running(command, SENDER_CPU) as sender:
        os.setpriority(os.PRIO_PROCESS, sender.pid, 19)
        sleep(0.1)
        yield


@contextmanager
def _let_in_at_once() -> Iterator[None]:
    """What asks is not what is measured: it has a processor whenever it wants one (sched(7), SCHED_FIFO)."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def _capacity(flood: Sequence[str]) -> float:
    """Packets a second that are read where there are more than that."""
    with running([*flood, "0"], SENDER_CPU):
        sleep(0.2)
        begun, before = perf_counter(), counted(flood[1]).read_packets
        sleep(0.5)
        return (counted(flood[1]).read_packets - before) / (perf_counter() - begun)


def _ask(client: http.client.HTTPConnection, state: str, times: dict[tuple[str, str], list[float]]) -> None:
    for _ in range(GETS):
        sleep(PAUSE_S)
        times["GET status", state].append(timed(partial(_call, client, "GET", f"/api/v1/interfaces/{OURS}")))
    for number in range(PATCHES):
        sleep(PAUSE_S)
        change = partial(_call, client, "PATCH", f"/api/v1/interfaces/{OURS}", {"mtu": 1400 + number % 2})
        times["PATCH mtu", state].append(timed(change))


def _call(client: http.client.HTTPConnection, method: str, path: str, body: object = None) -> None:
    headers = {} if body is None else {"Content-Type": "application/json"}
    client.request(method, path, None if body is None else json.dumps(body), headers)
    response = client.getresponse()
    text = response.read()
    assert response.status == 200, text


def _show(times: dict[tuple[str, str], list[float]], busy: dict[str, list[float]]) -> None:
    print(f"\nAPI latency, one client: p99 loaded at most {AIM:g} times idle\n")
    print(f"| {'what':36} | {'p50 ms':>8} | {'p99 ms':>8} | {'p99 / idle':>10} | {'reader busy':>11} |")
    print(f"| {'-' * 36} | {'-' * 7}: | {'-' * 7}: | {'-' * 9}: | {'-' * 10}: |")
    for (what, state), values in times.items():
        ordered = sorted(values)
        p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
        idle = sorted(times[what, "idle"])
        ratio = p99 / idle[int(len(idle) * 0.99)]
        share = sum(busy[state]) / len(busy[state])
        print(f"| {what + ', ' + state:36} | {p50:8.2f} | {p99:8.2f} | {ratio:9.2f}x | {share:11.0%} |")
