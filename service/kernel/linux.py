"""The real kernel: looks at links and has steps carried out, through netlink and /dev/net/tun.

Blocking; meant for the one applier thread, whose network namespace it works in. How steps are carried out is
`batch`'s business; one interface is a batch of one.
"""

import errno
import os
import platform
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Sequence

from service.domain import steps as st
from service.domain.decide import name_taken
from service.domain.errors import TunledgerError
from service.domain.observed import Host, HostNetwork, Observed, ObservedLink
from service.domain.spec import Offloads
from service.domain.token import Token
from service.kernel import errnos, netlink, tundev
from service.kernel.batch import Batch, attach_present
from service.kernel.errnos import said
from service.kernel.netlink import NetlinkError

# Up to so many links are asked for their addresses one by one; beyond, all addresses are read and most passed over.
FEW = 4


class LinuxKernel:
    """One network namespace: the one the thread is in when it first calls, or the one that the openers open in.

    Args:
        open_node, open_socket: open the device node, and a netlink socket, in the namespace.
        vouched: whether the link with this ifindex is without a doubt the one that bore our token, although it does not
            now; asked by `SetAlias`, in the thread that carries it out.
        choose: picks a link group, of thousands, to delete links through.
    """

    def __init__(
        self,
        tun_path: str = tundev.TUN_PATH,
        *,
        vouched: Callable[[int, Token], bool] = lambda _ifindex, _token: False,
        choose: Callable[[Sequence[int]], int] = secrets.choice,
        open_node: Callable[[str], int] = tundev.open_node,
        open_socket: Callable[[], netlink.RouteSocket] = netlink.RouteSocket,
    ) -> None:
        self._tun_path = tun_path
        self._vouched = vouched
        self._choose = choose
        self._open_node, self._open_socket = open_node, open_socket
        self._socket: netlink.RouteSocket | None = None
        self._tells_origin = _kernel_release() >= (5, 18)  # IFA_PROTO
        self._reader, self._sampler = (netlink.LinkReader(tells_origin=self._tells_origin) for _ in range(2))

    def close(self) -> None:
        """Close the netlink socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def _route(self) -> netlink.RouteSocket:
        if self._socket is None:
            try:
                self._socket = self._open_socket()
            except OSError as error:
                raise errnos.refused("open a netlink socket", error.errno or errno.EIO) from error
        return self._socket

    def observe(self, names: Collection[str] | None = None) -> Observed:
        """The links of these names, or all, each with its addresses and counters.

        Raises:
            TunledgerError: kernel_refused.
        """
        with said("look at the links"):
            links = self._all() if names is None else self._named(names).values()
            return Observed({link.name: link for link in links}, complete=names is None)

    def sample(self) -> list[ObservedLink]:
        """All TUN and TAP links with their counters, without addresses: one request."""
        with said("read the counters"):
            return [link for link in self._sampler.read_all(self._dump_links(), {}) if link.mode is not None]

    def survey(self, names: Collection[str], node: str, *, networks: bool) -> Host:
        """What commands on these names are judged against: strangers that have them, and (if asked for) the networks
        that links other than ours use.

        Raises:
            TunledgerError: kernel_refused.
        """
        with said("look at the host"):
            named = self._named(names)
            occupants = {name: link for name, link in named.items() if not _is_ours(link, node)}
            return Host(occupants, tuple(self._networks(node)) if networks else ())

    def execute(self, token: Token, steps: Sequence[st.Step]) -> None:
        """Carry out steps on one interface, in order, until one fails. Processing steps are not for the kernel.

        Raises:
            TunledgerError: the kernel's refusal, naming the step; those before it have been done.
        """
        (error,) = self.execute_many([(token, steps)])
        if error is not None:
            raise error

    def execute_many(self, work: Sequence[tuple[Token, Sequence[st.Step]]]) -> list[TunledgerError | None]:
        """Carry out the steps of many interfaces at once, those of each in order until one fails.

        An interface that fails, fails alone. Each may be in `work` once: the steps of different interfaces are done
        in no order that could be relied on, but that links whose first step is to be deleted go before all else.

        Returns:
            For each, in the order of `work`: the kernel's refusal, naming the step, or None.
        """
        try:
            return Batch(self._route, self._tun_path, self._vouched, self._choose, self._open_node).run(work)
        except TunledgerError as error:  # there is no socket: nothing was done
            return [error] * len(work)

    def open_device(self, step: st.StartProcessing, token: Token) -> int:
        """A descriptor attached to our device, for the worker to read. The caller owns and closes it.

        Unless offloads are off, its packets come and go behind a virtio_net_hdr, as large as this kernel makes them.

        Raises:
            TunledgerError: device_busy (naming the holder), device_gone, tun_missing, permission_denied.
        """
        with said(f"open {step.name}"):
            body = self._route.get(netlink.RTM_GETLINK, netlink.link_request(step.name))
            if body is None:
                raise errnos.gone(step.name)
            link = netlink.read_link(body, 0, len(body))
            if link.token != token:
                raise name_taken(step.name)
            offloads = step.processing.offloads is Offloads.AUTO
            fd = attach_present(
                self._route,
                self._tun_path,
                step.name,
                step.mode,
                step.multi_queue,
                link.ifindex,
                self._open_node,
                vnet_hdr=offloads,
            )
            try:
                tundev.offer(fd, offloads=offloads)
            except BaseException:
                os.close(fd)
                raise
            return fd

    # -- looking

    def _dump_links(self) -> Iterator[bytes]:
        dumped = self._route.dump(netlink.RTM_GETLINK, netlink.link_request())
        return (data[start:stop] for data, start, stop in dumped)

    def _all(self) -> list[ObservedLink]:
        bodies = self._dump_links()
        return self._reader.read_all(bodies, self._addresses())

    def _named(self, names: Collection[str]) -> dict[str, ObservedLink]:
        """By the name asked for: a link also answers to its alternative names."""
        requests = [netlink.link_request(name) for name in names]
        bodies: dict[str, bytes] = {}
        for name, body in zip(names, self._route.get_many(netlink.RTM_GETLINK, requests), strict=True):
            if isinstance(body, NetlinkError):
                raise body
            if body is not None:
                bodies[name] = body
        indexes = {netlink.ifindex_of(body) for body in bodies.values()}
        addresses: dict[int, list[bytes]] = {}
        if len(indexes) > FEW:
            addresses = self._addresses()
        else:
            for ifindex in indexes:
                addresses |= self._addresses(ifindex)
        links = {link.ifindex: link for link in self._reader.read(bodies.values(), addresses)}
        return {name: links[netlink.ifindex_of(body)] for name, body in bodies.items()}

    def _addresses(self, ifindex: int = 0) -> dict[int, list[bytes]]:
        """The messages that tell addresses, by ifindex, of one link or of all."""
        found: dict[int, list[bytes]] = {}
        try:
            messages = self._route.dump(netlink.RTM_GETADDR, netlink.address_request(ifindex))
        except NetlinkError as error:
            if ifindex and error.errno == errno.ENODEV:  # gone since it was seen: then it has none
                return found
            raise
        for data, start, stop in messages:
            found.setdefault(netlink.ifindex_of(data, start), []).append(data[start:stop])
        return found

    def _networks(self, node: str) -> Iterator[HostNetwork]:
        strangers = {link.ifindex: link.name for link in self._all() if not _is_ours(link, node)}
        for index, messages in self._addresses().items():
            for message in messages if index in strangers else ():
                _, address, _ = netlink.read_address(message, 0, len(message), tells_origin=self._tells_origin)
                if not (address.version == 6 and address.ip.is_link_local):
                    yield HostNetwork(address.network, index, strangers[index], "address")
        for data, start, stop in self._route.dump(netlink.RTM_GETROUTE, netlink.route_request()):
            route = netlink.read_route(data, start, stop, strangers)
            if route is not None:
                for index in route[1]:
                    if index in strangers:
                        yield HostNetwork(route[0], index, strangers[index], "route")


def _is_ours(link: ObservedLink, node: str) -> bool:
    return link.token is not None and link.token.node == node


def _kernel_release() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return (int(found[1]), int(found[2])) if found else (0, 0)
