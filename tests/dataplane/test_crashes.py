"""Processors that take their worker down: who is told what, what goes on without them, and when they come back."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import structlog

from service.dataplane.attachment import Ended
from service.dataplane.crashes import RESTART_MAX_S, Crashes, restart_delay_s
from service.dataplane.errors import DataplaneError
from service.dataplane.supervisor import Supervisor
from service.dataplane.work import Work
from service.dataplane.worker_process import WorkerProcess
from tests.dataplane.conftest import Observed, Until
from tests.dataplane.test_chains import COUNT, Start, chain, drops, start
from tests.dataplane.test_supervisor import IPV4_UDP, MakeFeed, feed

__all__ = ["feed", "start"]

DEADLY = IPV4_UDP[:-1] + b"\xee"


def attach(supervisor: Supervisor, make: MakeFeed, name: str, work: Work) -> Callable[[bytes], Any]:
    device = make()
    supervisor.attach(name, device.fd, mode="tun", work=work)
    return device.socket.send


@pytest.mark.parametrize(
    ("how", "status", "error"),
    [
        ("raise", "exit 1", "RuntimeError: could not bear it"),
        ("segfault", "signal SIGSEGV", ""),
        ("exit", "exit 3", ""),
    ],
)
def test_a_crash_is_told_with_the_stage_and_the_packet_that_did_it(
    start: Start, feed: MakeFeed, until: Until, observed: Observed, how: str, status: str, error: str
) -> None:
    supervisor = start()
    drop = {"processor": "drop", "first": 0x45}
    work = chain(COUNT, drop, {"processor": "crash", "how": how})
    device = feed()
    for packet in (b"\xff" * 9, IPV4_UDP, DEADLY + b"\0" * 400 + b"\xee", IPV4_UDP):
        device.socket.send(packet)
    with contextlib.suppress(DataplaneError):  # it may be dead before it has answered
        supervisor.attach("a", device.fd, mode="tun", name="tun0", work=work)
    until(lambda: observed.exits)
    (gone,) = observed.exits
    assert gone.status == status
    crash = gone.crash
    assert crash is not None
    assert (crash.device, crash.name, crash.stage, crash.processor, crash.then) == ("a", "tun0", 2, "crash", "restart")
    assert crash.error == error
    assert crash.packet == (DEADLY + b"\0" * 400)[:256], "not the first of the batch, nor the first that was left in it"
    assert crash.packet_bytes == 429


def test_a_death_is_one_line_of_the_log_and_its_traceback_is_for_who_looks_closer(
    start: Start, feed: MakeFeed, until: Until, observed: Observed, capfd: pytest.CaptureFixture[str]
) -> None:
    with structlog.testing.capture_logs() as said:
        supervisor = start()
        pid = supervisor._roster.posts[0].live.pid  # type: ignore[union-attr]
        attach(supervisor, feed, "a", chain({"processor": "crash"}))(DEADLY)
        until(lambda: observed.exits)
    (death,) = [line for line in said if "died" in line["event"]]
    assert death == {
        "event": "a packet worker died",
        "log_level": "error",
        "worker": 0,
        "pid": pid,
        "status": "exit 1",
        "error": "RuntimeError: could not bear it",
        "devices": ["a"],
    }
    assert supervisor._roster.posts[0].reason == "exit 1: RuntimeError: could not bear it"
    words = [line["line"] for line in said if line["log_level"] == "debug"]
    assert words[0] == "Traceback (most recent call last):"
    assert words[-1] == death["error"]
    assert "Traceback" not in "".join(capfd.readouterr()), "raw"


def test_what_a_worker_says_is_heard_in_lines_of_a_bounded_length() -> None:
    worker = object.__new__(WorkerProcess)
    reading, writing = os.pipe2(os.O_NONBLOCK)
    vars(worker).update(words=reading, last_line="", _unfinished=b"")
    os.write(writing, b"half a li")
    assert worker.hear() == []
    os.write(writing, b"ne\n" + b"x" * 10_000 + b"\n\nlast")
    assert worker.hear() == ["half a line", "x" * 2000]
    with pytest.raises(BlockingIOError):
        worker.hear()
    os.close(writing)
    assert (worker.hear(), worker.hear(), worker.last_line) == (["last"], None, "last")
    os.close(reading)


def test_a_worker_killed_from_outside_is_nobodys_crash(
    start: Start, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    supervisor = start()
    send = attach(supervisor, feed, "a", chain({"processor": "crash", "how": "hang"}))
    send(DEADLY)
    until(lambda: supervisor.stages("a")[0].packets_in == 1)
    os.kill(supervisor._roster.posts[0].live.pid, 9)  # type: ignore[union-attr]
    until(lambda: observed.exits)
    assert observed.exits[0].crash is None


def test_a_processor_that_never_ends_is_ended(start: Start, feed: MakeFeed, until: Until, observed: Observed) -> None:
    supervisor = start()
    other = attach(supervisor, feed, "other", chain(COUNT))
    send = attach(supervisor, feed, "a", chain({"processor": "crash", "how": "hang", "on_crash": "bypass"}))
    send(DEADLY)
    until(lambda: observed.exits, within_s=20.0)
    crash = observed.exits[0].crash
    assert crash is not None
    assert (crash.device, crash.error, crash.then) == ("a", "it did not come to an end for 2 s", "bypass")
    assert crash.packet == DEADLY
    del other


def test_a_stage_is_left_out_after_its_crash_until_the_chain_changes(
    start: Start, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    supervisor = start()
    work = chain({"processor": "crash", "on_crash": "bypass"}, COUNT)
    attach(supervisor, feed, "a", work)(DEADLY)
    until(lambda: observed.exits)
    send = attach(supervisor, feed, "a", work)
    send(DEADLY)
    until(lambda: drops(supervisor, "a") == {"end_of_chain": 1})
    assert [(s.bypassed, s.packets_in) for s in supervisor.stages("a")] == [(True, 0), (False, 1)]
    supervisor.configure("a", chain({"processor": "crash", "on_crash": "bypass"}, COUNT, COUNT))
    assert [s.bypassed for s in supervisor.stages("a")] == [False, False, False]
    send(DEADLY)
    until(lambda: len(observed.exits) == 2)
    supervisor.detach("a")
    attach(supervisor, feed, "a", chain({"processor": "crash", "on_crash": "bypass"}, COUNT, COUNT))
    assert not supervisor.stages("a")[0].bypassed, "processing was ended and begun anew"


def test_a_stage_that_comes_back_waits_longer_each_time_and_others_do_not_wait(
    start: Start, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    supervisor = start()
    work = chain({"processor": "crash"})
    attach(supervisor, feed, "a", work)(DEADLY)
    until(lambda: len(observed.exits) == 1)
    attach(supervisor, feed, "a", work)(DEADLY)  # at once after the first
    until(lambda: len(observed.exits) == 2)
    with pytest.raises(DataplaneError, match=r"a: .* crashes again and again .*; it is read again") as caught:
        attach(supervisor, feed, "a", work)
    assert (caught.value.code, caught.value.retry) == ("processor_crashed", True)
    send = attach(supervisor, feed, "b", chain(COUNT))
    send(IPV4_UDP)
    until(lambda: drops(supervisor, "b") == {"end_of_chain": 1})
    attach(supervisor, feed, "c", work)  # the same chain elsewhere has done nothing yet
    supervisor.detach("a")
    attach(supervisor, feed, "a", work)


def test_back_off_is_bounded_and_ends_with_a_quiet_time() -> None:
    assert [restart_delay_s(n) for n in (1, 2, 3, 4)] == [0.0, 1.0, 2.0, 4.0]
    assert restart_delay_s(1000) == RESTART_MAX_S
    stages = ({"processor": "x", "on_crash": "restart"},)
    crashes = Crashes()
    assert [crashes.crashed("a", stages, 0, now) for now in (0.0, 0.0, 0.0)] == ["restart"] * 3
    assert crashes.waits_s("a", stages, 0.5) == 1.5
    assert crashes.waits_s("a", (), 0.5) == 0.0
    crashes.crashed("a", stages, 0, 1000.0)
    assert crashes.waits_s("a", stages, 1000.0) == 0.0
    crashes.crashed("a", stages, 0, 1000.0)
    crashes.forget("a")
    assert crashes.waits_s("a", stages, 1000.0) == 0.0


# -- taps


def test_a_tap_sees_what_the_wire_would_and_ends_with_its_figures(
    start: Start, feed: MakeFeed, until: Until, observed: Observed
) -> None:
    ended: list[Ended] = []
    supervisor = start(on_stage_ended=ended.append)
    send = attach(supervisor, feed, "a", chain({"processor": "drop", "first": 0x60}))
    first, second = os.pipe(), os.pipe()
    tap = supervisor.tap("a", {"processor": "sink"}, [first[1]])
    send(IPV4_UDP)
    assert os.read(first[0], 100) == IPV4_UDP, "though the chain drops it"
    supervisor.feed("a", tap, second[1])
    send(IPV4_UDP)
    assert os.read(second[0], 100) == IPV4_UDP
    until(lambda: supervisor.tap_figures("a", tap) == {"written": 2, "files": 1})
    supervisor.configure("a", chain(COUNT))
    send(IPV4_UDP)
    assert os.read(second[0], 100) == IPV4_UDP, "a changed chain leaves it alone"
    assert [s.processor for s in supervisor.stages("a")] == ["count"]
    assert supervisor.untap("a", tap) == {"written": 3, "files": 1}
    send(IPV4_UDP)
    until(lambda: drops(supervisor, "a") == {"filtered": 2, "end_of_chain": 2})
    with pytest.raises(DataplaneError, match="has no tap"):
        supervisor.untap("a", tap)
    for fds in (first, second):
        os.close(fds[1])
        os.set_blocking(fds[0], False)
        assert os.read(fds[0], 1) == b"", "nobody holds it any more"
        os.close(fds[0])
    again = supervisor.tap("a", {"processor": "count"})
    assert ended == []
    supervisor.detach("a")
    (end,) = ended
    assert (end.device, end.stage, end.reason) == ("a", again, "interface_gone")
    assert set(end.figures) == {"seen", "octets", "ticks"}
    assert observed.exits == []


def test_a_tap_that_crashes_is_not_put_back(start: Start, feed: MakeFeed, until: Until, observed: Observed) -> None:
    ended: list[Ended] = []
    supervisor = start(on_stage_ended=ended.append)
    send = attach(supervisor, feed, "a", chain(COUNT))
    tap = supervisor.tap("a", {"processor": "crash"})
    send(DEADLY)
    until(lambda: observed.exits and ended)
    crash = observed.exits[0].crash
    assert crash is not None
    assert (crash.stage, crash.processor, crash.then) == (-1, "crash", "bypass")
    assert ended == [Ended("a", tap, {}, "worker_exit")]
    attach(supervisor, feed, "a", chain(COUNT))(DEADLY)
    until(lambda: drops(supervisor, "a") == {"end_of_chain": 1})
