"""Interfaces in network namespaces: the fake host and the real one keep one contract, and what only Linux can show."""

import errno
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

from service.domain import steps as st
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import ObservedLink
from service.domain.spec import Offloads, Processing
from service.domain.token import Token
from service.domain.values import Address, InterfaceName, Mode, parse_cidr
from service.kernel import doorway, namespaces, tundev
from service.kernel.doorway import own_identity
from service.kernel.fake import FakeKernel, FakeNamespaces, Outside
from service.kernel.linux import LinuxKernel
from service.kernel.monitor import Monitor, News
from service.kernel.namespaces import HostKernel, RunNetns, host_kernel
from tests.domain.builders import interface_id, token
from tests.kernel.conftest import wait_until
from tests.kernel.outside import LinuxOutside
from tests.netns import Named, ip, named

OURS, OTHER = token(), Token(token().node, interface_id(7))
TUN0 = InterfaceName("tun0")
NET = parse_cidr("10.9.0.1/24", "addresses")


@dataclass
class NamedHost:
    """A host with one other network namespace, whatever its kind, and the hand of others in there."""

    kernel: HostKernel
    blue: str
    add_stranger: Callable[[str, str], object]
    add_here: Callable[[str], object]
    delete: Callable[[str], object]
    set_mtu: Callable[[str, int], object]
    add_address: Callable[[str, Address], object]
    remove_namespace: Callable[[], object]
    add_namespace: Callable[[], object]

    def key(self, name: str = "tun0") -> str:
        return f"{self.blue}/{name}"

    def link(self, name: str = "tun0") -> ObservedLink | None:
        return self.kernel.observe([self.key(name)]).links.get(self.key(name))

    def make(self, name: str = "tun0", ours: Token = OURS) -> ObservedLink:
        called = InterfaceName(name)
        self.kernel.execute(
            ours,
            [
                st.CreateLink(called, ours, Mode.TUN, False, None, None, self.blue),
                st.SetMtu(called, 1400, self.blue),
                st.AddAddress(called, NET, self.blue),
                st.SetUp(called, self.blue),
            ],
        )
        link = self.link(name)
        assert link is not None
        return link

    def start(self) -> st.StartProcessing:
        return st.StartProcessing(TUN0, OURS.interface_id, Mode.TUN, False, netns=self.blue)


def fake_host() -> NamedHost:
    hosts = FakeNamespaces()
    inside = [hosts.add("blue")]

    def add() -> None:
        inside[0] = hosts.add("blue")

    def in_blue() -> Outside:
        return inside[0].outside

    return NamedHost(
        hosts.host(),
        "blue",
        lambda name, alias: in_blue().add_link(name, Mode.TUN, alias=alias),
        hosts.own.outside.add_link,
        lambda name: in_blue().delete(name),
        lambda name, mtu: in_blue().set_mtu(name, mtu),
        lambda name, address: in_blue().add_address(name, address),
        lambda: hosts.delete("blue"),
        add,
    )


def real_host(blue: Named, outside: LinuxOutside) -> NamedHost:
    def add_stranger(name: str, alias: str) -> None:
        blue.ip("tuntap", "add", name, "mode", "tun")
        if alias:
            blue.ip("link", "set", name, "alias", alias)

    return NamedHost(
        host_kernel(vouched=lambda _ifindex, _token, _netns: True),
        blue.name,
        add_stranger,
        outside.add_link,
        lambda name: blue.ip("link", "del", name),
        lambda name, mtu: blue.ip("link", "set", name, "mtu", str(mtu)),
        lambda name, address: blue.ip("address", "add", str(address), "dev", name),
        blue.delete,
        blue.add,
    )


@pytest.fixture
def blue(netns: None) -> Iterator[Named]:
    with named() as one:
        yield one


@pytest.fixture(params=["fake", pytest.param("linux", marks=pytest.mark.kernel)])
def host(request: pytest.FixtureRequest) -> Iterator[NamedHost]:
    if request.param == "fake":
        yield fake_host()
        return
    blue: Named = request.getfixturevalue("blue")
    outside = LinuxOutside()
    home = own_identity()
    found = real_host(blue, outside)
    yield found
    found.kernel.close()
    outside.close()
    assert own_identity() == home, "the thread was left in another namespace"


# -- the contract


