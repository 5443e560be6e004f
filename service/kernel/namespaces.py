"""The kernel as the service sees it: its own network namespace, and those of other names that interfaces live in.

`HostKernel` gives each part of the work to the kernel of its namespace and puts the answers together; how a kernel does
its work is `linux`' business. It knows links by their keys: "tun0", or "blue/tun0" in the namespace blue. Nothing of
another namespace is held open between two calls: an open netlink socket keeps a namespace alive that others have
deleted (`ip netns del` only takes its name away).
"""

import contextlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from service.domain import steps as st
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import Host, HostNetwork, Observed, ObservedLink, link_key, parted_key
from service.domain.token import Token
from service.kernel import tundev
from service.kernel.doorway import NETNS_FOLDER, Doorway, Identity, identity_of, open_namespace, own_identity
from service.kernel.linux import LinuxKernel
from service.kernel.netlink import RouteSocket

LOOKED_THROUGH_MAX = 1024  # namespaces that are looked through for links of ours that nobody waits for

Work = Sequence[tuple[Token, Sequence[st.Step]]]
Attend = Callable[[str, Identity | None, int], None]


class OneKernel(Protocol):
    """The kernel of one network namespace; names are plain. See `linux.LinuxKernel`."""

    def observe(self, names: Collection[str] | None = None) -> Observed:
        """Links with these names, or all."""
        ...

    def sample(self) -> list[ObservedLink]:
        """All TUN and TAP links with their counters."""
        ...

    def survey(self, names: Collection[str], node: str, *, networks: bool) -> Host:
        """Who else holds these names, and which networks others use."""
        ...

    def execute_many(self, work: Work) -> list[TunledgerError | None]:
        """Carry out the steps of many interfaces; the errors, in the order of `work`."""
        ...

    def open_device(self, step: st.StartProcessing, token: Token) -> int:
        """A descriptor on our device."""
        ...

    def close(self) -> None:
        """Let go of what is held open."""
        ...


class Namespaces(Protocol):
    """The network namespaces that have names."""

    def present(self) -> Mapping[str, Identity]:
        """All of them but the service's own, at most LOOKED_THROUGH_MAX. What cannot be read is not there."""
        ...

    def entered(self, name: str, *, attended: bool = True) -> AbstractContextManager[OneKernel]:
        """The kernel of one of them, for the time of the context; everything of it is closed afterwards.

        Args:
            attended: what others change in it from now on is to be heard.

        Raises:
            TunledgerError: netns_missing, permission_denied, invalid_field, kernel_refused.
        """
        ...

    def require_home(self) -> None:
        """Raises TunledgerError if the calling thread is not in the service's own namespace, where it must be."""
        ...


