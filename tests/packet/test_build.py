"""What is built is judged by the parser, the checksum's verifier, and a golden packet of each kind that there is."""

import pytest

from service.packet import build
from service.packet.ip import IPv6Header
from service.packet.parse import Frame, Packet, parse, parse_frame
from service.packet.summary import summary
from service.packet.verify import ChecksumState, verify_ipv4_header, verify_transport

V4 = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
V6 = bytes([0xFD] + [0] * 14 + [1]), bytes([0xFD] + [0] * 14 + [2])
MAC = bytes.fromhex("02000000000a")


@pytest.mark.parametrize("ends", [V4, V6], ids=["ipv4", "ipv6"])
@pytest.mark.parametrize("size", [0, 1, 999])
def test_everything_built_is_whole(ends: tuple[bytes, bytes], size: int) -> None:
    source, to = ends
    data = bytes(range(256)) * 4
    for octets, said in (
        (build.udp(source, 4000, to, 53, data[:size]), f"UDP, length {size}"),
        (build.tcp(source, 4000, to, 80, data[:size], flags=0x18, sequence=7), "Flags [P.]"),
        (build.echo(source, to, 5, 6, data[:size]), "echo request, id 5, seq 6"),
        (build.echo(source, to, 5, 6, data[:size], reply=True), "echo reply, id 5, seq 6"),
    ):
        packet = parse(octets)
        assert isinstance(packet, Packet)
        assert said in summary(packet)
        assert packet.ip.source.packed == source
        assert verify_transport(octets, packet) == ChecksumState.GOOD
        assert isinstance(packet.ip, IPv6Header) or verify_ipv4_header(octets)
        frame = parse_frame(build.ethernet(MAC, MAC, octets, tags=b"\x81\0\0\x2a"))
        assert isinstance(frame, Frame)
        assert frame.ethernet.tags[0].vlan == 42
        assert frame.packet is not None
        assert frame.packet.transport == packet.transport


def test_arp_is_as_the_rfc_draws_it() -> None:
    frame = build.arp_frame(build.ARP_REQUEST, (MAC, V4[0]), (bytes(6), V4[1]), b"\xff" * 6)
    assert frame.hex() == "ffffffffffff02000000000a0806000108000604000102000000000a0a000001" + "0" * 12 + "0a000002"


def test_neighbours_ask_a_group_and_are_answered_alone() -> None:
    for octets in (build.neighbour_solicitation(V6[0], MAC, V6[1]), build.neighbour_advertisement(V6[1], MAC, V6[0])):
        packet = parse(octets)
        assert isinstance(packet, Packet)
        assert verify_transport(octets, packet) == ChecksumState.GOOD
        assert "neighbor" in summary(packet)
    assert parse(build.neighbour_solicitation(V6[0], MAC, V6[1])).ip.destination.compressed == "ff02::1:ff00:2"  # type: ignore[union-attr]
