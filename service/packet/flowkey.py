"""Which class and which flow a packet is of, for many packets at the price of one: a memo keyed by what decides it.

A worker looks at every packet once, with a `Meter`; its counters, and the stages that care for flows, share what it
found. Nothing is counted, kept or judged in here, and no packet is ever refused: `classify` says what is malformed,
and `look` agrees with it for every string of octets.

Theory of operation. Nearly all packets are IPv4 without options or IPv6 without extension headers, whole, and carry
TCP, UDP or ICMP with lengths that fit each other. For those one `struct.unpack_from` fetches the octets that decide;
the lengths are compared, and the rest (addresses, ports, for TCP the data offset and the flags) is the key of a dict
whose value is the `Entry`. Whatever is not of that kind, or not in the dict yet, is looked at octet by octet
(`look_at`), which costs some 2 us. Total lengths, identifications, sequence numbers and checksums are not in the
keys, so that one flow takes a few places in the memo: one for each direction and each set of TCP flags. The memo is
bounded: when it is full it is emptied, and every flow pays once more.

Under load a batch is mostly of one kind: one IP version, one protocol, nothing behind the packets' ends. Where the
batch lies in `Rows` that is seen in a few comparisons of octets for all packets at once, each of which says of all
packets what `classify` asks of one (`alike`). That is enough to count them. Only where somebody asks for the entries,
all keys are fetched at once and looked up in the same memo (`look_alike`). A batch that is not of one kind is looked at
packet by packet.

A flow, as a key of 40 octets (`flow_ends` takes it apart), is the same in both directions: version, protocol, and
both ends, the lower one first. Its ports are TCP's and UDP's own; for ICMP and ICMPv6 echo both are the identifier,
so that each ping is a flow of its own; all else has none (0). Fragments have none either, the first one included: so
all parts of a datagram are of one flow, though not of the flow of the whole ones. VLAN tags and MAC addresses make no
difference.
"""

import struct
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

from service.packet.classify import CLASSES, FIRST_MALFORMED, classify, classify_frame
from service.packet.rows import Rows

Octets = bytes | bytearray | memoryview

ENTRIES_MAX: Final = 32_768
"""Entries in a memo, some 400 octets each with their keys: 13 MB, and 3 ms to forget them all."""

FLOW_BYTES: Final = 40

_FLOW: Final = struct.Struct("!BBHH16s16s2x")
_ARP: Final = CLASSES.index("arp")
_ETHERNET_OTHER: Final = CLASSES.index("ethernet.other")
_EXTENSIONS: Final = frozenset({0, 43, 44, 51, 60, 135, 139, 140})  # as in classify

# What is fetched: version and IHL, total length, then flags, offset, TTL and protocol as one word, addresses and ports
# as one string, the UDP length (or ICMP's identifier), and what holds TCP's data offset and flags.
_IPV4_FORMAT: Final = "BxH2xI2x12sH6xH"
_IPV6_FORMAT: Final = "4xHBx36sH6xH"
_IPV4: Final = struct.Struct(f"!{_IPV4_FORMAT}")
_IPV6: Final = struct.Struct(f"!{_IPV6_FORMAT}")
_FRAME_IPV4: Final = struct.Struct(f"!12xH{_IPV4_FORMAT}")
_FRAME_IPV6: Final = struct.Struct(f"!14x{_IPV6_FORMAT}")
_WHOLE: Final = 0xBFFF00FF
"""Of flags, offset, TTL and protocol: all that has to be 0 but the protocol. Don't-fragment may be set."""


ROWS_MIN: Final = 8
"""Packets from which on looking at all at once costs less than one by one."""


class FlowEnds(NamedTuple):
    """What a flow's key says. Addresses are 4 or 16 octets; `version` is IP's."""

    version: int
    protocol: int
    first: bytes
    first_port: int
    second: bytes
    second_port: int


