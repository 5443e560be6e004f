"""Small file systems of their own, to be filled to the last byte, made read-only, and mended.

A tmpfs, and an ext4 in a file on a loop device: the one has no journal and no delayed allocation, the other has both.
Mounted in a folder of the test's, and unmounted behind it whatever happened. Skips where mounting is not allowed.
"""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

Kind = Literal["tmpfs", "ext4"]
KINDS: tuple[Kind, ...] = ("tmpfs", "ext4")
SIZE_MIB = 24  # the service's reserve is 4, its -wal as much, and 1 MiB goes to the ext4 itself
CHUNKS = (1 << 20, 1 << 16, 4096, 1)


class SmallDisk:
    """A mounted file system. Its free space is in `ballast` once it is full."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        self.folder, self.kind = folder, kind
        self._ballast = folder / "ballast"

    def fill(self, *, but: int = 0) -> None:
        """Leave no byte free, or so many."""
        while self._taken():  # delayed allocation finds some more after a sync
            pass
        if but:
            with self._ballast.open("r+b") as file:
                file.truncate(self._ballast.stat().st_size - but)
                os.fsync(file.fileno())

    def _taken(self) -> int:
        taken = 0
        with self._ballast.open("ab", buffering=0) as file:
            for chunk in CHUNKS:
                with contextlib.suppress(OSError):
                    while True:
                        taken += file.write(bytes(chunk))
            with contextlib.suppress(OSError):
                os.fsync(file.fileno())
        return taken

    def free(self) -> None:
        """Give all of it back."""
        self._ballast.unlink()
        os.sync()  # ext4 hands blocks out again when its journal has them as free

    def remount(self, *, writable: bool) -> None:
        """`mount -o remount`. Read-only is refused while somebody has a file open for writing."""
        _run("mount", "-o", f"remount,{'rw' if writable else 'ro'}", str(self.folder))

    def abort(self) -> None:
        """Have ext4 find an error: with errors=remount-ro it takes no more writes, whoever has files open."""
        device = subprocess.run(
            ["findmnt", "-n", "-o", "SOURCE", str(self.folder)], capture_output=True, text=True, check=True
        ).stdout.strip()
        trigger = Path("/sys/fs/ext4") / Path(device).name / "trigger_fs_error"
        if not trigger.exists():
            pytest.skip("missing: trigger_fs_error of ext4 in /sys")
        trigger.write_text("on purpose")


@contextmanager
def small_disk(folder: Path, kind: Kind, *, size_mib: int = SIZE_MIB) -> Iterator[SmallDisk]:
    """Mount one in `folder`/disk."""
    where = folder / "disk"
    where.mkdir()
    match kind:
        case "tmpfs":
            _run("mount", "-t", "tmpfs", "-o", f"size={size_mib}m", "tunledger-test", str(where))
        case "ext4":
            image = folder / "image"
            with image.open("wb") as file:
                file.truncate(size_mib << 20)
            if shutil.which("mkfs.ext4") is None:
                pytest.skip("missing: mkfs.ext4, from e2fsprogs")
            # No blocks kept for root, who runs the tests; a journal of the smallest size.
            _run("mkfs.ext4", "-q", "-F", "-m", "0", "-J", "size=4", str(image))
            _run("mount", "-o", "loop,errors=remount-ro", str(image), str(where))
    try:
        yield SmallDisk(where, kind)
    finally:
        gone = subprocess.run(["umount", str(where)], capture_output=True, check=False)
        if gone.returncode != 0:  # somebody is in it still; the test has failed by then
            subprocess.run(["umount", "-l", str(where)], check=False)


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        pytest.skip(f"missing: {command[0]}")
    said = done.stderr.strip()
    if done.returncode != 0 and any(
        words in said
        for words in ("permission denied", "must be superuser", "only root", "not permitted", "loop device")
    ):
        pytest.skip(f"missing: CAP_SYS_ADMIN or loop devices, to mount a small disk ({said})")
    assert done.returncode == 0, f"{' '.join(command)}: {said}"
