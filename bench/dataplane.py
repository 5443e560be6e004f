"""The data plane: packets a second and Gbit/s of a worker, next to a small C program and the plain Python loop.

Every round gives each competitor the same device, made anew, and the same sender; so a machine that gets slower gets
slower for all. The reader has one core for itself, the sender the other. What the kernel dropped is not counted: the
figures are the kernel's own count of what was read from the device, which takes nobody's word for it.
"""

import json
import os
import shutil
import statistics
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter, sleep

from bench.figures import Rate, RateRow, show_rates
from bench.lab import (
    SENDER_CPU,
    VNET_HDR_BYTES,
    Namespace,
    Programs,
    counted,
    echo_replies,
    open_tun,
    running,
    spent,
    tell,
)
from bench.latency import measure_latency
from bench.readers import Ours, Reader, c_program, plain_loop
from service.dataplane.errors import DataplaneError

ROUNDS = 5
WARM_S = 0.25
MEASURED_S = 0.75
TCP_S = 2
DEVICE = "bench0"
HERE, THERE = "10.60.0.1", "10.60.1.1"
SEGMENT_BYTES, SEGMENTS = 1400, 43  # 60,200 octets: 43 full packets of an MTU of 1,500


def run() -> None:
    """Measure and print the tables."""
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
        ours = Ours(files_for=lambda _device, _name, _stage, _options: [_fresh(captured)], processors=CUSTOM)
        stack.callback(ours.close)
        for measure in (_inspect, _inspect_segments, _forward, _capture, _reply, _costs):
            try:
                measure(programs, ours, here, there)
            except DataplaneError as error:
                print(f"\n{measure.__name__.strip('_')}: skipped: {error}")
            tell("")
        measure_latency(programs, here)
        tell("")


def _fresh(path: Path) -> int:
    """An empty file in the place of one that may be there; its descriptor."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _missing() -> str:
    """What this machine lacks for these figures, in words."""
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        return "no C compiler (gcc or cc) to build what ours is compared with"
    if os.geteuid() != 0:
        return "needs root, for network namespaces and TUN devices"
    if len(os.sched_getaffinity(0)) < 2:
        return "needs two cores, one for the reader and one for the sender"
    return ""


@dataclass(frozen=True, slots=True)
class Sample:
    """What one reader did in one round."""

    rate: float
    """What the row is about: packets, octets or replies a second."""
    cpu_ns: float
    """The reader's time on its core for each packet."""
    busy: float
    """Part of the time that the reader was on its core: what is missing it waited, or another had the core."""
    user: float
    """Part of the reader's time that was not the kernel's."""
    dropped: float
    """Part of the packets that the kernel dropped because the reader was late."""
    packets: int
    seconds: float


def _figure(what: str, samples: Sequence[Sample]) -> Rate:
    def middle(name: str) -> float:
        return statistics.median(float(getattr(sample, name)) for sample in samples)

    busy, dropped = middle("busy"), middle("dropped")
    limit = f"{middle('cpu_ns'):,.0f} ns/packet, {middle('user'):.0%} user, "
    limit += ("reader" if busy > 0.9 else "a core that others use") if dropped > 0.01 or busy > 0.9 else "sender"
    limit += f" ({busy:.0%} busy, {dropped:.0%} lost)"
    return Rate(what, tuple(sample.rate for sample in samples), limit)


def _rounds(title: str, readers: Sequence[Reader], measure: Callable[[Reader], Sample]) -> list[Rate]:
    """Each reader once in every round, in turn; the figures in the order of the readers."""
    samples: dict[str, list[Sample]] = defaultdict(list)
    for number in range(ROUNDS):
        for reader in readers:
            tell(f"{title}: round {number + 1} of {ROUNDS}: {reader.what}")
            samples[reader.what].append(measure(reader))
    return [_figure(reader.what, samples[reader.what]) for reader in readers]


def _look(
    space: Namespace,
    sender: Sequence[str],
    reader: Reader,
    *,
    offloads: bool = False,
    rated: Callable[[], float] | None = None,
    measured_s: float = MEASURED_S,
) -> Sample:
    """A fresh device, the reader, the sender, a while to warm up; then what happens in `measured_s`.

    `rated` is what the rate is of, in the namespace; by default the packets that were read.
    """
    with space.inside():
        fd = open_tun(DEVICE, HERE, offloads=offloads)
        try:
            with reader.start({DEVICE: fd}) as pid, running(sender, SENDER_CPU):
                sleep(WARM_S)
                begun, first, time, thing = perf_counter(), counted(DEVICE), spent(pid), rated() if rated else 0.0
                sleep(measured_s)
                last, after, end = counted(DEVICE), spent(pid), perf_counter()
                packets = last.read_packets - first.read_packets
                dropped = last.dropped - first.dropped
                of = rated() - thing if rated else packets
        finally:
            os.close(fd)
    total_s = after.total_s - time.total_s
    ticks = after.user_s - time.user_s, after.system_s - time.system_s
    return Sample(
        rate=of / (end - begun),
        cpu_ns=total_s * 1e9 / max(packets, 1),
        busy=total_s / (end - begun),
        user=ticks[0] / max(sum(ticks), 1e-9),
        dropped=dropped / max(packets + dropped, 1),
        packets=packets,
        seconds=end - begun,
    )


