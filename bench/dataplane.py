"""The data plane: packets a second and Gbit/s of a worker, next to a small C program and the plain Python loop.

Every round gives each competitor the same device, made anew, and the same sender; so a machine that gets slower gets
slower for all. The reader has one core for itself, the sender the other. What the kernel dropped is not counted: the
figures are the kernel's own count of what was read from the device, which takes nobody's word for it.
"""

import os
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path

from bench.capture import INSPECT, fresh, measure_capture
from bench.figures import RateRow, show_rates
from bench.lab import VNET_HDR_BYTES, Namespace, Programs, counted, echo_replies, tell, under_way
from bench.latency import measure_latency
from bench.queues import FORWARD, measure_napi, measure_queues
from bench.readers import Ours, Reader, c_program, plain_loop
from bench.samples import DEVICE, ROUNDS, THERE, Sample, flood, look, named, rounds, tcp
from service.dataplane.errors import DataplaneError

SEGMENT_BYTES, SEGMENTS = 1400, 43  # 60,200 octets: 43 full packets of an MTU of 1,500


def run(*parts: str) -> None:
    """Measure and print the tables: all, or those of `PARTS` that are named."""
    missing = _missing()
    if missing:
        print(f"skipped: {missing}")
        return
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        programs = Programs(Path(folder))
        here, there = Namespace(), Namespace()
        stack.callback(here.close)
        stack.callback(there.close)
        captured = Path(folder) / "captured"
        ours = Ours(files_for=lambda _device, _name, _stage, _options: [fresh(captured)], processors=CUSTOM)
        stack.callback(ours.close)
        for name in parts or PARTS:
            measure, about_s = PARTS[name]
            with under_way(f"dataplane.{name}", about_s):
                try:
                    measure(programs, ours, here, there)
                except DataplaneError as error:
                    print(f"\n{name}: skipped: {error}")


def _missing() -> str:
    """What this machine lacks for these figures, in words."""
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        return "no C compiler (gcc or cc) to build what ours is compared with"
    if os.geteuid() != 0:
        return "needs root, for network namespaces and TUN devices"
    if len(os.sched_getaffinity(0)) < 2:
        return "needs two cores, one for the reader and one for the sender"
    return ""


CUSTOM: Mapping[str, str] = {"bench-nothing": "bench.custom:Nothing", "bench-iterate": "bench.custom:Iterate"}


def _inspect(programs: Programs, ours: Ours, here: Namespace, _there: Namespace) -> None:
    readers = [
        ours.reader("inspect", {DEVICE: [INSPECT]}),
        c_program("C: read and nothing else", programs, "read", "FD", "bare", "0"),
        c_program("C: read, with a flow table", programs, "read", "FD", "flows", "0"),
        plain_loop("Python: os.readv and nothing else", "read", "FD"),
    ]
    rows = []
    for kind, who, lengths, numbers in (
        ("sockets", "from sockets", (64, 1000), (1000,)),
        ("udp", "flooded", (64, 1000), (1, 1000)),
    ):
        for length, flows in product(lengths, numbers):
            title = f"{length:,} octets, {flows:,} flow{'s' if flows > 1 else ''}, {who}"
            sender = flood(programs, kind, length, flows)
            first, *rest = rounds(title, readers, partial(look, here, sender))
            rows.append(RateRow(named(first, title), rest, aim=0.8))
    show_rates(
        "Inspect UDP with a flow table, without offloads (from sockets: as programs send; flooded: past the host's UDP"
        " and queues, more than anybody reads)",
        "packets/s",
        rows,
    )


def _inspect_segments(programs: Programs, ours: Ours, here: Namespace, _there: Namespace) -> None:
    skip = str(VNET_HDR_BYTES)
    readers = [
        ours.reader("inspect", {DEVICE: [INSPECT]}, offloads=True),
        c_program("C: read and nothing else", programs, "read", "FD", "bare", skip),
        c_program("C: read, with a flow table", programs, "read", "FD", "flows", skip),
        plain_loop("Python: os.readv and nothing else", "read", "FD"),
    ]
    sender = [programs["segments"], THERE, str(SEGMENT_BYTES), str(SEGMENTS)]

    def measure(reader: Reader) -> Sample:
        return look(here, sender, reader, offloads=True, rated=lambda: counted(DEVICE).read_bytes * 8)

    try:
        first, *rest = rounds("UDP in segments of 60 kB", readers, measure)
    except OSError as error:
        print(f"UDP in segments: skipped: {error}")
        return
    show_rates(
        "Inspect UDP in segments of 60 kB, with offloads", "Gbit/s", [RateRow(first, rest, 0.8)], scale=1e9, digits=1
    )