class Entry:
    """What a look at a packet found. Shared between packets and never changed; equal looks mostly give the same object.

    Attributes:
        kind: the index into `classify.CLASSES`.
        flow: the flow's key, or None where there is no IP packet that makes sense.
        swapped: whether the packet goes from the flow's second end to its first.
        protocol: what IP carries; of a fragment, what its fragment header says; 0 without a flow.
        tcp_flags: the nine control bits (RFC 9293, 3.1), 0 where there is no TCP header.
        least: octets that IP must carry at least for a TCP packet with these flags to be one.
    """

    __slots__ = ("flow", "kind", "least", "protocol", "swapped", "tcp_flags")

    def __init__(self, kind: int, flow: bytes | None, swapped: bool, protocol: int, tcp_flags: int, least: int) -> None:
        self.kind: Final = kind
        self.flow: Final = flow
        self.swapped: Final = swapped
        self.protocol: Final = protocol
        self.tcp_flags: Final = tcp_flags
        self.least: Final = least

    def __repr__(self) -> str:
        flow = None if self.flow is None else self.flow.hex()
        return f"Entry({CLASSES[self.kind]}, {flow}, swapped={self.swapped}, flags={self.tcp_flags:#x})"


_REMEMBERED: Final = frozenset(
    CLASSES.index(name) for name in ("ipv4.tcp", "ipv4.udp", "ipv4.icmp", "ipv6.tcp", "ipv6.udp", "ipv6.icmpv6")
)
_FLOWLESS: Final = tuple(Entry(kind, None, False, 0, 0, 0) for kind in range(len(CLASSES)))


def flow_key(version: int, protocol: int, source: bytes, source_port: int, to: bytes, to_port: int) -> bytes:
    """The key of the flow between these ends, whichever is named first. Addresses are 4 or 16 octets."""
    if (source, source_port) > (to, to_port):
        source, source_port, to, to_port = to, to_port, source, source_port
    return _FLOW.pack(version, protocol, source_port, to_port, source, to)


def flow_ends(flow: Octets) -> FlowEnds:
    """Take a key apart. Raises struct.error if it has not `FLOW_BYTES` octets."""
    version, protocol, first_port, second_port, first, second = _FLOW.unpack(flow)
    if version == 4:
        first, second = first[:4], second[:4]
    return FlowEnds(version, protocol, first, first_port, second, second_port)


def look_at(packet: Octets, mode: Literal["tun", "tap"]) -> Entry:
    """Look at one packet, an IP packet or (tap) an Ethernet frame, without a memo. Never raises."""
    return Entry(*_facts(packet, mode))


_Facts = tuple[int, bytes | None, bool, int, int, int]


def _facts(packet: Octets, mode: Literal["tun", "tap"]) -> _Facts:
    """What an entry holds, in its order."""
    length = len(packet)
    if mode == "tun":
        kind = classify(packet, length)
        at = 0
    else:
        kind = classify_frame(packet, length)
        at = 14
        while kind < FIRST_MALFORMED and packet[at - 2] << 8 | packet[at - 1] in (0x8100, 0x88A8):
            at += 4
    if kind >= FIRST_MALFORMED or kind in (_ARP, _ETHERNET_OTHER):
        return kind, None, False, 0, 0, 0
    # From here on classify has vouched for every length that is read.
    fragment = False
    fragmented = 0
    transport = True
    if packet[at] >> 4 == 4:
        version = 4
        protocol = packet[at + 9]
        offset = (packet[at + 6] & 0x1F) << 8 | packet[at + 7]
        fragment = bool(offset or packet[at + 6] & 0x20)
        transport = not offset
        source, to = bytes(packet[at + 12 : at + 16]), bytes(packet[at + 16 : at + 20])
        upper = at + ((packet[at] & 0x0F) << 2)
    else:
        version = 6
        protocol = packet[at + 6]
        source, to = bytes(packet[at + 8 : at + 24]), bytes(packet[at + 24 : at + 40])
        upper = at + 40
        while protocol in _EXTENSIONS:
            here, protocol = protocol, packet[upper]
            if here == 44:
                if packet[upper + 2] or packet[upper + 3] & 0xF9:
                    fragmented = fragmented or protocol
                    fragment = True
                if packet[upper + 2] or packet[upper + 3] & 0xF8:
                    transport = False
                    break
                upper += 8
            elif here == 51:
                upper += (packet[upper + 1] + 2) << 2
            else:
                upper += (packet[upper + 1] + 1) << 3
    source_port = to_port = flags = least = 0
    flow_protocol = protocol
    if transport and protocol == 6:
        source_port = packet[upper] << 8 | packet[upper + 1]
        to_port = packet[upper + 2] << 8 | packet[upper + 3]
        least = (packet[upper + 12] & 0xF0) >> 2
        flags = (packet[upper + 12] & 1) << 8 | packet[upper + 13]
    elif transport and protocol == 17:
        source_port = packet[upper] << 8 | packet[upper + 1]
        to_port = packet[upper + 2] << 8 | packet[upper + 3]
    elif transport and (
        (version == 4 and protocol == 1 and packet[upper] in (0, 8))
        or (version == 6 and protocol == 58 and packet[upper] in (128, 129))
    ):
        source_port = to_port = packet[upper + 4] << 8 | packet[upper + 5]
    if fragment:
        source_port = to_port = 0
        if version == 6:
            flow_protocol = fragmented
    if source > to or (source == to and source_port > to_port):
        flow = _FLOW.pack(version, flow_protocol, to_port, source_port, to, source)
        return kind, flow, True, flow_protocol, flags, least
    flow = _FLOW.pack(version, flow_protocol, source_port, to_port, source, to)
    return kind, flow, False, flow_protocol, flags, least


