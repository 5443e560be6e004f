"""What an interface's workers see, as JSON: the stages of its chain, flows, the latest packets, packets in words.

Pure but for `Traffic`, the protocol of what the data plane knows. A packet's line is `packet.summary`'s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol, runtime_checkable

from service.packet.ethernet import EthernetHeader
from service.packet.parse import Frame, Packet, class_name, parse, parse_frame
from service.packet.reason import Malformed
from service.packet.summary import summary
from service.packet.transport import TcpHeader, UdpHeader

TOP_DEFAULT, TOP_MAX = 20, 4096
PADDED_MAX = 1 << 18  # what a packet that was cut is filled up to, to be parsed


class StageView(Protocol):
    """A stage of a chain at work."""

    @property
    def processor(self) -> str: ...
    @property
    def bypassed(self) -> bool: ...
    @property
    def packets_in(self) -> int: ...
    @property
    def packets_out(self) -> int: ...
    @property
    def figures(self) -> Mapping[str, int]: ...


@dataclass(frozen=True, slots=True)
class Applied:
    """What a worker was told to do with an interface's packets."""

    chain: tuple[dict[str, Any], ...]
    offloads: str
    vnet_hdr: bool


@dataclass(frozen=True, slots=True)
class End:
    """One end of a flow. `port` is None where the protocol has none."""

    address: str
    port: int | None


@dataclass(frozen=True, slots=True)
class Flow:
    """A flow with both its directions. Times are nanoseconds since the epoch.

    `first` is the end with the higher port, most likely the client; else the lower address. Who began is not known.
    """

    protocol: str
    first: End
    second: End
    first_packets: int
    first_bytes: int
    second_packets: int
    second_bytes: int
    first_seen_ns: int
    last_seen_ns: int
    tcp_flags: str


@dataclass(frozen=True, slots=True)
class Kept:
    """A packet that was kept: the start of it, and its length."""

    time_ns: int
    inbound: bool
    length: int
    packet: bytes


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a chain's inspecting stage knows. `protocols`: packets and bytes by class, both directions."""

    flows: Sequence[Flow]
    protocols: Mapping[str, tuple[int, int]]
    latest: Sequence[Kept]


@runtime_checkable  # litestar looks
class Traffic(Protocol):
    """What the data plane knows of an interface, by its id. Blocking for a moment at most; raises TunledgerError."""

    def applied(self, device: str) -> Applied | None:
        """What a worker does with its packets; None if none has it."""
        ...

    def stages(self, device: str) -> Sequence[StageView]:
        """Its chain's stages; none if no worker has it."""
        ...

    def drops(self, device: str) -> Mapping[str, int]:
        """Packets dropped, by reason, since it was attached."""
        ...

    def inspected(self, device: str) -> Inspected | None:
        """What the first inspecting stage of its chain knows; None if there is none."""
        ...


def processing_json(
    name: str,
    applied: Applied | None,
    stages: Sequence[StageView],
    drops: Mapping[str, int],
    reason: str | None = None,
) -> dict[str, Any]:
    """How the chain of an interface is doing. `reason`: why no worker has it although one should."""
    return {
        "name": name,
        "running": applied is not None,
        "reason": reason if applied is None else None,
        "chain": list(applied.chain) if applied is not None else [],
        "offloads": {
            "setting": applied.offloads if applied is not None else None,
            "active": applied is not None and applied.vnet_hdr,
        },
        "stages": [
            {
                "processor": stage.processor,
                "bypassed": stage.bypassed,
                "packets_in": stage.packets_in,
                "packets_out": stage.packets_out,
                "figures": dict(stage.figures),
            }
            for stage in stages
        ],
        "drops": dict(drops),
    }


def flows_json(name: str, found: Inspected, top: int) -> dict[str, Any]:
    """The flows with the most bytes, and all there is by protocol."""
    ranked = sorted(found.flows, key=lambda flow: flow.first_bytes + flow.second_bytes, reverse=True)
    return {
        "name": name,
        "flows": [flow_json(flow) for flow in ranked[:top]],
        "known": len(ranked),
        "protocols": {
            protocol: {"packets": packets, "bytes": octets}
            for protocol, (packets, octets) in sorted(found.protocols.items(), key=lambda item: -item[1][1])
        },
    }


def flow_json(flow: Flow) -> dict[str, Any]:
    """A flow, as `first` to `second` and back."""
    return {
        "protocol": flow.protocol,
        "first": {"address": flow.first.address, "port": flow.first.port},
        "second": {"address": flow.second.address, "port": flow.second.port},
        "sent": {"packets": flow.first_packets, "bytes": flow.first_bytes},
        "returned": {"packets": flow.second_packets, "bytes": flow.second_bytes},
        "first_seen": moment(flow.first_seen_ns),
        "last_seen": moment(flow.last_seen_ns),
        "tcp_flags": flow.tcp_flags or None,
    }


def moment(time_ns: int) -> str:
    """UTC with microseconds, as everything of ours is stamped."""
    whole, rest = divmod(time_ns, 1_000_000_000)
    return datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%dT%H:%M:%S") + f".{rest // 1000:06}Z"


def packet_json(
    mode: Literal["tun", "tap"], *, time_ns: int, inbound: bool, length: int, packet: bytes
) -> dict[str, Any]:
    """A packet decoded: its fields, and `line` as tcpdump would have it, without the Ethernet header.

    Of one that was cut, what is missing is taken for zeros, which changes no header that is there.
    """
    whole = packet + bytes(min(length, PADDED_MAX) - len(packet)) if length > len(packet) else packet
    parsed: Packet | Frame | Malformed = parse(whole) if mode == "tun" else parse_frame(whole)
    inner = parsed.packet if isinstance(parsed, Frame) else parsed
    found: dict[str, Any] = {
        "at": moment(time_ns),
        "direction": "in" if inbound else "out",
        "length": length,
        "class": class_name(parsed),
        "line": _line(parsed),
        "source": None,
        "destination": None,
        "source_port": None,
        "destination_port": None,
        "ethernet": _ethernet(parsed.ethernet) if isinstance(parsed, Frame) else None,
    }
    if isinstance(inner, Packet):
        found["source"], found["destination"] = str(inner.ip.source), str(inner.ip.destination)
        if isinstance(inner.transport, TcpHeader | UdpHeader):
            found["source_port"] = inner.transport.source_port
            found["destination_port"] = inner.transport.destination_port
    return found


def _line(parsed: Packet | Frame | Malformed) -> str:
    line = summary(parsed)
    return line.partition(": ")[2] if isinstance(parsed, Frame) else line


def _ethernet(header: EthernetHeader) -> dict[str, Any]:
    return {
        "source": header.source.hex(":"),
        "destination": header.destination.hex(":"),
        "type": f"0x{header.ethertype:04x}",
        "vlans": [tag.vlan for tag in header.tags],
    }
