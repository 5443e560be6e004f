"""docs/api.md is a session with the real service: this runs it, and compares or records what was answered.

A console block holds `$ curl ...` commands, each followed by its answer; a `# line` above a command says what it
shows. Run in order against a fresh service in a network namespace of its own, they make two things that can then not
go stale: the answers in docs/api.md, and the examples of the OpenAPI document (service/api/examples.json).

    python -m tests.schema.recording        record both anew
    pytest tests/schema/test_recorded.py    run it, and compare what does not change from run to run

In a command, ids and hashes of earlier answers are found again by their place. In a new one, write @command_id, @id,
@etag, @head or @position for the last that was answered.
"""

import http.client
import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

from service.api.openapi import document
from tests.e2e.harness import ROOT, Service
from tests.namespace import fresh_namespace

DOCS = ROOT / "docs/api.md"
EXAMPLES = ROOT / "service/api/examples.json"
WIDTH = 100
HEADERS = ("etag", "location", "tunledger-command-id", "preference-applied", "retry-after", "allow", "content-type")

_ID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_VOLATILE = re.compile(rf"{_ID}|\b[0-9a-f]{{64}}\b|\d{{4}}-\d\d-\d\dT[0-9:.]+Z")


@dataclass(slots=True)
class Exchange:
    """A command of the session, what it sent and what was answered."""

    summary: str
    command: str
    method: str
    path: str
    headers: dict[str, str]
    body: bytes | None
    status: int = 0
    answered: dict[str, str] = field(default_factory=dict)
    content: bytes = b""
    written: str = ""  # the answer as the page has it

    @property
    def decoded(self) -> Any:
        """The answer as JSON; its text where it is none."""
        if "json" in self.answered["content-type"] and "ndjson" not in self.answered["content-type"]:
            return json.loads(self.content)
        return self.content.decode()

    @property
    def shown(self) -> str:
        """The answer as the page shall have it."""
        decoded = self.decoded
        text = decoded.rstrip("\n") if isinstance(decoded, str) else folded(decoded)
        if "-i" not in shlex.split(self.command):
            return text
        told = [f"{name}: {self.answered[name]}" for name in HEADERS if name in self.answered]
        return "\n".join([f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}", *told, "", text])


def folded(value: Any, indent: int = 0, room: int = WIDTH) -> str:
    """JSON on as few lines as are easy to read: short members share a line."""
    flat = json.dumps(value, ensure_ascii=False)
    if len(flat) <= room - indent or not isinstance(value, dict | list) or not value:
        return flat
    pad, members = " " * (indent + 2), list[str]()
    if isinstance(value, list):
        members = [folded(each, indent + 2) for each in value]
    else:
        members = [
            f"{json.dumps(key)}: {folded(each, indent + 2, WIDTH - len(key) - 4)}" for key, each in value.items()
        ]
    lines = [members[0]]
    for member in members[1:]:
        fits = len(pad) + len(lines[-1]) + 2 + len(member) < WIDTH
        if fits and not {"\n", "{"} & {*lines[-1], *member}:
            lines[-1] += f", {member}"
        else:
            lines.append(member)
    opening, closing = ("[", "]") if isinstance(value, list) else ("{", "}")
    return f"{opening}\n" + ",\n".join(pad + line for line in lines) + f"\n{' ' * indent}{closing}"


def parsed(command: str, summary: str) -> Exchange:
    """A curl command as a request. Raises ValueError for an option that is not known here."""
    words = iter(shlex.split(command.replace("\\\n", " ")))
    assert next(words) == "curl", command
    found = Exchange(summary, command, "", "", {}, None)
    for word in words:
        match word:
            case "-X":
                found.method = next(words)
            case "-H":
                name, _, value = next(words).partition(": ")
                found.headers[name] = value
            case "-d":
                found.body = next(words).encode()
            case "--max-time":
                found.headers["@max-time"] = next(words)
            case "-i" | "-N":
                pass
            case _ if word.startswith("localhost:8080/"):
                found.path = word.removeprefix("localhost:8080")
            case _:
                raise ValueError(f"{word}: not known to the recording: {command}")
    found.method = found.method or ("GET" if found.body is None else "POST")
    return found


def send(exchange: Exchange, port: int) -> None:
    """Send the request, and keep the answer; one that goes on, for as long as --max-time says."""
    limit_s = float(exchange.headers.pop("@max-time", 30))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=limit_s)
    end = time.monotonic() + limit_s
    try:
        headers = {**exchange.headers, "Host": "localhost:8080"}
        connection.request(exchange.method, exchange.path, exchange.body, headers)
        response = connection.getresponse()
        exchange.status = response.status
        exchange.answered = {name.lower(): value for name, value in response.getheaders()}
        try:
            while time.monotonic() < end and (part := response.read1()):
                exchange.content += part
        except TimeoutError:
            assert "event-stream" in exchange.answered["content-type"], exchange.command
    finally:
        connection.close()


# -- the page


