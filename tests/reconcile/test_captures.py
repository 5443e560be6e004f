"""Captures as the service keeps them, with a data plane that only remembers what it was given."""

import asyncio
import contextlib
import errno
import functools
import os
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from service.domain import commands as cmd
from service.domain import events as ev
from service.domain.errors import ErrorCode, TunledgerError
from service.domain.values import InterfaceId, InterfaceName
from service.reconcile.captures import Asker, Capture, Captures, Settings
from service.store.reader import LogReader, Selection

TUN0, NAME = InterfaceId("01890000-0000-7000-8000-000000000001"), InterfaceName("tun0")
ASKER = Asker("uid:0", cmd.Request(via="v1", call="capture", peer="127.0.0.1:1", user="root"))
STAGE = {"snaplen": 128, "size_bytes": 4096, "interval_s": None, "files": 2}


@dataclass
class Stage:
    processor: str
    figures: Mapping[str, int] = field(default_factory=dict)


class Plane:
    """A data plane that writes nothing by itself."""

    def __init__(self, log: list[tuple[str, Any]]) -> None:
        self.log = log
        self.held: set[str] = {TUN0}
        self.taps: dict[int, dict[str, Any]] = {}
        self.files: dict[int, list[int]] = {}
        self.figures: dict[int, Counter[str]] = {}
        self.chain: list[Stage] = []
        self.refusal: TunledgerError | None = None

    def attached(self) -> Collection[str]:
        return self.held

    def tap(self, device: str, stage: Mapping[str, Any], files: Sequence[int]) -> int:
        self.log.append(("tap", device))
        if self.refusal is not None:
            raise self.refusal
        tap_id = len(self.files)
        self.taps[tap_id], self.files[tap_id], self.figures[tap_id] = (
            dict(stage),
            [os.dup(fd) for fd in files],
            Counter(),
        )
        return tap_id

    def untap(self, _: str, tap_id: int) -> Mapping[str, int]:
        self.taps.pop(tap_id)
        for fd in self.files[tap_id]:
            os.close(fd)
        return self.figures[tap_id]

    def feed(self, _: str, place: int, fd: int) -> None:
        self.files.setdefault(place, []).append(os.dup(fd))

    def tap_figures(self, _: str, tap_id: int) -> Mapping[str, int]:
        return self.figures[tap_id]

    def stages(self, _: str) -> Sequence[Stage]:
        return self.chain


class World:
    def __init__(self, folder: Path, **more: Any) -> None:
        self.log: list[tuple[str, Any]] = []
        self.plane = Plane(self.log)
        self.trimmed: list[Path] = []
        self.folder = folder / "captures"
        self.captures = Captures(
            self.plane,
            self.record,
            self.folder,
            now=lambda: "2026-01-01T00:00:00.000000Z",
            new_id=lambda: str(uuid.uuid4()),
            trim=self.trimmed.append,
            **more,
        )

    async def record(self, interface_id: InterfaceId, body: ev.Event, *, actor: str = "system") -> None:
        assert interface_id == TUN0
        assert actor == (ASKER.actor if isinstance(body, ev.CaptureStarted) and body.request.via == "v1" else "system")
        await asyncio.sleep(0)
        self.log.append((type(body).__name__, body))

    async def start(self, **settings: Any) -> Capture:
        return await self.captures.start(TUN0, NAME, Settings(**{"snaplen": 128, **settings}), ASKER)

    def told(self) -> list[str]:
        return [kind for kind, _ in self.log]

    def stops(self) -> list[tuple[str, int, int]]:
        return [(e.reason, e.packets, e.dropped) for _, e in self.log if isinstance(e, ev.CaptureStopped)]


@contextlib.asynccontextmanager
async def world(folder: Path, **more: Any) -> AsyncIterator[World]:
    made = World(folder, **more)
    made.captures.bind()
    yield made
    await made.captures.close()


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # files and figures, which wake nobody
            await asyncio.sleep(0.001)


