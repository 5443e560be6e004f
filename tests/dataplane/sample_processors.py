"""Processors for these tests, as another package would bring them: they know the contract and nothing else of ours."""

import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.dataplane.contract import BOTH, Batch, Context, Processor

NAMES = {
    name: f"tests.dataplane.sample_processors:{value}"
    for name, value in (
        ("count", "Count"),
        ("send", "Send"),
        ("drop", "Drop"),
        ("crash", "Crash"),
        ("picky", "Picky"),
        ("echo", "Echo"),
        ("mute", "Mute"),
        ("open", "Open"),
        ("sink", "Sink"),
        ("tidy", "Tidy"),
        ("swap", "Swap"),
        ("missing", "NotThere"),
    )
} | {"absent": "no.such.package:Thing"}


class Count(Processor):
    """Counts packets, and since when it has been: a new object begins at 0."""

    directions = BOTH
    figures = ("seen", "octets", "ticks")

    def process(self, batch: Batch) -> None:
        self.context.count("seen", len(batch))
        self.context.count("octets", sum(map(len, batch.packets)))

    def tick(self, now_ns: int) -> None:
        assert now_ns > 0
        self.context.count("ticks")


class Send(Processor):
    """Hands everything to the interface `to`; with `keep` the packets go on, too."""

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        super().__init__(options, context)
        self._output = context.output(options["to"])

    def process(self, batch: Batch) -> None:
        self._output.send(batch)
        if not self.options.get("keep"):
            batch.take(())


class Swap(Processor):
    """Puts another packet in the place of each that is on its way to the kernel, and releases that one's views."""

    directions = frozenset({"to_kernel"})
    takes_segments = True

    def process(self, batch: Batch) -> None:
        for index in range(len(batch)):
            batch.packets[index].release()
            batch.replace(index, bytes.fromhex(self.options["by"]))


class Tidy(Processor):
    """Releases the views that it was given, as if they were its own."""

    takes_segments = True

    def process(self, batch: Batch) -> None:
        for view in (*batch.packets, *(batch.headers or ())):
            view.release()


class Drop(Processor):
    """Drops by `reason` what begins with an octet that is not `first`."""

    directions = BOTH

    def process(self, batch: Batch) -> None:
        first = self.options.get("first", -1)
        kept = [index for index, packet in enumerate(batch) if packet[0] == first]
        batch.keep(kept, self.options.get("reason", "filtered"))


class Crash(Processor):
    """Ends its worker `how` on a packet whose last octet is 0xEE."""

    def process(self, batch: Batch) -> None:
        for packet in batch:
            if packet[-1] == 0xEE:
                match self.options.get("how", "raise"):
                    case "raise":
                        raise RuntimeError("could not bear it")
                    case "segfault":
                        ctypes.string_at(0)
                    case "exit":
                        os._exit(3)
                    case "hang":
                        while True:
                            time.sleep(0.01)


class Picky(Processor):
    """Takes only the option {"size": 1}."""

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        super().__init__(options, context)
        if options != {"size": 1}:
            raise ValueError(f"size: is {options.get('size')}, expected 1")

    def process(self, batch: Batch) -> None:
        """Leave all as it is."""


class Echo(Processor):
    """Sends every packet back where it came from."""

    figures = ("taken",)

    def process(self, batch: Batch) -> None:
        for packet in batch:
            self.context.count("taken", batch.answer(bytes(packet)))
        batch.take(())


class Mute(Processor):
    """Answers with as many packets as it has to say: none."""

    def process(self, batch: Batch) -> None:
        assert batch.answer_all([]) == 0


class Open(Processor):
    """Tries what a worker may not, and counts what worked."""

    figures = ("worked", "refused")

    def process(self, batch: Batch) -> None:
        for attempt in (
            lambda: Path("/etc/hostname").read_bytes(),
            lambda: os.open("/dev/null", os.O_WRONLY),
            lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            socket.socketpair,
            os.fork,
            lambda: subprocess.run(["/bin/true"], check=True),
            lambda: os.execv(sys.executable, [sys.executable]),  # noqa: S606
            lambda: os.kill(os.getppid(), 0),
            lambda: list(Path("/").iterdir()),
            lambda: Path("/tmp/not-there").unlink(),
            lambda: Path("/tmp/not-made").mkdir(),
            lambda: os.memfd_create("more"),
            lambda: threading.Thread(target=int).start(),
        ):
            try:
                attempt()
            except PermissionError:
                self.context.count("refused")
            else:
                self.context.count("worked")
        batch.take(())


class Sink(Processor):
    """Writes packets into the file that it was given last."""

    figures = ("written", "files")

    def __init__(self, options: Mapping[str, Any], context: Context) -> None:
        super().__init__(options, context)
        self._fd = context.files[0] if context.files else -1

    def process(self, batch: Batch) -> None:
        for packet in batch:
            os.write(self._fd, packet)
            self.context.count("written")

    def take_file(self, fd: int) -> None:
        """Write there from now on."""
        os.dup2(fd, self._fd, inheritable=False)
        os.close(fd)
        self.context.count("files")