def _flood(programs: Programs, kind: str, length: int, flows: int, rate: int = 0, to: str = THERE) -> list[str]:
    return [programs["flood"], DEVICE, kind, HERE, to, str(length), str(flows), str(rate)]


INSPECT: Mapping[str, object] = {"processor": "inspect", "flows": 4096, "packets": 64}


CUSTOM: Mapping[str, str] = {"bench-nothing": "bench.custom:Nothing", "bench-iterate": "bench.custom:Iterate"}


def _inspect(programs: Programs, ours: Ours, here: Namespace, _there: Namespace) -> None:
    readers = [
        ours.reader("inspect", {DEVICE: [INSPECT]}),
        c_program("C: read and nothing else", programs, "read", "FD", "bare", "0"),
        c_program("C: read, with a flow table", programs, "read", "FD", "flows", "0"),
        plain_loop("Python: os.readv and nothing else", "read", "FD"),
    ]
    rows = []
    for kind, who in (("sockets", "from sockets"), ("udp", "flooded")):
        for length in (64, 1000):
            for flows in (1, 1000):
                title = f"{length:,} octets, {flows:,} flow{'s' if flows > 1 else ''}, {who}"
                sender = _flood(programs, kind, length, flows)
                first, *rest = _rounds(title, readers, partial(_look, here, sender))
                rows.append(RateRow(_named(first, title), rest, aim=0.8))
    show_rates(
        "Inspect UDP with a flow table, without offloads (from sockets: as programs send; flooded: past the host's UDP"
        " and queues, more than anybody reads)",
        "packets/s",
        rows,
    )


def _named(rate: Rate, title: str) -> Rate:
    return Rate(f"{rate.what}: {title}", rate.values, rate.limit)


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
        return _look(here, sender, reader, offloads=True, rated=lambda: counted(DEVICE).read_bytes * 8)

    try:
        first, *rest = _rounds("UDP in segments of 60 kB", readers, measure)
    except OSError as error:
        print(f"UDP in segments: skipped: {error}")
        return
    show_rates(
        "Inspect UDP in segments of 60 kB, with offloads", "Gbit/s", [RateRow(first, rest, 0.8)], scale=1e9, digits=1
    )


LEFT, RIGHT = "left0", "right0"
LEFT_IP, RIGHT_IP = "10.61.0.1", "10.61.0.2"


def _forward(programs: Programs, ours: Ours, here: Namespace, there: Namespace) -> None:
    chains = {
        LEFT: [{"processor": "forward", "to": RIGHT}],
        RIGHT: [{"processor": "forward", "to": LEFT}],
    }
    rows = []
    for offloads in (True, False):
        readers = [
            ours.reader("forward", chains, offloads=offloads),
            c_program("C: read and write", programs, "forward", "FD"),
            plain_loop("Python: os.read, os.write", "forward", "FD"),
        ]
        title = f"TCP, offloads {'on' if offloads else 'off'}"
        first, *rest = _rounds(title, readers, partial(_tcp, programs, here, there, offloads=offloads))
        rows.append(RateRow(_named(first, title), rest, aim=0.9))
    show_rates("Forward between two TUNs in two namespaces", "Gbit/s", rows, scale=1e9, digits=2)


