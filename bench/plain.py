"""The plain Python loops that ours stands next to: read, or read and write, and nothing else.

Run as a file, not as a module, so that it is a bare interpreter: `plain.py read FD` or `plain.py forward FD FD`.
"""

import ctypes
import os
import select
import sys


def read(fd: int) -> None:
    """Read packets and forget them."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    buffers = [bytearray(65_536 + 64)]
    while poll.poll():
        try:
            while True:
                os.readv(fd, buffers)
        except BlockingIOError:
            pass


def forward(one: int, other: int) -> None:
    """Read packets from either and write them to the other."""
    poll = select.poll()
    poll.register(one, select.POLLIN)
    poll.register(other, select.POLLIN)
    peer = {one: other, other: one}
    while ready := poll.poll():
        for fd, _ in ready:
            to = peer[fd]
            try:
                for _ in range(64):
                    os.write(to, os.read(fd, 65_536 + 64))
            except BlockingIOError:
                pass


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: nobody is left behind
    if sys.argv[1] == "read":
        read(int(sys.argv[2]))
    else:
        forward(int(sys.argv[2]), int(sys.argv[3]))
