"""One place decides what every setting is and who set it, so that no other module asks the environment.

Defaults, one JSON file, the environment and the command line's flags are laid over each other into a single
frozen `Config`, and every value remembers where it came from. The function is pure but for reading that one
file: environment and flags are passed in, nothing is read at import time, and all problems are found in one
go, since a service that names its mistakes one start at a time wastes its operator's afternoon.

What must not live here: the meaning of an interface's name, address, netmask and MTU (service/domain judges
them, when the service starts), opening the database or the socket, and any import of ours.
"""

import difflib
import errno
import ipaddress
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, assert_never, get_args
from urllib.parse import unquote

import msgspec

DEFAULT_FILE = Path("/etc/tunledger/tunledger.json")
"""Read when neither --config nor TUNLEDGER_CONFIG names a file, if it exists."""

ENV_PREFIX = "TUNLEDGER_"
FILE_VARIABLE = "TUNLEDGER_CONFIG"
TEST_PREFIX = "TUNLEDGER_TEST_"
"""Variables of the test suite: they set nothing and are no error."""

FILE_LIMIT_BYTES = 1 << 20
WORKERS_MAX = 64
"""A full configuration is under 1 KiB: 1 MiB tells a file from a device or a disk image named by mistake."""

Value = str | int | float
Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "text", "json"]
AtStop = Literal["remove", "keep"]
IoUring = Literal["auto", "off"]


# ---------------------------------------------------------------------------------------------------------
# The result. Types and defaults stand here; meanings and ranges in SETTINGS below. The sections must hold
# the same values as config/tunledger.json, which a test compares.


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all sections have in common: frozen, and no field that is not written down here."""


class InterfaceSection(Section, frozen=True):
    """What a create command gets for fields that it leaves out. Only shapes: the domain judges values."""

    name: str = "tun0"
    address: str = "10.0.0.1"
    netmask: str = "255.255.255.0"
    mtu: int = 1500


class ServerSection(Section, frozen=True):
    """Where the API listens. `host` is a loopback address; `port` 0 takes any free one."""

    host: str = "127.0.0.1"
    port: int = 8080


class DatabaseSection(Section, frozen=True):
    """Where the log is kept. `url` is a SQLAlchemy URL of SQLite with an absolute path."""

    url: str = "sqlite:////var/lib/tunledger/tunledger.db"

    @property
    def path(self) -> Path:
        """The database's file. Holds for a `Config` that came out of `load`."""
        return Path(unquote(self.url.partition(":///")[2]))


class LoggingSection(Section, frozen=True):
    """What the service's log says and how. `packets_per_s` is in lines a second; 0 is none at all."""

    level: Level = "info"
    format: Format = "auto"
    packets_per_s: int = 20


class CountersSection(Section, frozen=True):
    """How often counters are sampled into the database and how long each resolution is kept, in seconds."""

    interval_s: float = 10.0
    raw_s: float = 86_400.0
    minutes_s: float = 14 * 86_400.0
    hours_s: float = 400 * 86_400.0


class ShutdownSection(Section, frozen=True):
    """What an orderly stop does with the interfaces, and how many seconds it may take."""

    interfaces: AtStop = "remove"
    timeout_s: float = 10.0


class ReconcileSection(Section, frozen=True):
    """How often everything is observed and compared although nothing woke us, in seconds."""

    interval_s: float = 30.0


class DataplaneSection(Section, frozen=True):
    """How many worker processes share the packets, whether they may use io_uring(7), and where captures go: beside the
    database if it is empty.
    """

    workers: int = 0
    io_uring: IoUring = "auto"
    capture_directory: str = ""


class Config(Section, frozen=True):
    """Everything the service can be told. `Config()` is the built-in defaults; `load` gives a checked one."""

    interface: InterfaceSection = msgspec.field(default_factory=InterfaceSection)
    server: ServerSection = msgspec.field(default_factory=ServerSection)
    database: DatabaseSection = msgspec.field(default_factory=DatabaseSection)
    logging: LoggingSection = msgspec.field(default_factory=LoggingSection)
    counters: CountersSection = msgspec.field(default_factory=CountersSection)
    shutdown: ShutdownSection = msgspec.field(default_factory=ShutdownSection)
    reconcile: ReconcileSection = msgspec.field(default_factory=ReconcileSection)
    dataplane: DataplaneSection = msgspec.field(default_factory=DataplaneSection)


