"""Chains in real workers, on sockets in place of devices: what each stage gets, and what becomes of packets."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from service.dataplane import syscalls
from service.dataplane.errors import DataplaneError
from service.dataplane.fake import FakeBatch
from service.dataplane.supervisor import Supervisor
from service.dataplane.work import Work
from tests.dataplane.conftest import Observed, StartSupervisor, Until
from tests.dataplane.sample_processors import NAMES
from tests.dataplane.test_supervisor import IPV4_UDP, MakeFeed, feed, packets, worker_pids

__all__ = ["feed"]


def chain(*stages: dict[str, Any], **more: Any) -> Work:
    return Work(chain=tuple({"on_crash": "restart", **stage} for stage in stages), **more)


COUNT = {"processor": "count"}


def drops(supervisor: Supervisor, device: str) -> dict[str, int]:
    return dict(supervisor.counters()[device].drops)


Start = Callable[..., Supervisor]


@pytest.fixture
def start(start_supervisor: StartSupervisor) -> Start:
    return lambda **arguments: start_supervisor(processors=NAMES, **arguments)


def test_views_that_a_processor_releases_are_its_own(
    start: Start, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    supervisor = start()
    device = feed()
    supervisor.attach("a", device.fd, mode="tun", work=chain(COUNT, {"processor": "tidy"}))
    for number in (1, 2, 3):
        device.socket.send(IPV4_UDP)
        until(lambda number=number: drops(supervisor, "a") == {"end_of_chain": number})
    assert observed.exits == []


@pytest.mark.parametrize("io_uring", [True, False], ids=["ring", "one by one"])
def test_a_batch_may_go_to_one_device_after_another_whose_chain_looks_at_it(
    start: Start, feed: MakeFeed, until: Until, observed: Observed, io_uring: bool
) -> None:
    """What others had in hand on the way is not what was read, as far as anybody knows."""
    supervisor = start(io_uring=io_uring)
    first, second, third = feed(), feed(), feed()
    supervisor.attach("third", third.fd, mode="tun")
    supervisor.attach("second", second.fd, mode="tun", work=chain(COUNT))
    to_both = chain({"processor": "send", "to": "second", "keep": True}, {"processor": "send", "to": "third"})
    supervisor.attach("first", first.fd, mode="tun", work=to_both)
    (pid,) = worker_pids()
    for turn in range(1, 4):  # a batch that many packets came in before is asked for at once
        os.kill(pid, signal.SIGSTOP)
        sent = [IPV4_UDP + bytes([turn, number]) for number in range(20)]
        for packet in sent:
            first.socket.send(packet)
        os.kill(pid, signal.SIGCONT)
        for device in (second, third):
            assert [device.socket.recv(100) for _ in sent] == sent
    until(lambda: supervisor.counters()["third"].to_kernel["ipv4.udp"][0] == 60)
    assert drops(supervisor, "first") == {}
    assert observed.exits == []


def test_no_answers_are_no_mistake(start: Start, feed: MakeFeed, until: Until, observed: Observed) -> None:
    supervisor = start()
    device = feed()
    supervisor.attach("a", device.fd, mode="tun", work=chain({"processor": "mute"}))
    for count in (1, 2):
        device.socket.send(IPV4_UDP)
        until(lambda count=count: drops(supervisor, "a") == {"end_of_chain": count})
    assert observed.exits == []


def test_a_header_that_says_nothing_is_its_packets_own() -> None:
    batch = FakeBatch([IPV4_UDP, IPV4_UDP], headers=[bytes(10)] * 2)
    for index in range(2):
        batch.replace(index, IPV4_UDP)
        assert batch.headers is not None
        assert bytes(batch.headers[index]) == bytes(10)
        batch.headers[index].release()


def test_stages_get_what_the_one_before_left_and_what_is_left_ends_counted(
    start: Start, feed: MakeFeed, until: Until
) -> None:
    supervisor = start()
    device = feed()
    work = chain(COUNT, {"processor": "drop", "first": 0x45}, COUNT)
    supervisor.attach("a", device.fd, mode="tun", work=work)
    for packet in (IPV4_UDP, b"\xff" * 10, IPV4_UDP):
        device.socket.send(packet)
    until(lambda: drops(supervisor, "a") == {"end_of_chain": 2, "filtered": 1})
    statuses = supervisor.stages("a")
    assert [(s.processor, s.bypassed, s.packets_in, s.packets_out) for s in statuses] == [
        ("count", False, 3, 3),
        ("drop", False, 3, 2),
        ("count", False, 2, 2),
    ]
    assert statuses[0].figures["octets"] == 66
    assert statuses[2].figures["seen"] == 2
    assert dict(supervisor.attached()) == {"a": work}


def test_what_is_sent_runs_through_the_targets_chain_backwards_and_is_counted_there(
    start: Start, feed: MakeFeed, until: Until
) -> None:
    supervisor = start()
    source, target = feed(), feed()
    supervisor.attach("b", target.fd, mode="tun", name="tun1", work=chain({"processor": "drop", "first": 0x45}, COUNT))
    supervisor.attach("a", source.fd, mode="tun", name="tun0", work=chain({"processor": "send", "to": "tun1"}))
    source.socket.send(b"\xff" * 10)
    source.socket.send(IPV4_UDP)
    assert target.socket.recv(100) == IPV4_UDP
    until(lambda: supervisor.counters()["b"].to_kernel == {"ipv4.udp": (1, 28)})
    assert drops(supervisor, "b") == {"filtered": 1}
    assert drops(supervisor, "a") == {}
    assert [(s.packets_in, s.packets_out) for s in supervisor.stages("b")] == [(2, 1), (2, 2)]


def test_what_a_target_replaces_is_replaced_there_alone(start: Start, feed: MakeFeed, until: Until) -> None:
    supervisor = start()
    source, swapping, plain = feed(), feed(), feed()
    other = IPV4_UDP[:-1] + b"!"
    supervisor.attach("b", swapping.fd, mode="tun", name="tun1", work=chain({"processor": "swap", "by": other.hex()}))
    supervisor.attach("c", plain.fd, mode="tun", name="tun2")
    first, second = {"processor": "send", "to": "tun1", "keep": True}, {"processor": "send", "to": "tun2"}
    supervisor.attach("a", source.fd, mode="tun", name="tun0", work=chain(first, second))
    source.socket.send(IPV4_UDP)
    assert swapping.socket.recv(100) == other
    assert plain.socket.recv(100) == IPV4_UDP


def test_an_output_may_come_later_and_go(start: Start, feed: MakeFeed, until: Until) -> None:
    supervisor = start(workers=2)
    source, target = feed(), feed()
    supervisor.attach("a", source.fd, mode="tun", name="tun0", work=chain({"processor": "send", "to": "tun1"}))
    source.socket.send(IPV4_UDP)
    until(lambda: drops(supervisor, "a") == {"no_output": 1})
    supervisor.attach("b", target.fd, mode="tun", name="tun1")
    source.socket.send(IPV4_UDP)
    assert target.socket.recv(100) == IPV4_UDP
    supervisor.detach("b")
    source.socket.send(IPV4_UDP)
    until(lambda: drops(supervisor, "a") == {"no_output": 2})
    frames = feed()
    supervisor.attach("b", frames.fd, mode="tap", name="tun1")
    source.socket.send(IPV4_UDP)
    until(lambda: drops(supervisor, "a") == {"no_output": 2, "mode": 1})


def test_a_full_output_costs_packets_and_no_time(start: Start, feed: MakeFeed, until: Until) -> None:
    supervisor = start()
    source, target = feed(), feed()
    supervisor.attach("b", target.fd, mode="tun", name="tun1")
    supervisor.attach("a", source.fd, mode="tun", name="tun0", work=chain({"processor": "send", "to": "tun1"}))
    for _ in range(3000):
        source.socket.send(IPV4_UDP)
    until(lambda: supervisor.counters()["a"].from_kernel["ipv4.udp"][0] == 3000)
    full = drops(supervisor, "a")["output_full"]
    assert full > 0
    assert supervisor.counters()["b"].to_kernel["ipv4.udp"][0] == 3000 - full
    assert supervisor.healthy() == []


def test_a_changed_chain_keeps_the_stages_it_has_in_common(start: Start, feed: MakeFeed, until: Until) -> None:
    supervisor = start()
    device = feed()
    supervisor.attach("a", device.fd, mode="tun", work=chain(COUNT, {"processor": "count", "tag": 1}))
    device.socket.send(IPV4_UDP)
    until(lambda: drops(supervisor, "a") == {"end_of_chain": 1})
    changed = chain({"processor": "drop", "first": 0x45}, {"processor": "count", "tag": 1}, COUNT, COUNT)
    supervisor.configure("a", changed)
    assert supervisor.attached()["a"] == changed
    assert [s.figures.get("seen") for s in supervisor.stages("a")] == [None, 1, 1, 0]
    device.socket.send(IPV4_UDP)
    until(lambda: drops(supervisor, "a") == {"end_of_chain": 2})
    assert [s.figures.get("seen") for s in supervisor.stages("a")] == [None, 2, 2, 1]
    supervisor.configure("a", Work())
    assert supervisor.stages("a") == []


def test_a_chain_that_is_changed_under_traffic_loses_no_packet(start: Start, feed: MakeFeed, until: Until) -> None:
    supervisor = start()
    device, sent = feed(), 5000
    supervisor.attach("a", device.fd, mode="tun", work=chain(COUNT))

    def send() -> None:
        for _ in range(sent):
            device.socket.send(IPV4_UDP)  # waits while the queue is full

    sender = threading.Thread(target=send)
    sender.start()
    changes = 0
    while sender.is_alive() or changes < 10:
        supervisor.configure("a", chain(COUNT, *([COUNT] * (changes % 3))))
        changes += 1
    sender.join()
    until(lambda: drops(supervisor, "a") == {"end_of_chain": sent})
    assert supervisor.stages("a")[0].figures["seen"] == sent, "the stage that stayed has seen all"
    assert packets(supervisor, "a") == sent


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"processor": "picky", "size": 2}, "a: picky: size: is 2, expected 1"),
        ({"processor": "nobody"}, "a: no processor is called nobody; known: .*balance, .*picky"),
        ({"processor": "absent"}, "absent cannot be used: .*ModuleNotFoundError: No module named 'no'"),
        ({"processor": "missing"}, "missing cannot be used: .*AttributeError"),
        ({"processor": "send"}, "a: send: KeyError: 'to'"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_and_the_old_chain_stays(
    start: Start, feed: MakeFeed, until: Until, observed: Observed, stage: dict[str, Any], message: str
) -> None:
    supervisor = start()
    device, other = feed(), feed()
    old = chain(COUNT)
    supervisor.attach("a", device.fd, mode="tun", work=old)
    with pytest.raises(DataplaneError, match=message) as caught:
        supervisor.configure("a", chain(stage, {"processor": "count", "new": True}))
    assert (caught.value.code, caught.value.retry) == ("stage_refused", False)
    assert supervisor.attached()["a"] == old
    device.socket.send(IPV4_UDP)
    until(lambda: supervisor.stages("a")[0].figures["seen"] == 1)
    with pytest.raises(DataplaneError, match=message.replace("a: ", "b: ", 1)):
        supervisor.attach("b", other.fd, mode="tun", work=chain(stage))
    assert other.released()
    assert observed.exits == []


def test_an_answer_goes_back_through_the_chain(start: Start, feed: MakeFeed, until: Until) -> None:
    supervisor = start()
    device = feed()
    supervisor.attach("a", device.fd, mode="tun", work=chain(COUNT, {"processor": "echo"}))
    device.socket.send(IPV4_UDP)
    assert device.socket.recv(100) == IPV4_UDP
    until(lambda: supervisor.stages("a")[1].figures["taken"] == 1)
    assert supervisor.stages("a")[0].figures["seen"] == 2, "once on its way in, once on its way out"
    assert supervisor.counters()["a"].to_kernel == {"ipv4.udp": (1, 28)}


def test_processors_tick(start: Start, feed: MakeFeed, until: Until) -> None:
    supervisor = start()
    supervisor.attach("a", feed().fd, mode="tun", work=chain(COUNT))
    until(lambda: supervisor.stages("a")[0].figures["ticks"] == 2)


def test_devices_that_come_to_exchange_packets_are_brought_together_without_a_loss(
    start: Start, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    supervisor = start(workers=2)
    source, target, third = feed(), feed(), feed()
    supervisor.attach("a", source.fd, mode="tun", name="tun0", work=chain(COUNT))
    session = supervisor.attach("b", target.fd, mode="tun", name="tun1")
    source.socket.send(IPV4_UDP)
    target.socket.send(IPV4_UDP)
    until(lambda: drops(supervisor, "a") == drops(supervisor, "b") == {"end_of_chain": 1})
    for pid in worker_pids():
        os.kill(pid, signal.SIGSTOP)
    target.socket.send(b"\xff" * 10)  # waits in the queue of a device that is about to be moved
    for pid in worker_pids():
        os.kill(pid, signal.SIGCONT)
    supervisor.configure("a", chain(COUNT, {"processor": "send", "to": "tun1"}))
    source.socket.send(IPV4_UDP)
    assert target.socket.recv(100) == IPV4_UDP
    until(lambda: drops(supervisor, "b") == {"end_of_chain": 2})
    until(lambda: supervisor.counters()["b"].to_kernel)
    counters = supervisor.counters()["b"]
    assert counters.session == session, "its figures go on"
    assert counters.from_kernel == {"ipv4.udp": (1, 28), "malformed.bad_version": (1, 10)}
    assert counters.to_kernel == {"ipv4.udp": (1, 28)}
    assert supervisor.stages("a")[0].figures["seen"] == 2, "the one with the longer chain stayed"
    # A third joins both: it goes where they are, though the other worker has nothing to do.
    supervisor.attach("c", third.fd, mode="tun", name="tun2", work=chain({"processor": "send", "to": "tun0"}))
    third.socket.send(IPV4_UDP)
    assert source.socket.recv(100) == IPV4_UDP
    assert (observed.exits, observed.lost) == ([], [])


CAPTURE = {"processor": "capture", "snaplen": 128, "size_bytes": None, "interval_s": None, "files": 1}


class Files:
    """Gives each stage that wants a file /dev/null, or fails."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.entered = threading.Event()
        self.go = threading.Event()
        self.go.set()

    def __call__(self, device: str, name: str, place: int, spec: dict[str, Any]) -> list[int]:
        del device, name, place, spec
        self.entered.set()
        assert self.go.wait(10)
        if self.failure is not None:
            raise self.failure
        return [os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)]


