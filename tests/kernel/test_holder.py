"""Who holds a device is only said of whom it is known."""

import subprocess
import sys

import pytest

from service.kernel import errnos
from tests.namespace import fresh_namespace

HOLD = """
import fcntl, struct, sys
with open("/dev/net/tun", "r+b", buffering=0) as device:
    fcntl.ioctl(device, 0x400454CA, struct.pack("16sH22x", b"held0", 0x1001))
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.kernel
def test_a_device_of_that_name_in_another_network_namespace_is_not_named_as_surely_the_one() -> None:
    with fresh_namespace():
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen([sys.executable, "-c", HOLD], **pipes) as process:  # type: ignore[call-overload]
            assert process.stdout.readline() == b"held\n"
            here = errnos.holder("held0")
            with fresh_namespace():
                there = errnos.holder("held0")
            process.stdin.close()
    assert (here or "").endswith(f"(pid {process.pid})")
    assert not (here or "").startswith("another process")
    assert (there or "").startswith("another process, perhaps ")
