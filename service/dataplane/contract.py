"""What a processor is: the contract between a worker's loop and whatever is done with packets, ours or yours.

Public: processors of other packages are written against this module and nothing else of ours, so names and meanings
here are kept. It must stay light to import, and knows no device, no descriptor and no shared memory: `worker` does.

Theory of operation. A worker reads up to `BATCH_MAX` packets from one device, without waiting, and hands them through
the device's chain as one `Batch`. Each stage gets what the one before left. What is left behind the last stage ends
there, counted: a packet goes somewhere only if a stage sends it (`forward`, `balance`), or answers it (`reply`).

Directions. `from_kernel` packets were sent by the host into the device, and run through the chain from its first stage
to its last. `to_kernel` packets are those that a stage, of this chain or another device's, is about to write into the
device; they run through those stages that say so in `directions`, from the last to the first, and what is left is
written. So an inspecting or capturing stage sees both, as tcpdump would, and a filter can judge both.

Buffers and lifetimes. `batch.packets` are views into buffers that the worker reuses: they may be read and written in
place while `process` runs and must not be kept; copy what is to be kept (`bytes(packet)`). The list itself, and the
batch, are the worker's too.

What may block: nothing. While `process` runs nobody reads the worker's other devices. A worker that does not turn its
loop for two seconds is taken for stuck and killed. After start-up a worker can open no file, no socket and start no
process: everything a processor imports has to be imported when its module is.

Crashes. An exception, or a crash of the interpreter, ends the worker; the service starts another. It is told in the
log with the stage and the packet (`ProcessorCrashed`), and the device goes on with the processor or without it, as the
stage's `on_crash` says.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Protocol

if TYPE_CHECKING:
    from service.packet.flowkey import Entry

Mode = Literal["tun", "tap"]
Direction = Literal["from_kernel", "to_kernel"]
Packet = memoryview
"""One packet, format "B", writable: an IP packet of a tun, an Ethernet frame of a tap. Its length is the packet's."""

BATCH_MAX: Final = 64
FIGURES_MAX: Final = 8
"""Named figures that a stage may keep."""

BOTH: Final[frozenset[Direction]] = frozenset({"from_kernel", "to_kernel"})
FROM_KERNEL: Final[frozenset[Direction]] = frozenset({"from_kernel"})


class Output(Protocol):
    """Another interface that packets can be sent to. It stays valid over that interface's coming and going."""

    name: str

    @property
    def ready(self) -> bool:
        """Whether a worker holds the device and it is up, as far as the last write told."""
        ...

    def send(self, batch: "Batch", indexes: Sequence[int] | None = None) -> int:
        """Write packets of `batch` into the interface, all or those at `indexes`; return how many it took.

        They run through its own chain as to_kernel first. What it does not take is counted as dropped at the sending
        interface, by reason. Between a tun and a tap nothing can be sent.
        """
        ...


class Context(Protocol):
    """What a stage is given with its options; valid until `close` returns."""

    interface: str
    mode: Mode
    mtu: int

    def output(self, name: str) -> Output:
        """The interface of that name, there or not: while it is not, what is sent to it is dropped as `no_output`."""
        ...

    def count(self, figure: str, increment: int = 1) -> None:
        """Add to one of the figures in the processor's `figures`; seen in the API while the worker runs on."""
        ...

    @property
    def files(self) -> Sequence[int]:
        """Descriptors that the service gave this stage: memory, or files to write to. The worker closes them."""
        ...

    def poke(self) -> None:
        """Have the service look at this worker's stages soon: a figure tells it something, as a full file does."""
        ...


