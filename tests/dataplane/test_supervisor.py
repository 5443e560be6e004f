"""The supervisor and real workers, on sockets in place of devices: they are as readable, and take any bytes."""

import contextlib
import errno
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from service.dataplane.attachment import DeviceCounters
from service.dataplane.contract import Mode
from service.dataplane.errors import DataplaneError
from service.dataplane.posts import RESPAWN_MAX_S, respawn_delay_s
from service.dataplane.ring import open_ring
from service.dataplane.supervisor import Supervisor
from service.dataplane.telling import WorkerExit
from service.dataplane.worker_process import PeerGoneError, WorkerProcess, close_everywhere
from service.packet.classify import CLASSES, classify
from tests.dataplane.conftest import Observed, StartSupervisor, Until

IPV4_UDP = bytes.fromhex("4500001c000000004011000a0a0000010a000002") + bytes.fromhex("0001000200080000")


class Feed:
    """A device made of a socket: what goes into `socket` is what the worker reads."""

    def __init__(self) -> None:
        self.socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(10)
        self.fd = other.detach()

    def released(self) -> bool:
        """Whether nobody holds the other end any more."""
        self.socket.setblocking(False)
        try:
            return self.socket.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionError:  # what was sent had not been read
            return True
        finally:
            self.socket.settimeout(10)


@pytest.fixture
def feed() -> Iterator[Callable[[], Feed]]:
    with contextlib.ExitStack() as stack:

        def make() -> Feed:
            made = Feed()
            stack.callback(made.socket.close)
            return made

        yield make


MakeFeed = Callable[[], Feed]


def worker_pids() -> list[int]:
    """The children of this process that are workers and up."""
    return [pid for pid in children() if Path(f"/proc/{pid}/comm").read_text().startswith("tunledger-dp")]


def children(pid: int | str = "self") -> list[int]:
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    found = []
    for task in tasks:
        try:
            found += [int(child) for child in (task / "children").read_text().split()]
        except FileNotFoundError:  # a thread that ended meanwhile
            continue
    return found


def only_worker() -> int:
    (pid,) = worker_pids()
    return pid


def packets(supervisor: Supervisor, device: str) -> int:
    return sum(count for count, _ in supervisor.counters()[device].from_kernel.values())


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_counts_packets_and_bytes_from_the_first_on(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until
) -> None:
    supervisor = start_supervisor()
    device = feed()
    session = supervisor.attach("a", device.fd, mode="tun")
    assert supervisor.counters() == {"a": DeviceCounters(session, {}, {})}
    for _ in range(1000):
        device.socket.send(IPV4_UDP)
    device.socket.send(b"\xff" * 10)
    until(lambda: packets(supervisor, "a") == 1001)
    assert supervisor.counters()["a"].from_kernel == {"ipv4.udp": (1000, 28_000), "malformed.bad_version": (1, 10)}
    assert supervisor.counters()["a"].to_kernel == {}


def test_detach_closes_the_device_and_gives_its_figures_once(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until
) -> None:
    supervisor = start_supervisor()
    device = feed()
    session = supervisor.attach("a", device.fd, mode="tun")
    device.socket.send(IPV4_UDP)
    until(lambda: packets(supervisor, "a") == 1)
    assert supervisor.detach("a") == DeviceCounters(session, {"ipv4.udp": (1, 28)}, {}, {"end_of_chain": 1})
    assert device.released()
    assert set(supervisor.attached()) == set()
    assert supervisor.detach("a") is None
    assert supervisor.counters() == {}


def test_a_session_starts_at_zero_though_its_slot_was_used(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until
) -> None:
    supervisor = start_supervisor(devices_per_worker=1)
    sessions = set()
    for _ in range(3):
        device = feed()
        sessions.add(supervisor.attach("a", device.fd, mode="tun"))
        assert supervisor.counters()["a"].from_kernel == {}
        device.socket.send(IPV4_UDP)
        until(lambda: packets(supervisor, "a") == 1)
        supervisor.detach("a")
    assert len(sessions) == 3