class Flag(msgspec.Struct, frozen=True):
    """A value from the command line: text still to be parsed, or already an int or float.

    `spelling` is what the user typed ("--port"), which origins and errors repeat.
    """

    spelling: str
    value: Value


class Loaded(msgspec.Struct, frozen=True):
    """A checked configuration and its history.

    `origins` has every dotted key: "default", "file /path", "environment TUNLEDGER_SERVER__PORT" or
    "flag --port". `file` is the file that was read, None without one.
    """

    config: Config
    origins: Mapping[str, str]
    file: Path | None


class Problem(msgspec.Struct, frozen=True):
    """One thing that stops the start.

    `where` is spelled like an origin, `key` is the dotted path ("" when the whole file is meant), `reason`
    says what was given and what would do. No reason holds a password.
    """

    where: str
    key: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.reason) if part)


class ConfigError(Exception):
    """The configuration cannot be used. `problems` has all of them, never none; the text is a line each."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        self.problems = problems
        super().__init__("\n".join(map(str, problems)))


# ---------------------------------------------------------------------------------------------------------
# Rules: what a value must be. A closed union, so that parsing, messages and documentation cannot disagree.


class Text(msgspec.Struct, frozen=True):
    """Any text; somebody else knows what it means."""


class Whole(msgspec.Struct, frozen=True):
    """A whole number, both bounds included; no bounds where somebody else knows them."""

    bounds: tuple[int, int] | None = None


class Number(msgspec.Struct, frozen=True):
    """A number with or without a fraction, both bounds included."""

    low: int
    high: int


class Choice(msgspec.Struct, frozen=True):
    """One of a few words, in lower case."""

    words: tuple[str, ...]


class LoopbackAddress(msgspec.Struct, frozen=True):
    """An address that only this host can reach."""


class SqliteUrl(msgspec.Struct, frozen=True):
    """A SQLAlchemy URL that names a file of SQLite."""


Rule = Text | Whole | Number | Choice | LoopbackAddress | SqliteUrl


class Setting(msgspec.Struct, frozen=True):
    """A row of the table that documentation, `config show` and the checks share.

    `key` is the dotted path, `unit` is "" where there is none, `meaning` is one sentence without a full stop.
    """

    key: str
    rule: Rule
    unit: str
    meaning: str

    @property
    def section(self) -> str:
        """The part before the dot."""
        return self.key.partition(".")[0]

    @property
    def name(self) -> str:
        """The part after the dot."""
        return self.key.partition(".")[2]

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return f"{ENV_PREFIX}{self.section.upper()}__{self.name.upper()}"

    @property
    def default(self) -> Value:
        """The built-in value."""
        return self.of(Config())

    @property
    def wanted(self) -> str:
        """What a value must be, as errors and documentation say it: "a whole number from 0 to 65535"."""
        match self.rule:
            case Text():
                return "text"
            case Whole(bounds=bounds):
                return "a whole number" + (f" from {bounds[0]} to {bounds[1]}" if bounds else "")
            case Number(low=low, high=high):
                return f"a number from {low} to {high}"
            case Choice(words=words):
                return f"one of {', '.join(words)}"
            case LoopbackAddress():
                return "a loopback address (127.0.0.1 or ::1)"
            case SqliteUrl():
                return "sqlite:////absolute/path.db"
            case _:
                assert_never(self.rule)

    def of(self, config: Config) -> Value:
        """This setting's value in `config`."""
        value: Value = getattr(getattr(config, self.section), self.name)
        return value


