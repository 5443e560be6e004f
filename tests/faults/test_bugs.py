"""Each deliberate bug is put into a copy of the code, and its case must fail there: a suite that cannot fail shows
nothing."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.e2e.harness import ROOT
from tests.faults.bugs import BUGS, Bug, table
from tests.part import part_of

NEEDED = ("service", "tests", "migrations", "config", "docs", "bench", "alembic.ini", "pyproject.toml", "README.md")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.what)
def test_every_bug_still_fits_the_code_and_its_case_exists(bug: Bug) -> None:
    assert (ROOT / bug.file).read_text().count(bug.right) == 1, "the text to spoil occurs once"
    file, _, case = bug.caught_by.partition("::")
    assert f"def {case.partition('[')[0]}(" in (ROOT / file).read_text()


def test_the_documented_table_is_that_of_the_list() -> None:
    assert table() in (ROOT / "docs/reliability.md").read_text()


@pytest.mark.full
@pytest.mark.kernel
@pytest.mark.timeout(3600)
def test_every_bug_is_caught_by_its_case(tmp_path: Path) -> None:
    bugs = part_of(BUGS)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        told = list(pool.map(lambda numbered: _outcome(tmp_path / str(numbered[0]), numbered[1]), enumerate(bugs)))
    missed = [words for words in told if words]
    print(f"{len(bugs) - len(missed)} of {len(bugs)} deliberate bugs were caught, each by its case")
    assert not missed, "\n\n".join(missed)


def _outcome(copy: Path, bug: Bug) -> str:
    """Why a bug was not caught; empty if it was."""
    copy.mkdir()
    for name in NEEDED:
        whole, there = ROOT / name, copy / name
        if whole.is_dir():
            shutil.copytree(whole, there, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(whole, there)
    spoiled = copy / bug.file
    spoiled.write_text(spoiled.read_text().replace(bug.right, bug.wrong))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--basetemp={copy}/tmp"]
    done = subprocess.run([*command, bug.caught_by], cwd=copy, capture_output=True, text=True, timeout=600, check=False)
    caught = done.returncode == 1 and "failed" in done.stdout.splitlines()[-1]
    return "" if caught else f"{bug.what}: {bug.caught_by} ended with {done.returncode}:\n{done.stdout[-1500:]}"