def test_no_bytes_do_harm(start_supervisor: StartSupervisor, feed: MakeFeed, until: Until, observed: Observed) -> None:
    supervisor = start_supervisor(workers=1, packet_log=observed.line, packets_per_s=100_000)
    random_bytes = random.Random(5)
    heads = [b"", b"\x45\x00", b"\x60\x00", b"\x4f", IPV4_UDP[:20], IPV4_UDP]
    garbage = [
        random_bytes.choice(heads) + random_bytes.randbytes(random_bytes.choice([1, 7, 30, 60, 1400]))
        for _ in range(3000)
    ]
    garbage += [b"\x60" + random_bytes.randbytes(65_535)]
    modes: tuple[Mode, ...] = ("tun", "tap")
    devices = {mode: feed() for mode in modes}
    for mode in modes:
        supervisor.attach(mode, devices[mode].fd, mode=mode)
    for data in garbage:
        for mode in modes:
            devices[mode].socket.send(data)
    for mode in modes:
        until(lambda mode=mode: packets(supervisor, mode) == len(garbage))
    expected: dict[str, tuple[int, int]] = {}
    for data in garbage:
        name = CLASSES[classify(data, len(data))]
        count, octets = expected.get(name, (0, 0))
        expected[name] = (count + 1, octets + len(data))
    assert supervisor.counters()["tun"].from_kernel == expected
    assert observed.exits == []


