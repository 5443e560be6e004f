"""Captures as the service keeps them, with a data plane that only remembers what it was given."""

import asyncio
import contextlib
import dataclasses
import errno
import functools
import itertools
import os
import threading
import time
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
from service.reconcile import capture_stages
from service.reconcile.captured import Asker, Capture, Settings
from service.reconcile.captures import Captures
from service.store.reader import LogReader, Selection

TUN0, NAME = InterfaceId("01890000-0000-7000-8000-000000000001"), InterfaceName("tun0")
ASKER = Asker("uid:0", cmd.Request(via="v1", call="capture", peer="127.0.0.1:1", user="root"))
STAGE = {"snaplen": 128, "size_bytes": 4096, "interval_s": None, "files": 2}


@dataclass
class Stage:
    id: int
    figures: Mapping[str, int] = field(default_factory=dict)


class Plane:
    """A data plane that writes nothing by itself."""

    def __init__(self, log: list[tuple[str, Any]]) -> None:
        self.log = log
        self.held: set[str] = {TUN0}
        self.tap_ids = itertools.count()
        self.taps: dict[int, dict[str, Any]] = {}
        self.files: dict[int, list[int]] = {}
        self.figures: dict[int, Counter[str]] = {}
        self.chain: list[Stage] = []
        self.refusal: TunledgerError | None = None
        self.trouble: list[TunledgerError] = []  # of the next calls of untap and feed

    def attached(self) -> Collection[str]:
        return self.held

    def tap(self, device: str, stage: Mapping[str, Any], files: Sequence[int]) -> int:
        self.log.append(("tap", device))
        if self.refusal is not None:
            raise self.refusal
        tap_id = next(self.tap_ids)
        self.taps[tap_id], self.files[tap_id], self.figures[tap_id] = (
            dict(stage),
            [os.dup(fd) for fd in files],
            Counter(),
        )
        return tap_id

    def untap(self, _: str, tap_id: int) -> Mapping[str, int]:
        if self.trouble:
            raise self.trouble.pop(0)
        self.taps.pop(tap_id)
        for fd in self.files[tap_id]:
            os.close(fd)
        return self.figures[tap_id]

    def feed(self, _: str, stage_id: int, fd: int) -> None:
        if self.trouble:
            raise self.trouble.pop(0)
        self.files.setdefault(stage_id, []).append(os.dup(fd))

    def tap_figures(self, _: str, tap_id: int) -> Mapping[str, int]:
        return self.figures[tap_id]

    def stages(self, _: str) -> Sequence[Stage]:
        return self.chain


class World:
    def __init__(self, folder: Path, **more: Any) -> None:
        self.log: list[tuple[str, Any]] = []
        self.plane = Plane(self.log)
        self.trimmed: list[Path] = []
        self.stage_ids = itertools.count(100)
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

    async def set_up(self, **options: Any) -> Capture:
        """The data plane asks for a stage's file."""
        stage_id = next(self.stage_ids)
        for fd in await asyncio.to_thread(self.captures.files_for, TUN0, "tun0", stage_id, {**STAGE, **options}):
            os.write(fd, b"head")
            os.close(fd)
        (made,) = [each for each in self.captures.all(TUN0) if each.worker_id == stage_id]
        return made

    async def end(self, capture: Capture, reason: str, **figures: int) -> None:
        """The data plane tells of an end."""
        assert capture.worker_id is not None
        self.captures.ended(TUN0, capture.worker_id, figures, reason)
        await until(lambda: not capture.running)

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
            w.captures.find(capture.id, TUN0)


@on_a_loop
async def test_what_the_log_does_not_take_is_not_captured(tmp_path: Path) -> None:
    async with world(tmp_path) as w:

        async def refuse(*_: Any, **__: Any) -> None:
            raise TunledgerError(ErrorCode.LOG_FULL, "full", retry=True)

        w.captures._register._record = refuse
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
        assert capture.worker_id is not None
        w.captures.ended(TUN0, capture.worker_id, {"packets": 9}, "worker_exit")
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


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("worker_exit", "worker_exit"),
        ("interface_gone", "interface_gone"),
        ("moved", "moved"),
        ("removed", "asked"),
    ],
)
@on_a_loop
async def test_the_end_of_a_stage_is_told_with_its_reason_and_last_figures(
    reason: str, told: str, tmp_path: Path
) -> None:
    async with world(tmp_path) as w:
        capture = await w.set_up()
        w.plane.chain = [Stage(0), Stage(100, {"packets": 4})]
        await w.captures.look_at([capture])
        assert (capture.stage, capture.figures["packets"]) == (1, 4)
        await w.end(capture, reason, packets=9)
        w.plane.chain = [Stage(100, {"packets": 5})]
        await w.captures.look_at([capture])
        assert w.stops() == [(told, 9, 0)]
        assert capture.figures["packets"] == 9
        assert w.captures.all(TUN0) == [capture]


