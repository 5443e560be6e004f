"""`balance`: spreads flows over several interfaces by weight, so that a flow stays on one.

Which flow a packet is of comes from `flowkey`; how packets get into an interface is its `Output`'s business.

Theory of operation. Weighted rendezvous hashing: every output gets, for each flow, a number u in (0, 1) from a hash of
both, and a score, -weight / ln(u); the highest wins. An output then gets its weight's share of the flows, and one that
goes takes nothing along but its own: all other flows still have their winner (Thaler and Ravishankar, "Using
Name-Based Mappings to Increase Hit Rates", 1998; with weights: Schindelhauer and Schomaker, "Weighted Distributed
Hash Tables", 2005; Resch, "New Hashing Algorithms for Data Storage", 2015). A table like Maglev's is faster to look
into, but moves a few other flows with each change, and the memo makes up for the speed. The hash is blake2b, which has
no key of ours: the same flow gets the same output in every worker and after every start.

Only outputs that are ready take part. A flow that had to move stays where it went while that is ready, until it has
been forgotten: the memo holds the flows of at least the last `FLOWS_REMEMBERED` that were new or came again; those
that it has forgotten go where the hash says. If none is ready the hash's choice among all is asked, whose `Output`
then counts the drops.

Fragments are flows of their own (see `flowkey`), so the whole and the fragmented datagrams of one flow may part. All
that is no IP packet (ARP, say) counts as one flow.
"""

import math
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any, ClassVar, Final

from service.dataplane.contract import Batch, Context, Processor
from service.packet.flowkey import Entry, Meter

FLOWS_REMEMBERED: Final = 32_768
_NO_FLOW: Final = b""


def scores(flow: bytes, targets: list[tuple[bytes, int]]) -> list[float]:
    """How much each target, a name and a weight, wants the flow. See above."""
    found = []
    for name, weight in targets:
        number = int.from_bytes(blake2b(flow, digest_size=8, key=name[:64]).digest(), "big")
        found.append(-weight / math.log((number + 1) / (2**64 + 2)))
    return found


class Balance(Processor):
    """Options: `to`, interfaces with weights; `symmetric`, whether both directions of a flow go the same way."""

    takes_segments: ClassVar[bool] = True
    figures: ClassVar[tuple[str, ...]] = ("flows_placed", "flows_moved")

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        """Raises ValueError without a target, or if the interface itself is one."""
        super().__init__(options, context)
        targets = options.get("to") or ()
        if not targets or any(target["to"] == context.interface for target in targets):
            raise ValueError("to: needs interfaces, and none of them may be the interface itself")
        self._targets: Final = [(target["to"].encode(), target.get("weight", 1)) for target in targets]
        self._outputs: Final = [context.output(target["to"]) for target in targets]
        self._symmetric: Final = bool(options.get("symmetric", True))
        self._meter: Final = Meter(context.mode)
        # Flow -> place of its output: what is new or came again, and what that replaced.
        self._young: dict[bytes, int] = {}
        self._old: dict[bytes, int] = {}

    def process(self, batch: Batch) -> None:
        """Send each packet into its flow's interface; none is left."""
        packets = batch.packets
        if not packets:
            return
        entries: list[Entry] | None = getattr(batch, "entries", None)
        if entries is None:
            entries = self._meter.look(packets)
        ready = [output.ready for output in self._outputs]
        none_ready = True not in ready
        symmetric = self._symmetric
        known = self._young.get
        last: Entry | None = None
        place: int | None = None
        shares: list[list[int]] = [[] for _ in ready]
        share = shares[0]
        for index, entry in enumerate(entries):
            if entry is not last:
                last = entry
                flow = entry.flow or _NO_FLOW
                if entry.swapped and not symmetric:
                    flow = b"\xff" + flow
                place = known(flow)
                if place is None or not (ready[place] or none_ready):
                    place = self._place(flow, ready)
                    known = self._young.get
                share = shares[place]
            share.append(index)
        for output, indexes in zip(self._outputs, shares, strict=True):
            if len(indexes) == len(packets):
                output.send(batch)
            elif indexes:
                output.send(batch, indexes)
        batch.take(())

    def _place(self, flow: bytes, ready: list[bool]) -> int:
        """Where a flow goes that has no place, or not one that is ready; remembered unless none is."""
        before = self._young.get(flow)
        if before is None:
            before = self._old.get(flow)
        if before is not None and ready[before]:
            place = before
        else:
            wanted = scores(flow, self._targets)
            if True not in ready:
                return wanted.index(max(wanted))
            place = max((at for at, is_ready in enumerate(ready) if is_ready), key=wanted.__getitem__)
            self.context.count("flows_placed" if before is None else "flows_moved")
        if len(self._young) >= FLOWS_REMEMBERED:
            self._old, self._young = self._young, {}
        self._young[flow] = place
        return place
