"""Octets for the property tests: arbitrary ones hardly ever pass the first check, so most start from a packet."""

from itertools import pairwise
from typing import Final

from hypothesis import strategies as st

from tests.packet import golden, malformed

_SMALL: Final = tuple(broken.octets for broken in malformed.PACKETS if len(broken.octets) < 200)
PACKETS: Final = (*golden.BY_NAME.values(), *_SMALL)
FRAMES: Final = (
    *(frame.octets for frame in golden.FRAMES),
    *(broken.octets for broken in malformed.FRAMES),
    *(bytes.fromhex(golden.MACS + "0800") + octets for octets in PACKETS if octets[:1] == b"\x45"),
    *(bytes.fromhex(golden.MACS + "86dd") + octets for octets in PACKETS if octets[:1] == b"\x60"),
)

# Octets that mean something somewhere: extension headers, transports, lengths, option types.
_TELLING: Final = st.sampled_from(
    (0, 1, 2, 4, 5, 6, 7, 8, 17, 32, 43, 44, 50, 51, 58, 59, 60, 135, 139, 140, 0xC2, 0x45, 0x60, 0x81, 0xFF)
)


@st.composite
def mutated(draw: st.DrawFn, packets: tuple[bytes, ...] = PACKETS) -> bytes:
    """Draw a packet with a few octets changed, perhaps cut, perhaps with a tail."""
    octets = bytearray(draw(st.sampled_from(packets)))
    for _ in range(draw(st.integers(0, 4))):
        if octets:
            octets[draw(st.integers(0, min(len(octets), 90) - 1))] = draw(_TELLING | st.integers(0, 255))
    cut = draw(st.none() | st.integers(0, len(octets)))
    return bytes(octets[:cut]) + draw(st.binary(max_size=24))


@st.composite
def ipv6_chains(draw: st.DrawFn) -> bytes:
    """Draw an IPv6 packet of extension headers with plausible lengths in any order."""
    kinds = draw(st.lists(st.sampled_from((43, 44, 51, 60, 135, 139, 140)), max_size=10))
    if draw(st.booleans()):
        kinds.insert(0, 0)
    kinds.append(draw(st.sampled_from((1, 6, 17, 50, 58, 59, 253, 0))))
    chain = b""
    for kind, following in pairwise(kinds):
        extra = draw(st.integers(0, 2))
        if kind == 44:
            offset = draw(st.sampled_from((0, 0, 0, 1, 8, 9, 0xFFF8, 0xFFF9)))
            chain += bytes([following, 0]) + offset.to_bytes(2, "big") + bytes(4)
        elif kind == 51:
            chain += bytes([following, extra * 2]) + bytes((extra * 2 + 2) * 4 - 2)
        else:
            chain += bytes([following, extra])
            chain += (
                draw(st.binary(min_size=extra * 8 + 6, max_size=extra * 8 + 6)) if kind == 0 else bytes(6 + extra * 8)
            )
    chain += draw(st.sampled_from((b"", bytes(7), bytes(8), bytes(12) + b"\x50" + bytes(7), b"\0\0\0\0\0\x08\0\0")))
    payload = draw(st.just(len(chain)) | st.integers(0, len(chain) + 1))
    return b"\x60\0\0\0" + payload.to_bytes(2, "big") + bytes([kinds[0], 64]) + bytes(32) + chain


octets: Final = st.binary(max_size=120) | mutated() | ipv6_chains()
frames: Final = st.binary(max_size=120) | mutated(FRAMES)