@on_a_loop
async def test_what_cannot_be_begun_is_not_remembered(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        w.folder.write_bytes(b"")  # in the place of the directory
        with pytest.raises(TunledgerError, match="cannot be made"):
            await w.start()
        w.folder.unlink()
        await w.captures.remove(await w.start())
        assert w.captures._files._ours == set()


@on_a_loop
async def test_a_set_up_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.set_up()
        (path,) = capture.files.values()
        assert path.stat().st_size
        await w.end(capture, "refused")
        await until(lambda: not path.exists() and w.captures.all(TUN0) == [])
        assert w.stops() == [("refused", 0, 0)]


@on_a_loop
async def test_captures_without_a_packet_take_no_others_files_away(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        first, second = await w.set_up(), await w.set_up()
        await w.end(first, "worker_exit", packets=1)
        await w.end(second, "worker_exit", packets=1)
        for _ in range(4):
            await w.end(await w.set_up(), "worker_exit")
        last = await w.set_up()
        await until(lambda: w.captures.all(TUN0) == [first, second, last])
        await w.end(last, "worker_exit", packets=1)
        await w.set_up()
        await until(lambda: first not in w.captures.all(TUN0))
        assert w.captures.all(TUN0)[:2] == [second, last]


@on_a_loop
async def test_what_a_crash_left_without_figures_may_have_packets(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        first, second = await w.set_up(files=1), await w.set_up(files=1)
        await w.end(second, "worker_exit")
        await w.captures._register.end(first, "crash")
        last = await w.set_up(files=1)
        await until(lambda: w.captures.all(TUN0) == [first, last])


@pytest.mark.parametrize("refusal", [None, TunledgerError(ErrorCode.WORKER_FAILED, "no worker")])
@on_a_loop
async def test_the_end_of_a_capture_that_is_being_attached_waits_for_that(
    refusal: TunledgerError | None, tmp_path: Path
) -> None:
    async with world(tmp_path) as w:
        tap, asked, may = w.plane.tap, threading.Event(), threading.Event()

        def slow(device: str, stage: Mapping[str, Any], files: Sequence[int]) -> int:
            asked.set()
            may.wait(5)
            return tap(device, stage, files)

        w.plane.tap, w.plane.refusal = slow, refusal  # type: ignore[method-assign]
        starting = asyncio.create_task(w.start())
        await asyncio.to_thread(asked.wait, 5)
        (capture,) = w.captures.all(TUN0)
        removing = asyncio.create_task(w.captures.remove(capture))
        await asyncio.sleep(0.01)
        may.set()
        await asyncio.gather(starting, removing, return_exceptions=True)
        assert removing.exception() is None
        assert (w.plane.taps, w.captures.all(TUN0), list(w.folder.iterdir())) == ({}, [], [])
        assert w.told() == ["CaptureStarted", "tap", "CaptureStopped"]


@on_a_loop
async def test_who_asked_and_goes_away_leaves_no_tap_and_takes_no_descriptor_away(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        tap, asked, may = w.plane.tap, threading.Event(), threading.Event()

        def slow(device: str, stage: Mapping[str, Any], files: Sequence[int]) -> int:
            asked.set()
            may.wait(5)
            os.write(files[0], b"head")
            return tap(device, stage, files)

        w.plane.tap = slow  # type: ignore[method-assign]
        starting = asyncio.create_task(w.start())
        await asyncio.to_thread(asked.wait, 5)
        (capture,) = w.captures.all(TUN0)
        for _ in range(2):
            starting.cancel()
            await asyncio.sleep(0.01)
        may.set()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert capture.files[0].read_bytes() == b"head"
        await w.captures.look_at([capture])
        assert (w.plane.taps, w.stops()) == ({}, [("client_gone", 0, 0)])


@on_a_loop
async def test_one_that_is_being_attached_counts_once(tmp_path: Path) -> None:
    async with world(tmp_path, captures_max=2) as w:
        tap, asked, may = w.plane.tap, threading.Event(), threading.Event()

        def slow(device: str, stage: Mapping[str, Any], files: Sequence[int]) -> int:
            asked.set()
            may.wait(5)
            return tap(device, stage, files)

        w.plane.tap = slow  # type: ignore[method-assign]
        first = asyncio.create_task(w.start())
        await asyncio.to_thread(asked.wait, 5)
        second = asyncio.create_task(w.start())
        await until(lambda: second.done() or len(w.captures.all(TUN0)) == 2)
        with pytest.raises(TunledgerError, match="captures are under way"):
            await w.start()
        may.set()
        await asyncio.gather(first, second)


@on_a_loop
async def test_who_removes_a_capture_removes_a_file_that_is_on_its_way_too(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.start(size_bytes=4096, files=2)
        open_next, opening, may = w.captures._files.open_next, threading.Event(), threading.Event()

        def slow(capture: Capture) -> int:
            opening.set()
            may.wait(5)
            return open_next(capture)

        w.captures._files.open_next = slow  # type: ignore[method-assign]
        w.plane.figures[0]["files_wanted"] = 1
        looking = asyncio.create_task(w.captures.look_at([capture]))
        await asyncio.to_thread(opening.wait, 5)
        w.captures.ended(TUN0, 0, {}, "worker_exit")
        await until(lambda: not capture.running)
        removing = asyncio.create_task(w.captures.remove(capture))
        await asyncio.sleep(0.05)
        may.set()
        await asyncio.gather(looking, removing)
        assert list(w.folder.iterdir()) == []
        w.captures._files.undo_next(capture, 1)  # as nobody could take it
        assert capture.files == {}


@on_a_loop
async def test_a_capture_that_was_removed_meanwhile_gets_no_file(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.start(size_bytes=4096, files=2)
        w.plane.figures[0]["files_wanted"] = 1
        async with capture.ending:
            removing = asyncio.create_task(w.captures.remove(capture))
            await asyncio.sleep(0.01)
            looking = asyncio.create_task(w.captures.look_at([capture]))
            await asyncio.sleep(0.05)
            assert len(w.plane.files[0]) == 1
        await asyncio.gather(looking, removing)
        assert (len(w.plane.files[0]), list(w.folder.iterdir())) == (1, [])


@on_a_loop
async def test_trouble_with_the_files_of_one_capture_is_no_others(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        gone, kept = await w.start(), await w.start()

        def trim(path: Path) -> None:
            path.stat()
            raise OSError(errno.EIO, "broken")

        w.captures._trim = trim
        next(iter(gone.files.values())).unlink()
        for number in (0, 1):
            w.plane.figures[number]["stopped"] = errno.ENOSPC
        await w.captures.look_at([gone])
        assert [(each.running, each.reason) for each in (gone, kept)] == [(False, "disk_full")] * 2
        await w.captures._trim_full(gone, "disk_full")
        with pytest.raises(OSError, match="broken"):
            await w.captures._trim_full(kept, "disk_full")
        running = asyncio.create_task(w.captures.run(None))
        third = await w.start()
        w.plane.figures[2]["stopped"] = errno.ENOSPC
        await until(lambda: not third.running)
        await asyncio.sleep(0.01)
        assert not running.done()
        running.cancel()


@on_a_loop
async def test_an_end_that_comes_before_the_taps_id_is_known_is_heard(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        tap = w.plane.tap

        def dies(device: str, stage: Mapping[str, Any], files: Sequence[int]) -> int:
            made = tap(device, stage, files)
            w.captures.ended(device, made, {"packets": 3}, "worker_exit")
            time.sleep(0.1)  # the loop hears of it first
            return made

        w.plane.tap = dies  # type: ignore[method-assign]
        capture = await w.start()
        assert (capture.reason, w.stops()) == ("worker_exit", [("worker_exit", 3, 0)])


@on_a_loop
async def test_a_full_disk_that_shows_only_in_the_last_figures_is_the_reason(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.set_up()
        await w.end(capture, "removed", packets=2, stopped=errno.ENOSPC)
        assert w.stops() == [("disk_full", 2, 0)]
        await until(lambda: w.trimmed == list(capture.files.values()))


@on_a_loop
async def test_a_stage_of_a_chain_gets_its_files_and_is_in_the_log(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.set_up()
        assert w.told() == ["CaptureStarted"]
        w.plane.chain = [Stage(100, {"packets": 4, "files_wanted": 1})]
        await w.captures.look_at([capture])
        assert len(w.plane.files[100]) == 1
        with pytest.raises(TunledgerError, match=r"processing\.chain"):
            await w.captures.stop(capture)
        for fd in w.plane.files[100]:
            os.close(fd)


def opened() -> list[str]:
    return [os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()]


BUSY = TunledgerError(ErrorCode.WORKER_FAILED, "tun0: being attached or detached", retry=True)
REFUSED = TunledgerError(ErrorCode.WORKER_FAILED, "tun0: worker_timeout")


@on_a_loop
async def test_a_tap_that_cannot_be_taken_away_now_is_tried_again(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.start()
        w.plane.trouble = [BUSY, BUSY]
        await w.captures.stop(capture)
        assert (w.plane.taps, w.stops()) == ({}, [("asked", 0, 0)])


@on_a_loop
async def test_a_capture_whose_tap_stays_goes_on_with_its_files(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.start()
        w.plane.trouble = [REFUSED]
        with pytest.raises(TunledgerError, match="worker_timeout"):
            await w.captures.remove(capture)
        assert (capture.running, w.stops(), len(list(w.folder.iterdir()))) == (True, [], 1)
        w.plane.trouble = [REFUSED]
        with pytest.raises(TunledgerError, match="worker_timeout"):
            await w.captures.stop(capture, "finished")
        await w.captures.look_at([capture])  # nobody asked for its end, so nobody asks again
        assert (w.plane.taps, w.stops()) == ({}, [("finished", 0, 0)])


@pytest.mark.parametrize("code", [ErrorCode.NOT_RUNNING, ErrorCode.NOT_FOUND])
@on_a_loop
async def test_a_tap_that_is_gone_is_over(code: ErrorCode, tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.start()
        w.plane.trouble = [TunledgerError(code, "has no tap 0")]
        await w.captures.stop(capture)
        assert w.stops() == [("asked", 0, 0)]


@on_a_loop
async def test_a_file_that_is_not_taken_is_given_again_at_the_next_look(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.start(size_bytes=4096, files=2)
        w.plane.figures[0]["files_wanted"] = 1
        w.plane.trouble = [BUSY]
        await w.captures.look_at([capture])
        assert (list(capture.files), len(list(w.folder.iterdir())), len(w.plane.files[0])) == ([0], 1, 1)
        await w.captures.look_at([capture])
        assert (list(capture.files), len(list(w.folder.iterdir())), len(w.plane.files[0])) == ([0, 1], 2, 2)


@on_a_loop
async def test_stages_keep_no_more_files_than_they_are_to_and_take_nobodys_room(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        last = await w.set_up(files=2)
        for _ in range(299):
            await w.end(last, "worker_exit")
            last = await w.set_up(files=2)
        await until(lambda: [each.running for each in w.captures.all(TUN0)] == [False, False, True])
        assert len(list(w.folder.iterdir())) == 3
        for n in range(256):
            w.captures._register._captures[str(n)] = dataclasses.replace(last, id=str(n), reason="asked")
        await w.start()


@on_a_loop
async def test_many_pokes_are_one_look(tmp_path: Path) -> None:
    async with world(tmp_path) as w:
        capture = await w.start()
        async with w.captures._looking:
            for _ in range(1000):
                w.captures.poked()
            await asyncio.sleep(0.01)
            assert len(w.captures._tasks) == 1
        await until(lambda: not w.captures._tasks)
        w.plane.figures[0].update(finished=1)
        w.captures.poked()
        await until(lambda: not capture.running)


@on_a_loop
async def test_a_file_that_comes_too_late_is_closed_and_its_capture_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert capture_stages.FILES_S < 2
    monkeypatch.setattr(capture_stages, "FILES_S", 0.05)
    async with world(tmp_path) as w:
        record, may = w.captures._register._record, asyncio.Event()

        async def slow(*args: Any, **more: Any) -> None:
            await may.wait()
            await record(*args, **more)

        w.captures._register._record = slow
        with pytest.raises(TunledgerError, match="was not there within") as late:
            await asyncio.to_thread(w.captures.files_for, TUN0, "tun0", 0, STAGE)
        assert (late.value.code, late.value.retry) == (ErrorCode.CAPTURE_FAILED, True)
        (path,) = w.folder.iterdir()
        may.set()
        await until(lambda: not path.exists())
        await until(lambda: w.captures.all(TUN0) == [])
        assert w.told() == ["CaptureStarted", "CaptureStopped"]
        assert not [each for each in opened() if each.startswith(str(path))]  # "... (deleted)"


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
        never_begun, another_logs = (w.folder / f"tun0-{uuid.uuid4()}-0.pcapng" for _ in range(2))
        never_begun.write_bytes(b"")
        another_logs.write_bytes(b"head")
        beginning = w.captures._made(TUN0, NAME, Settings(snaplen=64), "tap")
        os.close(w.captures._files.open_next(beginning))
        await w.captures.recover(reader)
        assert not never_begun.exists()
        assert another_logs.exists()
        assert (w.folder / "notes.txt").exists()
        assert beginning.files[0].exists(), "it is this run's"
        assert [(kind, e.capture_id, e.reason) for kind, e in w.log] == [("CaptureStopped", crashed, "crash")]
        found = {each.id: each for each in w.captures.all(TUN0)}
        assert set(found) == {kept, crashed}
        assert found[kept].figures == {"packets": 7, "bytes": 8, "dropped": 9}
        assert found[kept].settings.files == 2
        assert list(found[crashed].files) == [3]
        assert not found[crashed].running