SETTINGS: tuple[Setting, ...] = (
    Setting("interface.name", Text(), "", "name of the interface that a create without a name makes"),
    Setting("interface.address", Text(), "", "its address"),
    Setting("interface.netmask", Text(), "", "its netmask"),
    Setting("interface.mtu", Whole(), "bytes", "its MTU"),
    Setting("server.host", LoopbackAddress(), "", "address that the API listens on"),
    Setting("server.port", Whole((0, 65535)), "", "TCP port that the API listens on; 0 takes any free one"),
    Setting("database.url", SqliteUrl(), "", "where the log is kept, as a SQLAlchemy URL"),
    Setting("logging.level", Choice(get_args(Level)), "", "least severe messages that are written"),
    Setting(
        "logging.format",
        Choice(get_args(Format)),
        "",
        "form of a message; auto is text on a terminal, else json",
    ),
    Setting(
        "logging.packets_per_s",
        # A worker reads 420,000 packets a second at most: more lines than that cannot come.
        Whole((0, 1_000_000)),
        "lines/s",
        "packet lines written at level debug, the rest being counted; 0 writes none",
    ),
    Setting("counters.interval_s", Number(1, 3600), "s", "time between two samples of the counters"),
    # Kept to the whole hour, so less than one would be none. Ten years, for whoever has the disk.
    Setting("counters.raw_s", Number(3600, 315_360_000), "s", "how long samples are kept"),
    Setting(
        "counters.minutes_s",
        Number(3600, 315_360_000),
        "s",
        "how long the last sample of each minute is kept; at least as long as samples are",
    ),
    Setting(
        "counters.hours_s",
        Number(3600, 315_360_000),
        "s",
        "how long the last sample of each hour is kept; at least as long as minutes are",
    ),
    Setting(
        "shutdown.interfaces",
        Choice(get_args(AtStop)),
        "",
        "what an orderly stop does with interfaces; the next start restores what the log wants either way",
    ),
    Setting("shutdown.timeout_s", Number(1, 600), "s", "longest that an orderly stop may take"),
    Setting("reconcile.interval_s", Number(1, 3600), "s", "time between two comparisons that no event asked for"),
    Setting(
        "dataplane.workers",
        Whole((0, WORKERS_MAX)),
        "",
        "worker processes that share the packets; 0: one for each processor",
    ),
    Setting(
        "dataplane.io_uring",
        Choice(get_args(IoUring)),
        "",
        "many packets in one system call, where the kernel lets workers; off: one by one",
    ),
    Setting("dataplane.capture_directory", Text(), "", "where captures are written; empty: `captures` beside the log"),
)
"""Every setting, in the order of the file."""

_BY_KEY: Mapping[str, Setting] = {setting.key: setting for setting in SETTINGS}
_BY_VARIABLE: Mapping[str, Setting] = {setting.variable: setting for setting in SETTINGS}
_SECTIONS: tuple[str, ...] = Config.__struct_fields__


# ---------------------------------------------------------------------------------------------------------
# Layers.


class _Layer(msgspec.Struct):
    """What one source sets, and what is wrong with it. Each is judged alone: an overridden mistake is one."""

    values: dict[str, Value] = msgspec.field(default_factory=dict)
    origins: dict[str, str] = msgspec.field(default_factory=dict)
    problems: list[Problem] = msgspec.field(default_factory=list)

    def offer(self, setting: Setting, given: object, *, origin: str, spelled_out: bool) -> None:
        """Take a value if it fits. `spelled_out`: text stands for a number, as in the environment."""
        try:
            self.values[setting.key] = _parse(setting, given, spelled_out=spelled_out)
        except _UnfitError as unfit:
            self.refuse(origin, setting.key, str(unfit))
        else:
            self.origins[setting.key] = origin

    def refuse(self, where: str, key: str, reason: str) -> None:
        self.problems.append(Problem(where=where, key=key, reason=reason))


def load(*, file: Path | None, environ: Mapping[str, str], flags: Mapping[str, Flag]) -> Loaded:
    """Lay defaults, file, environment and flags over each other, the later ones winning.

    `file` is the value of --config. Without it the file is the one that TUNLEDGER_CONFIG names, else
    `DEFAULT_FILE` if that exists, else none. `flags` maps dotted keys to what the command line gave.

    Raises `ConfigError` with the problems of all sources at once.
    """
    chosen = _choose_file(file, environ)
    layers = (
        chosen if isinstance(chosen, _Layer) else _from_file(chosen),
        _from_environ(environ),
        _from_flags(flags),
    )
    problems = tuple(problem for layer in layers for problem in layer.problems)
    if problems:
        raise ConfigError(problems)
    values = {setting.key: setting.default for setting in SETTINGS}
    origins = dict.fromkeys(values, "default")
    for layer in layers:
        values |= layer.values
        origins |= layer.origins
    nested: dict[str, dict[str, Value]] = {section: {} for section in _SECTIONS}
    for setting in SETTINGS:
        nested[setting.section][setting.name] = values[setting.key]
    return Loaded(
        config=msgspec.convert(nested, Config),  # checks once more that the types are the declared ones
        origins=MappingProxyType(origins),
        file=None if isinstance(chosen, _Layer) else chosen,
    )


