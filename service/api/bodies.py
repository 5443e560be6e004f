"""Request bodies to commands: JSON once, strictly, each error naming the field."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from service.domain import commands as cmd
from service.domain import values
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.spec import InterfaceSpec, check, refuse_unknown
from service.domain.values import Address, InterfaceName


@dataclass(frozen=True, slots=True)
class Defaults:
    """What `create` takes for fields that are not given; the configuration's `interface`."""

    name: str
    address: str
    netmask: str
    mtu: int


def document(body: bytes) -> dict[str, Any]:
    """A body as a JSON object; an empty one is an object without fields, and a null field is one not given.

    Raises:
        TunledgerError: invalid_json.
    """
    if not body.strip():
        return {}
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TunledgerError(ErrorCode.INVALID_JSON, f"body: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise TunledgerError(
            ErrorCode.INVALID_JSON, f'body: {values.kind_of(found)} where an object such as {{"mtu": 1400}} belongs'
        )
    return {key: value for key, value in found.items() if value is not None}


def create(body: Mapping[str, Any], defaults: Defaults) -> cmd.DeclareInterface:
    """The original API's `create`. Raises TunledgerError: invalid_field."""
    refuse_unknown(body, ("name", "address", "netmask", "mtu", "allow_overlap"))
    name = values.parse_name(body.get("name", defaults.name))
    ip = values.parse_ip(body.get("address", defaults.address))
    if "netmask" not in body and ip.version == 6 and ":" not in defaults.address:
        raise TunledgerError(
            ErrorCode.INVALID_FIELD,
            f'netmask: missing; the default {defaults.netmask} does not go with the IPv6 address {ip}; try "64"',
            field="netmask",
        )
    prefixlen = values.parse_prefixlen(body.get("netmask", defaults.netmask), ip)
    address = values.check_host_address(Address(ip, prefixlen))
    mtu = values.parse_mtu(body.get("mtu", defaults.mtu))
    spec = check(InterfaceSpec(name=name, addresses=(address,), mtu=mtu))
    return cmd.DeclareInterface(spec, allow_overlap=_allow_overlap(body))


def configure(body: Mapping[str, Any], name: InterfaceName) -> cmd.ConfigureInterface:
    """The original API's `configure`. Raises TunledgerError: invalid_field."""
    refuse_unknown(body, ("address", "netmask", "mtu", "allow_overlap"))
    netmask = body.get("netmask")
    if netmask is not None and not isinstance(netmask, str):
        raise TunledgerError(
            ErrorCode.INVALID_FIELD,
            f'netmask: {netmask} is not a string; expected one such as "255.255.255.0"',
            field="netmask",
        )
    return cmd.ConfigureInterface(
        name=name,
        ip=values.parse_ip(body["address"]) if "address" in body else None,
        netmask=netmask,
        mtu=values.parse_mtu(body["mtu"]) if "mtu" in body else None,
        allow_overlap=_allow_overlap(body),
    )


def nothing(body: Mapping[str, Any]) -> None:
    """For calls that take no fields. Raises TunledgerError: invalid_field."""
    for key in body:
        raise TunledgerError(ErrorCode.INVALID_FIELD, f"{key}: unknown field; this call takes none", field=key)


def _allow_overlap(body: Mapping[str, Any]) -> bool:
    return values.parse_bool(body.get("allow_overlap", False), "allow_overlap")