def _tcp(programs: Programs, here: Namespace, there: Namespace, reader: Reader, *, offloads: bool) -> Sample:
    """One TCP connection through `reader`, by iperf3 or, where there is none, by `tcp.c`."""
    with ExitStack() as stack:
        fds = {}
        for space, name, address in ((here, LEFT, LEFT_IP), (there, RIGHT, RIGHT_IP)):
            with space.inside():
                fds[name] = open_tun(name, address, offloads=offloads)
            stack.callback(os.close, fds[name])
        pid = stack.enter_context(reader.start(fds))
        iperf3 = shutil.which("iperf3")
        sink = [iperf3, "-s", "-1", "-B", RIGHT_IP] if iperf3 else [programs["tcp"], "sink", RIGHT_IP]
        source = (
            [iperf3, "-c", RIGHT_IP, "-t", str(TCP_S), "-O", "1", "-J"]
            if iperf3
            else [programs["tcp"], "source", RIGHT_IP, str(TCP_S)]
        )
        with there.inside():
            server = subprocess.Popen(sink, stdout=subprocess.PIPE, text=True)
            stack.callback(server.kill)
            os.sched_setaffinity(server.pid, {SENDER_CPU})
        with here.inside():
            _await_listener(there)
            begun, time, before = perf_counter(), spent(pid), counted(LEFT)
            client = subprocess.Popen(source, stdout=subprocess.PIPE, text=True)
            os.sched_setaffinity(client.pid, {SENDER_CPU})
            told, _ = client.communicate(timeout=60)
            end, after, last = perf_counter(), spent(pid), counted(LEFT)
        heard, _ = server.communicate(timeout=10)
        if iperf3:
            bits = float(json.loads(told)["end"]["sum_received"]["bits_per_second"])
        else:
            octets, seconds = heard.split()
            bits = int(octets) * 8 / float(seconds)
        total_s = after.total_s - time.total_s
        ticks = after.user_s - time.user_s, after.system_s - time.system_s
        packets = last.read_packets - before.read_packets + last.written_packets - before.written_packets
        return Sample(
            rate=bits,
            cpu_ns=total_s * 1e9 / max(packets, 1),
            busy=total_s / (end - begun),
            user=ticks[0] / max(sum(ticks), 1e-9),
            dropped=(last.dropped - before.dropped) / max(packets, 1),
            packets=packets,
            seconds=end - begun,
        )


def _await_listener(space: Namespace) -> None:
    """Until something listens on port 5201 there."""
    end = perf_counter() + 10
    with space.inside():
        while perf_counter() < end:
            for row in Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]:
                words = row.split()
                if words[1].endswith(":1451") and words[3] == "0A":  # 5201, LISTEN
                    return
            sleep(0.01)
    raise TimeoutError("nobody listens on port 5201")


def _reply(programs: Programs, ours: Ours, here: Namespace, _there: Namespace) -> None:
    readers = [
        ours.reader("reply", {DEVICE: [{"processor": "reply", "networks": ["10.60.0.0/16"]}]}),
        c_program("C: the smallest echo replier", programs, "reply", "FD"),
    ]
    rows = []
    for addresses in (1, 4096):
        title = f"84 octets, {addresses:,} address{'es' if addresses > 1 else ''}"
        sender = _flood(programs, "icmp", 84, addresses, to="10.60.16.0")
        first, *rest = _rounds(title, readers, partial(_look, here, sender, rated=echo_replies))
        rows.append(RateRow(_named(first, title), rest, aim=0.6))
    show_rates("Reply to a flood of pings", "replies/s", rows)


STEP = 0.95


def _capture(programs: Programs, ours: Ours, here: Namespace, _there: Namespace) -> None:
    captured = Path(programs["captured"])
    stage = {"processor": "capture", "size_bytes": None, "files": 1}
    readers = [
        ours.reader("capture to disk", {DEVICE: [stage]}),
        ours.reader("ours: inspect", {DEVICE: [INSPECT]}),
        c_program("C: read, write pcap", programs, "capture", "FD", str(captured)),
    ]

    def lost() -> float:
        return ours.figure(DEVICE, 0, "dropped")

    rows = []
    for length in (64, 1000):

        def measure(reader: Reader, length: int = length) -> Sample:
            also_lost = lost if reader is readers[0] else None
            return _without_loss(programs, here, reader, length, also_lost)

        title = f"{length:,} octets, none lost"
        first, *rest = _rounds(title, readers, measure)
        rows.append(RateRow(_named(first, title), rest, aim=0.5))
    captured.unlink(missing_ok=True)
    show_rates("Capture: the highest rate at which no packet is lost", "packets/s", rows)


def _without_loss(
    programs: Programs, space: Namespace, reader: Reader, length: int, lost: Callable[[], float] | None
) -> Sample:
    """Slower and slower until nothing is lost: neither by the kernel, nor by the reader, which `lost` tells."""
    rate = _look(space, _flood(programs, "udp", length, 1000), reader, measured_s=0.3).rate * 1.1
    while rate > 1000:
        sample = _look(space, _flood(programs, "udp", length, 1000, int(rate)), reader, rated=lost)
        if sample.dropped == 0 and (lost is None or sample.rate == 0):
            return replace(sample, rate=sample.packets / sample.seconds)
        rate *= STEP
    raise RuntimeError(f"{reader.what}: packets are lost at 1,000 a second")


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
    sender = _flood(programs, "udp", 64, 1000)
    for number in range(ROUNDS):
        for what, (chain, _) in chains.items():
            tell(f"cost of a processor: round {number + 1} of {ROUNDS}: {what}")
            samples[what].append(_look(here, sender, ours.reader(what, {DEVICE: chain})))
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
