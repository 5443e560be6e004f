"""What a new stage takes along to its worker: memory that the service can read, and files that it cannot open itself.

The supervisor's side. Only processors of ours have any: those of other packages are not imported by the service.
"""

import contextlib
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from service.dataplane.attachment import Held
from service.dataplane.registry import BUILT_IN, Registry, UnknownProcessorError
from service.dataplane.work import Setup, StageSetup, encode, options

FilesFor = Callable[[str, str, int, dict[str, Any]], Sequence[int]]
"""Device, name, the stage's id and its JSON to descriptors."""


class Provisions:
    """Makes what stages need. `files_for` is called for each new stage of a processor that wants files; its descriptors
    are ours to close.
    """

    def __init__(self, files_for: FilesFor | None) -> None:
        self._files_for = files_for
        self._ours: Final = Registry({})

    def stage(
        self, device: str, name: str, stage_id: int, setup: StageSetup, given: Sequence[int] = ()
    ) -> tuple[Held, list[int]]:
        """Make a stage ready for a worker; return it and the descriptors to send, to be closed afterwards.

        `given` are descriptors for it that the caller keeps. Raises OSError, and what `files_for` raises.
        """
        spec = setup.spec
        files = [os.dup(fd) for fd in given]
        memory: memoryview | None = None
        told = False
        try:
            found = self._ours.find(str(spec["processor"])) if spec["processor"] in BUILT_IN else None
        except UnknownProcessorError:
            found = None  # the worker will say why
        try:
            size_of = getattr(found, "memory_bytes", None)
            size = size_of(options(spec)) if size_of is not None else 0
            if size > 0:
                fd = sealed_memory("tunledger-stage", size)
                files.insert(0, fd)
                memory = memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ))
            if getattr(found, "wants_files", False) and self._files_for is not None and not given:
                files += self._files_for(device, name, stage_id, dict(spec))
                told = True
        except BaseException:
            close_all(files)
            raise
        return Held(stage_id, replace(setup, files=len(files)), memory=memory, told=told), files


def sealed_memory(name: str, size: int) -> int:
    """Return a memfd of `size` octets, all zero, that nobody can make smaller or larger. Raises OSError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


def written(setup: Setup) -> int:
    """Return a memfd with a setup in it; the caller closes it. Raises OSError."""
    fd = os.memfd_create("tunledger-setup", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(encode(setup))
    except BaseException:
        os.close(fd)
        raise
    return fd


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors; one that is none is none of ours any more."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