def test_an_interface_is_made_in_its_namespace_and_nowhere_else(host: NamedHost) -> None:
    link = host.make()
    assert (link.netns, link.name, link.mtu, link.up, link.token) == (host.blue, "tun0", 1400, True, OURS)
    assert link.addresses == (NET,)
    seen = host.kernel.observe()
    assert seen.complete
    assert host.key() in seen.links
    assert "tun0" not in seen.links
    assert seen.links["lo"].netns is None
    assert [each.key for each in host.kernel.sample() if each.token == OURS] == [host.key()]


def test_one_name_may_be_in_two_namespaces_and_each_step_meets_its_own(host: NamedHost) -> None:
    host.make()
    here = st.CreateLink(TUN0, OTHER, Mode.TUN, False, None, None)
    host.kernel.execute(OTHER, [here])
    errors = host.kernel.execute_many(
        [(OTHER, [st.SetMtu(TUN0, 1300)]), (OURS, [st.SetMtu(TUN0, 1200, host.blue)]), (OURS, [st.SetMtu(TUN0, 1)])]
    )
    assert [error.code if error else None for error in errors] == [None, None, ErrorCode.NAME_TAKEN]
    links = host.kernel.observe(["tun0", host.key()]).links
    assert {key: link.mtu for key, link in links.items()} == {"tun0": 1300, host.key(): 1200}


def test_an_interface_goes_from_one_namespace_to_the_next_in_the_order_of_its_steps(host: NamedHost) -> None:
    link = host.make()
    steps: list[st.Step] = [
        st.DeleteLink("tun0", link.ifindex, OURS, host.blue),
        st.CreateLink(TUN0, OURS, Mode.TUN, False, None, None),
        st.SetMtu(TUN0, 1300),
    ]
    host.kernel.execute(OURS, steps)
    links = host.kernel.observe().links
    assert host.key() not in links
    assert links["tun0"].mtu == 1300
    back = st.CreateLink(TUN0, OURS, Mode.TUN, False, None, None, host.blue)
    steps = [st.DeleteLink("tun0", links["tun0"].ifindex, OURS), back]
    host.kernel.execute(OURS, steps)
    assert host.link() is not None


def test_a_namespace_that_does_not_exist_holds_nothing_and_refuses_in_words(host: NamedHost) -> None:
    host.remove_namespace()
    seen = host.kernel.observe([host.key(), "lo"])
    assert set(seen.links) == {"lo"}
    assert seen.closed == {}
    create = st.CreateLink(TUN0, OURS, Mode.TUN, False, None, None, host.blue)
    here = st.CreateLink(InterfaceName("tun1"), OTHER, Mode.TUN, False, None, None)
    errors = host.kernel.execute_many([(OURS, [create]), (OTHER, [here])])
    assert errors[1] is None, "it fails alone"
    assert errors[0] is not None
    assert errors[0].code is ErrorCode.NETNS_MISSING
    assert f"netns {host.blue} does not exist; `ip netns add {host.blue}` makes it" in errors[0].message
    assert host.kernel.survey([host.key()], OURS.node, networks=True).closed[host.blue].code is ErrorCode.NETNS_MISSING
    host.add_namespace()
    host.make()


def test_what_is_to_be_deleted_in_a_namespace_that_went_is_gone(host: NamedHost) -> None:
    link = host.make()
    host.remove_namespace()
    host.kernel.execute(OURS, [st.DeleteLink("tun0", link.ifindex, OURS, host.blue)])


def test_a_survey_keeps_namespaces_apart(host: NamedHost) -> None:
    host.add_stranger("tun5", "")
    host.add_address("tun5", NET)
    host.add_here("tun6")
    told = host.kernel.survey([host.key("tun5"), host.key("tun6")], OURS.node, networks=True)
    assert set(told.occupants) == {host.key("tun5")}
    assert {network.network for network in told.networks if network.netns == host.blue} >= {NET.network}
    assert {network.netns for network in told.networks} == {host.blue}
    told = host.kernel.survey(["tun5", "tun6"], OURS.node, networks=True)
    assert set(told.occupants) == {"tun6"}
    assert NET.network not in {network.network for network in told.networks}


def test_links_of_ours_are_found_in_namespaces_that_nobody_asked_for_and_strangers_are_not(host: NamedHost) -> None:
    host.add_stranger("left0", str(OURS))
    host.add_stranger("theirs0", "")
    seen = host.kernel.observe()
    assert host.key("left0") in seen.links
    assert host.key("theirs0") not in seen.links


