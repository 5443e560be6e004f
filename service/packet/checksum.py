"""Internet checksums: computing and correcting them, fast for segments of 64 KiB.

Arithmetic on octets only: `verify` knows which of a packet's octets a checksum is about.

Ones' complement addition of 16-bit words is addition modulo 65,535, because 2^16 = 1 (mod 65,535). So the sum
of a whole buffer is one big integer modulo 65,535, which CPython does in C, instead of a loop over words. The
one trap is that 0 and 65,535 are both zero: only a buffer of zeros sums to 0.
"""


def ones_complement_sum(
    data: bytes | bytearray | memoryview, offset: int = 0, length: int | None = None, initial: int = 0
) -> int:
    """Return the ones' complement sum of the 16-bit words in `data[offset:offset + length]` plus `initial`.

    `length` is in octets, to the end of `data` if None; an odd last octet is padded with zero on the right.
    `initial` is any non-negative number, such as another sum. The result is 0 to 65,535. Source: RFC 1071, 1.
    """
    end = len(data) if length is None else offset + length
    with memoryview(data)[offset:end] as view:
        total = int.from_bytes(view, "big")
        if len(view) & 1:
            total <<= 8
    total += initial
    return total % 0xFFFF or (0xFFFF if total else 0)


def internet_checksum(
    data: bytes | bytearray | memoryview, offset: int = 0, length: int | None = None, initial: int = 0
) -> int:
    """Return what belongs in a checksum field, computed with that field set to zero.

    Arguments as for `ones_complement_sum`; over data that includes a right checksum the result is 0. UDP
    sends 65,535 for a result of 0 (RFC 768); that is the caller's business. Source: RFC 1071, 1.
    """
    return ones_complement_sum(data, offset, length, initial) ^ 0xFFFF


def corrected_checksum(checksum: int, old: int, new: int) -> int:
    """Return `checksum` after one 16-bit word under it changed from `old` to `new`.

    Source: RFC 1624, equation 3: HC' = ~(~HC + ~m + m').
    """
    total = (checksum ^ 0xFFFF) + (old ^ 0xFFFF) + new
    total = (total & 0xFFFF) + (total >> 16)
    return ((total & 0xFFFF) + (total >> 16)) ^ 0xFFFF
