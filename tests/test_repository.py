"""What holds for the repository as a whole: who may know whom, what has a docstring, what is written down."""

import ast
import re
import subprocess
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from service.api.problems import STATUS
from service.domain.errors import ErrorCode

REPOSITORY: Final = Path(__file__).parents[1]
SERVICE: Final = REPOSITORY / "service"
MODULES: Final = sorted(SERVICE.rglob("*.py"))

# What of the store answers are made from. Not its writer, its tables, its connections: writing is the engine's.
READ_MODELS: Final = {"store.reader", "store.answers", "store.counters", "store.snapshots", "store.codec"}

# What each room may import of ours, besides itself: rooms, or single modules of them. "service" is the version in
# service/__init__.py; failpoints are points to die at, and know nobody.
ROOMS: Final[Mapping[str, set[str]]] = {
    "domain": set(),
    "packet": set(),
    "config": set(),
    "logs": set(),
    "failpoints": set(),
    "store": {"service", "domain", "failpoints"},
    "kernel": {"domain", "failpoints"},
    "dataplane": {"packet", "failpoints"},
    "reconcile": {"service", "domain", "store", "failpoints"},
    "api": {"service", "domain", "packet", "reconcile", "failpoints", *READ_MODELS},
    "cli": {"service", "domain", "config", "logs", "app", "workforce", "store", "kernel"},
    "app": {
        "service",
        "domain",
        "store",
        "kernel",
        "reconcile",
        "dataplane",
        "api",
        "config",
        "failpoints",
        "serving",
        "plane",
        "workforce",
    },
    # Imported first: what the workers' start needs, and no more.
    "workforce": {"config", "dataplane", "failpoints"},
    # Imported late, when the host is as the log says: all that only answers HTTP.
    "serving": {"domain", "store", "kernel", "reconcile", "api"},
    "plane": {"domain", "packet", "dataplane", "api.traffic"},
    "__main__": {"cli"},
    "__init__": set(),
}
# Only what works on the database or the host itself may reach past HTTP.
CLI_BELOW_HTTP: Final = {"local": {"app", "store"}, "doctor": {"store", "kernel"}, "main": {"app", "workforce"}}
FORBIDDEN_NAMES: Final = {"utils", "util", "helpers", "helper", "common", "base", "misc"}
FORBIDDEN_ENDINGS: Final = ("Manager", "Handler", "Helper")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def _name(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def _room(path: Path) -> str:
    return path.relative_to(SERVICE).parts[0].removesuffix(".py")


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module of ours that one imports, as "store.reader", wherever in it the import stands."""
    for node in ast.walk(_tree(path)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{_name(path)}:{node.lineno}: relative imports hide which room they reach into"
            module = node.module or ""
            if module == "service":
                names = [f"service.{alias.name}" if alias.name != "__version__" else "service" for alias in node.names]
            elif module.startswith("service."):
                names = [
                    f"{module}.{alias.name}" if (SERVICE / _path(module) / f"{alias.name}.py").exists() else module
                    for alias in node.names
                ]
        for name in names:
            if name == "service":
                yield node.lineno, "service"
            elif name.startswith("service."):
                yield node.lineno, name.removeprefix("service.")


def _path(module: str) -> Path:
    return Path(*module.split(".")[1:])


def _allowed(imported: str, by: set[str]) -> bool:
    return any(imported == room or imported.startswith(f"{room}.") for room in by)


def test_there_is_a_rule_for_every_room() -> None:
    assert {_room(path) for path in MODULES} == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_imports_only_from_rooms_that_its_own_may_know(path: Path) -> None:
    room = _room(path)
    found = [
        f"{_name(path)}:{line}: service.{imported}"
        for line, imported in _imports(path)
        if not _allowed(imported, ROOMS[room] | {room})
    ]
    assert found == []


@pytest.mark.parametrize("path", [path for path in MODULES if _room(path) == "cli"], ids=_name)
def test_the_command_line_talks_http_but_for_what_works_on_the_database_or_the_host(path: Path) -> None:
    allowed = CLI_BELOW_HTTP.get(path.stem, set())
    below = {imported for _, imported in _imports(path) if _allowed(imported, {"app", "workforce", "store", "kernel"})}
    assert {imported for imported in below if not _allowed(imported, allowed)} == set()


def test_only_the_composition_root_starts_processes_of_the_data_plane() -> None:
    knowing = {_name(path) for path in MODULES for _, imported in _imports(path) if _allowed(imported, {"dataplane"})}
    assert {name for name in knowing if not name.startswith("service/dataplane/")} == {
        "service/app.py",
        "service/plane.py",
        "service/workforce.py",
    }


def test_httpx_is_known_to_one_module_only() -> None:
    found = [_name(path) for path in MODULES if re.search(r"^\s*(import|from) httpx\b", path.read_text(), re.MULTILINE)]
    assert set(found) <= {"service/cli/client.py"}


def test_no_module_is_a_drawer_for_everything() -> None:
    folders = [path for path in SERVICE.rglob("*") if path.is_dir() and path.name != "__pycache__"]
    assert [_name(path) for path in (*MODULES, *folders) if path.stem in FORBIDDEN_NAMES] == []


def test_no_class_says_that_it_does_something_somehow() -> None:
    found = [
        f"{_name(path)}:{node.lineno}: {node.name}"
        for path in MODULES
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ClassDef) and node.name.endswith(FORBIDDEN_ENDINGS)
    ]
    assert found == []


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_a_module_opens_with_why_it_exists(path: Path) -> None:
    said = ast.get_docstring(_tree(path))
    assert said, f"{_name(path)} has no docstring"
    assert len(said) > 20, said


def _undocumented(path: Path) -> Iterator[str]:
    def visit(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith("_") or _says_enough_by_itself(node):
                continue
            if not ast.get_docstring(node):
                yield f"{_name(path)}:{node.lineno}: {prefix}{node.name}"
            if isinstance(node, ast.ClassDef):
                yield from visit(node.body, f"{prefix}{node.name}.")

    return visit(_tree(path).body, "")


def _says_enough_by_itself(node: ast.stmt) -> bool:
    """A property of a protocol, whose class says what all of them are: `def session(self) -> str: ...`."""
    return (
        isinstance(node, ast.FunctionDef)
        and [ast.unparse(decorator) for decorator in node.decorator_list] == ["property"]
        and ast.unparse(node.body[0]) == "..."
    )


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_everything_public_says_what_it_is(path: Path) -> None:
    assert list(_undocumented(path)) == []


_CATCHES_ALL: Final = {"Exception", "BaseException", ""}


def test_no_error_is_swallowed_whole() -> None:
    """Catching everything is for those who tell somebody of it."""
    found = []
    for path in MODULES:
        for node in ast.walk(_tree(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = "" if node.type is None else ast.unparse(node.type)
            does_nothing = all(
                isinstance(statement, ast.Pass | ast.Continue | ast.Break)
                or (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
                for statement in node.body
            )
            if caught in _CATCHES_ALL and does_nothing:
                found.append(f"{_name(path)}:{node.lineno}: except {caught}")
    assert found == []


def test_nothing_is_suppressed_whole() -> None:
    found = [
        f"{_name(path)}:{node.lineno}"
        for path in MODULES
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("suppress")
        and any(ast.unparse(argument) in _CATCHES_ALL for argument in node.args)
    ]
    assert found == []


# -- docs/errors.md


def _documented() -> dict[str, list[str]]:
    rows = {}
    for line in (REPOSITORY / "docs" / "errors.md").read_text().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            assert len(cells) == 5, line
            code = cells[0].strip("`")
            assert code not in rows, f"{code} twice"
            rows[code] = cells[1:]
    return rows


def test_every_error_code_is_documented_with_its_status() -> None:
    assert {code: cells[0] for code, cells in _documented().items()} == {
        code.value: str(int(STATUS[code])) for code in ErrorCode
    }


def test_every_documented_error_says_what_it_means_and_what_to_do() -> None:
    for code, (_status, meaning, advice, retry) in _documented().items():
        assert len(meaning) > 10, code
        assert len(advice) > 10, code
        assert retry in {"yes", "no", "some"}, code


def _raised_with() -> dict[str, set[str]]:
    """For each code, what the places in service/ that make an error of it say about trying again."""
    found: dict[str, set[str]] = {}
    for path in MODULES:
        for node in ast.walk(_tree(path)):
            if not isinstance(node, ast.Call) or ast.unparse(node.func) != "TunledgerError" or not node.args:
                continue
            code = ast.unparse(node.args[0])
            if not code.startswith("ErrorCode."):
                continue
            retry = next((ast.unparse(k.value) for k in node.keywords if k.arg == "retry"), "False")
            found.setdefault(ErrorCode[code.removeprefix("ErrorCode.")].value, set()).add(retry)
    return found


def test_what_is_documented_about_trying_again_is_what_the_code_says() -> None:
    wrong = []
    for code, said in _raised_with().items():
        actual = {frozenset({"True"}): "yes", frozenset({"False"}): "no"}.get(frozenset(said), "some")
        documented = _documented().get(code, ["", "", "", "nothing"])[3]
        if actual != documented:
            wrong.append(f"{code}: docs/errors.md says {documented}, the code {actual}")
    assert wrong == []


# -- what must not be in the repository


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip(f"missing: a git checkout ({listed.stderr.decode().strip()})")
    files = [REPOSITORY / name for name in listed.stdout.decode().split("\0") if name]
    assert len(files) > 50
    return [path for path in files if path.is_file()]


def _machine_paths(text: str) -> list[str]:
    folders = "|".join(("work", "farm"))
    return re.findall(rf"(?<![\w.~-])/(?:{folders})(?:/[\w.-]*)?(?![\w-])", text)


def test_no_tracked_file_knows_the_machine_it_was_written_on() -> None:
    found = [
        f"{_name(path)}:{number}: {places[0]}"
        for path in _tracked()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if (places := _machine_paths(line))
    ]
    assert found == []


def test_the_search_for_machine_paths_finds_them() -> None:
    slash = "/"
    for folder in ("work", "farm"):
        assert _machine_paths(f"cd {slash}{folder}{slash}main")
        assert _machine_paths(f"'{slash}{folder}'")
        assert not _machine_paths(f"tests{slash}{folder}{slash}x")
        assert not _machine_paths(f"{slash}{folder}ers")


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-dev.lock"])
def test_lock_files_have_hashes_and_no_addresses(name: str) -> None:
    text = (REPOSITORY / name).read_text()
    assert not re.search(r"https?:|git\+|file:|@ |--(extra-)?index|--find-links|--trusted-host|\s-[if]\s", text)
    pinned = re.findall(r"^[\w.-]+==", text, re.MULTILINE)
    assert len(pinned) > 10
    requirements = re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:]
    assert [r.splitlines()[0] for r in requirements if "--hash=sha256:" not in r] == []


def test_no_tracked_file_is_a_leftover() -> None:
    leftovers = re.compile(r"\.(pyc|orig|rej|bak|swp|db|db-wal|db-shm|lock~|log)$|(^|/)\.(venv|hypothesis|env)(/|$)")
    assert [_name(path) for path in _tracked() if leftovers.search(_name(path))] == []
