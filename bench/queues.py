"""What the kernel offers besides: NAPI in front of its stack (IFF_NAPI), several queues of one device.

Measured with small programs and with our worker, to decide whether tunledger is to ask for them.
"""

import os
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter, sleep
from typing import Literal

from bench.figures import RateRow, show_rates
from bench.lab import (
    IFF_MULTI_QUEUE,
    IFF_NAPI,
    IFF_NAPI_FRAGS,
    IFF_TAP,
    IFF_TUN,
    READER_CPU,
    SENDER_CPU,
    Namespace,
    Programs,
    counted,
    open_tun,
    running,
    tell,
)
from bench.readers import Ours, c_program, plain_loop
from bench.samples import DEVICE, HERE, LEFT, RIGHT, Sample, figure, flood, named, tcp

FORWARD = {
    LEFT: [{"processor": "forward", "to": RIGHT}],
    RIGHT: [{"processor": "forward", "to": LEFT}],
}

NAPI_ROUNDS = 3
GRO_FLUSH_NS = 20_000
QUEUES_S = 0.5


def measure_napi(programs: Programs, ours: Ours, here: Namespace, there: Namespace) -> None:
    """Forward TCP without offloads: do writes get to the stack coalesced, and does it help?"""
    ways: dict[str, tuple[int, Callable[[str], None]]] = {
        "tun, no NAPI": (IFF_TUN, _nothing),
        "tun, IFF_NAPI": (IFF_TUN | IFF_NAPI, _nothing),
        f"tun, IFF_NAPI, packets wait {GRO_FLUSH_NS // 1000} us": (IFF_TUN | IFF_NAPI, _let_wait),
        "tap, no NAPI": (IFF_TAP, _nothing),
        "tap, IFF_NAPI_FRAGS": (IFF_TAP | IFF_NAPI | IFF_NAPI_FRAGS, _nothing),
    }
    samples: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for number in range(NAPI_ROUNDS):
        for what, (flags, opened) in ways.items():
            mode: Literal["tun", "tap"] = "tap" if flags & IFF_TAP else "tun"
            for reader in (
                ours.reader("forward", FORWARD, mode=mode),
                c_program("C: read and write", programs, "forward", "FD"),
            ):
                tell(f"NAPI: round {number + 1} of {NAPI_ROUNDS}: {reader.what}, {what}")
                sample = tcp(programs, here, there, reader, offloads=False, flags=flags, seconds=1, opened=opened)
                samples[reader.what, what].append(sample)
    rows = []
    for who in ("forward", "C: read and write"):
        for kind in ("tun", "tap"):
            plain, *others = (
                named(figure(who, found), what)
                for (named_so, what), found in samples.items()
                if named_so == who and what.startswith(kind)
            )
            rows += [RateRow(other, [plain]) for other in others]
    show_rates("TCP without offloads, written with IFF_NAPI", "Gbit/s", rows, scale=1e9, digits=2)


def _nothing(_name: str) -> None:
    pass


def _let_wait(name: str) -> None:
    """Have NAPI keep what may become a larger segment for a while (Documentation/networking/napi.rst)."""
    folder = f"/sys/class/net/{name}"
    script = f"mount -t sysfs sysfs /sys && echo {GRO_FLUSH_NS} > {folder}/gro_flush_timeout"
    script += f" && echo 100 > {folder}/napi_defer_hard_irqs"
    subprocess.run(["unshare", "--mount", "sh", "-c", script], check=True)


def measure_queues(programs: Programs, _ours: Ours, here: Namespace, _there: Namespace) -> None:
    """One queue read by one process, next to two queues read by two: on two cores, one of which is the sender's."""
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for _ in range(NAPI_ROUNDS):
        for who in ("C", "Python"):
            for queues in (1, 2):
                tell(f"queues: {who}, {queues}")
                found[who, queues].append(_read(programs, here, who, queues))
    print("\nQueues of one device, each read by a process; 64 octets, 1,000 flows, from sockets on one of two cores\n")
    print(f"| {'reader':44} | {'packets/s':>10} | {'least to most':>22} | {'to one queue':>12} |")
    print(f"| {'-' * 44} | {'-' * 9}: | {'-' * 21}: | {'-' * 11}: |")
    for (who, queues), rates in found.items():
        rate = statistics.median(rates)
        ratio = rate / statistics.median(found[who, 1])
        spread = f"{min(rates):,.0f} to {max(rates):,.0f}"
        what = f"{who}: {queues} queue{'s' if queues > 1 else ''}"
        print(f"| {what:44} | {rate:10,.0f} | {spread:>22} | {ratio:11.2f}x |")


def _read(programs: Programs, here: Namespace, who: str, queues: int) -> float:
    with here.inside(), ExitStack() as stack:
        flags = IFF_TUN | (IFF_MULTI_QUEUE if queues > 1 else 0)
        for number in range(queues):
            fd = open_tun(DEVICE, HERE, flags=flags)
            stack.callback(os.close, fd)
            c = c_program(who, programs, "read", "FD", "flows", "0")
            reader = c if who == "C" else plain_loop(who, "read", "FD")
            pid = stack.enter_context(reader.start({DEVICE: fd}))
            os.sched_setaffinity(pid, {(READER_CPU, SENDER_CPU)[number]})
        with running(flood(programs, "sockets", 64, 1000), SENDER_CPU):
            sleep(0.2)
            begun, before = perf_counter(), counted(DEVICE).read_packets
            sleep(QUEUES_S)
            return (counted(DEVICE).read_packets - before) / (perf_counter() - begun)