def test_a_killed_worker_is_told_of_and_replaced(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    supervisor = start_supervisor()
    device = feed()
    session = supervisor.attach("a", device.fd, mode="tun")
    device.socket.send(IPV4_UDP)
    until(lambda: packets(supervisor, "a") == 1)
    pid = only_worker()
    os.kill(pid, signal.SIGKILL)
    until(lambda: observed.exits, within_s=1.0)
    last = DeviceCounters(session, {"ipv4.udp": (1, 28)}, {}, {"end_of_chain": 1})
    assert observed.exits == [WorkerExit(0, pid, "signal SIGKILL", frozenset({"a"}), {"a": last})]
    assert set(supervisor.attached()) == set()
    assert supervisor.counters() == {"a": last}
    assert device.released()

    again = feed()
    assert supervisor.attach("a", again.fd, mode="tun") != session
    assert set(supervisor.attached()) == {"a"}
    assert packets(supervisor, "a") == 0
    again.socket.send(IPV4_UDP)
    until(lambda: packets(supervisor, "a") == 1)
    assert supervisor.healthy() == []
    supervisor.detach("a")
    assert supervisor.counters() == {}, "the first session's last figures are gone, too"


def test_on_exit_may_attach_again(start_supervisor: StartSupervisor, feed: MakeFeed, until: Until) -> None:
    second = feed()
    supervisor: Supervisor
    sessions: list[str] = []

    def on_exit(_: WorkerExit) -> None:
        sessions.append(supervisor.attach("a", second.fd, mode="tun"))

    supervisor = start_supervisor(on_exit=on_exit)
    supervisor.attach("a", feed().fd, mode="tun")
    os.kill(only_worker(), signal.SIGKILL)
    until(lambda: sessions, within_s=1.0)
    second.socket.send(IPV4_UDP)
    until(lambda: packets(supervisor, "a") == 1)


def test_on_exit_does_not_wait_for_a_worker_that_only_its_own_thread_can_start(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor: Supervisor
    codes: list[str] = []
    device = feed()

    def on_exit(_: WorkerExit) -> None:
        with pytest.raises(DataplaneError) as caught:
            supervisor.attach("a", device.fd, mode="tun")
        codes.append(caught.value.code)

    supervisor = start_supervisor(on_exit=on_exit)
    monkeypatch.setattr("service.dataplane.posts.respawn_delay_s", lambda _: 60.0)
    os.kill(only_worker(), signal.SIGKILL)
    until(lambda: codes == ["no_worker"], within_s=1.0)


def test_an_error_in_on_exit_does_not_stop_the_watch(
    start_supervisor: StartSupervisor, until: Until, capsys: pytest.CaptureFixture[str]
) -> None:
    pids: list[int] = []

    def on_exit(gone: WorkerExit) -> None:
        pids.append(gone.pid)
        raise RuntimeError("disk full")

    supervisor = start_supervisor(on_exit=on_exit)
    for deaths in (1, 2):
        until(lambda: len(worker_pids()) == 1)
        os.kill(only_worker(), signal.SIGKILL)
        until(lambda deaths=deaths: len(pids) == deaths)
    until(lambda: supervisor.healthy() == [])


def test_a_worker_that_keeps_dying_is_replaced_ever_slower(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    supervisor = start_supervisor()
    for deaths in range(1, 5):
        until(worker_pids)
        os.kill(only_worker(), signal.SIGKILL)
        until(lambda deaths=deaths: len(observed.exits) == deaths)
    (reason,) = supervisor.healthy()
    assert reason.startswith("worker 0 is gone (signal SIGKILL); the next one starts in 0.")
    supervisor.attach("a", feed().fd, mode="tun")  # waits for the next one
    assert set(supervisor.attached()) == {"a"}


def test_no_worker_in_time_is_an_error_worth_another_try(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until, observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = start_supervisor()
    monkeypatch.setattr("service.dataplane.posts.respawn_delay_s", lambda _: 60.0)
    monkeypatch.setattr("service.dataplane.supervisor.REQUEST_TIMEOUT_S", 0.05)
    os.kill(only_worker(), signal.SIGKILL)
    until(lambda: observed.exits)
    device = feed()
    with pytest.raises(DataplaneError, match=r"a: no worker is running \(worker 0: signal SIGKILL\)") as caught:
        supervisor.attach("a", device.fd, mode="tun")
    assert (caught.value.code, caught.value.retry) == ("no_worker", True)
    assert device.released()


@given(st.integers(min_value=1, max_value=10**9))
def test_back_off_grows_and_is_bounded(deaths: int) -> None:
    assert respawn_delay_s(1) == 0
    assert [respawn_delay_s(n) for n in (2, 3, 4)] == [0.1, 0.2, 0.4]
    assert respawn_delay_s(deaths) <= respawn_delay_s(deaths + 1) <= RESPAWN_MAX_S
    assert respawn_delay_s(100) == RESPAWN_MAX_S


def test_a_stopped_worker_times_out_and_lets_go_by_dying(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    supervisor = start_supervisor()
    held, other, wanted = feed(), feed(), feed()
    session = supervisor.attach("held", held.fd, mode="tun")
    supervisor.attach("other", other.fd, mode="tun")
    pid = only_worker()
    os.kill(pid, signal.SIGSTOP)
    assert supervisor.healthy() == [f"worker 0 (pid {pid}) has not answered for 0.5 s"]
    assert supervisor.detach("held") == DeviceCounters(session, {}, {})
    assert held.released()
    until(lambda: observed.exits)
    # The one that was being detached was asked for, so is no news.
    assert observed.exits[0].status == "signal SIGKILL"
    assert observed.exits[0].devices == {"other"}
    assert supervisor.detach("held") is None

    until(lambda: supervisor.healthy() == [])
    pid = only_worker()
    os.kill(pid, signal.SIGSTOP)
    message = rf"wanted: worker 0 \(pid {pid}\) has not answered for 2 s"
    with pytest.raises(DataplaneError, match=message) as caught:
        supervisor.attach("wanted", wanted.fd, mode="tun")
    assert (caught.value.code, caught.value.retry) == ("worker_timeout", True)
    assert wanted.released()
    assert set(supervisor.attached()) == set()


def test_a_worker_whose_answer_cannot_be_read_lets_go_by_dying(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asked all the same, and has what it was given: else the device would be busy for ever."""
    supervisor = start_supervisor()
    wanted, again = feed(), feed()
    receive, failed = socket.recv_fds, list[int]()

    def without_memory(*arguments: Any) -> Any:
        if not failed:
            failed.append(errno.ENOMEM)
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return receive(*arguments)

    monkeypatch.setattr(socket, "recv_fds", without_memory)
    with pytest.raises(DataplaneError) as caught:
        supervisor.attach("wanted", wanted.fd, mode="tun")
    assert failed
    assert caught.value.retry
    assert wanted.released()
    until(lambda: supervisor.healthy() == [])
    supervisor.attach("wanted", again.fd, mode="tun")
    assert set(supervisor.attached()) == {"wanted"}


def test_what_is_closed_is_not_left_with_a_worker_that_is_just_being_started(
    feed: MakeFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its fork and its exec it has a copy of every descriptor: the device would be busy a while longer."""
    wanted = feed()
    (forked, say), (may, let) = os.pipe(), os.pipe()
    popen, started, released = subprocess.Popen, list[WorkerProcess](), list[bool]()

    def held_up() -> None:
        os.write(say, b"!")
        os.read(may, 1)

    def close() -> None:
        close_everywhere(wanted.fd)
        released.append(wanted.released())

    monkeypatch.setattr(subprocess, "Popen", partial(popen, preexec_fn=held_up))
    python = sys.executable
    starter = threading.Thread(
        target=lambda: started.append(WorkerProcess(0, python=python, slots=1, packets_per_s=None))
    )
    closer = threading.Thread(target=close)
    starter.start()
    os.read(forked, 1)
    closer.start()
    closer.join(0.2)
    os.write(let, b"!")
    closer.join(10)
    starter.join(10)
    for worker in started:
        worker.kill()
        worker.reap()
    for fd in (forked, say, may, let):
        os.close(fd)
    assert released == [True]


def test_a_worker_that_was_only_paused_goes_on(
    start_supervisor: StartSupervisor, feed: MakeFeed, observed: Observed
) -> None:
    supervisor = start_supervisor()
    pid = only_worker()
    os.kill(pid, signal.SIGSTOP)
    assert supervisor.healthy() != []
    os.kill(pid, signal.SIGCONT)
    # The late answer must not be taken for that to a later question, which is no.
    with pytest.raises(DataplaneError, match="EPERM"):
        supervisor.attach("file", os.open(__file__, os.O_RDONLY), mode="tun")
    assert supervisor.healthy() == []
    supervisor.attach("a", feed().fd, mode="tun")
    assert set(supervisor.attached()) == {"a"}
    assert observed.exits == []


def test_a_worker_that_is_slow_to_start_is_not_killed_for_it(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until, observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = start_supervisor()
    first = only_worker()
    os.kill(first, signal.SIGKILL)
    until(lambda: observed.exits)
    (second,) = [pid for pid in children() if pid != first]
    os.kill(second, signal.SIGSTOP)
    monkeypatch.setattr("service.dataplane.supervisor.REQUEST_TIMEOUT_S", 0.2)
    with pytest.raises(DataplaneError, match="has not answered") as caught:
        supervisor.attach("a", feed().fd, mode="tun")
    assert caught.value.retry
    os.kill(second, signal.SIGCONT)
    monkeypatch.undo()
    supervisor.attach("a", feed().fd, mode="tun")
    assert worker_pids() == [second]
    assert len(observed.exits) == 1


def test_workers_outlive_the_thread_that_called_start(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    """PDEATHSIG comes when the starting thread ends, not the process (prctl(2))."""
    started: list[Supervisor] = []
    thread = threading.Thread(target=lambda: started.append(start_supervisor()))
    thread.start()
    thread.join()
    os.kill(only_worker(), signal.SIGKILL)  # and so does the next one
    until(lambda: observed.exits)
    thread = threading.Thread(target=started[0].attach, args=("a", feed().fd), kwargs={"mode": "tun"})
    thread.start()
    thread.join()
    assert started[0].healthy() == []
    assert set(started[0].attached()) == {"a"}
    assert len(observed.exits) == 1


def test_a_device_that_somebody_detaches_is_no_news_when_its_worker_dies(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until, observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = start_supervisor()
    session = supervisor.attach("a", feed().fd, mode="tun")
    os.kill(only_worker(), signal.SIGSTOP)
    wait_dead = WorkerProcess.wait_dead

    def dawdle(worker: WorkerProcess, deadline: float) -> bool:
        dead = wait_dead(worker, deadline)
        if dead:  # let the watcher be the first to see it
            until(lambda: observed.exits)
        return dead

    monkeypatch.setattr(WorkerProcess, "wait_dead", dawdle)
    assert supervisor.detach("a") == DeviceCounters(session, {}, {})
    assert observed.exits[0].devices == frozenset()
    assert supervisor.counters() == {}


def test_counters_and_attached_do_not_wait_for_a_stopped_worker(
    start_supervisor: StartSupervisor, feed: MakeFeed
) -> None:
    supervisor = start_supervisor()
    session = supervisor.attach("a", feed().fd, mode="tun")
    os.kill(only_worker(), signal.SIGSTOP)
    busy = threading.Thread(target=supervisor.detach, args=("a",))
    busy.start()
    assert supervisor.counters() == {"a": DeviceCounters(session, {}, {})}
    assert set(supervisor.attached()) == {"a"}
    with pytest.raises(DataplaneError, match="a: being attached or detached"):
        supervisor.detach("a")
    busy.join()
    assert set(supervisor.attached()) == set()


def test_close_kills_what_does_not_exit_and_keeps_the_figures(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    supervisor = start_supervisor(workers=2)
    stopped, fine = feed(), feed()
    supervisor.attach("stopped", stopped.fd, mode="tun")
    (pid,) = [pid for pid in worker_pids() if any("socket" in link for link in fd_links(pid)[4:])][:1]
    os.kill(pid, signal.SIGSTOP)
    supervisor.attach("fine", fine.fd, mode="tun")
    fine.socket.send(IPV4_UDP)
    until(lambda: packets(supervisor, "fine") == 1)
    supervisor.close()
    assert worker_pids() == []
    assert stopped.released()
    assert fine.released()
    assert set(supervisor.attached()) == set()
    assert packets(supervisor, "fine") == 1
    assert observed.exits == []
    assert supervisor.healthy() == ["the data plane is not running"]
    supervisor.close()


def fd_links(pid: int) -> list[str]:
    return [str(link.readlink()) for link in sorted(Path(f"/proc/{pid}/fd").iterdir(), key=lambda fd: int(fd.name))]


def test_attach_closes_the_fd_whatever_happens(start_supervisor: StartSupervisor, feed: MakeFeed) -> None:
    supervisor = Supervisor(workers=1, on_exit=lambda _: None)
    device = feed()
    with pytest.raises(DataplaneError, match="the data plane is not running"):
        supervisor.attach("a", device.fd, mode="tun")
    assert device.released()

    supervisor = start_supervisor(devices_per_worker=1)
    supervisor.attach("a", feed().fd, mode="tun")
    again, full = feed(), feed()
    with pytest.raises(DataplaneError, match="a: already with worker 0"):
        supervisor.attach("a", again.fd, mode="tun")
    assert again.released()
    with pytest.raises(DataplaneError, match="b: the workers hold 1 devices, their limit") as caught:
        supervisor.attach("b", full.fd, mode="tun")
    assert caught.value.code == "worker_full"
    assert full.released()
    supervisor.detach("a")

    # A file is always readable: epoll refuses it.
    file = os.open(__file__, os.O_RDONLY)
    with pytest.raises(DataplaneError, match="EPERM: Operation not permitted") as caught:
        supervisor.attach("file", file, mode="tun")
    assert (caught.value.code, caught.value.retry) == ("attach_refused", False)
    assert not is_open(file)
    with pytest.raises(DataplaneError, match="none: EBADF"):
        supervisor.attach("none", 1_000_000, mode="tun")
    with pytest.raises(DataplaneError, match="name: over 255 bytes"):
        supervisor.attach("long", feed().fd, mode="tun", name="n" * 256)

    supervisor.attach("a", feed().fd, mode="tun")  # the one slot was given back each time
    assert set(supervisor.attached()) == {"a"}


def test_a_device_that_ends_is_told_of_and_the_others_go_on(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    supervisor = start_supervisor()
    ending, other = feed(), feed()
    session = supervisor.attach("ending", ending.fd, mode="tun", name="tun7")
    supervisor.attach("other", other.fd, mode="tun")
    ending.socket.send(IPV4_UDP)
    ending.socket.close()
    until(lambda: observed.lost)
    assert observed.lost == [("ending", "EPIPE: Broken pipe")]
    assert set(supervisor.attached()) == {"other"}
    assert supervisor.devices_lost == 1
    assert supervisor.detach("ending") == DeviceCounters(session, {"ipv4.udp": (1, 28)}, {}, {"end_of_chain": 1})
    other.socket.send(IPV4_UDP)
    until(lambda: packets(supervisor, "other") == 1)
    assert observed.exits == []


def test_pokes_are_told_of_every_100_ms_at_most_and_the_last_one_is(
    start_supervisor: StartSupervisor, until: Until
) -> None:
    told: list[float] = []
    supervisor = start_supervisor(on_poke=lambda: told.append(time.monotonic()))
    worker = supervisor._roster.posts[0].live
    assert worker is not None
    end = time.monotonic() + 0.35
    pause = threading.Event()
    while time.monotonic() < end:
        last = time.monotonic()
        os.eventfd_write(worker.notice, 1)
        pause.wait(0.002)
    until(lambda: told and told[-1] >= last)
    assert all(later - earlier > 0.09 for earlier, later in itertools.pairwise(told)), told


def test_a_descriptor_that_comes_with_nonsense_is_closed(start_supervisor: StartSupervisor) -> None:
    worker = start_supervisor()._roster.posts[0].live
    assert worker is not None
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def answer() -> None:
        theirs.recv(100)
        socket.send_fds(theirs, [b"nonsense"], [writer])
        os.close(writer)

    true = worker._control
    worker._control = mine
    try:
        peer = threading.Thread(target=answer)
        peer.start()
        with pytest.raises(PeerGoneError):
            worker.ping(time.monotonic() + 5)
        peer.join()
        assert os.read(reader, 1) == b"", "nobody has the other end"
    finally:
        worker._control = true
        mine.close()
        theirs.close()
        os.close(reader)


def test_start_fails_if_a_worker_does_not_come_up(start_supervisor: StartSupervisor, observed: Observed) -> None:
    with pytest.raises(DataplaneError, match="worker 0 does not come up: exit 1") as caught:
        start_supervisor(python="/bin/false")
    assert caught.value.code == "worker_start"
    with pytest.raises(DataplaneError, match=r"worker 0 does not come up: cannot be started: .*No such file"):
        start_supervisor(python="/nonexistent/python")
    assert observed.exits == []
    assert worker_pids() == []


def test_why_a_worker_does_not_come_up_is_told(
    start_supervisor: StartSupervisor, observed: Observed, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'Traceback ...' >&2\necho 'ImportError: no salt' >&2\nexit 1\n")
    python.chmod(0o700)
    with structlog.testing.capture_logs() as said, pytest.raises(DataplaneError) as caught:
        start_supervisor(python=str(python))
    assert caught.value.message == "worker 0 does not come up: exit 1: ImportError: no salt"
    (line,) = [line for line in said if line["log_level"] == "error"]
    assert (line["event"], line["status"], line["error"]) == ("a packet worker died", "exit 1", "ImportError: no salt")
    assert observed.exits == []


def test_devices_are_spread_over_the_workers(start_supervisor: StartSupervisor, feed: MakeFeed) -> None:
    supervisor = start_supervisor(workers=2)
    for number in range(10):
        supervisor.attach(f"d{number}", feed().fd, mode="tun")
    counts = [sum("socket:" in link for link in fd_links(pid)) for pid in worker_pids()]
    assert counts == [1 + 5, 1 + 5]  # control, and half of the devices


def test_a_worker_keeps_nothing_it_does_not_need(start_supervisor: StartSupervisor, until: Until) -> None:
    leak_read, leak_write = os.pipe()
    os.set_inheritable(leak_write, True)
    os.environ["TUNLEDGER_TEST_SECRET"] = "hush"  # noqa: S105 - no secret, a mark to look for
    try:
        start_supervisor(packet_log=lambda *_: None)
        pid = only_worker()
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert status["NoNewPrivs"] == "1"
        assert {status[which] for which in ("CapEff", "CapPrm", "CapInh", "CapAmb")} == {"0" * 16}
        ignored = int(status["SigIgn"], 16)
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
            assert ignored & 1 << (number - 1), number
        assert os.getsid(pid) == pid
        assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
        assert b"TUNLEDGER_TEST_SECRET" not in Path(f"/proc/{pid}/environ").read_bytes()
        kinds = sorted(link.split(":")[0].split(" ")[0] for link in fd_links(pid)[3:])
        # The counters (mmap keeps a copy of their fd), notice, epoll and the ring (twice mapped), control and lines.
        ring = open_ring()
        if ring is not None:
            ring.close()
        others = 2 if ring is None else 5
        assert kinds == ["/memfd"] * 2 + ["anon_inode"] * others + ["socket"] * 2
    finally:
        del os.environ["TUNLEDGER_TEST_SECRET"]
        os.close(leak_read)
        os.close(leak_write)


def test_a_busy_device_starves_nobody(start_supervisor: StartSupervisor, feed: MakeFeed, until: Until) -> None:
    supervisor = start_supervisor()
    busy, quiet = feed(), feed()
    supervisor.attach("busy", busy.fd, mode="tun")
    supervisor.attach("quiet", quiet.fd, mode="tun")
    stop = threading.Event()

    def flood() -> None:
        with contextlib.suppress(OSError):  # the end of the device is what ends it
            while not stop.is_set():
                busy.socket.send(IPV4_UDP)

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        until(lambda: packets(supervisor, "busy") > 1000)
        quiet.socket.send(IPV4_UDP)
        until(lambda: packets(supervisor, "quiet") == 1, within_s=1.0)
        seen = -1
        for _ in range(2000):
            count, octets = supervisor.counters()["busy"].from_kernel["ipv4.udp"]
            assert count >= seen
            assert abs(octets - 28 * count) <= 28 * 64 * 4, "packets and bytes are a few batches apart at most"
            seen = count
        assert supervisor.healthy() == []
        supervisor.detach("busy")
    finally:
        stop.set()
        flooding.join()


def test_packet_lines_and_what_was_left_out_add_up(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    supervisor = start_supervisor(packet_log=observed.line, packets_per_s=5)
    device = feed()
    supervisor.attach("key", device.fd, mode="tun", name="tun0")
    for _ in range(300):
        device.socket.send(IPV4_UDP)
    until(lambda: sum(bool(line) + suppressed for _, line, suppressed in observed.lines) == 300)
    shown = [line for _, line, _ in observed.lines if line]
    assert 5 <= len(shown) <= 10
    assert observed.lines[0] == ("tun0", "IP 10.0.0.1.1 > 10.0.0.2.2: UDP, length 0", 0)
    # Nothing follows, so the number comes without a line after a second.
    assert observed.lines[-1][1:] == ("", 300 - len(shown))


def test_a_slow_log_costs_lines_but_no_packets(
    start_supervisor: StartSupervisor, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    go_on = threading.Event()

    def slow(device: str, line: str, suppressed: int) -> None:
        go_on.wait(20)
        observed.line(device, line, suppressed)

    supervisor = start_supervisor(packet_log=slow, packets_per_s=1_000_000)
    device = feed()
    supervisor.attach("a", device.fd, mode="tun")
    for _ in range(2000):
        device.socket.send(IPV4_UDP)
    try:
        until(lambda: packets(supervisor, "a") == 2000)
    finally:
        go_on.set()
    until(lambda: sum(bool(line) + suppressed for _, line, suppressed in observed.lines) == 2000)
    assert sum(suppressed for _, _, suppressed in observed.lines) > 0
