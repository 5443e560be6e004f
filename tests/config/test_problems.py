"""What is refused, and that the message alone is enough to mend it."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.config import SETTINGS, Config, ConfigError, Flag, Problem, load

NO_FLAGS: Mapping[str, Flag] = {}


@pytest.fixture
def lines(tmp_path: Path) -> Callable[[str | bytes], list[str]]:
    """Load a file with this content; the problems, without the place that they all share."""

    def loader(content: str | bytes) -> list[str]:
        path = tmp_path / "given.json"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        with pytest.raises(ConfigError) as caught:
            load(file=path, environ={}, flags=NO_FLAGS)
        found = str(caught.value).splitlines()
        assert all(line.startswith(f"file {path}: ") for line in found)
        assert len(found) == len(caught.value.problems)
        return [line.removeprefix(f"file {path}: ") for line in found]

    return loader


def environment_lines(environ: Mapping[str, str], tmp_path: Path) -> list[str]:
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    with pytest.raises(ConfigError) as caught:
        load(file=empty, environ=environ, flags=NO_FLAGS)
    return str(caught.value).splitlines()


def test_all_problems_of_all_sources_come_at_once(tmp_path: Path) -> None:
    path = tmp_path / "given.json"
    path.write_text('{"server": {"port": -1, "prot": 1}, "counters": {"interval_s": 0}}')
    with pytest.raises(ConfigError) as caught:
        load(
            file=path,
            # Both override what the file says; its mistakes are mistakes all the same.
            environ={"TUNLEDGER_SERVER__PORT": "http", "TUNLEDGER_COUNTERS__INTERVAL_S": "5"},
            flags={"server.port": Flag("--port", "99999"), "server.host": Flag("--host", "localhost")},
        )
    assert [(problem.where, problem.key) for problem in caught.value.problems] == [
        (f"file {path}", "server.port"),
        (f"file {path}", "server.prot"),
        (f"file {path}", "counters.interval_s"),
        ("environment TUNLEDGER_SERVER__PORT", "server.port"),
        ("flag --port", "server.port"),
        ("flag --host", "server.host"),
    ]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"server": {"port": "8080"}}', 'server.port: given "8080", wanted a whole number from 0 to 65535'),
        ('{"server": {"port": true}}', "server.port: given true, wanted a whole number from 0 to 65535"),
        ('{"server": {"port": 8080.5}}', "server.port: given 8080.5, wanted a whole number from 0 to 65535"),
        ('{"server": {"port": null}}', "server.port: given null, wanted a whole number from 0 to 65535"),
        ('{"server": {"port": [1]}}', "server.port: given a list, wanted a whole number from 0 to 65535"),
        ('{"server": {"port": {}}}', "server.port: given an object, wanted a whole number from 0 to 65535"),
        ('{"server": {"port": -1}}', "server.port: given -1, wanted a whole number from 0 to 65535"),
        ('{"server": {"port": 65536}}', "server.port: given 65536, wanted a whole number from 0 to 65535"),
        ('{"interface": {"mtu": "1500"}}', 'interface.mtu: given "1500", wanted a whole number'),
        ('{"interface": {"mtu": false}}', "interface.mtu: given false, wanted a whole number"),
        ('{"interface": {"name": 7}}', "interface.name: given 7, wanted text"),
        (
            '{"interface": {"name": "\\ud800"}}',
            'interface.name: given "\\ud800", wanted text in valid UTF-8',
        ),
        ('{"counters": {"interval_s": true}}', "counters.interval_s: given true, wanted a number from 1 to 3600"),
        ('{"counters": {"interval_s": "5"}}', 'counters.interval_s: given "5", wanted a number from 1 to 3600'),
        ('{"counters": {"interval_s": NaN}}', "counters.interval_s: given NaN, wanted a number from 1 to 3600"),
        (
            '{"counters": {"interval_s": 1e999}}',
            "counters.interval_s: given Infinity, wanted a number from 1 to 3600",
        ),
        ('{"counters": {"interval_s": 0.9}}', "counters.interval_s: given 0.9, wanted a number from 1 to 3600"),
        ('{"shutdown": {"timeout_s": 601}}', "shutdown.timeout_s: given 601, wanted a number from 1 to 600"),
        ('{"dataplane": {"workers": -1}}', "dataplane.workers: given -1, wanted a whole number from 0 to 64"),
        (
            '{"logging": {"packets_per_s": -1}}',
            "logging.packets_per_s: given -1, wanted a whole number from 0 to 1000000",
        ),
        (
            '{"logging": {"level": "DEBUG"}}',
            "logging.level: given \"DEBUG\", wanted one of debug, info, warning, error; did you mean 'debug'?",
        ),
        ('{"shutdown": {"interfaces": "x"}}', 'shutdown.interfaces: given "x", wanted one of remove, keep'),
        ('{"shutdown": {"interfaces": []}}', "shutdown.interfaces: given a list, wanted one of remove, keep"),
    ],
)
def test_value_that_does_not_fit(lines: Callable[[str], list[str]], content: str, line: str) -> None:
    assert lines(content) == [line]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"counters": {"interval": 5}}', "counters.interval: given an unknown key; did you mean 'interval_s'?"),
        ('{"servr": {}}', "servr: given an unknown key; did you mean 'server'?"),
        ('{"port": 1}', "port: given an unknown key; did you mean 'server.port'?"),
        ('{"server": {"mtu": 1}}', "server.mtu: given an unknown key; did you mean 'interface.mtu'?"),
        (
            '{"interval_s": 1}',
            "interval_s: given an unknown key; did you mean 'counters.interval_s' or 'reconcile.interval_s'?",
        ),
        (
            '{"server.port": 1}',
            '"server.port": given an unknown key; sections nest: {"server": {"port": ...}}',
        ),
        ('{"server": {"zzz": "secret"}}', "server.zzz: given an unknown key, wanted one of host, port"),
        ('{"server": {"\\u001b[2J": 1}}', 'server."\\u001b[2J": given an unknown key, wanted one of host, port'),
        ('{"server": 8080}', "server: given 8080, wanted an object"),
        ('{"server": null}', "server: given null, wanted an object"),
        ('{"server": {"port": 1, "port": 1}}', "server.port: given more than once, wanted once"),
        ('{"server": {}, "server": {}}', "server: given more than once, wanted once"),
        ("[]", "given a list, wanted an object of sections"),
        ('"server"', 'given "server", wanted an object of sections'),
        ("", "given an empty file, wanted JSON; {} sets nothing"),
        ('{\n  "server": {"port": 1,}\n}', "line 2, column 24: not JSON: "),
        ('{"server": {}', "line 1, column 14: not JSON: "),
        ('{} {"server": {}}', "line 1, column 4: not JSON: "),
        ("[" * 100_000, "given JSON nested too deep, wanted sections of settings"),
        (
            '{"interface": {"mtu": ' + "9" * 5000 + "}}",
            "given a number with thousands of digits, wanted settings",
        ),
        (b'{\n"a": "\xff"}', "line 2, byte 7: given bytes that are no UTF-8, wanted JSON in UTF-8"),
        (b"\xef\xbb\xbf{}", "line 1, column 1: given a byte order mark, wanted JSON without one"),
        (" " * (1 << 20) + "{}", "given more than 1048576 bytes, wanted a configuration"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_file_that_does_not_fit(lines: Callable[[str | bytes], list[str]], content: str | bytes, line: str) -> None:
    (found,) = lines(content)
    # What json says after this changes with the version of Python.
    assert found.startswith(line) if line.endswith("not JSON: ") else found == line


def reason(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file=path, environ={}, flags=NO_FLAGS)
    (problem,) = caught.value.problems
    assert (problem.where, problem.key) == (f"file {path}", "")
    return problem.reason


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert reason(tmp_path / "no.json") == "does not exist; name another by --config or TUNLEDGER_CONFIG"
    assert reason(tmp_path) == "given a directory, wanted a file"
    (tmp_path / "file").write_text("{}")
    assert reason(tmp_path / "file" / "below") == "cannot be read: Not a directory"


def test_file_without_permission(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("needs a caller without CAP_DAC_OVERRIDE: root reads every file")
    closed = tmp_path / "closed.json"
    closed.write_text("{}")
    closed.chmod(0)
    assert reason(closed).startswith(f"not readable by uid {os.geteuid()}; change its mode")


def test_variable_that_names_no_file() -> None:
    with pytest.raises(ConfigError, match=r'^environment TUNLEDGER_CONFIG: given "", wanted a path; unset it'):
        load(file=None, environ={"TUNLEDGER_CONFIG": ""}, flags=NO_FLAGS)
    with pytest.raises(ConfigError, match=r"^file /nowhere/x\.json: does not exist"):
        load(file=None, environ={"TUNLEDGER_CONFIG": "/nowhere/x.json"}, flags=NO_FLAGS)


@pytest.mark.parametrize("text", ["", " 1", "1 ", "1_0", "1.0", "0x10", "\u0661", "true", "1e1", "9" * 31])
def test_environment_text_that_is_no_whole_number(text: str, tmp_path: Path) -> None:
    (line,) = environment_lines({"TUNLEDGER_SERVER__PORT": text}, tmp_path)
    assert line == (
        f"environment TUNLEDGER_SERVER__PORT: server.port: given {json.dumps(text)}, "
        "wanted a whole number from 0 to 65535"
    )


@pytest.mark.parametrize("text", ["", "nan", "inf", "1e1", "5s", "0.99", "3600.1", "1."])
def test_environment_text_that_is_no_number_in_range(text: str, tmp_path: Path) -> None:
    (line,) = environment_lines({"TUNLEDGER_COUNTERS__INTERVAL_S": text}, tmp_path)
    assert line == (
        f'environment TUNLEDGER_COUNTERS__INTERVAL_S: counters.interval_s: given "{text}", '
        "wanted a number from 1 to 3600"
    )


@pytest.mark.parametrize(
    ("variable", "hint"),
    [
        ("TUNLEDGER_SERVER_PORT", "did you mean 'TUNLEDGER_SERVER__PORT'?"),
        ("TUNLEDGER_server__port", "did you mean 'TUNLEDGER_SERVER__PORT'?"),
        ("TUNLEDGER_CONFG", "did you mean 'TUNLEDGER_CONFIG'?"),
        ("TUNLEDGER_", "wanted TUNLEDGER_SECTION__KEY of a setting"),
    ],
)
def test_unknown_variable(variable: str, hint: str, tmp_path: Path) -> None:
    assert environment_lines({variable: "secret"}, tmp_path) == [
        f"environment {variable}: given an unknown variable; {hint}"
    ]


def test_flag_for_no_setting_and_typed_flags_of_the_wrong_type(tmp_path: Path) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    with pytest.raises(ConfigError) as caught:
        load(
            file=empty,
            environ={},
            flags={
                "server.prt": Flag("--set", 1),
                "server.port": Flag("--port", True),
                "interface.name": Flag("--name", 7),
                "dataplane.workers": Flag("--workers", 2.0),
            },
        )
    assert str(caught.value).splitlines() == [
        "flag --set: server.prt: given an unknown key; did you mean 'server.port'?",
        "flag --port: server.port: given true, wanted a whole number from 0 to 65535",
        "flag --name: interface.name: given 7, wanted text",
        "flag --workers: dataplane.workers: given 2, wanted a whole number from 0 to 64",
    ]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "0:0:0:0:0:0:0:1"])
def test_loopback_is_accepted(host: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty.json"
    empty.write_text("{}")
    flags = {"server.host": Flag("--host", host)}
    assert load(file=empty, environ={}, flags=flags).config.server.host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "::ffff:127.0.0.1", "::1%lo", "128.0.0.1", "fe80::1"])
def test_other_addresses_wait_for_tokens_and_tls(host: str, tmp_path: Path) -> None:
    (line,) = environment_lines({"TUNLEDGER_SERVER__HOST": host}, tmp_path)
    assert line.endswith("to listen anywhere else needs tokens and TLS, which come later")


@pytest.mark.parametrize("host", ["localhost", "", "127.1", "127.0.0.01", " 127.0.0.1", "[::1]"])
def test_host_that_is_no_address(host: str, tmp_path: Path) -> None:
    (line,) = environment_lines({"TUNLEDGER_SERVER__HOST": host}, tmp_path)
    assert line.endswith("wanted a loopback address (127.0.0.1 or ::1); names are not looked up")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("postgresql://db/tunledger", "the only database for now"),
        ("sqlite+aiosqlite:////x.db", "the only database for now"),
        ("/var/lib/x.db", "a URL begins with a scheme"),
        ("", "a URL begins with a scheme"),
        ("sqlite://", "a log in memory is gone"),
        ("sqlite:///", "a log in memory is gone"),
        ("sqlite:///:memory:", "a log in memory is gone"),
        ("sqlite:///%3Amemory%3A", "a relative path"),
        ("sqlite:////x.db?mode=memory&uri=true", "sets the connection's options itself"),
        ("sqlite:///x.db", "a relative path"),
        ("sqlite:///file:/x.db", "a relative path"),
        ("sqlite://host/x.db", "SQLite has no host"),
        ("sqlite:////var/lib/", "this names a directory"),
        ("sqlite:////", "this names a directory"),
        ("sqlite:////var/%2E%2E", "this names a directory"),
        ("sqlite:////x\n.db", "control characters"),
        ("sqlite:////x%00.db", "control characters"),
        ("sqlite:////\udcff.db", "valid UTF-8"),
    ],
)
def test_database_that_cannot_hold_the_log(url: str, why: str, tmp_path: Path) -> None:
    (line,) = environment_lines({"TUNLEDGER_DATABASE__URL": url}, tmp_path)
    assert line.startswith("environment TUNLEDGER_DATABASE__URL: database.url: given ")
    assert why in line
    assert "sqlite:////absolute/path.db" in line


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ledger:hunter2@db/x",
        "postgresql://ledger:p/w@hunter2@db/x",
        "postgresql://db/x?password=hunter2",
        "sqlite:////x.db?password=hunter2",
        "sqlite://ledger:hunter2@/x.db",
        "ledger:hunter2@db",
    ],
)
def test_no_password_in_an_error(url: str, lines: Callable[[str], list[str]], tmp_path: Path) -> None:
    for content in ({"database": {"url": url}}, {"database": url}, {"server": {"host": url}}, {"x": url}, url):
        assert "hunter2" not in "\n".join(lines(json.dumps(content)))
    assert "hunter2" not in "\n".join(environment_lines({"TUNLEDGER_DATABASE__URL": url}, tmp_path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from([setting.name for setting in SETTINGS]) | st.text(max_size=8)
sections = st.sampled_from(list(Config.__struct_fields__)) | st.text(max_size=8)


def check(file: Path, environ: Mapping[str, str], flags: Mapping[str, Flag]) -> None:
    """A valid configuration or a list of printable lines, and nothing else."""
    problems: tuple[Problem, ...] = ()
    message = ""
    try:
        result = load(file=file, environ=environ, flags=flags)
    except ConfigError as error:
        problems, message = error.problems, str(error)
    else:
        assert msgspec.convert(msgspec.to_builtins(result.config), Config) == result.config
        assert set(result.origins) == {setting.key for setting in SETTINGS}
    assert bool(problems) == bool(message)
    assert message.isascii()
    assert len(message.splitlines()) == len(problems)
    assert all(line.isprintable() for line in message.splitlines())


@settings(max_examples=200, deadline=None)
@given(
    content=json_values | st.dictionaries(sections, json_values | st.dictionaries(keys, json_values, max_size=3)),
    environ=st.dictionaries(st.sampled_from([setting.variable for setting in SETTINGS]), st.text(), max_size=2),
    flags=st.dictionaries(
        st.sampled_from([setting.key for setting in SETTINGS]) | st.text(),
        st.builds(Flag, st.just("--set"), st.text() | st.integers() | st.floats()),
        max_size=2,
    ),
)
def test_anything_loads_or_is_refused_readably(
    content: object, environ: dict[str, str], flags: dict[str, Flag]
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "given.json"
        path.write_text(json.dumps(content))
        check(path, environ, flags)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200))
def test_any_bytes_load_or_are_refused_readably(raw: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "given.json"
        path.write_bytes(raw)
        check(path, {}, {})