def test_a_device_is_handed_out_from_its_namespace_and_to_its_owner_only(host: NamedHost) -> None:
    host.make()
    fd = host.kernel.open_device(host.start(), OURS)
    try:
        link = host.link()
        assert link is not None
        assert link.carrier
        with pytest.raises(TunledgerError) as busy:
            host.kernel.open_device(host.start(), OURS)
        assert busy.value.code is ErrorCode.DEVICE_BUSY
    finally:
        os.close(fd)
    host.delete("tun0")
    host.add_stranger("tun0", "")
    with pytest.raises(TunledgerError) as refused:
        host.kernel.open_device(host.start(), OURS)
    assert refused.value.code is ErrorCode.NAME_TAKEN


def test_a_strangers_link_in_the_namespace_is_left_alone(host: NamedHost) -> None:
    host.add_stranger("tun0", "")
    before = host.link()
    steps = [st.SetMtu(TUN0, 1300, host.blue)]
    create = st.CreateLink(TUN0, OTHER, Mode.TUN, False, None, None, host.blue)
    errors = host.kernel.execute_many([(OURS, steps), (OTHER, [create])])
    assert [error and error.code for error in errors] == [ErrorCode.NAME_TAKEN] * 2
    assert host.link() == before


# -- who may not enter, and who cannot come back


def test_one_namespace_that_cannot_be_entered_keeps_nobody_from_the_others() -> None:
    hosts = FakeNamespaces()
    red = hosts.add("red")
    hosts.add("blue")
    kernel = hosts.host()
    red.outside.add_link("tun1", Mode.TUN, alias=str(OTHER))
    why = TunledgerError(ErrorCode.PERMISSION_DENIED, "needs CAP_SYS_ADMIN")
    hosts.refuse("blue", why)
    seen = kernel.observe(["blue/tun0", "red/tun1", "lo"])
    assert set(seen.links) == {"red/tun1", "lo"}
    assert seen.closed == {"blue": why}
    assert kernel.observe().closed == {"blue": why}, "it is in use"
    assert kernel.survey(["blue/tun0"], OURS.node, networks=False).closed == {"blue": why}
    create = st.CreateLink(TUN0, OURS, Mode.TUN, False, None, None, "blue")
    mtu = st.SetMtu(InterfaceName("tun1"), 1300, "red")
    errors = kernel.execute_many([(OURS, [create]), (OTHER, [mtu])])
    assert errors[1] is None
    assert str(errors[0]) == "ip -n blue tuntap add tun0 mode tun: needs CAP_SYS_ADMIN"
    hosts.refuse("blue", None)
    assert kernel.execute_many([(OURS, [create])]) == [None]


def test_with_no_interface_in_a_namespace_there_is_one_look_and_no_more() -> None:
    hosts = FakeNamespaces()
    stranger = hosts.add("theirs")
    stranger.outside.add_link("tun0", Mode.TUN)
    kernel = hosts.host()
    for _ in range(3):
        kernel.observe()
    kernel.sample()
    kernel.survey(["tun0"], OURS.node, networks=True)
    assert stranger.calls == {"observe": 1}
    hosts.delete("theirs")
    again = hosts.add("theirs")
    kernel.observe()
    assert again.calls == {"observe": 1}, "the name stands for another namespace now"


@pytest.mark.kernel
@pytest.mark.parametrize("at", ["the socket", "the node"])
def test_the_thread_is_at_home_after_whatever_failed_inside(
    blue: Named, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    home, kernel = own_identity(), host_kernel()
    create = st.CreateLink(TUN0, OURS, Mode.TUN, False, None, None, blue.name)

    def fail(*_arguments: object) -> None:
        assert own_identity() != home, "it is opened inside"
        raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))

    with monkeypatch.context() as broken:
        if at == "the socket":
            broken.setattr(namespaces, "RouteSocket", type("Failing", (), {"__new__": fail, "close": None}))
        else:
            broken.setattr(tundev, "open_node", fail)
        (error,) = kernel.execute_many([(OURS, [create])])
    assert error is not None
    assert error.errno_name == "ENFILE"
    assert own_identity() == home
    kernel.execute(OURS, [create])
    kernel.close()