@on_a_loop
async def test_a_capture_is_in_the_log_before_the_data_plane_hears_of_it(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.start()
        assert w.told() == ["CaptureStarted", "tap"]
        w.plane.figures[0].update(packets=5, bytes=500, dropped=1)
        await w.captures.stop(capture)
        assert w.told() == ["CaptureStarted", "tap", "CaptureStopped"]
        assert w.stops() == [("asked", 5, 1)]
        await w.captures.stop(capture)
        assert len(w.stops()) == 1


@on_a_loop
async def test_files_belong_to_the_service_alone_and_stay_until_they_are_removed(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.start()
        (path,) = w.folder.iterdir()
        assert path.name == f"tun0-{capture.id}-0.pcapng"
        assert (path.stat().st_mode & 0o777, w.folder.stat().st_mode & 0o777) == (0o600, 0o700)
        await w.captures.stop(capture)
        assert path.exists()
        await w.captures.remove(capture)
        assert not path.exists()
        with pytest.raises(TunledgerError, match="no capture"):
            w.captures.find(TUN0, capture.id)


@on_a_loop
async def test_what_the_log_does_not_take_is_not_captured(tmp_path: Path) -> None:
    async with world(tmp_path) as w:

        async def refuse(*_: Any, **__: Any) -> None:
            raise TunledgerError(ErrorCode.LOG_FULL, "full", retry=True)

        w.captures._record = refuse
        with pytest.raises(TunledgerError, match="full"):
            await w.start()
        assert w.told() == []
        assert list(w.folder.iterdir()) == []
        assert w.captures.all(TUN0) == []


@on_a_loop
async def test_a_capture_that_the_data_plane_refuses_is_told_as_over_and_leaves_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.plane.refusal = TunledgerError(ErrorCode.WORKER_FAILED, "no worker", retry=True)
        with pytest.raises(TunledgerError, match="no worker"):
            await w.start()
        assert w.told() == ["CaptureStarted", "tap", "CaptureStopped"]
        assert list(w.folder.iterdir()) == []


@on_a_loop
async def test_an_interface_that_nobody_reads_cannot_be_captured(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.plane.held.clear()
        with pytest.raises(TunledgerError, match="start its processing") as refused:
            await w.start()
        assert refused.value.code is ErrorCode.NOT_RUNNING
        assert w.told() == []


@on_a_loop
async def test_only_so_many_captures_run_at_once(tmp_path: Path) -> None:
    async with world(tmp_path, captures_max=2) as w:
        first = await w.start()
        found = await asyncio.gather(w.start(), w.start(), return_exceptions=True)
        refused = [each for each in found if isinstance(each, TunledgerError)]
        assert [each.code for each in refused] == [ErrorCode.TOO_MANY_CAPTURES]
        await w.captures.stop(first)
        await w.start()


@on_a_loop
async def test_the_next_file_comes_when_it_is_asked_for_and_the_oldest_goes(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.start(size_bytes=4096, files=2)
        for wanted in (1, 2, 3):
            w.plane.figures[0]["files_wanted"] = wanted
            w.captures.poked()
            await until(lambda n=wanted: len(w.plane.files[0]) == n + 1)  # type: ignore[misc]
        w.captures.poked()
        await w.captures.look_at([capture])
        assert len(w.plane.files[0]) == 4
        await until(lambda: sorted(capture.files) == [2, 3])
        assert {path.name.rsplit("-", 1)[1] for path in w.folder.iterdir()} == {"2.pcapng", "3.pcapng"}


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"stopped": errno.ENOSPC}, "disk_full"),
        ({"stopped": errno.EIO}, "write_failed"),
        ({"finished": 1}, "finished"),
    ],
)
@on_a_loop
async def test_a_capture_ends_when_its_stage_says_so(figures: dict[str, int], reason: str, tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.start()
        w.plane.figures[0].update(figures, packets=2, dropped=3)
        w.captures.poked()
        await until(lambda: not capture.running)
        await until(lambda: w.stops() == [(reason, 2, 3)])
        await until(lambda: (w.trimmed == list(capture.files.values())) == (reason == "disk_full"))


@on_a_loop
async def test_a_capture_ends_when_its_time_is_over(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.start(max_seconds=1)
        await until(lambda: bool(w.stops()))
        assert capture.reason == "finished"


@on_a_loop
async def test_a_capture_whose_worker_died_is_over_with_the_figures_it_had(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.start()
        w.captures.ended(TUN0, capture.place, {"packets": 9}, "worker_exit")
        await until(lambda: w.stops() == [("worker_exit", 9, 0)])
        await w.captures.stop(capture)
        assert len(w.stops()) == 1


@on_a_loop
async def test_a_live_capture_ends_with_its_reader(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        live = await w.captures.listen(TUN0, NAME, Settings(snaplen=128), ASKER)
        assert w.plane.taps[0]["live"] is True
        os.write(w.plane.files[0][0], b"abc")
        assert os.read(live.fd, 10) == b"abc"
        with pytest.raises(BlockingIOError):
            os.read(live.fd, 10)
        await w.captures.hang_up(live)
        assert w.stops() == [("client_gone", 0, 0)]
        assert w.captures.all(TUN0) == []
        assert w.log[0][1].live


@on_a_loop
async def test_a_stage_of_a_chain_gets_its_files_and_is_in_the_log(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        files = await asyncio.to_thread(w.captures.files_for, TUN0, "tun0", 1, STAGE)
        assert w.told() == ["CaptureStarted"]
        (capture,) = w.captures.all(TUN0)
        w.plane.chain = [Stage("inspect"), Stage("capture", {"packets": 4, "files_wanted": 1})]
        await w.captures.look_at([capture])
        assert len(w.plane.files[-2]) == 1
        w.plane.chain.insert(0, Stage("filter"))  # now at place 2
        await w.captures.look_at([capture])
        assert capture.running
        with pytest.raises(TunledgerError, match=r"processing\.chain"):
            await w.captures.stop(capture)
        w.plane.chain = [Stage("inspect")]
        await w.captures.look_at([capture])
        assert w.stops() == [("asked", 4, 0)]
        for fd in (*files, *w.plane.files[-2]):
            os.close(fd)


@on_a_loop
async def test_an_orderly_stop_ends_all_captures_and_begins_none(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        await w.start()
        await w.start()
    assert [reason for reason, _, _ in w.stops()] == ["shutdown", "shutdown"]
    with pytest.raises(TunledgerError) as refused:
        await w.start()
    assert refused.value.code is ErrorCode.SHUTTING_DOWN


class Log(LogReader):
    """A log in memory."""

    def __init__(self, *bodies: ev.Event) -> None:
        self.bodies = bodies

    def page(self, wanted: Selection, *, limit: int, newest_first: bool = False) -> list[ev.Recorded]:
        assert newest_first
        events = [
            ev.Recorded(
                position=position,
                event_id="",
                stream="",
                version=1,
                actor="",
                command_id=None,
                node="",  # type: ignore[arg-type]
                recorded_at=f"2025-01-01T00:00:0{position}.000000Z",
                hash="",
                body=body,
            )
            for position, body in enumerate(self.bodies, 1)
        ]
        return [each for each in events[::-1] if wanted.matches(each)][:limit]


def started(capture_id: str) -> ev.CaptureStarted:
    settings = Settings(snaplen=64, files=2).to_json()
    return ev.CaptureStarted(
        interface_id=TUN0, name=NAME, capture_id=capture_id, live=False, settings=settings, request=ASKER.request
    )


def stopped(capture_id: str) -> ev.CaptureStopped:
    return ev.CaptureStopped(
        interface_id=TUN0, name=NAME, capture_id=capture_id, reason="asked", packets=7, bytes=8, dropped=9
    )


@on_a_loop
async def test_after_a_crash_open_captures_are_told_as_stopped_and_files_are_taken_up(tmp_path: Path) -> None:
    old, kept, crashed = (str(uuid.uuid4()) for _ in range(3))
    orderly = ev.ServiceStopped(pid=1, reason="", interfaces="keep")
    reader = Log(
        *(started(old), started(kept), stopped(kept)),
        *(orderly, started(crashed)),
    )
    async with world(tmp_path) as w:
        w.folder.mkdir()
        for capture_id in (kept, crashed):
            (w.folder / f"tun0-{capture_id}-3.pcapng").write_bytes(b"")
        (w.folder / "notes.txt").write_bytes(b"")
        await w.captures.recover(reader)
        assert [(kind, e.capture_id, e.reason) for kind, e in w.log] == [("CaptureStopped", crashed, "crash")]
        found = {each.id: each for each in w.captures.all(TUN0)}
        assert set(found) == {kept, crashed}
        assert found[kept].figures == {"packets": 7, "bytes": 8, "dropped": 9}
        assert found[kept].settings.files == 2
        assert list(found[crashed].files) == [3]
        assert not found[crashed].running
