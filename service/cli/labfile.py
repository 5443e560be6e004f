"""The file of `tunledger apply` and `export`, and what would make the host's interfaces what it says.

Pure but for reading the file. The file is strict: a misspelt field, a key given twice or a value that does not fit is
an error that names its place, since a file is applied far from the eyes of who wrote it.

    interfaces:
      - name: tun0
        addresses: [10.0.0.1/24]
        mtu: 1400

Each interface is a spec as /api/v1 takes it; a field that is left out has its default, also where the interface
exists and has another value.
"""

import grp
import json
import pwd
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import yaml

from service.domain.errors import TunledgerError, invalid, shown
from service.domain.spec import InterfaceSpec, parse_spec, spec_to_json
from service.domain.values import kind_of

FILE_MAX_BYTES = 4 * 1024 * 1024  # 1,000 interfaces take 200 KiB
# What an export always says, for those who read it; other fields only where they are not what they are by themselves.
_ALWAYS = ("name", "mode", "addresses", "mtu")


class FileError(Exception):
    """What is wrong with a file; one line for each mistake."""


class _Loader(yaml.SafeLoader):
    """YAML without its traps: "no" and 12:30 stay text as in YAML 1.2, and a key given twice is an error."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # PyYAML's own way


for _tag, _pattern, _first in (
    ("bool", r"true|false|True|False|TRUE|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?[0-9]+\.[0-9]+", "-+0123456789"),
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), list(_first))


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"{shown(key)}: a key is text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key}: given twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read(text: bytes, name: str) -> list[InterfaceSpec]:
    """The interfaces that a file declares, in its order.

    Args:
        name: what to call it in errors; one that ends in .json is JSON, and else it is YAML.

    Raises:
        FileError: naming the file, the place in it, and what would do.
    """
    if len(text) > FILE_MAX_BYTES:
        raise FileError(f"{name}: over {FILE_MAX_BYTES} bytes")
    document = _json(text, name) if name.endswith(".json") else _yaml(text, name)
    if not isinstance(document, dict) or not isinstance(document.get("interfaces"), list):
        found = "a mapping without that" if isinstance(document, dict) else kind_of(document)
        raise FileError(f'{name}: expected "interfaces" with a list beneath it, found {found}')
    problems = [f"{name}: {key}: unknown field; known here: interfaces" for key in document if key != "interfaces"]
    specs: list[InterfaceSpec] = []
    places: dict[str, str] = {}
    for number, item in enumerate(document["interfaces"]):
        where = f"interfaces.{number}"
        try:
            spec = _spec(item, where)
            if spec.name in places:
                raise FileError(f"{where}.name: {spec.name} is there already, as {places[spec.name]}")
            places[spec.name] = where
            specs.append(spec)
        except FileError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise FileError("\n".join(problems))
    return specs


def _spec(item: Any, where: str) -> InterfaceSpec:
    if not isinstance(item, dict):
        raise FileError(f"{where}: {kind_of(item)} where an interface such as {{name: tun0}} belongs")
    # A field that is null is one not given, as in the API.
    document = {key: value for key, value in item.items() if value is not None}
    try:
        return parse_spec({key: _number(key, value) for key, value in document.items()})
    except TunledgerError as error:
        called = document.get("name")
        which = f"{where} ({called})" if isinstance(called, str) and error.field != "name" else where
        raise FileError(f"{which}.{error.message}") from error


def _number(field: str, value: Any) -> Any:
    """Owner and group by name as numbers: the service is on this host."""
    if field not in {"owner", "group"} or not isinstance(value, str):
        return value
    try:
        return pwd.getpwnam(value).pw_uid if field == "owner" else grp.getgrnam(value).gr_gid
    except KeyError:
        raise invalid(field, value, f"is no {'user' if field == 'owner' else 'group'} of this host") from None


def _yaml(text: bytes, name: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader, only stricter
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise FileError(f"{name}{place}: {error.problem or error.context}") from error
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise FileError(f"{name}: not YAML: {str(error).splitlines()[0]}") from error


def _json(text: bytes, name: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise FileError(f"{name}: {key}: given twice")
            found[key] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise FileError(f"{name}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    except (UnicodeError, RecursionError) as error:
        raise FileError(f"{name}: not JSON: {error}") from error


def commands(specs: Sequence[InterfaceSpec], present: Mapping[str, Any], *, prune: bool) -> list[dict[str, Any]]:
    """The batch that makes the present specs, by name, the wanted ones. Deletes first: they free what is wanted.

    Args:
        prune: delete those that the file does not have.
    """
    wanted = {str(spec.name): spec for spec in specs}
    found: list[dict[str, Any]] = []
    if prune:
        found += [{"delete": {"name": name}} for name in present if name not in wanted]
    for name, spec in wanted.items():
        if name not in present:
            found.append({"create": _brief(spec)})
            continue
        patch = merge_patch(present[name], spec_to_json(spec))
        if patch:
            found.append({"change": {"name": name, "patch": patch}})
    return found


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The least JSON merge patch (RFC 7396) that makes one of the other."""
    patch: dict[str, Any] = dict.fromkeys(key for key in old if key not in new)
    for key, value in new.items():
        was = old.get(key)
        if isinstance(value, dict) and isinstance(was, dict):
            if inner := merge_patch(was, value):
                patch[key] = inner
        elif value != was:
            patch[key] = value
    return patch


def _brief(spec: InterfaceSpec) -> dict[str, Any]:
    """A spec without the fields that are what they are by themselves."""
    by_itself = spec_to_json(InterfaceSpec(name=spec.name))
    return {k: v for k, v in spec_to_json(spec).items() if k == "name" or v != by_itself[k]}


def write(present: Sequence[Mapping[str, Any]], form: str) -> str:
    """The file that declares these specs, as "yaml" or "json"."""
    specs = []
    for each in present:
        spec = parse_spec({key: value for key, value in each.items() if value is not None})
        brief, whole = _brief(spec), spec_to_json(spec)
        specs.append({key: whole[key] for key in whole if key in _ALWAYS or key in brief})
    document = {"interfaces": specs}
    if form == "json":
        return json.dumps(document, indent=2, ensure_ascii=False)
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)
    return text.rstrip("\n")
