"""What a disk may hold after the power failed: worked out from the calls that a traced process made on one folder.

kill -9 loses nothing that was written: the page cache outlives the process. Here it does not. A file's content is
durable once fsync or fdatasync came back for it, and its name once fsync came back for its folder (fsync(2)); what was
written since may be there or not, each sector for itself, in any order. Nothing here knows SQLite; what the bytes must
mean is asserted elsewhere.

    calls -> History (writes, syncs, names, and what clients were told, in order) -> Disk at a moment -> Images

Left out, since a disk does not do it: changing sectors that nobody wrote to (SQLite calls that powersafe overwrite and
counts on it), and losing what it said was durable.
"""

import hashlib
import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import assert_never

from tests.faults.strace import Call

SECTOR, PAGE = 512, 4096  # bytes that a disk, and that the page cache, writes at once

# What `history` needs to see. Mapped writes are no calls; SQLite maps the -shm only, which does not outlive a boot.
CALLS = (
    *("open", "openat", "creat", "write", "writev", "pwrite64", "pwritev", "pwritev2", "truncate", "ftruncate"),
    *("fallocate", "fsync", "fdatasync", "rename", "renameat", "renameat2", "link", "linkat"),
    *("unlink", "unlinkat", "copy_file_range", "sendfile", "sendto", "sendmsg"),
)
_IGNORED = ("-shm", ".lock", ".log")
_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) .*?\r\ntunledger-command-id: ([^\r]+)\r\n", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes that went into a file at an offset."""

    file: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    """A file was made this long; what it gained is zeros."""

    file: int
    size: int


@dataclass(frozen=True, slots=True)
class Sync:
    """All that was done to a file before step `since` is durable."""

    file: int
    since: int


@dataclass(frozen=True, slots=True)
class Name:
    """A name in the folder stands for a file now, or for none."""

    name: str
    file: int | None


@dataclass(frozen=True, slots=True)
class SyncNames:
    """All names given before step `since` are durable."""

    since: int