def shown(value: object) -> str:
    """A value for one line of a person's terminal: as JSON, in ASCII, whole numbers without ".0", cut at 80.

    Passwords in database URLs are left out, as is a URL's query.
    """
    match value:
        case dict():
            return "an object"
        case list():
            return "a list"
        case float() if value.is_integer():
            text = str(int(value))
        case str():
            text = json.dumps(_without_secrets(value))
        case _:
            text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _choose_file(file: Path | None, environ: Mapping[str, str]) -> Path | _Layer:
    """The file to read, or an empty layer if there is none, or a layer with the problem."""
    if file is not None:
        return file
    layer = _Layer()
    if FILE_VARIABLE in environ:
        if environ[FILE_VARIABLE]:
            return Path(environ[FILE_VARIABLE])
        layer.refuse(f"environment {FILE_VARIABLE}", "", 'given "", wanted a path; unset it for none')
        return layer
    try:
        # lstat, not exists(): a dangling link or a closed directory is a broken file, not a missing one.
        DEFAULT_FILE.lstat()
    except FileNotFoundError:
        return layer
    except OSError:
        pass  # opening it will say why
    return DEFAULT_FILE


def _from_file(path: Path) -> _Layer:
    layer = _Layer()
    where = f"file {path if str(path).isprintable() else shown(str(path))}"
    try:
        content = _decode(path)
    except _UnfitError as unfit:
        layer.refuse(where, "", str(unfit))
        return layer
    if not isinstance(content, _Object):
        layer.refuse(where, "", f"given {shown(content)}, wanted an object of sections")
        return layer
    _refuse_repeated(layer, where, (), content)
    for section, entries in content.items():
        if section not in _SECTIONS:
            layer.refuse(where, _dotted(section), _unknown(section, _SECTIONS))
        elif not isinstance(entries, _Object):
            layer.refuse(where, section, f"given {shown(entries)}, wanted an object")
        else:
            _read_section(layer, where, section, entries)
    return layer


def _read_section(layer: _Layer, where: str, section: str, entries: "_Object") -> None:
    _refuse_repeated(layer, where, (section,), entries)
    for name, given in entries.items():
        setting = _BY_KEY.get(f"{section}.{name}")
        if setting is None:
            names = [each.name for each in SETTINGS if each.section == section]
            layer.refuse(where, _dotted(section, name), _unknown(name, names))
        else:
            layer.offer(setting, given, origin=where, spelled_out=False)


def _refuse_repeated(layer: _Layer, where: str, path: tuple[str, ...], content: "_Object") -> None:
    for name in content.repeated:
        layer.refuse(where, _dotted(*path, name), "given more than once, wanted once")


def _from_environ(environ: Mapping[str, str]) -> _Layer:
    layer = _Layer()
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX) or variable.startswith(TEST_PREFIX) or variable == FILE_VARIABLE:
            continue
        origin = f"environment {variable if _PLAIN.fullmatch(variable) else shown(variable)}"
        setting = _BY_VARIABLE.get(variable)
        if setting is None:
            # Compared without the prefix: with it, everything is similar to everything.
            known = [name.removeprefix(ENV_PREFIX) for name in (*_BY_VARIABLE, FILE_VARIABLE)]
            near = difflib.get_close_matches(variable.removeprefix(ENV_PREFIX).upper(), known, n=1)
            hint = f"did you mean '{ENV_PREFIX}{near[0]}'?" if near else f"wanted {ENV_PREFIX}SECTION__KEY of a setting"
            layer.refuse(origin, "", f"given an unknown variable; {hint}")
        else:
            layer.offer(setting, environ[variable], origin=origin, spelled_out=True)
    return layer


