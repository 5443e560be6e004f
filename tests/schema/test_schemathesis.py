"""schemathesis against the real service: all checks, valid and invalid data, links from answer to request.

What it is told, and what it is let off with which reason, is in schemathesis.toml and hooks.py beside this. It runs
as a process of its own in the namespace of the service, so that it can make what it likes.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import ROOT, Service, links
from tests.part import part_of

pytestmark = pytest.mark.kernel

SEED = 20260301
CONFIG = ROOT / "tests/schema/schemathesis.toml"


def attack(
    service: Service, folder: Path, terminal: pytest.CaptureFixture[str], *arguments: str, seed: int = SEED
) -> None:
    """Run schemathesis, print its summary, and check what must hold whatever it did."""
    for number in range(5):  # hooks.py sends most requests to these
        spec = {"name": f"lab{number}", "mode": ("tun", "tap")[number % 2], "processing": {"running": number == 4}}
        assert service.call("POST", "/api/v1/interfaces", spec)[0] == 201
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")),
            "--config-file",
            str(CONFIG),
            "run",
            f"http://127.0.0.1:{service.port}/schema/openapi.json",
            "--no-color",
            "--checks=all",
            "--mode=all",
            f"--seed={seed}",
            *arguments,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    summary = re.search(r"^=+ SUMMARY =+$.*", done.stdout, re.MULTILINE | re.DOTALL)
    with terminal.disabled():
        sys.stdout.write(f"\n{summary[0] if summary else done.stdout}")
    assert done.returncode == 0, f"{done.stdout[-20000:]}\n{done.stderr[-2000:]}\n{service.log.read_text()[-3000:]}"

    assert service.call("GET", "/health")[0] == 200
    declared = service.ok("GET", "/api/v1/state")["interfaces"]
    ours = {link.name for link in links().values() if link.token is not None}
    assert ours == set(declared), "an interface for each that is declared, and no other"
    assert set(links()) == ours | {"lo"}
    assert service.ok("GET", "/api/v1/drift") == {"drift": []}
    found = service.verification()
    assert found.problems == []
    assert "unexpected error" not in service.log.read_text()


@pytest.mark.timeout(300)
def test_the_service_stands_up_to_schemathesis(
    service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack(service, tmp_path, capsys)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", part_of([1, 2, 3]))
def test_for_long(service: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    attack(service, tmp_path, capsys, "--max-examples=150", seed=seed)