def test_a_device_whose_stages_cannot_be_made_for_another_worker_stays_where_it_is(
    start: Start, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    files = Files()
    supervisor = start(workers=2, files_for=files)
    target, source = feed(), feed()
    supervisor.attach("a", target.fd, mode="tun", name="tun0", work=chain(CAPTURE))
    supervisor.attach("b", source.fd, mode="tun", name="tun1", work=chain(COUNT, COUNT))
    files.failure = TimeoutError("the disk is slow")
    sending = chain(COUNT, COUNT, {"processor": "send", "to": "tun0"})
    with pytest.raises(TimeoutError):
        supervisor.configure("b", sending)
    assert set(supervisor.attached()) == {"a", "b"}
    target.socket.send(IPV4_UDP)
    until(lambda: supervisor.stages("a")[0].packets_in == 1)
    assert observed.lost == []
    files.failure = None
    supervisor.configure("b", sending)
    source.socket.send(IPV4_UDP)
    assert target.socket.recv(100) == IPV4_UDP


def test_whatever_fails_after_a_device_was_released_has_it_lost_and_told_of(
    start: Start, feed: MakeFeed, until: Until, observed: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor = start(workers=2)
    target, source, again = feed(), feed(), feed()
    supervisor.attach("a", target.fd, mode="tun", name="tun0")
    supervisor.attach("b", source.fd, mode="tun", name="tun1", work=chain(COUNT))
    sending = chain(COUNT, {"processor": "send", "to": "tun0"})

    def fails(setup: object) -> int:
        raise MemoryError("nothing left")

    with monkeypatch.context() as patched:
        patched.setattr("service.dataplane.handover.written", fails)
        with pytest.raises(MemoryError):
            supervisor.configure("b", sending)
    assert observed.lost == [("a", "nothing left")]
    until(target.released)  # the worker closes its own descriptor once it has sent it
    assert set(supervisor.attached()) == {"b"}
    supervisor.attach("a", again.fd, mode="tun", name="tun0")
    supervisor.configure("b", sending)
    source.socket.send(IPV4_UDP)
    assert again.socket.recv(100) == IPV4_UDP


def test_a_device_for_which_there_is_no_room_elsewhere_stays_where_it_is(
    start: Start, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    supervisor = start(workers=2, devices_per_worker=2)
    devices = {key: feed() for key in "abcd"}  # a and c with one worker, b and d with the other
    for key, device in devices.items():
        supervisor.attach(key, device.fd, mode="tun", name=f"tun-{key}", work=chain(COUNT))
    before = supervisor.attached()
    for moved, other in ("ab", "ba"):
        for _ in range(3):
            with pytest.raises(DataplaneError) as caught:
                supervisor.configure(moved, chain(COUNT, {"processor": "send", "to": f"tun-{other}"}))
            assert caught.value.code == "worker_full"
    assert supervisor.attached() == before
    for key, device in devices.items():
        device.socket.send(IPV4_UDP)
        until(lambda key=key: supervisor.stages(key)[0].figures["seen"] == 1)
    assert observed.lost == []
    supervisor.detach("c")
    supervisor.detach("d")
    supervisor.configure("a", chain(COUNT, {"processor": "send", "to": "tun-b"}))
    devices["a"].socket.send(IPV4_UDP)
    assert devices["b"].socket.recv(100) == IPV4_UDP


def test_calls_wait_for_the_one_that_is_at_work_on_the_device(start: Start, feed: MakeFeed) -> None:
    files = Files()
    supervisor = start(files_for=files)
    supervisor.attach("a", feed().fd, mode="tun", work=chain(COUNT))
    calls: list[Callable[[], object]] = [
        lambda: supervisor.configure("a", chain(COUNT)),
        lambda: supervisor.untap("a", supervisor.tap("a", {**COUNT, "on_crash": "restart"})),
        lambda: supervisor.detach("a"),
    ]
    for number, call in enumerate(calls, 1):
        files.go.clear()
        files.entered.clear()
        first = threading.Thread(target=supervisor.configure, args=("a", chain({**CAPTURE, "files": number})))
        first.start()
        assert files.entered.wait(10)
        threading.Timer(0.1, files.go.set).start()
        call()
        first.join()
    assert dict(supervisor.attached()) == {}


def test_a_device_that_others_do_not_finish_with_is_busy(
    start: Start, feed: MakeFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Files()
    supervisor = start(files_for=files)
    supervisor.attach("a", feed().fd, mode="tun", work=chain(COUNT))
    files.go.clear()
    files.failure = OSError("too late")
    failures: list[str] = []

    def change() -> None:
        try:
            supervisor.configure("a", chain(CAPTURE))
        except OSError as error:
            failures.append(str(error))

    first = threading.Thread(target=change)
    first.start()
    assert files.entered.wait(10)
    with monkeypatch.context() as patched:
        patched.setattr("service.dataplane.roster.BUSY_TIMEOUT_S", 0.1)
        with pytest.raises(DataplaneError) as caught:
            supervisor.configure("a", chain(COUNT))
        assert (caught.value.code, caught.value.retry) == ("device_busy", True)
    files.go.set()
    first.join()
    assert failures == ["too late"]
    supervisor.configure("a", chain(COUNT, COUNT))


def test_nobody_waits_in_a_circle(start: Start, feed: MakeFeed) -> None:
    supervisor = start()
    for key in "ab":
        supervisor.attach(key, feed().fd, mode="tun")
    with supervisor._roster.claimed("a") as first, supervisor._roster.claimed("b") as second:
        first.waits = True  # for b
        with pytest.raises(DataplaneError, match="changed by another call"), supervisor._roster.claimed("a", second):
            pass
        first.waits = False


def test_a_neighbour_that_is_on_its_way_out_keeps_nobody_waiting(start: Start, feed: MakeFeed) -> None:
    supervisor = start(workers=2)
    supervisor.attach("a", feed().fd, mode="tun", name="tun0", work=chain(COUNT))
    supervisor.attach("b", feed().fd, mode="tun", name="tun1")
    with supervisor._roster.lock:
        going = supervisor._roster.claim("b", "detaching", None)
    assert going is not None
    work = chain(COUNT, {"processor": "send", "to": "tun1"})
    supervisor.configure("a", work)
    assert supervisor.attached()["a"] == work
    assert going.worker is not supervisor._roster.attachments["a"].worker, "it was left where it is"
    going.busy = None


def test_a_processor_can_open_nothing_and_start_nothing(
    start: Start, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    if not syscalls.available():
        pytest.skip("missing: a seccomp filter for this machine")
    supervisor = start()
    device = feed()
    supervisor.attach("a", device.fd, mode="tun", work=chain({"processor": "open"}))
    device.socket.send(IPV4_UDP)
    # The one thing that works is another thread.
    until(lambda: supervisor.stages("a")[0].figures == {"refused": 12, "worked": 1})
    assert observed.exits == []
