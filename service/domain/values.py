"""Single values an interface is described with, parsed once: past this module a name is a name and an MTU fits.

What belongs together (an address needs an MTU) is judged in `spec`; what the host has to say is judged in `decide`.
"""

import ipaddress
import re
from enum import StrEnum
from typing import NewType

from service.domain.errors import invalid

InterfaceName = NewType("InterfaceName", str)
InterfaceId = NewType("InterfaceId", str)
CommandId = NewType("CommandId", str)
NodeId = NewType("NodeId", str)
Mtu = NewType("Mtu", int)

NAME_BYTES_MAX = 16 - 1  # IFNAMSIZ (linux/if.h) less the closing NUL
MTU_MIN = 68  # RFC 791: every link must carry a datagram of 68 bytes; the kernel's ETH_MIN_MTU
MTU_MAX = 65535  # the kernel's IP_MAX_MTU, TUN's max_mtu (drivers/net/tun.c)
TAP_MTU_MAX = MTU_MAX - 14  # less the Ethernet header (tun_net_init)
IPV6_MTU_MIN = 1280  # RFC 8200, section 5; below it the kernel takes IPv6 off the link
TXQUEUELEN_MAX = 1_000_000  # far above use; a packet each in kernel memory
DESCRIPTION_CHARS_MAX = 256
LABELS_MAX = 32
NETNS_CHARS_MAX = 64

_NAME_CHAR = re.compile(r"[!-~]")  # printable ASCII without the blank
_LABEL_KEY = re.compile(r"[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?")
_NETNS = re.compile(rf"[A-Za-z0-9_.+@-]{{1,{NETNS_CHARS_MAX}}}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class Mode(StrEnum):
    """What the device carries: IP packets (tun) or Ethernet frames (tap)."""

    TUN = "tun"
    TAP = "tap"


class Address:
    """An address with its prefix length, as in `ip address`: 10.0.0.1/24, 2001:db8::1/64. Immutable.

    Not a dataclass, because msgspec would take it apart in payloads instead of writing it as one string.
    """

    __slots__ = ("ip", "prefixlen")

    ip: ipaddress.IPv4Address | ipaddress.IPv6Address
    prefixlen: int

    def __init__(self, ip: ipaddress.IPv4Address | ipaddress.IPv6Address, prefixlen: int) -> None:
        object.__setattr__(self, "ip", ip)
        object.__setattr__(self, "prefixlen", prefixlen)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"Address.{name} cannot be set to {value!r}: addresses do not change")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Address):
            return NotImplemented
        return self.ip == other.ip and self.prefixlen == other.prefixlen

    def __hash__(self) -> int:
        return hash((self.ip, self.prefixlen))

    def __repr__(self) -> str:
        return f"Address({self})"

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.ip.version

    @property
    def network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        """The subnet the address puts on the link."""
        return ipaddress.ip_network((self.ip, self.prefixlen), strict=False)

    def __str__(self) -> str:
        return f"{self.ip}/{self.prefixlen}"


def parse_name(value: object, field: str = "name") -> InterfaceName:
    """A name the kernel takes (dev_valid_name in net/core/dev.c) and that is safe in paths and on command lines.

    Raises:
        TunledgerError: invalid_field.
    """
    would_do = f"is not an interface name: 1 to {NAME_BYTES_MAX} ASCII characters without blanks, '/', ':' or '%'"
    if not isinstance(value, str):
        raise invalid(field, value, 'is not a string such as "tun0"')
    if value in {"", ".", ".."} or not value.isascii() or len(value) > NAME_BYTES_MAX:
        raise invalid(field, value, would_do)
    if any(not _NAME_CHAR.match(char) or char in "/:%" for char in value):
        raise invalid(field, value, would_do)
    if value in {"all", "default"}:  # sysctl_dev_name_is_allowed in net/ipv4/devinet.c
        raise invalid(field, value, "is no interface name: in /proc/sys/net it stands for all interfaces, or new ones")
    return InterfaceName(value)


def parse_netns(value: object, field: str = "netns") -> str:
    """The name of a network namespace as `ip netns` has it: an entry of /run/netns. Raises TunledgerError:
    invalid_field.
    """
    would_do = (
        f"is not the name of a network namespace: 1 to {NETNS_CHARS_MAX} letters, digits, '_', '-', '.', '+', '@'"
    )
    if not isinstance(value, str) or not _NETNS.fullmatch(value) or value in {".", ".."}:
        raise invalid(field, value, would_do)
    return value


def parse_mtu(value: object, field: str = "mtu") -> Mtu:
    """An MTU in bytes. Raises TunledgerError: invalid_field."""
    return Mtu(parse_int(value, field, MTU_MIN, MTU_MAX))