_NO_FRAGMENT: Final = (b"\x00\x00", b"\x40\x00")


class Alike(NamedTuple):
    """What the packets of a batch all are."""

    kind: int
    """Their class, as `Entry.kind`."""
    protocol: int
    """What IP carries."""
    upper: int
    """Octets that IP carries at the least."""
    key: str
    """What is fetched of each to be looked up in the memo."""


class _Version:
    """Where the fields of an IP version lie in `rows`, and what the packets of a batch may be, by protocol."""

    __slots__ = ("above", "ethertype", "flags", "header", "kinds", "offset", "protocol", "size", "total", "type")

    def __init__(self, rows: Rows, version: Literal[4, 6], at: int) -> None:
        """`at` is where the IP header begins; if that is 14, an Ethernet header is in front of it."""
        ends, name, icmp = (12, "ipv4", "icmp") if version == 4 else (36, "ipv6", "icmpv6")
        self.ethertype: Final = b"" if not at else b"\x08\x00" if version == 4 else b"\x86\xdd"
        self.type: Final = rows.column(at - 2, 2) if at else None
        self.header: Final = at + (20 if version == 4 else 40)
        """Octets to the end of the IP header."""
        self.total: Final = rows.column(at + (2 if version == 4 else 4), 2)
        self.above: Final = at if version == 4 else self.header
        """What a packet has more octets than `total` says, if there is nothing behind its end."""
        self.flags: Final = rows.column(at + 6, 2) if version == 4 else None
        self.protocol: Final = rows.column(at + (9 if version == 4 else 6), 1)
        self.size: Final = rows.column(self.header + 4, 2)
        """The length in a UDP header."""
        self.offset: Final = rows.column(self.header + 12, 1)
        """The octet of a TCP header that the data offset is in."""
        start = f"{self.header + 4 - ends}x"
        self.kinds: Final = {
            alike.protocol: alike
            for alike in (
                Alike(CLASSES.index(f"{name}.udp"), 17, 8, f"{start}{ends}s"),
                Alike(CLASSES.index(f"{name}.tcp"), 6, 20, f"{start}{ends}s8xH"),
                Alike(CLASSES.index(f"{name}.{icmp}"), 1 if version == 4 else 58, 8, f"{start}{ends - 3}s3xH"),
            )
        }