class HostKernel:
    """See `service.reconcile.hands.Kernel`. For one thread, which is in the service's own network namespace."""

    def __init__(self, own: OneKernel, namespaces: Namespaces) -> None:
        self._own, self._namespaces = own, namespaces
        self._used: set[str] = set()  # namespaces that were asked for, or had a link with a token, and exist
        self._looked_through: dict[str, Identity] = {}  # namespaces without any token in them

    def close(self) -> None:
        """Let go of everything."""
        self._own.close()

    def observe(self, names: Collection[str] | None = None) -> Observed:
        """The links with these keys, or all: of the service's own namespace, of those in use, and of others those that
        bear a token.

        Raises:
            TunledgerError: kernel_refused. What keeps it from another namespace is in the answer.
        """
        self._namespaces.require_home()
        if names is None:
            return self._observe_all()
        own, inside = _parted(names)
        if not inside:
            return self._own.observe(names)
        links = dict(self._own.observe(own).links) if own else {}
        closed: dict[str, TunledgerError] = {}
        for netns, each in inside.items():
            self._look_into(netns, each, links, closed)
        return Observed(links, complete=False, closed=closed)

    def _observe_all(self) -> Observed:
        seen = self._own.observe()
        present = self._namespaces.present()
        links, closed = dict(seen.links), dict[str, TunledgerError]()
        in_use = sorted(self._used)
        self._used = {netns for netns in in_use if self._look_into(netns, None, links, closed)}
        self._looked_through = {n: i for n, i in self._looked_through.items() if present.get(n) == i}
        for netns, identity in present.items():
            if netns not in in_use and netns not in self._looked_through:
                self._look_through(netns, identity, links)
        return Observed(links, closed=closed)

    def _look_into(
        self,
        netns: str,
        names: Collection[str] | None,
        links: dict[str, ObservedLink],
        closed: dict[str, TunledgerError],
    ) -> bool:
        """Add what is in a namespace; whether there is such."""
        try:
            with self._entered(netns) as kernel:
                found = [replace(link, netns=netns) for link in kernel.observe(names).links.values()]
        except TunledgerError as error:
            if error.code is ErrorCode.NETNS_MISSING:
                return False
            closed[netns] = error
            return True
        links |= {link.key: link for link in found}
        return True

    def _look_through(self, netns: str, identity: Identity, links: dict[str, ObservedLink]) -> None:
        """Add what bears a token in a namespace that nobody asked for; one that cannot be entered holds none for us."""
        try:
            with self._namespaces.entered(netns, attended=False) as kernel:
                found = [link for link in kernel.observe().links.values() if link.token is not None]
        except TunledgerError:
            return
        if found:
            self._used.add(netns)
            links |= {link_key(netns, link.name): replace(link, netns=netns) for link in found}
        else:
            self._looked_through[netns] = identity

    def sample(self) -> list[ObservedLink]:
        """All TUN and TAP links with their counters; those of namespaces that cannot be entered now are left out."""
        self._namespaces.require_home()
        found = self._own.sample()
        for netns in sorted(self._used):
            with contextlib.suppress(TunledgerError), self._namespaces.entered(netns) as kernel:
                found += [replace(link, netns=netns) for link in kernel.sample()]
        return found

    def survey(self, names: Collection[str], node: str, *, networks: bool) -> Host:
        """What commands on links with these keys are judged against, in each namespace on its own.

        Raises:
            TunledgerError: kernel_refused.
        """
        self._namespaces.require_home()
        own, inside = _parted(names)
        if not inside:
            return self._own.survey(names, node, networks=networks)
        occupants: dict[str, ObservedLink] = {}
        used: list[HostNetwork] = []
        if own:
            host = self._own.survey(own, node, networks=networks)
            occupants |= host.occupants
            used += host.networks
        closed: dict[str, TunledgerError] = {}
        for netns, each in inside.items():
            try:
                with self._entered(netns) as kernel:
                    host = kernel.survey(each, node, networks=networks)
            except TunledgerError as error:
                closed[netns] = error
                continue
            occupants |= {link_key(netns, name): replace(link, netns=netns) for name, link in host.occupants.items()}
            used += [replace(network, netns=netns) for network in host.networks]
        return Host(occupants, tuple(used), closed)

    def execute(self, token: Token, steps: Sequence[st.Step]) -> None:
        """Carry out the steps of one interface. Raises TunledgerError, naming the step."""
        (error,) = self.execute_many([(token, steps)])
        if error is not None:
            raise error

    def execute_many(self, work: Work) -> list[TunledgerError | None]:
        """Carry out the steps of many interfaces, each in its order until one fails: one batch for each namespace, and
        another round for interfaces that go from one to the next.
        """
        try:
            self._namespaces.require_home()
        except TunledgerError as lost:
            return [lost] * len(work)
        if not any(steps and (_netns(steps[0]) or _netns(steps[-1])) for _token, steps in work):
            return self._own.execute_many(work)
        parts = [_Parts(token, _by_namespace(steps)) for token, steps in work]
        while going := [part for part in parts if part.error is None and part.left]:
            together: dict[str | None, list[_Parts]] = {}
            for part in going:
                together.setdefault(part.left[0][0], []).append(part)
            for netns, members in together.items():
                errors = self._execute_in(netns, [(part.token, part.left[0][1]) for part in members])
                for part, part.error in zip(members, errors, strict=True):
                    part.left.pop(0)
        return [part.error for part in parts]

    def _execute_in(self, netns: str | None, work: Work) -> list[TunledgerError | None]:
        if netns is None:
            return self._own.execute_many(work)
        try:
            with self._entered(netns) as kernel:
                return kernel.execute_many(work)
        except TunledgerError as error:
            # Links go with their namespace: what is to be deleted is gone.
            missing = error.code is ErrorCode.NETNS_MISSING
            return [None if missing and _removes(steps) else _while(steps[0], error) for _token, steps in work]

    def open_device(self, step: st.StartProcessing, token: Token) -> int:
        """A descriptor of our device, which stays one of its namespace. Raises TunledgerError."""
        self._namespaces.require_home()
        if step.netns is None:
            return self._own.open_device(step, token)
        with self._entered(step.netns) as kernel:
            return kernel.open_device(step, token)

    def _entered(self, netns: str) -> AbstractContextManager[OneKernel]:
        self._used.add(netns)
        return self._namespaces.entered(netns)


@dataclass(slots=True)
class _Parts:
    """What is left of one interface's steps, by namespace, in order."""

    token: Token
    left: list[tuple[str | None, list[st.Step]]]
    error: TunledgerError | None = None


