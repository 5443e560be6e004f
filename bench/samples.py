"""A look at one reader: a device, a sender, a while; and what the kernel counted meanwhile.

Which readers are compared, and at what, belongs to the tables.
"""

import json
import os
import shutil
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep

from bench.figures import Rate
from bench.lab import IFF_TUN, SENDER_CPU, Namespace, Programs, counted, open_tun, running, spent, tell
from bench.readers import Reader

ROUNDS = 5
WARM_S = 0.2
MEASURED_S = 0.5
TCP_S = 2
DEVICE = "bench0"
HERE, THERE = "10.60.0.1", "10.60.1.1"
LEFT, RIGHT = "left0", "right0"
LEFT_IP, RIGHT_IP = "10.61.0.1", "10.61.0.2"


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
    lost: int
    """Packets that the kernel dropped."""
    waited: float
    """Part of the time that the reader could have run, and another had its core."""


def figure(what: str, samples: Sequence[Sample]) -> Rate:
    """The rate in all samples, and what held it back."""

    def middle(name: str) -> float:
        return statistics.median(float(getattr(sample, name)) for sample in samples)

    busy, dropped = middle("busy"), middle("dropped")
    limit = f"{middle('cpu_ns'):,.0f} ns/packet, {middle('user'):.0%} user, "
    limit += ("reader" if busy > 0.9 else "a core that others use") if dropped > 0.01 or busy > 0.9 else "sender"
    limit += f" ({busy:.0%} busy, {dropped:.0%} lost)"
    return Rate(what, tuple(sample.rate for sample in samples), limit)


def rounds(title: str, readers: Sequence[Reader], measure: Callable[[Reader], Sample]) -> list[Rate]:
    """Each reader once in every round, in turn; the figures in the order of the readers."""
    samples: dict[str, list[Sample]] = defaultdict(list)
    for number in range(ROUNDS):
        for reader in readers:
            tell(f"{title}: round {number + 1} of {ROUNDS}: {reader.what}")
            samples[reader.what].append(measure(reader))
    return [figure(reader.what, samples[reader.what]) for reader in readers]


def look(
    space: Namespace,
    sender: Sequence[str],
    reader: Reader,
    *,
    offloads: bool = False,
    rated: Callable[[], float] | None = None,
    proof: Callable[[int], None] | None = None,
    warm_s: float = WARM_S,
    measured_s: float = MEASURED_S,
) -> Sample:
    """A fresh device, the reader, the sender, a while to warm up; then what happens in `measured_s`.

    `rated` is what the rate is of, in the namespace; by default the packets that were read. `proof` is handed, once the
    reader has ended, how many were read from the device in all its life.
    """
    with space.inside():
        fd = open_tun(DEVICE, HERE, offloads=offloads)
        try:
            with reader.start({DEVICE: fd}) as pid:
                with running(sender, SENDER_CPU):
                    sleep(warm_s)
                    begun, first, time, thing = perf_counter(), counted(DEVICE), spent(pid), rated() if rated else 0.0
                    sleep(measured_s)
                    last, after, end = counted(DEVICE), spent(pid), perf_counter()
                    packets = last.read_packets - first.read_packets
                    dropped = last.dropped - first.dropped
                    of = rated() - thing if rated else packets
                read = _read_to_the_end() if proof else 0
            if proof:
                proof(read)
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
        lost=dropped,
        waited=(after.waited_s - time.waited_s) / (end - begun),
    )


def _read_to_the_end() -> int:
    """How many packets were read from the device, once the reader has taken what was in its queue."""
    before = -1
    while (now := counted(DEVICE).read_packets) != before:
        before = now
        sleep(0.03)
    return now


def flood(programs: Programs, kind: str, length: int, flows: int, rate: int = 0, to: str = THERE) -> list[str]:
    """The sender that is called `flood.c`, `rate` packets a second or, with 0, as fast as they go."""
    return [programs["flood"], DEVICE, kind, HERE, to, str(length), str(flows), str(rate)]


def named(rate: Rate, title: str) -> Rate:
    """The same under a name that says what of."""
    return Rate(f"{rate.what}: {title}", rate.values, rate.limit)


def tcp(
    programs: Programs,
    here: Namespace,
    there: Namespace,
    reader: Reader,
    *,
    offloads: bool,
    flags: int = IFF_TUN,
    seconds: int = TCP_S,
    opened: Callable[[str], None] = lambda _name: None,
) -> Sample:
    """One TCP connection through `reader`, by iperf3 or, where there is none, by `tcp.c`.

    `flags` are the devices', `opened` is told of each, in its namespace, before the reader starts.
    """
    with ExitStack() as stack:
        fds = {}
        for space, name, address in ((here, LEFT, LEFT_IP), (there, RIGHT, RIGHT_IP)):
            with space.inside():
                fds[name] = open_tun(name, address, offloads=offloads, flags=flags)
                stack.callback(os.close, fds[name])
                opened(name)
        pid = stack.enter_context(reader.start(fds))
        iperf3 = shutil.which("iperf3")
        sink = [iperf3, "-s", "-1", "-B", RIGHT_IP] if iperf3 else [programs["tcp"], "sink", RIGHT_IP]
        source = (
            [iperf3, "-c", RIGHT_IP, "-t", str(seconds), "-O", "1", "-J"]
            if iperf3
            else [programs["tcp"], "source", RIGHT_IP, str(seconds)]
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
            octets, took = heard.split()
            bits = int(octets) * 8 / float(took)
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
            lost=last.dropped - before.dropped,
            waited=(after.waited_s - time.waited_s) / (end - begun),
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
