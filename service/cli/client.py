"""The HTTP client of the command line: the one module that knows httpx."""

from collections.abc import Mapping
from typing import Any

import httpx

TIMEOUT_S = 30.0


class CallError(Exception):
    """A call that did not succeed. `reachable` is False if no tunledger answered at all."""

    def __init__(self, message: str, *, reachable: bool = True) -> None:
        super().__init__(message)
        self.reachable = reachable


class Client:
    """Calls one service.

    Args:
        url: "http://127.0.0.1:8080".
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def get(self, path: str, params: Mapping[str, Any] | None = None, *, ok: tuple[int, ...] = (200,)) -> Any:
        """The JSON of an answer.

        Raises:
            CallError: with the service's own words, or how to reach one.
        """
        try:
            with httpx.Client(timeout=TIMEOUT_S, trust_env=False) as http:
                response = http.get(self._url + path, params=dict(params or {}))
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise CallError(
                f"no tunledger answers at {self._url} ({error}); start it with tunledger serve, or give --url",
                reachable=False,
            ) from error
        try:
            body = response.json()
        except ValueError:
            raise CallError(f"{self._url} answered {response.status_code} and no JSON; is it tunledger?") from None
        if response.status_code not in ok:
            text = body.get("error") if isinstance(body, dict) else None
            raise CallError(str(text or f"{self._url}{path} answered {response.status_code}"))
        return body
