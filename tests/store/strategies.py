"""Arbitrary events, text of any script included. Their limits are those that `service.store.codec` states."""

import typing
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from hypothesis import strategies as st

from service.domain import events as ev
from service.domain.commands import Request
from service.domain.spec import InterfaceSpec, Offloads, Processing
from service.domain.values import Address, Mode
from service.store import codec

TEXT: Final = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)  # lone surrogates are not Unicode text
INTEGERS: Final = st.integers(-(2**53 - 1), 2**53 - 1)  # what JSON carries everywhere (RFC 8785, section 3.2.2.3)
KEYS: Final = st.text(st.characters(codec="ascii"), max_size=12)
JSON: Final = st.recursive(
    st.none() | st.booleans() | INTEGERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)
ADDRESSES: Final = st.ip_addresses().flatmap(
    lambda ip: st.builds(Address, st.just(ip), st.integers(0, ip.max_prefixlen))
)
REQUESTS: Final = st.builds(Request, **{field.name: TEXT for field in msgspec.structs.fields(Request)})
SPECS: Final = st.builds(
    InterfaceSpec,
    name=TEXT,
    mode=st.sampled_from(Mode),
    addresses=st.lists(ADDRESSES, max_size=3).map(tuple),
    mtu=INTEGERS,
    up=st.booleans(),
    txqueuelen=INTEGERS,
    owner=st.none() | INTEGERS,
    group=st.none() | INTEGERS,
    multi_queue=st.booleans(),
    mac=st.none() | TEXT,
    netns=st.none() | TEXT,
    processing=st.builds(
        Processing,
        running=st.booleans(),
        chain=st.lists(st.dictionaries(KEYS, JSON, max_size=4), max_size=3).map(tuple),
        offloads=st.sampled_from(Offloads),
    ),
    description=TEXT,
    labels=st.dictionaries(KEYS, TEXT, max_size=4),
)

_BY_TYPE: Final[Mapping[Any, st.SearchStrategy[Any]]] = {
    str: TEXT,
    int: INTEGERS,
    bool: st.booleans(),
    str | None: st.none() | TEXT,
    list[str]: st.lists(TEXT, max_size=3),
    list[dict[str, Any]]: st.lists(st.dictionaries(KEYS, JSON, max_size=4), max_size=3),
    dict[str, Any]: st.dictionaries(KEYS, JSON, max_size=4),
    ev.FinishedBy: st.sampled_from(typing.get_args(ev.FinishedBy)),
    InterfaceSpec: SPECS,
    Request: REQUESTS,
}


def _of(kind: Any) -> st.SearchStrategy[Any]:
    return _BY_TYPE[getattr(kind, "__supertype__", kind)]


def events() -> st.SearchStrategy[ev.Event]:
    """An event of any type, with anything in its fields that their types allow."""
    built: list[st.SearchStrategy[ev.Event]] = [
        st.builds(kind, **{field.name: _of(field.type) for field in msgspec.structs.fields(kind)})
        for _version, kind in codec.TYPES.values()
    ]
    return st.one_of(built)
