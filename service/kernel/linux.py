"""The real kernel: looks at links and carries out steps, through netlink and /dev/net/tun.

Blocking; meant for the one applier thread, whose network namespace it works in. It decides nothing: each step says
all there is to do. What it does guard is the last moment: nothing without our token is changed, and links are
addressed by ifindex from the check on.
"""

import contextlib
import errno
import os
import platform
import re
import socket
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import assert_never

from service import failpoints
from service.domain import steps as st
from service.domain.decide import name_taken
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import Host, HostNetwork, Observed, ObservedLink
from service.domain.token import Token
from service.domain.values import Address, Mode
from service.kernel import errnos, netlink, tundev
from service.kernel.netlink import NetlinkError


class LinuxKernel:
    """One network namespace: the one the thread is in when it first calls."""

    def __init__(self, tun_path: str = tundev.TUN_PATH) -> None:
        self._tun_path = tun_path
        self._socket: netlink.RouteSocket | None = None
        self._tells_origin = _kernel_release() >= (5, 18)  # IFA_PROTO

    def close(self) -> None:
        """Close the netlink socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def _route(self) -> netlink.RouteSocket:
        if self._socket is None:
            try:
                self._socket = netlink.RouteSocket()
            except OSError as error:
                raise errnos.refused("open a netlink socket", error.errno or errno.EIO) from error
        return self._socket

    def observe(self, names: Collection[str] | None = None) -> Observed:
        """The links of these names, or all, each with its addresses and counters.

        Raises:
            TunledgerError: kernel_refused.
        """
        with _said("look at the links"):
            if names is not None:
                found = (self._link(name) for name in names)
                return Observed({link.name: link for link in found if link is not None}, complete=False)
            links = [netlink.read_link(*message) for message in self._dump_links()]
            addresses = self._addresses(0)
            return Observed(
                {link.name: replace(link, addresses=tuple(addresses.get(link.ifindex, ()))) for link in links}
            )

    def sample(self) -> list[ObservedLink]:
        """All TUN and TAP links with their counters, without addresses: one request."""
        with _said("read the counters"):
            links = (netlink.read_link(*message) for message in self._dump_links())
            return [link for link in links if link.mode is not None]

    def survey(self, name: str, node: str, *, networks: bool) -> Host:
        """What a command on `name` is judged against: a stranger with that name, and (if asked for) the networks
        that links other than ours use.

        Raises:
            TunledgerError: kernel_refused.
        """
        with _said("look at the host"):
            link = self._link(name)
            occupants = {name: link} if link is not None and not _is_ours(link, node) else {}
            if not networks:
                return Host(occupants)
            links = {m.ifindex: m for m in (netlink.read_link(*message) for message in self._dump_links())}
            strangers = {index: m.name for index, m in links.items() if not _is_ours(m, node)}
            return Host(occupants, tuple(self._networks(strangers)))

    def execute(self, token: Token, steps: Sequence[st.Step]) -> None:
        """Carry out steps on one interface, in order, until one fails. Processing steps are not for the kernel.

        Raises:
            TunledgerError: the kernel's refusal, naming the step; those before it have been done.
        """
        ifindex: int | None = None
        for step in steps:
            failpoints.reach(f"kernel.{type(step).__name__}.before")
            with _said(str(step)):
                if isinstance(step, st.CreateLink):
                    ifindex = self._create(step)
                elif isinstance(step, st.DeleteLink):
                    self._delete(step)
                    ifindex = None
                else:
                    if ifindex is None:
                        ifindex = self._checked_index(_present_name(step), token)
                    self._change(step, ifindex)
            failpoints.reach(f"kernel.{type(step).__name__}.after")

    def open_device(self, step: st.StartProcessing, token: Token) -> int:
        """A descriptor attached to our device, for the worker to read. The caller owns and closes it.

        Raises:
            TunledgerError: device_busy (naming the holder), device_gone, tun_missing, permission_denied.
        """
        with _said(f"open {step.name}"):
            ifindex = self._checked_index(step.name, token)
            return self._attach(step, ifindex)

    # -- looking

    def _dump_links(self) -> list[tuple[bytes, int, int]]:
        return self._route.dump(netlink.RTM_GETLINK, netlink.link_request())

    def _link(self, name: str) -> ObservedLink | None:
        message = self._route.get(netlink.RTM_GETLINK, netlink.link_request(name))
        if message is None:
            return None
        link = netlink.read_link(*message)
        return replace(link, addresses=tuple(self._addresses(link.ifindex).get(link.ifindex, ())))

    def _addresses(self, ifindex: int) -> dict[int, list[Address]]:
        found: dict[int, list[Address]] = {}
        try:
            messages = self._route.dump(netlink.RTM_GETADDR, netlink.address_request(ifindex))
        except NetlinkError as error:
            if error.errno == errno.ENODEV:  # gone since it was seen: then it has none
                return found
            raise
        for message in messages:
            index, address, kernel_made = netlink.read_address(*message, tells_origin=self._tells_origin)
            if not kernel_made:
                found.setdefault(index, []).append(address)
        return found

    def _networks(self, strangers: dict[int, str]) -> Iterator[HostNetwork]:
        for message in self._route.dump(netlink.RTM_GETADDR, netlink.address_request()):
            index, address, _ = netlink.read_address(*message, tells_origin=self._tells_origin)
            if index in strangers and not (address.version == 6 and address.ip.is_link_local):
                yield HostNetwork(address.network, index, strangers[index], "address")
        for message in self._route.dump(netlink.RTM_GETROUTE, netlink.route_request()):
            route = netlink.read_route(*message)
            if route is not None:
                for index in route[1]:
                    if index in strangers:
                        yield HostNetwork(route[0], index, strangers[index], "route")

    def _checked_index(self, name: str, token: Token) -> int:
        """The ifindex behind a name, after seeing our token on it."""
        message = self._route.get(netlink.RTM_GETLINK, netlink.link_request(name))
        if message is None:
            raise NetlinkError(errno.ENODEV, f"{name} does not exist any more")
        link = netlink.read_link(*message)
        if link.token != token:
            raise name_taken(name)
        return link.ifindex

    # -- changing

    def _create(self, step: st.CreateLink) -> int:
        """EXCL, owner, group, alias, and only then PERSIST: a crash before it leaves nothing behind."""
        fd = self._open_node()
        try:
            try:
                tundev.attach(fd, step.name, step.mode, multi_queue=step.multi_queue, exclusive=True)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise name_taken(step.name) from error
                raise
            failpoints.reach("kernel.create.made")
            if step.owner is not None:
                tundev.set_owner(fd, step.owner)
            if step.group is not None:
                tundev.set_group(fd, step.group)
            ifindex = socket.if_nametoindex(tundev.attached_name(fd))
            self._route.change(netlink.alias_message(ifindex, str(step.token)))
            failpoints.reach("kernel.create.marked")
            tundev.set_persist(fd)
            failpoints.reach("kernel.create.persistent")
            return ifindex
        finally:
            os.close(fd)

    def _delete(self, step: st.DeleteLink) -> None:
        """By ifindex, after a last look at the token; a link that is gone already is no error."""
        message = self._route.get(netlink.RTM_GETLINK, netlink.link_request(ifindex=step.ifindex))
        if message is None:
            return
        if netlink.read_link(*message).token != step.token:
            raise name_taken(step.name)
        try:
            self._route.change(netlink.link_message(netlink.RTM_DELLINK, step.ifindex))
        except NetlinkError as error:
            if error.errno != errno.ENODEV:
                raise

    def _change(self, step: st.Step, ifindex: int) -> None:
        change, link = self._route.change, netlink.link_message
        match step:
            case st.SetMtu():
                change(link(netlink.RTM_SETLINK, ifindex, [("IFLA_MTU", step.mtu)]))
            case st.SetTxQueueLen():
                change(link(netlink.RTM_SETLINK, ifindex, [("IFLA_TXQLEN", step.txqueuelen)]))
            case st.SetMac():
                change(link(netlink.RTM_SETLINK, ifindex, [("IFLA_ADDRESS", step.mac)]))
            case st.SetUp():
                change(link(netlink.RTM_SETLINK, ifindex, up=True))
            case st.SetDown():
                change(link(netlink.RTM_SETLINK, ifindex, up=False))
            case st.SetName():
                self._rename(step, ifindex)
            case st.SetOwner():
                self._set_owner(step, ifindex)
            case st.AddAddress():
                change(netlink.address_message(netlink.RTM_NEWADDR, ifindex, step.address))
            case st.RemoveAddress():
                try:
                    change(netlink.address_message(netlink.RTM_DELADDR, ifindex, step.address))
                except NetlinkError as error:
                    # ENXIO: an MTU under 1280 has taken IPv6 off the link, and the address with it.
                    if error.errno not in {errno.EADDRNOTAVAIL, errno.ENXIO}:
                        raise
            case st.AdoptLink():
                pass
            case st.StartProcessing() | st.StopProcessing() | st.CreateLink() | st.DeleteLink():
                raise TunledgerError(ErrorCode.INTERNAL, f"{step} is not for the kernel to change a link with")
            case _:
                assert_never(step)

    def _rename(self, step: st.SetName, ifindex: int) -> None:
        message = netlink.link_message(netlink.RTM_SETLINK, ifindex, [("IFLA_IFNAME", step.name)])
        try:
            self._route.change(message)
        except NetlinkError as error:
            if error.errno == errno.EEXIST:
                raise name_taken(step.name) from error
            raise

    def _set_owner(self, step: st.SetOwner, ifindex: int) -> None:
        found = self._route.get(netlink.RTM_GETLINK, netlink.link_request(ifindex=ifindex))
        if found is None:
            raise NetlinkError(errno.ENODEV, f"{step.name} does not exist any more")
        link = netlink.read_link(*found)
        assert link.mode is not None
        fd = self._attach_named(link.name, link.mode, link.multi_queue, ifindex)
        try:
            if step.owner is not None:
                tundev.set_owner(fd, step.owner)
            if step.group is not None:
                tundev.set_group(fd, step.group)
        finally:
            os.close(fd)

    def _attach(self, step: st.StartProcessing, ifindex: int) -> int:
        return self._attach_named(step.name, step.mode, step.multi_queue, ifindex)

    def _attach_named(self, name: str, mode: Mode, multi_queue: bool, ifindex: int) -> int:
        fd = self._open_node()
        try:
            try:
                tundev.attach(fd, name, mode, multi_queue=multi_queue, exclusive=False)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise errnos.busy(name) from error
                raise
            if socket.if_nametoindex(tundev.attached_name(fd)) != ifindex:
                # Gone since the check: TUNSETIFF made an empty one in its place, which goes with this descriptor.
                raise NetlinkError(errno.ENODEV, f"{name} does not exist any more")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _open_node(self) -> int:
        try:
            return tundev.open_node(self._tun_path)
        except OSError as error:
            raise errnos.no_device_node(self._tun_path, error.errno or errno.EIO) from error


def _present_name(step: st.Step) -> str:
    """The name that a step's link has before the step."""
    return step.old if isinstance(step, st.SetName) else step.name


def _is_ours(link: ObservedLink, node: str) -> bool:
    return link.token is not None and link.token.node == node


def _kernel_release() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(found[1]), int(found[2])) if found else (0, 0)


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Turn an OSError inside into the kernel's refusal of `what`."""
    try:
        yield
    except (struct.error, ValueError, IndexError) as error:
        raise TunledgerError(ErrorCode.KERNEL_REFUSED, f"{what}: the kernel's answer does not read: {error}") from error
    except OSError as error:
        words = error.strerror if isinstance(error, NetlinkError) else ""
        raise errnos.refused(what, error.errno or errno.EIO, words or "") from error
