"""`filter`: passes or drops packets by rules on networks, protocols, ports, direction and rate.

What a packet is comes from `flowkey`; nothing is counted here but drops, by the batch.

Rules. The first one that matches decides; without one, `default`. A rule matches where all that it names does;
`network` and `port` match either end. A rule that names a rate matches only what is beyond it: a token bucket that is
filled by the time of the batches and holds a tenth of a second's worth, at least one packet. Packets that take a token
go on to the next rule. A segment (TSO, USO) is one packet.

What has no port, or not one of its own, matches no rule that names one: ICMP, fragments (all of them, the first one
too, so that none gets through on its own), and port 0, which is reserved. A rule that names a network, a protocol or
a port matches no packet that is malformed or not IP; one that names none of them matches those as well. To drop all
fragments of a protocol, name the protocol alone.

Theory of operation. What a rule says without its rate depends on the `Entry` alone. So the verdict is worked out once
for each entry and direction, and a packet costs one look into a dict. Where rates are in play the verdict is the list
of buckets to ask and what comes after them.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from service.dataplane.contract import BOTH, Batch, Context, Direction, DropReason, Processor
from service.packet.flowkey import Entry, FlowEnds, Meter, flow_ends

VERDICTS_MAX: Final = 32_768
_PROTOCOLS: Final = {"icmp": 1, "tcp": 6, "udp": 17, "icmpv6": 58}
_PORTED: Final = frozenset({6, 17})
_BURST_S: Final = 0.1

_PASS: Final = 0
_FILTERED: Final = 1
_RATE: Final = 2


class _Bucket:
    __slots__ = ("_depth", "_last_ns", "_per_ns", "_tokens")

    def __init__(self, rate_pps: int) -> None:
        self._per_ns = rate_pps / 1e9
        self._depth = max(1.0, rate_pps * _BURST_S)
        self._tokens = self._depth
        self._last_ns = 0

    def take(self, now_ns: int) -> bool:
        """Whether there was a token. A clock that was set back adds nothing."""
        if now_ns != self._last_ns:
            self._tokens = min(self._depth, self._tokens + max(0, now_ns - self._last_ns) * self._per_ns)
            self._last_ns = now_ns
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


_Network = tuple[int, int, int]  # version, address, mask


@dataclass(frozen=True, slots=True)
class _Rule:
    code: int
    network: _Network | None
    source: _Network | None
    destination: _Network | None
    protocol: int | None
    port: tuple[int, int] | None
    source_port: tuple[int, int] | None
    destination_port: tuple[int, int] | None
    bucket: _Bucket | None

    def matches(self, ends: FlowEnds | None, swapped: bool) -> bool:
        if ends is None:
            return not (
                self.network or self.source or self.destination or self.protocol is not None
                or self.port or self.source_port or self.destination_port
            )  # fmt: skip
        source, to = (ends.first, ends.first_port), (ends.second, ends.second_port)
        if swapped:
            source, to = to, source
        if self.protocol is not None and self.protocol != ends.protocol:
            return False
        if self.source and not _inside(source[0], self.source):
            return False
        if self.destination and not _inside(to[0], self.destination):
            return False
        if self.network and not (_inside(source[0], self.network) or _inside(to[0], self.network)):
            return False
        if self.port or self.source_port or self.destination_port:
            if ends.protocol not in _PORTED:
                return False
            if self.port and not (_between(source[1], self.port) or _between(to[1], self.port)):
                return False
            if self.source_port and not _between(source[1], self.source_port):
                return False
            if self.destination_port and not _between(to[1], self.destination_port):
                return False
        return True


def _inside(address: bytes, network: _Network) -> bool:
    version, base, mask = network
    return len(address) == (4 if version == 4 else 16) and int.from_bytes(address, "big") & mask == base


def _between(port: int, ports: tuple[int, int]) -> bool:
    return port != 0 and ports[0] <= port <= ports[1]


def _network(text: str | None) -> _Network | None:
    if text is None:
        return None
    network = ipaddress.ip_network(text)
    return network.version, int(network.network_address), int(network.netmask)


def _ports(text: str | int | None) -> tuple[int, int] | None:
    if text is None:
        return None
    low, _, high = str(text).partition("-")
    return int(low), int(high or low)


def _rule(rule: Mapping[str, Any]) -> _Rule:
    protocol = rule.get("protocol")
    rate_pps = rule.get("rate_pps")
    code = _PASS if rule["action"] == "pass" else _FILTERED if rate_pps is None else _RATE
    return _Rule(
        code,
        _network(rule.get("network")),
        _network(rule.get("source")),
        _network(rule.get("destination")),
        _PROTOCOLS[protocol] if isinstance(protocol, str) else protocol,
        _ports(rule.get("port")),
        _ports(rule.get("source_port")),
        _ports(rule.get("destination_port")),
        None if rate_pps is None else _Bucket(rate_pps),
    )


class _Asked:
    """A verdict that depends on rates: the buckets in the rules' order, and what holds if all had a token."""

    __slots__ = ("_otherwise", "_rules")

    def __init__(self, rules: tuple[tuple[_Bucket, int], ...], otherwise: int) -> None:
        self._rules = rules
        self._otherwise = otherwise

    def ask(self, now_ns: int) -> int:
        for bucket, code in self._rules:
            if not bucket.take(now_ns):
                return code
        return self._otherwise


