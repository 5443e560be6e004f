"""What only the real kernel can show: half-made interfaces undone, routes as they come, refusals in its own words."""

import contextlib
import errno
import fcntl
import ipaddress
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from service.domain import steps as st
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.spec import Offloads, Processing
from service.domain.values import InterfaceName, Mode
from service.kernel import errnos, netlink, tundev
from service.kernel.fake import FakeKernel
from service.kernel.linux import LinuxKernel
from tests.kernel import outside
from tests.kernel.conftest import Host, LinuxHost, wait_until
from tests.kernel.test_contract import NODE, OURS, TUN0, TUN1, addr, addresses, creation, made, networks, refusal, seen
from tests.namespace import fresh_namespace

pytestmark = pytest.mark.kernel

REPOSITORY = Path(__file__).parents[2]


def names() -> set[str]:
    """Asked by ioctl, not through the code under test."""
    return {name for _index, name in socket.if_nameindex()}


def ipv6_addresses() -> list[str]:
    return Path("/proc/thread-self/net/if_inet6").read_text().splitlines()


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


# -- a half-made interface is undone


def failing(number: int) -> Callable[..., None]:
    def fail(*_args: object, **_keywords: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("call", ["set_owner", "set_group", "set_persist", "attached_name"])
def test_create_that_fails_half_way_leaves_nothing(
    linux: LinuxHost, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    before = names()
    monkeypatch.setattr(tundev, call, failing(errno.ENOMEM))
    error = refusal(linux, creation(owner=0, group=0))
    assert (error.code, error.retry) == (ErrorCode.KERNEL_REFUSED, True)
    assert str(error) == "ip tuntap add tun0 mode tun user 0 group 0: Cannot allocate memory (ENOMEM)"
    assert names() == before
    monkeypatch.undo()
    made(linux)


def test_create_that_fails_at_the_alias_leaves_nothing(linux: LinuxHost, monkeypatch: pytest.MonkeyPatch) -> None:
    present: list[set[str]] = []

    def refuse(_socket: netlink.RouteSocket, messages: list[bytearray]) -> list[netlink.NetlinkError | None]:
        present.append(names())
        return [netlink.NetlinkError(errno.EPERM, os.strerror(errno.EPERM)) for _ in messages]

    monkeypatch.setattr(netlink.RouteSocket, "change_many", refuse)
    before = names()
    assert refusal(linux, creation()).code is ErrorCode.PERMISSION_DENIED
    assert present == [before | {"tun0"}], "the device was there when the alias failed"
    assert names() == before


def test_device_is_marked_before_it_can_outlive_us(linux: LinuxHost, monkeypatch: pytest.MonkeyPatch) -> None:
    seen_at: list[tuple[str, bool]] = []
    persist = tundev.set_persist

    def look_first(fd: int) -> None:
        link = seen(linux)
        seen_at.append((link.alias, link.persist))
        persist(fd)

    monkeypatch.setattr(tundev, "set_persist", look_first)
    made(linux)
    assert seen_at == [(str(OURS), False)]


def test_no_descriptor_is_left_open(linux: LinuxHost, monkeypatch: pytest.MonkeyPatch) -> None:
    linux.kernel.observe()
    before = descriptors()
    link = made(linux, st.SetOwner(TUN0, 0, 0))
    refusal(linux, creation())
    monkeypatch.setattr(tundev, "attached_name", failing(errno.EBADFD))
    with pytest.raises(TunledgerError):
        linux.kernel.open_device(st.StartProcessing(TUN0, OURS.interface_id, Mode.TUN, False), OURS)
    monkeypatch.undo()
    linux.kernel.execute(OURS, [st.DeleteLink("tun0", link.ifindex, OURS)])
    assert descriptors() == before


def test_device_that_went_while_it_was_opened_is_not_made_anew(
    linux: LinuxHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(linux)
    attach = tundev.attach

    def too_late(fd: int, name: str, mode: Mode, **flags: bool) -> None:
        linux.outside.delete(name)
        attach(fd, name, mode, **flags)

    monkeypatch.setattr(tundev, "attach", too_late)
    with pytest.raises(TunledgerError) as caught:
        linux.kernel.open_device(st.StartProcessing(TUN0, OURS.interface_id, Mode.TUN, False), OURS)
    assert caught.value.code is ErrorCode.DEVICE_GONE
    assert "tun0" not in names()


def test_rename_in_the_middle_of_steps_does_not_lead_astray(linux: LinuxHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the check on, links are addressed by ifindex: a stranger that takes the name meanwhile is not changed."""
    made(linux)
    change, swapped = netlink.RouteSocket.change_many, list[str]()

    def swap_first(self: netlink.RouteSocket, messages: list[bytearray]) -> list[netlink.NetlinkError | None]:
        if not swapped:
            swapped.append("done")
            linux.outside.rename("tun0", "elsewhere")
            linux.outside.add_link("tun0", Mode.TUN)
        return change(self, messages)

    monkeypatch.setattr(netlink.RouteSocket, "change_many", swap_first)
    linux.kernel.execute(OURS, [st.SetMtu(TUN0, 1400), st.SetUp(TUN0)])
    assert (seen(linux, "elsewhere").mtu, seen(linux, "elsewhere").up) == (1400, True)
    assert (seen(linux).mtu, seen(linux).up) == (1500, False)


# -- addresses and routes


@pytest.fixture(params=["fake", "linux"])
def promoting(request: pytest.FixtureRequest) -> Iterator[Host]:
    """Both kernels as systemd sets them up."""
    if request.param == "fake":
        fake = FakeKernel(promote_secondaries=True)
        yield Host(fake, fake.outside)
        fake.close()
    else:
        real: LinuxHost = request.getfixturevalue("linux")
        outside.set_sysctl("net/ipv4/conf/all/promote_secondaries", "1")
        yield real


def test_a_secondary_address_is_promoted_where_the_host_says_so(promoting: Host) -> None:
    subnet = ["10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24", "10.0.0.4/24"]
    made(promoting, *[st.AddAddress(TUN0, addr(a)) for a in subnet])
    promoting.kernel.execute(OURS, [st.RemoveAddress(TUN0, addr("10.0.0.1/24"))])
    assert addresses(promoting) == ["10.0.0.2/24", "10.0.0.3/24", "10.0.0.4/24"]
    promoting.kernel.execute(OURS, [st.RemoveAddress(TUN0, addr("10.0.0.3/24"))])
    promoting.kernel.execute(OURS, [st.RemoveAddress(TUN0, addr("10.0.0.2/24"))])
    assert addresses(promoting) == ["10.0.0.4/24"]


def test_the_kernels_own_addresses_are_not_seen(linux: LinuxHost) -> None:
    made(linux, st.SetUp(TUN0), st.AddAddress(TUN0, addr("fe80::1/64")), mode=Mode.TAP)
    fd = linux.kernel.open_device(st.StartProcessing(TUN0, OURS.interface_id, Mode.TAP, False), OURS)
    try:  # with carrier it gets a link-local address of the kernel's making, some time later
        wait_until(lambda: sum(line.endswith("tun0") for line in ipv6_addresses()) == 2)
        assert addresses(linux) == ["fe80::1/64"]
        assert "::1/128" not in addresses(linux, "lo")
    finally:
        os.close(fd)


def test_ipv6_switched_off_is_said_in_the_kernels_words(linux: LinuxHost) -> None:
    made(linux)
    outside.set_sysctl("net/ipv6/conf/tun0/disable_ipv6", "1")
    error = refusal(linux, st.AddAddress(TUN0, addr("2001:db8::1/64")))
    assert (error.code, error.errno_name) == (ErrorCode.KERNEL_REFUSED, "EACCES")
    assert "IPv6 is disabled on this device" in str(error)


def test_names_that_the_kernel_keeps_for_itself_are_refused_by_it_too(linux: LinuxHost) -> None:
    for name in ("all", "default"):
        assert refusal(linux, creation(name)).errno_name == "EINVAL"
        assert name not in names()


def test_survey_reads_every_hop_of_a_route_and_other_tables(linux: LinuxHost) -> None:
    for number, name in enumerate(("vpn0", "vpn1"), 1):
        linux.outside.add_link(name, Mode.TUN)
        linux.outside.set_up(name, True)
        linux.outside.add_address(name, addr(f"10.{number}.0.1/32"))
    add = linux.outside.add_route_over
    add(["vpn0", "vpn1"], ipaddress.ip_network("10.20.0.0/16"))
    add(["vpn0", "vpn1"], ipaddress.ip_network("2001:db8:20::/48"))
    add(["vpn1"], ipaddress.ip_network("10.30.0.0/16"), table=1000)
    add(["vpn0"], ipaddress.ip_network("0.0.0.0/0"))
    add(["vpn0"], ipaddress.ip_network("::/0"))
    add(["vpn0"], ipaddress.ip_network("10.40.0.0/16"), table=outside.RT_TABLE_LOCAL, kind=outside.RTN_LOCAL)
    add(["vpn0"], ipaddress.ip_network("10.50.0.0/16"), table=outside.RT_TABLE_LOCAL)
    assert {n for n in networks(linux) if n[2] == "route"} == {
        ("10.20.0.0/16", "vpn0", "route"),
        ("10.20.0.0/16", "vpn1", "route"),
        ("2001:db8:20::/48", "vpn0", "route"),
        ("2001:db8:20::/48", "vpn1", "route"),
        ("10.30.0.0/16", "vpn1", "route"),
    }


def test_routes_over_our_own_links_are_not_in_use_by_others(linux: LinuxHost) -> None:
    made(linux, st.SetUp(TUN0), st.AddAddress(TUN0, addr("10.0.0.1/24")))
    linux.outside.add_link("vpn0", Mode.TUN)
    linux.outside.set_up("vpn0", True)
    linux.outside.add_route_over(["tun0", "vpn0"], ipaddress.ip_network("10.20.0.0/16"))
    assert networks(linux) == {("10.20.0.0/16", "vpn0", "route")}


# -- looking


def test_what_we_read_is_what_ip_says(linux: LinuxHost) -> None:
    if shutil.which("ip") is None:
        pytest.skip("missing: ip, of iproute2, to compare with")
    link = made(
        linux,
        st.SetMtu(TUN0, 1400),
        st.SetTxQueueLen(TUN0, 77),
        st.AddAddress(TUN0, addr("10.0.0.1/24")),
        st.SetUp(TUN0),
        owner=0,
        multi_queue=True,
    )
    command = ["ip", "-json", "-details", "-statistics", "address", "show", "tun0"]
    (told,) = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    told["addr_info"] = [f"{a['local']}/{a['prefixlen']}" for a in told["addr_info"]]
    info = told["linkinfo"]["info_data"]
    assert (told["ifname"], told["ifindex"], told["ifalias"]) == (link.name, link.ifindex, link.alias)
    assert (told["mtu"], told["txqlen"], told["operstate"]) == (link.mtu, link.txqueuelen, link.operstate)
    assert ("UP" in told["flags"], told["addr_info"]) == (link.up, [str(a) for a in link.addresses])
    assert (info["type"], info["multi_queue"], info["persist"]) == ("tun", True, True)
    assert info.get("user") in {0, "0", "root"}
    stats = told["stats64"]
    assert (stats["rx"]["packets"], stats["tx"]["bytes"]) == (link.counters.rx_packets, link.counters.tx_bytes)


def test_counters_are_the_hosts_view(linux: LinuxHost) -> None:
    made(linux, st.SetUp(TUN0), st.AddAddress(TUN0, addr("10.0.0.1/24")))
    bare = Processing(running=True, offloads=Offloads.OFF)
    fd = linux.kernel.open_device(st.StartProcessing(TUN0, OURS.interface_id, Mode.TUN, False, bare), OURS)
    try:
        before = seen(linux).counters
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x" * 100, ("10.0.0.2", 9))
        packet = os.read(fd, 65535)
        while packet[0] >> 4 != 4:  # the kernel's own, of IPv6
            packet = os.read(fd, 65535)
        after = seen(linux).counters
        assert after.tx_packets > before.tx_packets
        assert after.tx_bytes - before.tx_bytes >= len(packet) == 128
        os.write(fd, packet[:12] + packet[16:20] + packet[12:16] + packet[20:])
        assert seen(linux).counters.rx_packets == before.rx_packets + 1
    finally:
        os.close(fd)


def test_a_kernel_stays_in_the_namespace_it_began_in(linux: LinuxHost) -> None:
    made(linux)
    with fresh_namespace():
        assert "tun0" in linux.kernel.observe().links
        fresh = LinuxKernel()
        assert "tun0" not in fresh.observe().links
        fresh.close()


def test_thousand_links_are_read_in_one_dump(linux: LinuxHost) -> None:
    """More than one datagram's worth, so that the reader has to go on."""
    for number in range(300):
        linux.outside.add_link(f"t{number}", Mode.TUN, alias="x" * 200)
    assert {f"t{number}" for number in range(300)} <= set(linux.kernel.observe().links)


# -- refusals in words


def test_busy_names_the_process_that_holds_the_device(linux: LinuxHost) -> None:
    linux.kernel.execute(OURS, [creation("held-by-test")])
    step = replace(st.StartProcessing(TUN0, OURS.interface_id, Mode.TUN, False), name=InterfaceName("held-by-test"))
    with outside.attached("held-by-test"), pytest.raises(TunledgerError) as caught:
        linux.kernel.open_device(step, OURS)
    who = Path("/proc/self/comm").read_text().strip()
    assert (caught.value.code, caught.value.retry, caught.value.errno_name) == (ErrorCode.DEVICE_BUSY, True, "EBUSY")
    assert f"held-by-test is in use by {who} (pid {os.getpid()}); stop it" in str(caught.value)


def test_no_device_node_says_how_to_get_one(netns: None, tmp_path: Path) -> None:
    kernel = LinuxKernel(tun_path=str(tmp_path / "tun"))
    with contextlib.closing(kernel), pytest.raises(TunledgerError) as caught:
        kernel.execute(OURS, [creation()])
    assert caught.value.code is ErrorCode.TUN_MISSING
    assert str(caught.value) == f"{tmp_path}/tun is missing: modprobe tun, or pass the device into the container"


def test_what_is_no_tun_device_is_not_taken_for_one(netns: None) -> None:
    kernel = LinuxKernel(tun_path="/dev/null")
    with contextlib.closing(kernel), pytest.raises(TunledgerError) as caught:
        kernel.execute(OURS, [creation()])
    assert (caught.value.code, caught.value.errno_name) == (ErrorCode.KERNEL_REFUSED, "ENOTTY")


WITHOUT_CAPABILITIES = """
import ctypes, struct, sys
from service.domain import steps as st
from service.domain.errors import TunledgerError
from service.kernel.linux import LinuxKernel
from tests.kernel.test_contract import OURS, TUN0, creation
libc = ctypes.CDLL(None, use_errno=True)
kernel = LinuxKernel()
kernel.observe()
header, none = struct.pack("=IiI", 0x20080522, 0, 0)[:8], bytes(24)  # _LINUX_CAPABILITY_VERSION_3
assert libc.capset(header, none) == 0
for step in (creation("fresh"), st.SetMtu(TUN0, 1400), st.DeleteLink("tun0", int(sys.argv[1]), OURS)):
    try:
        kernel.execute(OURS, [step])
    except TunledgerError as error:
        print(error.code, error)
"""


def test_permission_denied_says_which_capability_is_needed(linux: LinuxHost) -> None:
    link = made(linux)
    command = [sys.executable, "-c", WITHOUT_CAPABILITIES, str(link.ifindex)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    words = "permission denied: needs CAP_NET_ADMIN; run as root or grant the capability in the unit file"
    assert done.stdout.splitlines() == [
        f"permission_denied ip tuntap add fresh mode tun: {words}",
        f"permission_denied ip link set tun0 mtu 1400: {words}",
        f"permission_denied ip link delete tun0: {words}",
    ]
    assert seen(linux) == link
    assert "fresh" not in names()


@pytest.mark.parametrize(
    ("number", "code", "retry"),
    [
        (errno.EPERM, ErrorCode.PERMISSION_DENIED, False),
        (errno.ENODEV, ErrorCode.DEVICE_GONE, True),
        (errno.ENOBUFS, ErrorCode.KERNEL_REFUSED, True),
        (errno.EINVAL, ErrorCode.KERNEL_REFUSED, False),
        (999, ErrorCode.KERNEL_REFUSED, False),
    ],
)
def test_every_errno_becomes_an_error_that_names_it(number: int, code: ErrorCode, retry: bool) -> None:
    error = errnos.refused("ip link set tun0 up", number)
    assert (error.code, error.retry, error.errno_name) == (code, retry, errno.errorcode.get(number, str(number)))
    assert str(error).startswith("ip link set tun0 up: ")


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
def test_a_closed_device_node_is_a_matter_of_permission(number: int) -> None:
    error = errnos.no_device_node("/dev/net/tun", number)
    assert error.code is ErrorCode.PERMISSION_DENIED
    assert "needs CAP_NET_ADMIN and read and write access to the device node" in str(error)


def test_tun_flags_are_those_of_the_headers(linux: LinuxHost) -> None:
    """No packet information and, without offloads, no vnet_hdr: a reader gets bare packets."""
    made(linux)
    bare = Processing(running=True, offloads=Offloads.OFF)
    fd = linux.kernel.open_device(st.StartProcessing(TUN0, OURS.interface_id, Mode.TUN, False, bare), OURS)
    try:
        flags = int.from_bytes(fcntl.ioctl(fd, tundev.TUNGETIFF, bytes(40))[16:18], sys.byteorder)
        assert flags & 0xF000 & ~0x0800 == outside.IFF_NO_PI
        assert (seen(linux).packet_information, seen(linux).vnet_hdr) == (False, False)
    finally:
        os.close(fd)


def test_survey_of_a_name_it_may_not_have(linux: LinuxHost) -> None:
    assert linux.kernel.survey(["lo"], NODE, networks=False).occupants["lo"].ifindex == 1
    assert linux.kernel.survey([TUN1], NODE, networks=False).occupants == {}
