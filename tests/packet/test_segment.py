"""Cutting is judged by the slow parser and by the checksum's verifier, and by the kernel in tests/dataplane."""

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.packet.checksum import ones_complement_sum
from service.packet.ip import IPv4Header
from service.packet.parse import Frame, Packet, parse, parse_frame
from service.packet.segment import SEGMENTS_MAX, CannotCut, cut, finish
from service.packet.transport import TcpFlags, TcpHeader, UdpHeader
from service.packet.verify import ChecksumState, verify_ipv4_header, verify_transport
from service.packet.vnet import (
    F_NEEDS_CSUM,
    GSO_ECN,
    GSO_NONE,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    GSO_UDP_L4,
    VNET_HDR_BYTES,
    VnetHeader,
    build_vnet,
    parse_vnet,
    untouched,
)
from tests.packet import golden, strategies
from tests.part import share

V4 = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
V6 = bytes([0xFD] + [0] * 14 + [1]), bytes([0xFD] + [0] * 14 + [2])
DESTINATION_OPTIONS = bytes([0, 0, 1, 4, 0, 0, 0, 0])


def segment(
    *, version: int, tcp: bool, payload: bytes, mss: int, flags: int = 0x18, extension: bool = False,
    tags: int = -1, partial: bool = True, sequence: int = 0xFFFF_FF00,
) -> tuple[bytes, bytes]:  # fmt: skip
    """A segment as the kernel hands it over, and its virtio_net_hdr. `tags`: VLAN tags of a frame, -1 for no frame."""
    if tcp:
        upper = struct.pack("!HHIIBBHHH", 4000, 80, sequence, 7, 8 << 4, flags, 512, 0, 0)
        upper += bytes.fromhex("0101080a0000000100000002")
    else:
        upper = struct.pack("!HHHH", 4000, 53, 8 + len(payload), 0)
    protocol, check_at = (6, 16) if tcp else (17, 6)
    source, to = V4 if version == 4 else V6
    carried = len(upper) + len(payload)
    pseudo = ones_complement_sum(source + to) + protocol + carried
    if partial:
        check = ones_complement_sum(b"", initial=pseudo)
        upper = upper[:check_at] + check.to_bytes(2, "big") + upper[check_at + 2 :]
    if version == 4:
        options = b"\x01\x01\x01\x00" if extension else b""
        size = 20 + len(options)
        head = struct.pack("!BBHHHBBH", 0x40 | size // 4, 0, size + carried, 0xFFFE, 0x4000, 64, protocol, 0)
        head += source + to + options
    else:
        chain = bytes([protocol]) + DESTINATION_OPTIONS[1:] if extension else b""
        head = struct.pack("!IHBB", 0x6000_0000, len(chain) + carried, 60 if chain else protocol, 64)
        head += source + to + chain
    link = b""
    if tags >= 0:
        link = bytes.fromhex(golden.MACS + "8100002a" * tags) + (b"\x08\x00" if version == 4 else b"\x86\xdd")
    kind = (GSO_TCPV4 if version == 4 else GSO_TCPV6) if tcp else GSO_UDP_L4
    start = len(link) + len(head)
    vnet = VnetHeader(F_NEEDS_CSUM if partial else 0, kind, start, mss, start, check_at)
    return link + head + upper + payload, build_vnet(vnet)


def good(octets: bytes | bytearray, mode: str) -> tuple[Packet, bytes]:
    """The packet with every checksum verified, and its payload."""
    parsed = parse(octets) if mode == "tun" else parse_frame(octets)
    packet = parsed.packet if isinstance(parsed, Frame) else parsed
    assert isinstance(packet, Packet), parsed
    assert verify_transport(octets, packet) == ChecksumState.GOOD
    if isinstance(packet.ip, IPv4Header):
        at = parsed.payload_offset if isinstance(parsed, Frame) else 0
        assert verify_ipv4_header(octets, at)
        assert packet.ip.total_length == len(octets) - at
    return packet, bytes(octets[packet.payload_offset : packet.payload_offset + packet.payload_length])


@given(
    version=st.sampled_from((4, 6)), tcp=st.booleans(),
    payload=st.integers(1, 3000).map(lambda size: random.Random(size).randbytes(size)),
    mss=st.integers(40, 200) | st.integers(40, 1500), flags=st.integers(0, 255), extension=st.booleans(),
    tags=st.integers(-1, 2), partial=st.booleans(), sequence=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_segments_carry_the_same_octets_in_whole_packets(
    version: int, tcp: bool, payload: bytes, mss: int, flags: int, extension: bool, tags: int, partial: bool,
    sequence: int,
) -> None:  # fmt: skip
    octets, header = segment(
        version=version, tcp=tcp, payload=payload, mss=mss, flags=flags, extension=extension, tags=tags,
        partial=partial, sequence=sequence,
    )  # fmt: skip
    mode = "tun" if tags < 0 else "tap"
    before = bytes(octets)
    found = cut(memoryview(octets), header, "tun" if tags < 0 else "tap")
    assert octets == before
    assert len(found) == -(-len(payload) // mss)
    joined = b""
    for number, part in enumerate(found):
        packet, body = good(part, mode)
        last = number == len(found) - 1
        assert len(body) == mss or last
        match packet.transport:
            case TcpHeader() as header_:
                assert header_.sequence == (sequence + len(joined)) % 2**32
                wanted = TcpFlags(flags)
                if not last:
                    wanted &= ~(TcpFlags.FIN | TcpFlags.PSH)
                if number:
                    wanted &= ~TcpFlags.CWR
                assert header_.flags == wanted
                assert header_.acknowledgment == 7
                assert header_.options.items[-1].type == 8
            case UdpHeader() as datagram:
                assert datagram.length == 8 + len(body)
            case _:
                raise AssertionError
        if isinstance(packet.ip, IPv4Header):
            assert packet.ip.identification == (0xFFFE + number) % 65536
            assert packet.ip.dont_fragment
            assert len(packet.ip.options.items) == (3 if extension else 0)
        else:
            assert len(packet.ip.extensions) == (1 if extension else 0)
        if tags >= 0:
            assert part[: 14 + 4 * tags] == octets[: 14 + 4 * tags]
        joined += body
    assert joined == payload


def test_a_packet_that_is_no_segment_comes_back_alone_with_its_checksum() -> None:
    octets, header = segment(version=4, tcp=True, payload=b"abc", mss=1000)
    plain = build_vnet(parse_vnet(header)._replace(gso_type=GSO_NONE))
    fixed = bytearray(octets)
    fixed[10:12] = (ones_complement_sum(fixed, 0, 20) ^ 0xFFFF).to_bytes(2, "big")
    (found,) = cut(fixed, plain, "tun")
    assert good(found, "tun")[1] == b"abc"
    finish(memoryview(fixed), plain, "tun")
    assert fixed == found
    assert cut(fixed, bytes(VNET_HDR_BYTES), "tun") == [fixed]
    assert untouched(bytes(VNET_HDR_BYTES))
    assert not untouched(plain)


def test_a_checksum_that_comes_out_as_0_is_sent_as_65535() -> None:
    octets, header = segment(version=4, tcp=False, payload=b"\0\0", mss=2)
    view = bytearray(octets)
    (plain,) = cut(view, header, "tun")
    check = plain[26] << 8 | plain[27]
    view[28:30] = check.to_bytes(2, "big")  # the payload becomes what was missing to 65,535
    (found,) = cut(view, header, "tun")
    assert found[26:28] == b"\xff\xff"
    good(found, "tun")


OCTETS, HEADER = segment(version=4, tcp=True, payload=bytes(4000), mss=1000)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"gso_size": 0}, "gso_size 0"),
        ({"gso_size": 1}, "more than"),
        ({"gso_type": GSO_TCPV6}, "gso_type"),
        ({"gso_type": GSO_UDP_L4}, "gso_type"),
        ({"gso_type": GSO_UDP}, "gso_type"),
        ({"gso_type": 0x7F}, "gso_type"),
        ({"csum_start": 0}, "checksum at"),
        ({"csum_start": 65535}, "checksum at"),
        ({"csum_offset": 17}, "checksum at"),
        ({"gso_type": GSO_NONE, "csum_start": 4000, "csum_offset": 65535}, "checksum at"),
        ({"gso_type": GSO_NONE, "csum_start": 4, "csum_offset": 6}, "checksum at"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(changed: dict[str, int], said: str) -> None:
    header = build_vnet(parse_vnet(HEADER)._replace(**changed))
    octets = bytes(OCTETS)
    with pytest.raises(CannotCut, match=said):
        cut(octets, header, "tun")


def test_hdr_len_is_a_hint_and_ecn_is_no_type_of_its_own() -> None:
    wanted = cut(OCTETS, HEADER, "tun")
    for hint in (0, 54, 65535):
        vnet = parse_vnet(HEADER)._replace(hdr_len=hint, gso_type=GSO_TCPV4 | GSO_ECN)
        assert cut(OCTETS, build_vnet(vnet), "tun") == wanted


def test_a_packet_that_is_no_whole_one_is_refused() -> None:
    for length in range(len(OCTETS)):
        with pytest.raises(CannotCut):
            cut(OCTETS[:length], HEADER, "tun")
    fragment = bytearray(OCTETS)
    fragment[6] = 0x20
    with pytest.raises(CannotCut, match="fragment"):
        cut(fragment, HEADER, "tun")


def test_packets_that_no_length_field_could_hold_are_refused() -> None:
    octets, header = segment(version=4, tcp=True, payload=bytes(65_400), mss=65_535)
    longer = bytearray(octets + bytes(5000))
    longer[2:4] = bytes(2)  # as IPv4 BIG TCP has it
    with pytest.raises(CannotCut, match="longer than"):
        cut(longer, header, "tun")


headers = st.builds(
    VnetHeader,
    st.integers(0, 3),
    st.sampled_from((0, 1, 3, 4, 5, 0x81, 0x84, 0x7F)),
    st.integers(0, 65535),
    st.sampled_from((0, 1, 2, 7, 8, 65535)) | st.integers(0, 65535),
    st.sampled_from((0, 14, 20, 34, 40, 54, 60, 65535)) | st.integers(0, 120),
    st.sampled_from((6, 16, 2, 65535)) | st.integers(0, 120),
)


def harmless(octets: bytes, header: bytes, mode: str) -> None:
    known = "tun" if mode == "tun" else "tap"
    try:
        found = cut(octets, header, "tun" if known == "tun" else "tap")
    except CannotCut:
        pass
    else:
        assert 1 <= len(found) <= SEGMENTS_MAX
    guarded = bytearray(b"\xa5" * 32 + octets + b"\xa5" * 32)
    view = memoryview(guarded)[32 : 32 + len(octets)]
    try:
        finish(view, header, "tun" if known == "tun" else "tap")
    except CannotCut:
        assert view == octets
    assert guarded[:32] == guarded[-32:] == b"\xa5" * 32


@given(strategies.octets, headers)
def test_no_header_does_harm(octets: bytes, header: VnetHeader) -> None:
    harmless(octets, build_vnet(header), "tun")


@given(strategies.frames, headers)
def test_no_header_of_a_frame_does_harm(octets: bytes, header: VnetHeader) -> None:
    harmless(octets, build_vnet(header), "tap")


@given(st.integers(0, 200), st.integers(0, 255), headers)
def test_no_header_of_a_segment_does_harm(at: int, value: int, header: VnetHeader) -> None:
    octets = bytearray(OCTETS)
    octets[at] = value
    harmless(bytes(octets), build_vnet(header), "tun")
    harmless(bytes(octets), build_vnet(header._replace(flags=1, csum_start=20, csum_offset=16)), "tun")


@pytest.mark.full
@pytest.mark.timeout(3600)
@settings(max_examples=share(100_000), deadline=None)
@given(strategies.octets, strategies.frames, headers)
def test_no_header_does_harm_a_hundred_thousand_times(octets: bytes, frame: bytes, header: VnetHeader) -> None:
    harmless(octets, build_vnet(header), "tun")
    harmless(frame, build_vnet(header), "tap")