def _from_flags(flags: Mapping[str, Flag]) -> _Layer:
    layer = _Layer()
    for key, flag in flags.items():
        origin = f"flag {flag.spelling}"
        setting = _BY_KEY.get(key)
        if setting is None:
            layer.refuse(origin, _dotted(*key.split(".")), _unknown(key, _BY_KEY))
        else:
            layer.offer(setting, flag.value, origin=origin, spelled_out=isinstance(flag.value, str))
    return layer


# ---------------------------------------------------------------------------------------------------------
# One value.


class _UnfitError(Exception):
    """A file or a value that will not do; the text is the reason of a `Problem`."""


# ASCII digits only: int() and float() would also take "9_090", " 9090", Arabic-Indic digits and "nan".
_WHOLE = re.compile(r"[+-]?[0-9]{1,30}", re.ASCII)
_NUMBER = re.compile(r"[+-]?[0-9]{1,30}(\.[0-9]{1,30})?", re.ASCII)
_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)


def _parse(setting: Setting, given: object, *, spelled_out: bool) -> Value:
    """The value in the setting's type, or `_UnfitError`."""
    unfit = _UnfitError(f"given {shown(given)}, wanted {setting.wanted}")
    match setting.rule:
        case Text():
            if not isinstance(given, str):
                raise unfit
            _refuse_surrogates(given, setting)
            return given
        case Whole(bounds=bounds):
            whole = int(given) if spelled_out and isinstance(given, str) and _WHOLE.fullmatch(given) else given
            if isinstance(whole, bool) or not isinstance(whole, int):
                raise unfit
            if bounds is not None and not bounds[0] <= whole <= bounds[1]:
                raise unfit
            return whole
        case Number(low=low, high=high):
            number = float(given) if spelled_out and isinstance(given, str) and _NUMBER.fullmatch(given) else given
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise unfit
            if not low <= number <= high:  # NaN is in no range
                raise unfit
            return float(number)
        case Choice(words=words):
            if given in words and isinstance(given, str):
                return given
            near = difflib.get_close_matches(given.lower(), words, n=1) if isinstance(given, str) else []
            raise _UnfitError(f"{unfit}; did you mean {near[0]!r}?") if near else unfit
        case LoopbackAddress():
            if not isinstance(given, str):
                raise unfit
            return _loopback(given, setting)
        case SqliteUrl():
            if not isinstance(given, str):
                raise unfit
            return _sqlite_url(given, setting)
        case _:
            assert_never(setting.rule)


def _loopback(given: str, setting: Setting) -> str:
    unfit = f"given {shown(given)}, wanted {setting.wanted}"
    try:
        address = ipaddress.ip_address(given)
    except ValueError:
        raise _UnfitError(f"{unfit}; names are not looked up") from None
    # Not is_loopback: newer Pythons count ::ffff:127.0.0.1 in, which binds as IPv4 behind an IPv6 socket.
    if address in ipaddress.ip_network("127.0.0.0/8") or address == ipaddress.ip_address("::1"):
        return given
    raise _UnfitError(f"{unfit}; to listen anywhere else needs tokens and TLS, which come later")


def _sqlite_url(given: str, setting: Setting) -> str:
    unfit = f"given {shown(given)}, wanted {setting.wanted}"
    _refuse_surrogates(given, setting)
    scheme, separator, rest = given.partition("://")
    if not separator:
        raise _UnfitError(f"{unfit}; a URL begins with a scheme")
    if scheme not in {"sqlite", "sqlite+pysqlite"}:
        raise _UnfitError(f"{unfit}; SQLite by Python's own driver is the only database for now")
    location, query, _ = rest.partition("?")
    # sqlite:// and sqlite:/// are SQLAlchemy's other ways to say memory.
    if location in {"", "/", "/:memory:"}:
        raise _UnfitError(f"{unfit}; a log in memory is gone with the process, and a restart could restore nothing")
    if query:
        raise _UnfitError(f"{unfit}; the service sets the connection's options itself, leave out what follows the '?'")
    if not location.startswith("/"):
        raise _UnfitError(f"{unfit}; SQLite has no host, write a slash more")
    path = unquote(location[1:])  # as SQLAlchemy does from 2.1 on
    if not path.startswith("/"):
        # A start from another folder would find an empty log, and take our own interfaces for orphans.
        raise _UnfitError(f"{unfit}; a relative path names another log in every folder, write four slashes")
    if path.endswith(("/", "/.", "/..")):
        raise _UnfitError(f"{unfit}; this names a directory")
    if any(ord(character) < 0x20 or character == "\x7f" for character in path):
        raise _UnfitError(f"{unfit}; control characters are refused")
    return given


