"""What the fake kernel has for tests alone: failures on order, a record of what was done, and its looks."""

import os

import pytest

from service.domain import steps as st
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.observed import LinkCounters
from service.domain.values import Mode
from service.kernel.fake import FakeKernel
from tests.kernel.test_contract import OURS, TUN0, addr, creation

FULL = TunledgerError(ErrorCode.KERNEL_REFUSED, "no memory", retry=True, errno_name="ENOMEM")


def test_prints_itself_as_the_commands_that_make_it() -> None:
    kernel = FakeKernel()
    kernel.outside.add_link("br0", alias="somebody's")
    kernel.execute(
        OURS,
        [
            creation(owner=1000),
            st.SetMtu(TUN0, 1400),
            st.SetTxQueueLen(TUN0, 1000),
            *[st.AddAddress(TUN0, addr(a)) for a in ("10.0.0.1/24", "10.0.0.2/24", "2001:db8::1/64")],
            st.SetUp(TUN0),
        ],
    )
    assert str(kernel).splitlines() == [
        "ip link add br0 type bridge",
        "ip link set br0 alias somebody's",
        "ip tuntap add tun0 mode tun user 1000",
        f"ip link set tun0 alias {OURS}",
        "ip link set tun0 mtu 1400",
        "ip link set tun0 txqueuelen 1000",
        "ip address add 10.0.0.1/24 dev tun0",
        "ip address add 10.0.0.2/24 dev tun0  # secondary",
        "ip address add 2001:db8::1/64 dev tun0",
        "ip link set tun0 up",
    ]


def test_fails_at_the_nth_step_before_its_effect() -> None:
    kernel = FakeKernel()
    kernel.fail(FULL, nth=3)
    with pytest.raises(TunledgerError) as caught:
        kernel.execute(OURS, [creation(), st.SetMtu(TUN0, 1400), st.SetUp(TUN0)])
    assert caught.value is FULL
    assert (kernel.observe().links["tun0"].mtu, kernel.observe().links["tun0"].up) == (1400, False)
    kernel.execute(OURS, [st.SetUp(TUN0)])
    assert kernel.executed == [creation(), st.SetMtu(TUN0, 1400), st.SetUp(TUN0)]


def test_fails_after_the_effect_of_one_kind_of_step() -> None:
    kernel = FakeKernel()
    kernel.fail(FULL, on=st.SetUp, after=True)
    with pytest.raises(TunledgerError):
        kernel.execute(OURS, [creation(), st.SetUp(TUN0), st.SetMtu(TUN0, 1400)])
    assert (kernel.observe().links["tun0"].mtu, kernel.observe().links["tun0"].up) == (1500, True)


def test_fails_as_often_as_it_is_told_and_heals() -> None:
    kernel = FakeKernel()
    kernel.fail(FULL, times=2)
    for _ in range(2):
        with pytest.raises(TunledgerError):
            kernel.execute(OURS, [creation()])
    kernel.execute(OURS, [creation()])
    kernel.fail(FULL, times=99)
    kernel.heal()
    kernel.execute(OURS, [st.SetUp(TUN0)])


def test_opening_a_device_can_fail_too() -> None:
    kernel = FakeKernel()
    kernel.execute(OURS, [creation()])
    kernel.fail(FULL, on=st.StartProcessing)
    with pytest.raises(TunledgerError):
        kernel.open_device(st.StartProcessing(TUN0, OURS.interface_id, Mode.TUN, False), OURS)
    assert kernel.open_devices() == {}


def test_reader_gets_what_the_host_sends_and_an_end_when_the_link_goes() -> None:
    kernel = FakeKernel()
    kernel.execute(OURS, [creation()])
    fd = kernel.open_device(st.StartProcessing(TUN0, OURS.interface_id, Mode.TUN, False), OURS)
    try:
        assert kernel.open_devices() == {"tun0": 1}
        with pytest.raises(BlockingIOError):
            os.read(fd, 100)
        kernel.outside.deliver("tun0", b"packet")
        assert os.read(fd, 100) == bytes(10) + b"packet", "behind a virtio_net_hdr"
        kernel.outside.delete("tun0")
        assert os.read(fd, 100) == b""
    finally:
        os.close(fd)


def test_device_held_by_somebody_is_busy_and_says_who() -> None:
    kernel = FakeKernel()
    kernel.execute(OURS, [creation()])
    start = st.StartProcessing(TUN0, OURS.interface_id, Mode.TUN, False)
    kernel.outside.hold("tun0")
    with pytest.raises(TunledgerError, match=r"in use by openvpn \(pid 812\)"):
        kernel.open_device(start, OURS)
    kernel.outside.hold("tun0", "")
    os.close(kernel.open_device(start, OURS))


def test_device_made_not_persistent_stays_as_long_as_it_is_read() -> None:
    kernel = FakeKernel()
    kernel.execute(OURS, [creation()])
    fd = kernel.open_device(st.StartProcessing(TUN0, OURS.interface_id, Mode.TUN, False), OURS)
    kernel.outside.not_persistent("tun0")
    assert not kernel.observe().links["tun0"].persist
    os.close(fd)
    assert "tun0" not in kernel.observe().links


def test_counts_calls_and_has_the_counters_it_is_given() -> None:
    kernel = FakeKernel()
    kernel.execute(OURS, [creation()])
    kernel.outside.count("tun0", LinkCounters(rx_packets=3))
    assert kernel.sample()[0].counters == LinkCounters(rx_packets=3)
    assert kernel.calls == {"execute": 1, "sample": 1}
    with pytest.raises(LookupError, match="no link tun7"):
        kernel.outside.delete("tun7")
