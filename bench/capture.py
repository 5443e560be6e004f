"""Capture to disk: how many packets a second without losing any, by the kernel or by us.

Each look has a file of its own, which is counted afterwards and gone at once: it must have every packet that was read.
Its octets are in the kernel's hands then, which writes them out behind the reader's back: how fast the disk is matters
only to captures that are longer than the kernel's patience.
"""

import mmap
import os
import shutil
import struct
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.figures import RateRow, show_rates
from bench.lab import Namespace, Programs, tell
from bench.readers import Ours, Reader, c_program
from bench.samples import DEVICE, Sample, figure, flood, look, named

INSPECT = {"processor": "inspect", "flows": 4096, "packets": 64}
CAPTURE = {"processor": "capture", "size_bytes": None, "files": 1}

CAPTURE_ROUNDS = 3
PROBE_WARM_S, PROBE_S = 0.1, 0.3
HALVINGS = 4
"""Of what is between a fifth of the rate with losses and a twentieth more than it: to 5 % of that rate."""
TRIES = 2
"""For a rate: somebody else who has the core for some milliseconds fills a queue of 1,000 packets."""
HELD_S = 3
AIM = 0.5
FILE_BYTES = 2 << 30
"""Most that a file gets to have, one at a time: 3 s at 600,000 packets of 1,000 octets."""


def fresh(path: Path) -> int:
    """An empty file in the place of one that may be there; its descriptor."""
    path.unlink(missing_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)


def measure_capture(programs: Programs, ours: Ours, here: Namespace, _there: Namespace) -> None:
    captured = Path(programs["captured"])
    free = shutil.disk_usage(captured.parent).free
    if free < 2 * FILE_BYTES:
        print(f"\ncapture: skipped: {captured.parent} has {free >> 20:,} MiB free, needs {2 * FILE_BYTES >> 20:,}")
        return
    inspect = ours.reader("ours: inspect", {DEVICE: [INSPECT]})
    captures = [
        ours.reader("capture to disk", {DEVICE: [CAPTURE]}),
        c_program("C: read, write pcap", programs, "capture", "FD", str(captured), str(FILE_BYTES)),
    ]
    proof = partial(_prove, captured)
    rows = []
    held = []
    try:
        for length in (64, 1000):
            flooded: dict[str, list[Sample]] = defaultdict(list)
            found: dict[str, list[Sample]] = defaultdict(list)
            for number in range(CAPTURE_ROUNDS):
                tell(f"capture, {length:,} octets: round {number + 1} of {CAPTURE_ROUNDS}")
                for reader in (inspect, *captures):
                    flooded[reader.what].append(_probe(programs, here, reader, length, 0))
                for reader in captures:
                    most = flooded[reader.what][-1].rate
                    found[reader.what].append(_without_loss(programs, here, reader, length, most, proof))
            capture, beside = (figure(reader.what, found[reader.what]) for reader in captures)
            reads, *losing = (figure(f"{what}, flooded", samples) for what, samples in flooded.items())
            title = f"{length:,} octets, none lost"
            rows.append(RateRow(named(capture, title), [reads, beside, *losing], aim=AIM))
            rate = int(reads.median * AIM)
            tell(f"capture, {length:,} octets: {rate:,} packets/s for {HELD_S} s")
            for reader, its_proof in ((captures[0], proof), (captures[1], proof), (inspect, None)):
                sample = _probe(programs, here, reader, length, rate, its_proof, HELD_S)
                held.append((length, rate, reader.what, sample))
    finally:
        captured.unlink(missing_ok=True)
    show_rates(
        "Capture to disk: the highest rate at which no packet is lost, next to what is read of a flood",
        "packets/s",
        rows,
    )
    print(f"\nThe same at {AIM} of inspect's rate for {HELD_S} s; each file had every packet that was read\n")
    print(f"| {'octets':>6} | {'packets/s':>10} | {'reader':28} | {'read':>10} | {'lost':>7} | {'no core':>7} |")
    print(f"| {'-' * 5}: | {'-' * 9}: | {'-' * 28} | {'-' * 9}: | {'-' * 6}: | {'-' * 6}: |")
    for length, rate, what, sample in held:
        row = f"| {length:6,} | {rate:10,} | {what:28} | {sample.packets:10,} | {sample.lost:7,} |"
        print(f"{row} {sample.waited:7.1%} |")


def _probe(
    programs: Programs,
    space: Namespace,
    reader: Reader,
    length: int,
    rate: int,
    proof: Callable[[int], None] | None = None,
    measured_s: float = PROBE_S,
) -> Sample:
    """One short look at a rate; 0 is more than anybody reads."""
    sender = flood(programs, "udp", length, 1000, rate)
    return look(space, sender, reader, proof=proof, warm_s=PROBE_WARM_S, measured_s=measured_s)


def _without_loss(
    programs: Programs, space: Namespace, reader: Reader, length: int, most: float, proof: Callable[[int], None]
) -> Sample:
    """The highest rate, of those that halving comes to, at which the kernel drops nothing; `most` is read of a flood.

    That the reader loses nothing either is the `proof`'s.
    """
    low, high = most * 0.2, most * 1.05
    best: Sample | None = None
    for _ in range(HALVINGS):
        rate = (low + high) / 2
        tries = (_probe(programs, space, reader, length, int(rate), proof) for _ in range(TRIES))
        sample = next((sample for sample in tries if not sample.lost), None)
        if sample is None:
            high = rate
        else:
            best, low = sample, rate
    if best is None:
        raise RuntimeError(f"{reader.what}: packets are lost at {high:,.0f}/s, where {most:,.0f}/s of a flood are read")
    return best


def _prove(captured: Path, read: int) -> None:
    """That the file has as many packets as were read, and is gone."""
    with captured.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as octets:
        pcapng = octets[:4] == b"\x0a\x0d\x0d\x0a"
        packets, end = 0, len(octets)
        if pcapng:
            block, at = struct.Struct("<II").unpack_from, 0
            while at < end:
                kind, length = block(octets, at)
                packets += kind == 6  # an enhanced packet block
                at += length
        else:
            kept, at = struct.Struct("<8xI4x").unpack_from, 24  # pcap-savefile(5)
            while at < end:
                at += 16 + kept(octets, at)[0]
                packets += 1
    captured.unlink()
    assert at == end, f"the file ends {at - end} octets early"
    assert packets == read, f"{read:,} packets were read, the file has {packets:,}"