class Batch:
    """Packets of one device, on their way in one direction.

    Attributes:
        interface: the name of the device.
        mode: tun or tap.
        direction: from_kernel or to_kernel.
        packets: the packets, in the order in which they came. A stage that sorts some out uses `keep` or `drop`.
        headers: for each packet its virtio_net_hdr, 10 bytes (linux/virtio_net.h), or None where the device has none.
            A stage that does not take segments sees packets without any meaning left in theirs.
        time_ns: when the batch was read, nanoseconds since the epoch.
    """

    __slots__ = ("_answer", "_drop", "at", "direction", "entries", "headers", "interface", "mode", "packets", "time_ns")

    interface: str
    mode: Mode
    direction: Direction
    packets: list[Packet]
    headers: list[Packet] | None
    time_ns: int
    entries: "list[Entry] | None"
    """What the worker found when it counted the packets, one for each (`service.packet.flowkey`), for processors of
    ours; None where it has not looked, or a packet was replaced since. A processor of ours that writes into packets
    that go on sets it to None: it, and `kind`, may be of the packets as they came or as they are."""
    at: int
    """Which packet an iteration over the batch is at: what a crash is told with."""

    def __iter__(self) -> Iterator[Packet]:
        """The packets one by one; a crash is told with the one it happened at. The list may not change meanwhile."""
        self.at = 0
        for packet in self.packets:
            yield packet
            self.at += 1

    def __len__(self) -> int:
        return len(self.packets)

    @property
    def kind(self) -> int:
        """The class of all packets that are left (`service.packet.classify`), for processors of ours, where all are of
        one, are no fragments, and have neither IPv4 options, nor IPv6 extension headers, nor VLAN tags, nor anything
        behind their end; else, or where nobody has looked, -1.
        """
        return -1

    def keep(self, indexes: Sequence[int], reason: str) -> None:
        """Go on with the packets at these indexes, in this order, and drop the others, counted by `reason`."""
        dropped = len(self.packets) - len(indexes)
        if dropped:
            self._drop(reason, dropped)
        self.take(indexes)

    def take(self, indexes: Sequence[int]) -> None:
        """Go on with these alone; the others were taken care of (sent, answered), not dropped."""
        packets = self.packets
        self.packets = [packets[index] for index in indexes]
        if self.headers is not None:
            headers = self.headers
            self.headers = [headers[index] for index in indexes]
        entries = getattr(self, "entries", None)  # a batch made by hand may have none
        if entries is not None:
            self.entries = [entries[index] for index in indexes]

    def drop(self, reason: str) -> None:
        """Drop all that is left, counted by `reason`."""
        self.keep((), reason)

    def replace(self, index: int, packet: bytes | bytearray | memoryview) -> None:
        """Put another packet in the place of one: whole, with all its checksums."""
        self.packets[index] = memoryview(packet)
        if self.headers is not None:
            self.headers[index] = memoryview(NO_OFFLOAD)
        self.entries = None

    def answer(self, packet: bytes | bytearray | memoryview) -> bool:
        """Write a packet, whole and with all its checksums, to the kernel through the device the batch came from.

        It runs through the chain as to_kernel. Return whether the kernel took it; if not, it is counted as dropped.
        """
        return self._answer([memoryview(packet)]) == 1

    def answer_all(self, packets: list[Packet]) -> int:
        """The same for many at once, which costs less for each; how many the kernel took."""
        return self._answer(packets)

    def answer_looked(self, packets: list[Packet], kinds: list[int] | int) -> int:  # noqa: ARG002 - for who can use it
        """The same by a processor of ours that knows the classes of the packets (`service.packet.classify`), of each or
        the one of all."""
        return self._answer(packets)

    _drop: Callable[[str, int], None]
    _answer: Callable[[list[Packet]], int]


NO_OFFLOAD: Final = memoryview(bytes(10))
"""A virtio_net_hdr that says: nothing left to do, no segments."""


class Processor:
    """Subclass this. One object is one stage of one interface's chain, made anew when the stage's options change.

    Class attributes:
        directions: which packets it wants to see.
        takes_segments: whether it can take what offloads hand over: TCP and UDP segments of up to 64 KiB, and checksums
            that are not finished (`VIRTIO_NET_HDR_F_NEEDS_CSUM`). Without, they are cut and finished for it.
        figures: names of figures it counts (`context.count`), at most `FIGURES_MAX`, in snake_case.
    """

    directions: ClassVar[frozenset[Direction]] = FROM_KERNEL
    takes_segments: ClassVar[bool] = False
    figures: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        """Take the stage's options as they are in the spec, without `processor` and `on_crash`.

        Raise ValueError, with a message for the user, for options that will not do: the stage is refused then.
        """
        self.options = options
        self.context = context

    def process(self, batch: Batch) -> None:
        """Do what is to be done with the packets of `batch`. What is left in it goes on to the next stage."""
        raise NotImplementedError

    def tick(self, now_ns: int) -> None:
        """Called about once a second while the worker runs, packets or not. `now_ns` is as in a batch."""

    def close(self) -> None:
        """The stage is taken out of the chain, or its device let go of. Not called after a crash."""


class DropReason:
    """Why packets ended that no stage wanted to end. The values are public: they name figures in the API."""

    END_OF_CHAIN: Final = "end_of_chain"
    """Nothing behind the last stage: the usual end of a chain that only looks."""
    FILTERED: Final = "filtered"
    RATE: Final = "rate"
    NO_OUTPUT: Final = "no_output"
    """The interface it was to go to is not there, or nobody reads it."""
    OUTPUT_DOWN: Final = "output_down"
    """EIO: the interface is down (drivers/net/tun.c, tun_get_user)."""
    OUTPUT_FULL: Final = "output_full"
    """EAGAIN, ENOBUFS, ENOMEM: the kernel did not want it now."""
    OUTPUT_REFUSED: Final = "output_refused"
    """EINVAL and all else: the kernel did not want it at all."""
    MODE: Final = "mode"
    """A packet cannot go from a tun to a tap, nor the other way."""
    TOO_BIG: Final = "too_big"
    """A segment that could not be cut, or longer than the interface's MTU."""
    MALFORMED: Final = "malformed"
    CUSTOM: Final = "custom"
    """A reason that a processor of another package gave."""


DROP_REASONS: Final[tuple[str, ...]] = (
    DropReason.END_OF_CHAIN,
    DropReason.FILTERED,
    DropReason.RATE,
    DropReason.NO_OUTPUT,
    DropReason.OUTPUT_DOWN,
    DropReason.OUTPUT_FULL,
    DropReason.OUTPUT_REFUSED,
    DropReason.MODE,
    DropReason.TOO_BIG,
    DropReason.MALFORMED,
    DropReason.CUSTOM,
)