def _blocks(page: str) -> Iterator[tuple[int, int, str]]:
    """The console blocks: where their text begins and ends, and the heading they are under."""
    for found in re.finditer(r"^```console\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        before = re.sub(r"^```.*?^```$", "", page[: found.start()], flags=re.MULTILINE | re.DOTALL)
        headings = re.findall(r"^#+ (.*)$", before, re.MULTILINE)
        yield found.start(1), found.end(1), headings[-1]


def exchanges(block: str, heading: str) -> list[Exchange]:
    """The commands of a block, with the answers that are written there."""
    found: list[Exchange] = []
    summary, lines = heading, iter(block.splitlines())
    for line in lines:
        if line.startswith("# "):
            summary = line[2:]
        elif line.startswith("$ "):
            command = line[2:]
            while command.endswith("\\"):
                command += "\n" + next(lines)
            found.append(parsed(command, summary))
        else:
            assert found, f"an answer without a command: {line}"
            found[-1].written += line + "\n"
    return found


def run(page: str, port: int) -> tuple[str, list[Exchange]]:
    """Run the page's commands; the page with their answers, and all of them."""
    done: list[Exchange] = []
    renamed: dict[str, str] = {}
    last: dict[str, str] = {}
    pieces, place = [], 0
    for begin, end, heading in _blocks(page):
        lines: list[str] = []
        for exchange in exchanges(page[begin:end], heading):
            if exchange.summary != heading:
                lines.append(f"# {exchange.summary}")
            command = _VOLATILE.sub(lambda each: renamed.get(each[0], each[0]), exchange.command)
            command = re.sub(r"@(command_id|id|etag|head|position)\b", lambda each: last[each[1]], command)
            now = parsed(command, exchange.summary)
            now.written = exchange.written
            send(now, port)
            while isinstance(now.decoded, dict) and now.decoded.get("state") == "pending" and now.method == "GET":
                now.content = b""
                send(now, port)
            _remember(now, last)
            before, after = _VOLATILE.findall(exchange.written), _VOLATILE.findall(now.shown)
            if len(before) == len(after):
                renamed.update(zip(before, after, strict=True))
            lines += [f"$ {command}", now.shown]
            done.append(now)
        pieces += [page[place:begin], "\n".join(lines) + "\n"]
        place = end
    return "".join([*pieces, page[place:]]), done


def _remember(exchange: Exchange, last: dict[str, str]) -> None:
    decoded = exchange.decoded
    if isinstance(decoded, dict):
        last |= {name: str(decoded[name]) for name in ("command_id", "id", "position") if decoded.get(name)}
        if {"position", "hash", "node"} <= decoded.keys():
            last["head"] = f"{decoded['position']}:{decoded['hash']}"
    if "tunledger-command-id" in exchange.answered:
        last["command_id"] = exchange.answered["tunledger-command-id"]
    if "etag" in exchange.answered:
        last["etag"] = exchange.answered["etag"]


# -- what is made of it

_COUNTED = {"kernel", "worker", "rates", "points", "audit"}
_MOVING = {"took_us", "pid", "node", "boot_id", "peer", "position", "log_position", "next", "from", "to"}
_MOVING_TEXT = re.compile(
    r'"\d+(?:-\d+)?"|(?:tunledger:|node/)[0-9a-f]{12}|"node":"[0-9a-f]{12}"|127\.0\.0\.1:\d+'
    r'|"(?:id|position|version|pid|took_us)": ?\d+'
)
_MOVING |= {"rates_over_s", "retry_in_s", "events", "version"}


def masked(value: Any) -> Any:
    """An answer without what is another in each run: ids, times, how long it took, what was counted."""
    match value:
        case dict():
            return {key: masked_member(key, each) for key, each in value.items()}
        case list():
            return [masked(each) for each in value]
        case str():
            return _MOVING_TEXT.sub("~", _VOLATILE.sub("~", value))
        case _:
            return value


def masked_member(key: str, value: Any) -> Any:
    """A member of an object, masked by its name."""
    if key in _COUNTED:
        return type(value).__name__ if value is not None else None
    if key in _MOVING and not isinstance(value, dict | list):
        return "~"
    return masked(value)


def examples(done: list[Exchange]) -> dict[str, list[dict[str, Any]]]:
    """The session by operation, as service/api/examples.json has it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for exchange in done:
        if isinstance(exchange.decoded, str) and "event-stream" not in exchange.answered["content-type"]:
            continue
        example: dict[str, Any] = {"summary": exchange.summary, "status": exchange.status}
        if exchange.body is not None:
            example["body"] = json.loads(exchange.body)
        example["answer"] = exchange.decoded
        found.setdefault(operation_of(exchange.method, exchange.path), []).append(example)
    return found


def operation_of(method: str, path: str) -> str:
    """The id of the operation that a request is for."""
    paths: Mapping[str, Any] = document({})["paths"]
    bare = path.partition("?")[0]
    for template in sorted(paths, key=lambda each: each.count("{")):
        pattern = re.sub(r"\\{[a-z_]+\\}", "[^/]+", re.escape(template))
        if re.fullmatch(pattern, bare) and method.lower() in paths[template]:
            return str(paths[template][method.lower()]["operationId"])
    raise LookupError(f"no operation for {method} {path}")


def main() -> None:
    """Record docs/api.md and the examples anew."""
    with fresh_namespace(), tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder)).start()
        try:
            page, done = run(DOCS.read_text(), service.port)
        finally:
            service.close()
    DOCS.write_text(page)
    EXAMPLES.write_text(json.dumps(examples(done), indent=1, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{len(done)} requests recorded\n")


if __name__ == "__main__":
    main()
