"""The messages between the supervisor and a worker, as values and as bytes.

A codec: nothing here owns a socket or decides what an answer means.

Theory of operation. Two Unix sockets of type SOCK_SEQPACKET, so one send is one message and the peer's end is
seen as an empty one:

    control   supervisor -> worker   Attach, Configure, Feed (with descriptors by SCM_RIGHTS), Detach, Release, Ping
              worker -> supervisor   Reply, one for each request and in their order; Release's brings the device back
    lines     worker -> supervisor   PacketLine; never waited for

The supervisor asks and waits, one request at a time; an answer that it gave up on is recognised by its
sequence number and dropped. What may be long, a device's `work.Setup`, travels as a memfd. The end of control, however
it came about, tells the worker to exit.
That a device was lost goes another way that cannot fill up: the worker writes the errno into the device's slot
(see `layout`) and pokes an eventfd; the supervisor looks at all of the worker's slots.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias, assert_never

NAME_MAX_BYTES: Final = 255
MESSAGE_MAX_BYTES: Final = 16_384
"""No message is longer; a longer line is cut."""

TEXT_MAX_BYTES: Final = 12_288
FDS_MAX: Final = 250
"""SCM_MAX_FD is 253 (include/net/scm.h)."""

_REQUEST: Final = struct.Struct("<BxHIQQ")  # kind, area, slot, sequence, serial
_REPLY: Final = struct.Struct("<QI")  # sequence, errno
_LINE: Final = struct.Struct("<QB")  # suppressed, bytes of the name

_ATTACH: Final = 1
_DETACH: Final = 2
_PING: Final = 3
_CONFIGURE: Final = 4
_RELEASE: Final = 5
_FEED: Final = 6


class WireError(Exception):
    """Bytes that are none of these messages: the peer is not what we took it for."""


@dataclass(frozen=True, slots=True)
class Attach:
    """Read packets from the first fd that comes with this, as the `work.Setup` in the second says; the rest are files
    for its stages. `serial` is unique to this attach.
    """

    sequence: int
    slot: int
    serial: int


@dataclass(frozen=True, slots=True)
class Configure:
    """Do with the device's packets what the `work.Setup` in the first fd says; the rest are files for new stages.

    If one of them is refused everything stays as it was.
    """

    sequence: int
    slot: int
    serial: int


@dataclass(frozen=True, slots=True)
class Release:
    """Let go of the device as for Detach, and hand it back with the answer, its queue as it is."""

    sequence: int
    slot: int
    serial: int


@dataclass(frozen=True, slots=True)
class Feed:
    """Give the file that comes with this to the stage with this area."""

    sequence: int
    slot: int
    serial: int
    area: int


@dataclass(frozen=True, slots=True)
class Detach:
    """Close the device in `slot` if it is still the attach with this `serial`; answered once it is closed."""

    sequence: int
    slot: int
    serial: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Answer, to show that the loop turns."""

    sequence: int


_OF_A_DEVICE: Final[Mapping[int, type[Attach | Configure | Release | Detach]]] = {
    _ATTACH: Attach,
    _CONFIGURE: Configure,
    _RELEASE: Release,
    _DETACH: Detach,
}

Request: TypeAlias = Attach | Configure | Release | Feed | Detach | Ping


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the request with this sequence number; `error` is an errno, 0 if it was done.

    `text`: why not, for people, if the errno does not say it; of Attach and Configure that were done, the names of each
    stage's figures as JSON, by area.
    """

    sequence: int
    error: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class PacketLine:
    """A packet in words, and how many of the device's before it were not shown.

    An empty line carries the number alone.
    """

    device: str
    line: str
    suppressed: int


def encode_request(request: Request) -> bytes:
    """Return the bytes of a request."""
    match request:
        case Attach(sequence, slot, serial):
            return _REQUEST.pack(_ATTACH, 0, slot, sequence, serial)
        case Configure(sequence, slot, serial):
            return _REQUEST.pack(_CONFIGURE, 0, slot, sequence, serial)
        case Release(sequence, slot, serial):
            return _REQUEST.pack(_RELEASE, 0, slot, sequence, serial)
        case Feed(sequence, slot, serial, area):
            return _REQUEST.pack(_FEED, area, slot, sequence, serial)
        case Detach(sequence, slot, serial):
            return _REQUEST.pack(_DETACH, 0, slot, sequence, serial)
        case Ping(sequence):
            return _REQUEST.pack(_PING, 0, 0, sequence, 0)
        case _ as unreachable:
            assert_never(unreachable)


def decode_request(data: bytes) -> Request:
    """Return the request that `encode_request` made `data` of. Raises WireError."""
    if len(data) != _REQUEST.size:
        raise WireError(f"a request of {len(data)} bytes, expected {_REQUEST.size}")
    kind, area, slot, sequence, serial = _REQUEST.unpack(data)
    if kind == _FEED:
        return Feed(sequence, slot, serial, area)
    if kind == _PING:
        return Ping(sequence)
    if kind in _OF_A_DEVICE:
        return _OF_A_DEVICE[kind](sequence, slot, serial)
    raise WireError(f"a request of kind {kind}")


def encode_reply(reply: Reply) -> bytes:
    """Return the bytes of a reply, its text cut to `TEXT_MAX_BYTES`."""
    return _REPLY.pack(reply.sequence, reply.error) + reply.text.encode()[:TEXT_MAX_BYTES]


def decode_reply(data: bytes) -> Reply:
    """Return the reply that `encode_reply` made `data` of. Raises WireError."""
    if len(data) < _REPLY.size:
        raise WireError(f"a reply of {len(data)} bytes, at least {_REPLY.size}")
    sequence, error = _REPLY.unpack_from(data)
    return Reply(sequence, error, data[_REPLY.size :].decode(errors="replace"))


def encode_line(line: PacketLine) -> bytes:
    """Return the bytes of a line, cut to `MESSAGE_MAX_BYTES`."""
    name = line.device.encode()[:NAME_MAX_BYTES]
    return (_LINE.pack(line.suppressed, len(name)) + name + line.line.encode())[:MESSAGE_MAX_BYTES]


def decode_line(data: bytes) -> PacketLine:
    """Return the line that `encode_line` made `data` of. Raises WireError."""
    if len(data) < _LINE.size:
        raise WireError(f"a packet line of {len(data)} bytes, at least {_LINE.size}")
    suppressed, name_bytes = _LINE.unpack_from(data)
    end = _LINE.size + name_bytes
    return PacketLine(data[_LINE.size : end].decode(errors="replace"), data[end:].decode(errors="replace"), suppressed)
