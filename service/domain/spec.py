"""What is wanted of one interface, whole: the spec, its JSON form, and the rules between its fields.

The JSON form here is the one in event payloads and in /api/v1. Owner and group are numbers here; names are resolved
at the edge. Nothing in here asks the host.
"""

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, Final

import msgspec

from service.domain import values
from service.domain.chain import Chain, parse_chain, targets
from service.domain.errors import ErrorCode, TunledgerError, invalid, unknown
from service.domain.values import Address, InterfaceName, Mode, Mtu

ADDRESSES_MAX = 64
UID_MAX = 2**32 - 2  # (uid_t) -1 means "nobody" to TUNSETOWNER
TXQUEUELEN_DEFAULT = 1000  # the kernel's 500 for TUN is too small for bursts


class Offloads(StrEnum):
    """Whether a device's reader may be handed segments of up to 64 KiB and unfinished checksums (IFF_VNET_HDR)."""

    AUTO = "auto"
    OFF = "off"


class Processing(msgspec.Struct, frozen=True):
    """Whether our workers read the device. While not, we hold no descriptor of it and others may open it.

    Attributes:
        running: whether they do.
        chain: what they do with its packets, in order (`service.domain.chain`); without, packets are counted only.
        offloads: auto asks the kernel for what it has, off keeps packets as they are on a wire.
    """

    running: bool = False
    chain: Chain = ()
    offloads: Offloads = Offloads.AUTO


class Drift(StrEnum):
    """What is done when others change the interface: put it right again, or only tell of it."""

    REPAIR = "repair"
    REPORT = "report"


class InterfaceSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The desired state of one interface.

    Attributes:
        name: as `ip link` shows it; it is the identity users know and never changes.
        mode: tun or tap; changing it means a new device.
        addresses: with prefix length, in the order given; the first is the primary one.
        mtu: bytes.
        up: the admin state.
        txqueuelen: packets the kernel queues for the reader before it drops.
        owner, group: numeric ids that may open the device besides root, or None.
        multi_queue: several descriptors at once; changing it means a new device.
        mac: hardware address of a tap, or None for the kernel's choice.
        netns: the network namespace it lives in, by its name under /run/netns, or None for the service's own; changing
            it means a new device.
        processing: whether our workers read it, and what they do with its packets.
        drift: whether what others change on it is repaired, or only reported.
        description, labels: for people and their tools.
    """

    name: InterfaceName
    mode: Mode = Mode.TUN
    addresses: tuple[Address, ...] = ()
    mtu: Mtu = Mtu(1500)
    up: bool = True
    txqueuelen: int = TXQUEUELEN_DEFAULT
    owner: int | None = None
    group: int | None = None
    multi_queue: bool = False
    mac: str | None = None
    netns: str | None = None
    processing: Processing = Processing()
    drift: Drift = Drift.REPAIR
    description: str = ""
    labels: dict[str, str] = {}


def check(spec: InterfaceSpec) -> InterfaceSpec:
    """The rules that need more than one field.

    Raises:
        TunledgerError: invalid_field.
    """
    if spec.mtu < values.IPV6_MTU_MIN and any(address.version == 6 for address in spec.addresses):
        wanted = f"is under {values.IPV6_MTU_MIN}, the least IPv6 works with, and the interface has an IPv6 address"
        raise invalid("mtu", spec.mtu, wanted)
    if spec.mode is Mode.TAP and spec.mtu > values.TAP_MTU_MAX:
        raise invalid("mtu", spec.mtu, f"is over {values.TAP_MTU_MAX}, the most a tap takes")
    if len({address.ip for address in spec.addresses}) != len(spec.addresses):
        raise invalid("addresses", ", ".join(map(str, spec.addresses)), "has the same address twice")
    if len(spec.addresses) > ADDRESSES_MAX:
        raise invalid("addresses", len(spec.addresses), f"addresses are too many; at most {ADDRESSES_MAX}")
    if spec.name in targets(spec.processing.chain):
        raise invalid("processing.chain", spec.name, "cannot forward to itself")
    if spec.mac is not None and spec.mode is not Mode.TAP:
        raise invalid("mac", spec.mac, "does not go with mode tun, which has no hardware address")
    return spec


def _addresses(value: object, field: str) -> tuple[Address, ...]:
    if not isinstance(value, list):
        raise invalid(field, value, 'is not a list of addresses such as ["10.0.0.1/24"]')
    return tuple(values.parse_cidr(item, f"{field}.{index}") for index, item in enumerate(value))


def _mode(value: object, field: str) -> Mode:
    if value not in ("tun", "tap"):
        raise invalid(field, value, 'is not "tun" or "tap"')
    return Mode(str(value))


def _account(value: object, field: str) -> int | None:
    return None if value is None else values.parse_int(value, field, 0, UID_MAX)


def _mac(value: object, field: str) -> str | None:
    return None if value is None else values.parse_mac(value, field)


_PROCESSING: Final = ("running", "chain", "offloads")


def _processing(value: object, field: str) -> Processing:
    if not isinstance(value, dict):
        raise invalid(field, value, 'is not an object such as {"running": true}')
    refuse_unknown(value, _PROCESSING, f"{field}.")
    return Processing(
        running=values.parse_bool(value.get("running", False), f"{field}.running"),
        chain=parse_chain(value.get("chain", []), f"{field}.chain"),
        offloads=_offloads(value.get("offloads", "auto"), f"{field}.offloads"),
    )


def _offloads(value: object, field: str) -> Offloads:
    if value not in ("auto", "off"):
        raise invalid(field, value, 'is not "auto" or "off"')
    return Offloads(str(value))


def _drift(value: object, field: str) -> Drift:
    if value not in ("repair", "report"):
        raise invalid(field, value, 'is not "repair" or "report"')
    return Drift(str(value))


_PARSERS: Final[Mapping[str, Callable[[Any, str], Any]]] = {
    "name": values.parse_name,
    "mode": _mode,
    "addresses": _addresses,
    "mtu": values.parse_mtu,
    "up": values.parse_bool,
    "txqueuelen": lambda value, field: values.parse_int(value, field, 0, values.TXQUEUELEN_MAX),
    "owner": _account,
    "group": _account,
    "multi_queue": values.parse_bool,
    "mac": _mac,
    "netns": lambda value, field: None if value is None else values.parse_netns(value, field),
    "processing": _processing,
    "drift": _drift,
    "description": values.parse_description,
    "labels": values.parse_labels,
}


def refuse_unknown(document: Mapping[str, object], known: tuple[str, ...], prefix: str = "") -> None:
    """Raise invalid_field for the first key that is not known; a misspelt field must not pass in silence."""
    for key in document:
        if key not in known:
            raise unknown(prefix, key, known)


def parse_spec(document: Mapping[str, object]) -> InterfaceSpec:
    """A spec from its JSON form; missing fields take their defaults.

    Raises:
        TunledgerError: invalid_field, naming the field in dotted form.
    """
    for key in document:
        if key in _PROCESSING and key not in _PARSERS:
            text = f"{key}: unknown field; did you mean processing.{key}?"
            raise TunledgerError(ErrorCode.INVALID_FIELD, text, field=key)
    refuse_unknown(document, tuple(_PARSERS))
    if "name" not in document:
        raise TunledgerError(ErrorCode.INVALID_FIELD, 'name: missing; expected one such as "tun0"', field="name")
    fields = {key: _PARSERS[key](value, key) for key, value in document.items()}
    return check(InterfaceSpec(**fields))


def spec_to_json(spec: InterfaceSpec) -> dict[str, Any]:
    """The spec as plain JSON values, every field present, so that a payload can be read without our defaults."""
    return {
        "name": spec.name,
        "mode": spec.mode.value,
        "addresses": [str(address) for address in spec.addresses],
        "mtu": spec.mtu,
        "up": spec.up,
        "txqueuelen": spec.txqueuelen,
        "owner": spec.owner,
        "group": spec.group,
        "multi_queue": spec.multi_queue,
        "mac": spec.mac,
        "netns": spec.netns,
        "processing": {
            "running": spec.processing.running,
            "chain": [dict(stage) for stage in spec.processing.chain],
            "offloads": spec.processing.offloads.value,
        },
        "drift": spec.drift.value,
        "description": spec.description,
        "labels": dict(spec.labels),
    }


def changes(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, prefix: str = "") -> list[dict[str, Any]]:
    """What differs between two JSON forms, as [{"path", "old", "new"}] in dotted paths; None stands for absent."""
    found: list[dict[str, Any]] = []
    before, after = old or {}, new or {}
    for key in [*before, *(key for key in after if key not in before)]:
        was, now = before.get(key), after.get(key)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            found += changes(was, now, f"{prefix}{key}.")
        else:
            found.append({"path": f"{prefix}{key}", "old": was, "new": now})
    return found
