"""Compares what is desired with what is observed, and says in steps how to get from one to the other.

Pure. `differences` is the one comparison; `plan` orders the steps that remove them, and `verify` calls it again on
what was observed afterwards. So an empty plan and a passed verification are the same statement. What belongs here and
not into an executor: every order that matters to the kernel, with its reason.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from service.domain import steps as st
from service.domain.chain import is_chain, shown
from service.domain.decide import name_taken
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import ObservedLink
from service.domain.spec import InterfaceSpec, Processing
from service.domain.token import Token
from service.domain.values import Address, InterfaceName, Mtu

ASIDE = "aside"  # and the ifindex: the name of a link of ours on its way to its own, 15 bytes at most


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it should be. Values are JSON; None stands for absent."""

    path: str
    desired: Any
    observed: Any

    def __str__(self) -> str:
        return f"{self.path}: desired {_words(self.desired)}, observed {_words(self.observed)}"

    def to_json(self) -> dict[str, Any]:
        """As it goes into events and answers."""
        return {"path": self.path, "desired": self.desired, "observed": self.observed}


@dataclass(frozen=True, slots=True)
class Sight:
    """What was seen of one interface of ours.

    Attributes:
        link: the link that carries its token, whatever its name now; or the one that did and was watched without a
            break since, though its alias was overwritten; or None.
        attached: whether a worker of ours reads the device.
        applied: what that worker was told to do, or None where that is not known.
        occupant: a link of somebody else that has the wanted name, or None.
        blind: why its network namespace could not be looked into, or None; then nothing is known of a link, and
            nothing may be done about it.
    """

    link: ObservedLink | None = None
    attached: bool = False
    applied: Processing | None = None
    occupant: ObservedLink | None = None
    blind: TunledgerError | None = None


def differences(token: Token, name: str, spec: InterfaceSpec | None, sight: Sight) -> tuple[Difference, ...]:
    """All that differs, in dotted paths under the interface's name. `spec` is None for one that is to be gone."""
    link = sight.link
    found: list[Difference] = []
    if spec is None:
        if link is not None:
            found.append(Difference(name, None, f"{link.key} (ifindex {link.ifindex})"))
        if sight.blind is not None:
            found.append(Difference(name, None, "unknown"))
        if sight.attached:
            found.append(Difference(f"{name}.processing.running", False, True))
        return tuple(found)
    if link is None:
        return (Difference(name, "present", "unknown" if sight.blind is not None else None),)
    for key, desired, observed in _compared(spec, link):
        if desired != observed:
            found.append(Difference(f"{name}.{key}", desired, observed))
    if spec.processing.running != sight.attached:
        found.append(Difference(f"{name}.processing.running", spec.processing.running, sight.attached))
    elif spec.processing.running and sight.applied is not None:
        if sight.applied.offloads is not spec.processing.offloads:
            desired, applied = spec.processing.offloads.value, sight.applied.offloads.value
            found.append(Difference(f"{name}.processing.offloads", desired, applied))
        if sight.applied.chain != spec.processing.chain:
            stages, others = list(spec.processing.chain), list(sight.applied.chain)
            found.append(Difference(f"{name}.processing.chain", stages, others))
    if link.token != token:
        found.append(Difference(f"{name}.alias", str(token), link.alias))
    if link.link_group in st.REMOVAL_GROUPS:  # a removal that a crash cut short
        found.append(Difference(f"{name}.link_group", 0, link.link_group))
    return tuple(found)


def _compared(spec: InterfaceSpec, link: ObservedLink) -> list[tuple[str, Any, Any]]:
    """Each compared property as (path, desired, observed). Addresses compare as sets: the order is the kernel's."""
    pairs: list[tuple[str, Any, Any]] = [
        ("name", spec.name, link.name),
        ("netns", spec.netns, link.netns),
        ("mode", spec.mode.value, link.mode.value if link.mode is not None else None),
        ("multi_queue", spec.multi_queue, link.multi_queue),
        ("persist", True, link.persist),
        ("mtu", spec.mtu, link.mtu),
        ("txqueuelen", spec.txqueuelen, link.txqueuelen),
        ("owner", spec.owner, link.owner),
        ("group", spec.group, link.group),
        ("addresses", sorted(map(str, spec.addresses)), sorted(map(str, link.addresses))),
        ("up", spec.up, link.up),
    ]
    if spec.mac is not None:
        pairs.append(("mac", spec.mac, link.mac))
    return pairs


