"""The data plane as captures and the API know it: its supervisor behind their protocols, its errors as ours.

Part of the composition root (`service.app`), which alone knows both sides. Nothing is decided here.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service.dataplane.attachment import StageStatus
from service.dataplane.errors import DataplaneError
from service.dataplane.flowtable import FlowRow, FlowTableReader
from service.dataplane.supervisor import Supervisor
from service.domain.errors import ErrorCode, TunledgerError
from service.packet import pcapng

if TYPE_CHECKING:  # what it imports takes longer than a start has to spare, and is wanted when somebody asks
    from service.api.traffic import Applied, Flow, Inspected

TRIM_BYTES = 1 << 20  # read at once


class Plane:
    """Implements `reconcile.captures.Taps` and `api.traffic.Traffic`."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def attached(self) -> Collection[str]:
        """The devices that workers hold now."""
        return self._supervisor.attached().keys()

    def tap(self, device: str, stage: Mapping[str, Any], files: Sequence[int]) -> int:
        """Put a processor at the device's wire side; its id. Raises TunledgerError."""
        with _translated():
            return self._supervisor.tap(device, stage, files)

    def untap(self, device: str, tap_id: int) -> Mapping[str, int]:
        """Take it away again; its last figures. Raises TunledgerError: not_found if there is none."""
        with _translated():
            return self._supervisor.untap(device, tap_id)

    def feed(self, device: str, stage_id: int, fd: int) -> None:
        """Hand one more file to a tap, or to a stage. Raises TunledgerError."""
        with _translated():
            self._supervisor.feed(device, stage_id, fd)

    def tap_figures(self, device: str, tap_id: int) -> Mapping[str, int]:
        """A tap's figures as they are. Raises TunledgerError."""
        with _translated():
            return self._supervisor.tap_figures(device, tap_id)

    def stages(self, device: str) -> Sequence[StageStatus]:
        """The chain's stages; none if no worker has the device."""
        return self._supervisor.stages(device)

    def applied(self, device: str) -> "Applied | None":
        """What a worker does with its packets; None if none has it."""
        from service.api.traffic import Applied

        work = self._supervisor.attached().get(device)
        return None if work is None else Applied(work.chain, work.offloads, work.vnet_hdr)

    def drops(self, device: str) -> Mapping[str, int]:
        """Packets dropped, by reason, since it was attached."""
        found = self._supervisor.counters().get(device)
        return {} if found is None else found.drops

    def inspected(self, device: str) -> "Inspected | None":
        """What the first inspecting stage of its chain knows; None if there is none."""
        stages = self._supervisor.stages(device)
        for place, memory in sorted(self._supervisor.stage_memory(device).items()):
            if place < len(stages) and stages[place].processor == "inspect":
                return _inspected(memory)
        return None


def _inspected(memory: memoryview) -> "Inspected":
    from service.api.traffic import Inspected, Kept

    try:
        table = FlowTableReader(memory)
    except ValueError as error:
        raise TunledgerError(ErrorCode.WORKER_FAILED, str(error), retry=True) from error
    try:
        totals, rows, heads = table.totals(), table.rows(), table.packets()
    finally:
        table.release()
    protocols = {
        name: (
            totals.from_kernel.get(name, (0, 0))[0] + totals.to_kernel.get(name, (0, 0))[0],
            totals.from_kernel.get(name, (0, 0))[1] + totals.to_kernel.get(name, (0, 0))[1],
        )
        for name in {**totals.from_kernel, **totals.to_kernel}
    }
    latest = [Kept(head.time_ns, head.direction == "to_kernel", head.length, head.data) for head in heads]
    return Inspected([_flow(row) for row in rows], protocols, latest)


_PROTOCOLS: Mapping[int, str] = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}
_PORTS = (6, 17)


def _flow(row: FlowRow) -> "Flow":
    """A flow with its probable client first: the end with the higher port. Without ports there is none to tell by."""
    from service.api.traffic import End, Flow

    ends = row.ends
    has_ports = ends.protocol in _PORTS and bool(ends.first_port or ends.second_port)
    first = End(str(ip_address(ends.first)), ends.first_port if has_ports else None)
    second = End(str(ip_address(ends.second)), ends.second_port if has_ports else None)
    there, back = (row.packets_there, row.bytes_there), (row.packets_back, row.bytes_back)
    if ends.first_port < ends.second_port or (not has_ports and not row.packets_there):
        first, second, there, back = second, first, back, there
    flags = row.tcp_flags_there | row.tcp_flags_back
    return Flow(
        protocol=_PROTOCOLS.get(ends.protocol, str(ends.protocol)),
        first=first,
        second=second,
        first_packets=there[0],
        first_bytes=there[1],
        second_packets=back[0],
        second_bytes=back[1],
        first_seen_ns=row.first_seen_ns,
        last_seen_ns=row.last_seen_ns,
        tcp_flags="".join(letter for bit, letter in enumerate("FSRP.UEWe") if flags >> bit & 1),
    )


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except DataplaneError as error:
        if error.code == "not_attached":
            raise TunledgerError(ErrorCode.NOT_RUNNING, error.message) from error
        if error.code == "no_tap":
            raise TunledgerError(ErrorCode.NOT_FOUND, error.message) from error
        raise TunledgerError(ErrorCode.WORKER_FAILED, error.message, retry=error.retry) from error


def trim(path: Path) -> None:
    """Cut an unfinished block off the end of a capture. Raises OSError."""
    end, rest = 0, b""
    with path.open("r+b") as file:
        while octets := file.read(TRIM_BYTES):
            octets = rest + octets
            kept = pcapng.whole(octets)
            end, rest = end + kept, octets[kept:]
        if rest:
            file.truncate(end)
