"""What reading at size needs: indexes for every filter of events, and snapshots of folded state.

Nothing here is part of the log: indexes and snapshots follow from `events`, and can be made anew from it.

Revision ID: 0002
Revises: 0001
"""

from alembic import op

revision = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """One section for each purpose; all in one transaction, so that a crash leaves nothing half made."""
    _queries()
    _snapshots()


def _queries() -> None:
    # An index of a rowid table ends in the rowid, here the position: each gives its events in order of position, from
    # any position on, so that a page costs its own length. (actor, type) serves an actor with or without types.
    op.execute("CREATE INDEX events_by_stream ON events (stream)")
    op.execute("CREATE INDEX events_by_type ON events (type)")
    op.execute("CREATE INDEX events_by_actor ON events (actor, type)")
    op.execute("CREATE INDEX events_by_time ON events (recorded_at)")
    # For comparing a stretch of the log with the names it declares.
    op.execute("CREATE INDEX interface_names_by_position ON interface_names (position)")


def _snapshots() -> None:
    op.execute("""
        CREATE TABLE snapshots (
            position INTEGER PRIMARY KEY,
            hash TEXT NOT NULL CHECK (length(hash) = 64),
            format TEXT NOT NULL,
            state BLOB NOT NULL,
            checksum TEXT NOT NULL CHECK (length(checksum) = 64)
        ) STRICT
    """)


def downgrade() -> None:
    """Refused: a log that can be downgraded can be lost."""
    raise RuntimeError("the log has no way back; restore a copy of the file instead")