class Meter:
    """Looks at packets of one mode. One may serve many devices; it belongs to one thread."""

    __slots__ = (
        "_entries", "_first", "_icmp", "_mode", "_most", "_room", "_rows", "_seen", "_tcp", "_udp", "_versions", "look"
    )  # fmt: skip

    def __init__(self, mode: Literal["tun", "tap"], entries_max: int = ENTRIES_MAX, rows: Rows | None = None) -> None:
        """`rows` is what `alike` and `look_alike` look at."""
        self._mode: Final = mode
        self._most: Final = entries_max
        self._room = entries_max  # looks that the memo did not know, until it is emptied
        # Keys of IPv4 and IPv6 differ in length, those of TCP in kind: no two packets meet in one place by chance.
        self._udp: Final[dict[bytes, Entry]] = {}
        self._tcp: Final[dict[tuple[bytes, int], Entry]] = {}
        self._icmp: Final[dict[tuple[bytes, int], Entry]] = {}
        self._entries: Final[dict[_Facts, Entry]] = {}
        self._seen: Final[dict[bytes, bytes]] = {}
        self.look: Final = self._look_at_packets if mode == "tun" else self._look_at_frames
        """Look at packets; returns an entry for each, in their order. Never raises."""
        self._rows: Final = rows
        if rows is not None:
            at = 0 if mode == "tun" else 14
            self._first: Final = rows.column(at, 1)
            # By an IP header's first octet: IPv4 without options, IPv6 with any traffic class.
            self._versions: Final = dict.fromkeys(range(0x60, 0x70), _Version(rows, 6, at))
            self._versions[0x45] = _Version(rows, 4, at)

    def __len__(self) -> int:
        """Entries that are remembered."""
        return len(self._udp) + len(self._tcp) + len(self._icmp) + len(self._entries)

    def alike(self) -> Alike | None:
        """What all packets are that the rows hold; None if they may differ, or it costs less to look at each.

        Compared is what `classify` compares, so that the class is right whether the memo knows the packets or not.
        """
        rows = self._rows
        assert rows is not None
        count = len(rows.lengths)
        if count < ROWS_MIN:
            return None
        first = self._first[:count].tobytes()
        version = self._versions.get(first[0])
        if version is None or first.count(first[0]) != count:
            return None
        if version.total[:count].tobytes() != rows.words(version.above):
            return None
        if version.type is not None and version.type[:count].tobytes() != version.ethertype * count:
            return None
        if version.flags is not None:
            flags = version.flags[:count].tobytes()
            if flags[:2] not in _NO_FRAGMENT or flags != flags[:2] * count:
                return None
        protocols = version.protocol[:count].tobytes()
        protocol = protocols[0]
        found = version.kinds.get(protocol)
        room = rows.least - version.header
        if found is None or protocols.count(protocol) != count or room < found.upper:
            return None
        if protocol == 17:
            if version.size[:count].tobytes() != rows.words(version.header):
                return None
        elif protocol == 6:
            offsets = version.offset[:count].tobytes()
            if min(offsets) < 5 << 4 or (max(offsets) >> 4) * 4 > room:
                return None
        return found

    def look_alike(
        self, alike: Alike, packets: Sequence[memoryview], places: Sequence[int] | None = None
    ) -> list[Entry]:
        """What `look` says of packets in the rows, all of them or those at `places`, which are given as views, too.

        `alike` is what they were found to be since they were read.
        """
        rows = self._rows
        assert rows is not None
        keys = rows.fields(alike.key)
        entries: list[Any]
        if alike.protocol == 17:
            entries = list(map(self._udp.get, keys))
        else:
            memo = self._tcp if alike.protocol == 6 else self._icmp
            entries = list(map(memo.get, zip(keys[::2], keys[1::2], strict=True)))
        if places is not None:
            entries = [entries[place] for place in places]
        if not all(entries):  # those that the memo did not know
            new = [index for index, entry in enumerate(entries) if entry is None]
            for index, entry in zip(new, self.look([packets[index] for index in new]), strict=True):
                entries[index] = entry
        return entries

    def _look_at_packets(self, packets: Sequence[memoryview]) -> list[Entry]:
        udp, tcp, icmp = self._udp.get, self._tcp.get, self._icmp.get
        ipv4, ipv6 = _IPV4.unpack_from, _IPV6.unpack_from
        found: list[Entry] = []
        add = found.append
        for packet in packets:
            length = len(packet)
            head: Octets = packet
            if length < 54:
                if length < 28:
                    add(self._unusual(packet))
                    continue
                head = bytes(packet) + _PADDING
            entry: Entry | None = None
            if head[0] == 0x45:
                _, total, shape, ends, size, flags = ipv4(head)
                if total <= length:
                    protocol = shape & _WHOLE
                    if protocol == 17:
                        if size == total - 20 and size >= 8:
                            entry = udp(ends)
                    elif protocol == 6:
                        entry = tcp((ends, flags))
                        if entry is not None and entry.least > total - 20:
                            entry = None
                    elif protocol == 1 and total >= 28:
                        entry = icmp((ends[:9], size))
            elif head[0] & 0xF0 == 0x60:
                total, protocol, ends, size, flags = ipv6(head)
                if total <= length - 40:
                    if protocol == 17:
                        if size == total and size >= 8:
                            entry = udp(ends)
                    elif protocol == 6:
                        entry = tcp((ends, flags))
                        if entry is not None and entry.least > total:
                            entry = None
                    elif protocol == 58 and total >= 8:
                        entry = icmp((ends[:33], size))
            add(entry or self._unusual(packet))
        return found

    def _look_at_frames(self, packets: Sequence[memoryview]) -> list[Entry]:
        udp, tcp, icmp = self._udp.get, self._tcp.get, self._icmp.get
        ipv4, ipv6 = _FRAME_IPV4.unpack_from, _FRAME_IPV6.unpack_from
        found: list[Entry] = []
        add = found.append
        for packet in packets:
            length = len(packet)
            head: Octets = packet
            if length < 72:
                if length < 42:
                    add(self._unusual(packet))
                    continue
                head = bytes(packet) + _PADDING
            entry: Entry | None = None
            ethertype, first, total, shape, ends, size, flags = ipv4(head)
            shift = 0
            if ethertype == 0x8100:
                shift = 4
                ethertype, first, total, shape, ends, size, flags = ipv4(head, 4)
            if ethertype == 0x0800:
                if first == 0x45 and total <= length - 14 - shift:
                    protocol = shape & _WHOLE
                    if protocol == 17:
                        if size == total - 20 and size >= 8:
                            entry = udp(ends)
                    elif protocol == 6:
                        entry = tcp((ends, flags))
                        if entry is not None and entry.least > total - 20:
                            entry = None
                    elif protocol == 1 and total >= 28:
                        entry = icmp((ends[:9], size))
            elif ethertype == 0x86DD and first & 0xF0 == 0x60:
                total, protocol, ends, size, flags = ipv6(head, shift)
                if total <= length - 54 - shift:
                    if protocol == 17:
                        if size == total and size >= 8:
                            entry = udp(ends)
                    elif protocol == 6:
                        entry = tcp((ends, flags))
                        if entry is not None and entry.least > total:
                            entry = None
                    elif protocol == 58 and total >= 8:
                        entry = icmp((ends[:33], size))
            add(entry or self._unusual(packet))
        return found

    def _unusual(self, packet: memoryview) -> Entry:
        """Look at a packet that the memo did not know, and remember it where that is possible."""
        kind, flow, swapped, protocol, flags, least = facts = _facts(packet, self._mode)
        if flow is None:
            return _FLOWLESS[kind]
        self._room -= 1
        if self._room < 0:
            self._room = self._most - 1
            for memo in (self._udp, self._tcp, self._icmp, self._entries, self._seen):
                memo.clear()
        # One object for all looks of a kind, and one key for all entries of a flow: equal then mostly means identical.
        flow = self._seen.setdefault(flow, flow)
        if kind in _REMEMBERED:
            entry = Entry(kind, flow, swapped, protocol, flags, least)
            if self._remember(packet, entry):
                return entry
        found = self._entries.get(facts)
        if found is None:
            found = self._entries[facts] = Entry(kind, flow, swapped, protocol, flags, least)
        return found

    def _remember(self, packet: memoryview, entry: Entry) -> bool:
        """Put `entry` where the fast look finds it, if `packet` is of the kind that it serves; say whether."""
        at = 0
        if self._mode == "tap":
            at = 18 if packet[12] == 0x81 and packet[13] == 0 else 14
            if packet[at - 2] << 8 | packet[at - 1] != (0x0800 if packet[at] == 0x45 else 0x86DD):
                return False
        head = bytes(packet[at : at + 54]) + _PADDING
        if head[0] == 0x45:
            _, total, shape, ends, size, flags = _IPV4.unpack_from(head)
            protocol = shape & _WHOLE
            carried = total - 20
            echo, icmp = ends[:9], 1
        else:
            carried, protocol, ends, size, flags = _IPV6.unpack_from(head)
            echo, icmp = ends[:33], 58
            if head[0] >> 4 != 6:
                return False
        if protocol == 17:
            if size != carried:
                return False
            self._udp[ends] = entry
        elif protocol == 6:
            self._tcp[ends, flags] = entry
        elif protocol == icmp:
            self._icmp[echo, size] = entry
        else:
            return False
        return True


_PADDING: Final = bytes(54 + 4)
"""Behind a short packet, so that what is fetched for longer ones is there: none of it decides anything."""
