"""The tables as queries see them. Migrations make them (`migrations/versions`); a test holds the two together."""

from sqlalchemy import Column, Integer, LargeBinary, MetaData, Table, Text

# Every schema revision this release knows, oldest first; a database at any other one is not ours to touch.
# Kept here so that serving does not import alembic (0.2 s); a test compares it with the migration files.
REVISIONS = ("0001", "0002", "0003")

metadata = MetaData()

events = Table(
    "events",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("event_id", Text, nullable=False),
    Column("stream", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("type", Text, nullable=False),
    Column("schema_version", Integer, nullable=False),
    Column("payload", Text, nullable=False),
    Column("actor", Text, nullable=False),
    Column("command_id", Text),
    Column("node", Text, nullable=False),
    Column("recorded_at", Text, nullable=False),
    Column("previous_hash", Text, nullable=False),
    Column("hash", Text, nullable=False),
)

# Which interfaces had a name, in order of declaration. Derived from the log and written with it; `verify` compares.
interface_names = Table(
    "interface_names",
    metadata,
    Column("interface_id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("position", Integer, nullable=False),
)

node = Table("node", metadata, Column("id", Text, primary_key=True), Column("created_at", Text, nullable=False))

# One row for each life of a counter: a link between creation and removal, a device between attach and detach.
# `raw` is the last value read; the lifetime total of an interface is the sum over its rows.
counter_incarnations = Table(
    "counter_incarnations",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("interface_id", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("key", Text, nullable=False),
    Column("opened_at", Text, nullable=False),
    Column("sampled_at", Text, nullable=False),
    Column("raw", Text, nullable=False),
)

# The small number that stands for an interface in the rows below; `first_at` is its first sample.
counter_interfaces = Table(
    "counter_interfaces",
    metadata,
    Column("number", Integer, primary_key=True),
    Column("interface_id", Text, nullable=False),
    Column("first_at", Integer, nullable=False),
)


def _tier(name: str) -> Table:
    """Lifetime totals of one resolution: see `service.domain.series`. Times in ms since the epoch, UTC."""
    figures = (
        *("rx_packets", "tx_packets", "rx_bytes", "tx_bytes", "rx_errors", "tx_errors", "rx_dropped", "tx_dropped"),
        *("from_kernel_packets", "from_kernel_bytes", "to_kernel_packets", "to_kernel_bytes"),
    )
    return Table(
        name,
        metadata,
        Column("at", Integer, primary_key=True),
        Column("interface", Integer, primary_key=True, autoincrement=False),
        Column("lag_ms", Integer, nullable=False),
        *(Column(figure, Integer, nullable=False) for figure in figures),
        Column("gap_ms", Integer, nullable=False),
        Column("missed", Text),
        Column("classes", Text),
    )


counter_raw = _tier("counter_raw")
counter_minutes = _tier("counter_minutes")
counter_hours = _tier("counter_hours")

# One row: how many samples were written and when the last, how far minutes and hours are complete (in the bucket
# after that: up to which interface), and up to where samples and minutes are gone.
counter_progress = Table(
    "counter_progress",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("sequence", Integer, nullable=False),
    Column("last_at", Integer, nullable=False),
    Column("minutes_at", Integer, nullable=False),
    Column("minutes_interface", Integer, nullable=False),
    Column("hours_at", Integer, nullable=False),
    Column("hours_interface", Integer, nullable=False),
    Column("raw_thinned", Integer, nullable=False),
    Column("minutes_thinned", Integer, nullable=False),
)

# What was answered to requests with an Idempotency-Key; `status` is NULL until there is an outcome.
answers = Table(
    "answers",
    metadata,
    Column("actor", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("fingerprint", Text, nullable=False),
    Column("command_id", Text, nullable=False),
    Column("recorded_at", Text, nullable=False),
    Column("status", Integer),
    Column("body", Text),
    Column("headers", Text),
    Column("media_type", Text),
)

# Folded state at some positions: a cache, believed only as far as `service.store.snapshots` can check it.
snapshots = Table(
    "snapshots",
    metadata,
    Column("position", Integer, primary_key=True),
    Column("hash", Text, nullable=False),
    Column("format", Text, nullable=False),
    Column("state", LargeBinary, nullable=False),
    Column("checksum", Text, nullable=False),
)
