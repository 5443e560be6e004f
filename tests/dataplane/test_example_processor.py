"""The example of docs/processors.md, as its reader would use it: installed, tested, and run by a worker."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from service.dataplane.contract import DropReason
from service.domain.chain import BUILT_IN

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "processor"

IN_A_WORKER = """
import socket, time
from service.dataplane.registry import discover
from service.dataplane.supervisor import Supervisor
from service.dataplane.work import Work
from service.packet import build

found = discover()
assert found == {"dying": "tunledger_dying:Dying"}, found
supervisor = Supervisor(workers=1, on_exit=print, processors=found)
supervisor.start()
ours, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
chain = ({"processor": "dying", "on_crash": "restart", "least": 5},)
supervisor.attach("tun0", device.detach(), mode="tun", work=Work(chain=chain))
for ttl in (64, 4, 5):
    ours.send(build.udp(bytes([10, 0, 0, 1]), 4000, bytes([192, 0, 2, 53]), 53, b"?", ttl=ttl))
deadline = time.monotonic() + 20
while (figures := dict(supervisor.stages("tun0")[0].figures)) != {"expired": 1, "dns_queries": 2}:
    assert time.monotonic() < deadline, figures
    time.sleep(0.01)
assert dict(supervisor.counters()["tun0"].drops) == {"custom": 1, "end_of_chain": 2}, supervisor.counters()
supervisor.close()
print("worked")
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example in it, put there by pip from a copy of its source, without a network."""
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--disable-pip-version-check", "--target", str(folder / "site"), str(folder / "source"))
    return folder


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_example_passes_its_own_tests(installed: Path) -> None:
    tests = str(installed / "source" / "tests")
    path = f"{installed / 'site'}:{ROOT}"
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", tests, PYTHONPATH=path)


def test_the_example_is_found_by_its_entry_point_and_runs_in_a_worker(installed: Path) -> None:
    assert run(sys.executable, "-c", IN_A_WORKER, PYTHONPATH=f"{installed / 'site'}:{ROOT}").endswith("worked\n")


def test_the_code_in_the_documentation_runs() -> None:
    text = (ROOT / "docs" / "processors.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), "docs/processors.md", "exec"), {"__name__": "docs"})  # noqa: S102 - our own text


def test_every_option_and_every_drop_reason_of_a_sender_is_documented() -> None:
    text = (ROOT / "docs" / "processors.md").read_text()
    for processor, options in BUILT_IN.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{processor}` |")]
        assert set(re.findall(r"`(\w+)`", row)[1:]) >= set(options), processor
    for reason in (DropReason.FILTERED, DropReason.RATE, DropReason.NO_OUTPUT, DropReason.OUTPUT_DOWN, DropReason.MODE):
        assert f"`{reason}`" in text
