"""Request bodies to commands: JSON once, strictly, each error naming the field."""

import grp
import json
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from service.domain import commands as cmd
from service.domain import values
from service.domain.errors import ErrorCode, TunledgerError, first_close, invalid, shown
from service.domain.spec import InterfaceSpec, check, parse_spec, refuse_unknown
from service.domain.values import Address, InterfaceName


@dataclass(frozen=True, slots=True)
class Defaults:
    """What `create` takes for fields that are not given; the configuration's `interface`."""

    name: str
    address: str
    netmask: str
    mtu: int


def document(body: bytes, *, nulls: bool = False, required: bool = False) -> dict[str, Any]:
    """A body as a JSON object; an empty one is an object without fields.

    Args:
        nulls: keep fields that are null; otherwise such a field is one not given.
        required: refuse an empty one: a body that got lost must not reset an interface to its defaults.

    Raises:
        TunledgerError: invalid_json; invalid_field, for one that is given twice.
    """
    if not body.strip():
        if required:
            raise TunledgerError(ErrorCode.INVALID_JSON, 'body: missing; send an object such as {"mtu": 1400}')
        return {}
    try:
        found = msgspec.json.decode(body)
        json.loads(body, object_pairs_hook=_once)  # msgspec takes the last of two, and says nothing
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TunledgerError(ErrorCode.INVALID_JSON, f"body: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise TunledgerError(
            ErrorCode.INVALID_JSON, f'body: {values.kind_of(found)} where an object such as {{"mtu": 1400}} belongs'
        )
    return {key: value for key, value in found.items() if nulls or value is not None}


def _once(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise TunledgerError(ErrorCode.INVALID_FIELD, f"{shown(key)}: given twice; give it once", field=key)
        seen.add(key)


def recordable(name: object) -> str:
    """A name under which a refusal can be recorded, whatever was sent as one."""
    return "".join(char if char.isprintable() else "?" for char in str(name or "")[:64])


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


def spec(body: Mapping[str, Any], name: str | None = None) -> InterfaceSpec:
    """A whole spec as /api/v1 takes it; `name` is the one in the path, which the body may repeat.

    A field that is null is one not given, also within a batch.

    Raises:
        TunledgerError: invalid_field.
    """
    document = {key: value for key, value in body.items() if value is not None}
    if name is not None:
        document.setdefault("name", name)
        if document["name"] != name:
            raise invalid("name", document["name"], f"is not the name in the path, {name}")
    return parse_spec(numbered(document))


def numbered(body: Mapping[str, Any]) -> dict[str, Any]:
    """Owner and group by name become numbers, as this host knows them. Raises TunledgerError: invalid_field."""
    found = dict(body)
    for field, lookup in (("owner", _uid), ("group", _gid)):
        value = found.get(field)
        if isinstance(value, str):
            try:
                found[field] = lookup(value)
            except (KeyError, ValueError):  # ValueError: a NUL in it
                raise invalid(field, value, f"is no {'user' if field == 'owner' else 'group'} of this host") from None
    return found


def _uid(name: str) -> int:
    return pwd.getpwnam(name).pw_uid


def _gid(name: str) -> int:
    return grp.getgrnam(name).gr_gid


BATCH_MAX = 1000  # commands in one batch: one transaction, one round of the kernel


def batch(body: Mapping[str, Any], *, allow_overlap: bool, recreate: bool) -> tuple[cmd.Command, ...]:
    """The commands of a batch, in their order. Raises TunledgerError: invalid_field, naming "commands.3...."."""
    refuse_unknown(body, ("commands",))
    items = body.get("commands")
    if not isinstance(items, list) or not items:
        raise invalid("commands", items, 'is not a list such as [{"create": {"name": "tun1"}}]')
    if len(items) > BATCH_MAX:
        raise invalid("commands", len(items), f"commands are too many; at most {BATCH_MAX}")
    found: list[cmd.Command] = []
    for number, item in enumerate(items):
        field = f"commands.{number}"
        try:
            found.append(_batched(item, allow_overlap=allow_overlap, recreate=recreate))
        except TunledgerError as error:
            inner = f"{field}.{error.field}" if error.field else field
            raise TunledgerError(error.code, f"{field}: {error.message}", field=inner) from error
    return tuple(found)


def _batched(item: Any, *, allow_overlap: bool, recreate: bool) -> cmd.Command:
    kinds = ("create", "change", "start", "stop", "delete")
    if not isinstance(item, dict) or len(item) != 1 or next(iter(item)) not in kinds:
        keys = [key for key in item if key not in kinds] if isinstance(item, dict) else []
        close = first_close(keys, kinds)
        text = f"{shown(item)} is not an object with one of: {', '.join(kinds)}{close}"
        raise TunledgerError(ErrorCode.INVALID_FIELD, text)
    ((kind, value),) = item.items()
    if not isinstance(value, dict):
        raise invalid(kind, value, "is not an object")
    if kind == "create":
        return cmd.DeclareInterface(spec(value), allow_overlap)
    refuse_unknown(value, ("name", "patch") if kind == "change" else ("name",), f"{kind}.")
    name = values.parse_name(value.get("name"), f"{kind}.name")
    match kind:
        case "change":
            patch = value.get("patch")
            if not isinstance(patch, dict):
                raise invalid("change.patch", patch, 'is not an object such as {"mtu": 1400}')
            return cmd.PatchInterface(name, numbered(patch), allow_overlap, recreate)
        case "start":
            return cmd.EnableProcessing(name)
        case "stop":
            return cmd.DisableProcessing(name)
        case _:
            return cmd.RetireInterface(name)
