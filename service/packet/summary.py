"""One line of text for a packet, in the manner of `tcpdump -n`, for a person who reads a log or a terminal.

Text only: nothing is parsed, resolved or decided here. The line is for eyes, not for programs: its wording may
change. It never holds a control character, whatever the packet says, so it cannot play with a terminal.

Where tcpdump reads what a packet quotes or carries (the datagram in an ICMP error, DNS, ARP), this does not:
a parsed packet keeps no payload.
"""

from typing import Final, assert_never

from service.packet.ethernet import SMALLEST_ETHERTYPE, EthernetHeader
from service.packet.ip import NO_NEXT_HEADER, IPv6Header
from service.packet.numbers import ETHERTYPE_ARP
from service.packet.options import Option, Options
from service.packet.parse import Frame, Packet
from service.packet.reason import Malformed
from service.packet.transport import (
    IcmpHeader,
    Icmpv6Header,
    TcpFlags,
    TcpHeader,
    UdpHeader,
)

_FLAG_LETTERS: Final = (
    (TcpFlags.FIN, "F"),
    (TcpFlags.SYN, "S"),
    (TcpFlags.RST, "R"),
    (TcpFlags.PSH, "P"),
    (TcpFlags.ACK, "."),
    (TcpFlags.URG, "U"),
    (TcpFlags.ECE, "E"),
    (TcpFlags.CWR, "W"),
    (TcpFlags.AE, "e"),
)

_ICMP_TYPES: Final = {
    0: "echo reply",
    3: "unreachable",
    4: "source quench",
    5: "redirect",
    8: "echo request",
    9: "router advertisement",
    10: "router solicitation",
    11: "time exceeded",
    12: "parameter problem",
    13: "time stamp query",
    14: "time stamp reply",
}

_ICMP_CODES: Final = {
    (3, 0): "net unreachable",
    (3, 1): "host unreachable",
    (3, 2): "protocol unreachable",
    (3, 3): "port unreachable",
    (3, 4): "unreachable - need to frag",
    (3, 5): "unreachable - source route failed",
    (3, 9): "net unreachable - admin prohibited",
    (3, 10): "host unreachable - admin prohibited",
    (3, 13): "unreachable - admin prohibited filter",
    (11, 0): "time exceeded in-transit",
    (11, 1): "ip reassembly time exceeded",
}

_ICMPV6_TYPES: Final = {
    1: "destination unreachable",
    2: "packet too big",
    3: "time exceeded",
    4: "parameter problem",
    128: "echo request",
    129: "echo reply",
    130: "multicast listener query",
    131: "multicast listener report",
    132: "multicast listener done",
    133: "router solicitation",
    134: "router advertisement",
    135: "neighbor solicitation",
    136: "neighbor advertisement",
    137: "redirect",
    143: "multicast listener report v2",
}

_ICMPV6_CODES: Final = {
    (1, 0): "destination unreachable, no route",
    (1, 1): "destination unreachable, admin prohibited",
    (1, 2): "destination unreachable, beyond scope",
    (1, 3): "destination unreachable, address unreachable",
    (1, 4): "destination unreachable, port unreachable",
    (3, 0): "time exceeded in-transit",
    (3, 1): "ip reassembly time exceeded",
}


def summary(packet: Packet | Frame | Malformed) -> str:
    """Return one printable line about what was parsed; lengths in it are octets.

    As tcpdump counts: for TCP and UDP the payload, for ICMP the whole message. A fragment says
    `frag (offset|length)`. Never raises.
    """
    line = _line(packet)
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def _line(packet: Packet | Frame | Malformed) -> str:
    match packet:
        case Malformed():
            return f"malformed {packet.reason}: {packet.detail}"
        case Frame():
            return _frame(packet)
        case Packet():
            return _packet(packet)
        case _ as unreachable:
            assert_never(unreachable)


def _frame(frame: Frame) -> str:
    head = _ethernet(frame.ethernet)
    if frame.packet is not None:
        return f"{head}: {_packet(frame.packet)}"
    kind = frame.ethernet.ethertype
    if kind == ETHERTYPE_ARP:
        return f"{head}: ARP, length {frame.payload_length}"
    if kind < SMALLEST_ETHERTYPE:
        return f"{head}: 802.3, length {kind}"
    return f"{head}: ethertype 0x{kind:04x}, length {frame.payload_length}"


def _ethernet(header: EthernetHeader) -> str:
    tags = "".join(f", vlan {tag.vlan}, p {tag.priority}" for tag in header.tags)
    return f"{header.source.hex(':')} > {header.destination.hex(':')}{tags}"


