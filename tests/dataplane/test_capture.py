"""The processor `capture`, on files and pipes, with a stand-in for the worker."""

import errno
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.dataplane.contract import Batch, Direction, Mode, Output
from service.dataplane.processors.capture import Capture
from service.packet.pcapng import Captured, Reader

OPTIONS = {"snaplen": 262_144, "size_bytes": None, "interval_s": None, "files": 1}
S = 1_000_000_000


class Place:
    interface, mtu = "tun0", 1500
    mode: Mode = "tun"

    def __init__(self, *files: int) -> None:
        self.files = files
        self.figures: Counter[str] = Counter()
        self.pokes = 0

    def output(self, name: str) -> Output:
        raise NotImplementedError

    def count(self, figure: str, increment: int = 1) -> None:
        assert figure in Capture.figures
        self.figures[figure] += increment

    def poke(self) -> None:
        self.pokes += 1


def batch(*packets: bytes, direction: Direction = "from_kernel", at_ns: int = 5 * S) -> Batch:
    made = Batch()
    made.interface, made.mode, made.direction, made.headers = "tun0", "tun", direction, None
    made.packets = [memoryview(bytearray(packet)) for packet in packets]
    made.time_ns = at_ns
    return made


def opened(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def read(path: Path) -> list[Captured]:
    return list(Reader().feed(path.read_bytes()))


def test_both_directions_are_written_and_all_packets_go_on(tmp_path: Path) -> None:
    place = Place(opened(tmp_path / "0"))
    capture = Capture(OPTIONS, place)
    out, back = batch(b"abc", b"defg"), batch(b"hi", direction="to_kernel", at_ns=6 * S)
    capture.process(out)
    capture.process(back)
    assert (len(out), len(back)) == (2, 1)
    capture.close()
    assert read(tmp_path / "0") == [
        Captured(5 * S, False, 3, b"abc"),
        Captured(5 * S, False, 4, b"defg"),
        Captured(6 * S, True, 2, b"hi"),
    ]
    assert place.figures["packets"] == 3
    assert place.figures["bytes"] <= (tmp_path / "0").stat().st_size
    reader = Reader()
    list(reader.feed((tmp_path / "0").read_bytes()))
    assert (reader.received, reader.dropped) == (3, 0)


@pytest.mark.parametrize("options", [{"size_bytes": 4096}, {"interval_s": 2}])
def test_a_full_file_is_gone_on_in_until_the_next_one_comes_and_no_packet_is_lost(
    options: dict[str, int], tmp_path: Path
) -> None:
    place = Place(opened(tmp_path / "0"))
    capture = Capture({**OPTIONS, **options}, place)
    for second in range(5):
        capture.process(batch(bytes(2000), at_ns=second * S))
    assert (place.figures["files_wanted"], place.pokes) == (1, 1)
    capture.take_file(opened(tmp_path / "1"))
    capture.process(batch(b"last", at_ns=9 * S))
    capture.close()
    assert len(read(tmp_path / "0")) == 5
    assert [each.packet for each in read(tmp_path / "1")] == [b"last"]
    assert place.figures["files"] == 2


def test_a_file_whose_time_is_over_is_ended_without_a_packet(tmp_path: Path) -> None:
    place = Place(opened(tmp_path / "0"))
    capture = Capture({**OPTIONS, "interval_s": 2}, place)
    capture.tick(100 * S)
    assert place.figures["files_wanted"] == 0, "an empty file needs no successor"
    capture.process(batch(b"x", at_ns=100 * S))
    capture.tick(102 * S)
    capture.tick(103 * S)
    assert place.figures["files_wanted"] == 1


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe2(os.O_NONBLOCK)
    yield reading, writing
    for each in (reading, writing):
        try:
            os.close(each)
        except OSError:
            pass


def test_what_a_slow_reader_leaves_no_room_for_is_dropped_and_counted_and_the_stream_stays_whole(
    pipe: tuple[int, int],
) -> None:
    reading, writing = pipe
    place = Place(writing)
    capture = Capture({**OPTIONS, "live": True}, place)
    for number in range(40):
        capture.process(batch(number.to_bytes(2, "big") * 2500))  # 200 kB into 64 KiB
    assert place.figures["dropped"] > 20
    assert place.figures["packets"] + place.figures["dropped"] == 40
    octets = os.read(reading, 1 << 20)
    capture.tick(9 * S)
    octets += os.read(reading, 1 << 20)
    capture.process(batch(b"after"))
    octets += os.read(reading, 1 << 20)
    found = list(Reader().feed(octets))
    assert len(found) == place.figures["packets"]
    assert found[-1].packet == b"after"
    assert all(each.packet == each.packet[:2] * 2500 for each in found[:-1])


def test_a_reader_who_went_away_ends_the_capture_and_not_the_packets(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    place = Place(writing)
    capture = Capture({**OPTIONS, "live": True}, place)
    os.close(reading)
    going = batch(b"a", b"b")
    capture.process(going)
    capture.process(batch(b"c"))
    capture.tick(9 * S)
    capture.close()
    assert len(going) == 2
    assert place.figures["stopped"] == errno.EPIPE
    assert (place.figures["dropped"], place.pokes) == (3, 1)


def test_a_full_disk_ends_the_capture_and_says_so() -> None:
    place = Place(os.open("/dev/full", os.O_WRONLY))
    capture = Capture(OPTIONS, place)
    going = batch(b"a")
    capture.process(going)
    capture.close()
    assert len(going) == 1
    assert (place.figures["stopped"], place.figures["dropped"]) == (errno.ENOSPC, 1)


def test_a_stage_without_a_file_drops_what_it_was_to_write() -> None:
    place = Place()
    capture = Capture(OPTIONS, place)
    capture.process(batch(b"a"))
    reading, writing = os.pipe()
    os.close(reading)
    capture.take_file(writing)
    assert place.figures["dropped"] == 1


def test_a_long_packet_is_cut_to_the_snaplen(tmp_path: Path) -> None:
    place = Place(opened(tmp_path / "0"))
    options: dict[str, Any] = {**OPTIONS, "snaplen": 16}
    capture = Capture(options, place)
    capture.process(batch(bytes(65_535)))
    assert read(tmp_path / "0") == [Captured(5 * S, False, 65_535, bytes(16))]


@pytest.mark.parametrize(("limit", "kept"), [({"max_packets": 3}, 3), ({"max_bytes": 180}, 2)])
def test_a_capture_with_a_limit_ends_there_and_says_so_once(limit: dict[str, int], kept: int, tmp_path: Path) -> None:
    place = Place(opened(tmp_path / "0"))
    capture = Capture({**OPTIONS, **limit}, place)
    for _ in range(3):
        capture.process(batch(b"a", b"b"))
    capture.tick(9 * S)
    capture.close()
    assert len(read(tmp_path / "0")) == place.figures["packets"] == kept
    assert (place.figures["finished"], place.figures["dropped"], place.pokes) == (1, 0, 1)