class RunNetns:
    """The namespaces under /run/netns.

    Args:
        attend: told of each that is used, before it is; without an identity, of one that was wanted and is not there.
            The descriptor is for the time of the call.
        vouched: as of `LinuxKernel`, with the namespace.
    """

    def __init__(
        self,
        *,
        attend: Attend = lambda _name, _identity, _fd: None,
        vouched: Callable[[int, Token, str], bool] = lambda _ifindex, _token, _netns: False,
        tun_path: str = tundev.TUN_PATH,
    ) -> None:
        self._attend, self._vouched, self._tun_path = attend, vouched, tun_path
        self._doorway = Doorway()
        self._kernels: dict[str, _Inside] = {}  # they remember what they read, and hold nothing open

    def require_home(self) -> None:
        """See `Doorway.require_home`."""
        self._doorway.require_home()

    def present(self) -> Mapping[str, Identity]:
        """See `Namespaces.present`."""
        found: dict[str, Identity] = {}
        with contextlib.suppress(OSError), os.scandir(NETNS_FOLDER) as entries:
            own = own_identity()
            for entry in entries:
                if len(found) == LOOKED_THROUGH_MAX:
                    break
                with contextlib.suppress(OSError):
                    identity = identity_of(entry.name)
                    if identity is not None and identity != own:
                        found[entry.name] = identity
        self._kernels = {name: inside for name, inside in self._kernels.items() if found.get(name) == inside.identity}
        return found

    @contextmanager
    def entered(self, name: str, *, attended: bool = True) -> Iterator[OneKernel]:
        """See `Namespaces.entered`."""
        try:
            fd, identity = open_namespace(name)
        except TunledgerError as error:
            if attended and error.code is ErrorCode.NETNS_MISSING:
                self._attend(name, None, -1)
            raise
        try:
            if attended:
                self._attend(name, identity, fd)
            inside = self._kernels.get(name)
            if inside is None or inside.identity != identity:
                inside = _Inside(name, identity, self._doorway, self._tun_path, self._vouched)
                if attended:
                    self._kernels[name] = inside
            inside.fd = fd
            try:
                yield inside.kernel
            finally:
                inside.fd = -1
                inside.kernel.close()
        finally:
            os.close(fd)


class _Inside:
    """The kernel of one namespace. `fd` is a descriptor of it while there is work to do."""

    def __init__(
        self,
        name: str,
        identity: Identity,
        doorway: Doorway,
        tun_path: str,
        vouched: Callable[[int, Token, str], bool],
    ) -> None:
        self.identity, self.fd = identity, -1
        self._name, self._doorway = name, doorway
        self.kernel = LinuxKernel(
            tun_path,
            vouched=lambda ifindex, token: vouched(ifindex, token, name),
            open_node=self._open_node,
            open_socket=self._open_socket,
        )

    def _open_node(self, path: str) -> int:
        return self._doorway.opened(self._name, self.fd, lambda: tundev.open_node(path), os.close)

    def _open_socket(self) -> RouteSocket:
        return self._doorway.opened(self._name, self.fd, RouteSocket, RouteSocket.close)


def host_kernel(
    *,
    vouched: Callable[[int, Token, str | None], bool] = lambda _ifindex, _token, _netns: False,
    attend: Attend = lambda _name, _identity, _fd: None,
) -> HostKernel:
    """The real one, of the network namespace that the thread is in when it first calls."""
    own = LinuxKernel(vouched=lambda ifindex, token: vouched(ifindex, token, None))
    return HostKernel(own, RunNetns(attend=attend, vouched=vouched))


def _parted(keys: Collection[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Plain names, and names by namespace."""
    own: list[str] = []
    inside: dict[str, list[str]] = {}
    for key in keys:
        netns, name = parted_key(key)
        if netns is None:
            own.append(name)
        else:
            inside.setdefault(netns, []).append(name)
    return own, inside


def _netns(step: st.Step) -> str | None:
    return None if isinstance(step, st.ConfigureProcessing | st.StopProcessing) else step.netns


def _by_namespace(steps: Iterable[st.Step]) -> list[tuple[str | None, list[st.Step]]]:
    """Steps in their order, cut where the namespace changes."""
    parts: list[tuple[str | None, list[st.Step]]] = []
    for step in steps:
        if not parts or parts[-1][0] != _netns(step):
            parts.append((_netns(step), []))
        parts[-1][1].append(step)
    return parts


def _removes(steps: Sequence[st.Step]) -> bool:
    return all(isinstance(step, st.DeleteLink | st.SetAlias) for step in steps)


def _while(step: st.Step, error: TunledgerError) -> TunledgerError:
    """What kept a step from being done, with its name."""
    words = f"{step}: {error.message}"
    return TunledgerError(error.code, words, retry=error.retry, field=error.field, errno_name=error.errno_name)