def _forward(programs: Programs, ours: Ours, here: Namespace, there: Namespace) -> None:
    rows = []
    for offloads in (True, False):
        readers = [
            ours.reader("forward", FORWARD, offloads=offloads),
            c_program("C: read and write", programs, "forward", "FD"),
            plain_loop("Python: os.read, os.write", "forward", "FD"),
        ]
        title = f"TCP, offloads {'on' if offloads else 'off'}"
        first, *rest = rounds(title, readers, partial(tcp, programs, here, there, offloads=offloads))
        rows.append(RateRow(named(first, title), rest, aim=0.9))
    show_rates("Forward between two TUNs in two namespaces", "Gbit/s", rows, scale=1e9, digits=2)


def _reply(programs: Programs, ours: Ours, here: Namespace, _there: Namespace) -> None:
    readers = [
        ours.reader("reply", {DEVICE: [{"processor": "reply", "networks": ["10.60.0.0/16"]}]}),
        c_program("C: the smallest echo replier", programs, "reply", "FD"),
    ]
    rows = []
    for addresses in (1, 4096):
        title = f"84 octets, {addresses:,} address{'es' if addresses > 1 else ''}"
        sender = flood(programs, "icmp", 84, addresses, to="10.60.16.0")
        first, *rest = rounds(title, readers, partial(look, here, sender, rated=echo_replies))
        rows.append(RateRow(named(first, title), rest, aim=0.6))
    show_rates("Reply to a flood of pings", "replies/s", rows)


def _costs(programs: Programs, ours: Ours, here: Namespace, _there: Namespace) -> None:
    """What a packet costs, chain by chain, and what each has more than the one that it is compared with."""
    nothing, iterate = ({"processor": name} for name in CUSTOM)
    pass_all = {"processor": "filter", "rules": []}
    one_rule = {"processor": "filter", "rules": [{"action": "drop", "protocol": "udp", "destination_port": 1}]}
    chains: dict[str, tuple[list[Mapping[str, object]], str | None]] = {
        "no chain: counted only": ([], None),
        "inspect": ([INSPECT], "no chain: counted only"),
        "inspect, a filter without rules": ([INSPECT, pass_all], "inspect"),
        "inspect, a filter with a rule": ([INSPECT, one_rule], "inspect"),
        "inspect, a custom one that does nothing": ([INSPECT, nothing], "inspect"),
        "inspect, a custom one that looks at each": ([INSPECT, iterate], "inspect"),
    }
    samples: dict[str, list[Sample]] = defaultdict(list)
    sender = flood(programs, "udp", 64, 1000)
    for number in range(ROUNDS):
        for what, (chain, _) in chains.items():
            tell(f"cost of a processor: round {number + 1} of {ROUNDS}: {what}")
            samples[what].append(look(here, sender, ours.reader(what, {DEVICE: chain})))
    cost = {what: statistics.median(sample.cpu_ns for sample in found) for what, found in samples.items()}
    print("\nCost of a processor: the worker's time for a packet of 64 octets, 1,000 flows\n")
    print(f"| {'chain':44} | {'ns/packet':>9} | {'least to most':>16} | {'packets/s':>10} | {'more':>32} |")
    print(f"| {'-' * 44} | {'-' * 8}: | {'-' * 15}: | {'-' * 9}: | {'-' * 31}: |")
    for what, (_, base) in chains.items():
        times = [sample.cpu_ns for sample in samples[what]]
        rate = statistics.median(sample.rate for sample in samples[what])
        more = "" if base is None else f"{cost[what] - cost[base]:+,.0f} ns than {base.partition(':')[0]}"
        spread = f"{min(times):,.0f} to {max(times):,.0f}"
        print(f"| {what:44} | {cost[what]:9,.0f} | {spread:>16} | {rate:10,.0f} | {more:>32} |")


def _latency(programs: Programs, _ours: Ours, here: Namespace, _there: Namespace) -> None:
    measure_latency(programs, here)


Part = Callable[[Programs, Ours, Namespace, Namespace], None]

PARTS: Mapping[str, tuple[Part, int]] = {
    "inspect": (_inspect, 110),
    "segments": (_inspect_segments, 25),
    "forward": (_forward, 110),
    "capture": (measure_capture, 60),
    "napi": (measure_napi, 75),
    "queues": (measure_queues, 15),
    "reply": (_reply, 25),
    "costs": (_costs, 40),
    "latency": (_latency, 60),
}
"""The tables, and about how many seconds each takes."""
