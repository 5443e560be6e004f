"""What is remembered beside the database: a log that lost its end is noticed, and nothing else is accused."""

import shutil
import stat
from contextlib import closing
from pathlib import Path

import pytest

from service.domain.errors import ErrorCode, TunledgerError
from service.store import headfile
from service.store.reader import LogReader
from tests.store.conftest import OpenLog
from tests.store.log import Log, draft, note, tamper


def problem(path: Path) -> str | None:
    """What start-up would say."""
    with closing(LogReader(path)) as reader:
        return headfile.problem(path, reader.mark, reader.head()[0])


@pytest.fixture
def written(path: Path, open_log: OpenLog) -> Path:
    """A log of five events in one file, closed."""
    log = open_log()
    log.fill(5)
    log.close()
    return path


def test_it_names_the_last_event_when_its_caller_hears_of_it(path: Path, log: Log) -> None:
    assert headfile.read(path) is None
    for number in range(5):
        (recorded,) = log.append(draft(note(number)))
        assert headfile.read(path) == (recorded.position, recorded.hash)
    assert stat.S_IMODE(headfile.path_of(path).stat().st_mode) == 0o600


def test_a_start_names_nothing_that_it_only_found(written: Path, open_log: OpenLog) -> None:
    """It may be of a commit that a kill cut off before it was synced: after a power failure it is not there."""
    headfile.path_of(written).unlink()
    log = open_log()
    assert headfile.read(written) is None
    (recorded,) = log.append(draft(note()))
    assert headfile.read(written) == (recorded.position, recorded.hash)


def test_a_log_that_holds_what_it_is_known_to_hold_is_not_accused(written: Path, open_log: OpenLog) -> None:
    assert problem(written) is None
    head = headfile.path_of(written).read_bytes()
    log = open_log()
    log.fill(3)
    log.close()
    headfile.path_of(written).write_bytes(head)  # as after a power failure: behind the log
    assert problem(written) is None


def test_a_log_that_was_cut_off_is_told_with_both_positions(written: Path) -> None:
    tamper(written, ("DELETE FROM events WHERE position = 5", ()))
    expected = "position 4: the log ends here, and had come to position 5 (log.db.head)"
    assert (problem(written) or "").startswith(expected)


def test_another_log_is_told(written: Path, migrated: Path, tmp_path: Path) -> None:
    other = Path(shutil.copy(migrated, tmp_path / "other.db"))
    log = Log(other)
    log.append(*(draft(note(number), "another") for number in range(7)))
    log.close()
    shutil.copy(headfile.path_of(written), headfile.path_of(other))
    assert "this is another log, or it was rewritten" in (problem(other) or "")


NOTHING = (b"", b"\0" * 86, b"5 abc\n", b"%020d %s" % (9, b"f" * 64), b"%020d %s\n" % (9, b"F" * 64), b"\xff" * 5000)


@pytest.mark.parametrize("content", NOTHING)
def test_a_file_that_says_nothing_proves_nothing(written: Path, open_log: OpenLog, content: bytes) -> None:
    headfile.path_of(written).write_bytes(content)
    assert headfile.read(written) is None
    assert problem(written) is None
    log = open_log()
    (recorded,) = log.append(draft(note()))
    assert headfile.path_of(written).read_bytes()[:86] == b"%020d %s\n" % (6, recorded.hash.encode())


def test_a_writer_does_not_go_on_with_a_log_that_lost_its_end(written: Path, open_log: OpenLog) -> None:
    """Else the file would name the shorter log from then on, and nobody would ever know."""
    tamper(written, ("DELETE FROM events WHERE position = 5", ()))
    with pytest.raises(TunledgerError, match="its end was lost, or this is an older copy") as refused:
        open_log()
    assert refused.value.code is ErrorCode.LOG_CORRUPT
    known = headfile.read(written)
    assert known is not None
    assert known[0] == 5


def test_a_file_that_cannot_be_written_is_done_without(path: Path, open_log: OpenLog) -> None:
    headfile.path_of(path).mkdir()
    log = open_log()
    log.append(draft(note()))
    assert log.broken == []
