"""`reply`: stands for all hosts of some networks, as far as ping, ARP and neighbour discovery can tell.

Nothing else of a host is played, and no packet is made up: there is at most one answer for each request, and what is
not answered goes on to the next stage as it came.

What is answered, if it is for an address in `networks`:

- ICMP and ICMPv6 echo requests (RFC 792; RFC 4443, 4.1). Whole ones only: no fragments, no IPv4 options, no IPv6
  extension headers. The request itself becomes the reply, in place: addresses swapped, type and checksum changed
  (RFC 1624), the time to live as it was. So a request with a wrong checksum gets a reply with one, and is dropped by
  who asked.
- On a TAP, ARP requests (RFC 826) and neighbour solicitations (RFC 4861, 4.3; checked as 7.1.1 asks), with the
  stage's MAC address: `mac`, or one derived from the interface's name, locally administered. Echo requests are
  answered there if they were sent to that address. VLAN tags are kept.

What is not: requests to or from a multicast, broadcast, loopback or unspecified address, or from the address they are
for, or (TAP) to or from a group address, but for ARP requests and solicitations, which are sent to one. Nor probes for
a duplicate (RFC 5227; RFC 4862, 5.4), or the host could take no address of these networks for itself. Every other
address in `networks` is answered for, the first and the last of a subnet too: only the host knows what is a subnet.
The source may be in `networks`, as the host's own address mostly is. Replies are never answered, so none goes round.
"""

import ipaddress
import struct
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from operator import attrgetter
from typing import Any, ClassVar, Final, NamedTuple

from service.dataplane.contract import Batch, Context, Processor
from service.packet.build import ARP_REPLY, ARP_REQUEST, arp, ethernet, neighbour_advertisement
from service.packet.checksum import ones_complement_sum
from service.packet.classify import CLASSES
from service.packet.flowkey import Entry
from service.packet.segment import CannotCut, finish

# Of a request: total length, flags to protocol (IPv6: next header), both addresses, type and code, checksum.
_IPV4: Final = struct.Struct("!2xH2xI2x8sHH").unpack_from
_IPV6: Final = struct.Struct("!4xHBx32sHH").unpack_from
_WHOLE: Final = 0xBFFF00FF  # of flags, offset, TTL and protocol; see flowkey
_ECHO: Final = 0x0800
_ECHO_V6: Final = 0x8000


class _Echo(NamedTuple):
    """How a request becomes a reply."""

    fetch: Callable[[memoryview], tuple[bytes, int, int]]
    """Both addresses, type and code, checksum, of an IP packet."""
    asks: int
    """Type and code of a request."""
    put: Callable[[memoryview, int, bytes, int, int], None]
    """The same three into a packet."""
    at: int
    """Where an IP header has its addresses."""
    says: int
    """Type and code of a reply."""
    more: int
    """What the checksum grows by. HC' = HC + m - m' (RFC 1624); 0xFFFF is as right as 0, and right for all zeros."""


_ECHOES: Final = (
    _Echo(struct.Struct("!12x8sHH").unpack_from, _ECHO, struct.Struct("!8sHH").pack_into, 12, 0, _ECHO),
    _Echo(struct.Struct("!8x32sHH").unpack_from, _ECHO_V6, struct.Struct("!32sHH").pack_into, 8, 0x8100, 0xFEFF),
)
"""In the order of `_FIGURES`."""
_BROADCAST: Final = b"\xff" * 6
ENDS_MAX: Final = 32_768
"""Pairs of addresses that are remembered, some 300 octets each."""

_KIND_OF: Final = attrgetter("kind")
_ECHO_KINDS: Final = (CLASSES.index("ipv4.icmp"), CLASSES.index("ipv6.icmpv6"))
_ANSWERED: Final = frozenset(CLASSES.index(name) for name in ("ipv4.icmp", "ipv6.icmpv6", "arp"))
_FIGURES: Final = ("answered_icmp", "answered_icmpv6", "answered_arp", "answered_ndp", "refused")
_REFUSED: Final = 4