def _packet(packet: Packet) -> str:
    source, destination = str(packet.ip.source), str(packet.ip.destination)
    if isinstance(packet.transport, TcpHeader | UdpHeader):
        source += f".{packet.transport.source_port}"
        destination += f".{packet.transport.destination_port}"
    family = "IP6" if isinstance(packet.ip, IPv6Header) else "IP"
    fragment = f"frag ({packet.fragment_offset}|{packet.transport_length}) " if packet.is_fragment else ""
    return f"{family} {source} > {destination}: {fragment}{_transport(packet)}"


def _transport(packet: Packet) -> str:
    match packet.transport:
        case None:
            if packet.protocol == NO_NEXT_HEADER and isinstance(packet.ip, IPv6Header):
                return f"no next header, length {packet.payload_length}"
            return f"ip-proto-{packet.protocol}, length {packet.payload_length}"
        case TcpHeader() as tcp:
            return _tcp(tcp, packet.payload_length)
        case UdpHeader() as udp:
            return f"UDP, length {max(udp.length - 8, 0) if udp.length else packet.payload_length}"
        case IcmpHeader() as icmp:
            return f"ICMP {_icmp(icmp)}, length {packet.transport_length}"
        case Icmpv6Header() as icmp:
            return f"ICMP6, {_icmpv6(icmp)}, length {packet.transport_length}"
        case _ as unreachable:
            assert_never(unreachable)


def _tcp(tcp: TcpHeader, length: int) -> str:
    flags = "".join(letter for flag, letter in _FLAG_LETTERS if tcp.flags & flag) or "none"
    parts = [f"Flags [{flags}]"]
    if length:
        # Sequence numbers wrap at 32 bits (RFC 9293, 3.4).
        parts.append(f"seq {tcp.sequence}:{(tcp.sequence + length) % 2**32}")
    elif tcp.flags & (TcpFlags.SYN | TcpFlags.FIN | TcpFlags.RST):
        parts.append(f"seq {tcp.sequence}")
    if tcp.flags & TcpFlags.ACK:
        parts.append(f"ack {tcp.acknowledgment}")
    parts.append(f"win {tcp.window}")
    if tcp.flags & TcpFlags.URG:
        parts.append(f"urg {tcp.urgent}")
    if tcp.options.items or not tcp.options.intact:
        parts.append(f"options [{_tcp_options(tcp.options)}]")
    parts.append(f"length {length}")
    return ", ".join(parts)


def _tcp_options(options: Options) -> str:
    shown = [_tcp_option(option) for option in options.items]
    if not options.intact:
        shown.append("bad opt")
    return ",".join(shown)


def _tcp_option(option: Option) -> str:
    number = int.from_bytes
    match option.type, len(option.data):
        case 1, _:
            return "nop"
        case 2, 2:
            return f"mss {number(option.data, 'big')}"
        case 3, 1:
            return f"wscale {option.data[0]}"
        case 4, 0:
            return "sackOK"
        case 5, size if size and size % 8 == 0:
            edges = [number(option.data[at : at + 4], "big") for at in range(0, size, 4)]
            blocks = "".join(f"{{{left}:{right}}}" for left, right in zip(edges[::2], edges[1::2], strict=True))
            return f"sack {size // 8} {blocks}"
        case 8, 8:
            return f"TS val {number(option.data[:4], 'big')} ecr {number(option.data[4:], 'big')}"
        case kind, _:
            return f"unknown-{kind} 0x{option.data.hex()}"


def _icmp(icmp: IcmpHeader) -> str:
    if icmp.echo is not None:
        return f"{_ICMP_TYPES.get(icmp.type, 'echo')}, id {icmp.echo.identifier}, seq {icmp.echo.sequence}"
    text = _ICMP_CODES.get((icmp.type, icmp.code))
    if text is None:
        name = _ICMP_TYPES.get(icmp.type, f"type {icmp.type}")
        text = f"{name}, code {icmp.code}" if icmp.code else name
    if (icmp.type, icmp.code) == (3, 4):
        return f"{text} (mtu {icmp.rest & 0xFFFF})"  # RFC 1191, 4
    return text


def _icmpv6(icmp: Icmpv6Header) -> str:
    if icmp.echo is not None:
        return f"{_ICMPV6_TYPES.get(icmp.type, 'echo')}, id {icmp.echo.identifier}, seq {icmp.echo.sequence}"
    text = _ICMPV6_CODES.get((icmp.type, icmp.code))
    if text is None:
        name = _ICMPV6_TYPES.get(icmp.type, f"type {icmp.type}")
        text = f"{name}, code {icmp.code}" if icmp.code else name
    if icmp.type == 2:
        return f"{text}, mtu {icmp.rest}"  # RFC 4443, 3.2
    return text