@dataclass(frozen=True, slots=True)
class Told:
    """A client was sent the answer to a command."""

    command_id: str
    status: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Something happened that is no call: a program ended."""

    what: str


Step = Write | Resize | Sync | Name | SyncNames | Told | Mark


@dataclass(slots=True)
class History:
    """All that happened in one folder, over the lives of several processes; `add` them in order.

    Attributes:
        kept: the names of files whose content matters. Of others, it is only told whether they are there.
    """

    folder: Path
    kept: Collection[str]
    steps: list[Step] = field(default_factory=list)
    _names: dict[str, int] = field(default_factory=dict)
    _files: int = 0

    def mark(self, what: str) -> None:
        """Say what happened just now."""
        self.steps.append(Mark(what))

    def add(self, calls: Iterable[Call]) -> None:
        """Take in what one traced process did, right after its end. Fails on a call that it cannot take."""
        # A write may be on the disk from its beginning, a sync is good at its end, for what was there at its beginning.
        moments: list[tuple[int, bool, Call]] = []
        for call in calls:
            moments.append((call.entered, True, call))
            if call.left is not None:
                moments.append((call.left, False, call))
        begun: dict[int, int] = {}
        for _place, entering, call in sorted(moments, key=lambda moment: (moment[0], not moment[1])):
            if entering:
                begun[id(call)] = len(self.steps)
                self._enter(call)
            elif call.ok:
                self._leave(call, begun[id(call)])

    def _enter(self, call: Call) -> None:
        if call.name in {"sendto", "sendmsg", "write", "writev"}:
            for text in call.strings():
                head = _HEAD.match(text)
                if head is not None:
                    self.steps.append(Told(head[2].decode(), int(head[1])))
        file = self._file(call.path())
        if file is None or Path(call.path()).name not in self.kept or not (call.ok or call.cut_off):
            return
        match call.name:
            case "pwrite64":
                (data,), (_length, offset) = call.strings(), call.numbers()
                if call.ok:
                    self.steps.append(Write(file, offset, data[: int(call.result or 0)]))
                elif Path(call.path()).read_bytes()[offset : offset + len(data)] == data:
                    self.steps.append(Write(file, offset, data))  # killed in it, but it was done
            case "ftruncate":
                self.steps.append(Resize(file, call.numbers()[0]))
            case "write" | "writev" | "pwritev" | "pwritev2" | "fallocate" | "copy_file_range" | "sendfile":
                raise AssertionError(f"{call.name} on {call.path()}: not foreseen here; teach it")
            case _:
                pass

    def _leave(self, call: Call, since: int) -> None:
        match call.name:
            case "open" | "openat" | "creat":
                name = self._within(call.strings()[0])
                if name is not None and "O_CREAT" in call.arguments and name not in self._names:
                    self._files += 1
                    self._name(name, self._files)
                if name in self._names and "O_TRUNC" in call.arguments:
                    self.steps.append(Resize(self._names[name], 0))
            case "fsync" | "fdatasync":
                file = self._file(call.path())
                if file is not None:
                    self.steps.append(Sync(file, since))
                elif call.path() == str(self.folder):
                    self.steps.append(SyncNames(since))
            case "unlink" | "unlinkat":
                name = self._within(call.strings()[0])
                if name is not None:
                    self._name(name, None)
            case "rename" | "renameat" | "renameat2":
                old, new = (self._within(text) for text in call.strings())
                if old is not None and new is not None:
                    file = self._names[old]
                    self._name(new, file)
                    self._name(old, None)
                else:
                    assert old is None, f"{old} left the folder"
                    assert new is None, f"{new} came into the folder"
            case "link" | "linkat" | "truncate":
                assert all(self._within(text) is None for text in call.strings()), f"{call.name}: not foreseen here"
            case _:
                pass

    def _within(self, text: bytes) -> str | None:
        """The name of a path that is right in the folder, or None."""
        path = Path(text.decode(errors="replace"))
        return path.name if path.parent == self.folder and not path.name.endswith(_IGNORED) else None

    def _file(self, path: str) -> int | None:
        return self._names.get(self._within(path.encode()) or "")

    def _name(self, name: str, file: int | None) -> None:
        if file is None:
            self._names.pop(name, None)
        else:
            self._names[name] = file
        self.steps.append(Name(name, file))


# -- what may be left


@dataclass(frozen=True, slots=True)
class Image:
    """The files of the folder as a disk may hold them, by name; `how` says what of the pending was kept."""

    files: Mapping[str, bytearray]
    how: str

    def digest(self) -> bytes:
        """The same for the same content."""
        digest = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            digest.update(f"{name}\n{len(content)}\n".encode())
            digest.update(content)
        return digest.digest()

    def put(self, folder: Path) -> None:
        """Make a folder hold just that."""
        folder.mkdir(parents=True, exist_ok=True)
        for each in folder.iterdir():
            each.unlink()
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


@dataclass(slots=True)
class Disk:
    """What is durable, and what is pending, after the steps that it was given."""

    _taken: int = 0
    _durable: dict[int, bytearray] = field(default_factory=dict)
    _names: dict[str, int] = field(default_factory=dict)
    _pending: list[tuple[int, Write | Resize]] = field(default_factory=list)
    _renamed: list[tuple[int, Name]] = field(default_factory=list)

    @property
    def pending(self) -> int:
        """How many writes are not durable yet."""
        return len(self._pending)

    def take(self, step: Step) -> None:
        """The next step of the history."""
        match step:
            case Write() | Resize():
                self._pending.append((self._taken, step))
            case Sync():
                for number, change in self._pending:
                    if change.file == step.file and number < step.since:
                        _apply(self._durable.setdefault(step.file, bytearray()), change)
                self._pending = [p for p in self._pending if p[1].file != step.file or p[0] >= step.since]
            case Name():
                self._renamed.append((self._taken, step))
            case SyncNames():
                for number, name in self._renamed:
                    if number < step.since:
                        _rename(self._names, name)
                self._renamed = [r for r in self._renamed if r[0] >= step.since]
            case Told() | Mark():
                pass
            case _:
                assert_never(step)
        self._taken += 1

    def nothing(self) -> Image:
        """Nothing of the pending was written."""
        return self._image([], self._names, "nothing pending")

    def everything(self) -> Image:
        """All of it was."""
        return self._image([change for _, change in self._pending], self._all_names(), "everything pending")

    def without_names(self) -> Image:
        """All content, but only the names that are durable: a new file is missing, a removed one is back."""
        return self._image([change for _, change in self._pending], self._names, "everything but names")

    def without(self, number: int) -> Image:
        """Everything but one write."""
        changes = [change for _, change in self._pending]
        return self._image(
            changes[:number] + changes[number + 1 :], self._all_names(), f"all but write {number} of {len(changes)}"
        )

    def alone(self, number: int) -> Image:
        """Nothing but one write."""
        change = self._pending[number][1]
        return self._image([change], self._all_names(), f"only write {number} of {self.pending}")

    def torn(self, chance: random.Random) -> Image:
        """Any of it: each block of each file in any state that it was in since it was durable, names likewise."""
        block, grown = chance.choice((SECTOR, PAGE)), chance.random() < 0.3
        bias = chance.choice((0.1, 0.5, 0.9))
        changes: list[Write | Resize] = []
        if grown:  # the length is written, the content is not
            sizes: dict[int, int] = {}
            for _, change in self._pending:
                end = change.offset + len(change.data) if isinstance(change, Write) else change.size
                sizes[change.file] = max(sizes.get(change.file, 0), end, len(self._durable.get(change.file, b"")))
            changes += [Resize(file, size) for file, size in sizes.items()]
        stopped: dict[tuple[int, int], bool] = {}
        for _, change in self._pending:
            if isinstance(change, Resize):
                if chance.random() < bias:
                    changes.append(change)
                continue
            for piece in _pieces(change, block):
                place = (piece.file, piece.offset // block)
                # A later state of a block holds the earlier ones: once one is not written, none after it is.
                if not stopped.get(place, False):
                    if chance.random() < bias:
                        changes.append(piece)
                    else:
                        stopped[place] = chance.random() < 0.5
        names = dict(self._names)
        given = [name for _, name in self._renamed]
        for name in given[: chance.randint(0, len(given))]:  # in order, as a journal has them
            _rename(names, name)
        return self._image(changes, names, f"torn at {block} bytes, {bias:.0%} kept{', grown' if grown else ''}")

    def _all_names(self) -> dict[str, int]:
        names = dict(self._names)
        for _, name in self._renamed:
            _rename(names, name)
        return names

    def _image(self, changes: Sequence[Write | Resize], names: Mapping[str, int], how: str) -> Image:
        files = {file: bytearray(self._durable.get(file, b"")) for file in names.values()}
        for change in changes:
            if change.file in files:
                _apply(files[change.file], change)
        return Image({name: files[file] for name, file in names.items()}, how)


def _apply(content: bytearray, change: Write | Resize) -> None:
    match change:
        case Write():
            if len(content) < change.offset:
                content.extend(bytes(change.offset - len(content)))
            content[change.offset : change.offset + len(change.data)] = change.data
        case Resize():
            del content[change.size :]
            content.extend(bytes(change.size - len(content)))
        case _:
            assert_never(change)


def _rename(names: dict[str, int], name: Name) -> None:
    if name.file is None:
        names.pop(name.name, None)
    else:
        names[name.name] = name.file


def _pieces(write: Write, block: int) -> Iterator[Write]:
    offset, end = write.offset, write.offset + len(write.data)
    while offset < end:
        stop = min(end, offset - offset % block + block)
        yield Write(write.file, offset, write.data[offset - write.offset : stop - write.offset])
        offset = stop