@pytest.mark.kernel
def test_nothing_is_applied_in_a_thread_that_could_not_come_back(blue: Named, monkeypatch: pytest.MonkeyPatch) -> None:
    home, kernel, opened = own_identity(), host_kernel(), list[int]()
    set_namespace, stuck = doorway.set_namespace, [True]
    kernel.observe()

    def one_way(fd: int) -> None:
        found = os.fstat(fd)
        if stuck[0] and (found.st_dev, found.st_ino) == home:
            opened.append(fd)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        set_namespace(fd)

    monkeypatch.setattr(doorway, "set_namespace", one_way)
    create = st.CreateLink(TUN0, OURS, Mode.TUN, False, None, None, blue.name)
    here = st.CreateLink(InterfaceName("tun1"), OTHER, Mode.TUN, False, None, None)
    errors = kernel.execute_many([(OURS, [create])])
    assert errors[0] is not None
    assert "could not come back" in errors[0].message
    assert own_identity() != home
    attempts: list[Callable[[], object]] = [
        kernel.observe,
        kernel.sample,
        lambda: kernel.survey(["tun0"], OURS.node, networks=False),
        lambda: kernel.open_device(st.StartProcessing(TUN0, OURS.interface_id, Mode.TUN, False), OURS),
        lambda: kernel.execute(OTHER, [here]),
    ]
    for attempt in attempts:
        with pytest.raises(TunledgerError, match="could not come back"):
            attempt()
    stuck[0] = False
    kernel.execute(OTHER, [here])
    assert own_identity() == home
    assert "tun1" in kernel.observe().links
    assert "tun0" not in blue.links(), "what was opened on the way was let go"
    assert [fd for fd in set(opened) if os.path.exists(f"/proc/self/fd/{fd}") and _is_namespace(fd)] == []  # noqa: PTH110
    kernel.close()


def _is_namespace(fd: int) -> bool:
    return os.readlink(f"/proc/self/fd/{fd}").startswith("net:")  # noqa: PTH115


