"""Checksums against the loop that RFC 1071 describes, the golden packets, and the kernel."""

import errno
import os
import select
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.packet.checksum import corrected_checksum, internet_checksum, ones_complement_sum
from service.packet.parse import Packet, parse
from service.packet.verify import ChecksumState, pseudo_header_sum, verify_ipv4_header, verify_transport
from tests.packet import golden

WITH_CHECKSUM = (
    "ipv4_udp", "ipv4_tcp_syn", "ipv4_tcp_data", "ipv4_echo_request", "ipv4_need_to_fragment",
    "ipv6_tcp_syn", "ipv6_udp", "ipv6_echo_request", "ipv6_mld_report", "ipv6_all_extensions",
)  # fmt: skip


def naive_sum(data: bytes, initial: int = 0) -> int:
    """RFC 1071, 4.1, word by word."""
    total = initial
    for at in range(0, len(data), 2):
        total += int.from_bytes(data[at : at + 2].ljust(2, b"\0"), "big")
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def packet_of(octets: bytes | bytearray) -> Packet:
    packet = parse(octets)
    assert isinstance(packet, Packet)
    return packet


def test_example_of_rfc_1071() -> None:
    assert ones_complement_sum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2


@given(st.binary(max_size=300) | st.sampled_from((b"\xff" * 6, b"\0" * 6, b"\xff\xfe\0\x01")), st.integers(0, 2**33))
def test_sum_equals_the_naive_one(data: bytes, initial: int) -> None:
    assert ones_complement_sum(data, initial=initial) == naive_sum(data, initial)
    assert ones_complement_sum(bytearray(b"\x77" + data + b"\x55"), 1, len(data), initial) == naive_sum(data, initial)
    assert internet_checksum(data, initial=initial) == naive_sum(data, initial) ^ 0xFFFF


def test_sum_of_64_kib_equals_the_naive_one() -> None:
    data = bytes(at * 7 % 251 for at in range(65535))
    assert ones_complement_sum(data) == naive_sum(data)


@given(st.binary(min_size=4, max_size=40), st.integers(0, 0xFFFF))
def test_correcting_equals_computing_again(data: bytes, new: int) -> None:
    changed = new.to_bytes(2, "big") + data[2:]
    corrected = corrected_checksum(internet_checksum(data), int.from_bytes(data[:2], "big"), new)
    # Two ways to write zero: data of nothing but zeros is the one case where they differ (RFC 1624, 3).
    assert corrected % 0xFFFF == internet_checksum(changed) % 0xFFFF
    if any(changed):
        assert corrected == internet_checksum(changed)


@pytest.mark.parametrize("name", WITH_CHECKSUM)
def test_golden_checksums_verify_and_any_flipped_bit_is_found(name: str) -> None:
    octets = golden.BY_NAME[name]
    packet = packet_of(octets)
    assert verify_transport(octets, packet) is ChecksumState.GOOD
    assert verify_transport(b"\xaa" * 3 + octets, packet_at_3(octets)) is ChecksumState.GOOD
    for at in range(packet.transport_offset, packet.transport_offset + packet.transport_length):
        changed = bytearray(octets)
        changed[at] ^= 0x10
        assert verify_transport(changed, packet) is ChecksumState.BAD, at


def packet_at_3(octets: bytes) -> Packet:
    packet = parse(b"\xaa" * 3 + octets, offset=3)
    assert isinstance(packet, Packet)
    return packet


@pytest.mark.parametrize("packet", golden.PACKETS, ids=lambda packet: packet.name)
def test_golden_ipv4_headers_verify(packet: golden.Golden) -> None:
    assert verify_ipv4_header(packet.octets) == packet.class_name.startswith("ipv4")
    for at in range(20 if packet.class_name.startswith("ipv4") else 0):
        changed = bytearray(packet.octets)
        changed[at] ^= 0x01
        assert not verify_ipv4_header(changed), at


@given(st.binary(max_size=70), st.integers(0, 80))
def test_verifying_a_header_never_raises(data: bytes, offset: int) -> None:
    verify_ipv4_header(data, offset)


def test_what_cannot_be_verified_says_so() -> None:
    for name in ("ipv4_first_fragment", "ipv4_next_fragment", "ipv6_last_fragment", "ipv6_esp"):
        octets = golden.BY_NAME[name]
        assert verify_transport(octets, packet_of(octets)) is ChecksumState.UNKNOWN


def test_udp_without_a_checksum_is_absent() -> None:
    octets = bytearray(golden.BY_NAME["ipv4_udp"])
    octets[26:28] = b"\0\0"
    assert verify_transport(octets, packet_of(octets)) is ChecksumState.ABSENT


def test_udp_checksum_leaves_out_the_surplus() -> None:
    octets = bytearray(golden.BY_NAME["ipv4_udp"] + b"\x12\x34")
    octets[2:4] = len(octets).to_bytes(2, "big")
    assert verify_transport(octets, packet_of(octets)) is ChecksumState.GOOD


def test_source_route_that_goes_on_hides_the_final_destination() -> None:
    octets = bytearray(golden.BY_NAME["ipv6_all_extensions"])
    octets[59] = 1  # segments left
    assert verify_transport(octets, packet_of(octets)) is ChecksumState.UNKNOWN


def test_pseudo_header_of_a_jumbogram_has_a_32_bit_length() -> None:
    ip = packet_of(golden.BY_NAME["ipv6_udp"]).ip
    pseudo = ip.source.packed + ip.destination.packed + (70000).to_bytes(4, "big") + b"\0\0\0\x11"
    assert pseudo_header_sum(ip, 17, 70000) == naive_sum(pseudo)


@pytest.mark.kernel
def test_an_echo_reply_made_by_the_kernel_parses_and_verifies() -> None:
    """On the loopback, through a raw socket: changes nothing on the host."""
    try:
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    except PermissionError:
        pytest.skip("needs CAP_NET_RAW")
    identifier = os.getpid() & 0xFFFF
    request = bytearray(b"\x08\0\0\0" + identifier.to_bytes(2, "big") + b"\0\x01" + bytes(range(33)))
    request[2:4] = internet_checksum(request).to_bytes(2, "big")
    with raw:
        try:
            raw.sendto(request, ("127.0.0.1", 0))
        except OSError as error:
            if error.errno != errno.ENETUNREACH:
                raise
            pytest.skip("needs the loopback to be up")
        while True:
            ready, _, _ = select.select([raw], [], [], 5.0)
            assert ready, "no echo reply within 5 s"
            reply = raw.recv(2048)
            packet = packet_of(reply)
            assert packet.transport is not None
            if (reply[20], reply[24:26]) == (0, identifier.to_bytes(2, "big")):
                break
    assert verify_ipv4_header(reply)
    assert verify_transport(reply, packet) is ChecksumState.GOOD
    assert reply[packet.payload_offset :] == bytes(range(33))
