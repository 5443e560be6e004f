"""The HTTP client of the command line, and the one module of it that knows how HTTP is spoken.

http.client and not httpx: it is there already, and importing httpx takes longer than asking the service. It is imported
where a call is made, since `tunledger serve` makes none. One connection for each call. A write carries an
Idempotency-Key of its own, so that it can be sent again when its connection broke before the answer came: the service
carries it out once, and answers both alike.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlencode, urlsplit
from uuid import uuid4

if TYPE_CHECKING:
    import http.client

TIMEOUT_S = 30.0
WRITE_TIMEOUT_S = 180.0  # deleting 1,000 interfaces one by one takes the kernel 20 s
RECONNECT_S = 5.0  # a service that is restarted listens again after one or two
RECONNECT_PAUSE_S = 0.1
READ_BYTES = 1 << 16
KEY_HEADER = "Idempotency-Key"
CLOSED = "the service closed the stream"


def url_of(host: str, port: int) -> str:
    """Where a service listens, as a URL: an IPv6 address is put in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class CallError(Exception):
    """A call that did not succeed.

    Attributes:
        reachable: False if no tunledger answered at all.
        problem: the problem details of a refusal (RFC 9457), or empty.
    """

    def __init__(self, message: str, *, reachable: bool = True, problem: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.reachable = reachable
        self.problem = dict(problem or {})


class NotAnsweredError(CallError):
    """The call was sent and not answered: what was ordered may or may not have been carried out."""


class BrokenConnectionError(NotAnsweredError):
    """There is no answer because the connection ended."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: Any


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event. `id` is where a broken stream goes on."""

    id: str
    kind: str
    data: str


@dataclass(frozen=True, slots=True)
class Client:
    """Calls one service.

    Args:
        url: "http://127.0.0.1:8080".
        timeout_s: how long to wait for a connection, and then for each piece of the answer.
    """

    url: str
    timeout_s: float = TIMEOUT_S
    _bare: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_bare", self.url.rstrip("/"))

    def get(self, path: str, params: Mapping[str, Any] | None = None, *, ok: tuple[int, ...] = (200,)) -> Any:
        """The JSON of an answer.

        Raises:
            CallError: with the service's own words, or how to reach one.
        """
        return self.call("GET", path, params, ok=ok).body

    def call(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None = None,
        *,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        ok: tuple[int, ...] = (200, 201, 202),
        wait_s: float = 0.0,
    ) -> Answer:
        """One call and its answer.

        Args:
            wait_s: how long to try again if nobody listens there.

        Raises:
            CallError: NotAnsweredError, if the call may have had its effect all the same.
        """
        with _Exchange(self, self._connect(wait_s=wait_s)) as exchange:
            return exchange.answer(method, path, params, body, headers or {}, ok)

    def write(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None = None,
        *,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """A call that changes something: sent once more if its connection breaks. Raises CallError."""
        keyed = {**(headers or {}), KEY_HEADER: str(uuid4())}
        patient = replace(self, timeout_s=max(self.timeout_s, WRITE_TIMEOUT_S))
        try:
            try:
                return patient.call(method, path, params, body=body, headers=keyed)
            except BrokenConnectionError as broke:
                try:
                    return patient.call(method, path, params, body=body, headers=keyed, wait_s=RECONNECT_S)
                except CallError as error:
                    if error.reachable:
                        raise
                    raise BrokenConnectionError(str(broke), reachable=False) from error
        except NotAnsweredError as error:
            text = f"{error}; whether it was carried out, tunledger history says"
            raise CallError(text, reachable=False) from error

    def octets(self, path: str, params: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Iterator[bytes]:
        """The octets of an answer as they come, until it ends; there may be none for as long as it likes.

        Raises:
            CallError: if it is refused or nobody is there; BrokenConnectionError, if it breaks off.
        """
        with _Exchange(self, self._connect()) as exchange:
            yield from exchange.octets(path, params, headers or {})

    def events(
        self,
        path: str,
        params: Mapping[str, Any],
        *,
        after: str | None,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[Event]:
        """The server-sent events of one connection, until it ends.

        Args:
            after: the id of the last event that was seen, or None.

        Raises:
            CallError: if it is refused or nobody is there; BrokenConnectionError, if it breaks off.
        """
        more = {"Accept": "text/event-stream", **({"Last-Event-ID": after} if after is not None else {})}
        with _Exchange(self, self._connect()) as exchange:
            yield from _events(exchange.lines("GET", path, params, {**(headers or {}), **more}))

    def _connect(self, *, wait_s: float = 0.0) -> "http.client.HTTPConnection":
        """A connection that stands; for so long, connecting is tried again."""
        import http.client

        deadline = time.monotonic() + wait_s
        try:
            parts = urlsplit(self._bare)
            kinds: dict[str, type[http.client.HTTPConnection]] = {"http": http.client.HTTPConnection}
            if not parts.hostname:
                raise ValueError("there is no host in it")
            connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=self.timeout_s)
        except (ValueError, KeyError):
            raise CallError(f"{self.url} is not a URL such as http://127.0.0.1:8080", reachable=False) from None
        while True:
            try:
                connection.connect()
            except OSError as error:
                if time.monotonic() >= deadline:
                    raise self._unreachable(error) from error
                time.sleep(RECONNECT_PAUSE_S)
            else:
                return connection

    def _unreachable(self, error: Exception) -> CallError:
        return CallError(
            f"no tunledger answers at {self._bare} ({_words(error)}); start it with tunledger serve, or give --url",
            reachable=False,
        )

    def _prefix(self) -> str:
        return urlsplit(self._bare).path


class _Exchange:
    """One request on one connection, which is closed afterwards."""

    def __init__(self, client: Client, connection: "http.client.HTTPConnection") -> None:
        self._client, self._connection = client, connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def answer(
        self,
        method: str,
        path: str,
        params: Mapping[str, Any] | None,
        body: Any,
        headers: Mapping[str, str],
        ok: tuple[int, ...],
    ) -> Answer:
        import http.client

        try:
            response = self._send(method, path, params, body, headers)
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise self._broke(error) from error
        found = Answer(response.status, {key.lower(): value for key, value in response.getheaders()}, None)
        decoded = self._decoded(content, found)
        if response.status not in ok:
            raise self._refusal(response.status, path, decoded)
        return Answer(found.status, found.headers, decoded)

    def lines(self, method: str, path: str, params: Mapping[str, Any], headers: Mapping[str, str]) -> Iterator[str]:
        """The lines of an answer as they come, without their ends; not what is behind the last end."""
        rest = b""
        for octets in self._pieces(method, path, params, headers):
            *whole, rest = (rest + octets).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace").rstrip("\r")

    def octets(self, path: str, params: Mapping[str, Any], headers: Mapping[str, str]) -> Iterator[bytes]:
        """The octets of an answer as they come; it may be silent for as long as it likes."""
        return self._pieces("GET", path, params, headers, patient=True)

    def _pieces(
        self, method: str, path: str, params: Mapping[str, Any], headers: Mapping[str, str], *, patient: bool = False
    ) -> Iterator[bytes]:
        """What comes of an answer, as it comes. By read1: readline takes a connection that broke for an end."""
        import http.client

        try:
            response = self._send(method, path, params, None, headers)
            if response.status != http.client.OK:
                content = response.read()
                raise self._refusal(response.status, path, self._decoded(content, Answer(response.status, {}, None)))
        except (OSError, http.client.HTTPException) as error:
            raise self._broke(error) from error
        if patient and self._connection.sock is not None:
            self._connection.sock.settimeout(None)
        while True:
            try:
                octets = response.read1(READ_BYTES)
            except (OSError, http.client.HTTPException) as error:
                raise self._cut_off(error) from error
            if not octets:
                return
            yield octets

    def _send(
        self, method: str, path: str, params: Mapping[str, Any] | None, body: Any, headers: Mapping[str, str]
    ) -> "http.client.HTTPResponse":
        query = "?" + urlencode(params, doseq=True) if params else ""
        data = None if body is None else json.dumps(body).encode()
        # As bytes: http.client writes text as Latin-1, and people write their reasons in UTF-8.
        encoded: dict[str, Any] = {name: value.encode() for name, value in headers.items()}
        if data is not None:
            encoded["Content-Type"] = b"application/json"
        self._connection.request(method, self._client._prefix() + path + query, data, encoded)
        return self._connection.getresponse()

    def _broke(self, error: Exception) -> CallError:
        import http.client

        url = self._client.url
        if isinstance(error, http.client.BadStatusLine) and not isinstance(error, http.client.RemoteDisconnected):
            return CallError(f"{url} does not speak HTTP; is it tunledger?")
        if isinstance(error, TimeoutError):
            return NotAnsweredError(f"no answer from {url} within {self._client.timeout_s:g} s", reachable=False)
        return BrokenConnectionError(
            f"the connection to {url} broke before the answer ({_words(error)})", reachable=False
        )

    def _cut_off(self, error: Exception) -> CallError:
        """A stream that began and did not come to its end: what the library says of that is for programmers."""
        if isinstance(error, TimeoutError):
            return NotAnsweredError(
                f"nothing more came from {self._client.url} within {self._client.timeout_s:g} s", reachable=False
            )
        return BrokenConnectionError(CLOSED, reachable=False)

    def _decoded(self, content: bytes, answer: Answer) -> Any:
        try:
            return json.loads(content) if content else None
        except ValueError:
            raise CallError(f"{self._client.url} answered {answer.status} and no JSON; is it tunledger?") from None

    def _refusal(self, status: int, path: str, body: Any) -> CallError:
        told = body if isinstance(body, dict) else {}
        text = told.get("detail") or told.get("error")
        return CallError(
            str(text or f"{self._client.url}{path} answered {status}"), problem=told if "code" in told else None
        )


def _words(error: Exception) -> str:
    """What an error says, without its number."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _events(lines: Iterator[str]) -> Iterator[Event]:
    """Server-sent events from lines, as the HTML standard has it (9.2.6); comments are heartbeats.

    An id without data is no event there. Here it is one, without data: the place to go on from is news too.
    """
    last, kind, data = "", "", list[str]()
    told = ""
    for line in lines:
        if not line:
            if data or last != told:
                yield Event(last, kind or "message", "\n".join(data))
            kind, data, told = "", [], last
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "id":
                last = value
            case "event":
                kind = value
            case "data":
                data.append(value)
            case _:  # a comment (an empty name), "retry", or what a later standard adds
                continue
