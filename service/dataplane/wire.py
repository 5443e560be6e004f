"""The messages between the supervisor and a worker, as values and as bytes.

A codec: nothing here owns a socket or decides what an answer means.

Theory of operation. Two Unix sockets of type SOCK_SEQPACKET, so one send is one message and the peer's end is
seen as an empty one:

    control   supervisor -> worker   Attach (with the device's fd by SCM_RIGHTS), Detach, Ping
              worker -> supervisor   Reply, one for each request and in their order
    lines     worker -> supervisor   PacketLine; never waited for

The supervisor asks and waits, one request at a time; an answer that it gave up on is recognised by its
sequence number and dropped. The end of control, however it came about, tells the worker to exit.
That a device was lost goes another way that cannot fill up: the worker writes the errno into the device's slot
(see `layout`) and pokes an eventfd; the supervisor looks at all of the worker's slots.
"""

import struct
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, assert_never

Mode: TypeAlias = Literal["tun", "tap"]

NAME_MAX_BYTES: Final = 255
MESSAGE_MAX_BYTES: Final = 4096
"""No message is longer; a longer line is cut."""

_REQUEST: Final = struct.Struct("<BBxxIQQ")  # kind, mode, slot, sequence, serial
_REPLY: Final = struct.Struct("<QI")  # sequence, errno
_LINE: Final = struct.Struct("<QB")  # suppressed, bytes of the name

_ATTACH: Final = 1
_DETACH: Final = 2
_PING: Final = 3
_MODES: Final[tuple[Mode, ...]] = ("tun", "tap")


class WireError(Exception):
    """Bytes that are none of these messages: the peer is not what we took it for."""


@dataclass(frozen=True, slots=True)
class Attach:
    """Read packets from the fd that comes with this. `serial` is unique to this attach, `name` is for lines."""

    sequence: int
    slot: int
    serial: int
    mode: Mode
    name: str


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


Request: TypeAlias = Attach | Detach | Ping


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to the request with this sequence number; `error` is an errno, 0 if it was done."""

    sequence: int
    error: int


@dataclass(frozen=True, slots=True)
class PacketLine:
    """A packet in words, and how many of the device's before it were not shown.

    An empty line carries the number alone.
    """

    device: str
    line: str
    suppressed: int


def encode_request(request: Request) -> bytes:
    """Return the bytes of a request. Raises WireError if the name has over `NAME_MAX_BYTES`."""
    match request:
        case Attach(sequence, slot, serial, mode, name):
            encoded = name.encode()
            if len(encoded) > NAME_MAX_BYTES:
                raise WireError(f"name: {len(encoded)} bytes, at most {NAME_MAX_BYTES}")
            return _REQUEST.pack(_ATTACH, _MODES.index(mode), slot, sequence, serial) + encoded
        case Detach(sequence, slot, serial):
            return _REQUEST.pack(_DETACH, 0, slot, sequence, serial)
        case Ping(sequence):
            return _REQUEST.pack(_PING, 0, 0, sequence, 0)
        case _ as unreachable:
            assert_never(unreachable)


def decode_request(data: bytes) -> Request:
    """Return the request that `encode_request` made `data` of. Raises WireError."""
    if len(data) < _REQUEST.size:
        raise WireError(f"a request of {len(data)} bytes, at least {_REQUEST.size}")
    kind, mode, slot, sequence, serial = _REQUEST.unpack_from(data)
    if kind == _ATTACH and mode < len(_MODES):
        return Attach(sequence, slot, serial, _MODES[mode], data[_REQUEST.size :].decode(errors="replace"))
    if kind == _DETACH:
        return Detach(sequence, slot, serial)
    if kind == _PING:
        return Ping(sequence)
    raise WireError(f"a request of kind {kind}, mode {mode}")


def encode_reply(reply: Reply) -> bytes:
    """Return the bytes of a reply."""
    return _REPLY.pack(reply.sequence, reply.error)


def decode_reply(data: bytes) -> Reply:
    """Return the reply that `encode_reply` made `data` of. Raises WireError."""
    if len(data) != _REPLY.size:
        raise WireError(f"a reply of {len(data)} bytes, expected {_REPLY.size}")
    return Reply(*_REPLY.unpack(data))


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