class Filter(Processor):
    """Options: `rules`, each an `action` ("pass" or "drop") and what it matches, and `default`, an action."""

    directions: ClassVar[frozenset[Direction]] = BOTH
    takes_segments: ClassVar[bool] = True

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        """Raises ValueError or KeyError for rules that are not as the spec has them."""
        super().__init__(options, context)
        self._default: Final = _PASS if options.get("default", "pass") == "pass" else _FILTERED
        compiled = [(rule.get("direction", "both"), _rule(rule)) for rule in options.get("rules", ())]
        self._rules: Final[dict[Direction, tuple[_Rule, ...]]] = {
            direction: tuple(rule for for_, rule in compiled if for_ in ("both", direction)) for direction in BOTH
        }
        self._verdicts: Final[dict[Direction, dict[Entry, int | _Asked]]] = {direction: {} for direction in BOTH}
        self._meter: Final = Meter(context.mode)

    def process(self, batch: Batch) -> None:
        """Drop what the rules say, as `filtered` or `rate`."""
        packets = batch.packets
        entries: list[Entry] | None = getattr(batch, "entries", None)
        if entries is None:
            entries = self._meter.look(packets)
        known = self._verdicts[batch.direction]
        verdicts = list(map(known.get, entries))
        if verdicts.count(_PASS) == len(packets):
            return
        now_ns = batch.time_ns
        codes = []
        for entry, verdict in zip(entries, verdicts, strict=True):
            if verdict is None:
                verdict = self._judge(entry, batch.direction)  # noqa: PLW2901 - a verdict, found or made
            codes.append(verdict if isinstance(verdict, int) else verdict.ask(now_ns))
        for code, reason in ((_RATE, DropReason.RATE), (_FILTERED, DropReason.FILTERED)):
            if code in codes:
                left = [index for index, found in enumerate(codes) if found != code]
                batch.keep(left, reason)
                codes = [codes[index] for index in left]

    def _judge(self, entry: Entry, direction: Direction) -> int | _Asked:
        """Work out what is to be done with packets of an entry, and remember it."""
        ends = None if entry.flow is None else flow_ends(entry.flow)
        asked: list[tuple[_Bucket, int]] = []
        otherwise = self._default
        for rule in self._rules[direction]:
            if rule.matches(ends, entry.swapped):
                if rule.bucket is None:
                    otherwise = rule.code
                    break
                asked.append((rule.bucket, rule.code))
        verdict = _Asked(tuple(asked), otherwise) if asked else otherwise
        known = self._verdicts[direction]
        if len(known) >= VERDICTS_MAX:
            known.clear()
        known[entry] = verdict
        return verdict
