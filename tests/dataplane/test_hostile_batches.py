"""Any octets, in any batch, with any headers: no processor raises, or writes beside its packets.

What went wrong once is kept in corpus/, a file for each: "tun" or "tap" in its name, packets in hex, one a line.
"""

from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.dataplane.contract import Mode, Processor
from service.dataplane.processors.balance import Balance
from service.dataplane.processors.filter import Filter
from service.dataplane.processors.forward import Forward
from service.dataplane.processors.inspect import Inspect
from service.dataplane.processors.reply import Reply, derived_mac
from service.packet import build
from service.packet.flowkey import ENTRIES_MAX, Meter, look_at
from service.packet.segment import CannotCut, cut
from service.packet.vnet import VnetHeader, build_vnet
from tests.dataplane.chains import FakeBatch, FakeContext
from tests.packet import golden, malformed, strategies
from tests.part import share

CORPUS: Final = sorted((Path(__file__).parent / "corpus").glob("*.hex"))
MODES: Final[tuple[Mode, ...]] = ("tun", "tap")
ANY: Final = ["0.0.0.0/0", "::/0"]
NEAR, FAR = (
    (bytes([10, 0, 0, 1]), bytes([fd := 0xFD, *bytes(14), 1])),
    (bytes([10, 0, 0, 2]), bytes([fd, *bytes(14), 2])),
)
MAC: Final = b"\x02" + bytes(5)
ECHOES: Final = tuple(build.echo(near, far, 1, 2, b"data") for near, far in zip(NEAR, FAR, strict=True))
ASKED: Final = (
    *(build.ethernet(derived_mac("tap0"), MAC, echo) for echo in ECHOES),
    build.arp_frame(1, (MAC, NEAR[0]), (bytes(6), FAR[0]), b"\xff" * 6),
    build.ethernet(b"\x33\x33\xff\0\0\2", MAC, build.neighbour_solicitation(NEAR[1], MAC, FAR[1])),
)  # fmt: skip


def stages(mode: Mode) -> list[Processor]:
    """One of each, with options under which it does all that it can do."""
    context = FakeContext(mode)
    inspect = {"flows": 16, "packets": 8}
    context.give_memory(Inspect.memory_bytes(inspect))
    rules: list[dict[str, Any]] = [
        {"action": "drop", "network": "10.0.0.0/9", "port": "1-100"},
        {"action": "pass", "source": "::/1", "protocol": "tcp"},
        {"action": "drop", "protocol": 50},
        {"action": "drop", "rate_pps": 1000},
    ]
    to = [{"to": name, "weight": weight} for name, weight in (("a", 1), ("b", 1000))]
    made = [
        Inspect(inspect, context),
        Filter({"rules": rules, "default": "pass"}, context),
        Reply({"networks": ANY}, context),
        Balance({"to": to, "symmetric": False}, context),
        Forward({"to": "c"}, context),
    ]
    context.close()
    return made


STAGES: Final = {mode: stages(mode) for mode in MODES}
METERS: Final = {mode: Meter(mode) for mode in MODES}


def harmless(packets: list[bytes], mode: Mode, headers: list[VnetHeader], direction: Any = "from_kernel") -> None:
    """Every stage, alone, with and without headers, with and without a look by the worker."""
    built = [build_vnet(headers[index % len(headers)]) for index in range(len(packets))] if headers else None
    for packet, entry in zip(packets, METERS[mode].look([memoryview(packet) for packet in packets]), strict=True):
        assert entry.kind == look_at(packet, mode).kind
    assert len(METERS[mode]) <= ENTRIES_MAX + 2
    for index, packet in enumerate(packets):
        try:
            cut(packet, built[index] if built else bytes(10), mode)
        except CannotCut:
            pass
    for stage in STAGES[mode]:
        for looked in (False, True):
            batch = FakeBatch(packets, mode=mode, direction=direction, headers=built, time_ns=harmless.now_ns)  # type: ignore[attr-defined]
            harmless.now_ns += 30_000_000  # type: ignore[attr-defined]
            if looked:
                batch.look()
                entries = batch.entries
                assert entries is not None
            stage.process(batch)
            assert batch.is_whole(), type(stage)
            assert len(batch.answered) <= len(packets)
            assert len(batch.left()) + len(batch.answered) + sum(batch.dropped.values()) <= len(packets)
            if batch.headers is not None:
                assert len(batch.headers) == len(batch.packets)


harmless.now_ns = 1  # type: ignore[attr-defined]

telling = st.sampled_from((0, 14, 20, 34, 40, 54, 60, 65535)) | st.integers(0, 120)
vnet_headers = st.builds(
    VnetHeader, st.integers(0, 3), st.sampled_from((0, 1, 3, 4, 5, 0x81, 0x7F)), st.integers(0, 65535),
    st.sampled_from((0, 1, 8, 1448, 65535)), telling, telling,
)  # fmt: skip
directions = st.sampled_from(("from_kernel", "to_kernel"))
packets = st.lists(strategies.octets | strategies.mutated(ECHOES), max_size=6)
frames = st.lists(strategies.frames | strategies.mutated(ASKED), max_size=6)
headers: st.SearchStrategy[list[VnetHeader]] = st.just([]) | st.lists(vnet_headers, min_size=1, max_size=3)


@given(packets, headers, directions)
def test_no_packets_do_harm(octets: list[bytes], vnet: list[VnetHeader], direction: str) -> None:
    harmless(octets, "tun", vnet, direction)


@given(frames, headers, directions)
def test_no_frames_do_harm(octets: list[bytes], vnet: list[VnetHeader], direction: str) -> None:
    harmless(octets, "tap", vnet, direction)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_what_once_did_harm_does_none(path: Path) -> None:
    kept = [bytes.fromhex(line.partition("#")[0]) for line in path.read_text().splitlines()]
    mode = MODES[path.name.startswith("tap")]
    harmless(kept, mode, [])
    for start in (0, 20, 34, 65535):
        for kind in (0, 1, 4, 5):
            harmless(kept, mode, [VnetHeader(1, kind, start, 8, start, 16)])


@pytest.mark.parametrize("mode", MODES)
def test_golden_and_broken_packets_cut_anywhere_do_no_harm(mode: Mode) -> None:
    known = [p.octets for p in (golden.PACKETS if mode == "tun" else golden.FRAMES)]
    known += [p.octets for p in (malformed.PACKETS if mode == "tun" else malformed.FRAMES) if len(p.octets) < 200]
    known += ECHOES if mode == "tun" else ASKED
    for octets in known:
        harmless([octets[:length] for length in range(0, len(octets) + 1, 3)], mode, [])


@pytest.mark.full
@pytest.mark.timeout(7200)
@settings(max_examples=share(170_000), deadline=None)
@given(packets, frames, headers, directions)
def test_a_million_packets_do_no_harm(
    octets: list[bytes], ethernet: list[bytes], vnet: list[VnetHeader], direction: str
) -> None:
    """170,000 examples of two lists of three on average."""
    harmless(octets, "tun", vnet, direction)
    harmless(ethernet, "tap", vnet, direction)
