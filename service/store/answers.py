"""Keeps what was answered to requests with an Idempotency-Key, for a day and more, over crashes.

A row is made with the intent, in its transaction, and gets its answer with the outcome, in that one. So a key is
known exactly as long as its effect is.
"""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from service import failpoints
from service.store import schema
from service.store.database import open_reader, unreadable
from service.store.writer import Job

KEPT = datetime.timedelta(hours=25)  # 24 are promised
THINNED_AT_ONCE = 500  # rows; a bite, so that no command waits for it

_answers = schema.answers.c


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it went out: status, JSON body, headers of ours."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    media_type: str = "application/json"


@dataclass(frozen=True, slots=True)
class Kept:
    """What is known of a key: the request it came with, and the reply, None while there is no outcome."""

    fingerprint: str
    command_id: str
    reply: Reply | None


def opened(actor: str, key: str, fingerprint: str, command_id: str, now: str) -> Job:
    """The statement that goes with the intent."""

    def write(connection: sa.Connection) -> None:
        failpoints.reach("store.answer.open", fails=True)
        connection.execute(
            insert(schema.answers)
            .values(actor=actor, key=key, fingerprint=fingerprint, command_id=command_id, recorded_at=now)
            .on_conflict_do_update(  # a refusal of the same key that came in between: what has an effect counts
                index_elements=["actor", "key"],
                set_={"fingerprint": fingerprint, "command_id": command_id, "status": None},
            )
        )

    return write


def closed(actor: str, key: str, fingerprint: str, command_id: str, now: str, reply: Reply) -> Job:
    """The statement that goes with the outcome, or with the refusal of a request that never became an intent.

    A reply that is there already stays: another request under the same key cannot change what the first one heard.
    """

    def write(connection: sa.Connection) -> None:
        failpoints.reach("store.answer.close", fails=True)
        statement = sa.text(
            "INSERT INTO answers (actor, key, fingerprint, command_id, recorded_at, status, body, headers, media_type) "
            "VALUES (:actor, :key, :fingerprint, :command_id, :now, :status, :body, :headers, :media_type) "
            "ON CONFLICT (actor, key) DO UPDATE SET status = :status, body = :body, headers = :headers, "
            "media_type = :media_type WHERE answers.status IS NULL AND answers.command_id = :command_id"
        )
        connection.execute(
            statement,
            {
                "actor": actor,
                "key": key,
                "fingerprint": fingerprint,
                "command_id": command_id,
                "now": now,
                "status": reply.status,
                "body": reply.body.decode(),
                "headers": msgspec.json.encode(dict(reply.headers)).decode(),
                "media_type": reply.media_type,
            },
        )

    return write


def thin(before: str) -> Job:
    """The statement that forgets a bite of old keys; those without an answer stay."""

    def write(connection: sa.Connection) -> None:
        failpoints.reach("store.answer.thin", fails=True)
        connection.execute(
            sa.text(
                "DELETE FROM answers WHERE (actor, key) IN (SELECT actor, key FROM answers "
                "WHERE recorded_at < :before AND status IS NOT NULL LIMIT :bite)"
            ),
            {"before": before, "bite": THINNED_AT_ONCE},
        )

    return write


class Answers:
    """Looks keys up. Blocking: call it in a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine = open_reader(path)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def find(self, actor: str, key: str) -> Kept | None:
        """What is known of a caller's key. Raises TunledgerError: log_corrupt."""
        query = sa.select(schema.answers).where(_answers.actor == actor, _answers.key == key)
        try:
            with self._engine.connect() as connection:
                row = connection.execute(query).first()
        except sa.exc.DatabaseError as error:
            raise unreadable(self._path, error) from error
        if row is None:
            return None
        reply = None
        if row.status is not None:
            headers = msgspec.json.decode(row.headers, type=dict[str, str])
            reply = Reply(row.status, row.body.encode(), headers, row.media_type)
        return Kept(row.fingerprint, row.command_id, reply)