def parse_int(value: object, field: str, low: int, high: int) -> int:
    """A JSON integer within bounds; booleans, strings and fractions are refused, not converted."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(field, value, f"is not a whole number; expected {low} to {high}")
    if not low <= value <= high:
        raise invalid(field, value, f"is out of range; expected {low} to {high}")
    return value


def parse_bool(value: object, field: str) -> bool:
    """A JSON boolean. Raises TunledgerError: invalid_field."""
    if not isinstance(value, bool):
        raise invalid(field, value, "is not true or false")
    return value


def parse_ip(value: object, field: str = "address") -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """A host address that can be given to an interface, without prefix.

    Raises:
        TunledgerError: invalid_field, for what is no address, and for unspecified, multicast, loopback,
            IPv4-mapped and limited-broadcast ones.
    """
    if not isinstance(value, str):
        raise invalid(field, value, 'is not a string; expected an address such as "10.0.0.1"')
    if "/" in value:
        raise invalid(field, value, 'has a prefix length; give "netmask" beside the bare address')
    if "%" in value:
        raise invalid(field, value, "has a zone; leave out '%' and what follows")
    try:
        ip = ipaddress.ip_address(value)
    except ValueError:
        raise invalid(field, value, "is not an IPv4 or IPv6 address") from None
    if ip.is_unspecified:
        raise invalid(field, value, "is the unspecified address, which no interface can have")
    if ip.is_multicast:
        raise invalid(field, value, "is a multicast address, which no interface can have")
    if ip.is_loopback:
        raise invalid(field, value, "is a loopback address; it belongs to lo")
    if ip == ipaddress.IPv4Address("255.255.255.255"):
        raise invalid(field, value, "is the limited broadcast address")
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        raise invalid(field, value, "is IPv4-mapped; give the IPv4 address itself")
    return ip


def parse_prefixlen(netmask: object, ip: ipaddress.IPv4Address | ipaddress.IPv6Address, field: str = "netmask") -> int:
    """The prefix length that a netmask stands for: "255.255.255.0", "ffff:ffff::" or the length itself, "24".

    Raises:
        TunledgerError: invalid_field, also for masks with holes, of the other family, or of length zero.
    """
    example = '"255.255.255.0" or "24"' if ip.version == 4 else '"64" or "ffff:ffff:ffff:ffff::"'
    if not isinstance(netmask, str):
        raise invalid(field, netmask, f"is not a string; expected one such as {example}")
    if re.fullmatch(r"[0-9]{1,3}", netmask):
        length = int(netmask)
        if length > ip.max_prefixlen:
            raise invalid(field, netmask, f"is too long a prefix for IPv{ip.version}; at most {ip.max_prefixlen}")
    else:
        try:
            mask = ipaddress.ip_address(netmask)
        except ValueError:
            raise invalid(field, netmask, f"is not a netmask; expected one such as {example}") from None
        if mask.version != ip.version:
            raise invalid(field, netmask, f"does not go with the IPv{ip.version} address {ip}; expected {example}")
        ones = int(mask)
        length = ones.bit_count()
        if ones != ((1 << length) - 1) << (ip.max_prefixlen - length):
            raise invalid(field, netmask, f"is not contiguous; expected one such as {example}")
    if length == 0:
        raise invalid(field, netmask, "would put every address of the world on this link; expected at least 1")
    return length


def check_host_address(address: Address, field: str = "address") -> Address:
    """Refuse the subnet's own address and its broadcast (RFC 1122, section 3.2.1.3); /31 and /32 have neither."""
    net = address.network
    if address.version == 4 and address.prefixlen < 31:
        if address.ip == net.broadcast_address:
            raise invalid(field, str(address), "is the broadcast address of its network")
        if address.ip == net.network_address:
            raise invalid(field, str(address), f"is the network itself, not a host in it; try {net[1]}")
    return address


def parse_cidr(value: object, field: str) -> Address:
    """An address in CIDR form, "10.0.0.1/24". Raises TunledgerError: invalid_field."""
    if not isinstance(value, str) or value.count("/") != 1:
        raise invalid(field, value, 'is not an address with a prefix length, such as "10.0.0.1/24"')
    host, _, length = value.partition("/")
    ip = parse_ip(host, field)
    if not re.fullmatch(r"[0-9]{1,3}", length):
        raise invalid(field, value, "has no prefix length after the '/', such as 24")
    return check_host_address(Address(ip, parse_prefixlen(length, ip, field)), field)


def parse_mac(value: object, field: str = "mac") -> str:
    """A unicast hardware address, lower case with colons. Raises TunledgerError: invalid_field."""
    if not isinstance(value, str) or not _MAC.fullmatch(value.lower()):
        raise invalid(field, value, 'is not a hardware address such as "02:00:00:00:00:01"')
    mac = value.lower()
    if int(mac[:2], 16) & 1:
        raise invalid(field, value, "is a group address; the lowest bit of the first byte must be 0")
    if mac == "00:00:00:00:00:00":
        raise invalid(field, value, "is all zeros, which no interface can have")
    return mac


def parse_labels(value: object, field: str = "labels") -> dict[str, str]:
    """Up to 32 labels, sorted by key: short lower-case keys, values of at most 63 printable characters."""
    if not isinstance(value, dict):
        raise invalid(field, value, "is not an object of strings")
    if len(value) > LABELS_MAX:
        raise invalid(field, len(value), f"labels are too many; at most {LABELS_MAX}")
    for key, text in value.items():
        if not isinstance(key, str) or not _LABEL_KEY.fullmatch(key):
            raise invalid(field, key, "is not a label key: a-z, 0-9, '.', '_', '-', '/', at most 63 characters")
        if not isinstance(text, str) or len(text) > 63 or not text.isprintable():
            raise invalid(f"{field}.{key}", text, "is not a string of at most 63 printable characters")
    return dict(sorted(value.items()))


def parse_description(value: object, field: str = "description") -> str:
    """Free text for people, one line. Raises TunledgerError: invalid_field."""
    if not isinstance(value, str) or len(value) > DESCRIPTION_CHARS_MAX or not value.isprintable():
        raise invalid(field, value, f"is not a line of at most {DESCRIPTION_CHARS_MAX} printable characters")
    return value


def kind_of(value: object) -> str:
    """What JSON calls a value: "a string", "a number", "a list"."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case str():
            return "a string"
        case int() | float():
            return "a number"
        case list():
            return "a list"
        case _:
            return "an object"