def _refuse_surrogates(given: str, setting: Setting) -> None:
    """Bytes of the environment that are no UTF-8, and JSON's "\\ud800", can be neither logged nor stored."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise _UnfitError(f"given {shown(given)}, wanted {setting.wanted} in valid UTF-8") from None


# ---------------------------------------------------------------------------------------------------------
# Words for people.


def _unknown(word: str, siblings: Iterable[str]) -> str:
    """Reason for an unknown key: the same word in another section, else the nearest one beside it."""
    siblings = tuple(siblings)
    if word in _BY_KEY:
        setting = _BY_KEY[word]
        return f'given an unknown key; sections nest: {{"{setting.section}": {{"{setting.name}": ...}}}}'
    near = [setting.key for setting in SETTINGS if setting.name == word.lower()]
    if not near:
        near = difflib.get_close_matches(word.lower(), siblings, n=1)
    if near:
        return f"given an unknown key; did you mean {' or '.join(map(repr, near))}?"
    return f"given an unknown key, wanted one of {', '.join(siblings)}"


def _dotted(*parts: str) -> str:
    """A path to show; parts that could garble a terminal are quoted."""
    return ".".join(part if _PLAIN.fullmatch(part) else shown(part) for part in parts)


def _without_secrets(text: str) -> str:
    """Only a URL with no place for a password is shown whole: invariant 14 of the design."""
    scheme, separator, _ = text.partition("://")
    if text.startswith(("sqlite:///", "sqlite+pysqlite:///")):
        location, query, _ = text.partition("?")
        return f"{location}?..." if query else location
    if separator:
        return f"{scheme}://..."
    return "..." if "@" in text else text


# ---------------------------------------------------------------------------------------------------------
# The file.


class _Object(dict[str, Any]):
    """A JSON object that remembers the keys it was given twice; json.loads keeps the last in silence."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        seen: set[str] = set()
        self.repeated: dict[str, None] = {}
        for name, _ in pairs:
            if name in seen:
                self.repeated[name] = None
            seen.add(name)


def _decode(path: Path) -> object:
    """The file's JSON, objects as `_Object`, or `_UnfitError`."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(FILE_LIMIT_BYTES + 1)
    except OSError as error:
        raise _UnfitError(_unreadable(error)) from error
    if len(raw) > FILE_LIMIT_BYTES:
        raise _UnfitError(f"given more than {FILE_LIMIT_BYTES} bytes, wanted a configuration")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise _UnfitError(f"line {line}, byte {column}: given bytes that are no UTF-8, wanted JSON in UTF-8") from error
    if text.startswith("\ufeff"):
        raise _UnfitError("line 1, column 1: given a byte order mark, wanted JSON without one")
    if not text.strip():
        raise _UnfitError("given an empty file, wanted JSON; {} sets nothing")
    try:
        decoded: object = json.loads(text, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        raise _UnfitError(f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise _UnfitError("given JSON nested too deep, wanted sections of settings") from error
    except ValueError as error:  # int() refuses numbers of more than 4,300 digits
        raise _UnfitError("given a number with thousands of digits, wanted settings") from error
    return decoded


def _unreadable(error: OSError) -> str:
    """Why the file could not be read, and what would mend it."""
    match error.errno:
        case errno.ENOENT:
            return "does not exist; name another by --config or TUNLEDGER_CONFIG"
        case errno.EISDIR:
            return "given a directory, wanted a file"
        case errno.EACCES | errno.EPERM:
            return f"not readable by uid {os.geteuid()}; change its mode or owner, or those of a folder above it"
        case _:
            return f"cannot be read: {error.strerror or error}"
