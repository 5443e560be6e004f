"""Carries out the steps of many interfaces on Linux at once: netlink messages pipelined, devices made and kept in
rounds, deletes leaving together through a link group.

It decides nothing: each step says all there is to do. What it does guard is the last moment. Nothing without our token
is changed, and links are addressed by ifindex from that check on. An interface that fails, fails alone.
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Callable, Collection, Sequence
from typing import assert_never

from service import failpoints
from service.domain import steps as st
from service.domain.decide import name_taken
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.token import Token
from service.domain.values import Mode
from service.kernel import errnos, netlink, tundev
from service.kernel.columns import Member, column, cut
from service.kernel.netlink import Mark, NetlinkError

# Interfaces that go through their steps together: bounds how long ago a token was checked when a step relies on it.
TOGETHER_MAX = 256
DEVICES_MAX = 128  # descriptors open at once while devices are made; the usual limit of a process is 1,024
# Links deleted as one. The kernel holds its lock over all links that long: 0.3 s for 1,000.
GROUP_MAX = 1024
GROUP_TRIES = 3  # groups tried before the links are deleted one by one

CAUGHT = (TunledgerError, OSError, *errnos.UNREADABLE)


class Batch:
    """Carries out one batch.

    Args:
        vouched: whether the link with this ifindex is, without a doubt, the one that bore our token.
        choose: picks a link group to delete through.
        open_node: opens the device node at a path, in the network namespace that `route` is of.
    """

    def __init__(
        self,
        route: netlink.RouteSocket,
        tun_path: str,
        vouched: Callable[[int, Token], bool],
        choose: Callable[[Sequence[int]], int],
        open_node: Callable[[str], int] = tundev.open_node,
    ) -> None:
        self._route = route
        self._tun_path = tun_path
        self._vouched = vouched
        self._choose = choose
        self._open_node = open_node

    def run(self, work: Sequence[tuple[Token, Sequence[st.Step]]]) -> list[TunledgerError | None]:
        """Carry out all steps, of each interface in order until one fails; the errors, in the order of `work`."""
        members = [Member(token, steps) for token, steps in work]
        self._delete([m for m in members if m.goes_on and isinstance(m.step, st.DeleteLink)])
        for together in cut(members, TOGETHER_MAX):
            while any(member.goes_on for member in together):
                for part in column(together):
                    match part[0].step:
                        case st.DeleteLink():
                            self._delete(part)
                        case st.CreateLink():
                            self._create(part)
                        case _:
                            self._change(part)
        return [member.error for member in members]

    # -- create

    def _create(self, members: Sequence[Member]) -> None:
        """EXCL, owner, group, alias, and only then PERSIST: a crash before it leaves nothing behind."""
        waiting = _begun(members)
        while waiting:
            opened: list[tuple[Member, int]] = []
            try:
                waiting = self._open_nodes(waiting, opened)
                for member, fd in opened:
                    self._make(member, fd)
                self._mark(opened)
                for member, fd in opened:
                    _keep(member, fd)
            finally:
                for _member, fd in opened:
                    os.close(fd)
            _end([member for member, _fd in opened])

    def _open_nodes(self, members: Sequence[Member], opened: list[tuple[Member, int]]) -> list[Member]:
        """Open the device node for as many as may be at once; gives those who have to wait until these are done."""
        for number, member in enumerate(members):
            if len(opened) == DEVICES_MAX:
                return list(members[number:])
            try:
                opened.append((member, self._open_node(self._tun_path)))
            except TunledgerError as error:  # the namespace could not be entered
                if opened and error.errno_name in {"EMFILE", "ENFILE"}:
                    return list(members[number:])
                member.error = error
            except OSError as error:
                if opened and error.errno in {errno.EMFILE, errno.ENFILE}:
                    return list(members[number:])
                member.error = errnos.no_device_node(self._tun_path, error.errno or errno.EIO)
                member.error.__cause__ = error
        return []

    def _make(self, member: Member, fd: int) -> None:
        step = member.step
        assert isinstance(step, st.CreateLink)
        try:
            try:
                tundev.attach(fd, step.name, step.mode, multi_queue=step.multi_queue, exclusive=True)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise name_taken(step.name) from error
                raise
            failpoints.reach("kernel.create.made", fails=True)
            if step.owner is not None:
                tundev.set_owner(fd, step.owner)
            if step.group is not None:
                tundev.set_group(fd, step.group)
            member.ifindex = attached_index(self._route, fd, step.name)
        except CAUGHT as error:
            _fail(member, error)

    def _mark(self, opened: Sequence[tuple[Member, int]]) -> None:
        messages = []
        marked = [member for member, _fd in opened if member.error is None]
        for member in marked:
            assert isinstance(member.step, st.CreateLink)
            messages.append(netlink.alias_message(_checked(member), str(member.step.token)))
        for member, refusal in zip(marked, self._route.change_many(messages), strict=True):
            if refusal is not None:
                _fail(member, refusal)

    # -- delete

    def _delete(self, members: Sequence[Member]) -> None:
        """By ifindex, after a last look at the token; a link that is gone already is no error."""
        for together in cut(_begun(members), GROUP_MAX):
            homes: dict[int, int] = {}
            left = self._delete_as_group(together, homes) if len(together) > 1 else together
            for member in left:
                self._delete_one(member)
            self._send_home([m for m in together if m.error is not None], homes)
            _end(together)

    def _delete_one(self, member: Member) -> None:
        step = _deletion(member)
        try:
            body = self._route.get(netlink.RTM_GETLINK, netlink.link_request(ifindex=step.ifindex))
            if body is None:
                return
            if _read(body).token != step.token:
                raise name_taken(step.name)
            try:
                self._route.change(netlink.link_message(netlink.RTM_DELLINK, step.ifindex))
            except NetlinkError as error:
                if error.errno != errno.ENODEV:
                    raise
        except CAUGHT as error:
            _fail(member, error)

    def _delete_as_group(self, members: Sequence[Member], homes: dict[int, int]) -> list[Member]:
        """Move links into a group that nobody is in, look that it holds nothing else, delete the group.

        rtnl_group_dellink in net/core/rtnetlink.c takes whoever is in the group, so the look comes last of all; but the
        kernel has no way to look and delete as one. What is left is the moment between two system calls in which
        somebody would have to put a link into a group that was picked at random.

        Args:
            homes: filled with the group that each moved link was in before, by ifindex.

        Returns:
            Those that are still to be deleted, one by one.
        """
        leaving = {_deletion(member).ifindex: member for member in members}
        left = [member for member in members if leaving[_deletion(member).ifindex] is not member]
        try:
            for _ in range(GROUP_TRIES):
                group = self._gather(leaving, left, homes)
                if not leaving:
                    break
                failpoints.reach("kernel.group.moved", fails=True)
                if not self._is_ours_alone(group, leaving, left):
                    continue
                self._route.change(netlink.link_message(netlink.RTM_DELLINK, 0, [(netlink.IFLA_GROUP, group)]))
                failpoints.reach("kernel.group.deleted")
                leaving.clear()
                break
        except OSError:
            pass  # one by one, then, each with its own error
        return [*left, *leaving.values()]

    def _gather(self, leaving: dict[int, Member], left: list[Member], homes: dict[int, int]) -> int:
        """Have the links that bear their token in a group of their own, as far as the kernel tells. Gives the group."""
        used: set[int] = set()
        for data, start, stop in self._dump():
            used |= netlink.possible_groups(data, start, stop)
        links = self._links(leaving)
        chosen = self._choose(st.REMOVAL_GROUPS)
        around = itertools.chain(range(chosen, st.REMOVAL_GROUPS.stop), st.REMOVAL_GROUPS)
        group = next((group for group in around if group not in used), 0)
        if not group:
            raise NetlinkError(errno.EBUSY, "every link group that is for removals is in use")
        for ifindex, member in list(leaving.items()):
            link = links.get(ifindex)
            if link is None:
                del leaving[ifindex]
            elif link.token != _deletion(member).token:
                _fail(leaving.pop(ifindex), name_taken(member.step.name))
            else:
                homes.setdefault(ifindex, 0 if link.link_group in st.REMOVAL_GROUPS else link.link_group)
        messages = [_group_message(ifindex, group) for ifindex in leaving]
        for ifindex, refusal in zip(list(leaving), self._route.change_many(messages), strict=True):
            if refusal is not None:
                left.append(leaving.pop(ifindex))
        return group

    def _is_ours_alone(self, group: int, leaving: dict[int, Member], left: list[Member]) -> bool:
        """Whether all in the group are links of ours that are to leave. Whoever lost the token meanwhile stays in it,
        and the group with them, until they are sent home."""
        maybe = [message for message in self._dump() if group in netlink.possible_groups(*message)]
        inside = {link.ifindex: link for link in (_read(*message) for message in maybe) if link.link_group == group}
        for ifindex, member in list(leaving.items()):
            link = inside.get(ifindex)
            if link is None:  # gone, or somebody took it out of the group
                left.append(leaving.pop(ifindex))
            elif link.token != _deletion(member).token:
                _fail(leaving.pop(ifindex), name_taken(member.step.name))
        return bool(leaving) and inside.keys() == leaving.keys()

    def _send_home(self, members: Sequence[Member], homes: dict[int, int]) -> None:
        """Put links that we moved and that stay back into the group they were in; nothing that is elsewhere now."""
        moved = [ifindex for ifindex in (_deletion(member).ifindex for member in members) if ifindex in homes]
        requests = [netlink.link_request(ifindex=ifindex) for ifindex in moved]
        messages = []
        for ifindex, body in zip(moved, self._route.get_many(netlink.RTM_GETLINK, requests), strict=True):
            with contextlib.suppress(NetlinkError):
                if isinstance(body, bytes) and _read(body).link_group in st.REMOVAL_GROUPS:
                    messages.append(_group_message(ifindex, homes[ifindex]))
        self._route.change_many(messages)  # one that fails is gone, or found by the next look at our links

    def _dump(self) -> list[tuple[bytes, int, int]]:
        return self._route.dump(netlink.RTM_GETLINK, netlink.link_request())

    def _links(self, indexes: Collection[int]) -> dict[int, Mark]:
        """Those of these links that are there."""
        requests = [netlink.link_request(ifindex=ifindex) for ifindex in indexes]
        found: dict[int, Mark] = {}
        for ifindex, body in zip(indexes, self._route.get_many(netlink.RTM_GETLINK, requests), strict=True):
            if isinstance(body, NetlinkError):
                raise body
            if body is not None:
                found[ifindex] = _read(body)
        return found

    # -- change

    def _change(self, members: Sequence[Member]) -> None:
        begun = _begun(members)
        self._check([member for member in begun if member.ifindex is None])
        sent: list[Member] = []
        messages: list[bytearray] = []
        for member in begun:
            if member.error is None:
                try:
                    message = self._message(member.step, _checked(member))
                except CAUGHT as error:
                    _fail(member, error)
                    continue
                if message is not None:
                    sent.append(member)
                    messages.append(message)
        for member, refusal in zip(sent, self._route.change_many(messages), strict=True):
            if refusal is not None:
                _judge(member, refusal)
        _end(begun)

    def _check(self, members: Sequence[Member]) -> None:
        """Find the link of each, and see our token on it."""
        requests = [
            netlink.link_request(ifindex=step.ifindex)
            if isinstance(step, st.SetAlias)
            else netlink.link_request(_present_name(step))
            for step in (member.step for member in members)
        ]
        for member, body in zip(members, self._route.get_many(netlink.RTM_GETLINK, requests), strict=True):
            try:
                member.ifindex = self._judged(member, body)
            except CAUGHT as error:
                _fail(member, error)

    def _judged(self, member: Member, body: bytes | NetlinkError | None) -> int:
        step, name = member.step, _present_name(member.step)
        if body is None:
            raise errnos.gone(name)
        if isinstance(body, NetlinkError):
            raise body
        link = _read(body)
        if link.token == member.token:
            return link.ifindex
        is_it = isinstance(step, st.SetAlias) and step.token == member.token and link.name == name
        if not is_it or not link.is_tun or not self._vouched(link.ifindex, member.token):
            raise name_taken(name)
        return link.ifindex

    def _message(self, step: st.Step, ifindex: int) -> bytearray | None:
        """What to send for a step; None if there is nothing to send."""
        link = netlink.link_message
        match step:
            case st.SetMtu():
                return link(netlink.RTM_SETLINK, ifindex, [(netlink.IFLA_MTU, step.mtu)])
            case st.SetTxQueueLen():
                return link(netlink.RTM_SETLINK, ifindex, [(netlink.IFLA_TXQLEN, step.txqueuelen)])
            case st.SetMac():
                return netlink.mac_message(ifindex, step.mac)
            case st.SetUp():
                return link(netlink.RTM_SETLINK, ifindex, up=True)
            case st.SetDown():
                return link(netlink.RTM_SETLINK, ifindex, up=False)
            case st.SetName():
                return netlink.name_message(ifindex, step.name)
            case st.SetAlias():
                return netlink.alias_message(ifindex, str(step.token))
            case st.SetLinkGroup():
                return _group_message(ifindex, step.group)
            case st.AddAddress():
                return netlink.address_message(netlink.RTM_NEWADDR, ifindex, step.address)
            case st.RemoveAddress():
                return netlink.address_message(netlink.RTM_DELADDR, ifindex, step.address)
            case st.SetOwner():
                self._set_owner(step, ifindex)
                return None
            case (
                st.StartProcessing()
                | st.ConfigureProcessing()
                | st.StopProcessing()
                | st.CreateLink()
                | st.DeleteLink()
            ):
                raise TunledgerError(ErrorCode.INTERNAL, f"{step} is not for the kernel to change a link with")
            case _:
                assert_never(step)

    def _set_owner(self, step: st.SetOwner, ifindex: int) -> None:
        found = self._route.get(netlink.RTM_GETLINK, netlink.link_request(ifindex=ifindex))
        if found is None:
            raise errnos.gone(step.name)
        link = netlink.read_link(found, 0, len(found))
        if link.mode is None:
            raise errnos.gone(step.name)
        fd = attach_present(
            self._route, self._tun_path, link.name, link.mode, link.multi_queue, ifindex, self._open_node
        )
        try:
            if step.owner is not None:
                tundev.set_owner(fd, step.owner)
            if step.group is not None:
                tundev.set_group(fd, step.group)
        finally:
            os.close(fd)


def attach_present(
    route: netlink.RouteSocket,
    tun_path: str,
    name: str,
    mode: Mode,
    multi_queue: bool,
    ifindex: int,
    open_node: Callable[[str], int] = tundev.open_node,
    *,
    vnet_hdr: bool = False,
) -> int:
    """A descriptor on the device with this ifindex, and on none that has its name by now.

    Raises:
        TunledgerError: device_busy, tun_missing, permission_denied.
        OSError: ENODEV if the device is gone; else as TUNSETIFF.
    """
    try:
        fd = open_node(tun_path)
    except OSError as error:
        raise errnos.no_device_node(tun_path, error.errno or errno.EIO) from error
    try:
        try:
            tundev.attach(fd, name, mode, multi_queue=multi_queue, exclusive=False, vnet_hdr=vnet_hdr)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise errnos.busy(name) from error
            raise
        if attached_index(route, fd) != ifindex:
            # Gone since the check: TUNSETIFF made an empty one in its place, which goes with this descriptor.
            raise errnos.gone(name)
    except BaseException:
        os.close(fd)
        raise
    return fd


def attached_index(route: netlink.RouteSocket, fd: int, attached_as: str | None = None) -> int:
    """The ifindex of the device behind a descriptor. No ioctl tells it: by the name, if that is the same afterwards.

    Args:
        attached_as: the name that it had just now, if that is known.
    """
    name = tundev.attached_name(fd) if attached_as is None else attached_as
    ifindex = route.index_of(name)
    if tundev.attached_name(fd) != name:
        raise errnos.gone(name)
    return ifindex


def _keep(member: Member, fd: int) -> None:
    if member.error is None:
        try:
            failpoints.reach("kernel.create.marked", fails=True)
            tundev.set_persist(fd)
            failpoints.reach("kernel.create.persistent")
        except CAUGHT as error:
            _fail(member, error)


def _begun(members: Collection[Member]) -> list[Member]:
    """Those of which nothing kept the step from beginning."""
    for member in members:
        try:
            failpoints.reach(f"kernel.{type(member.step).__name__}.before", fails=True)
        except OSError as error:
            _fail(member, error)
    return [member for member in members if member.error is None]


def _end(members: Collection[Member]) -> None:
    for member in members:
        if member.error is None:
            failpoints.reach(f"kernel.{type(member.step).__name__}.after")
            if isinstance(member.step, st.DeleteLink):
                member.ifindex = None
            member.at += 1


def _fail(member: Member, error: Exception) -> None:
    member.error = errnos.in_words(member.step, error)


def _judge(member: Member, refusal: NetlinkError) -> None:
    """What the kernel refused, unless that is as good as done."""
    match member.step:
        # ENXIO: an MTU under 1280 has taken IPv6 off the link, and the address with it.
        case st.RemoveAddress() if refusal.errno in {errno.EADDRNOTAVAIL, errno.ENXIO}:
            pass
        case st.SetName(name=name) if refusal.errno == errno.EEXIST:
            _fail(member, name_taken(name))
        case _:
            _fail(member, refusal)


def _checked(member: Member) -> int:
    assert member.ifindex is not None
    return member.ifindex


def _deletion(member: Member) -> st.DeleteLink:
    assert isinstance(member.step, st.DeleteLink)
    return member.step


def _present_name(step: st.Step) -> str:
    """The name that a step's link has before the step."""
    return step.old if isinstance(step, st.SetName) else step.name


def _group_message(ifindex: int, group: int) -> bytearray:
    return netlink.link_message(netlink.RTM_SETLINK, ifindex, [(netlink.IFLA_GROUP, group)])


def _read(data: bytes, start: int = 0, stop: int | None = None) -> Mark:
    try:
        return netlink.read_mark(data, start, len(data) if stop is None else stop)
    except errnos.UNREADABLE as error:
        raise NetlinkError(errno.EBADMSG, f"the kernel's answer does not read: {error}") from error
