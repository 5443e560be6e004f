"""classify and parse are written apart; whatever the octets, they must say the same, and neither may raise."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.packet.classify import CLASSES, classify, classify_frame
from service.packet.parse import class_name, parse, parse_frame
from service.packet.reason import Malformed, MalformedReason
from service.packet.summary import summary
from tests.packet import golden, malformed, strategies


def agreed(octets: bytes) -> str:
    """Return the class of `octets`, having asked for it in every way there is."""
    expected = CLASSES[classify(octets, len(octets))]
    parsed = parse(octets)
    assert class_name(parsed) == expected
    # The same in the middle of a larger, reused buffer, full of what would mislead.
    buffer = bytearray(b"\x45" * 7 + octets + b"\xff" * 60)
    assert CLASSES[classify(buffer, len(octets), 7)] == expected
    assert CLASSES[classify(memoryview(buffer), len(octets), 7)] == expected
    assert class_name(parse(memoryview(buffer), len(octets), 7)) == expected
    line = summary(parsed)
    assert line
    assert line.isprintable()
    return expected


def agreed_frame(octets: bytes) -> str:
    """Return the class of the frame `octets`, having asked for it in every way there is."""
    expected = CLASSES[classify_frame(octets, len(octets))]
    parsed = parse_frame(octets)
    assert class_name(parsed) == expected
    buffer = bytearray(b"\x45" * 7 + octets + b"\xff" * 60)
    assert CLASSES[classify_frame(buffer, len(octets), 7)] == expected
    assert class_name(parse_frame(buffer, len(octets), 7)) == expected
    line = summary(parsed)
    assert line
    assert line.isprintable()
    return expected


@pytest.mark.parametrize("packet", golden.PACKETS, ids=lambda packet: packet.name)
def test_golden_packet_has_its_class_and_line(packet: golden.Golden) -> None:
    assert agreed(packet.octets) == packet.class_name
    assert summary(parse(packet.octets)) == packet.line


@pytest.mark.parametrize("frame", golden.FRAMES, ids=lambda frame: frame.name)
def test_golden_frame_has_its_class_and_line(frame: golden.Golden) -> None:
    assert agreed_frame(frame.octets) == frame.class_name
    assert summary(parse_frame(frame.octets)) == frame.line


@pytest.mark.parametrize("broken", malformed.PACKETS, ids=lambda broken: broken.name)
def test_broken_packet_has_its_reason(broken: malformed.Broken) -> None:
    assert agreed(broken.octets) == f"malformed.{broken.reason}"


@pytest.mark.parametrize("broken", malformed.FRAMES, ids=lambda broken: broken.name)
def test_broken_frame_has_its_reason(broken: malformed.Broken) -> None:
    assert agreed_frame(broken.octets) == f"malformed.{broken.reason}"


@pytest.mark.parametrize(
    ("expected", "octets"), [pytest.param(name, octets, id=case) for case, name, octets in malformed.TOLERATED]
)
def test_just_inside_the_edge_passes(expected: str, octets: bytes) -> None:
    assert agreed(octets) == expected


def test_every_class_has_a_case() -> None:
    cases = {packet.class_name for packet in (*golden.PACKETS, *golden.FRAMES)}
    cases |= {f"malformed.{broken.reason}" for broken in (*malformed.PACKETS, *malformed.FRAMES)}
    assert set(CLASSES) == cases


def test_class_names_are_stable() -> None:
    """These name counters and appear in the API: a change here is a change of a public contract."""
    assert len(set(CLASSES)) == len(CLASSES)
    assert [reason.value for reason in MalformedReason] == [reason.name.lower() for reason in MalformedReason]
    assert CLASSES[:12] == (
        "ipv4.tcp", "ipv4.udp", "ipv4.icmp", "ipv4.fragment", "ipv4.other",
        "ipv6.tcp", "ipv6.udp", "ipv6.icmpv6", "ipv6.fragment", "ipv6.other",
        "arp", "ethernet.other",
    )  # fmt: skip


@pytest.mark.parametrize("packet", golden.PACKETS, ids=lambda packet: packet.name)
def test_golden_packet_cut_anywhere_is_malformed(packet: golden.Golden) -> None:
    for length in range(len(packet.octets)):
        assert agreed(packet.octets[:length]).startswith("malformed."), length


@pytest.mark.parametrize("frame", golden.FRAMES, ids=lambda frame: frame.name)
def test_golden_frame_cut_anywhere_is_agreed_on(frame: golden.Golden) -> None:
    for length in range(len(frame.octets)):
        name = agreed_frame(frame.octets[:length])
        assert length >= 14 or name.startswith("malformed.")


@pytest.mark.parametrize("packet", golden.PACKETS, ids=lambda packet: packet.name)
def test_every_octet_set_to_every_telling_value_is_agreed_on(packet: golden.Golden) -> None:
    for at in range(min(len(packet.octets), 110)):
        for value in (0x00, 0x01, 0x06, 0x0F, 0x11, 0x2C, 0x33, 0x3A, 0x3C, 0x46, 0x60, 0x7F, 0x80, 0xC2, 0xFF):
            octets = bytearray(packet.octets)
            octets[at] = value
            agreed(bytes(octets))


@given(strategies.octets)
def test_any_octets_are_agreed_on(octets: bytes) -> None:
    agreed(octets)


@given(strategies.frames)
def test_any_frame_is_agreed_on(octets: bytes) -> None:
    agreed_frame(octets)


@given(strategies.octets, st.integers(0, 20))
def test_padding_changes_nothing_that_was_valid(octets: bytes, padding: int) -> None:
    name = agreed(octets)
    if not name.startswith("malformed."):
        assert agreed(octets + b"\xff" * padding) == name


@given(strategies.octets)
def test_offsets_lie_inside_the_packet(octets: bytes) -> None:
    packet = parse(octets)
    if isinstance(packet, Malformed):
        return
    end = packet.transport_offset + packet.transport_length
    assert 20 <= packet.transport_offset <= packet.payload_offset
    assert packet.payload_length >= 0
    assert packet.payload_offset + packet.payload_length <= end <= len(octets)


@given(st.sampled_from(strategies.PACKETS), st.binary(min_size=1, max_size=60))
def test_octets_behind_the_length_are_not_read(octets: bytes, tail: bytes) -> None:
    assert classify(octets + tail, len(octets)) == classify(octets, len(octets))
    assert parse(octets + tail, len(octets)) == parse(octets)


def test_64_kib_segments_are_ordinary_packets() -> None:
    payload = 0xFFFF - 40
    header = bytes.fromhex("4500ffff 12344000 40060000 0a000002 0a000001")
    segment = header + golden.BY_NAME["ipv4_tcp_data"][20:40] + bytes(payload)
    assert agreed(segment) == "ipv4.tcp"
    parsed = parse(segment)
    assert not isinstance(parsed, Malformed)
    assert parsed.payload_length == payload
