"""docs/configuration.md says what the code does: each row, each example, each error."""

import json
import re
from pathlib import Path

import pytest

from service import config
from service.config import FILE_VARIABLE, SETTINGS, TEST_PREFIX, ConfigError, Setting, load, shown

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()


def row(setting: Setting) -> str:
    cells = (
        f"`{setting.key}`",
        setting.meaning,
        setting.unit,
        setting.wanted,
        f"`{shown(setting.default)}`",
        f"`{setting.variable}`",
    )
    return re.sub(" +", " ", f"| {' | '.join(cells)} |")


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: str(setting.key))
def test_setting_is_documented(setting: Setting) -> None:
    heading = f"### {setting.section}\n"
    assert heading in PAGE
    section = PAGE.partition(heading)[2].partition("\n#")[0]
    assert row(setting) in section.splitlines(), f"put this row into docs/configuration.md:\n{row(setting)}"


def test_nothing_else_is_documented() -> None:
    assert re.findall(r"^\| `(.+?)` \|", PAGE, re.MULTILINE) == [setting.key for setting in SETTINGS]
    known = {setting.variable for setting in SETTINGS} | {FILE_VARIABLE, TEST_PREFIX, "TUNLEDGER_SECTION__KEY"}
    wrong_on_purpose = {"TUNLEDGER_SERVER_PORT", "TUNLEDGER_SERVICE_HOST", "TUNLEDGER_"}
    assert set(re.findall(r"TUNLEDGER_[A-Z_]*", PAGE)) == known | wrong_on_purpose


def test_default_file_is_documented() -> None:
    assert f"`{config.DEFAULT_FILE}`, if it exists" in PAGE


def test_example_loads(tmp_path: Path) -> None:
    (example,) = blocks("json")
    path = tmp_path / "example.json"
    path.write_text(example)
    result = load(file=path, environ={}, flags={})
    assert sorted(key for key, origin in result.origins.items() if origin != "default") == sorted(
        f"{section}.{name}" for section, entries in json.loads(example).items() for name in entries
    )


def test_example_of_errors_is_what_is_said(tmp_path: Path) -> None:
    (broken,) = blocks("json broken")
    (expected,) = blocks("text")
    path = tmp_path / "tunledger.json"
    path.write_text(broken)
    environ = {"TUNLEDGER_LOGGING__LEVEL": "warn", "TUNLEDGER_SERVER_PORT": "9090"}
    assert all(f"`{variable}={value}`" in PAGE for variable, value in environ.items())
    with pytest.raises(ConfigError) as caught:
        load(file=path, environ=environ, flags={})
    assert str(caught.value).replace(str(path), str(config.DEFAULT_FILE)) == expected.strip()
