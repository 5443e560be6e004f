"""The event log, the index of names, the node, and the counters.

The hand-written SQL is on purpose: STRICT tables and triggers are what the log's promises rest on, and generated DDL
has neither.

Revision ID: 0001
Revises:
"""

from alembic import op

revision = "0001"
down_revision: str | None = None
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Make all tables; in one transaction, so that a crash leaves nothing half made."""
    op.execute("""
        CREATE TABLE events (
            position INTEGER PRIMARY KEY,
            event_id TEXT NOT NULL UNIQUE,
            stream TEXT NOT NULL,
            version INTEGER NOT NULL CHECK (version > 0),
            type TEXT NOT NULL,
            schema_version INTEGER NOT NULL CHECK (schema_version > 0),
            payload TEXT NOT NULL,
            actor TEXT NOT NULL,
            command_id TEXT,
            node TEXT NOT NULL,
            recorded_at TEXT NOT NULL,
            previous_hash TEXT NOT NULL CHECK (length(previous_hash) = 64),
            hash TEXT NOT NULL CHECK (length(hash) = 64),
            UNIQUE (stream, version)
        ) STRICT
    """)
    op.execute("CREATE INDEX events_by_command ON events (command_id) WHERE command_id IS NOT NULL")
    op.execute("""
        CREATE TRIGGER events_without_gaps BEFORE INSERT ON events
        WHEN NEW.position <> (SELECT coalesce(max(position), 0) + 1 FROM events)
        BEGIN SELECT RAISE(ABORT, 'the log is append-only: an event takes the next position'); END
    """)
    # REPLACE fires no DELETE trigger (recursive_triggers is off by default), so that it has to be met on its way in.
    op.execute("""
        CREATE TRIGGER events_never_replaced BEFORE INSERT ON events
        WHEN EXISTS (SELECT 1 FROM events WHERE event_id = NEW.event_id)
            OR EXISTS (SELECT 1 FROM events WHERE stream = NEW.stream AND version = NEW.version)
        BEGIN SELECT RAISE(ABORT, 'the log is append-only: events are never replaced'); END
    """)
    op.execute("""
        CREATE TRIGGER events_never_change BEFORE UPDATE ON events
        BEGIN SELECT RAISE(ABORT, 'the log is append-only: events are never changed'); END
    """)
    op.execute("""
        CREATE TRIGGER events_never_go BEFORE DELETE ON events
        BEGIN SELECT RAISE(ABORT, 'the log is append-only: events are never deleted'); END
    """)
    op.execute("""
        CREATE TABLE interface_names (
            interface_id TEXT PRIMARY KEY,
            name TEXT NOT NULL,
            position INTEGER NOT NULL
        ) STRICT, WITHOUT ROWID
    """)
    op.execute("CREATE INDEX interface_names_by_name ON interface_names (name, position)")
    op.execute("CREATE TABLE node (id TEXT PRIMARY KEY, created_at TEXT NOT NULL) STRICT")
    op.execute("""
        CREATE TABLE answers (
            actor TEXT NOT NULL,
            key TEXT NOT NULL,
            fingerprint TEXT NOT NULL,
            command_id TEXT NOT NULL,
            recorded_at TEXT NOT NULL,
            status INTEGER,
            body TEXT,
            headers TEXT,
            media_type TEXT,
            PRIMARY KEY (actor, key)
        ) STRICT, WITHOUT ROWID
    """)
    op.execute("CREATE INDEX answers_by_age ON answers (recorded_at)")
    op.execute("""
        CREATE TABLE counter_incarnations (
            id INTEGER PRIMARY KEY,
            interface_id TEXT NOT NULL,
            source TEXT NOT NULL CHECK (source IN ('kernel', 'worker')),
            key TEXT NOT NULL,
            opened_at TEXT NOT NULL,
            sampled_at TEXT NOT NULL,
            raw TEXT NOT NULL,
            UNIQUE (interface_id, source, key)
        ) STRICT
    """)
    op.execute("""
        CREATE TABLE counter_samples (
            interface_id TEXT NOT NULL,
            sampled_at TEXT NOT NULL,
            totals TEXT NOT NULL,
            PRIMARY KEY (interface_id, sampled_at)
        ) STRICT, WITHOUT ROWID
    """)


def downgrade() -> None:
    """Refused: a log that can be downgraded can be lost."""
    raise RuntimeError("the log has no way back; restore a copy of the file instead")
