"""Many rows in few statements.

For every row of an executemany, sqlite3 gives the interpreter away and asks for it again, which beside a busy event
loop may take a millisecond. A statement with many rows does so once. What the rows are does not concern this module.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import sqlalchemy as sa

VARIABLES_MAX = 999  # in one statement: the least that any SQLite allows (sqlite.org/limits.html)


def insert(connection: sa.Connection, head: str, rows: Sequence[Sequence[Any]], tail: str = "") -> None:
    """Insert rows of equal length, in their order.

    Args:
        head, tail: what stands before and behind VALUES: "INSERT INTO names (id, name)", an ON CONFLICT clause.
    """
    at = 0
    while at < len(rows):
        width = len(rows[at])
        # By powers of two, so that SQLite need not compile a statement for every number.
        count = 1 << min(len(rows) - at, VARIABLES_MAX // width).bit_length() - 1
        values = tuple(chain.from_iterable(rows[at : at + count]))
        connection.exec_driver_sql(_statement(head, width, count, tail), values)
        at += count


@lru_cache(128)
def _statement(head: str, width: int, count: int, tail: str) -> str:
    row = f"({', '.join('?' * width)})"
    return f"{head} VALUES {', '.join([row] * count)} {tail}"