@pytest.mark.kernel
def test_without_the_capability_the_words_name_it(blue: Named, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_fd: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(doorway, "set_namespace", refuse)
    kernel = host_kernel()
    create = st.CreateLink(TUN0, OURS, Mode.TUN, False, None, None, blue.name)
    (error,) = kernel.execute_many([(OURS, [create])])
    assert error is not None
    assert error.code is ErrorCode.PERMISSION_DENIED
    assert "CAP_SYS_ADMIN" in error.message
    closed = kernel.observe([f"{blue.name}/tun0"]).closed
    assert "CAP_SYS_ADMIN" in closed[blue.name].message
    kernel.close()


@pytest.mark.kernel
def test_the_services_own_namespace_is_refused_under_another_name(netns: None) -> None:
    with named() as one:
        ip("netns", "del", one.name)
        ip("netns", "attach", one.name, str(threading.get_native_id()))
        kernel = host_kernel()
        create = st.CreateLink(TUN0, OURS, Mode.TUN, False, None, None)
        kernel.execute(OURS, [create])
        seen = kernel.observe()
        assert [link.key for link in seen.links.values() if link.token == OURS] == ["tun0"]
        told = kernel.observe([f"{one.name}/tun0"])
        assert "leave netns out" in told.closed[one.name].message
        kernel.close()


@pytest.mark.kernel
def test_no_socket_and_no_descriptor_of_a_namespace_is_left_behind(blue: Named) -> None:
    kernel = host_kernel()
    kernel.observe()
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    host = real_host(blue, LinuxOutside.__new__(LinuxOutside))
    host.kernel = kernel
    host.make()
    kernel.sample()
    os.close(kernel.open_device(host.start(), OURS))
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    blue.observe_death()
    blue.delete()
    wait_until(blue.is_dead)
    kernel.close()


# -- the monitor


@pytest.fixture
def listening(blue: Named) -> Iterator[tuple[NamedHost, Monitor, threading.Event]]:
    woken = threading.Event()
    monitor = Monitor(woken.set)
    monitor.start()
    own = LinuxKernel()
    kernel = HostKernel(own, RunNetns(attend=monitor.attend, vouched=monitor.vouches))
    outside = LinuxOutside()
    host = real_host(blue, outside)
    host.kernel = kernel
    yield host, monitor, woken
    monitor.close()
    kernel.close()
    outside.close()


def settle(host: NamedHost, monitor: Monitor) -> ObservedLink:
    """Until there is no more news of our own doing."""
    while True:
        mark = monitor.drain()
        link = host.link()
        assert link is not None
        monitor.settled(mark, [link])
        if not monitor.take():
            return link


def news(monitor: Monitor, woken: threading.Event, wanted: Callable[[News], object]) -> News:
    while True:
        assert woken.wait(10), "nobody was woken"
        woken.clear()
        told = monitor.take()
        if wanted(told):
            return told


@pytest.mark.kernel
def test_what_others_change_in_a_namespace_is_heard_with_its_place(
    listening: tuple[NamedHost, Monitor, threading.Event],
) -> None:
    host, monitor, woken = listening
    host.make()
    link = settle(host, monitor)
    assert monitor.vouches(link.ifindex, OURS, host.blue)
    assert not monitor.vouches(link.ifindex, OURS)
    assert monitor.holder(OURS) == (host.blue, link.ifindex)
    host.set_mtu("tun0", 1300)
    assert set(news(monitor, woken, lambda told: told.changed).changed) == {link.place}
    host.delete("tun0")
    assert news(monitor, woken, lambda told: told.gone).gone == {link.place: OURS}
    assert monitor.holder(OURS) is None


@pytest.mark.kernel
def test_a_namespace_that_loses_its_name_is_let_go_and_told_and_told_again_when_it_is_back(
    listening: tuple[NamedHost, Monitor, threading.Event], blue: Named
) -> None:
    host, monitor, woken = listening
    host.make()
    link = settle(host, monitor)
    blue.observe_death()
    blue.delete()
    told = news(monitor, woken, lambda told: told.namespaces)
    assert told.namespaces == {host.blue: f"netns {host.blue} went away"}
    assert told.gone == {link.place: OURS}
    assert told.moved == {link.place: f"netns {host.blue} went away"}
    wait_until(blue.is_dead)
    assert monitor.watching() == 0
    blue.add()
    assert news(monitor, woken, lambda told: told.namespaces).namespaces == {host.blue: f"netns {host.blue} came"}
    host.make()
    link = settle(host, monitor)
    host.set_mtu("tun0", 1300)
    assert set(news(monitor, woken, lambda told: told.changed).changed) == {link.place}
    assert monitor.trouble() is None


@pytest.mark.kernel
def test_a_name_that_was_asked_for_before_it_was_there_is_told_of(
    listening: tuple[NamedHost, Monitor, threading.Event], blue: Named
) -> None:
    host, monitor, woken = listening
    blue.delete()
    assert host.link() is None
    monitor.take()
    blue.add()
    assert news(monitor, woken, lambda told: told.namespaces).namespaces == {host.blue: f"netns {host.blue} came"}


@pytest.mark.kernel
def test_the_monitor_leaves_a_namespace_with_the_last_of_ours(
    listening: tuple[NamedHost, Monitor, threading.Event], blue: Named
) -> None:
    host, monitor, _woken = listening
    host.make()
    link = settle(host, monitor)
    host.kernel.execute(OURS, [st.DeleteLink("tun0", link.ifindex, OURS, host.blue)])
    monitor.settled(monitor.drain(), [], gone=[link.place])
    assert monitor._posts.keys() == {None}
    assert monitor.take().gone == {}


def test_a_fake_kernel_alone_is_a_namespace() -> None:
    hosts = FakeNamespaces(FakeKernel())
    assert hosts.present() == {}
    with pytest.raises(TunledgerError, match="does not exist"), hosts.entered("blue"):
        pass


@pytest.mark.kernel
def test_what_only_says_what_was_seen_in_a_namespace_makes_no_news(
    listening: tuple[NamedHost, Monitor, threading.Event], blue: Named
) -> None:
    host, monitor, woken = listening
    host.make()
    settle(host, monitor)
    plain = Processing(running=True, offloads=Offloads.OFF)
    fd = host.kernel.open_device(replace(host.start(), processing=plain), OURS)
    os.close(fd)  # the carrier came and went: messages that say nothing lasting
    host.add_stranger("sentinel0", "")
    told = news(monitor, woken, lambda told: told.names)
    assert "sentinel0" in told.names
    assert told.changed == {}
