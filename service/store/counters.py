"""Keeps counters: the last raw value of every incarnation, and samples of the totals over time.

Not in the log: folding never scans them, and they may be thinned. Written by the log's writer, in its transactions.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from service.domain.counters import Book, Reading, Source
from service.domain.values import InterfaceId
from service.store import schema
from service.store.database import UNREADABLE, open_reader, unreadable
from service.store.writer import Job

RAW_KEPT = datetime.timedelta(days=1)
THINNED_AT_ONCE = 1000  # rows; a bite, so that no command waits for it

_RAW = msgspec.json.Decoder(dict[str, int])


def load(path: Path) -> Book:
    """The totals as they were last stored. Raises TunledgerError: log_corrupt."""
    book, table = Book(), schema.counter_incarnations
    engine = open_reader(path)
    try:
        with engine.connect() as connection:
            for row in connection.execute(sa.select(table).order_by(table.c.id)):
                book.resume(Reading(InterfaceId(row.interface_id), Source(row.source), row.key, _RAW.decode(row.raw)))
    except (*UNREADABLE, msgspec.MsgspecError, ValueError) as error:  # or a row that says nothing
        raise unreadable(path, error) from error
    finally:
        engine.dispose()
    return book


def store(
    readings: Sequence[Reading], totals: Mapping[InterfaceId, Mapping[str, int]], now: str, thin_before: str
) -> Job:
    """The job that writes one sample: incarnations, totals, and a bite of thinning.

    Args:
        now, thin_before: UTC, ISO 8601; samples older than `thin_before` go, a bounded number at a time.
    """
    incarnations = [
        {
            "interface_id": reading.interface_id,
            "source": reading.source.value,
            "key": reading.key,
            "opened_at": now,
            "sampled_at": now,
            "raw": json.dumps(reading.raw, separators=(",", ":")),
        }
        for reading in readings
    ]
    samples = [
        {"interface_id": interface_id, "sampled_at": now, "totals": json.dumps(figures, separators=(",", ":"))}
        for interface_id, figures in totals.items()
    ]

    def write(connection: sa.Connection) -> None:
        if incarnations:
            upsert = insert(schema.counter_incarnations)
            connection.execute(
                upsert.on_conflict_do_update(
                    index_elements=["interface_id", "source", "key"],
                    set_={"sampled_at": upsert.excluded.sampled_at, "raw": upsert.excluded.raw},
                ),
                incarnations,
            )
        if samples:
            connection.execute(insert(schema.counter_samples).on_conflict_do_nothing(), samples)
        old = schema.counter_samples.c
        doomed = sa.select(old.interface_id, old.sampled_at).where(old.sampled_at < thin_before).limit(THINNED_AT_ONCE)
        connection.execute(
            sa.delete(schema.counter_samples).where(sa.tuple_(old.interface_id, old.sampled_at).in_(doomed))
        )

    return write
