"""Counters in time: samples, minutes and hours in compact rows, instead of JSON for every sample.

The key is time first, interface second. A sample of all interfaces is then written at the end of one tree, and what
is too old is cut off at its start: 1,000 interfaces touch some 25 pages. With the interface first each of them has a
page of its own, 4 MB a sample, which every command beside it would wait for (measured: 5 ms against 45 ms).

The rows of `counter_samples` are dropped. They were kept for a day, no release wrote them, and they do not say which
interval was meant, so that gaps in them could only be guessed. Lifetime totals do not depend on them: these are in
`counter_incarnations`, which stays as it is.

Revision ID: 0003
Revises: 0002
"""

from alembic import op

revision = "0003"
down_revision: str | None = "0002"
branch_labels: str | None = None
depends_on: str | None = None

TIERS = ("counter_raw", "counter_minutes", "counter_hours")


def upgrade() -> None:
    """Make the tables; in one transaction, so that a crash leaves nothing half made."""
    op.execute("DROP TABLE counter_samples")
    op.execute("""
        CREATE TABLE counter_interfaces (
            number INTEGER PRIMARY KEY,
            interface_id TEXT NOT NULL UNIQUE,
            first_at INTEGER NOT NULL
        ) STRICT
    """)
    for name in TIERS:
        op.execute(f"""
            CREATE TABLE {name} (
                at INTEGER NOT NULL,
                interface INTEGER NOT NULL,
                lag_ms INTEGER NOT NULL,
                rx_packets INTEGER NOT NULL,
                tx_packets INTEGER NOT NULL,
                rx_bytes INTEGER NOT NULL,
                tx_bytes INTEGER NOT NULL,
                rx_errors INTEGER NOT NULL,
                tx_errors INTEGER NOT NULL,
                rx_dropped INTEGER NOT NULL,
                tx_dropped INTEGER NOT NULL,
                from_kernel_packets INTEGER NOT NULL,
                from_kernel_bytes INTEGER NOT NULL,
                to_kernel_packets INTEGER NOT NULL,
                to_kernel_bytes INTEGER NOT NULL,
                gap_ms INTEGER NOT NULL,
                missed TEXT,
                classes TEXT,
                PRIMARY KEY (at, interface)
            ) STRICT, WITHOUT ROWID
        """)
    op.execute("""
        CREATE TABLE counter_progress (
            id INTEGER PRIMARY KEY CHECK (id = 1),
            sequence INTEGER NOT NULL,
            last_at INTEGER NOT NULL,
            minutes_at INTEGER NOT NULL,
            minutes_interface INTEGER NOT NULL,
            hours_at INTEGER NOT NULL,
            hours_interface INTEGER NOT NULL,
            raw_thinned INTEGER NOT NULL,
            minutes_thinned INTEGER NOT NULL
        ) STRICT
    """)
    op.execute("INSERT INTO counter_progress VALUES (1, 0, 0, 0, 0, 0, 0, 0, 0)")


def downgrade() -> None:
    """Refused: a log that can be downgraded can be lost."""
    raise RuntimeError("the log has no way back; restore a copy of the file instead")