def plan(token: Token, name: InterfaceName, spec: InterfaceSpec | None, sight: Sight) -> tuple[st.Step, ...]:
    """The steps from what was seen to what is desired; none if there is no difference.

    Raises:
        TunledgerError: name_taken, if somebody else's link has the name and would have to go; or why its network
            namespace could not be looked into.
    """
    if sight.blind is not None:
        raise sight.blind
    link = sight.link
    if spec is None:
        return _removal(token, name, sight)
    if link is not None and _same_device(spec, link):
        return _edit(token, spec, sight, link)
    if sight.occupant is not None and not _is_misnamed(sight.occupant, token):
        raise name_taken(name)
    fresh = ObservedLink(
        name=name,
        ifindex=0,
        mode=spec.mode,
        token=token,
        owner=spec.owner,
        group=spec.group,
        multi_queue=spec.multi_queue,
        persist=True,
        txqueuelen=-1,  # a tun starts with 500 and a tap with 1000 (tun_net_initialize): always set it
        netns=spec.netns,
    )
    create = st.CreateLink(name, token, spec.mode, spec.multi_queue, spec.owner, spec.group, spec.netns)
    after = _edit(token, spec, Sight(link=fresh), fresh)
    return (*_removal(token, name, sight), create, *after)


def leave_be(spec: InterfaceSpec, link: ObservedLink) -> InterfaceSpec:
    """The spec with all that others may have changed on the link as it is, so that only our own processing differs."""
    return msgspec.structs.replace(
        spec,
        mtu=Mtu(link.mtu),
        txqueuelen=link.txqueuelen,
        addresses=link.addresses,
        up=link.up,
        owner=link.owner,
        group=link.group,
        mac=link.mac if spec.mac is not None else None,
    )


def verify(token: Token, name: str, spec: InterfaceSpec | None, sight: Sight) -> None:
    """Check that nothing differs any more.

    Raises:
        TunledgerError: verify_failed, naming every path with both values.
    """
    left = differences(token, name, spec, sight)
    if left:
        raise TunledgerError(ErrorCode.VERIFY_FAILED, "; ".join(map(str, left)), retry=True)


def _same_device(spec: InterfaceSpec, link: ObservedLink) -> bool:
    """Whether the kernel can turn this device into the wanted one; if not, only a new one will do.

    An owner can be replaced but not taken away: TUNSETOWNER refuses an invalid uid (drivers/net/tun.c).
    """
    disowned = (spec.owner is None and link.owner is not None) or (spec.group is None and link.group is not None)
    here = link.netns == spec.netns
    return here and link.mode is spec.mode and link.multi_queue == spec.multi_queue and link.persist and not disowned


def _removal(token: Token, name: str, sight: Sight) -> tuple[st.Step, ...]:
    found: list[st.Step] = []
    if sight.attached:  # first: a device that is read while it is deleted gives the worker an error
        found.append(st.StopProcessing(name, token.interface_id))
    if sight.link is not None:
        if sight.link.token != token:  # nothing is removed that does not say that it is ours
            found.append(st.SetAlias(sight.link.name, sight.link.ifindex, token, sight.link.netns))
        found.append(st.DeleteLink(sight.link.name, sight.link.ifindex, token, sight.link.netns))
    return tuple(found)


