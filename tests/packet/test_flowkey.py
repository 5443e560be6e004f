"""The memo must never be seen: whatever was looked at before, a look finds what a first look finds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.packet.classify import CLASSES, FIRST_MALFORMED, classify, classify_frame
from service.packet.flowkey import FLOW_BYTES, Entry, Meter, flow_ends, flow_key, look_at
from service.packet.parse import Frame, Packet, parse, parse_frame
from service.packet.rows import Rows
from service.packet.transport import IcmpHeader, Icmpv6Header, TcpHeader, UdpHeader
from tests.packet import golden, strategies
from tests.part import share


def facts(entry: Entry) -> tuple[object, ...]:
    return (entry.kind, entry.flow, entry.swapped, entry.protocol, entry.tcp_flags)


def expected(octets: bytes, mode: str) -> tuple[object, ...]:
    """What an entry must say, worked out from the slow parser alone."""
    length = len(octets)
    kind = classify(octets, length) if mode == "tun" else classify_frame(octets, length)
    parsed = parse(octets) if mode == "tun" else parse_frame(octets)
    packet = parsed.packet if isinstance(parsed, Frame) else parsed
    if kind >= FIRST_MALFORMED or not isinstance(packet, Packet):
        return (kind, None, False, 0, 0)
    protocol, flags = packet.protocol, 0
    ports = (0, 0)
    match packet.transport:
        case TcpHeader() as tcp:
            ports, flags = (tcp.source_port, tcp.destination_port), int(tcp.flags)
        case UdpHeader() as udp:
            ports = (udp.source_port, udp.destination_port)
        case IcmpHeader(echo=echo) | Icmpv6Header(echo=echo) if echo is not None:
            ports = (echo.identifier, echo.identifier)
        case _:
            pass
    if packet.is_fragment:
        ports = (0, 0)
        for extension in getattr(packet.ip, "extensions", ()):
            if type(extension).__name__ == "FragmentExtension" and (
                extension.more_fragments or extension.fragment_offset
            ):
                protocol = extension.next_header
                break
    source, to = packet.ip.source.packed, packet.ip.destination.packed
    flow = flow_key(packet.ip.version, protocol, source, ports[0], to, ports[1])
    return (kind, flow, (source, ports[0]) > (to, ports[1]), protocol, flags)


METERS = {"tun": Meter("tun", 64), "tap": Meter("tap", 64)}  # kept over all examples: what one leaves behind misleads


def agreed(octets: bytes, mode: str) -> None:
    wanted = expected(octets, mode)
    assert facts(look_at(octets, "tun" if mode == "tun" else "tap")) == wanted
    padded = bytearray(b"\x45" * 5 + octets + b"\xff" * 90)
    view = memoryview(padded)[5 : 5 + len(octets)]
    first, second = METERS[mode].look([view, view])
    assert facts(first) == wanted
    assert facts(second) == wanted
    assert len(METERS[mode]) <= 64


@pytest.mark.parametrize("mode", ["tun", "tap"])
def test_golden_packets_and_their_small_changes_are_agreed_on(mode: str) -> None:
    packets = golden.PACKETS if mode == "tun" else golden.FRAMES
    for packet in packets:
        agreed(packet.octets, mode)
        for length in range(len(packet.octets)):
            agreed(packet.octets[:length], mode)
        for at in range(min(len(packet.octets), 90)):
            for value in (0x00, 0x01, 0x06, 0x11, 0x2C, 0x3A, 0x45, 0x60, 0x81, 0xFF):
                octets = bytearray(packet.octets)
                octets[at] = value
                agreed(bytes(octets), mode)


@given(strategies.octets)
def test_any_octets_are_agreed_on(octets: bytes) -> None:
    agreed(octets, "tun")


@given(strategies.frames)
def test_any_frame_is_agreed_on(octets: bytes) -> None:
    agreed(octets, "tap")


@given(st.lists(strategies.mutated(), min_size=1, max_size=12), st.integers(0, 2))
def test_frames_with_vlan_tags_are_agreed_on(packets: list[bytes], tags: int) -> None:
    for octets in packets:
        ethertype = "86dd" if octets[:1] and octets[0] >> 4 == 6 else "0800"
        agreed(bytes.fromhex(golden.MACS + "8100002a" * tags + ethertype) + octets, "tap")


STRIDE = 4096
MEMORY = memoryview(bytearray(b"\xff" * (64 * STRIDE)))  # what a batch leaves behind lies behind the next one's packets
ROWS = Rows(MEMORY, STRIDE, 64)
IN_ROWS = {"tun": Meter("tun", 64, ROWS), "tap": Meter("tap", 64, ROWS)}


def agreed_in_rows(packets: list[bytes], mode: str) -> bool:
    """A batch is found to be what its packets are; return whether it was looked at all at once."""
    for place, octets in zip(ROWS.places, packets, strict=False):
        place[: len(octets)] = octets
    ROWS.hold([len(octets) for octets in packets])
    views = ROWS.views()
    assert views == packets
    meter = IN_ROWS[mode]
    wanted = [look_at(octets, "tun" if mode == "tun" else "tap") for octets in packets]
    alike = meter.alike()
    if alike is None:
        return False
    assert {entry.kind for entry in wanted} == {alike.kind}
    some = list(range(len(packets) - 1, 0, -2))
    found = meter.look_alike(alike, [views[place] for place in some], some)
    assert list(map(facts, found)) == [facts(wanted[place]) for place in some]
    assert list(map(facts, meter.look_alike(alike, views))) == list(map(facts, wanted))
    assert len(meter) <= 64
    return True


@st.composite
def batches(draw: st.DrawFn, packets: st.SearchStrategy[bytes]) -> list[bytes]:
    """Mostly one packet, with a few octets changed here and there, in all of them or in one."""
    octets = bytearray(draw(packets))
    batch = [octets] * draw(st.integers(1, 12))
    for at, value in draw(st.lists(st.tuples(st.integers(0, 69), st.integers(0, 255)), max_size=3)):
        changed = bytearray(batch[0])
        changed[at : at + 1] = bytes([value])
        for index in draw(st.just(range(len(batch))) | st.lists(st.integers(0, len(batch) - 1), max_size=2)):
            batch[index] = changed
    for index in draw(st.lists(st.integers(0, len(batch) - 1), max_size=1)):
        batch[index] = batch[index][: draw(st.integers(0, 70))] + draw(st.binary(max_size=4))
    return list(map(bytes, batch))


@given(batches(strategies.octets))
def test_any_batch_of_packets_is_agreed_on(packets: list[bytes]) -> None:
    agreed_in_rows(packets, "tun")
    agreed_in_rows(packets, "tun")


@given(batches(strategies.frames))
def test_any_batch_of_frames_is_agreed_on(packets: list[bytes]) -> None:
    agreed_in_rows(packets, "tap")
    agreed_in_rows(packets, "tap")


def cut_with_its_total(octets: bytes, length: int, at: int) -> bytes:
    """The first octets, the IP header at `at` saying that there are no more."""
    cut = bytearray(octets[:length])
    field, less = (at + 2, at) if octets[at] >> 4 == 4 else (at + 4, at + 40)
    if length >= max(field + 2, less):
        cut[field : field + 2] = (length - less).to_bytes(2, "big")
    return bytes(cut)


PLAIN = ("ipv4.tcp", "ipv4.udp", "ipv4.icmp", "ipv6.tcp", "ipv6.udp", "ipv6.icmpv6")


@pytest.mark.parametrize("mode", ["tun", "tap"])
def test_a_batch_of_one_kind_is_looked_at_at_once_but_for_each_octet_that_says_otherwise(mode: str) -> None:
    at_once = set()
    for packet in golden.PACKETS:
        known = packet.octets
        if mode == "tap":
            known = bytes.fromhex(golden.MACS + ("86dd" if known[0] >> 4 == 6 else "0800")) + known
        IN_ROWS[mode].look([memoryview(known)])  # so that it is remembered
        if agreed_in_rows([known] * 9, mode):
            at_once.add(CLASSES[look_at(known, "tun" if mode == "tun" else "tap").kind])
        for at in range(min(len(known), 76)):
            for value in (0x00, 0x06, 0x11, 0x45, 0xF0, known[at] ^ 1):
                octets = bytearray(known)
                octets[at] = value
                agreed_in_rows([known] * 8 + [bytes(octets)], mode)
                agreed_in_rows([bytes(octets)] * 9, mode)
        for length in range(min(len(known), 76)):
            agreed_in_rows([known[:length]] * 9, mode)
            agreed_in_rows([known] * 8 + [known[:length]], mode)
            agreed_in_rows([known] * 9, mode)  # what is behind the next ones' ends makes them whole
            agreed_in_rows([cut_with_its_total(known, length, 14 if mode == "tap" else 0)] * 9, mode)
    assert at_once == set(PLAIN), "or it is no faster than it was"


@pytest.mark.full
@pytest.mark.timeout(3600)
@settings(max_examples=50_000, deadline=None)
@given(batches(strategies.octets), batches(strategies.frames))
def test_a_hundred_thousand_batches_are_agreed_on(packets: list[bytes], frames: list[bytes]) -> None:
    agreed_in_rows(packets, "tun")
    agreed_in_rows(frames, "tap")


@pytest.mark.full
@pytest.mark.timeout(3600)
@settings(max_examples=share(250_000), deadline=None)
@given(strategies.octets, strategies.frames)
def test_half_a_million_octet_strings_are_agreed_on(octets: bytes, frame: bytes) -> None:
    agreed(octets, "tun")
    agreed(frame, "tap")


def udp(number: int, payload: bytes = b"", *, back: bool = False) -> bytes:
    ends = (b"\x0a\0\0\1", number.to_bytes(2, "big")), (b"\x0a\0\0\2", b"\0\x35")
    (source, source_port), (to, to_port) = reversed(ends) if back else ends
    length = (8 + len(payload)).to_bytes(2, "big")
    total = (28 + len(payload)).to_bytes(2, "big")
    head = b"\x45\0" + total + bytes(4) + b"\x40\x11\0\0" + source + to
    return head + source_port + to_port + length + b"\0\0" + payload


def test_both_directions_are_one_flow_and_equal_looks_one_object() -> None:
    meter = Meter("tun")
    there, back, again, longer = meter.look(
        [memoryview(o) for o in (udp(7), udp(7, back=True), udp(7), udp(7, b"x" * 99))]
    )
    assert there.flow is back.flow
    assert there.swapped != back.swapped
    assert there is again is longer
    assert there.flow is not None
    assert len(there.flow) == FLOW_BYTES
    assert flow_ends(there.flow) == (4, 17, b"\x0a\0\0\1", 7, b"\x0a\0\0\2", 53)


def test_a_full_memo_is_emptied_and_goes_on() -> None:
    meter = Meter("tun", 100)
    for number in range(1000):
        (entry,) = meter.look([memoryview(udp(number))])
        assert entry.kind == CLASSES.index("ipv4.udp")
        assert len(meter) <= 100
    assert facts(meter.look([memoryview(udp(3))])[0]) == facts(look_at(udp(3), "tun"))


def test_what_differs_from_packet_to_packet_of_a_flow_takes_no_place() -> None:
    meter = Meter("tun")
    segment = bytearray(golden.BY_NAME["ipv4_tcp_data"])
    for number in range(500):
        segment[4:6] = segment[26:28] = segment[30:32] = segment[10:12] = number.to_bytes(2, "big")
        meter.look([memoryview(segment), memoryview(udp(7, bytes(number)))])
    assert len(meter) <= 4
