"""The captures' format, judged by tcpdump, and what the reader makes of what the writer wrote."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.packet import pcapng
from service.packet.pcapng import Captured

PING = bytes.fromhex("4500001c000100004001f6dd0a0000010a0000020800f7fd00010001")
ARP = bytes.fromhex("ffffffffffff02000000000108060001080006040001" + "0200000000010a0000010000000000000a000002")
AT_NS = 1_700_000_000_123_456_789

needs_tcpdump = pytest.mark.skipif(shutil.which("tcpdump") is None, reason="missing: tcpdump")
needs_capinfos = pytest.mark.skipif(shutil.which("capinfos") is None, reason="missing: capinfos (package tshark)")


def capture(mode: str, *batches: tuple[int, int, list[bytes]], snaplen: int = 262_144) -> bytes:
    head = pcapng.section("tunledger") + pcapng.interface("tun0", mode, snaplen)  # type: ignore[arg-type]
    body = b"".join(
        pcapng.packets(packets, time_ns=at, flags=flags, snaplen=snaplen)  # type: ignore[arg-type]
        for at, flags, packets in batches
    )
    return head + body + pcapng.statistics(time_ns=AT_NS, received=7, dropped=3)


@needs_tcpdump
@pytest.mark.parametrize(
    ("mode", "packet", "line"),
    [
        ("tun", PING, "IP 10.0.0.1 > 10.0.0.2: ICMP echo request, id 1, seq 1, length 8"),
        ("tap", ARP, "ARP, Request who-has 10.0.0.2 tell 10.0.0.1, length 28"),
    ],
)
def test_tcpdump_reads_a_capture_with_its_link_type_and_nanoseconds(
    mode: str, packet: bytes, line: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.pcapng"
    path.write_bytes(capture(mode, (AT_NS, pcapng.OUTBOUND, [packet, packet])))
    told = subprocess.run(
        ["tcpdump", "-n", "-tt", "--nano", "-r", path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert told == [f"1700000000.123456789 {line}"] * 2


@needs_capinfos
def test_wiresharks_tools_find_the_name_the_resolution_the_direction_and_what_was_dropped(tmp_path: Path) -> None:
    path = tmp_path / "x.pcapng"
    path.write_bytes(capture("tun", (AT_NS, pcapng.OUTBOUND, [PING]), (AT_NS + 1, pcapng.INBOUND, [PING])))
    told = subprocess.run(["capinfos", path], capture_output=True, text=True, check=True).stdout
    for part in ("Wireshark/... - pcapng", "Raw IP", "tun0", "Time resolution = 0x09", "Number of packets:   2"):
        assert part in told
    fields = ["frame.packet_flags_direction", "frame.interface_name"]
    shown = subprocess.run(
        ["tshark", "-r", path, "-T", "fields", *(word for field in fields for word in ("-e", field))],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [line.split("\t") for line in shown.splitlines()] == [["0x00000002", "tun0"], ["0x00000001", "tun0"]]


def test_of_a_packet_beyond_the_snaplen_the_start_is_kept_and_the_length_told() -> None:
    octets = capture("tun", (AT_NS, pcapng.INBOUND, [PING * 10]), snaplen=30)
    assert list(pcapng.Reader().feed(octets)) == [Captured(AT_NS, True, len(PING) * 10, (PING * 10)[:30])]


@given(
    batches=st.lists(
        st.tuples(
            st.integers(0, 2**63), st.sampled_from((1, 2)), st.lists(st.binary(max_size=70) | st.just(PING), max_size=5)
        ),
        max_size=4,
    ),
    snaplen=st.integers(16, 80),
    cuts=st.lists(st.integers(0, 2000), max_size=6),
)
def test_what_was_written_is_read_in_whatever_pieces_it_comes(
    batches: list[tuple[int, int, list[bytes]]], snaplen: int, cuts: list[int]
) -> None:
    octets = capture("tun", *batches, snaplen=snaplen)
    reader = pcapng.Reader()
    found: list[Captured] = []
    last = 0
    for cut in [*sorted(min(cut, len(octets)) for cut in cuts), len(octets)]:
        found += reader.feed(octets[last:cut])
        last = cut
    wanted = [
        Captured(at, flags == pcapng.INBOUND, len(packet), packet[:snaplen])
        for at, flags, packets in batches
        for packet in packets
    ]
    assert found == wanted
    assert (reader.received, reader.dropped) == (7, 3)


@given(keep=st.integers(0, 400))
def test_a_capture_that_was_cut_off_ends_with_its_last_whole_block(keep: int) -> None:
    octets = capture("tun", (AT_NS, pcapng.INBOUND, [PING, PING * 2, b"x"]))[:keep]
    end = pcapng.whole(octets)
    assert end <= len(octets)
    assert pcapng.whole(octets[:end]) == end
    reader = pcapng.Reader()
    count = len(list(reader.feed(octets)))
    assert len(list(pcapng.Reader().feed(octets[:end]))) == count
    assert not reader._rest or end + len(reader._rest) == len(octets)


@given(st.binary(max_size=300))
def test_octets_that_are_no_capture_are_refused_or_give_nothing(octets: bytes) -> None:
    try:
        list(pcapng.Reader().feed(octets))
    except pcapng.PcapngError:
        pass
