"""Replies are judged by building what they should be, from nothing, with all checksums computed anew."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.dataplane.processors.reply import Reply, derived_mac
from service.packet import build
from service.packet.vnet import GSO_UDP_L4, VnetHeader, build_vnet
from tests.dataplane.chains import FakeBatch, FakeContext, plain_headers, run

HOST, LAB = bytes([10, 7, 0, 1]), bytes([10, 7, 15, 255])
HOST6, LAB6 = ipaddress.ip_address("fd00::1").packed, ipaddress.ip_address("fd00::1:2345").packed
NETWORKS = ["10.7.0.0/20", "198.51.100.0/24", "fd00::/64"]
HOST_MAC = bytes.fromhex("52540000000a")
MAC = derived_mac("tap0")
BROADCAST = b"\xff" * 6


def stage(mode: str = "tun", **options: object) -> tuple[Reply, FakeContext]:
    context = FakeContext("tun" if mode == "tun" else "tap")
    return Reply({"networks": NETWORKS, **options}, context), context


addresses = st.tuples(st.just(HOST), st.just(LAB)) | st.tuples(st.just(HOST6), st.just(LAB6))


@given(addresses, st.integers(0, 65535), st.integers(0, 65535), st.binary(max_size=99))
def test_an_echo_request_becomes_the_reply_that_would_be_built(
    ends: tuple[bytes, bytes], identifier: int, sequence: int, data: bytes
) -> None:
    reply, context = stage()
    source, to = ends
    batch = run(reply, [build.echo(source, to, identifier, sequence, data)])
    (answer,) = batch.answered
    wanted = build.echo(to, source, identifier, sequence, data, reply=True)
    check = 22 if len(source) == 4 else 42
    assert answer[:check] + answer[check + 2 :] == wanted[:check] + wanted[check + 2 :]
    assert answer[check : check + 2] in (wanted[check : check + 2], b"\xff\xff")
    if answer[check : check + 2] != wanted[check : check + 2]:
        assert wanted[check : check + 2] == bytes(2), "65,535 and 0 are the same number"
    assert batch.left() == []
    assert context.counted == {"answered_icmp" if len(source) == 4 else "answered_icmpv6": 1}


some_ends = st.sampled_from(
    ((HOST, LAB), (HOST, HOST), (HOST, bytes([192, 0, 2, 1])), (HOST, BROADCAST[:4]), (HOST, bytes([198, 51, 100, 0])))
) | st.sampled_from(((HOST6, LAB6), (LAB6, HOST6), (HOST6, HOST6), (HOST6, bytes(16))))


def echo(ends: tuple[bytes, bytes], identifier: int, data: bytes, reply: bool) -> bytes:
    return build.echo(ends[0], ends[1], identifier, 1, data, reply=reply)


echoes = st.builds(
    echo, some_ends, st.sampled_from((0, 7, 0xFFFF)), st.sampled_from((b"", b"\xff\xff", b"abc")), st.booleans(),
)  # fmt: skip


@given(st.lists(echoes, min_size=1, max_size=12), st.sampled_from((0x45, 0x60)), st.booleans())
def test_what_the_worker_found_of_all_changes_no_answer(packets: list[bytes], first: int, mixed: bool) -> None:
    packets = packets if mixed else [packet for packet in packets if packet[0] == first]
    outcomes = []
    kinds = set()
    for looked in (False, True):
        reply, context = stage()
        batch = FakeBatch(packets)
        if looked:
            batch.look()
        kinds.add(batch.kind)
        reply.process(batch)
        assert batch.is_whole()
        outcomes.append((batch.answered, batch.left(), context.counted))
    assert outcomes[0] == outcomes[1]
    assert len(kinds) == (2 if len({packet[0] for packet in packets}) == 1 else 1)


def test_a_request_of_zeros_gets_a_checksum_that_linux_takes() -> None:
    """Its reply sums to 0: a checksum of 0 over all zeros is the one that verifies as wrong."""
    reply, _ = stage()
    (answer,) = run(reply, [build.echo(HOST, LAB, 0, 0)]).answered
    assert answer == build.echo(LAB, HOST, 0, 0, reply=True)
    assert answer[22:24] == b"\xff\xff"


def test_more_pairs_of_addresses_than_are_remembered_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.dataplane.processors.reply.ENDS_MAX", 10)
    stays, context = stage()
    for number in (*range(1, 40), *range(1, 40)):
        to = bytes([10, 7, 1, number])
        (answer,) = run(stays, [build.echo(HOST, to, 1, 1)]).answered
        assert answer == build.echo(to, HOST, 1, 1, reply=True)
        assert len(stays._known) <= 10
    assert context.counted == {"answered_icmp": 78}


BAD_CHECK = bytearray(build.echo(HOST, LAB, 1, 1))
BAD_CHECK[22] ^= 1
OPTIONS = b"\x46" + build.echo(HOST, LAB, 1, 1)[1:20] + bytes(4) + build.echo(HOST, LAB, 1, 1)[20:]


@pytest.mark.parametrize(
    "packet",
    [
        build.echo(HOST, bytes([10, 8, 0, 1]), 1, 1),
        build.echo(HOST, LAB, 1, 1, reply=True),
        build.echo(LAB, LAB, 1, 1),
        build.echo(bytes(4), LAB, 1, 1),
        build.echo(bytes([127, 0, 0, 1]), LAB, 1, 1),
        build.echo(bytes([224, 0, 0, 1]), LAB, 1, 1),
        build.echo(BROADCAST[:4], LAB, 1, 1),
        build.echo(bytes(16), LAB6, 1, 1),
        build.echo(LAB6, LAB6, 1, 1),
        build.echo(ipaddress.ip_address("ff02::1").packed, LAB6, 1, 1),
        build.echo(HOST6, ipaddress.ip_address("fd00:1::1").packed, 1, 1),
        build.udp(HOST, 1, LAB, 7, b"echo"),
        build.echo(HOST, LAB, 1, 1)[:6] + b"\x20\x00" + build.echo(HOST, LAB, 1, 1)[8:],
        build.echo(HOST, LAB, 1, 1)[:6] + b"\x00\x01" + build.echo(HOST, LAB, 1, 1)[8:],
        build.echo(HOST, LAB, 1, 1)[:21] + b"\x01" + build.echo(HOST, LAB, 1, 1)[22:],
        build.echo(HOST, LAB, 1, 1)[:27],
        OPTIONS,
        b"",
    ],
)
def test_what_is_not_answered_goes_on_as_it_came(packet: bytes) -> None:
    reply, context = stage()
    batch = run(reply, [packet])
    assert batch.answered == []
    assert batch.left() == [packet]
    assert context.counted == {}


@pytest.mark.parametrize("to", ["224.0.0.1", "255.255.255.255", "127.0.0.1", "0.0.0.0", "ff02::1", "::1", "::"])
def test_addresses_of_no_host_are_never_answered_for(to: str) -> None:
    address = ipaddress.ip_address(to).packed
    reply, _ = stage(networks=["0.0.0.0/0", "::/0"])
    assert run(reply, [build.echo(HOST if len(address) == 4 else HOST6, address, 1, 1)]).answered == []


def test_a_wrong_checksum_stays_wrong() -> None:
    reply, _ = stage()
    (answer,) = run(reply, [bytes(BAD_CHECK)]).answered
    assert answer != build.echo(LAB, HOST, 1, 1, reply=True)


def test_only_what_is_asked_for_is_answered() -> None:
    packets = [build.echo(HOST, LAB, 1, 1), build.echo(HOST6, LAB6, 1, 1), build.udp(HOST, 1, LAB, 2, b"")]
    reply, _ = stage(answers=["icmpv6"])
    batch = run(reply, packets)
    assert batch.left() == [packets[0], packets[2]]
    assert batch.answered == [build.echo(LAB6, HOST6, 1, 1, reply=True)]


def test_what_the_kernel_does_not_take_is_counted() -> None:
    reply, context = stage()
    batch = FakeBatch([build.echo(HOST, LAB, 1, 1)])
    batch.takes_answers = False
    reply.process(batch)
    assert batch.left() == []
    assert context.counted == {"refused": 1}


def test_segments_go_by() -> None:
    reply, _ = stage()
    header = build_vnet(VnetHeader(1, GSO_UDP_L4, 28, 100, 20, 6))
    ping = build.echo(HOST, LAB, 1, 1)
    batch = run(reply, [ping, ping], headers=[header, *plain_headers(1)])
    assert batch.left() == [ping]
    assert len(batch.answered) == 1


def test_a_checksum_that_is_not_finished_is_finished_first() -> None:
    reply, _ = stage()
    ping = build.echo(HOST6, LAB6, 1, 1, b"data")
    pseudo = sum(int.from_bytes((HOST6 + LAB6)[at : at + 2], "big") for at in range(0, 32, 2)) + 58 + len(ping) - 40
    partial = ping[:42] + (pseudo % 0xFFFF).to_bytes(2, "big") + ping[44:]
    batch = run(reply, [partial], headers=[build_vnet(VnetHeader(1, 0, 0, 0, 40, 2))])
    assert batch.answered == [build.echo(LAB6, HOST6, 1, 1, b"data", reply=True)]


TAG = bytes.fromhex("8100002a")


@pytest.mark.parametrize("tags", [b"", TAG, bytes.fromhex("88a80007") + TAG])
def test_frames_are_answered_with_their_tags(tags: bytes) -> None:
    reply, context = stage("tap")
    for request, wanted in (
        (build.echo(HOST, LAB, 3, 4, b"x"), build.echo(LAB, HOST, 3, 4, b"x", reply=True)),
        (build.echo(HOST6, LAB6, 3, 4, b"x"), build.echo(LAB6, HOST6, 3, 4, b"x", reply=True)),
    ):
        batch = run(reply, [build.ethernet(MAC, HOST_MAC, request, tags=tags)], mode="tap")
        assert batch.answered == [build.ethernet(HOST_MAC, MAC, wanted, tags=tags)]
    ask = build.ethernet(BROADCAST, HOST_MAC, build.arp(1, (HOST_MAC, HOST), (bytes(6), LAB)), 0x0806, tags)
    batch = run(reply, [ask], mode="tap")
    assert batch.answered == [
        build.ethernet(HOST_MAC, MAC, build.arp(2, (MAC, LAB), (HOST_MAC, HOST)), 0x0806, tags)
    ]  # fmt: skip
    group = b"\x33\x33\xff" + LAB6[13:]
    ask = build.ethernet(group, HOST_MAC, build.neighbour_solicitation(HOST6, HOST_MAC, LAB6), tags=tags)
    batch = run(reply, [ask], mode="tap")
    assert batch.answered == [
        build.ethernet(HOST_MAC, MAC, build.neighbour_advertisement(LAB6, MAC, HOST6), tags=tags)
    ]  # fmt: skip
    assert context.counted == dict.fromkeys(("answered_icmp", "answered_icmpv6", "answered_arp", "answered_ndp"), 1)


def solicitation(**changes: bytes) -> bytes:
    octets = bytearray(
        build.ethernet(b"\x33\x33\xff" + LAB6[13:], HOST_MAC, build.neighbour_solicitation(HOST6, HOST_MAC, LAB6))
    )
    for at, value in changes.items():
        octets[int(at[1:]) : int(at[1:]) + len(value)] = value
    return bytes(octets)


@pytest.mark.parametrize(
    "frame",
    [
        build.ethernet(HOST_MAC, HOST_MAC, build.echo(HOST, LAB, 1, 1)),
        build.ethernet(BROADCAST, HOST_MAC, build.echo(HOST, LAB, 1, 1)),
        build.ethernet(MAC, BROADCAST, build.echo(HOST, LAB, 1, 1)),
        build.ethernet(MAC, HOST_MAC, build.echo(HOST, LAB, 1, 1), 0x86DD),
        build.arp_frame(1, (HOST_MAC, bytes(4)), (bytes(6), LAB), BROADCAST),  # a probe
        build.arp_frame(1, (HOST_MAC, LAB), (bytes(6), LAB), BROADCAST),  # an announcement
        build.arp_frame(2, (HOST_MAC, HOST), (bytes(6), LAB), BROADCAST),
        build.arp_frame(1, (HOST_MAC, HOST), (bytes(6), bytes([10, 8, 0, 1])), BROADCAST),
        build.arp_frame(1, (HOST_MAC, HOST), (bytes(6), LAB), HOST_MAC),
        build.arp_frame(1, (HOST_MAC, HOST), (bytes(6), LAB), BROADCAST)[:-1],
        build.ethernet(b"\x33\x33\xff" + LAB6[13:], HOST_MAC, build.neighbour_solicitation(bytes(16), HOST_MAC, LAB6)),
        solicitation(_21=b"\x40"),  # hop limit 64
        solicitation(_56=b"\0\0"),  # checksum
        solicitation(_55=b"\1"),  # code
        solicitation(_38=b"\xff\x02" + bytes(13) + b"\1"),  # to all nodes
        solicitation()[:-9],
    ],
)
def test_frames_that_are_not_answered_go_on_as_they_came(frame: bytes) -> None:
    reply, context = stage("tap")
    batch = run(reply, [frame], mode="tap")
    assert batch.answered == []
    assert batch.left() == [frame]
    assert context.counted == {}


def test_the_mac_can_be_given_and_else_is_locally_administered() -> None:
    assert MAC[0] & 3 == 2
    assert derived_mac("tap1") != MAC
    reply, _ = stage("tap", mac="02:00:00:00:00:63")
    ask = build.arp_frame(1, (HOST_MAC, HOST), (bytes(6), LAB), BROADCAST)
    assert run(reply, [ask], mode="tap").answered[0][6:12] == bytes.fromhex("020000000063")


@pytest.mark.parametrize("options", [{"networks": []}, {"networks": ["nonsense"]}, {"mac": "02:00"}])
def test_options_that_will_not_do_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"networks|nonsense|mac"):
        Reply({"networks": NETWORKS, **options}, FakeContext())
