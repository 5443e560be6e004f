"""The package as users get it: a wheel, in an empty environment, in another folder."""

import http.client
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import ROOT, eventually
from tests.namespace import fresh_namespace

pytestmark = pytest.mark.kernel


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    """A command that must succeed; its output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(400)
def test_a_wheel_migrates_and_serves_from_an_empty_environment(tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist")
    (wheel,) = (tmp_path / "dist").glob("tunledger-*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", ROOT / "requirements.lock")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = tmp_path / "venv/bin/tunledger"
    where = {"TUNLEDGER_DATABASE__URL": f"sqlite:///{tmp_path}/state/t.db", "PYTHONPATH": ""}
    assert "made at schema" in run(command, "migrate", cwd=elsewhere, **where)
    with fresh_namespace():
        process = subprocess.Popen([command, "serve"], cwd=elsewhere, env=os.environ | where, stderr=subprocess.DEVNULL)
        try:

            def answers() -> bool:
                connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=10)
                try:
                    connection.request("POST", "/api/interface/create")
                    return connection.getresponse().status == 200
                except OSError:
                    return False
                finally:
                    connection.close()

            eventually(answers, 60, "an interface made by the installed service")
            connection = http.client.HTTPConnection("127.0.0.1", 8080, timeout=10)
            connection.request("POST", "/api/interface/start")
            assert connection.getresponse().status == 200, "the workers of an installed service must start, too"
            connection.close()
        finally:
            process.terminate()
            assert process.wait(30) == 0