def derived_mac(interface: str) -> bytes:
    """A locally administered address (IEEE 802, 8.4) that is the same for the same name."""
    octets = bytearray(sha256(b"tunledger reply " + interface.encode()).digest()[:6])
    octets[0] = octets[0] & 0xFC | 0x02
    return bytes(octets)


class Reply(Processor):
    """Options: `networks`, CIDR strings; `answers`, of icmp, icmpv6, arp and ndp, all by default; `mac`."""

    takes_segments: ClassVar[bool] = True
    figures: ClassVar[tuple[str, ...]] = _FIGURES

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        """Raises ValueError for networks or an address that are none."""
        super().__init__(options, context)
        networks = [ipaddress.ip_network(text) for text in options.get("networks", ())]
        if not networks:
            raise ValueError("networks: needs at least one")
        answers = set(options.get("answers") or ("icmp", "icmpv6", "arp", "ndp"))
        pairs = [(net.version, (int(net.network_address), int(net.netmask))) for net in networks]
        self._ipv4: Final = [pair for version, pair in pairs if version == 4]
        self._ipv6: Final = [pair for version, pair in pairs if version == 6]
        self._icmp: Final = "icmp" in answers and bool(self._ipv4)
        self._icmpv6: Final = "icmpv6" in answers and bool(self._ipv6)
        self._tap: Final = context.mode == "tap"
        self._arp: Final = self._tap and "arp" in answers and bool(self._ipv4)
        self._ndp: Final = self._tap and "ndp" in answers and bool(self._ipv6)
        mac = options.get("mac")
        self._known: Final[dict[bytes, bytes]] = {}
        """Addresses of echo requests, source first, to those of the reply; b"" where there is none."""
        self._mac: Final = bytes.fromhex(mac.replace(":", "")) if mac else derived_mac(context.interface)
        if len(self._mac) != 6:
            raise ValueError(f"mac: {mac} is no Ethernet address")

    def process(self, batch: Batch) -> None:
        """Answer what is to be answered; the rest is left."""
        counts = [0, 0, 0, 0, 0]
        if not self._tap:
            self._answer_packets(batch, counts)
        else:
            self._answer_frames(batch, counts)
        for figure, count in zip(_FIGURES, counts, strict=True):
            if count:
                self.context.count(figure, count)

    def _asked(self, batch: Batch) -> Sequence[int]:
        """Where there may be a question."""
        entries: list[Entry] | None = getattr(batch, "entries", None)  # a batch made by hand may have none
        if entries is None:
            return range(len(batch.packets))
        return [index for index, kind in enumerate(map(_KIND_OF, entries)) if kind in _ANSWERED]

    def _answer_packets(self, batch: Batch, counts: list[int]) -> None:
        """Turn all in place, then write them at once."""
        headers, packets = batch.headers, batch.packets
        if headers is None and batch.kind in _ECHO_KINDS:
            which = _ECHO_KINDS.index(batch.kind)
            left = self._turn_all(packets, _ECHOES[which])
            counts[which] = len(packets) - len(left)
            answers = packets
            if left:
                gone = set(left)
                answers = [packet for index, packet in enumerate(packets) if index not in gone]
            kinds: list[int] | int = batch.kind
        else:
            answers, found, left = [], [], []
            asked = frozenset(self._asked(batch))
            for index, packet in enumerate(packets):
                batch.at = index
                which = -1
                if index in asked and (headers is None or _finished(packet, headers[index], tap=False)):
                    which = self._turn(packet, 0)
                if which < 0:
                    left.append(index)
                else:
                    answers.append(packet)
                    found.append(_ECHO_KINDS[which])
                    counts[which] += 1
            kinds = found
        if not answers:
            return
        refused = len(answers) - batch.answer_looked(answers, kinds)
        counts[_REFUSED] = refused
        for which in (0, 1):  # the kernel does not say whose; mostly it is all or none
            fewer = min(refused, counts[which])
            counts[which] -= fewer
            refused -= fewer
        batch.take(left)

    def _answer_frames(self, batch: Batch, counts: list[int]) -> None:
        headers, packets = batch.headers, batch.packets
        answered = set()
        for index in self._asked(batch):
            batch.at = index
            packet = packets[index]
            if headers is not None and not _finished(packet, headers[index], tap=True):
                continue
            which = self._answer_frame(batch, packet)
            if which >= 0:
                counts[which] += 1
                answered.add(index)
        if answered:
            batch.take([index for index in range(len(packets)) if index not in answered])

    def _turn_all(self, packets: list[memoryview], echo: _Echo) -> list[int]:
        """`_turn` for packets that the worker found to be whole ICMP of one version; return the indexes of the others.

        Mostly there are none, so that indexes are not counted on the way.
        """
        fetch, asks, put, at, says, more = echo
        known = self._known.get
        left: list[memoryview] = []
        for packet, (ends, kind, checksum) in zip(packets, map(fetch, packets), strict=True):
            reply = known(ends)
            if kind == asks and (reply or (reply is None and (reply := self._learn(ends)))):
                changed = checksum + more
                put(packet, at, reply, says, changed - 0xFFFF if changed > 0xFFFF else changed)
            else:
                left.append(packet)
        if not left:
            return []
        these = set(map(id, left))
        return [index for index, packet in enumerate(packets) if id(packet) in these]

    def _turn(self, packet: memoryview, at: int) -> int:
        """Make the reply of an echo request whose IP header is at `at`; its figure, or -1 for what stays as it is."""
        length = len(packet) - at
        if length < 28:
            return -1
        first = packet[at]
        if first == 0x45:
            total, shape, ends, kind, checksum = _IPV4(packet, at)
            if kind != _ECHO or shape & _WHOLE != 1 or not 28 <= total <= length:
                return -1
            turned = self._known.get(ends)
            if turned is None:
                turned = self._learn(ends)
            if not turned:
                return -1
            return self._put(packet, at, 0, turned, checksum)
        if first >> 4 != 6 or length < 48:
            return -1
        total, following, ends, kind, checksum = _IPV6(packet, at)
        if kind != _ECHO_V6 or following != 58 or not 8 <= total <= length - 40:
            return -1
        turned = self._known.get(ends)
        if turned is None:
            turned = self._learn(ends)
        if not turned:
            return -1
        return self._put(packet, at, 1, turned, checksum)

    @staticmethod
    def _put(packet: memoryview, at: int, which: int, turned: bytes, checksum: int) -> int:
        echo = _ECHOES[which]
        checksum += echo.more
        echo.put(packet, at + echo.at, turned, echo.says, checksum - 0xFFFF if checksum > 0xFFFF else checksum)
        return which

    def _learn(self, ends: bytes) -> bytes:
        """Work out what the addresses of a request's reply are, source first, and remember it; b"" for no reply."""
        if len(self._known) >= ENDS_MAX:
            self._known.clear()
        half = len(ends) // 2
        source, to = ends[:half], ends[half:]
        if half == 4:
            answers = self._icmp and _is_host_v4(source) and _is_host_v4(to)
            answers = answers and self._is_ours_v4(int.from_bytes(to, "big"))
        else:
            answers = self._icmpv6 and _is_host_v6(source) and _is_host_v6(to)
            answers = answers and self._is_ours_v6(int.from_bytes(to, "big"))
        turned = self._known[ends] = to + source if answers and source != to else b""
        return turned

    def _is_ours_v6(self, address: int) -> bool:
        return any(address & mask == base for base, mask in self._ipv6)

    def _is_ours_v4(self, address: int) -> bool:
        return any(address & mask == base for base, mask in self._ipv4)

    def _answer_frame(self, batch: Batch, frame: memoryview) -> int:
        length = len(frame)
        if length < 14 or frame[6] & 1:
            return -1
        at = 14
        ethertype = frame[12] << 8 | frame[13]
        while ethertype in (0x8100, 0x88A8) and at + 4 <= length and at < 14 + 4 * 4:
            at += 4
            ethertype = frame[at - 2] << 8 | frame[at - 1]
        if ethertype == 0x0806:
            return self._answer_arp(batch, frame, at) if self._arp else -1
        to = frame[:6]
        if ethertype == 0x86DD and self._ndp and length >= at + 64 and frame[at + 6] == 58 and frame[at + 40] == 135:
            return self._answer_solicitation(batch, frame, at)
        if to != self._mac or not (
            (ethertype == 0x0800 and length > at and frame[at] >> 4 == 4)
            or (ethertype == 0x86DD and length > at and frame[at] >> 4 == 6)
        ):
            return -1
        which = self._turn(frame, at)
        if which < 0:
            return -1
        frame[:6] = bytes(frame[6:12])
        frame[6:12] = self._mac
        return which if batch.answer(frame) else 4

    def _answer_arp(self, batch: Batch, frame: memoryview, at: int) -> int:
        if len(frame) < at + 28 or frame[:6] not in (_BROADCAST, self._mac):
            return -1
        message = bytes(frame[at : at + 28])
        sender_mac, sender, target = message[8:14], message[14:18], message[24:28]
        asked = int.from_bytes(target, "big")
        # Other kinds of address than MAC and IPv4, other operations, a probe, an announcement: not for us.
        if message[:8] != arp(ARP_REQUEST, (b"", b""), (b"", b"")) or sender == bytes(4) or sender == target:
            return -1
        if sender_mac[0] & 1 or asked >> 24 in (0, 127) or asked >= 0xE0000000 or not self._is_ours_v4(asked):
            return -1
        reply = arp(ARP_REPLY, (self._mac, target), (sender_mac, sender))
        return 2 if batch.answer(_frame(frame, at, self._mac, reply)) else 4

    def _answer_solicitation(self, batch: Batch, frame: memoryview, at: int) -> int:
        payload = frame[at + 4] << 8 | frame[at + 5]
        # RFC 4861, 7.1.1: hop limit 255, code 0, 24 octets or more, a right checksum, a target that is no group.
        if frame[at] >> 4 != 6 or frame[at + 7] != 255 or frame[at + 41] or not 24 <= payload <= len(frame) - at - 40:
            return -1
        source, to, target = (bytes(frame[at + start : at + start + 16]) for start in (8, 24, 48))
        if to != bytes.fromhex("ff0200000000000000000001ff") + target[13:] and to != target:
            return -1
        asked = int.from_bytes(target, "big")
        if not _is_host_v6(source) or not _is_host_v6(target) or source == target:
            return -1
        if not self._is_ours_v6(asked):
            return -1
        if ones_complement_sum(frame, at + 40, payload, ones_complement_sum(source + to) + 58 + payload) != 0xFFFF:
            return -1
        reply = neighbour_advertisement(target, self._mac, source)
        return 3 if batch.answer(_frame(frame, at, self._mac, reply)) else 4


def _is_host_v4(address: bytes) -> bool:
    """Neither of this network, nor loopback, multicast, reserved or broadcast."""
    return address[0] not in (0, 127) and address[0] < 0xE0


def _is_host_v6(address: bytes) -> bool:
    """Neither multicast, nor loopback, nor unspecified."""
    return address[0] != 0xFF and int.from_bytes(address, "big") > 1


def _frame(frame: memoryview, at: int, mac: bytes, packet: bytes) -> bytes:
    """A frame back to where one came from, with its VLAN tags."""
    ethertype = frame[at - 2] << 8 | frame[at - 1]
    return ethernet(bytes(frame[6:12]), mac, packet, ethertype, bytes(frame[12 : at - 2]))


def _finished(packet: memoryview, header: memoryview, *, tap: bool) -> bool:
    """Whether a packet is whole, its checksum put in if only that was missing."""
    if header[1]:
        return False
    if header[0] & 1:
        try:
            finish(packet, header, "tap" if tap else "tun")
        except CannotCut:
            return False
        header[0] &= 0xFE
    return True