def _edit(token: Token, spec: InterfaceSpec, sight: Sight, link: ObservedLink) -> tuple[st.Step, ...]:
    name, out = spec.name, list[st.Step]()
    if link.token != token:  # first: nothing else may touch a link that does not say that it is ours
        out.append(st.SetAlias(link.name, link.ifindex, token))
    reopened = _reopened(spec, sight)
    if sight.attached and (reopened or not spec.processing.running):
        out.append(st.StopProcessing(link.name, token.interface_id))
    if link.name != name:
        out += _rename(name, link, sight.occupant, token)
    if link.link_group in st.REMOVAL_GROUPS:
        out.append(st.SetLinkGroup(name, 0))
    if link.up and not spec.up:
        out.append(st.SetDown(name))
    if link.mtu != spec.mtu:  # before the addresses: IPv6 ones need 1280
        out.append(st.SetMtu(name, spec.mtu))
    if link.txqueuelen != spec.txqueuelen:
        out.append(st.SetTxQueueLen(name, spec.txqueuelen))
    if (link.owner, link.group) != (spec.owner, spec.group):
        out.append(st.SetOwner(name, spec.owner, spec.group))
    if spec.mac is not None and link.mac != spec.mac:
        out.append(st.SetMac(name, spec.mac))
    out += _edit_addresses(spec, link)
    if spec.up and not link.up:  # last, so that nothing can be sent over a half-made link
        out.append(st.SetUp(name))
    if spec.processing.running and (reopened or not sight.attached):
        out.append(st.StartProcessing(name, token.interface_id, spec.mode, spec.multi_queue, spec.processing))
    elif spec.processing.running and sight.applied is not None and sight.applied.chain != spec.processing.chain:
        out.append(st.ConfigureProcessing(name, token.interface_id, spec.processing))
    return tuple(out) if spec.netns is None else tuple(_inside(spec.netns, out))


def _inside(netns: str, steps: Iterable[st.Step]) -> Iterable[st.Step]:
    """The same steps on a link in a network namespace; workers know devices by their ids, wherever they are."""
    for step in steps:
        yield step if isinstance(step, st.ConfigureProcessing | st.StopProcessing) else replace(step, netns=netns)


def _reopened(spec: InterfaceSpec, sight: Sight) -> bool:
    """Whether the device has to be opened anew: what its packets come with is settled when it is attached."""
    applied = sight.applied
    return sight.attached and applied is not None and applied.offloads is not spec.processing.offloads


def _rename(name: InterfaceName, link: ObservedLink, occupant: ObservedLink | None, token: Token) -> list[st.Step]:
    """Through a name that nobody has where another link of ours is in the way: names may have been swapped, and then
    both step aside before either can have its own. Where only one of them is planned, it has to try again.
    """
    if occupant is None:
        return [st.SetName(name, link.name)]
    if not _is_misnamed(occupant, token):
        raise name_taken(name)
    aside = InterfaceName(f"{ASIDE}{link.ifindex}")
    return [st.SetName(aside, link.name), st.SetName(name, aside)] if link.name != aside else [st.SetName(name, aside)]


def _is_misnamed(occupant: ObservedLink, token: Token) -> bool:
    """Whether it is another link of ours that has this interface's name: only this interface may have it."""
    return occupant.token is not None and occupant.token.node == token.node and occupant.token != token


def _edit_addresses(spec: InterfaceSpec, link: ObservedLink) -> list[st.Step]:
    """Add before removing, so that the host is never without an address; then mend what the kernel takes along.

    It drops IPv6 addresses when a link goes down (net/ipv6/addrconf.c, keep_addr_on_down), and the secondary IPv4
    addresses of a subnet with the primary one (net/ipv4/devinet.c, promote_secondaries). And it holds an IPv6 address
    once: another prefix length for it is ignored while it is there (inet6_addr_modify), so it has to go first.
    """
    goes_down = link.up and not spec.up
    present = {a for a in link.addresses if not (goes_down and a.version == 6)}
    removed = [a for a in link.addresses if a not in spec.addresses]
    resized = {a.ip for a in removed if a.version == 6}
    out: list[st.Step] = [
        st.AddAddress(spec.name, a) for a in spec.addresses if a not in present and a.ip not in resized
    ]
    out += [st.RemoveAddress(spec.name, a) for a in removed]
    out += [
        st.AddAddress(spec.name, a)
        for a in spec.addresses
        if a.ip in resized or any(_primary_of(r, a) for r in removed)
    ]
    return out


def _primary_of(removed: Address, kept: Address) -> bool:
    return kept.version == 4 and kept.prefixlen == removed.prefixlen and kept.network == removed.network


def _words(value: object) -> str:
    match value:
        case None:
            return "absent"
        case bool():
            return "true" if value else "false"
        case list():
            return shown(value) if is_chain(value) else ", ".join(map(str, value)) or "none"
        case _:
            return str(value)
