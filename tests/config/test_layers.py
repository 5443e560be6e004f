"""Which value wins, and what is said about where it came from."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import make_url

from service import config
from service.config import SETTINGS, Config, ConfigError, Flag, Loaded, load

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_default_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's own /etc is none of these tests' business."""
    path = tmp_path / "etc" / "tunledger.json"
    path.parent.mkdir()
    monkeypatch.setattr(config, "DEFAULT_FILE", path)
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[[object], Path]:
    def writer(content: object) -> Path:
        path = tmp_path / "given.json"
        path.write_text(json.dumps(content))
        return path

    return writer


def loaded(
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Flag] | None = None,
) -> Loaded:
    return load(file=file, environ=environ or {}, flags=flags or {})


def test_nothing_given_is_the_defaults() -> None:
    result = loaded()
    assert result.config == Config()
    assert result.file is None
    assert dict(result.origins) == {setting.key: "default" for setting in SETTINGS}


def test_each_layer_wins_over_the_one_before(write: Callable[[object], Path]) -> None:
    path = write({"server": {"port": 1, "host": "127.0.0.2"}, "logging": {"level": "error"}, "counters": {}})
    result = loaded(
        path,
        {"TUNLEDGER_SERVER__PORT": "2", "TUNLEDGER_LOGGING__LEVEL": "debug"},
        {"server.port": Flag("--port", "3")},
    )
    assert (result.config.server.port, result.origins["server.port"]) == (3, "flag --port")
    assert result.config.logging.level == "debug"
    assert result.origins["logging.level"] == "environment TUNLEDGER_LOGGING__LEVEL"
    assert (result.config.server.host, result.origins["server.host"]) == ("127.0.0.2", f"file {path}")
    assert (result.config.counters.interval_s, result.origins["counters.interval_s"]) == (10, "default")
    assert result.file == path


def test_every_setting_can_be_set_by_file_environment_and_flag(write: Callable[[object], Path]) -> None:
    others: dict[str, str | int | float] = {
        "interface.name": "lab7",
        "interface.address": "192.168.7.1",
        "interface.netmask": "255.255.0.0",
        "interface.mtu": 1400,
        "server.host": "::1",
        "server.port": 0,
        "database.url": "sqlite:////tmp/other.db",
        "logging.level": "warning",
        "logging.format": "json",
        "logging.packets_per_s": 0,
        "counters.interval_s": 2.5,
        "counters.raw_s": 3600,
        "counters.minutes_s": 7200.5,
        "counters.hours_s": 315_360_000,
        "shutdown.interfaces": "keep",
        "shutdown.timeout_s": 1,
        "reconcile.interval_s": 3600,
        "dataplane.workers": 64,
        "dataplane.io_uring": "off",
        "dataplane.capture_directory": "/srv/captures",
    }
    assert list(others) == [setting.key for setting in SETTINGS]
    nested: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        nested.setdefault(setting.section, {})[setting.name] = others[setting.key]
    results = [
        loaded(write(nested)),
        loaded(environ={setting.variable: str(others[setting.key]) for setting in SETTINGS}),
        loaded(flags={key: Flag("--set", str(value)) for key, value in others.items()}),
        loaded(flags={key: Flag("--set", value) for key, value in others.items()}),
    ]
    for result in results:
        assert {setting.key: setting.of(result.config) for setting in SETTINGS} == others
        assert "default" not in result.origins.values()


def test_file_is_config_flag_then_variable_then_default(
    write: Callable[[object], Path], tmp_path: Path, no_default_file: Path
) -> None:
    by_flag = write({"server": {"port": 1}})
    by_variable = tmp_path / "variable.json"
    by_variable.write_text('{"server": {"port": 2}}')
    no_default_file.write_text('{"server": {"port": 3}}')
    environ = {"TUNLEDGER_CONFIG": str(by_variable)}
    assert loaded(by_flag, environ).config.server.port == 1
    assert loaded(None, environ).config.server.port == 2
    assert loaded(None).config.server.port == 3
    assert loaded(None).origins["server.port"] == f"file {no_default_file}"
    no_default_file.unlink()
    assert loaded(None).config.server.port == 8080


def test_default_file_that_leads_nowhere_is_no_missing_file(no_default_file: Path) -> None:
    no_default_file.symlink_to("gone.json")
    with pytest.raises(ConfigError, match="does not exist"):
        loaded()


def test_only_the_given_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNLEDGER_SERVER__PORT", "1")
    monkeypatch.setenv("TUNLEDGER_NONSENSE", "1")
    assert loaded().config == Config()
    assert "TUNLEDGER_NONSENSE" in os.environ


def test_variables_of_others_and_of_the_tests_are_passed_over() -> None:
    assert loaded(environ={"PATH": "/bin", "TUNLEDGER_TEST_ANY": "x", "tunledger_x": "y"}).config == Config()


def test_config_cannot_be_changed() -> None:
    result = loaded()
    with pytest.raises(AttributeError):
        result.config.server.port = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        result.origins["server.port"] = "nobody"  # type: ignore[index]


def test_example_file_holds_the_defaults() -> None:
    example = REPOSITORY / "config" / "tunledger.json"
    result = loaded(example)
    assert result.config == Config()
    assert set(result.origins.values()) == {f"file {example}"}, "a setting is missing from the example"


def test_table_and_structs_hold_the_same_settings() -> None:
    sections = msgspec.to_builtins(Config())
    in_structs = [f"{section}.{name}" for section, entries in sections.items() for name in entries]
    assert [setting.key for setting in SETTINGS] == in_structs


@pytest.mark.parametrize("url", ["sqlite:////a/b.db", "sqlite+pysqlite:////a%20b/%25c.db", "sqlite:////a@b:c/d.db"])
def test_database_path_is_the_one_that_sqlalchemy_opens(url: str) -> None:
    database = loaded(environ={"TUNLEDGER_DATABASE__URL": url}).config.database
    assert database.url == url
    assert str(database.path) == make_url(url).database
