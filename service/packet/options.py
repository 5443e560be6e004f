"""Type-length-value options: IPv4, TCP and IPv6 spell them in three slightly different ways.

Only splitting them lives here: what an option means is its reader's business. Options that make no sense never
make a packet malformed (the host's stack judges them); they end the list, and `intact` says so.
"""

from typing import Final, NamedTuple

END_OF_OPTIONS: Final = 0
"""IPv4 and TCP: the list ends here; the rest is padding (RFC 791, 3.1; RFC 9293, 3.2)."""

NO_OPERATION: Final = 1
"""IPv4 and TCP: one octet without a length."""

PAD1: Final = 0
"""IPv6: one octet without a length (RFC 8200, 4.2)."""


class Option(NamedTuple):
    """One option: its type octet and the data behind its length octet, empty for one-octet options."""

    type: int
    data: bytes


class Options(NamedTuple):
    """The options of one header. `intact` is False if the last of them overran; the rest is left out."""

    items: tuple[Option, ...]
    intact: bool


def split_ipv4_or_tcp(data: bytes) -> Options:
    """Split the options of an IPv4 or TCP header, whose length octet counts type and length too.

    END_OF_OPTIONS ends the list and is not in it. Sources: RFC 791, 3.1; RFC 9293, 3.2.
    """
    items: list[Option] = []
    at = 0
    while at < len(data) and data[at] != END_OF_OPTIONS:
        if data[at] == NO_OPERATION:
            items.append(Option(NO_OPERATION, b""))
            at += 1
            continue
        if at + 2 > len(data) or data[at + 1] < 2 or at + data[at + 1] > len(data):
            return Options(tuple(items), intact=False)
        items.append(Option(data[at], data[at + 2 : at + data[at + 1]]))
        at += data[at + 1]
    return Options(tuple(items), intact=True)


def split_ipv6(data: bytes) -> Options:
    """Split the options of a hop-by-hop or destination options header, whose length octet counts data only.

    Padding (Pad1, PadN) is in the list. Source: RFC 8200, 4.2.
    """
    items: list[Option] = []
    at = 0
    while at < len(data):
        if data[at] == PAD1:
            items.append(Option(PAD1, b""))
            at += 1
            continue
        if at + 2 > len(data) or at + 2 + data[at + 1] > len(data):
            return Options(tuple(items), intact=False)
        items.append(Option(data[at], data[at + 2 : at + 2 + data[at + 1]]))
        at += 2 + data[at + 1]
    return Options(tuple(items), intact=True)
