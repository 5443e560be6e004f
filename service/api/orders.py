"""From a request to a command under way: an id, who sent it, its headers, and a record of its refusal.

Shared by both APIs, so that a command is the same thing whichever way it came. What the headers mean:

    Idempotency-Key    the same key and request get the same answer, and have one effect
    If-Match           only if the interface still is what the caller read; If-None-Match: * only if there is none
    Prefer             respond-async: answer 202 as soon as the command is in the log
    Tunledger-Reason   kept in the log and shown in history
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from litestar import Request, Response

from service import failpoints
from service.api import render
from service.api.access import caller
from service.api.bodies import Defaults
from service.api.problems import answer
from service.api.resources import event_json, plan_json, preview_json
from service.domain import commands as cmd
from service.domain.decide import confirm
from service.domain.errors import ErrorCode, TunledgerError, invalid, unknown
from service.domain.values import CommandId
from service.reconcile.answer import Clock
from service.reconcile.engine import Engine

PARAMETERS = ("dry_run", "allow_overlap", "recreate", "confirm_within_s")
REASON_CHARS_MAX = 256
CONFIRM_S_MAX = 24 * 3600
_KEY = re.compile(r"[!-~]{1,255}")
_ETAG = re.compile(r'(?:W/)?"[!#-~]*"')
_ETAGS = re.compile(rf"\*|{_ETAG.pattern}(?:[ \t]*,[ \t]*{_ETAG.pattern})*")  # RFC 9110, section 13.1.1


@dataclass(slots=True)
class Named:
    """The interface a request is about, as far as it is known when it is refused."""

    name: str = ""


class Orders:
    """What the routes work with: the engine, the configured defaults, and ids."""

    def __init__(self, engine: Engine, clock: Clock, defaults: Defaults) -> None:
        self.engine, self.defaults = engine, defaults
        self.clock = clock
        self._recording: set[asyncio.Task[None]] = set()

    def begin(self, request: Request[Any, Any, Any], kind: str, via: str, call: str, body: bytes = b"") -> "Order":
        """A new command of this kind, not yet parsed. `call` names its answer (`service.api.render`)."""
        order = Order(self, request, kind, via, call, body, CommandId(self.clock.new_id()))
        if via != "classic":
            try:
                _refuse_strange_parameters(request)
            except (
                TunledgerError
            ) as refusal:  # whose answer hangs on the request alone, so that it need not be waited for
                if not order.is_dry_run:
                    self.record(order, "", refusal)
                raise
        return order

    def record(self, order: "Order", name: str, refusal: TunledgerError) -> "asyncio.Task[None]":
        """Have a refusal recorded; without an Idempotency-Key the client need not wait for the disk to hear of it.

        The task raises TunledgerError: it could not be kept under its key, and must not be heard.
        """
        who = caller(order.request)
        request = cmd.Request(
            via=order.via,
            call=order.call,
            peer=who.peer,
            user=who.user,
            reason=order.reason(),
            **order.key_and_fingerprint(),
        )
        work = self.engine.reject(refusal, name, order.kind, who.actor, order.command_id, request)
        task = asyncio.get_running_loop().create_task(work)
        self._recording.add(task)
        task.add_done_callback(self._recorded)
        return task

    def _recorded(self, task: "asyncio.Task[None]") -> None:
        self._recording.discard(task)
        if not task.cancelled():
            task.exception()  # the log tells of it; the answer that is sent already depends on the request alone


@dataclass(frozen=True, slots=True)
class Order:
    """One command on its way in."""

    orders: Orders
    request: Request[Any, Any, Any]
    kind: str
    via: str
    call: str
    body: bytes
    command_id: CommandId

    @asynccontextmanager
    async def recorded(self) -> AsyncIterator[Named]:
        """Record what is refused inside: a body that does not parse, an interface that is not there.

        With an Idempotency-Key the refusal is heard only when it is kept: after a crash, a repetition hears the same.
        """
        named = Named()
        try:
            yield named
        except TunledgerError as refusal:
            if not self.is_dry_run:
                recording = self.orders.record(self, named.name, refusal)
                if self.key_and_fingerprint():
                    await asyncio.shield(recording)
            raise

    @property
    def is_dry_run(self) -> bool:
        """Whether nothing is to be done, as far as the parameter can be read."""
        return self._flag("dry_run", quiet=True)

    def flag(self, name: str) -> bool:
        """A query parameter that is true or false; false if it is not there. Raises TunledgerError: invalid_field."""
        return self._flag(name, quiet=False)

    async def carry_out(self, *commands: cmd.Command) -> Response[bytes]:
        """Carry the commands out, or preview them (`dry_run`). Raises TunledgerError: why not."""
        engine = self.orders.engine
        async with self.recorded() as named:
            named.name = cmd.target(commands[0]) if len(commands) == 1 else ""
            submission, wait = self._submission(commands)
        if self.via != "classic" and self.flag("dry_run"):
            return answer(preview_json(await engine.preview(submission)))
        done = await engine.submit(submission, wait=wait)
        failpoints.reach("api.answer.before")
        if done.reply is not None:
            return render.response(done.reply)
        if not done.finished:
            return render.response(render.accepted(self.command_id))
        return render.response(render.render(submission.request, self.command_id, done.finished, None))

    async def reconcile(self) -> Response[bytes]:
        """Have everything looked at now, and mended; or only say what would be done. Raises TunledgerError."""
        submission, _ = self._submission(())  # a dry run refuses what the run would
        if self.flag("dry_run"):
            return answer({"dry_run": True, "plan": await drift(self.orders.engine)})
        return render.response(await self.orders.engine.reconcile_for(submission))

    async def confirm(self, command_id: str) -> Response[bytes]:
        """Make an unconfirmed change stay. Raises TunledgerError: not_awaiting."""
        submission, _ = self._submission((), confirms=command_id)
        if self.flag("dry_run"):
            confirmed = confirm(self.orders.engine.state, command_id, submission.request)
            return answer({"dry_run": True, "plan": [], "events": [event_json(event) for event in confirmed]})
        return render.response(await self.orders.engine.confirm(submission))

    def _submission(self, commands: tuple[cmd.Command, ...], *, confirms: str = "") -> tuple[cmd.Submission, bool]:
        who = caller(self.request)
        headers = self.request.headers
        key = headers.get("idempotency-key", "")
        if "idempotency-key" in headers and not _KEY.fullmatch(key):
            raise invalid("Idempotency-Key", key, "is not a key: 1 to 255 printable ASCII characters without blanks")
        classic = self.via == "classic"
        wait = classic or bool(confirms) or "respond-async" not in headers.get("prefer", "").lower()
        request = cmd.Request(
            via=self.via,
            call=self.call if wait else render.ASYNC + self.call,
            peer=who.peer,
            user=who.user,
            reason=_reason(headers.get("tunledger-reason", "")),
            key=key,
            fingerprint=self._fingerprint() if key else "",
            confirm_by="" if classic else self._confirm_by(),
            confirms=confirms,
        )
        return (
            cmd.Submission(
                commands,
                self.command_id,
                who.actor,
                request,
                if_match=None if classic else _etags(headers.get("if-match")),
                if_none_match=not classic and _must_be_absent(headers.get("if-none-match")),
            ),
            wait,
        )

    def key_and_fingerprint(self) -> dict[str, str]:
        """The Idempotency-Key of the request, where it has a good one, and the hash of all that it stands for."""
        key = self.request.headers.get("idempotency-key", "")
        return {"key": key, "fingerprint": self._fingerprint()} if _KEY.fullmatch(key) else {}

    def reason(self) -> str:
        """The words of Tunledger-Reason, where they are good ones."""
        try:
            return _reason(self.request.headers.get("tunledger-reason", ""))
        except TunledgerError:
            return ""

    def _fingerprint(self) -> str:
        url = f"{self.request.method} {self.request.scope['path']}?"
        query = bytes(self.request.scope["query_string"])
        return hashlib.sha256(url.encode() + query + b"\n" + self.body).hexdigest()

    def _confirm_by(self) -> str:
        text = self.request.query_params.get("confirm_within_s")
        if text is None:
            return ""
        if not re.fullmatch(r"[0-9]{1,6}", text) or not 1 <= int(text) <= CONFIRM_S_MAX:
            raise invalid("confirm_within_s", text, f"is not a number of seconds from 1 to {CONFIRM_S_MAX}")
        return self.orders.clock.before(-float(text))

    def _flag(self, name: str, *, quiet: bool) -> bool:
        text = self.request.query_params.get(name)
        if text in {None, "false", "0"}:
            return False
        if text not in {"true", "1", ""} and not quiet:
            raise invalid(name, text, 'is not "true" or "false"')
        return True


def _refuse_strange_parameters(request: Request[Any, Any, Any]) -> None:
    given = [name for name, _ in request.query_params.multi_items()]
    for name in given:
        if name not in PARAMETERS:  # "dryrun=true" must not do it for real
            raise unknown("", name, PARAMETERS, "parameter")
        if given.count(name) > 1:  # nor "dry_run=false&dry_run=true"
            raise TunledgerError(ErrorCode.INVALID_FIELD, f"{name}: given twice; give it once", field=name)


async def drift(engine: Engine) -> list[dict[str, Any]]:
    """What differs now, with the steps that would mend it, as JSON; nothing is changed."""
    return [
        plan_json(interface.name, found, steps, refusal.message if refusal is not None else None)
        for interface, found, steps, refusal in await engine.drift()
    ]


def _reason(header: str) -> str:
    """The words of Tunledger-Reason; HTTP hands headers over as Latin-1, people write UTF-8."""
    try:
        text = header.encode("latin-1").decode("utf-8")
    except UnicodeError:
        text = header
    if len(text) > REASON_CHARS_MAX or not text.isprintable():
        raise TunledgerError(
            ErrorCode.INVALID_FIELD,
            f"Tunledger-Reason: expected a line of at most {REASON_CHARS_MAX} printable characters",
            field="Tunledger-Reason",
        )
    return text


def _etags(header: str | None) -> tuple[str, ...] | None:
    if header is None:
        return None
    header = header.strip()
    if not _ETAGS.fullmatch(header):
        raise invalid("If-Match", header, 'is not a list of ETags such as "0192f0c0-....3", nor *')
    return ("*",) if header == "*" else tuple(found.removeprefix("W/") for found in _ETAG.findall(header))


def _must_be_absent(header: str | None) -> bool:
    """If-None-Match on a write. A list of ETags there would have no use; passing over it could overwrite something."""
    if header is None:
        return False
    if header.strip() != "*":
        raise invalid("If-None-Match", header, "is not *, the one value that writes take")
    return True
