"""That the end of each stage with files, and of each tap, is told once: why, and with all that its worker counted."""

import asyncio
import os
import threading
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from service.dataplane.attachment import Ended
from service.dataplane.errors import DataplaneError
from service.dataplane.supervisor import Supervisor
from service.domain import events as ev
from service.domain.values import InterfaceId
from service.packet.pcapng import Reader
from service.plane import Plane
from service.reconcile.captures import Captures
from tests.dataplane.conftest import Observed, Until
from tests.dataplane.test_chains import COUNT, Start, chain, start
from tests.dataplane.test_supervisor import IPV4_UDP, Feed, MakeFeed, feed, only_worker

__all__ = ["feed", "start"]

CAPTURE: dict[str, Any] = {"processor": "capture", "snaplen": 128, "size_bytes": None, "interval_s": None, "files": 1}


class Files:
    """Gives each stage a file of its own, and keeps what is said of its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.given: list[int] = []
        self.ended: list[Ended] = []

    def __call__(self, device: str, name: str, stage_id: int, spec: dict[str, Any]) -> list[int]:
        del device, name, spec
        self.given.append(stage_id)
        return [os.open(self.folder / str(stage_id), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)]

    def packets(self, stage_id: int) -> int:
        return len(list(Reader().feed((self.folder / str(stage_id)).read_bytes())))

    def reasons(self) -> list[tuple[int, str]]:
        return [(end.stage, end.reason) for end in self.ended]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def starting(start: Start, files: Files, **more: Any) -> Supervisor:
    return start(files_for=files, on_stage_ended=files.ended.append, **more)


def flood(device: Feed, over: threading.Event) -> threading.Thread:
    def send() -> None:
        while not over.is_set():
            device.socket.send(IPV4_UDP)

    sender = threading.Thread(target=send)
    sender.start()
    return sender


def test_a_stage_that_is_taken_out_under_load_ends_with_the_packets_in_its_file(
    start: Start, feed: MakeFeed, files: Files, until: Until
) -> None:
    supervisor, device, over = starting(start, files), feed(), threading.Event()
    supervisor.attach("a", device.fd, mode="tun", work=chain(COUNT))
    sender = flood(device, over)
    try:
        for number in range(1, 6):
            supervisor.configure("a", chain(CAPTURE, COUNT))
            until(lambda: supervisor.stages("a")[0].figures["packets"] > 100)
            supervisor.configure("a", chain(COUNT))
            assert len(files.ended) == number, "told when the change is done"
    finally:
        over.set()
        sender.join()
    assert files.reasons() == [(stage, "removed") for stage in files.given]
    assert [end.figures["packets"] for end in files.ended] == [files.packets(stage) for stage in files.given]


def test_a_stage_keeps_its_id_while_the_chain_around_it_changes(start: Start, feed: MakeFeed, files: Files) -> None:
    supervisor = starting(start, files)
    supervisor.attach("a", feed().fd, mode="tun", work=chain(CAPTURE))
    (first,) = files.given
    supervisor.configure("a", chain(COUNT, CAPTURE, CAPTURE))
    second = files.given[1]
    assert [stage.id for stage in supervisor.stages("a")][1:] == [first, second]
    supervisor.configure("a", chain(CAPTURE))
    assert files.reasons() == [(second, "removed")]
    assert supervisor.detach("a") is not None
    assert files.reasons() == [(second, "removed"), (first, "interface_gone")]


def test_a_chain_that_is_refused_ends_what_it_had_begun_and_nothing_else(
    start: Start, feed: MakeFeed, files: Files
) -> None:
    supervisor = starting(start, files)
    supervisor.attach("a", feed().fd, mode="tun", work=chain(CAPTURE))
    with pytest.raises(DataplaneError, match="picky"):
        supervisor.configure("a", chain(CAPTURE, CAPTURE, {"processor": "picky"}))
    with pytest.raises(DataplaneError, match="picky"):
        supervisor.attach("b", feed().fd, mode="tun", work=chain(CAPTURE, {"processor": "picky"}))
    first, second, third = files.given
    assert files.reasons() == [(second, "refused"), (third, "refused")]
    assert [stage.id for stage in supervisor.stages("a")] == [first]


def test_a_stage_that_its_worker_was_never_told_of_is_refused(
    start: Start, feed: MakeFeed, files: Files, monkeypatch: pytest.MonkeyPatch, observed: Observed
) -> None:
    supervisor = starting(start, files)
    supervisor.attach("a", feed().fd, mode="tun", work=chain(COUNT))
    monkeypatch.setattr("service.dataplane.handover.REQUEST_TIMEOUT_S", 0.1)
    worker = supervisor._roster.posts[0].live
    assert worker is not None
    with worker._asking, pytest.raises(DataplaneError) as caught:  # others ask it all the time
        supervisor.configure("a", chain(CAPTURE))
    assert (caught.value.code, caught.value.retry) == ("worker_timeout", True)
    assert files.reasons() == [(files.given[0], "refused")]
    supervisor.configure("a", chain(CAPTURE))
    assert observed.exits == []


def test_repairs_that_are_refused_take_no_captured_packets_away(start: Start, feed: MakeFeed, tmp_path: Path) -> None:
    told: list[ev.Event] = []

    async def record(interface_id: InterfaceId, body: ev.Event, *, actor: str = "") -> None:
        del interface_id, actor
        told.append(body)

    async def run() -> None:
        holder: list[Captures] = []
        supervisor = start(
            files_for=lambda *stage: holder[0].files_for(*stage),  # noqa: PLW0108  # it comes later
            on_stage_ended=lambda end: holder[0].ended(end.device, end.stage, end.figures, end.reason),
        )
        captures = Captures(
            Plane(supervisor), record, tmp_path, now=lambda: f"{len(told):03}", new_id=lambda: str(uuid.uuid4())
        )
        holder.append(captures)
        captures.bind()

        async def settle(stops: int) -> None:
            async with asyncio.timeout(5):
                while len(told) < 2 * stops or captures._tasks:  # noqa: ASYNC110  # threads, which wake nobody
                    await asyncio.sleep(0.002)

        device, stage = feed(), {**CAPTURE, "files": 2}
        await asyncio.to_thread(supervisor.attach, "a", device.fd, mode="tun", work=chain(stage))
        device.socket.send(IPV4_UDP)
        (real,) = captures.all()
        async with asyncio.timeout(5):
            while not real.figures.get("packets"):
                await captures.look_at([real])
        await asyncio.to_thread(supervisor.configure, "a", chain(COUNT))
        await settle(1)
        for number in range(2, 6):
            with pytest.raises(DataplaneError, match="absent"):
                await asyncio.to_thread(supervisor.configure, "a", chain(stage, {"processor": "absent"}))
            await settle(number)
        assert captures.all() == [real]
        assert all(path.exists() for path in real.files.values())

    asyncio.run(run())
    assert len(list(tmp_path.iterdir())) == 1


def test_a_worker_that_is_killed_ends_its_stages_and_taps_for_that_reason(
    start: Start, feed: MakeFeed, files: Files, until: Until, observed: Observed
) -> None:
    supervisor, device = starting(start, files), feed()
    supervisor.attach("a", device.fd, mode="tun", work=chain(CAPTURE))
    tap = supervisor.tap("a", COUNT)
    device.socket.send(IPV4_UDP)
    until(lambda: supervisor.tap_figures("a", tap)["seen"] == 1)
    os.kill(only_worker(), 9)
    until(lambda: observed.exits and len(files.ended) == 2)
    assert Counter(files.reasons()) == Counter([(tap, "worker_exit"), (files.given[0], "worker_exit")])
    by_id = {end.stage: end.figures for end in files.ended}
    assert (by_id[tap]["seen"], by_id[files.given[0]]["packets"]) == (1, 1)


def test_a_device_that_goes_ends_its_stages_with_their_figures(
    start: Start, feed: MakeFeed, files: Files, until: Until, observed: Observed
) -> None:
    supervisor, device = starting(start, files), feed()
    supervisor.attach("a", device.fd, mode="tun", work=chain(CAPTURE))
    device.socket.send(IPV4_UDP)
    device.socket.close()
    until(lambda: observed.lost)
    (end,) = files.ended
    assert (end.reason, end.figures["packets"]) == ("interface_gone", 1)


def test_a_device_that_moves_ends_its_stages_and_begins_them_anew(start: Start, feed: MakeFeed, files: Files) -> None:
    supervisor = starting(start, files, workers=2)
    supervisor.attach("a", feed().fd, mode="tun", name="tun0", work=chain(CAPTURE))
    supervisor.attach("b", feed().fd, mode="tun", name="tun1", work=chain(COUNT, COUNT))
    supervisor.configure("b", chain(COUNT, COUNT, {"processor": "send", "to": "tun0"}))
    first, second = files.given
    assert files.reasons() == [(first, "moved")]
    assert [stage.id for stage in supervisor.stages("a")] == [second]
